"""``x[mask] = value`` while a model is traced: where the value is one for all that the mask chooses, its gradient needs no indices.

PyTorch differentiates the assignment by collecting what the mask chooses, a tensor whose size depends on data. ``torch.where``
says the same without it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class MaskedAssignment(TorchFunctionMode):
    """Assignments by a boolean mask, of a number or of a tensor that does not name what is chosen, become ``torch.where``."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is Tensor.__setitem__ and isinstance(args[2], Tensor) and args[2].requires_grad:
            x, mask, value = args
            if isinstance(mask, tuple) and len(mask) == 1:
                (mask,) = mask
            if isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == x.shape[: mask.dim()]:
                rest = x.dim() - mask.dim()
                chosen = value.dim() - rest - 1
                if chosen < 0 or (chosen == 0 and value.shape[0] == 1):
                    value = value[0] if chosen == 0 else value
                    x.copy_(torch.where(mask.reshape(mask.shape + (1,) * rest), value.to(x.dtype), x))
                    return None
        return func(*args, **(kwargs or {}))
