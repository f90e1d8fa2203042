"""Which entries of a parameter eager PyTorch itself leaves to rounding: where an optimizer amplifies a gradient that is noise.

A key projection's bias has a gradient that is mathematically zero, and so 1e-18 or -3e-18 as the order of additions has it. SGD
moves it by nothing that matters; Lion, Rprop and sign-SGD move it by a whole step in a random direction. Such entries cannot be
compared, and are found by an experiment on the eager side alone, never by the name of an optimizer:

1. An entry of a gradient is *noise* where its value, here or there, is not zero and at most ``NOISE`` of the model's largest.
2. The user's optimizer runs once more over the eager gradients, from the same start, with the noise turned round: the larger of
   the two magnitudes, the other sign.
3. An entry is left out if that moved its final value by more than ``moved``, half of what the comparison allows.

All else is compared as ever: exact zeros (rows of an embedding that no token met), every entry of an optimizer that does not
amplify, and all gradients, which are judged before an optimizer has seen them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

NOISE = 1e-12  # of the model's largest gradient of the step: what sums of ~1e4 float64 roundings leave

Grads = Mapping[str, Tensor]
Train = Callable[[nn.Module, Sequence[Grads]], None]  # the user's clipping and optimizer over given gradients, from a fresh start


def turned(eager: Grads, ours: Grads) -> tuple[dict[str, Tensor], int]:
    """The eager gradients with their noise turned round, and the number of entries that are noise."""
    largest = max((float(g.abs().max()) for g in eager.values() if g.numel()), default=0.0)
    out, count = {}, 0
    for name, e in eager.items():
        size = torch.maximum(e.abs(), ours[name].to(e).abs())
        noise = (size > 0) & (size <= NOISE * largest)
        out[name] = torch.where(noise, torch.where(e > 0, -size, size), e)
        count += int(noise.sum())
    return out, count


def undetermined(
    start: nn.Module, reached: Mapping[str, Tensor], eager: Sequence[Grads], ours: Sequence[Grads], train: Train, moved: float
) -> dict[str, Tensor]:
    """A mask for each parameter that has such entries. ``start``: the model before the first step; ``reached``: its parameters after
    the eager steps; ``moved``: relative to the largest of them."""
    if any(set(e) != set(o) or any(o[name].shape != g.shape for name, g in e.items()) for e, o in zip(eager, ours, strict=True)):
        return {}  # the comparison says so
    shaken, counts = zip(*(turned(e, o) for e, o in zip(eager, ours, strict=True)), strict=True)
    if not any(counts):
        return {}
    other = copy.deepcopy(start)
    train(other, shaken)
    largest = max((float(p.abs().max()) for p in reached.values() if p.numel()), default=0.0) or 1.0
    masks = {name: (p.detach() - reached[name]).abs() > moved * largest for name, p in other.named_parameters()}
    return {name: mask for name, mask in masks.items() if bool(mask.any())}
