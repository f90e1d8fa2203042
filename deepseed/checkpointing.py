"""``deepseed.checkpointing``: DeepSpeed's activation checkpointing is torch's. What is kept, computed again or moved to the host beside that, the plan says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint as _checkpoint

from deepseed.logs import warn

_WORDS = {"partition_activations": "remat", "checkpoint_in_cpu": "offload(activations)"}
_configured = False


def configure(mpu_: Any = None, deepspeed_config: Any = None, partition_activations: bool | None = None, contiguous_checkpointing: bool | None = None,
              num_checkpoints: int | None = None, checkpoint_in_cpu: bool | None = None, synchronize: bool | None = None, profile: bool | None = None) -> None:  # fmt: skip
    """Nothing needs to be told: says which word of a plan is meant."""
    global _configured
    _configured = True
    asked = [word for name, word in _WORDS.items() if {"partition_activations": partition_activations, "checkpoint_in_cpu": checkpoint_in_cpu}[name]]
    if asked:
        warn(f"checkpointing.configure: not by a call but by the plan: {'+'.join(asked)} (activation_checkpointing in the config)")


def is_configured() -> bool:
    return _configured


def reset() -> None:
    """Nothing is kept between steps."""


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``function(*args)``, whose inner values are computed again in the backward."""
    return _checkpoint(function, *args, use_reentrant=False, **kwargs)


non_reentrant_checkpoint = checkpoint
