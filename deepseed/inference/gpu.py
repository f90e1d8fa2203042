"""Paged attention of a step on a GPU: the kernel of deepseed.codegen.triton_paged, one launch a layer for decodes and chunks together."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from deepseed.codegen.triton_files import launch_of
from deepseed.codegen.triton_paged import Attention, source
from deepseed.runtime.executable import cache_dir

if TYPE_CHECKING:
    from deepseed.inference.attention import Packing

DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def takes(q: Tensor) -> bool:
    return q.device.type == "cuda" and q.dtype in DTYPES and importlib.util.find_spec("triton") is not None


def attend(q: Tensor, keys: Tensor, values: Tensor, packing: Packing, scale: float, window: int, softcap: float, sinks: Tensor | None) -> Tensor:
    """The new tokens' keys and values lie in their pages already."""
    kind = Attention(q.shape[1] // keys.shape[0], keys.shape[3], values.shape[3], packing.size, scale, window, softcap, sinks is not None, DTYPES[q.dtype])
    tokens = kind.tokens(max(packing.news))
    out: Tensor = _launch(kind, tokens)(q.contiguous(), keys, values, *packing.tensors, packing.tiles(tokens), sinks.to(q.dtype) if sinks is not None else q)[0]
    return out


@lru_cache(maxsize=256)
def _launch(kind: Attention, tokens: int) -> Callable[..., Any]:
    return launch_of("paged", source(kind, tokens), cache_dir() / "kernels")


def tiles(news: list[int], tokens: int) -> np.ndarray[Any, Any]:
    """[n, 2]: each tile's sequence, and its first new token."""
    return np.array([(s, first) for s, new in enumerate(news) for first in range(0, new, tokens)], dtype=np.int64)
