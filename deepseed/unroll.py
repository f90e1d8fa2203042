"""One pipeline rank's step as a straight-line program: the lane of its schedule with every loop written out.

``forward.1`` of microbatch 3 becomes ops whose results are called ``name#3``; what runs once keeps its names. A sum over microbatches is
a chain, ``acc#1 = accumulate(acc#0, x#1)``, whose end has the plain name; so is ``collect``. The batch is there whole, and each microbatch
takes its rows where it first reads them. What other ranks send is a
``transfer`` without an operand; what is sent is taken to be gone when its last reader here has run. The program is for counting
(deepseed.memory runs on it), not for running.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from deepseed.ir.mesh import TIME
from deepseed.ir.messages import TRANSFER, Place, home, runs_once
from deepseed.ir.program import Arg, Op, Program, Ref
from deepseed.ir.schedule import Instruction, Schedule

IN_TIME = ("accumulate", "collect")


@dataclass(frozen=True)
class Unrolled:
    """``origin``: for each op of ``program`` the place of its instruction in the lane, and its own place among the ops of that instruction."""

    program: Program
    origin: tuple[tuple[int, int], ...]


def unroll(p: Program, lane: int) -> Unrolled:
    """The step of pipeline rank ``lane``. Raises ValueError on a program without a schedule."""
    if p.schedule is None:
        raise ValueError(f"{p.name} has no schedule to unroll")
    return _Unroll(p, p.schedule, lane).run()


class _Unroll:
    def __init__(self, p: Program, schedule: Schedule, lane: int) -> None:
        self.p, self.schedule, self.lane = p, schedule, lane
        self.ops: dict[Place, list[Op]] = {}
        for op in p.ops:
            if schedule.lane_of(op.stage) == lane:
                self.ops.setdefault(home(schedule, (op.part, op.stage)), []).append(op)
        here = [i for i in schedule.lanes[lane] if (i.part, i.stage) in self.ops]
        self.last = {(i.part, i.stage): i.microbatch for i in here}
        self.first = {(i.part, i.stage): i.microbatch for i in reversed(here)}
        self.looped = {r for op in p.ops if not runs_once(op.part) and op.target not in IN_TIME for r in op.results}
        self.inputs = tuple(i for i in p.inputs if i.role not in ("param", "buffer", "state") or schedule.lane_of(i.stage) == lane)
        self.cut = {i.name: i for i in self.inputs if i.type.layout.on(TIME) is not None}  # inputs of which each microbatch has a part
        self.looped |= self.cut.keys()

    def run(self) -> Unrolled:
        ops: list[Op] = []
        origin: list[tuple[int, int]] = []
        taken: set[str] = set()
        for n, i in enumerate(self.schedule.lanes[self.lane]):
            for k, op in enumerate(self.ops.get((i.part, i.stage), ())):
                for ref in op.refs:
                    if ref.name in self.cut and (name := f"{ref.name}#{i.microbatch}") not in taken:
                        taken.add(name)
                        ops.append(Op((name,), "shard", (Ref(ref.name),), (self.cut[ref.name].type,), (("axis", TIME),), op.phase, op.path, part=op.part, stage=op.stage))
                        origin.append((n, k))
                ops.append(self._instance(op, i))
                origin.append((n, k))
        known = {i.name for i in self.inputs} | {r for op in ops for r in op.results}
        outputs = tuple(o for o in self.p.outputs if o.ref.name in known)
        inputs = tuple(replace(i, type=i.type.laid(i.type.layout.with_(TIME, None))) if i.name in self.cut else i for i in self.inputs)
        return Unrolled(replace(self.p, inputs=inputs, ops=tuple(ops), outputs=outputs, schedule=None), tuple(origin))

    def _instance(self, op: Op, i: Instruction) -> Op:
        if op.target == TRANSFER and self.schedule.lane_of(int(str(op.kw("source")))) != self.lane:
            return replace(op, results=tuple(self._name(r, i.microbatch) for r in op.results), args=())
        made = op.map_refs(lambda ref: Ref(self._name(ref.name, i.microbatch), ref.want))
        made = replace(made, kernel=f"{op.kernel}#{i.microbatch}") if op.kernel else made
        if op.target not in IN_TIME or runs_once(op.part):
            return replace(made, results=tuple(self._name(r, i.microbatch) for r in op.results))
        place = op.part, op.stage
        before: tuple[Arg, ...] = () if i.microbatch == self.first[place] else (Ref(f"{op.name}#{i.microbatch - 1}"),)
        name = op.name if i.microbatch == self.last[place] else f"{op.name}#{i.microbatch}"
        return replace(made, results=(name,), args=(*before, *made.args))

    def _name(self, name: str, microbatch: int) -> str:
        return f"{name}#{microbatch}" if name in self.looped else name


def original(name: str) -> str:
    """The name in the looped program. A module that is called twice has a number inside its ops' names.

    >>> original("h#12"), original("h"), original("drop#2.div#0")
    ('h', 'h', 'drop#2.div')
    """
    head, _, number = name.rpartition("#")
    return head if number.isdigit() else name
