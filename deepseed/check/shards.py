"""One tensor as the shards of its layout, and back: the meaning of a layout, written down once more for the checks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
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
    held = _held(type_, mesh)
    return [_cut(whole[tuple([c[a] for a in axes])], i) for c, (_, i) in zip(coordinates(mesh), held, strict=True)]


def assemble(parts: Sequence[Tensor], type_: Type, mesh: Mesh) -> Tensor:
    """The whole tensor. Raises ShardsError where two ranks that hold the same elements disagree."""
    held = _held(type_, mesh)
    for rank, (part, (local, _)) in enumerate(zip(parts, held, strict=True)):
        if part.shape != local:
            raise ShardsError(f"rank {rank} holds {list(part.shape)}, the layout says {list(local)}")
    partials = type_.layout.partials
    split = {axis for axis, e in type_.layout.elements if not isinstance(e, Partial)}
    wholes: dict[tuple[int, ...], Tensor] = {}
    seen: dict[tuple[int, ...], Tensor] = {}
    for part, c, (_, index) in zip(parts, coordinates(mesh), held, strict=True):
        key = tuple([c[a] for a, _ in partials])
        place = (*key, *[i for a, i in c.items() if a in split])
        if place in seen:
            if not _equal(seen[place], part):
                raise ShardsError(f"ranks that should hold the same part differ: {_difference(seen[place], part)} (at {_where(c)})")
            continue
        seen[place] = part
        if not split:
            wholes[key] = part
            continue
        whole = wholes.setdefault(key, part.new_zeros(type_.shape))
        whole[index] = part
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


@lru_cache(maxsize=1024)
def _held(type_: Type, mesh: Mesh) -> tuple[tuple[tuple[int, ...], tuple[slice, ...] | tuple[Tensor, ...]], ...]:
    """Of each rank, in rank order: the shape of its part, and the elements of the whole that it holds, as an index."""
    return tuple([(type_.local(mesh.seen_from(c)), _index(type_, mesh, c)) for c in coordinates(mesh)])


def _index(type_: Type, mesh: Mesh, coordinate: Mapping[str, int]) -> tuple[slice, ...] | tuple[Tensor, ...]:
    """A slice a dimension where all that a rank holds is contiguous, else one index tensor a dimension, ready to broadcast."""
    held = [
        local_indices(size, dim, type_.layout, mesh, coordinate) if size and type_.layout.splits(dim) else range(size) for dim, size in enumerate(type_.shape)
    ]
    if all([not ids or ids[-1] - ids[0] == len(ids) - 1 for ids in held]):  # they ascend
        return tuple([slice(ids[0], ids[-1] + 1) if ids else slice(0, 0) for ids in held])
    return tuple([torch.tensor(ids, dtype=torch.int64).view([-1 if d == dim else 1 for d in range(len(held))]) for dim, ids in enumerate(held)])


def _cut(x: Tensor, index: tuple[slice, ...] | tuple[Tensor, ...]) -> Tensor:
    """What a rank holds of ``x``; never memory of ``x`` itself where that is a part of it."""
    part = x[index]
    return x if part.shape == x.shape else part.clone() if isinstance(index[0], slice) else part


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
