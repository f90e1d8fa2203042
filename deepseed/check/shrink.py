"""The same instance at small sizes: what is right for factors of 2 and 3 is right for factors of 4096.

A rule says nothing of the size of a factor, so a check may choose it. Kept are: sizes that arguments determine, how often an
axis and its neighbours divide a dimension, and the order of axes in it; axes that the instance does not use are dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from random import Random

from deepseed.ir.layout import Owned, Split, chunk
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import FLOATS, Arg, Op, Ref, Type
from deepseed.rules import Signature, rule_of, signature
from deepseed.rules.owned import by_number
from deepseed.rules.pointwise import POINTWISE

LARGE = 4  # larger axes become axes of 2, or of 3 where a rank holds nothing


@dataclass(frozen=True)
class Instance:
    """One op with the types of its operands in the layouts that it reads; results are on ``op.types``."""

    op: Op
    operands: tuple[Type, ...]
    mesh: Mesh


def shrink(i: Instance) -> Instance:
    """``i`` in float64 at small sizes, names and places dropped, scalars of about one; the same instance for checking purposes."""
    types = (*i.operands, *i.op.types)
    mesh = Mesh(tuple((a, n) for a, n in i.mesh.axes if any(t.layout.on(a) is not None for t in types)))
    sig = signature(i.op, i.operands) or moved(i)
    cuts = {name: _cuts(sig, name, types, mesh) for name in sig.places}
    kept = {axis for name, c in cuts.items() if c is None or name in sig.fixed for axis in _axes(sig, name, types, mesh)}
    idle = {axis for c in cuts.values() for n, axis in c or () if axis is not None and not len(chunk(n, mesh.size(axis), mesh.size(axis) - 1))}
    small = Mesh(tuple((a, n if a in kept or n <= LARGE else 3 if a in idle else 2) for a, n in mesh.axes))
    sizes: dict[str, int] = dict(sig.sizes)
    moved_to: dict[tuple[str, int], tuple[int, int]] = {}  # (factor, cut) -> the cut, and its uneven factor, at small size
    for count, name in enumerate(n for n in sig.places if n not in sig.fixed):
        steps = cuts[name]
        if steps is None or not sig.sizes[name]:
            continue
        at, done = 1, 1
        for n, axis in steps:
            size = n if axis is None and n <= 2 else 2 + count % 2
            if axis is not None:
                uneven = n != mesh.size(axis)
                size = _uneven(n, mesh.size(axis), small.size(axis)) if uneven else small.size(axis)
                moved_to[name, at] = done, size if uneven else 0
            at *= n
            done *= size
        sizes[name] = done
    new = [_type(t, slot, sig, sizes, moved_to, mesh) for slot, t in enumerate(types)]
    new = _keyed(new, sizes[number] if (number := by_number(i.op, sig)) is not None else 0, small)
    rule = rule_of(i.op.target)
    op = i.op if rule is None or rule.resize is None else rule.resize(i.op, sig.sizes, sizes)
    operands, results = tuple(new[: len(i.operands)]), tuple(new[len(i.operands) :])
    return Instance(_plain(op, results), operands, small)


def _keyed(types: Sequence[Type], of: int, mesh: Mesh) -> list[Type]:
    """Owned rows by a key that says nothing; where there is no table, by two ids a rank."""
    out = list(types)
    for slot, t in enumerate(types):
        for axis, e in t.layout.elements:
            if isinstance(e, Owned):
                out[slot] = out[slot].laid(out[slot].layout.with_(axis, replace(e, key="ids", of=of or 2 * mesh.size(axis))))
    return out


def _uneven(of: int, n: int, ranks: int) -> int:
    """A small factor that ``ranks`` divide as unevenly as ``n`` divide ``of``: with a rank that holds nothing, or with none."""
    return ranks - 1 if len(chunk(of, n, n - 1)) == 0 else 2 * ranks - 1


def moved(i: Instance) -> Signature:
    """The factors of an op that moves data: one a dimension, the same on both sides; ids that own rows have the rows'."""
    dims = [tuple((f"d{k}",) if size != 1 else () for k, size in enumerate(t.shape)) for t in (*i.operands, *i.op.types)]
    if i.op.target in ("dispatch.start", "combine.start"):
        own = next(e for t in (i.operands[0], i.op.type) for _, e in t.layout.elements if isinstance(e, Owned))
        dims[1] = (dims[0][own.dim],)
    sizes = {f"d{k}": size for t in (*i.operands[:1], *i.op.types) for k, size in enumerate(t.shape)}
    return Signature(tuple(dims[: len(i.operands)]), tuple(dims[len(i.operands) :]), sizes)


