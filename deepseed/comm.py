"""``deepseed.comm``: torch.distributed under the name that DeepSpeed's scripts call it by, and ``init_distributed``."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from deepseed.engine.start import init_distributed

__all__ = ["init_distributed"]


def __getattr__(name: str) -> Any:
    try:
        return getattr(dist, name)
    except AttributeError:
        raise AttributeError(f"module 'deepseed.comm' has no attribute {name!r}: torch.distributed has none either") from None
