"""Tensors one of whose dimensions reaches over more elements than 32 bits count. They are made in the process that they are sent to: of their gigabytes only the pages exist that hold a number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Far:
    """``x``, as it arrives elsewhere, with ``dim`` strided."""

    x: Tensor
    dim: int

    def __reduce__(self) -> tuple[Any, ...]:
        return far, (self.x, self.dim)


def far(x: Tensor, dim: int) -> Tensor:
    """The last index of ``dim`` lies 2**31 elements from the first or a little more; the stride fits in 32 bits."""
    strides = list(torch.empty(x.shape, device="meta").stride())
    strides[dim] = -(-(2**31) // (x.shape[dim] - 1))
    return torch.empty_strided(x.shape, strides, dtype=x.dtype).copy_(x)
