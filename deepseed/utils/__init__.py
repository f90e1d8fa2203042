"""What DeepSpeed has under ``deepspeed.utils``, by its names: a parameter's whole values, gradient and optimizer state, and the log."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from deepseed.compiled import compiled_with
from deepseed.trained import Trained

__all__ = ["log_dist", "logger", "safe_get_full_fp32_param", "safe_get_full_grad", "safe_get_full_optimizer_state"]
logger = logging.getLogger("deepseed")


def safe_get_full_fp32_param(param: Tensor) -> Tensor | None:
    """A parameter of a compiled model, whole, as wide as it is updated. Every rank must ask."""
    found = compiled_with(param)
    whole = param.detach() if found is None else found[0].whole_parameter(found[1])
    return whole.float() if whole.itemsize < 4 else whole.clone()


def safe_get_full_grad(param: Tensor) -> Tensor | None:
    """Between backward and step: the mean gradient over the ranks, whole, of the microbatches so far; None where there is none. Every rank must ask."""
    found = compiled_with(param)
    return found[0].gradient(found[1]) if found is not None and isinstance(found[0], Trained) else None


def safe_get_full_optimizer_state(param: Tensor, optim_state_key: str) -> Tensor | None:
    """Such as ``exp_avg``, whole; None before the first step, and where the optimizer has no such state. Every rank must ask."""
    found = compiled_with(param)
    return found[0].whole_state(optim_state_key, found[1]) if found is not None else None


def log_dist(message: str, ranks: Sequence[int] | None = None, level: int = logging.INFO) -> None:
    """On these ranks; None or -1: on all."""
    rank = dist.get_rank() if dist.is_initialized() else -1
    if not ranks or -1 in ranks or rank in ranks or (rank == -1 and 0 in ranks):
        logger.log(level, f"[Rank {rank}] {message}")
