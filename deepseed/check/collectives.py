"""What each collective does to the shards, written from its definition: the yardstick of the checks, not the runtime.

Every function sees one group (the ranks that differ along one axis, in its order) and works on local tensors only. A split
of a dimension over an axis is seen as [left, of, right]: ``left`` is the local product of the factors that stand before it, and
each rank holds its chunk of ``of`` (one index of n where the split is even).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from deepseed.ir.layout import Owned, Partial, Split, chunk, factors, part
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Type
from deepseed.ir.subaxes import joint


def perform(kind: str, parts: Sequence[Tensor], source: Type, target: Type, axis: str, mesh: Mesh, ids: Sequence[Tensor] = ()) -> list[Tensor]:
    """Every rank's result of the collective ``kind`` (``all_gather.start``, ``shard``, ..), from every rank's operand; ``ids``: every
    rank's second operand of ``dispatch.start`` and ``combine.start``."""
    out: list[Tensor | None] = [None] * len(parts)
    if axis not in mesh.sizes:  # all sub-axes of it: the same ranks in the same order
        joined = [joint(t.layout, axis, mesh) for t in (source, target)]
        mesh = mesh.together(axis)
        source, target = (t.laid(layout) for t, layout in zip((source, target), joined, strict=True) if layout is not None)
    for rank in range(mesh.ranks):
        if out[rank] is None:
            group = mesh.group(axis, rank)
            here = mesh.seen_from(mesh.coordinate(rank))
            keys = [ids[m] for m in group] if ids else []
            for member, result in zip(group, _group(kind, [parts[m] for m in group], source, target, axis, here, keys), strict=True):
                out[member] = result
    return [x for x in out if x is not None]


def _group(kind: str, parts: list[Tensor], source: Type, target: Type, axis: str, mesh: Mesh, ids: list[Tensor]) -> list[Tensor]:
    n = len(parts)
    before, after = source.layout.on(axis), target.layout.on(axis)
    if kind in ("all_gather.start", "collect"):
        return [_joined(parts, source, axis, mesh)] * n
    if kind == "all_to_all.start":
        whole = _joined(parts, source, axis, mesh)
        return [_part(whole, target, axis, mesh, i) for i in range(n)]
    if kind in ("all_reduce.start", "accumulate"):
        return [_reduced(parts, before)] * n
    if kind == "reduce_scatter.start":
        whole = _reduced(parts, before)
        return [_part(whole, target, axis, mesh, i) for i in range(n)]
    if kind == "dispatch.start" and isinstance(after, Owned):
        whole = _joined(parts, source, axis, mesh)
        return [whole.masked_fill(~_mine(ids[i], after, n, i, whole.dim()), 0) for i in range(n)]
    if kind == "combine.start" and isinstance(before, Owned):
        whole = reduce(torch.add, [x.masked_fill(~_mine(ids[i], before, n, i, x.dim()), 0) for i, x in enumerate(parts)])
        return [_part(whole, target, axis, mesh, i) for i in range(n)]
    if kind == "shard":
        return [_part(x, target, axis, mesh, i) for i, x in enumerate(parts)]
    if kind == "share":
        return [x / n for x in parts]
    if kind == "summand" and isinstance(after, Partial):
        return [x if i == 0 else torch.zeros_like(x) for i, x in enumerate(parts)]
    raise ValueError(f"no collective is called {kind}")


def _reduced(parts: list[Tensor], element: object) -> Tensor:
    return reduce(torch.maximum if element == Partial("max") else torch.add, parts)


def _mine(ids: Tensor, element: Owned, n: int, i: int, dims: int) -> Tensor:
    """The rows that rank ``i`` of ``n`` owns, ready to broadcast: ids from i / n of all ids up to (i + 1) / n of them."""
    mine = (ids * n >= i * element.of) & (ids * n < (i + 1) * element.of)
    return mine.view([-1 if d == element.dim else 1 for d in range(dims)])


def _seen(t: Type, axis: str, mesh: Mesh) -> tuple[int, int, int, int]:
    """The dimension that ``axis`` splits, and (left, of, right) of the ranks of the group."""
    element = t.layout.on(axis)
    if not isinstance(element, Split):
        raise ValueError(f"{t.dtype}{list(t.shape)} is not split over {axis}")
    left, of, right = 1, 1, 1
    found = False
    for n, a in factors(t.shape[element.dim], element.dim, t.layout, mesh):
        if a == axis:
            of, found = n, True
        elif found:
            right *= part(n, a, mesh)
        else:
            left *= part(n, a, mesh)
    return element.dim, left, of, right


def _joined(parts: list[Tensor], t: Type, axis: str, mesh: Mesh) -> Tensor:
    """The pieces of a split dimension put side by side, block by block."""
    dim, left, of, right = _seen(t, axis, mesh)
    shape = list(parts[0].shape)
    blocks = [x.reshape(*shape[:dim], left, len(chunk(of, len(parts), i)), right, *shape[dim + 1 :]) for i, x in enumerate(parts)]
    return torch.cat(blocks, dim + 1).reshape(*shape[:dim], left * of * right, *shape[dim + 1 :])


def _part(x: Tensor, t: Type, axis: str, mesh: Mesh, i: int) -> Tensor:
    """Piece ``i`` of every block of the dimension that ``axis`` splits in ``t``."""
    dim, left, of, right = _seen(t, axis, mesh)
    held = chunk(of, mesh.size(axis), i)
    shape = list(x.shape)
    blocks = x.reshape(*shape[:dim], left, of, right, *shape[dim + 1 :])
    return blocks[(slice(None),) * (dim + 1) + (slice(held.start, held.stop),)].reshape(*shape[:dim], left * len(held) * right, *shape[dim + 1 :])
