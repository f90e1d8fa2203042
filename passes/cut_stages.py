from dataclasses import replace
from deepseed.ir.contract import program_pass
from deepseed.ir.mesh import TIME
from deepseed.ir.program import Program
from deepseed.solver.schedules import lanes


@program_pass(requires={"looped"}, provides={"staged"})
def cut_stages(p: Program) -> Program:
    """x"""
    if TIME not in p.mesh.sizes:
        return p
    parts = {(op.part, op.stage) for op in p.ops}
    loops = max(int(part.partition(".")[2]) for part, _ in parts)
    return replace(p, schedule=lanes("1f1b", 1, p.mesh.size(TIME), 1, loops, parts))
