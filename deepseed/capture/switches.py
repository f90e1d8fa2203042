"""Switches that hold while a model is traced, all reversible: a table on configs and module attributes, never on models by name."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint as _checkpoints
from torch import Tensor, nn

CONFIG: dict[str, Any] = {
    "use_cache": False,  # a key-value cache is an output nobody asked for
    "_experts_implementation": "batched_mm",  # static shapes; the loop over experts reads tensor values
}


@contextmanager
def switched(model: nn.Module) -> Iterator[None]:
    """CONFIG set on every config of the model's modules; activation checkpointing non-reentrant; no fused CPU recurrences, no
    fused encoder layers; no validation of distributions' arguments, which reads their values in Python;
    what ``torch.compile`` wrapped runs as it was written."""
    validated = torch.distributions.Distribution._validate_args
    mkldnn, fastpath = torch._C._get_mkldnn_enabled(), torch.backends.mha.get_fastpath_enabled()
    undo: list[tuple[Any, str, Any]] = []

    def set_(holder: Any, name: str, value: Any) -> None:
        old = getattr(holder, name)
        if old is not value and old != value:
            undo.append((holder, name, old))
            setattr(holder, name, value)

    try:
        seen: set[int] = set()
        for module in model.modules():
            for config in _configs(getattr(module, "config", None), seen):
                for name, value in CONFIG.items():
                    if getattr(config, name, None) is not None:
                        set_(config, name, value)
            checkpoint = module.__dict__.get("_gradient_checkpointing_func")
            if isinstance(checkpoint, functools.partial) and checkpoint.keywords.get("use_reentrant") is not False:
                set_(module, "_gradient_checkpointing_func", functools.partial(checkpoint.func, *checkpoint.args, **{**checkpoint.keywords, "use_reentrant": False}))
        set_(_checkpoints, "CheckpointFunction", _NonReentrant)
        torch._C._set_mkldnn_enabled(False)
        torch.backends.mha.set_fastpath_enabled(False)
        torch.distributions.Distribution.set_default_validate_args(False)
        with _uncompiled():
            yield
    finally:
        torch._C._set_mkldnn_enabled(mkldnn)
        torch.backends.mha.set_fastpath_enabled(fastpath)
        torch.distributions.Distribution.set_default_validate_args(validated)
        for holder, name, old in reversed(undo):
            setattr(holder, name, old)


class _NonReentrant:
    """``torch.utils.checkpoint(..., use_reentrant=True)`` recomputes inside a backward of its own, which ``torch.autograd.grad`` refuses; the
    other kind gives the same gradients, and draws the same numbers again. As there, where no argument wants a gradient nothing inside gets one."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        if not any(isinstance(a, Tensor) and a.requires_grad for a in args):
            with torch.no_grad():
                return function(*args)
        return _checkpoints.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Functions and modules under ``torch.compile`` run as they were written."""
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is None:
        yield
        return
    with torch.compiler.set_stance("force_eager"), dynamo.config.patch(error_on_nested_fx_trace=False):
        yield


def _configs(config: Any, seen: set[int]) -> Iterator[Any]:
    """A config and the configs inside it (text_config, vision_config)."""
    if config is None or id(config) in seen or not hasattr(config, "__dict__"):
        return
    seen.add(id(config))
    yield config
    for value in list(vars(config).values()):
        if type(value).__name__.endswith("Config"):
            yield from _configs(value, seen)
