"""Own ops as torch operators, so that a trace of a model shows each as one node: the random ones, and attention over pages.

``torch.ops.deepseed.bernoulli(rng, size, p, site, dtype)``, ``uniform(rng, size, low, high, site, dtype)`` and
``normal(rng, size, mean, std, site, dtype)``; ``rng`` is i64[2]: seed, step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deepseed.ops import rng as _rng
from deepseed.ops.attention import paged_attention


def _paged(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, layer: int, scale: float, window: int, softcap: float) -> Tensor:
    return paged_attention(q, k, v, sinks, scale, window, softcap)


_library = torch.library.Library("deepseed", "FRAGMENT")  # type: ignore[no-untyped-call]
_SCHEMAS = {
    "bernoulli": ("(Tensor rng, SymInt[] size, float p, str site, ScalarType dtype) -> Tensor", _rng.bernoulli),
    "uniform": ("(Tensor rng, SymInt[] size, float low, float high, str site, ScalarType dtype) -> Tensor", _rng.uniform),
    "normal": ("(Tensor rng, SymInt[] size, float mean, float std, str site, ScalarType dtype) -> Tensor", _rng.normal),
    "paged": ("(Tensor q, Tensor k, Tensor v, Tensor? sinks, int layer, float scale, int window, float softcap) -> Tensor", _paged),
}


def register() -> None:
    """Define the operators, once a process."""
    for name, (schema, function) in _SCHEMAS.items():
        if hasattr(torch.ops.deepseed, name):
            continue
        _library.define(name + schema)  # type: ignore[no-untyped-call]
        for device in ("CPU", "CUDA"):
            _library.impl(name, function, device)  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"deepseed::{name}", _fake_paged if name == "paged" else _fake, lib=_library)


def _fake(rng: Tensor, size: Sequence[int], *numbers_site_dtype: Any) -> Tensor:
    return rng.new_empty(size, dtype=numbers_site_dtype[-1])


def _fake_paged(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])
