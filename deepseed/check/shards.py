"""One tensor as the shards of its layout, and back: the meaning of a layout, written down once more for the checks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

import torch
from torch import Tensor

from deepseed.ir.layout import Owned, Partial, local_indices
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Type


class ShardsError(ValueError):
    """Shards that do not make up one tensor: a rank's copy differs from another's, or a shape is wrong."""


def coordinates(mesh: Mesh) -> Iterator[dict[str, int]]:
    """Every rank's coordinate, in rank order."""
    for where in product(*(range(n) for _, n in mesh.axes)):
        yield dict(zip(mesh.names, where, strict=True))


def shards(x: Tensor, type_: Type, mesh: Mesh, generator: torch.Generator | None = None, ids: Mapping[str, Tensor] | None = None) -> list[Tensor]:
    """What each rank holds of ``x``, in rank order. Summands and candidates of a maximum are drawn at random, with ``x`` as result.
    ``ids``: of owned rows, by key; rows of a key that is not there have an owner of their own."""
    whole: dict[tuple[int, ...], Tensor] = {(): x}  # coordinate on the partial axes -> a tensor of the global shape
    partials = sorted(((a, e) for a, e in type_.layout.elements if isinstance(e, Partial)), key=lambda pair: isinstance(pair[1], Owned))
    for axis, element in partials:
        spread: dict[tuple[int, ...], Tensor] = {}
        for key, value in whole.items():
            for i, part in enumerate(_owned(value, mesh.size(axis), element, (ids or {}).get(element.key)) if isinstance(element, Owned) else _spread(value, mesh.size(axis), element.op, generator)):
                spread[(*key, i)] = part
        whole = spread
    axes = [axis for axis, _ in partials]
    return [_cut(whole[tuple(c[a] for a in axes)], type_, mesh, c) for c in coordinates(mesh)]


def assemble(parts: Sequence[Tensor], type_: Type, mesh: Mesh) -> Tensor:
    """The whole tensor. Raises ShardsError where two ranks that hold the same elements disagree."""
    for rank, (part, c) in enumerate(zip(parts, coordinates(mesh), strict=True)):
        local = type_.local(mesh.seen_from(c))
        if tuple(part.shape) != local:
            raise ShardsError(f"rank {rank} holds {list(part.shape)}, the layout says {list(local)}")
    partials = type_.layout.partials
    split = {axis for axis, e in type_.layout.elements if not isinstance(e, Partial)}
    wholes: dict[tuple[int, ...], Tensor] = {}
    seen: dict[tuple[int, ...], Tensor] = {}
    for part, c in zip(parts, coordinates(mesh), strict=True):
        key = tuple(c[a] for a, _ in partials)
        place = (*key, *(c[a] for a in mesh.names if a in split))
        if place in seen:
            if not _equal(seen[place], part):
                raise ShardsError(f"ranks that should hold the same part differ: {_difference(seen[place], part)} (at {_where(c)})")
            continue
        seen[place] = part
        if not split:
            wholes[key] = part
            continue
        whole = wholes.setdefault(key, part.new_zeros(type_.shape))
        whole[_index(type_, mesh, c)] = part
    for n, (_, op) in reversed(list(enumerate(partials))):
        reduced: dict[tuple[int, ...], Tensor] = {}
        for key in sorted(wholes):
            short = key[:n]
            if short not in reduced:
                reduced[short] = wholes[key]
            else:
                reduced[short] = torch.maximum(reduced[short], wholes[key]) if op == "max" else reduced[short] + wholes[key]
        wholes = reduced
    return wholes[()]


def owner(rows: int, n: int, key: str) -> Tensor:
    """Which of ``n`` ranks owns each row: the same for the same key, as in all values of one instance."""
    return torch.randint(0, n, (rows,), generator=torch.Generator().manual_seed(len(key) + rows))


def elsewhere(x: Tensor, n: int, rank: int, element: Owned) -> Tensor:
    """A mask of the rows of ``x`` (in its own rank) that ``rank`` does not own."""
    mine = owner(x.shape[element.dim], n, element.key) != rank
    return mine.view([-1 if d == element.dim else 1 for d in range(x.dim())])


