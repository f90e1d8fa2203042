"""Products of rows with the matrix that each row's id names, as a router sends tokens to experts: ``y[t] = x[t] @ w[ids[t]]``.

Rows are sorted by id, each matrix meets its rows in one product, and nothing of the shape [rows, k, n] is made. ``start`` marks
a shard of the matrices: w holds those from ``start`` on, and a row whose matrix is elsewhere gives zeros (or is left out of
the sums), so that the results of all shards sum up to the whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deepseed.ops.products import mm


@dataclass(frozen=True)
class _Sorted:
    """The rows in the order of their ids: those of matrix e are ``order[ends[e - 1] : ends[e]]``; what is here no matrix has, last."""

    order: Tensor
    ends: Tensor  # i64[matrices], cumulative
    some: bool  # whether rows may be elsewhere


def routed_mm(x: Tensor, w: Tensor, ids: Tensor, start: int | None = None) -> Tensor:
    """[t, n]: ``x[t] @ w[ids[t] - start]`` for x [t, k], w [e, k, n]; zeros where the id is not in w."""
    by = _sort(ids, start, w.shape[0])
    rows, n = x.shape[0], w.shape[2]
    if _grouped(x, w.shape[1], n):
        y = torch._grouped_mm(x.index_select(0, by.order), w, by.ends.to(torch.int32))
        if by.some:
            y.masked_fill_((torch.arange(rows, device=x.device) >= by.ends[-1])[:, None], 0)
        return torch.empty_like(y).index_copy_(0, by.order, y)
    ends = by.ends.tolist()
    here = by.order[: ends[-1]] if ends else by.order[:0]
    x = x.index_select(0, here)
    y = x.new_empty(len(here), n)
    for matrix, low, high in zip(w, [0, *ends], ends, strict=False):
        if low < high:
            mm(x[low:high], matrix, out=y[low:high])
    out = x.new_empty(rows, n) if len(here) == rows else x.new_zeros(rows, n)
    return out.index_copy_(0, here, y)


def routed_outer(x: Tensor, g: Tensor, ids: Tensor, matrices: int, start: int | None = None) -> Tensor:
    """[matrices, k, n]: for each matrix the sum of ``outer(x[t], g[t])`` over its rows; x [t, k], g [t, n]."""
    by = _sort(ids, start, matrices)
    if _grouped(x, x.shape[1], g.shape[1]):
        return torch._grouped_mm(x.index_select(0, by.order).t(), g.index_select(0, by.order), by.ends.to(torch.int32))
    ends = by.ends.tolist()
    here = by.order[: ends[-1]] if ends else by.order[:0]
    x, g = x.index_select(0, here), g.index_select(0, here)
    out = x.new_empty(matrices, x.shape[1], g.shape[1])
    for matrix, low, high in zip(out, [0, *ends], ends, strict=False):
        if low < high:
            mm(x[low:high].t(), g[low:high], out=matrix)
        else:
            matrix.zero_()
    return out


def _sort(ids: Tensor, start: int | None, matrices: int) -> _Sorted:
    """Raises IndexError where an id names no matrix (on CPU, where that is seen at no cost)."""
    if start is not None:
        ids = ids - start
        ids = torch.where((ids >= 0) & (ids < matrices), ids, matrices)
    elif ids.device.type == "cpu" and ids.numel():
        low, high = (int(i) for i in torch.aminmax(ids))
        if low < 0 or high >= matrices:
            raise IndexError(f"row ids from {low} to {high}, but there are {matrices} matrices")
    keys, order = torch.sort(ids, stable=True)
    ends = torch.searchsorted(keys, torch.arange(matrices, device=ids.device, dtype=ids.dtype), right=True)
    return _Sorted(order, ends, start is not None)


def _grouped(x: Tensor, k: int, n: int) -> bool:
    """Whether torch's grouped product takes it: bf16 on a GPU, rows of a multiple of 16 bytes. It reads no size on the host."""
    return x.is_cuda and x.dtype is torch.bfloat16 and k % 8 == 0 and n % 8 == 0
