"""Training with a loss scale, one of whose batches overflows: the same loop in one process and on each of several ranks."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import deepseed
from deepseed.api import TrainStep

ROWS, WIDTH, STEPS, BAD = 8, 8, 6, 2  # the batch number BAD has an infinity in a row of the last rank


def mlp(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, WIDTH)).to(dtype)


def batches(dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    out = [tuple(torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)) for _ in range(STEPS)]
    out[BAD][0][ROWS - 1, 3] = float("inf")
    return out  # type: ignore[return-value]


def mse(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    out = model(x)
    return F.mse_loss(out if out.dtype is torch.float64 else out.float(), y.to(out.dtype if out.dtype is torch.float64 else torch.float32))


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, fused=True)


@dataclass(frozen=True)
class Run:
    losses: list[float]
    scales: list[float]  # after each step
    skipped: list[int]
    parameters: dict[str, Tensor]
    state: dict[str, Tensor]


def run(plan: str, clip: float | None, backend: str, dtype: torch.dtype, window: int) -> Run:
    torch.set_num_threads(1)
    model = copy.deepcopy(mlp(dtype))
    step = deepseed.compile(
        model, plan, optimizer=adamw(list(model.parameters())), loss_fn=mse, clip_grad_norm=clip, loss_scale=deepseed.LossScale(window=window), backend=backend
    )
    assert isinstance(step, TrainStep)
    losses, scales, skipped = [], [], []
    for batch in batches(dtype):
        losses.append(float(step(batch)))
        scales.append(step.loss_scale)
        skipped.append(step.skipped)
    return Run(losses, scales, skipped, step.state_dict(), step.optimizer_state())


def runs(plans: list[str]) -> list[Run]:
    """Of one real rank, in float64."""
    return [run(plan, 1.0, "gloo", torch.float64, 2) for plan in plans]
