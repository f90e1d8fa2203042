"""Does a pass keep the meaning of every value? Its program against the one before it, value by value, without running a model.

Values get numbers: equal numbers, equal expressions of the inputs, with moves (reshard, collectives, wait, local cuts) as identity and
layouts left to typing. A value that is the same op on the same numbers as its namesake before the pass is the same: a table lookup
an op. Where a pass wrote another op (a decomposition, a simplification, a kernel), both expressions are followed down to values that
the two programs share and run on small random tensors (``fragments``). So a stale gather, swapped operands, a dropped scale or a
wrong decomposition is named where it stands. What one rank runs is compared with ``localize_timed``, op by op.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from deepseed.check.typing import MOVES, SAME, describe, operand_types
from deepseed.ir.mesh import STAGES, TIME
from deepseed.ir.program import Arg, Op, Program, Ref
from deepseed.ir.subaxes import on_axes_of
from deepseed.ir.text import format_op
from deepseed.rules import localize_timed, on_lane

IDENTITY = frozenset((*MOVES, *SAME, "reshard"))
# An op that writes into its operands, which its schema does not say: operand positions, and the argument that must be true.
WRITES: dict[str, tuple[tuple[int, ...], int]] = {"aten.native_batch_norm": ((3, 4), 5)}


class TranslationError(ValueError):
    """A value that a pass made another one: names node, module path, both expressions and, where they were run, both numbers."""


class Made(NamedTuple):
    """How a program makes one numbered value: result ``result`` of ``op``, or (-1 - i) what it writes into operand i."""

    op: Op
    result: int
    operands: tuple[int, ...]


@dataclass
class Table:
    """What the numbers of one pipeline's programs mean; it only grows."""

    ids: dict[tuple[object, ...], int] = field(default_factory=dict)
    types: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)  # dtype and shape by number
    constant: set[int] = field(default_factory=set)  # made of no input
    differ: dict[str, str] = field(default_factory=dict)  # expressions that were run and give other numbers, by digest: why
    proved: dict[int, int] = field(default_factory=dict)  # what an expression was shown to be: computed again, it has that number too

    def meant(self, n: int) -> int:
        while n in self.proved:
            n = self.proved[n]
        return n

    def number(self, key: tuple[object, ...], types: list[tuple[str, tuple[int, ...]]], constant: bool) -> int:
        """The number of the first of the values that ``key`` means; the others follow it."""
        first = self.ids.get(key)
        if first is None:
            first = self.ids[key] = len(self.types)
            self.types += types
            if constant:
                self.constant.update(range(first, first + len(types)))
        return first


@dataclass
class Numbering:
    """The numbers of one program's values, and who makes each."""

    program: Program
    table: Table
    numbers: dict[str, int] = field(default_factory=dict)  # by value name; what was written into has its new one
    steps: dict[str, tuple[Op, tuple[int, ...]]] = field(default_factory=dict)  # by op name: the op, and its operands
    made: dict[int, Made] = field(default_factory=dict)
    unproved: list[str] = field(default_factory=list)  # expressions that were too large to run, or NaN on all operands: taken as equal, and said so

    def name(self, name: str, n: int) -> None:
        """Give a value its number."""
        if "holders" in self.__dict__:
            if name in self.numbers:
                self.holders[self.numbers[name]] -= 1
            self.holders[n] += 1
        self.numbers[name] = n

    @cached_property
    def holders(self) -> Counter[int]:
        """How many values of the program, as far as it is numbered, have each number."""
        return Counter(self.numbers.values())

    @cached_property
    def order(self) -> Mapping[int, int]:
        """The place of each made number among them, once the program is numbered to its end."""
        return {n: k for k, n in enumerate(self.made)}

    @property
    def outputs(self) -> dict[tuple[str, str], int]:
        """What is returned by role and key, and the inputs that were written into: their new values."""
        out = {(i.role, i.key): self.numbers[i.name] for i in self.program.inputs if self.numbers[i.name] in self.made}
        return out | {(o.role, o.key): self.numbers[o.ref.name] for o in self.program.outputs}


def number(p: Program) -> Numbering:
    """The numbering that ``follow`` begins with."""
    out = Numbering(p, Table())
    _inputs(out)
    for op in p.ops:
        reads = _read(out, op)
        if op.target not in IDENTITY:
            _define(out, op, reads, _lookup(out, op, reads))
    return out