def _owned(x: Tensor, n: int, element: Owned, ids: Tensor | None = None) -> list[Tensor]:
    if ids is None:
        return [x.masked_fill(elsewhere(x, n, rank, element), 0) for rank in range(n)]
    owners = (ids * n // element.of).view([-1 if d == element.dim else 1 for d in range(x.dim())])
    return [x.masked_fill(owners != rank, 0) for rank in range(n)]


def _spread(x: Tensor, n: int, op: str, generator: torch.Generator | None) -> list[Tensor]:
    """``n`` tensors whose sum (maximum) is ``x``."""
    if op == "max":
        if x.dtype == torch.bool:
            noise = [torch.rand(x.shape, generator=generator) < 0.5 for _ in range(n)]
            parts = [x & keep for keep in noise]
        else:
            parts = [x - _random(x, generator).abs() for _ in range(n)]
        owner = torch.randint(0, n, x.shape, generator=generator)
        return [torch.where(owner == i, x, part) for i, part in enumerate(parts)]
    parts = [_random(x, generator) for _ in range(n - 1)]
    last = x.clone()
    for part in parts:
        last = last - part
    return [*parts, last]


def _random(x: Tensor, generator: torch.Generator | None) -> Tensor:
    if x.dtype.is_complex:
        return torch.randn(x.shape, dtype=x.dtype, generator=generator)
    if x.dtype.is_floating_point:
        return torch.randn(x.shape, dtype=torch.float64, generator=generator).to(x.dtype)
    return torch.randint(-3, 4, x.shape, generator=generator).to(x.dtype)


def _held(type_: Type, dim: int, mesh: Mesh, coordinate: Mapping[str, int]) -> list[int] | slice:
    """The indices of a dimension that a rank holds; a slice where they follow one another."""
    if not type_.layout.splits(dim):
        return slice(0, type_.shape[dim])
    ids = local_indices(type_.shape[dim], dim, type_.layout, mesh, coordinate) if type_.shape[dim] else []
    return slice(ids[0], ids[-1] + 1) if ids and ids[-1] - ids[0] == len(ids) - 1 else ids  # they ascend


def _index(type_: Type, mesh: Mesh, coordinate: Mapping[str, int]) -> tuple[slice, ...] | tuple[Tensor, ...]:
    """The elements of a rank: a slice a dimension, or one index tensor a dimension, ready to broadcast."""
    held = [_held(type_, dim, mesh, coordinate) for dim in range(len(type_.shape))]
    slices = tuple([h for h in held if isinstance(h, slice)])
    if len(slices) == len(held):
        return slices
    ids = [torch.arange(h.start, h.stop) if isinstance(h, slice) else torch.tensor(h, dtype=torch.int64) for h in held]
    return tuple([x.view([-1 if d == dim else 1 for d in range(len(ids))]) for dim, x in enumerate(ids)])


def _cut(x: Tensor, type_: Type, mesh: Mesh, coordinate: Mapping[str, int]) -> Tensor:
    for dim in range(len(type_.shape)):
        if type_.layout.splits(dim):
            held = _held(type_, dim, mesh, coordinate)
            if isinstance(held, slice):
                x = x.narrow(dim, held.start, held.stop - held.start).clone()
            else:
                x = x.index_select(dim, torch.tensor(held, dtype=torch.int64))
    return x


def _equal(a: Tensor, b: Tensor) -> bool:
    """Replicas may differ by the rounding of another summation order only."""
    if torch.equal(a, b):
        return True
    if a.dtype.is_floating_point or a.dtype.is_complex:
        return bool(torch.allclose(a, b, rtol=1e-10, atol=1e-10, equal_nan=True))
    return False


def _difference(a: Tensor, b: Tensor) -> str:
    at = int((a != b).flatten().to(torch.uint8).argmax())
    return f"{a.flatten()[at].item()} and {b.flatten()[at].item()} at element {at}"


def _where(coordinate: Mapping[str, int]) -> str:
    return ", ".join(f"{a}={i}" for a, i in coordinate.items())
