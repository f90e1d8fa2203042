"""Rows that one rank owns: how experts' rows stay where their expert is, from one product to the next.

A table of matrices split by number leaves a partial sum with one summand a row (``Owned``), born by ``routed_mm``, or by a
lookup with the same ids. A partial sum passes linear ops only; rows that are zero elsewhere also pass an op that makes zeros of
zeros, such as an activation and its gradient. They meet the split table again without any communication, and end as the sum
that they are. All of it concerns one axis at a time, beside the strategies that follow from factors (deepseed.rules.strategy).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations

from deepseed.ir.layout import Element, Owned, Partial, Split
from deepseed.ir.program import Op
from deepseed.rules.signature import Signature

Placed = tuple[tuple[Element, ...], tuple[Element, ...]]  # operands, results
TABLES = {"routed_mm": 1, "embedding": 0}  # op -> the operand that may be split by number; the last operand are the ids
GRADIENTS = ("routed_outer", "embedding_backward")  # here the result is split by number
_UNARY = """abs asin asinh atan celu elu erf expm1 gelu hardshrink hardswish hardtanh leaky_relu log1p mish relu relu6 selu sign silu
sin sinh softshrink sqrt square tan tanh"""
_BACKWARD = "gelu hardswish sigmoid silu tanh threshold"
ZEROS: Mapping[str, frozenset[int]] = {  # operands that may be owned together where the op is not linear in them: it makes zeros of zeros
    "cast": frozenset({0}),
    **{f"aten.{name}": frozenset({0}) for name in _UNARY.split()},
    **{f"aten.{name}_backward": frozenset({0, 1}) for name in _BACKWARD.split()},
    "aten.mul.Tensor": frozenset({0, 1}),
}


def owned_strategies(op: Op, sig: Signature, marked: Sequence[Owned | None], key: str = "") -> Iterator[Placed]:
    """Every way to place ``op`` in which something is owned. ``marked``: how each operand may be owned, None where it may not;
    ``key``: the ids by which a table is looked up."""
    factor = by_number(op, sig)
    if factor is not None:
        operands, results = _split(sig, factor)
        own = Owned("sum", 0, key, sig.sizes[factor])
        born = tuple(own if isinstance(e, Partial) else e for e in results)
        rows = [k for k, mark in enumerate(marked[:-1]) if mark == own and sig.operands[k][0] == sig.operands[-1][0]]
        for count in range(len(rows) + 1):
            for some in combinations(rows, count):
                if some or born != results:
                    yield tuple(own if k in some else e for k, e in enumerate(operands)), born
    for members in _sets(op, sig):
        after = rows_after(sig, members, marked)
        if after is not None:
            yield tuple(marked[k] if k in members else None for k in range(len(sig.operands))), after


def marks_after(op: Op, sig: Signature, marked: Sequence[Owned | None], key: str) -> tuple[Owned, ...] | None:
    """How the results may be owned, where the operands may be as ``marked``; None where they may not."""
    factor = by_number(op, sig)
    if factor is not None and op.target in TABLES:
        return (Owned("sum", 0, key, sig.sizes[factor]),)
    return next((after for members in _sets(op, sig) if (after := rows_after(sig, members, marked)) is not None), None)


def settle(op: Op, sig: Signature, elements: Sequence[Element]) -> Sequence[Element] | str | None:
    """What is left to ask of the elements of one axis, some of them owned: None where they are legal; else plain sums in their
    place, or why not. Whether a table is looked up by the ids that own the rows is for deepseed.check.typing, which sees names."""
    owned = {(e.key, e.of) for e in elements if isinstance(e, Owned)}
    if len(owned) > 1:
        return "rows owned by different ids meet: " + " and ".join(sorted(f"{key} of {of}" for key, of in owned))
    operands, results = tuple(elements[: len(sig.operands)]), tuple(elements[len(sig.operands) :])
    marked = [e if isinstance(e, Owned) else None for e in operands]
    if (operands, results) in owned_strategies(op, sig, marked, next(iter(owned))[0]):
        return None
    if any(isinstance(e, Owned) for e in results):
        said = ", ".join(str(k + 1) for k, mark in enumerate(marked) if mark is not None) or "none"
        return f"a result is owned by rows; of operands that are owned by rows ({said}), {op.target} does not make such rows"
    return [Partial("sum") if isinstance(e, Owned) else e for e in elements]


def by_number(op: Op, sig: Signature) -> str | None:
    """The factor that counts the rows (or matrices) of a table in which ids point, one id a row; None for other ops."""
    if op.target in TABLES:
        names = sig.operands[TABLES[op.target]][0]
    elif op.target in GRADIENTS:
        names = sig.results[0][0]
    else:
        return None
    return names[0] if len(names) == 1 and len(sig.operands[-1]) == 1 else None


def rows_after(sig: Signature, members: frozenset[int], marked: Sequence[Owned | None]) -> tuple[Owned, ...] | None:
    """How results are owned where the operands ``members`` are: each has the rows as a dimension of its own, and so has each result."""
    marks = [marked[k] for k in members]
    first = marks[0] if marks else None
    if first is None or any(m is None or (m.key, m.of) != (first.key, first.of) for m in marks):
        return None
    rows = {sig.operands[k][mark.dim] for k in members if (mark := marked[k]) is not None}
    names = rows.pop()
    if rows or len(names) != 1 or names[0] not in sig.free or names[0] in sig.contiguous:
        return None
    found = [[d for d, dim in enumerate(dims) if dim == names] for dims in sig.results]
    return tuple(replace(first, dim=dims[0]) for dims in found) if all(len(dims) == 1 for dims in found) else None


def _sets(op: Op, sig: Signature) -> Iterator[frozenset[int]]:
    yield from sig.linear
    if op.target in ZEROS and len(sig.operands) > max(ZEROS[op.target]):
        yield ZEROS[op.target]
    if op.target == "aten.clamp" and len(op.args) > 1:
        low, high = (*op.args[1:3], None)[:2]
        if (low is None or (isinstance(low, int | float) and low <= 0)) and (high is None or (isinstance(high, int | float) and high >= 0)):
            yield frozenset({0})


def _split(sig: Signature, name: str) -> Placed:
    """The factor split, outermost; a result without it is a sum."""
    elements: list[Element] = [*(None for _ in sig.operands), *(Partial("sum") for _ in sig.results)]
    for place in sig.places[name]:
        elements[place.slot] = Split(place.dim, place.left)
    return tuple(elements[: len(sig.operands)]), tuple(elements[len(sig.operands) :])
