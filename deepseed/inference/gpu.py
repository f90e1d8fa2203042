"""Paged attention of a step on a GPU: the kernel of deepseed.codegen.triton_paged, one launch a layer for decodes and chunks together, after one for the new keys and values."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from deepseed.codegen.triton_files import launch_of
from deepseed.codegen.triton_paged import Attention, source, writes
from deepseed.runtime.executable import cache_dir

if TYPE_CHECKING:
    from deepseed.inference.attention import Packing

KERNELS = 2  # of a layer
DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def takes(q: Tensor) -> bool:
    return q.device.type == "cuda" and q.dtype in DTYPES and importlib.util.find_spec("triton") is not None


def attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, packing: Packing, scale: float, window: int, softcap: float, sinks: Tensor | None) -> Tensor:
    """``deepseed::paged_attention``, with the step's packing in the place of its tables: one launch for the new keys and values, one for all queries."""
    kind = Attention(q.shape[1] // keys.shape[0], keys.shape[3], values.shape[3], packing.size, scale, window, softcap, sinks is not None, DTYPES[q.dtype])
    tokens = kind.tokens(max(packing.news))
    _put(kind)(k, v, keys, values, packing.slots)
    out: Tensor = _attend(kind, tokens)(q, keys, values, *packing.tensors, packing.tiles(tokens), sinks.to(q.dtype) if sinks is not None else q)[0]
    return out


@lru_cache(maxsize=256)
def _attend(kind: Attention, tokens: int) -> Callable[..., Any]:
    return launch_of("paged", source(kind, tokens), cache_dir() / "kernels")


@lru_cache(maxsize=256)
def _put(kind: Attention) -> Callable[..., Any]:
    return launch_of("put", writes(kind), cache_dir() / "kernels")


def tiles(news: list[int], tokens: int) -> np.ndarray[Any, Any]:
    """[n, 2]: each tile's sequence, and its first new token."""
    return np.array([(s, first) for s, new in enumerate(news) for first in range(0, new, tokens)], dtype=np.int64)
