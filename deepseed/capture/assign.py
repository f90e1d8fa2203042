"""What depends on data in its size, said without it, while a model is traced: assignments and choices by a mask, packed sequences, CTC.

``x[mask] = value``: PyTorch differentiates it by collecting what the mask chooses; where the value is one for all that the mask
chooses, ``torch.where`` says the same. ``x[mask]`` and ``masked_select``: ``deepseed.capture.chosen``. Packed sequences: ``deepseed.capture.packed``.
``ctc_loss``: ``deepseed.capture.ctc``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from deepseed.capture.chosen import Chosen, choose, put_back
from deepseed.capture.ctc import ctc_loss
from deepseed.capture.metadata import Where
from deepseed.capture.packed import pack, pad, recur

PACKED = ("gru", "lstm", "rnn_tanh", "rnn_relu")


class Masked(TorchFunctionMode):
    """``here``: the user's place, for what is refused."""

    def __init__(self, here: Callable[[], Where]) -> None:
        super().__init__()
        self.here = here

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is Tensor.__setitem__ and isinstance(args[2], Tensor) and _assigned(*args):
            return None
        if func is Tensor.__getitem__ and (mask := _mask(args[0], args[1])) is not None:
            return choose(args[0], mask, self.here)
        if func in (Tensor.masked_select, torch.masked_select):
            x, mask = torch.broadcast_tensors(args[0], kwargs["mask"] if kwargs else args[1])  # type: ignore[no-untyped-call]
            return choose(x, mask, self.here)
        if func in (F.ctc_loss, torch.ctc_loss):
            return ctc_loss(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name == "_pack_padded_sequence":
            return pack(self.here, *args)
        if name == "_pad_packed_sequence":
            return pad(*args)
        if name in PACKED and args and isinstance(args[0], Chosen):
            return recur(name, *args)
        return func(*args, **(kwargs or {}))


def _mask(x: Tensor, key: Any) -> Tensor | None:
    """The mask, where ``x[key]`` chooses by one that covers the first dimensions of x."""
    if isinstance(key, tuple) and len(key) >= 1 and all(k is Ellipsis or (isinstance(k, slice) and k == slice(None)) for k in key[1:]):
        key = key[0]
    found = isinstance(key, Tensor) and not isinstance(key, Chosen) and not isinstance(x, Chosen) and key.dtype == torch.bool and key.dim() > 0
    return key if found and key.shape == x.shape[: key.dim()] else None


def _assigned(x: Tensor, key: Any, value: Tensor) -> bool:
    """``x[key] = value`` done by ``torch.where``; False: not such an assignment."""
    mask = _mask(x, key)
    if mask is None:
        return False
    if isinstance(value, Chosen):
        put_back(x, mask, value)
        return True
    rest = x.dim() - mask.dim()
    chosen = value.dim() - rest - 1
    if not value.requires_grad or not (chosen < 0 or (chosen == 0 and value.shape[0] == 1)):
        return False
    value = value[0] if chosen == 0 else value
    x.copy_(torch.where(mask.reshape(mask.shape + (1,) * rest), value.to(x.dtype), x))
    return True
