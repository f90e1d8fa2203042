"""Which node made the first value that is not finite? The step is run once more with every value looked at, on all ranks, as it ran.

What is asked for is the cause: the first node, in the order of the program, whose operands were finite and from which a chain of such values
leads to what the step returns. An infinity that a program writes on purpose (a mask's) is none, and one that a later op takes away leads nowhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from deepseed.build import Built, looked
from deepseed.check.typing import describe, operand_types
from deepseed.ir.program import Arg, Op, Program
from deepseed.ir.schedule import kind_of, order_of
from deepseed.ir.text import format_type
from deepseed.logs import warn
from deepseed.rules.lanes import STORED
from deepseed.runtime.executable import Executable, Halves
from deepseed.runtime.host import Host
from deepseed.runtime.looks import Look, Looks

_VIEWS = ("reshape", "permute", "expand", "slice", "cast", "cat", "pad", "shard", "wait", "all_gather.start", "transfer")
_MASKING = ("aten.add.Tensor", "aten.where.self", "aten.maximum", "aten.minimum", "aten.isinf", "aten.eq.Scalar", "aten.ne.Scalar", "aten.lt.Scalar", "aten.gt.Scalar", "aten.le.Scalar", "aten.ge.Scalar", "sdpa", "sdpa_backward")
Given = Sequence[list[Tensor]]  # of each hosted rank the inputs of its executable
At = tuple[str, int]  # a value and its microbatch
LATE = 1 << 30
INPUTS = {
    "param": "parameter {key!r} was not finite before the step\n  fix: an earlier update made it so, or it was loaded so: look at that step, or load an earlier checkpoint",
    "buffer": "buffer {key!r} was not finite before the step",
    "state": "optimizer state {key!r} was not finite before the step: an earlier update made it so",
    "batch": "batch entry {key!r} is not finite as it was given\n  fix: look at the data, and at what makes it",
    "tangent": "the gradient of output {key!r}, which backward was given, is not finite: it was made outside of the module, in your loss",
    "pending": "the gradient of {key!r}, which the update was given, is not finite: a backward made it so",
}  # fmt: skip


@dataclass(frozen=True)
class NonFinite:
    """The first node with a value that is not finite, the same on every rank. ``op``: None where an input came so.

    ``rank`` is the first rank that has it, ``index`` is in that rank's part, of ``shape``; ``operands``: values that it read that were not finite either."""

    node: str
    op: str | None
    path: str
    line: str
    phase: str
    value: float
    count: int
    index: tuple[int, ...]
    shape: tuple[int, ...]
    rank: int
    ranks: tuple[int, ...]
    microbatch: int | None
    operands: tuple[str, ...]
    shows: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return self.text


class NonFiniteError(RuntimeError):
    """A step whose loss or gradients are not finite: ``found`` is the first node that made such a value (None: a second run of the step had none)."""

    def __init__(self, what: str, found: NonFinite | None) -> None:
        again = "run once more it has only finite values: what it read has changed since, or an op is not deterministic"
        super().__init__(f"{what}\n{found or again}")
        self.found = found


def wanted(said: bool | None) -> bool:
    """Whether steps are checked: as ``check_finite=`` says, else ``DEEPSEED_NAN``."""
    return said if said is not None else os.environ.get("DEEPSEED_NAN", "0") not in ("", "0")


@dataclass
class Kept:
    """What a run read, so that it can be made once more."""

    built: Built
    host: Host
    given: Given
    stored: list[tuple[Tensor, Tensor]]  # what it writes, and the copy
    versions: list[int] = field(default_factory=list)  # of that, behind the run

    @staticmethod
    def of(built: Built, host: Host, given: Given, all_written: bool = False) -> Kept:
        """Before the run. Buffers that it writes are copied; with ``all_written`` parameters and state too, where it may write them."""
        written = {(o.role, o.key) for o in built.program.outputs if o.role in STORED and (all_written or o.role == "buffer")}
        kept = [_copied(e, mine, written) for e, mine in zip(built.executables, given, strict=True)]
        return Kept(built, host, kept, [(t, copy) for mine, copies in zip(given, kept, strict=True) for t, copy in zip(mine, copies, strict=True) if t is not copy])

    def ran(self) -> None:
        """Behind the run."""
        self.versions = [t._version for t, _ in self.stored]

    def put_back(self) -> None:
        """The buffers are what they were before the run, where nothing has written them since."""
        for (t, before), version in zip(self.stored, self.versions, strict=True):
            if t._version == version:
                t.copy_(before)

    def find(self, tangents: Given = ()) -> NonFinite | None:
        """Run again and look. Every rank must call it."""
        again = looked(self.built, self.host)
        looks = [Looks(self.host.mesh.rank(c)) for c in self.host.coordinates]
        written = {(o.role, o.key) for o in self.built.program.outputs if o.role in STORED}
        given = [_copied(e, mine, written) for e, mine in zip(again, self.given, strict=True)]
        arenas, self.host.arenas = self.host.arenas, ()
        try:
            if self.built.program.by_role("tangent"):
                halves = [e.halves() for e in again]
                self.host.run([_looking(h.forward, look) for h, look in zip(halves, looks, strict=True)], given)
                if tangents:
                    self.host.run([_looking(h.backward, look) for h, look in zip(halves, looks, strict=True)], [list(mine) for mine in tangents])
            else:
                self.host.run([_looking(e, look) for e, look in zip(again, looks, strict=True)], given)
        finally:
            self.host.arenas = arenas
        said = self.host.everyone([astuple(each) for look in looks for each in look.found()])
        return search(self.built.program, [Look(*each) for mine in said for each in mine])

    def report(self, what: str, expected: bool, tangents: Given = ()) -> None:
        """Raise NonFiniteError; where an overflow is ``expected``, since a loss scale is being found, only say it."""
        error = NonFiniteError(what, self.find(tangents))
        if not expected:
            raise error
        if self.host.first:
            warn(str(error))


