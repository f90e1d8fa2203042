"""What a plan's words of precision mean to the capture: the dtype of the computation, of the gradients' sums, and the loss scale."""

from __future__ import annotations

from typing import TypedDict

import torch

from deepseed import ops
from deepseed.capture import LossScale
from deepseed.plan import Plan


class Precision(TypedDict):
    """Arguments of ``capture``; None: as the model has it."""

    compute: torch.dtype | None
    reduce: torch.dtype | None
    loss_scale: LossScale | None


def precision(plan: Plan, said: LossScale | float | None = None) -> Precision:
    """``said``: the user's loss scale, a number for one that stays. ``fp16`` has one that moves unless another is said."""
    scale = LossScale() if said is None and plan.precision == "fp16" else said
    return {
        "compute": None if plan.dtype is None else ops.torch_dtype(plan.dtype),
        "reduce": None if plan.grad_dtype is None else ops.torch_dtype(plan.grad_dtype),
        "loss_scale": scale if isinstance(scale, LossScale) or scale is None else LossScale(float(scale), window=0),
    }
