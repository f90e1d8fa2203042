"""Does a pass keep the meaning? The program after it computes what the program before it computed, on the same numbers.

Typing and instances show that a program means the same sharded as whole; this shows that it still is the program that was
captured. Both are executed on all ranks (``execution``) and compared output by output. Where they differ, the values that
carry the same name in both, and those that only move one, say which node is the first to differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deepseed.check.execution import ExecutionError, Values, execute
from deepseed.check.shards import ShardsError, assemble
from deepseed.check.typing import MOVES, SAME, describe, operand_types
from deepseed.ir.program import Op, Output, Program
from deepseed.ir.text import format_op

TOLERANCE = 1e-10  # of an output, relative to the largest of its role
INNER = 1e-11  # of a value on the way, relative to the largest of it and its operands
HUGE = 1e6  # operands of this size are masks: nothing is relative to them


@dataclass(frozen=True)
class Difference:
    """The first node whose value is another one after a pass: its name, module path and the two numbers."""

    node: str
    path: str
    line: str
    op: str  # as it stands in the program, with the types of its operands
    numbers: str
    was: str  # the op as it stood before the pass; "" where it is the same
    between: tuple[str, ...]  # ops that only the program after the pass has, between values that agree and ``node``
    output: str  # the output in which it shows

    def __str__(self) -> str:
        since = "".join(f"\n    {line}" for line in self.between[:8]) + (f"\n    … {len(self.between) - 8} more" if len(self.between) > 8 else "")
        was = f"\n  before the pass: {self.was}" if self.was else ""
        return f"{self.op}\n  {self.numbers}{was}\n  it shows in {self.output}" + (f"\n  ops new in this program on the way to it:{since}" if since else "")


def difference(
    before: Program, after: Program, inputs: Mapping[str, Tensor], *, before_ranks: Sequence[Program] = (), after_ranks: Sequence[Program] = ()
) -> Difference | None:
    """None where both programs compute the same outputs from ``inputs`` (whole, by value name), else the first node that differs.

    ``before_ranks``, ``after_ranks``: every rank's program, where one is localized. Give float64 programs (``ir.widen``): the
    tolerance is 1e-10.
    """
    want = execute(before, inputs, ranks=before_ranks)
    try:
        got: Values | ExecutionError = execute(after, inputs, ranks=after_ranks)
    except ExecutionError as error:
        got = error
    return compare(before, want, after, got)


def compare(before: Program, want: Values, after: Program, got: Values | ExecutionError) -> Difference | None:
    """``difference`` of two programs that were executed already; ``got``: or how far ``after`` came."""
    if isinstance(got, ExecutionError):
        first, _ = _first_wrong(before, want, after, got.values, f"no output: %{got.op.name} does not run")
        return first or Difference(got.op.name, got.op.path, got.op.line, str(got), "before the pass it ran", _was(before, got.op), (), "no output")
    wrong = _wrong_output(before, want, after, got)
    if wrong is None:
        return None
    shown, numbers, returned = wrong
    first, agrees = _first_wrong(before, want, after, got, shown)
    if first is not None:
        return first
    last = after.producers.get(returned)
    if last is not None and returned not in agrees:
        return _named(before, after, last, returned, numbers, agrees, shown)
    old = next(o.ref.name for o in before.outputs if _shown(o) == shown)
    made = before.producers.get(old)
    path, line = (made.path, made.line) if made is not None else ("", "")
    return Difference(shown, path, line, f"return %{returned}: {shown}\n  at {path or 'the top level'}" + (f" ({line})" if line else ""), numbers, f"return %{old}", (), shown)


def _first_wrong(before: Program, want: Values, after: Program, got: Values, shown: str) -> tuple[Difference | None, set[str]]:
    """The first op whose value is not its counterpart's; the values that were found to agree before it."""
    same = _counterparts(before, after)
    agrees: set[str] = {i.name for i in after.inputs}
    scales = {name: max(map(_largest, parts)) for name, parts in got.items()}
    for op in after.ops:
        if any(name not in got for name in (*op.results, *(r.name for r in op.refs))):
            break
        operands = max((scales[r.name] for r in op.refs), default=0.0)
        for n, result in enumerate(op.results):
            if len(op.refs) == 1 or op.target in MOVES:  # what is made of one value is as uncertain as that is
                scales[result] = max(scales[result], scales[op.refs[n if op.target in MOVES else 0].name])
            if result not in same:
                continue
            why = _unequal(before, want, same[result], after, got, result, max(scales[result], operands))
            if why is not None:
                return _named(before, after, op, result, why, agrees, shown), agrees
            if result in before.types:
                agrees.add(result)
    return None, agrees


