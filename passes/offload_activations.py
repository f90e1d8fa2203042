"""``offload(activations)``: what the backward reads of the forward waits on the host, each microbatch's on the stage that made it.

A value goes to the host when it is made, and its device memory ends with its last reader in the forward; it comes back for its first
reader in the backward. A reshape, a turn or an expansion is made again there from what it was made of, which is moved once.
This runs behind ``cut_stages``: which stage saves what is known there only.
"""

from __future__ import annotations

from deepseed.ir.collective import TO_DEVICE, TO_HOST
from deepseed.ir.contract import program_pass
from deepseed.ir.program import Arg, Builder, Op, Program, Ref, params_only

VIEWS = ("reshape", "permute", "expand")  # they share the memory of their operand, or may
LEAST = 1024  # bytes on a rank below which a value stays: moving it would cost more than it frees


@program_pass(requires={"lowered"})
def offload_activations(p: Program, wanted: bool = False) -> Program:
    """Moves for every value of ``LEAST`` bytes or more that the backward reads of the forward, where the plan has ``wanted`` that.

    before: %x : f32[64, 64] batch "x"
            %d : f32[64, 64] batch "d"
            %h = aten.exp(%x) : f32[64, 64] {phase="forward"}
            %g = aten.mul.Tensor(%d, %h) : f32[64, 64] {phase="backward"}
    after:  %x : f32[64, 64] batch "x"
            %d : f32[64, 64] batch "d"
            %h = aten.exp(%x) : f32[64, 64] {phase="forward"}
            %h.host.start = to_host.start(%h) : f32[64, 64] host {phase="forward"}
            %h.host = wait(%h.host.start) : f32[64, 64] host {phase="forward"}
            %h.device.start = to_device.start(%h.host) : f32[64, 64] {phase="backward"}
            %h.device = wait(%h.device.start) : f32[64, 64] {phase="backward"}
            %g = aten.mul.Tensor(%d, %h.device) : f32[64, 64] {phase="backward"}
    """
    if not wanted:
        return p
    weights = params_only(p)
    out = Builder(p)
    back: dict[str, str] = {}  # saved value -> its name in the backward
    waits: dict[str, Op] = {}  # saved root -> the wait of its move to the host

    def saved(name: str) -> bool:
        made = p.producers.get(name)
        return made is not None and made.phase == "forward" and name not in weights and not p.types[name].host and not made.target.endswith(".start")

    def root(name: str) -> str:
        made = p.producers[name]
        return root(made.refs[0].name) if made.target in VIEWS and saved(made.refs[0].name) else name

    roots = {root(ref.name) for op in p.ops if op.phase == "backward" for ref in op.refs if saved(ref.name)}
    roots = {name for name in roots if p.types[name].local_bytes(p.mesh) >= LEAST}

    def here(ref: Ref, reader: Op) -> Arg:
        """A value of the forward as the backward reads it."""
        name = ref.name
        if not saved(name) or root(name) not in roots:
            return ref
        if name not in back:
            back[name] = returned(name, reader) if name in roots else again(name, reader)
        return Ref(back[name])

    def again(name: str, reader: Op) -> str:
        op, new = p.producers[name], out.fresh(f"{name}.again")
        out.emit(Op((new,), op.target, tuple([here(a, reader) if isinstance(a, Ref) else a for a in op.args]), op.types, op.kwargs, "backward", op.path, op.line, "", reader.part, reader.stage))
        return new

    def returned(name: str, reader: Op) -> str:
        wait = waits.pop(name)
        if not wait.part:
            out.emit(wait)
        t, new = p.types[name], out.fresh(f"{name}.device")
        start = out.fresh(f"{new}.start")
        there = "backward", reader.path, reader.line, "", reader.part, reader.stage
        out.emit(Op((start,), TO_DEVICE, (Ref(wait.name),), (t,), (), *there))
        out.emit(Op((new,), "wait", (Ref(start),), (t,), (), *there))
        return new

    for op in p.ops:
        out.emit(op.map_refs(lambda ref, op=op: here(ref, op)) if op.phase == "backward" else op)  # type: ignore[misc]
        for name in op.results:
            if name in roots:
                t, host = p.types[name].on(True), out.fresh(f"{name}.host")
                start = out.fresh(f"{host}.start")
                here_too = "forward", op.path, op.line, "", op.part, op.stage
                out.emit(Op((start,), TO_HOST, (Ref(name),), (t,), (), *here_too))
                waits[name] = Op((host,), "wait", (Ref(start),), (t,), (), *here_too)
                if op.part:  # it ends with its part
                    out.emit(waits[name])
    return out.program()
