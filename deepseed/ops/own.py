"""DeepSeed's own ops as plain functions: the same ones that generated source calls.

Shapes and dtypes that an op line reads from its result type are arguments here. ``start`` marks a shard of the indexed
dimension: the operand holds the indices from ``start`` on, others give zeros (or are dropped), so that the results of all
shards sum up to the whole.
"""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deepseed.ops.rng import Index, indices

_aten = torch.ops.aten

Ints = tuple[int, ...] | list[int]

_RESIZED = """
upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d
_upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d
_upsample_bilinear2d_aa _upsample_bicubic2d_aa
"""
SIZED = tuple(f"{name}_backward" for name in _RESIZED.split())  # aten ops of which one argument is the shape of the result


def reshape(x: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.reshape(x, shape)


def permute(x: Tensor, dims: Ints) -> Tensor:
    return torch.permute(x, dims)


def expand(x: Tensor, shape: Sequence[int]) -> Tensor:
    return x.expand(shape)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype)


def full(shape: Sequence[int], value: float, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    return torch.full(shape, value, dtype=dtype, device=device)


def iota(n: int, start: float, step: float, dtype: torch.dtype, index: Index | None = None, device: torch.device | None = None) -> Tensor:
    """``start + i * step`` for i < n, or for the global indices that ``index`` selects."""
    if index is None:
        i = torch.arange(n, dtype=torch.int64, device=device)
    else:
        (i,) = indices(index, device)
    return i.to(dtype).mul_(step).add_(start) if dtype.is_floating_point else i.mul_(step).add_(start).to(dtype)


def slice(x: Tensor, n: int, dim: int, start: int, step: int) -> Tensor:
    """n elements of ``dim``, every ``step``-th from ``start``."""
    out: Tensor = _aten.slice(x, dim, start, start + (n - 1) * step + 1 if n else start, step)
    return out


def unslice(x: Tensor, shape: Sequence[int], dim: int, start: int, step: int) -> Tensor:
    out = x.new_zeros(tuple(shape))
    slice(out, x.shape[dim], dim, start, step).copy_(x)
    return out


def pad(x: Tensor, pads: Sequence[int], value: float = 0) -> Tensor:
    """``pads``: low and high of each dimension, dimension 0 first."""
    reversed_pads: list[int] = []
    for d in builtins.reversed(range(len(pads) // 2)):
        reversed_pads += [pads[2 * d], pads[2 * d + 1]]
    return torch.constant_pad_nd(x, reversed_pads, value)


def cat(xs: Sequence[Tensor], dim: int) -> Tensor:
    return torch.cat(tuple(xs), dim)


def sum(x: Tensor, dims: Ints, keepdim: bool, dtype: torch.dtype) -> Tensor:
    if not dims:
        return x.to(dtype)
    return torch.sum(x, dims, keepdim, dtype=dtype)


def sum_of_squares(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Over all elements, added up in ``dtype``; no squared copy is made."""
    out: Tensor = torch.linalg.vector_norm(x, dtype=dtype).square()
    return out


def amax(x: Tensor, dims: Ints, keepdim: bool) -> Tensor:
    """The smallest number where a rank holds no element of the dimension."""
    if dims and any(x.shape[d] == 0 for d in dims):
        least = float("-inf") if x.dtype.is_floating_point else 0 if x.dtype is torch.bool else torch.iinfo(x.dtype).min
        kept = [1 if d in dims else n for d, n in enumerate(x.shape) if keepdim or d not in dims]
        return x.new_full(kept, least)
    return torch.amax(x, dims, keepdim) if dims else x


def embedding(w: Tensor, ids: Tensor, start: int | None = None) -> Tensor:
    if start is None:
        return torch.embedding(w, ids)
    if w.shape[0] == 0:
        return w.new_zeros((*ids.shape, *w.shape[1:]))
    local, inside = _local(ids, start, w.shape[0])
    return torch.where(inside[..., None], torch.embedding(w, local), w.new_zeros(()))


def embedding_backward(g: Tensor, ids: Tensor, rows: int, start: int | None = None) -> Tensor:
    """[rows, d]: the rows of ``g`` added up by id."""
    if start is not None:
        local, inside = _local(ids, start, rows)
        ids = torch.where(inside, local, -1)  # -1 is the padding index: skipped
    out: Tensor = _aten.embedding_dense_backward(g, ids, rows, -1, False)
    return out


def gather(x: Tensor, index: Tensor, dim: int, start: int | None = None) -> Tensor:
    if start is None:
        return torch.gather(x, dim, index)
    if x.shape[dim] == 0:
        return x.new_zeros(index.shape)
    local, inside = _local(index, start, x.shape[dim])
    return torch.where(inside, torch.gather(x, dim, local), x.new_zeros(()))


def scatter_add(x: Tensor, index: Tensor, src: Tensor, dim: int, start: int | None = None) -> Tensor:
    if start is None:
        return torch.scatter_add(x, dim, index, src)
    if x.shape[dim] == 0:
        return x
    local, inside = _local(index, start, x.shape[dim])
    return torch.scatter_add(x, dim, local, torch.where(inside, src, src.new_zeros(())))


def _local(ids: Tensor, start: int, n: int) -> tuple[Tensor, Tensor]:
    """Indices into a shard of n that begins at ``start`` (0 where outside), and which are inside."""
    local = ids - start
    inside = (local >= 0) & (local < n)
    return torch.where(inside, local, 0), inside


def sized(name: str, operands: Sequence[Tensor], args: Sequence[Any], shape: Sequence[int]) -> Tensor:
    """The aten op ``name``, whose arguments beside the operands are ``args``: ``"shape"`` among them is the result's shape."""
    out: Tensor = getattr(_aten, name)(*operands, *(list(shape) if a == "shape" else a for a in args))
    return out


def present(results: Any, mask: Sequence[bool] | None = None) -> Any:
    """Without the results that were not asked for, gradients that an aten op gives as None: an op line has no names for them.

    One that is left stands alone: ``dw = present(convolution_backward(.., output_mask=[False, True, False]))``. Some kernels compute what the
    op's ``mask`` leaves out, as oneDNN's convolution the weight's gradient together with the bias's.
    """
    if isinstance(results, Tensor):
        return results
    found = tuple(r for r, wanted in zip(results, mask or (True,) * len(results), strict=True) if wanted and isinstance(r, Tensor))
    return found[0] if len(found) == 1 else found
