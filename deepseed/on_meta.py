"""``with deepseed.meta():`` builds a model without memory for its parameters: these are on the meta device, buffers have their values.

Buffers such as rotary frequencies are computed by a constructor and are in no file, so under ``torch.device("meta")`` they would be lost.
A parameter gives up its memory when it is registered: at most one is held at a time, and what nobody has written takes none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import UninitializedParameter
from torch.utils.weak import WeakTensorKeyDictionary


@contextmanager
def meta() -> Iterator[None]:
    """Modules that are built inside have their parameters on the meta device, and real buffers.

    >>> with meta():
    ...     model = nn.Sequential(nn.Linear(4096, 4096), nn.BatchNorm1d(4096))
    >>> model[0].weight.is_meta, model[1].running_var.sum()
    (True, tensor(4096.))
    """
    made = WeakTensorKeyDictionary()  # one for each, under however many names it is registered

    def empty(_: nn.Module, __: str, p: nn.Parameter | None) -> nn.Parameter | None:
        if p is None or p.is_meta or isinstance(p, UninitializedParameter):
            return None
        if p not in made:
            made[p] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
            made[p].__dict__.update(p.__dict__)
        known: nn.Parameter = made[p]
        return known

    handle = register_module_parameter_registration_hook(empty)  # type: ignore[arg-type]  # its stub forgets that the result is taken
    try:
        yield
    finally:
        handle.remove()
