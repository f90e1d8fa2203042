"""What solve_placements needs to know of experts: which tables are split by number, and which rows may be owned.

A table is looked up by ids, one a row, in a routed product; its biases are looked up by the same ids. Nothing here knows a name.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableSequence, Sequence
from dataclasses import replace
from math import prod

from deepseed.ir.contract import PassError
from deepseed.ir.layout import Element, Layout, Owned, Split, valid
from deepseed.ir.program import Input, Op, Program, Type
from deepseed.rules import Strategy, signature
from deepseed.rules.owned import GRADIENTS, TABLES, by_number, marks_after, owned_strategies

Marks = Mapping[str, Owned]


def routed_ids(p: Program) -> frozenset[str]:
    """The values by which rows are sent to matrices."""
    return frozenset(op.refs[-1].name for op in p.ops if op.target in ("routed_mm", "routed_outer"))


def tables(p: Program) -> dict[str, int]:
    """Parameters that are tables looked up by those ids -> the dimension that counts their matrices (or rows)."""
    ids, found = routed_ids(p), dict[str, int]()
    for op in p.ops:
        if op.target in TABLES and op.refs[-1].name in ids:
            name, dim = op.refs[TABLES[op.target]].name, 0
            while (made := p.producers.get(name)) is not None and made.target in ("permute", "cast"):
                dims = made.kw("dims")
                dim = dims[dim] if isinstance(dims, tuple) and isinstance(dims[dim], int) else dim  # type: ignore[assignment]
                name = made.refs[0].name
            if made is None:
                found[name] = dim
    inputs = {i.name for i in p.by_role("param")}
    return {name: dim for name, dim in found.items() if name in inputs}


def marks(p: Program) -> Marks:
    """How values may be owned by rows, from the routed products onwards; keys are the names of their ids."""
    ids, found = routed_ids(p), dict[str, Owned]()
    for op in p.ops:
        operands = [found.get(r.name) for r in op.refs]
        if not any(operands) and (op.target not in TABLES or op.refs[-1].name not in ids):
            continue
        sig = signature(op, [p.types[r.name] for r in op.refs])
        after = None if sig is None else marks_after(op, sig, operands, op.refs[-1].name)
        found.update(zip(op.results, after or (), strict=False))
    return found


def owned_ways(op: Op, found: Marks, operands: Sequence[Type], axis: str, p: Program) -> list[Strategy]:
    """The strategies of ``op`` on ``axis`` in which rows are owned. Keys are left empty: equal layers share their strategies."""
    sig = signature(op, operands)
    looked = op.target in TABLES or op.target in GRADIENTS
    if sig is None or (looked and op.refs[-1].name not in routed_ids(p)):
        return []
    out = []
    key = op.refs[-1].name if looked else ""
    marked = [found.get(r.name) for r in op.refs]
    if (number := by_number(op, sig)) is not None:  # its rows may come to their owners, wherever they are
        own = Owned("sum", 0, key, sig.sizes[number])
        marked = [mark or (own if dims[0] == sig.operands[-1][0] else None) for mark, dims in zip(marked, sig.operands, strict=True)]
    for before, after in owned_strategies(op, sig, marked, key):
        s = Strategy(tuple(map(_nameless, before)), tuple(map(_nameless, after)))
        elements = zip((*s.operands, *s.results), (*operands, *op.types), strict=True)
        if all(not isinstance(e, Split) or valid(t.shape, t.layout.with_(axis, e), p.mesh) for e, t in elements):
            out.append(s)
    return out


def check(p: Program, found: Mapping[str, int], axis: str, batch: int, ranks: Mapping[str, int]) -> None:
    """Raises PassError for a model without experts, and for experts or rows that the ranks do not divide."""
    n, of = ranks[axis], prod(ranks.values())
    if not found:
        raise PassError(f"{axis}={n} splits experts, and this model has none: no row is multiplied with a matrix that its id names\n  fix: use a plan without {axis}")
    for name, dim in found.items():
        size = p.types[name].shape[dim]
        if size % n:
            near = [d for d in range(2, size + 1) if size % d == 0]
            raise PassError(
                f"{axis}={n} cannot share {size} experts evenly ({size} = {n} * {size // n} + {size % n}): {name}\n"
                f"  fix: use {' or '.join(f'{axis}={d}' for d in near)}, or a plan without {axis}"
            )
    if batch % of:
        words = " x ".join(f"{a}={k}" for a, k in ranks.items())
        raise PassError(
            f"{words} cannot share {batch} rows evenly ({batch} = {of} * {batch // of} + {batch % of})\n"
            f"  fix: use a batch of {batch // of * of or of} or {(batch // of + 1) * of} rows, or a plan without {axis}"
        )


def of_tables(p: Program, found: Mapping[str, int], weights: frozenset[str]) -> frozenset[str]:
    """The values that depend on tables alone: their casts and transposes."""
    inside = set(found)
    for op in p.ops:
        if op.name in weights and all(r.name in inside for r in op.refs):
            inside.update(op.results)
    return frozenset(inside)


def home(item: Input, found: Mapping[str, int], p: Program) -> int | None:
    """The dimension that counts the experts in their parameter, or in a state of its shape."""
    if item.name in found:
        return found[item.name]
    keys = {i.key: (found[i.name], i.type.shape) for i in p.by_role("param") if i.name in found}
    dim, shape = keys.get(item.key.partition("/")[2], (0, None))
    return dim if item.role == "state" and item.type.shape == shape else None


def _nameless(e: Element) -> Element:
    return replace(e, key="") if isinstance(e, Owned) else e


def name_keys(ops: Sequence[tuple[int, Op]], where: Mapping[str, tuple[int, int]], wants: Sequence[MutableSequence[Layout]], has: Sequence[MutableSequence[Layout]], axis: str, p: Program, found: Marks) -> str | None:
    """Write the keys of owned rows into the layouts; None, or which op would mix rows of two keys. What is owned where it is used only
    has the key of its ids in a routed product, elsewhere the one that it was marked with."""
    for i, op in ops:
        keys = set()
        for k, ref in enumerate(op.refs):
            source, r = where[ref.name]
            element, own = wants[i][k].on(axis), has[source][r].on(axis)
            if isinstance(element, Owned) and isinstance(own, Split):
                mark = replace(element, key=op.refs[-1].name) if op.target in TABLES or op.target in GRADIENTS else found.get(ref.name)
                if mark is None or (mark.dim, mark.of) != (element.dim, element.of):
                    return f"%{op.name} wants rows of %{ref.name} that have no ids"
                wants[i][k] = wants[i][k].with_(axis, mark)
                keys.add(mark.key)
            elif isinstance(element, Owned):
                if not isinstance(own, Owned) or (own.dim, own.of) != (element.dim, element.of):
                    return f"%{op.name} wants rows that %{ref.name} has not"
                wants[i][k] = wants[i][k].with_(axis, own)
                keys.add(own.key)
        sig = signature(op, [p.types[r.name] for r in op.refs])
        split = sig is not None and by_number(op, sig) is not None and any(isinstance(lay.on(axis), Split) for lay in (*wants[i], *has[i]))
        if split:
            keys.add(op.refs[-1].name)
        if len(keys) > 1:
            return f"%{op.name} mixes rows of {' and '.join(sorted(keys))}"
        for r, layout in enumerate(has[i]):
            element = layout.on(axis)
            if isinstance(element, Owned):
                has[i][r] = layout.with_(axis, replace(element, key=next(iter(keys), "")))
    return None
