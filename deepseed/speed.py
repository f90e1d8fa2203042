"""How long the ops of a step take, estimated op by op: a roofline, with collectives beside the computation.

An op takes the time of its arithmetic or of the memory that it reads and writes, whichever is longer (Williams et al. 2009), and
the time to start it; views take none. What runs on the host takes the time of the host's memory. Moves between the memories are like
collectives, one after another over the host's link, in each direction. Collectives run beside it, those of one axis one after another, each for the bytes that a
rank sends (deepseed.cost) at the speed of a link; a ``wait`` holds the computation until its collective has ended. A ``Machine`` says
what the numbers assume; ``deepseed calibrate`` measures one (deepseed.machines).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from deepseed.counts import is_collective, local_flops, moved_bytes, sent_bytes
from deepseed.ir.program import Op, Program

VIEWS = ("reshape", "permute", "expand", "slice", "shard", "wait", "transfer")
ROWS = ("embedding", "gather")  # they read the rows that they give, not the whole table


class MachineError(ValueError):
    """A description of a machine that cannot be read."""


@dataclass(frozen=True)
class Machine:
    """What one rank does in a second, ``flops`` of matmuls, bytes of ``memory`` (of the host's, ``host_memory``), bytes sent over a ``link`` and
    moved over that to the host, ``host_link``; and the seconds that it takes to start a collective (``latency``) and an op (``launch``). ``rates``: flops of
    matmuls by dtype, where they are known."""

    flops: float = 150e12
    memory: float = 1.5e12
    link: float = 50e9
    host_memory: float = 100e9
    host_link: float = 25e9
    latency: float = 10e-6
    launch: float = 3e-6
    rates: tuple[tuple[str, float], ...] = ()

    def seconds(self, p: Program, op: Op) -> float:
        """Of one op on one rank, collectives aside."""
        return self.together(p, (op,))

    def together(self, p: Program, ops: Sequence[Op]) -> float:
        """Of ops that one kernel does: it reads what they take from outside, and writes what is read outside. Collectives aside."""
        work = [op for op in ops if op.target not in VIEWS and not op.target.endswith(".start")]
        if not work:
            return 0.0
        made = {r for op in ops for r in op.results}
        members = {op.name for op in ops}
        read = {r.name for op in work if op.target not in ROWS for r in op.refs} - made
        inner = {r for op in work[:-1] for r in op.results if all(isinstance(u, Op) and u.name in members for u in p.uses[r])}
        moved = sum(p.types[name].local_bytes(p.mesh) for name in (*read, *(r for op in work for r in op.results if r not in inner)))
        return max(sum(local_flops(p, op) / self.rate(op) for op in work if op.types), moved / (self.host_memory if work[0].type.host else self.memory)) + self.launch

    def rate(self, op: Op) -> float:
        return next((rate for dtype, rate in self.rates if dtype == op.types[0].dtype), self.flops)

    def sending(self, p: Program, op: Op) -> float:
        """Of one collective, or of a move between the memories, from its start to its end."""
        return self.latency + (sent_bytes(p, op) / self.link if is_collective(op) else moved_bytes(p, op) / self.host_link)


@dataclass(frozen=True)
class Known(Machine):
    """A machine on which the ops take ``took`` seconds, by name: as they were measured, or estimated once."""

    took: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, machine: Machine, p: Program) -> Known:
        """With what ``machine`` takes for the ops of ``p``."""
        return cls(**{f.name: getattr(machine, f.name) for f in fields(Machine)}, took={op.name: machine.seconds(p, op) for op in p.ops})

    def seconds(self, p: Program, op: Op) -> float:
        return self.took[op.name]


@dataclass(frozen=True)
class Sent:
    """One collective under way, in seconds from the first op. ``nbytes``: what a rank sends; ``held``: how long its first wait stood still."""

    axis: str
    target: str
    start: float
    end: float
    nbytes: int
    held: float = 0.0


@dataclass(frozen=True)
class Course:
    """When each op of a list starts and ends, in seconds from the first; and the collectives beside them."""

    spans: tuple[tuple[float, float], ...]
    sent_by: tuple[tuple[int, Sent], ...]  # the place of the op that started it in the list, and the collective

    @property
    def sent(self) -> tuple[Sent, ...]:
        return tuple(s for _, s in self.sent_by)

    @property
    def seconds(self) -> float:
        """Until the last op has ended and the last collective has arrived."""
        return max([0.0, *(end for _, end in self.spans), *(s.end for s in self.sent)])


def course(p: Program, ops: Iterable[Op], machine: Machine) -> Course:
    """Run ``ops``, of the lowered program ``p``, in their order. A collective that they wait for without starting it has arrived."""
    now = 0.0
    free: dict[str, float] = {}  # axis -> when its last collective ends
    under_way: dict[str, int] = {}  # started value -> its place in sent
    sent: list[Sent] = []
    by: list[int] = []
    spans: list[tuple[float, float]] = []
    for op in ops:
        began = now
        if op.target == "wait" and op.refs[0].name in under_way:
            at = under_way[op.refs[0].name]
            held = max(0.0, sent[at].end - now)
            sent[at] = replace(sent[at], held=sent[at].held + held)
            now += held
        now += machine.seconds(p, op)
        if op.target.endswith(".start"):
            far = is_collective(op)
            axis, nbytes = (str(op.kw("axis")), sent_bytes(p, op)) if far else (op.target.removesuffix(".start"), moved_bytes(p, op))
            start = max(now, free.get(axis, 0.0))
            free[axis] = start + machine.sending(p, op)
            under_way.update(dict.fromkeys(op.results, len(sent)))
            sent.append(Sent(axis, op.target.removesuffix(".start"), start, free[axis], nbytes))
            by.append(len(spans))
        spans.append((began, now))
    return Course(tuple(spans), tuple(zip(by, sent, strict=True)))


def parse_machine(text: str) -> Machine:
    """``flops=300e12,link=1e11``: what is not said stays. Raises MachineError naming the word.

    >>> parse_machine("link=25e9").link
    25000000000.0
    """
    known = {f.name for f in fields(Machine)} - {"rates"}
    said: dict[str, Any] = {}
    for word in filter(None, (w.strip() for w in text.split(","))):
        name, _, number = word.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = 0.0
        if name not in known or not 0 < value < float("inf"):
            raise MachineError(f"--machine {text!r}: cannot read {word!r}\n  fix: write numbers above zero for {', '.join(sorted(known))}, as in flops=300e12,link=100e9")
        said[name] = value
    return replace(Machine(), **said)
