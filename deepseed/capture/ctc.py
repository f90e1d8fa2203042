"""Connectionist temporal classification (Graves et al., 2006) as plain tensor ops, unrolled over time.

The kernel's sizes depend on data. Here the labels of all rows stand in one table as wide as the longest that time allows; how
many of them count is a tensor. The recursion is in logarithms. PyTorch's kernel gives the gradient of ``log_softmax`` and the loss
together, ``exp(log_probs) - posterior``, and so does this: one more term, of value zero, has the gradient ``exp(log_probs)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deepseed.capture.chosen import Chosen, compact

NEVER = -1e30  # a logarithm of no chance at all whose derivative is defined


def ctc_loss(
    log_probs: Tensor, targets: Tensor, input_lengths: Any, target_lengths: Any, blank: int = 0, reduction: Any = "mean", zero_infinity: bool = False
) -> Tensor:
    """As ``torch.nn.functional.ctc_loss``: ``log_probs [T, B, C]`` or ``[T, C]``, ``targets [B, S]`` or all rows' one behind the other."""
    alone = log_probs.dim() == 2
    if alone:
        log_probs = log_probs[:, None]
        targets = targets if targets.dim() == 1 else targets.reshape(-1)
    steps, rows, _ = log_probs.shape
    times, counts = (_lengths(n, rows) for n in (input_lengths, target_lengths))
    labels = _table(targets, counts, steps)
    width = labels.shape[1]
    held = torch.arange(steps)[:, None] < times  # [T, B]
    path = torch.full((rows, 2 * width + 1), blank, dtype=torch.int64)  # blanks between labels and at both ends
    path = torch.stack([path[:, :width], labels], 2).reshape(rows, 2 * width)
    path = torch.cat([path, torch.full((rows, 1), blank, dtype=torch.int64)], 1)
    place = torch.arange(2 * width + 1)
    inside = place < 2 * counts[:, None] + 1
    leap = inside & (place % 2 == 1) & (place > 1) & (path != torch.roll(path, 2, 1))
    emit = torch.where(inside, log_probs.gather(2, path.expand(steps, -1, -1)), NEVER)
    at = torch.where((place < 2) & inside, emit[0], NEVER)
    for t in range(1, steps):
        one = torch.nn.functional.pad(at, (1, 0), value=NEVER)[:, :-1]
        two = torch.where(leap, torch.nn.functional.pad(at, (2, 0), value=NEVER)[:, :-2], NEVER) if width else one
        new = torch.clamp(torch.logsumexp(torch.stack([at, one, two] if width else [at, at * 0 + NEVER]), 0) + emit[t], min=NEVER)
        at = torch.where(held[t, :, None], new, at)
    ends = (place == 2 * counts[:, None]) | (place == 2 * counts[:, None] - 1)
    loss = -torch.logsumexp(torch.where(ends, at, NEVER), 1)
    lost = (loss > -NEVER / 2) | (counts > width)
    chance = torch.where(held[..., None], log_probs, NEVER).exp().sum((0, 2))
    loss = torch.where(lost, 0.0 if zero_infinity else torch.inf, loss + (chance - chance.detach()))
    if reduction in ("sum", 2):
        return loss.sum()
    if reduction in ("mean", 1):
        return (loss / counts.clamp(min=1).to(loss.dtype)).mean()
    return loss[0] if alone else loss


def _lengths(given: Any, rows: int) -> Tensor:
    found = given if isinstance(given, Tensor) else torch.tensor(list(given) if isinstance(given, Sequence) else [int(given)])
    return found.long().reshape(rows)


def _table(targets: Tensor, counts: Tensor, steps: int) -> Tensor:
    """Labels ``[B, S]``; no more of a row than there are steps, for more have no chance."""
    if targets.dim() == 2 and not isinstance(targets, Chosen):
        return targets[:, :steps].long()
    flat = compact(targets).long() if isinstance(targets, Chosen) else targets.long()
    width = min(flat.shape[0], steps)
    begin = counts.cumsum(0) - counts
    return flat[(begin[:, None] + torch.arange(width)).clamp(max=max(flat.shape[0] - 1, 0))]
