"""Batches on their way to the device."""

from __future__ import annotations

from typing import Any

import torch

from deepseed.capture.batch import rebuild, tensors


def to_device(batch: Any, device: torch.device) -> Any:
    """The same with its tensors on ``device``; itself where they are there."""
    given = tensors(batch)
    return batch if all(t.device == device for t in given.values()) else rebuild(batch, {key: t.to(device) for key, t in given.items()})
