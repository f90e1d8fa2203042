"""Optimizer state: which slots an optimizer keeps for a parameter, and what they hold before the first step.

Found by running the user's own optimizer class once on a small sample, never by knowing its name: the value a slot is given
before the update is its start value if the update from there equals the optimizer's own first step.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepseed.capture.errors import CaptureError
from deepseed.ir.program import Type

STARTED = "started"  # own slot, 0 before the first step: for optimizers whose first step is another formula


@dataclass(frozen=True)
class StateSlot:
    """One tensor of optimizer state: ``exp_avg`` of one parameter."""

    param: str
    slot: str
    type: Type
    fill: float  # every element's value before the first step
    existing: Tensor | None  # what the user's optimizer holds already: it goes before ``fill``
    own: bool  # DeepSeed's own bookkeeping, no part of the optimizer's state_dict

    @property
    def key(self) -> str:
        return f"{self.slot}/{self.param}"


@dataclass(frozen=True)
class Slots:
    """Slots of a class of parameters, each by name: what it holds before the first step, its shape and dtype."""

    fill: Mapping[str, float]
    shape: Mapping[str, tuple[int, ...]]
    dtype: Mapping[str, torch.dtype]
    two_formulas: bool  # the first step differs from the others


class _Recorder(dict[str, Any]):
    """A parameter's state that remembers the first value of each slot."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, Any] = {}

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in self.first:
            self.first[name] = value.detach().clone() if isinstance(value, Tensor) else value
        super().__setitem__(name, value)


def shadow(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], param: Tensor, state: dict[str, Any], capturable: bool = False) -> Any:
    """An optimizer of the same class with one parameter and the group's options, in its plain loop form."""
    other = object.__new__(type(optimizer))
    other.__dict__.update({k: v for k, v in optimizer.__dict__.items() if k != "step"})
    options = {k: v if isinstance(v, Tensor) else copy.copy(v) for k, v in group.items() if k not in ("params", "param_names")}
    options.update({k: v for k, v in (("foreach", False), ("fused", False), ("capturable", capturable), ("differentiable", False)) if k in options})
    other.defaults = {**optimizer.defaults, **{k: v for k, v in options.items() if k in optimizer.defaults}}
    other.param_groups = [{**options, "params": [param]}]
    other.state = defaultdict(dict)
    if state or isinstance(state, _Recorder):
        other.state[param] = state
    return other


def discover(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], shape: tuple[int, ...], dtype: torch.dtype) -> Slots:
    """Run the first step on a small sample of the parameter's rank."""
    name = type(optimizer).__name__
    small = tuple(1 if n == 1 else 3 + i for i, n in enumerate(shape))
    generator = torch.Generator().manual_seed(0)
    p0, g0 = (torch.randn(small, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))

    def step(state: dict[str, Any], param: Tensor = p0, grad: Tensor = g0) -> Tensor:
        p = param.clone()
        p.grad = grad.clone()
        with torch.no_grad():
            shadow(optimizer, group, p, state).step()
        return p

    record = _Recorder()
    try:
        reached = step(record)
    except Exception as error:
        raise CaptureError(f"optimizer {name} cannot be traced: its step on a parameter {list(small)} failed: {error}",
                           fix="use an optimizer whose step() needs no closure and works on dense gradients") from error  # fmt: skip
    after = {k: _tensor(v, name, k) for k, v in record.items()}
    fill: dict[str, float] = {}
    for slot in after:
        first = _tensor(record.first[slot], name, slot)
        fill[slot] = float(first.flatten()[0]) if first.numel() and bool((first == first.flatten()[0]).all()) and _settled(record.first[slot]) else 0.0
    candidates = [fill, dict.fromkeys(fill, 0.0)]
    shapes = {k: tuple(v.shape) for k, v in after.items()}
    real = {1: 1, **dict(zip(small, shape, strict=True))}  # sizes of the sample are distinct, so each names its dimension
    if not all(n in real for s in shapes.values() for n in s):
        raise CaptureError(f"optimizer {name} keeps state of shapes {shapes} for a parameter {list(small)}",
                           fix="state must be made of the parameter's own dimensions")  # fmt: skip
    shapes = {k: tuple(real[n] for n in s) for k, s in shapes.items()}
    dtypes = {k: v.dtype for k, v in after.items()}
    if not after:
        return Slots({}, {}, {}, False)
    for candidate in candidates:
        state = {k: torch.full_like(after[k], candidate[k]) for k in after}
        try:
            again = step(state)
        except Exception:
            continue
        if torch.equal(again, reached) and all(torch.equal(_tensor(state[k], name, k), after[k]) for k in after):
            return Slots(candidate, shapes, dtypes, False)
    return Slots(dict.fromkeys(after, 0.0), shapes, dtypes, True)


def _settled(value: Any) -> bool:
    return isinstance(value, (Tensor, int, float))


def _tensor(value: Any, optimizer: str, slot: str) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (int, float)):
        return torch.tensor(float(value), dtype=torch.float64)
    raise CaptureError(f"optimizer {optimizer} keeps a {type(value).__name__} as state {slot!r}; tensors and numbers can be compiled")
