"""What each collective does to the shards, written from its definition: the yardstick of the checks, not the runtime.

Every function sees one group (the ranks that differ along one axis, in its order) and works on local tensors only. A split
of a dimension over an axis is seen as [left, n, right]: ``left`` is the local product of the factors that stand before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from math import prod

import torch
from torch import Tensor

from deepseed.ir.layout import Layout, Partial, Split, factors
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Type
from deepseed.ir.subaxes import joint


def perform(kind: str, parts: Sequence[Tensor], source: Type, target: Type, axis: str, mesh: Mesh) -> list[Tensor]:
    """Every rank's result of the collective ``kind`` (``all_gather.start``, ``shard``, ..), from every rank's operand."""
    out: list[Tensor | None] = [None] * len(parts)
    if axis not in mesh.sizes:  # all sub-axes of it: the same ranks in the same order
        joined = [joint(t.layout, axis, mesh) for t in (source, target)]
        mesh = mesh.together(axis)
        source, target = (t.laid(layout) for t, layout in zip((source, target), joined, strict=True) if layout is not None)
    for rank in range(mesh.ranks):
        if out[rank] is None:
            group = mesh.group(axis, rank)
            for member, result in zip(group, _group(kind, [parts[m] for m in group], source, target, axis, mesh), strict=True):
                out[member] = result
    return [x for x in out if x is not None]


def _group(kind: str, parts: list[Tensor], source: Type, target: Type, axis: str, mesh: Mesh) -> list[Tensor]:
    n = len(parts)
    before, after = source.layout.on(axis), target.layout.on(axis)
    if kind == "all_gather.start":
        return [_joined(parts, source, axis, mesh)] * n
    if kind == "all_to_all.start":
        whole = _joined(parts, source, axis, mesh)
        return [_part(whole, target, axis, mesh, i) for i in range(n)]
    if kind == "all_reduce.start":
        return [_reduced(parts, before)] * n
    if kind == "reduce_scatter.start":
        whole = _reduced(parts, before)
        return [_part(whole, target, axis, mesh, i) for i in range(n)]
    if kind == "shard":
        return [_part(x, target, axis, mesh, i) for i, x in enumerate(parts)]
    if kind == "summand" and isinstance(after, Partial):
        return [x if i == 0 else torch.zeros_like(x) for i, x in enumerate(parts)]
    raise ValueError(f"no collective is called {kind}")


def _reduced(parts: list[Tensor], element: object) -> Tensor:
    return reduce(torch.maximum if element == Partial("max") else torch.add, parts)


def _left(t: Type, layout: Layout, axis: str, mesh: Mesh) -> tuple[int, int]:
    """The dimension that ``axis`` splits, and the local product of the factors before it."""
    element = layout.on(axis)
    if not isinstance(element, Split):
        raise ValueError(f"{t.dtype}{list(t.shape)} is not split over {axis}")
    left = []
    for n, a in factors(t.shape[element.dim], element.dim, layout, mesh):
        if a == axis:
            break
        if a is None:
            left.append(n)
    return element.dim, prod(left)


def _joined(parts: list[Tensor], t: Type, axis: str, mesh: Mesh) -> Tensor:
    """The pieces of a split dimension put side by side, block by block."""
    dim, left = _left(t, t.layout, axis, mesh)
    shape = list(parts[0].shape)
    blocks = [x.reshape(*shape[:dim], left, shape[dim] // left, *shape[dim + 1 :]) for x in parts]
    return torch.cat(blocks, dim + 1).reshape(*shape[:dim], shape[dim] * len(parts), *shape[dim + 1 :])


def _part(x: Tensor, t: Type, axis: str, mesh: Mesh, i: int) -> Tensor:
    """Piece ``i`` of every block of the dimension that ``axis`` splits in ``t``."""
    dim, left = _left(t, t.layout, axis, mesh)
    n = mesh.size(axis)
    shape = list(x.shape)
    blocks = x.reshape(*shape[:dim], left, n, shape[dim] // (left * n), *shape[dim + 1 :])
    return blocks.select(dim + 1, i).reshape(*shape[:dim], shape[dim] // n, *shape[dim + 1 :])
