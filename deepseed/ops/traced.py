"""The own ops as a tracer can follow them: nothing is written in place, no number is read out of a tensor. A compiled kernel's function is run with
this module as its ``ops``; the numbers are those of ``deepseed.ops``, bit for bit in what is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deepseed.ops.own import amax, cast, cat, expand, full, gather, pad, permute, reshape, slice, sum
from deepseed.ops.rng import GOLDEN, MIX1, MIX2, Index, _below, _signed, indices, site_hash

__all__ = ["amax", "bernoulli", "cast", "cat", "expand", "full", "gather", "iota", "pad", "permute", "reshape", "scatter_add", "slice", "sum", "uniform", "unslice"]


def iota(n: int, start: float, step: float, dtype: torch.dtype, index: Index | None = None, device: torch.device | None = None) -> Tensor:
    i = torch.arange(n, dtype=torch.int64, device=device) if index is None else indices(index, device)[0]
    return i.to(dtype) * step + start if dtype.is_floating_point else (i * step + start).to(dtype)


def unslice(x: Tensor, shape: Sequence[int], dim: int, start: int, step: int) -> Tensor:
    if step != 1:
        out: Tensor = torch.ops.aten.slice_scatter(x.new_zeros(tuple(shape)), x, dim, start, start + (x.shape[dim] - 1) * step + 1, step)
        return out
    return torch.constant_pad_nd(x, [0, 0] * (len(shape) - 1 - dim) + [start, shape[dim] - start - x.shape[dim]], 0)


def scatter_add(x: Tensor, index: Tensor, src: Tensor, dim: int, start: int | None = None) -> Tensor:
    """One element of each row: compared with every place of it, so that nothing is scattered."""
    place = torch.arange(x.shape[dim], device=x.device)
    return torch.where(place == (index if start is None else index - start), x + src, x)


def bernoulli(rng: Tensor, shape: Sequence[int], p: float, site: str, dtype: torch.dtype, index: Index | None = None) -> Tensor:
    threshold = round(p * 2**32) - 2**31
    if threshold >= 2**31 or threshold <= -(2**31):
        return torch.full(tuple(shape), 1 if threshold > 0 else 0, dtype=dtype, device=rng.device)
    return (_lanes(rng, shape, site, index) < threshold).to(dtype)


def uniform(rng: Tensor, shape: Sequence[int], low: float, high: float, site: str, dtype: torch.dtype, index: Index | None = None) -> Tensor:
    lanes = _lanes(rng, shape, site, index)
    if dtype is torch.float64:
        u = (lanes.to(torch.float64) + 2.0**31) * ((high - low) * 2.0**-32)
    else:
        u = (lanes >> 8).to(torch.float32) + 2.0**23
        u = u * 2.0**-24 * (high - low)
    return (u + low).to(dtype).clamp(max=_below(high, dtype))


def _lanes(rng: Tensor, shape: Sequence[int], site: str, index: Index | None) -> Tensor:
    """The 32-bit lane of each element, from its row-major global index."""
    if index is None:
        g = torch.arange(torch.Size(shape).numel(), device=rng.device).view(tuple(shape))
    else:
        g = torch.zeros((), dtype=torch.int64, device=rng.device)
        for dim, i in zip(index, indices(index, rng.device), strict=True):
            size = 1
            for n, *_ in dim:
                size *= n
            g = g[..., None] * size + i
    seed = rng * _signed(GOLDEN)
    key = _mix(_mix(seed[0] + _signed(site_hash(site))) + seed[1])
    word = _mix(((g >> 1) + 1) * _signed(GOLDEN) + key)
    return (word >> ((g & 1) * 32)).to(torch.int32)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _signed(MIX1)
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _signed(MIX2)
    return z ^ ((z >> 31) & ((1 << 33) - 1))
