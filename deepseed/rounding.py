"""How far rounding alone carries eager PyTorch from itself: is a run of several steps determined to the tolerance of a comparison?

Batch norms over few values, among others, multiply an error of the last place by a thousand in each step. Two programs that mean
the same then differ by more than 1e-10 after three steps, and so does eager PyTorch from eager PyTorch with its parameters off by
one unit in the last place. Where that is so (it is tried, never assumed) steps are compared one by one, each from eager's own
parameters and buffers, within the same tolerance.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

ULP = 2.0**-52
Run = tuple[Sequence[float], Sequence[Mapping[str, Tensor]]]  # losses and gradients, step by step


def shaken(model: nn.Module) -> nn.Module:
    """A copy of a float64 model whose parameters are off by one unit in the last place, up or down."""
    other = copy.deepcopy(model)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1 + ULP * (2 * torch.randint(0, 2, p.shape, generator=random).to(p) - 1))
    return other


def growth(start: nn.Module, run: Callable[[nn.Module], Run], far: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], float]) -> tuple[float, float]:
    """The largest relative error of the losses and of the gradients that rounding alone makes. ``run`` trains a model, ``far``
    compares the gradients of one step."""
    (losses, grads), (others, other_grads) = run(copy.deepcopy(start)), run(shaken(start))
    return (
        max(abs(a - b) / max(abs(a), 1e-300) for a, b in zip(losses, others, strict=True)),
        max(far(b, a) for a, b in zip(grads, other_grads, strict=True)),
    )