def _wrong_output(before: Program, want: Values, after: Program, got: Values) -> tuple[str, str, str] | None:
    """An output that differs, its numbers, and its value's name in ``after``."""
    have = {(o.role, o.key): o.ref.name for o in after.outputs}
    wholes: dict[tuple[str, str], Tensor] = {}
    for o in before.outputs:
        wholes[o.role, o.key] = assemble(want[o.ref.name], before.types[o.ref.name], before.mesh)
    largest: dict[str, float] = {}
    for (role, _), whole in wholes.items():
        largest[role] = max(largest.get(role, 0.0), _largest(whole))
    for o in before.outputs:
        role, key, whole = o.role, o.key, wholes[o.role, o.key]
        shown = _shown(o)
        name = have.get((role, key), "")
        if not name:
            return shown, "it is returned no more", name
        try:
            now = assemble(got[name], after.types[name], after.mesh)
        except ShardsError as error:
            return shown, str(error), name
        why = _numbers(now, whole, TOLERANCE * (largest[role] or 1.0))
        if why is not None:
            return shown, why, name
    return None


def _counterparts(before: Program, after: Program) -> dict[str, str]:
    """Value of ``after`` -> value of ``before`` that it should equal: the one of its name, or the one that it only moves."""
    out = {i.name: i.name for i in after.inputs if i.name in before.types}
    for op in after.ops:
        moves = op.target in (*SAME, "reshard") or op.target in MOVES
        for n, (result, t) in enumerate(zip(op.results, op.types, strict=True)):
            old = before.types.get(result)
            if old is not None:
                if (old.shape, old.dtype) == (t.shape, t.dtype):
                    out[result] = result
            elif moves and op.refs[n].name in out:
                out[result] = out[op.refs[n].name]
    return out


def _unequal(before: Program, want: Values, a: str, after: Program, got: Values, b: str, scale: float) -> str | None:
    t, old = after.types[b], before.types[a]
    if (t.layout, after.mesh) == (old.layout, before.mesh) and all(torch.equal(x, y) for x, y in zip(got[b], want[a], strict=True)):
        return None
    try:
        now = assemble(got[b], t, after.mesh)
    except ShardsError as error:
        return str(error)
    was = assemble(want[a], old, before.mesh)
    return _numbers(now, was, INNER * (max(scale, _largest(was)) or 1.0))


def _largest(x: Tensor) -> float:
    """The largest finite magnitude that is no mask's."""
    if not x.dtype.is_floating_point or not x.numel():
        return 0.0
    size = x.abs()
    return float(torch.where(size < HUGE, size, 0.0).max())


def _numbers(now: Tensor, was: Tensor, allowed: float) -> str | None:
    if now.shape != was.shape or now.dtype != was.dtype:
        return f"{now.dtype}{list(now.shape)} after the pass, {was.dtype}{list(was.shape)} before it"
    if now.dtype.is_floating_point or now.dtype.is_complex:
        scale = torch.where((was.abs() < HUGE) | was.isinf(), 0.0, was.abs())  # masks: relative to themselves
        wrong = ~((now == was) | (now.isnan() & was.isnan()) | ((now - was).abs() <= allowed + TOLERANCE * scale))
    else:
        wrong = now != was
    if not bool(wrong.any()):
        return None
    at = int(wrong.flatten().to(torch.uint8).argmax())
    return f"element {at} of {list(was.shape)} is {now.flatten()[at].item()!r} after the pass, {was.flatten()[at].item()!r} before it"


def _named(before: Program, after: Program, op: Op, node: str, numbers: str, agrees: set[str], shown: str) -> Difference:
    between: list[str] = []
    pending, seen = [r.name for r in op.refs], set(op.results)
    while pending:
        name = pending.pop()
        made = after.producers.get(name)
        if name not in agrees and name not in seen and made is not None:
            seen.update(made.results)
            between.append(made.name)
            pending += [r.name for r in made.refs]
    lines = tuple(format_op(o, after.types, after.mesh) for o in after.ops if o.name in between)
    return Difference(node, op.path, op.line, describe(op, operand_types(after, op), after.mesh), numbers, _was(before, op), lines, shown)


def _was(before: Program, op: Op) -> str:
    old = before.producers.get(op.name)
    return "" if old is None or replace(old, types=op.types) == op else format_op(old, before.types, before.mesh)


def _shown(o: Output) -> str:
    return f"output {o.role} {o.key!r}"
