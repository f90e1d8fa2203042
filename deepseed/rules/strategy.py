"""From factors to strategies, mechanically: a factor is split over the axis, or partial values pass through, or nothing is.

All of it concerns one axis at a time; the layouts that the types already have on other axes only rule out what overlaps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from deepseed.ir.layout import Element, Layout, Owned, Partial, Split, chunk, valid
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Op, Type
from deepseed.rules.owned import settle
from deepseed.rules.signature import Call, Place, RuleError, Signature, build
from deepseed.rules.table import rule_of

_signatures: dict[tuple[object, ...], Signature | None] = {}


def signature(op: Op, operand_types: Sequence[Type]) -> Signature | None:
    """The factors of ``op``, operands in the order of ``op.refs``; None where it has no rule: it may only be replicated.

    Layouts play no part. Remembered by target, arguments, shapes and dtypes. Raises RuleError where shapes do not fit the rule."""
    key = (
        op.form,
        tuple([(t.dtype, t.shape) for t in operand_types]),
        tuple([(t.dtype, t.shape) for t in op.types]),
    )
    try:
        return _signatures[key]
    except KeyError:
        rule = rule_of(op.target)
        found = None if rule is None else build(Call(op, tuple(operand_types)), rule)
        _signatures[key] = found
        return found


@dataclass(frozen=True)
class Strategy:
    """The element of one axis on every operand and every result."""

    operands: tuple[Element, ...]
    results: tuple[Element, ...]


def strategies(
    op: Op | Signature | None,
    operand_types: Sequence[Type],
    result_types: Sequence[Type],
    axis: str,
    mesh: Mesh,
    outers: Mapping[str, Iterable[int]] | None = None,
) -> list[Strategy]:
    """Every way to place one op on ``axis``; the first replicates everything.

    The types carry the layouts on other axes (what they say of ``axis`` itself is ignored). ``outers`` gives, per factor,
    further inner outers to try beside 1 and the places next to axes that split the factor already (``factor_outers``)."""
    sig = signature(op, operand_types) if isinstance(op, Op) else op
    none = Strategy((None,) * len(operand_types), (None,) * len(result_types))
    if sig is None:
        return [none]
    types = [*operand_types, *result_types]
    layouts = [t.layout.with_(axis, None) for t in types]
    out = [none]
    for name in sig.free:
        for inner, of in _cuts(sig, name, layouts, axis, mesh, (outers or {}).get(name, ())):
            found = split(sig, name, inner, of)
            if _fits(found, types, layouts, axis, mesh):
                out.append(found)
    for sets, reduction in ((sig.linear, "sum"), (sig.monotone, "max")):
        for members in sets:
            found = partial(sig, members, reduction)
            if _fits(found, types, layouts, axis, mesh):
                out.append(found)
    return out


def split(sig: Signature, name: str, inner: int = 1, of: int = 0) -> Strategy:
    """The strategy that splits factor ``name``, seen as (inner, rest), on ``rest``; uneven, seen as (inner, of, rest), on ``of``."""
    elements: list[Element] = [*(None for _ in sig.operands), *(Partial(sig.reduce) for _ in sig.results)]
    for place in sig.places[name]:
        elements[place.slot] = Split(place.dim, place.left * inner, of)
    for k in sig.adds:
        if elements[k] is None and all(isinstance(e, Partial) for e in elements[len(sig.operands) :]):
            elements[k] = Partial(sig.reduce)
    return Strategy(tuple(elements[: len(sig.operands)]), tuple(elements[len(sig.operands) :]))


def partial(sig: Signature, members: frozenset[int], op: str) -> Strategy:
    """The strategy in which the operands ``members`` are partial, and so is every result."""
    return Strategy(tuple(Partial(op) if i in members else None for i in range(len(sig.operands))), (Partial(op),) * len(sig.results))


def factor_outers(sig: Signature, candidates: Sequence[Sequence[Iterable[int]]]) -> dict[str, set[int]]:
    """Inner outers of each factor, from the candidate outers of each dimension of each operand and result (``candidates``)."""
    return {
        name: {
            outer // place.left
            for place in sig.places[name]
            for outer in candidates[place.slot][place.dim]
            if outer % place.left == 0 and outer // place.left < sig.sizes[name] and sig.sizes[name] % (outer // place.left) == 0
        }
        for name in sig.free
    }


def _cuts(sig: Signature, name: str, layouts: Sequence[Layout], axis: str, mesh: Mesh, given: Iterable[int]) -> list[tuple[int, int]]:
    """Where ``axis`` may cut a factor: (inner, 0) for an even cut of what lies behind ``inner``; (inner, of) for an uneven one of the
    part between two borders, which are the places that other axes and ``given`` name, and the ends."""
    n, size = mesh.size(axis), sig.sizes[name]
    taken = {(inner, extent) for place in sig.places[name] for _, inner, extent in _splits(sig, name, place, layouts[place.slot], mesh)}
    if name in sig.contiguous:
        end = 1
        for inner, extent in sorted(taken):
            if inner == end:
                end *= extent
        return [(end, 0)] if size % (end * n) == 0 else [(end, size // end)] if size > end and size % end == 0 else []
    found = cuts(size, n, {*given, *(inner * extent for inner, extent in taken)})
    return [(inner, of) for inner, of in found if not of or name not in sig.filled or chunk(of, n, n - 1)]


def cuts(size: int, n: int, borders: Iterable[int]) -> list[tuple[int, int]]:
    """Where ``n`` ranks may cut a dimension that has ``borders`` (products of its leading factors) beside its ends: (outer, 0) evenly
    behind a border, (outer, of) unevenly between two."""
    ends = [b for b in sorted({1, *borders}) if 0 < b < size and size % b == 0] + [size or 1]
    even = [(a, 0) for a in ends if size % (a * n) == 0]
    pairs = {*pairwise(ends), (1, size)}
    return even + [(a, b // a) for a, b in sorted(pairs) if b % a == 0 and b > a and b // a % n]


def _splits(sig: Signature, name: str, place: Place, layout: Layout, mesh: Mesh) -> list[tuple[str, int, int]]:
    """(axis, inner outer, extent) of the axes that split this factor here, outermost first."""
    found: list[tuple[str, int, int]] = []
    for axis, element in layout.splits(place.dim):
        at = sig.factor_at(place.slot, element, mesh.size(axis))
        if at is not None and at[0] == name:
            found.append((axis, at[1], element.of or mesh.size(axis)))
    return found


def _fits(found: Strategy, types: Sequence[Type], layouts: Sequence[Layout], axis: str, mesh: Mesh) -> bool:
    """No dimension split twice at one place, no tensor a sum over one axis and a maximum over another."""
    for e, t, layout in zip(found.operands + found.results, types, layouts, strict=True):
        if isinstance(e, Split) and not valid(t.shape, layout.with_(axis, e), mesh):
            return False
        if isinstance(e, Partial) and any(op != e.op for _, op in layout.partials):
            return False
    return True


def is_instance(op: Op, operand_layouts: Sequence[Layout], types: Sequence[Type], mesh: Mesh) -> str | None:
    """None where the layouts are an instance of the op's rule, on every axis; else why not.

    ``types`` are the operands' (shape and dtype), in the order of ``op.refs``; the results' layouts are on ``op.types``."""
    try:
        sig = signature(op, types)
    except RuleError as error:
        return str(error)
    layouts = [*operand_layouts, *(t.layout for t in op.types)]
    axes = sorted({axis for layout in layouts for axis, _ in layout.elements})
    if sig is None:
        return f"{op.target} has no rule: it is legal only where operands and results are whole on every axis" if axes else None
    for axis in axes:
        elements: Sequence[Element] = [layout.on(axis) for layout in layouts]
        if any(isinstance(e, Owned) for e in elements):
            left = settle(op, sig, elements)
            if left is None:
                continue
            if isinstance(left, str):
                return f"{axis}: {left}"
            elements = left
        why = _on_axis(sig, elements, axis, mesh.size(axis))
        if why is not None:
            return why
    for name in sig.contiguous:
        for place in sig.places[name]:
            end = 1
            for axis, inner, extent in _splits(sig, name, place, layouts[place.slot], mesh):
                if inner != end or (extent != mesh.size(axis) and inner * extent != sig.sizes[name]):
                    return f"{axis} splits {name} in blocks (outer {inner}, {end} expected): each rank needs one contiguous range ({sig})"
                end *= extent
    return None


def _on_axis(sig: Signature, elements: Sequence[Element], axis: str, n: int) -> str | None:
    found: tuple[str, int] | None = None
    of = 0
    for slot, element in enumerate(elements):
        if isinstance(element, Split):
            found, of = sig.factor_at(slot, element, n), element.of
            if found is None:
                return f"{axis}={n} splits {_tensor(sig, slot)} dimension {element.dim} (outer {element.outer}) across the factors of {sig}"
            break
    operands, results = tuple(elements[: len(sig.operands)]), tuple(elements[len(sig.operands) :])
    if found is not None:
        name, inner = found
        if name in sig.whole:
            return f"{axis} splits {name}, which every rank needs whole ({sig})"
        if of and name in sig.filled and not chunk(of, n, n - 1):
            return f"{axis}={n} splits {of} of {name} so that a rank holds nothing of it, which {sig} does not allow"
        legal = split(sig, name, inner, of)
        if (operands, results) == (legal.operands, legal.results):
            return None
        wrong = next(s for s, (e, want) in enumerate(zip(elements, legal.operands + legal.results, strict=True)) if e != want)
        return f"{axis} splits {name} of {sig}: then {_tensor(sig, wrong)} is {show((legal.operands + legal.results)[wrong])}, not {show(elements[wrong])}"
    if not any(elements):
        return None
    for sets, op in ((sig.linear, "sum"), (sig.monotone, "max")):
        for members in sets:
            legal = partial(sig, members, op)
            if (operands, results) == (legal.operands, legal.results):
                return None
    return f"partial over {axis}: operands {', '.join(map(show, operands)) or 'none'}, results {', '.join(map(show, results))}; {_linearity(sig)}"


def _linearity(sig: Signature) -> str:
    sets = [("sum", s) for s in sig.linear] + [("max", s) for s in sig.monotone]
    if not sets:
        return "the op passes no partial values"
    return "partial together may be " + " or ".join(f"{op} in operand {'+'.join(str(i + 1) for i in sorted(s)) or 'none'}" for op, s in sets)


def _tensor(sig: Signature, slot: int) -> str:
    return f"operand {slot + 1}" if slot < len(sig.operands) else f"result {slot - len(sig.operands) + 1}"


def show(element: Element) -> str:
    """``whole``, ``sum``, ``max``, ``split(dim 0)``, ``split(dim 1, outer 3)``."""
    if element is None:
        return "whole"
    if isinstance(element, Owned):
        return f"owned(dim {element.dim} by {element.key or 'ids'})"
    if isinstance(element, Partial):
        return element.op
    return f"split(dim {element.dim}{f', outer {element.outer}' if element.outer != 1 else ''}{f', uneven of {element.of}' if element.of else ''})"