def follow(before: Numbering, after: Program) -> Numbering:
    """The numbering of the program after a pass, every value proved. Raises TranslationError at the first that is another one.

    ``before`` stays as it is: a program may be followed to several others."""
    out = Numbering(after, before.table)
    _inputs(out)
    old_inputs, new_inputs = ({(i.role, i.key): (i.type.dtype, i.type.shape) for i in p.inputs} for p in (before.program, after))
    for role, key in [*(k for k in old_inputs if k not in new_inputs), *(k for k in new_inputs if old_inputs.get(k) != new_inputs[k])]:
        raise TranslationError(
            f"input {role} {key!r} is {new_inputs.get((role, key), 'gone')} after the pass, {old_inputs.get((role, key), 'missing')} before it"
        )
    steps, numbers, known, makers = before.steps, before.numbers, out.numbers, out.made
    for op in after.ops:
        if op.target in IDENTITY:
            _read(out, op)
            continue
        reads = tuple([known[ref.name] for ref in op.refs])
        step = steps.get(op.results[0])
        if step is not None and step[1] == reads and (step[0] is op or _same(step[0], op)):
            out.steps[op.results[0]] = step if step[0] is op else (op, reads)
            for k, r in enumerate(op.results):
                n = numbers[r]
                out.name(r, n)
                if n not in makers:
                    makers[n] = before.made[n] if step[0] is op else Made(op, k, reads)
            continue
        out.steps[op.results[0]] = op, reads
        first = _lookup(out, op, reads)
        _define(out, op, reads, first)
        for k, (r, t) in enumerate(zip(op.results, op.types, strict=True)):
            was, now = numbers.get(r), out.table.meant(first + k)
            if was is not None and was != now and before.table.types[was] == (t.dtype, t.shape):
                assumed = len(out.unproved)
                _prove(before, out, was, now, op)
                out.name(r, was)
                makers.setdefault(was, makers[now])
                if len(out.unproved) == assumed and out.table.meant(was) != now:
                    out.table.proved[now] = was
    want, have = before.outputs, out.outputs
    for role, key in [*want, *(k for k in have if k not in want)]:
        a, b = want.get((role, key)), have.get((role, key))
        if a is None or b is None:
            raise TranslationError(f"output {role} {key!r} is returned {'after' if a is None else 'before'} the pass only")
        if a != b:
            made = out.made.get(b)
            _prove(before, out, a, b, made.op if made is not None else None, f"output {role} {key!r}: {', '.join(f'%{name}' for name in _moved(after, role, key))}")
    return out


def check_localized(shared: Program, mine: Program, coordinate: Mapping[str, int]) -> None:
    """``mine`` is ``shared`` with each op as the rank at ``coordinate`` must call it: the same order, so that collectives meet.

    Raises TranslationError at the first op that is another one."""
    where = f"the rank at {dict(coordinate)}"
    shared = on_lane(shared, coordinate.get(STAGES, 0))
    coordinate = on_axes_of(coordinate, shared.mesh.without(TIME))
    if (shared.inputs, shared.mesh.seen_from({**coordinate, TIME: 0})) != (mine.inputs, mine.mesh):
        wrong = [i for i, j in zip(shared.inputs, mine.inputs, strict=False) if i != j][:1]
        raise TranslationError("".join(f"input {i.role} {i.key!r}: " for i in wrong) + f"other inputs or another mesh on {where}, {mine.mesh} of {shared.mesh}")
    for o, mine_o in zip(shared.outputs, mine.outputs, strict=False):
        if o != mine_o:
            made = shared.producers.get(o.ref.name)
            at = f", made at {made.path or 'the top level'}" if made is not None else ""
            raise TranslationError(f"output {mine_o.role} {mine_o.key!r} is %{mine_o.ref.name} on {where}; due is {o.role} {o.key!r}, %{o.ref.name}{at}")
    shared_types = shared.types
    for n, (op, got) in enumerate(zip(shared.ops, mine.ops, strict=False)):
        want = localize_timed(op, [shared_types[r.name] for r in op.refs], shared.mesh, coordinate)
        if want is not got and want != got:
            types = {**shared.types, **mine.types}
            raise TranslationError(
                f"{describe(got, tuple(types[r.name] for r in got.refs), mine.mesh)}\n  op {n} of {where}\n"
                f"  due at {want.path or 'the top level'}: {format_op(want, types, mine.mesh)}\n  runs: {format_op(got, types, mine.mesh)}"
            )
    if (len(shared.ops), len(shared.outputs)) != (len(mine.ops), len(mine.outputs)):
        raise TranslationError(f"{len(mine.ops)} ops of {len(shared.ops)} and {len(mine.outputs)} outputs of {len(shared.outputs)} on {where}")