def _axes(sig: Signature, name: str, types: Sequence[Type], mesh: Mesh) -> set[str]:
    """The axes that split factor ``name``, or a dimension with it across factors."""
    out: set[str] = set()
    for place in sig.places[name]:
        for axis, element in types[place.slot].layout.splits(place.dim):
            found = sig.factor_at(place.slot, element, mesh.size(axis))
            if found is None or found[0] == name:
                out.add(axis)
    return out


def _cuts(sig: Signature, name: str, types: Sequence[Type], mesh: Mesh) -> list[tuple[int, str | None]] | None:
    """The factor as a product of parts (size, axis that splits it), from all its places; None where they do not nest."""
    spans: dict[int, tuple[int, str]] = {}
    for place in sig.places[name]:
        for axis, element in types[place.slot].layout.splits(place.dim):
            found = sig.factor_at(place.slot, element, mesh.size(axis))
            extent = element.of or mesh.size(axis)
            if found is not None and found[0] == name:
                if spans.setdefault(found[1], (extent, axis)) != (extent, axis):
                    return None
            elif found is None:
                return None
    out: list[tuple[int, str | None]] = []
    done = 1
    for inner in sorted(spans):
        n, axis = spans[inner]
        if inner % done:
            return None
        if inner > done:
            out.append((inner // done, None))
        out.append((n, axis))
        done = inner * n
    if done == 0 or sig.sizes[name] % done:
        return None
    if sig.sizes[name] > done:
        out.append((sig.sizes[name] // done, None))
    return out


def _type(t: Type, slot: int, sig: Signature, sizes: Mapping[str, int], moved_to: Mapping[tuple[str, int], tuple[int, int]], mesh: Mesh) -> Type:
    dims = (sig.operands + sig.results)[slot]
    shape = tuple(prod(sizes[n] for n in names) if names else size for names, size in zip(dims, t.shape, strict=True))
    layout = t.layout
    for axis, element in t.layout.elements:
        if isinstance(element, Split):
            found = sig.factor_at(slot, element, mesh.size(axis))
            if found is not None:
                left = prod(sizes[n] for n in dims[element.dim][: dims[element.dim].index(found[0])])
                inner, of = moved_to.get(found, (found[1], element.of))
                layout = layout.with_(axis, Split(element.dim, left * inner, of))
    return Type(_double(t.dtype), shape, layout)


def _double(dtype: str) -> str:
    return "f64" if dtype in FLOATS else "c128" if dtype == "c64" else dtype


def _plain(op: Op, types: tuple[Type, ...]) -> Op:
    """Names numbered, module path and line dropped; float64 for every float dtype; scalars of pointwise ops drawn about one.

    An epsilon of 1e-12 would hide a wrong rule; an exponent keeps its value, as do 0, whole numbers and infinities."""
    count = iter(range(len(op.refs)))
    random = Random(op.target)

    def value(arg: Arg, exponent: bool = False) -> Arg:
        if isinstance(arg, Ref):
            return Ref(f"x{next(count)}")
        if isinstance(arg, tuple):
            return tuple(value(a) for a in arg)
        if isinstance(arg, str):
            return _double(arg)
        if isinstance(arg, float) and op.target in POINTWISE and not exponent and (arg % 1 or abs(arg) > LARGE) and abs(arg) != float("inf"):
            return (random.random() + 0.5) * (1 if arg > 0 else -1)
        return arg

    power = op.target.startswith(("aten.pow.", "aten.float_power."))
    args = tuple(value(a, power and k == 1) for k, a in enumerate(op.args))
    kwargs = tuple((k, v if k == "site" else value(v)) for k, v in op.kwargs)
    return replace(op, results=tuple(f"y{k}" for k in range(len(types))), args=args, types=types, kwargs=kwargs, phase="forward", path="", line="", origin="")