def _looking(run: Callable[[Any, list[Tensor]], tuple[Tensor, ...]], looks: Looks) -> Callable[[Any, list[Tensor]], tuple[Tensor, ...]]:
    def step(rt: Any, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        rt.looks = looks
        try:
            return run(rt, inputs)
        finally:
            rt.looks = None

    return step


def _copied(e: Executable | Halves, given: Sequence[Tensor], written: set[tuple[str, str]]) -> list[Tensor]:
    inputs = [i for i in e.inputs if i.role != "tangent"]
    return [t.clone() if (i.role, i.key) in written else t for i, t in zip(inputs, given, strict=True)]


def finite(tensors: Iterator[Tensor]) -> bool:
    """One look at the device for all of them."""
    seen = [torch.isfinite(t).all() for t in tensors if (t.is_floating_point() or t.is_complex()) and t.numel()]
    return all(torch.stack([s.to(seen[0].device) for s in seen]).tolist()) if seen else True


def search(p: Program, looks: Sequence[Look]) -> NonFinite | None:
    """The cause among what was found on all ranks; None where everything that the program returns is finite."""
    return _Search(p, looks).run()


class _Search:
    def __init__(self, p: Program, looks: Sequence[Look]) -> None:
        self.p = p
        self.looks: dict[At, list[Look]] = {}
        for look in looks:
            self.looks.setdefault((look.name, look.mb), []).append(look)
        self.microbatches: dict[str, list[int]] = {}
        for name, mb in self.looks:
            self.microbatches.setdefault(name, []).append(mb)
        self._known: dict[At, bool] = {}
        self.inputs = {i.name: i for i in p.inputs}

    @cached_property
    def position(self) -> Mapping[str, float]:
        """The place of each value in the program; of an input that before its first use."""
        out: dict[str, float] = {r: n for n, op in enumerate(self.p.ops) for r in op.results}
        for n, op in enumerate(self.p.ops):
            for ref in op.refs:
                out.setdefault(ref.name, n - 0.5)
        return out

    def run(self) -> NonFinite | None:
        for at in sorted(self.looks, key=lambda at: (self.position.get(at[0], -1), at[1])):
            self._written_so(at)  # in the order of the program, so that each is one look back
        ends = [(f"{o.role} {o.key!r}", o.ref.name) for o in self.p.outputs]
        ends += [("the gradients, which are asked about", op.refs[0].name) for op in self.p.ops if op.target == "aten.isfinite" and op.phase == "update"]
        shown = [label for label, name in ends if self._read(name, None)]
        pending = [at for _, name in ends for at in self._read(name, None)]
        seen: set[At] = set(pending)
        made: list[At] = []
        while pending:
            at = pending.pop()
            before = self._causes(at)
            if not before:
                made.append(at)
            fresh = [b for b in before if b not in seen]
            seen.update(fresh)
            pending += fresh
        if not seen:
            return None
        first = min(made or seen, key=self._order)
        if self._meant(first):  # nothing but what was written on purpose, and the op that could not take it
            first = min((at for at in made if not self._meant(at)), key=self._order, default=first)
        return self._named(first, shown)

    def _read(self, name: str, mb: int | None) -> list[At]:
        """The non-finite values that a use of ``name`` in microbatch ``mb`` (None: after all) reads; through what has no value of its own."""
        op = self.p.producers.get(name)
        if op is not None and (op.target.endswith(".start") or op.target == "collect"):
            return [at for source in _sources(op, name) for at in self._read(source, mb)]
        if mb is not None and op is not None and kind_of(op.part) not in ("", "once"):
            return [(name, mb)] if (name, mb) in self.looks else []
        return [(name, each) for each in self.microbatches.get(name, ())]

    def _causes(self, at: At) -> list[At]:
        """What of its operands explains it: NaNs by NaNs, where there are any; else infinities, of which a NaN is made by the op itself."""
        op = self.p.producers.get(at[0])
        if op is None:
            return []
        inside = kind_of(op.part) not in ("", "once")
        read = [b for source in _sources(op, at[0]) for b in self._read(source, at[1] if inside else None)]
        if self._nan(at):
            nans = [b for b in read if self._nan(b)]
            return nans or [b for b in read if not self._written_so(b)]
        return read

    def _written_so(self, at: At) -> bool:
        """Whether an infinity comes of nothing but such as are meant."""
        if at not in self._known:
            before = self._causes(at)
            self._known[at] = all([self._written_so(b) for b in before]) if before else self._meant(at)
        return self._known[at]

    def _meant(self, at: At) -> bool:
        """Whether an infinity is written into the program, or given as one: a mask."""
        if self._nan(at):
            return False
        op, given = self.p.producers.get(at[0]), self.inputs.get(at[0])
        if op is None:
            return given is not None and (given.role == "constant" or (given.role == "batch" and all(look.value == float("-inf") for look in self.looks[at]) and self._masks(at[0])))
        return any(_infinite(a) for a in (*op.args, *(v for _, v in op.kwargs)))

    def _masks(self, name: str) -> bool:
        """Whether a batch entry only adds to scores, chooses or is compared: as a mask does, and data does not."""
        todo, seen = [name], set[str]()
        while todo:
            value = todo.pop()
            for user in self.p.uses[value] if value not in seen else ():
                if not isinstance(user, Op) or user.target not in (*_VIEWS, *_MASKING):
                    return False
                if user.target in _VIEWS:
                    todo += user.results
            seen.add(value)
        return True

    def _nan(self, at: At) -> bool:
        return any(look.nan for look in self.looks[at])

    def _order(self, at: At) -> tuple[bool, int, float]:
        op = self.p.producers.get(at[0])
        late = op is not None and kind_of(op.part) == "once" and order_of(op.part)[0] > 0
        return self._meant(at), LATE if late else at[1], self.position.get(at[0], -1)

    def _named(self, at: At, shows: list[str]) -> NonFinite:
        looks, op, given = self.looks[at], self.p.producers.get(at[0]), self.inputs.get(at[0])
        first = min(looks, key=lambda look: look.rank)
        index = tuple(int(i) for i in _index(first.first, first.shape))
        inside = op is not None and kind_of(op.part) not in ("", "once")
        operands: tuple[str, ...] = ()
        if op is not None:
            operands = tuple(dict.fromkeys(b[0] for source in _sources(op, at[0]) for b in self._read(source, at[1] if inside else None)))
            head = describe(op, operand_types(self.p, op), self.p.mesh)
        else:
            assert given is not None
            head = f"%{given.name} : {format_type(given.type, self.p.mesh)}\n  " + INPUTS.get(given.role, "{role} {key!r} is not finite").format(role=given.role, key=given.key)
        ranks = tuple(sorted({look.rank for look in looks}))
        where = f"rank {first.rank}" + (f" (and {', '.join(map(str, ranks[1:]))})" if ranks[1:] else "") + (f", microbatch {at[1]}" if inside else "")
        lines = [head, f"  {first.value} at {list(index)} of its {list(first.shape)}, {first.count} such element{'s' if first.count > 1 else ''}, on {where}"]
        if op is not None:
            lines.append("  made here: its operands are finite" if not operands else f"  made here of what is infinite: {', '.join('%' + name for name in operands)}")
        lines.append(f"  it shows in {', '.join(shows[:4])}" + (f" and {len(shows) - 4} more" if len(shows) > 4 else ""))
        path, line, phase = (op.path, op.line, op.phase) if op is not None else ("", "", "")
        micro = at[1] if inside else None
        return NonFinite(at[0], None if op is None else op.target, path, line, phase, first.value, first.count, index, first.shape, first.rank, ranks, micro, operands, tuple(shows), "\n".join(lines))


def _sources(op: Op, result: str) -> list[str]:
    """The operands that a result is made of: of a bucket's only its own."""
    if len(op.results) > 1 and op.target.endswith(".start") and len(op.refs) == len(op.results):
        return [op.refs[op.results.index(result)].name]
    return [r.name for r in op.refs]


def _infinite(a: Arg) -> bool:
    return any(map(_infinite, a)) if isinstance(a, tuple) else isinstance(a, float) and a in (float("inf"), float("-inf"))


def _index(number: int, shape: Sequence[int]) -> list[int]:
    out: list[int] = []
    for n in reversed(shape):
        number, at = divmod(number, n)
        out.append(at)
    return out[::-1]