# numbers ------------------------------------------------------------------------------------------------------------


def _inputs(out: Numbering) -> None:
    for i in out.program.inputs:
        t = (i.type.dtype, i.type.shape)
        out.name(i.name, out.table.number(("input", i.role, i.key, t), [t], False))


def _read(out: Numbering, op: Op) -> tuple[int, ...]:
    """The numbers of the operands; what a move brings has its operand's."""
    numbers = out.numbers
    reads = tuple([numbers[r.name] for r in op.refs])
    out.steps[op.results[0]] = op, reads
    if op.target in IDENTITY:
        for r, n in zip(op.results, reads, strict=False):  # which ids rows travel by is for typing
            out.name(r, n)
    return reads


def _same(old: Op, op: Op) -> bool:
    """The same op, layouts and operands aside."""
    if old.target != op.target or old.results != op.results:
        return False
    if not (old.kwargs is op.kwargs or _alike(old.kwargs, op.kwargs)) or not (old.args is op.args or _alike(old.args, op.args)):
        return False
    if old.types is not op.types:
        for a, b in zip(old.types, op.types, strict=True):
            if a is not b and (a.shape != b.shape or a.dtype != b.dtype):
                return False
    return True


def _alike(a: Arg | tuple[object, ...], b: Arg | tuple[object, ...]) -> bool:
    """Equal arguments, whatever values they refer to."""
    if a is b:
        return True
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(map(_alike, a, b))  # type: ignore[arg-type]
    return type(a) is type(b) and (isinstance(a, Ref) or a == b)


def _lookup(out: Numbering, op: Op, reads: tuple[int, ...]) -> int:
    types = [(t.dtype, t.shape) for t in op.types]
    constant = out.table.constant
    return out.table.number((op.form, op.kw("site"), reads, tuple(types)), types, all([r in constant for r in reads]))


def _define(out: Numbering, op: Op, reads: tuple[int, ...], first: int) -> None:
    for k, r in enumerate(op.results):
        n = out.table.meant(first + k)
        out.name(r, n)
        out.made.setdefault(n, Made(op, k, reads))
    positions, given = WRITES.get(op.target, ((), 0))
    for i in positions if positions and op.args[given] else ():
        if i < len(op.refs) and op.args[i] is op.refs[i]:
            t = out.table.types[reads[i]]
            new = out.table.number(("written", first, i), [t], False)
            out.name(op.refs[i].name, new)
            out.made[new] = Made(op, -1 - i, reads)


# proofs -------------------------------------------------------------------------------------------------------------


def _prove(before: Numbering, after: Numbering, was: int, now: int, op: Op | None, shown: str = "") -> None:
    """Two expressions of one value agree; raises TranslationError where they do not."""
    from deepseed.check.fragments import disagreement

    found = disagreement(before, after, was, now)
    if found is None:
        return
    why, old, new = found
    head = f"{shown}\n  " if shown else ""
    head += describe(op, operand_types(after.program, op), after.program.mesh) if op is not None else f"is input {_input_name(after, now)}"
    raise TranslationError(
        f"{head}\n  is another value than before the pass: {why}\n  before the pass:{''.join(_lines(before, old))}\n  after it:{''.join(_lines(after, new))}"
    )


def _lines(side: Numbering, ops: list[Op]) -> Iterator[str]:
    p = side.program
    for op in ops[-8:]:
        yield f"\n    {format_op(op, p.types, p.mesh)}"
    if len(ops) > 8:
        yield f"\n    … and {len(ops) - 8} ops before them"
    if not ops:
        yield " an input"


def _moved(p: Program, role: str, key: str) -> list[str]:
    """The value that is returned, and through which moves it came."""
    names = [o.ref.name for o in p.outputs if (o.role, o.key) == (role, key)]
    while (op := p.producers.get(names[-1])) is not None and op.target in IDENTITY:
        names.append(op.refs[op.results.index(names[-1])].name if len(op.refs) >= len(op.results) else op.refs[0].name)
    return names


def _input_name(side: Numbering, n: int) -> str:
    return next((f"%{i.name} {i.role} {i.key!r}" for i in side.program.inputs if side.numbers[i.name] == n), "?")
