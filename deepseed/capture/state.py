"""Optimizer state: which slots an optimizer keeps for a parameter, and what they hold before the first step.

Found by running the user's own optimizer class once on a small sample, never by knowing its name: the value a slot is given
before the update is its start value if the update from there equals the optimizer's own first step.
"""

from __future__ import annotations

import copy
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deepseed.capture.errors import CaptureError
from deepseed.ir.program import Type

ROUNDED = 8 * torch.finfo(torch.float64).eps  # where all lies in one tensor, vectors' lanes round another way
STARTED = "started"  # own slot, 0 before the first step: for optimizers whose first step is another formula


@dataclass(frozen=True)
class StateSlot:
    """One tensor of optimizer state: ``exp_avg`` of one parameter; of the step as a whole where ``param`` is empty."""

    param: str
    slot: str
    type: Type
    fill: float  # every element's value before the first step
    existing: Tensor | None  # what the user's optimizer holds already: it goes before ``fill``
    own: bool  # DeepSeed's own bookkeeping, no part of the optimizer's state_dict
    python: Callable[[Any], int | float] | None = None  # int or float where the optimizer keeps a Python number

    @property
    def key(self) -> str:
        return f"{self.slot}/{self.param}" if self.param else self.slot


@dataclass(frozen=True)
class Slots:
    """Slots of a class of parameters, each by name: what it holds before the first step, its shape and dtype."""

    fill: Mapping[str, float]
    shape: Mapping[str, tuple[int, ...]]
    dtype: Mapping[str, torch.dtype]
    two_formulas: bool  # the first step differs from the others
    python: Mapping[str, Callable[[Any], int | float]]  # those that are Python numbers: int or float

    def of_two(self) -> Slots:
        """The same where no number that is known ahead starts the state: the first step makes it."""
        return replace(self, fill=dict.fromkeys(self.fill, 0.0), two_formulas=True)


class _Recorder(dict[str, Any]):
    """A parameter's state that remembers the first value of each slot."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, Any] = {}

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in self.first:
            self.first[name] = value.detach().clone() if isinstance(value, Tensor) else value
        super().__setitem__(name, value)

    def setdefault(self, name: str, default: Any = None) -> Any:
        if name not in self:
            self[name] = default
        return self[name]

    def update(self, *args: Any, **kwargs: Any) -> None:
        for name, value in dict(*args, **kwargs).items():
            self[name] = value


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

    def step(state: dict[str, Any]) -> tuple[Tensor, Mapping[str, Any]]:
        p = p0.clone()
        p.grad = g0.clone()
        one = shadow(optimizer, group, p, state)
        before = _beside(one, p)
        with torch.no_grad():
            one.step()
        _check_beside(before, _beside(one, p), name)
        return p, one.state[p]

    record = _Recorder()
    try:
        reached, kept = step(record)
    except CaptureError:
        raise
    except Exception as error:
        needs = "closure" in str(error)
        raise CaptureError(f"optimizer {name} cannot be traced: its step on a parameter {list(small)} failed: {error}",
                           fix=f"{'it wants a closure that computes the loss, and a compiled step computes it once: ' if needs else ''}use an optimizer whose step() needs no closure and works on dense gradients, one parameter by itself") from error  # fmt: skip
    wide, gradient = p0.double(), g0.double()
    _check_apart(optimizer, group, [(wide, gradient), (2 * wide + 1, -3 * gradient)])
    if strange := [k for k in kept if not isinstance(k, str) or "/" in k]:
        raise CaptureError(f"optimizer {name} names a state {strange[0]!r}", fix="a string without a '/', which parts it from the parameter's name in checkpoints")
    after = {k: _tensor(v, name, k) for k, v in kept.items()}
    fill: dict[str, float] = {}
    for slot in after:
        first = record.first.get(slot)
        values = _tensor(first, name, slot).flatten() if first is not None and isinstance(first, (Tensor, int, float)) else torch.zeros(0)
        fill[slot] = float(values[0]) if values.numel() and bool((values == values[0]).all()) else 0.0
    shapes = {k: tuple(v.shape) for k, v in after.items()}
    real = {1: 1, **dict(zip(small, shape, strict=True))}  # sizes of the sample are distinct, so each names its dimension
    if not all(n in real for s in shapes.values() for n in s):
        raise CaptureError(f"optimizer {name} keeps state of shapes {shapes} for a parameter {list(small)}",
                           fix="state must be made of the parameter's own dimensions")  # fmt: skip
    shapes = {k: tuple(real[n] for n in s) for k, s in shapes.items()}
    dtypes = {k: v.dtype for k, v in after.items()}
    python = {k: type(v) for k, v in kept.items() if not isinstance(v, Tensor)}
    if not after:
        return Slots({}, {}, {}, False, {})
    for candidate in (fill, dict.fromkeys(fill, 0.0)):
        state = {k: python[k](candidate[k]) if k in python else torch.full_like(after[k], candidate[k]) for k in after}
        try:
            again, kept = step(state)
        except Exception:
            continue
        if torch.equal(again, reached) and all(k in kept and torch.equal(_tensor(kept[k], name, k), after[k]) for k in after):
            return Slots(candidate, shapes, dtypes, False, python)
    return Slots(dict.fromkeys(after, 0.0), shapes, dtypes, True, python)


def _check_apart(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], samples: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Whether a step does to each of two parameters (value, gradient), of one group or of two, in either order, what it does to it alone, twice over. Numbers that are drawn are the same for the first only."""

    def stepped(groups: Sequence[Sequence[int]]) -> tuple[dict[int, Tensor], bool]:
        params = {n: samples[n][0].clone() for each in groups for n in each}
        other = shadow(optimizer, group, next(iter(params.values())), {})
        moving = {"lr": other.param_groups[0]["lr"] or 0.1} if "lr" in other.param_groups[0] else {}  # a schedule may begin with 0
        other.param_groups = [{**other.param_groups[0], **moving, "params": [params[n] for n in each]} for each in groups]

        def give() -> None:
            for n, p in params.items():
                p.grad = samples[n][1].clone()

        return params, steps_with_noise(other, give)

    p0 = samples[0][0]
    try:
        alone = [stepped([[n]])[0][n] for n in range(len(samples))]
        for groups in ([[0, 1]], [[1, 0]], [[0], [1]], [[1], [0]]):
            together, drawn = stepped(groups)
            for n in list(together)[: 1 if drawn else None]:
                one, beside = alone[n].double().nan_to_num(), together[n].double().nan_to_num()
                if float((one - beside).abs().max()) > ROUNDED * float(one.abs().max()):
                    at = int((one - beside).abs().argmax())
                    raise ValueError(f"after two steps element {at} of {list(p0.shape)} is {float(beside.flatten()[at])} there and {float(one.flatten()[at])} alone")
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise CaptureError(f"the step of optimizer {type(optimizer).__name__} does something else to a parameter where there is another one: {reason[0] if reason else type(error).__name__}",
                           fix="make its update of each parameter from that one's value, gradient and state alone; a norm over all gradients is clip_grad_norm of deepseed.compile") from error  # fmt: skip


def steps_with_noise(optimizer: Any, give: Callable[[], None]) -> bool:
    """Two steps, ``give`` sets the gradients before each. Whether they draw numbers; torch's own generator stays as it was."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for seed in range(2):
            give()
            before = torch.default_generator.manual_seed(seed).get_state()
            optimizer.step()
        return not torch.equal(before, torch.get_rng_state())


def _beside(optimizer: Any, param: Tensor) -> dict[str, object]:
    """What the optimizer keeps beside the parameter's state, by a name for people: numbers in its group, on itself, or in a common state."""
    (group,) = optimizer.param_groups
    out: dict[str, object] = {f"param_groups[0][{k!r}]": _mark(v) for k, v in group.items() if k != "params"}
    out |= {f"self.{k}": _mark(v) for k, v in vars(optimizer).items() if k not in _OWN}
    out |= {f"self.state[{k!r}]": _mark(v) for k, v in optimizer.state.items() if k is not param}
    return out


_OWN = {*vars(torch.optim.SGD([torch.zeros(1)])), "_opt_called", "_step_count", "grad_scale", "found_inf", "step"}  # torch's own attributes


def _mark(value: Any) -> object:
    """Another one when the value changes."""
    if isinstance(value, Tensor):
        return id(value), value._version
    if isinstance(value, Mapping):
        return {k: _mark(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, deque)):
        return [_mark(v) for v in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else id(value)


def _check_beside(before: Mapping[str, object], after: Mapping[str, object], name: str) -> None:
    changed = sorted(k for k in {*before, *after} if k not in before or k not in after or before[k] != after[k])
    if changed:
        raise CaptureError(f"optimizer {name} keeps what changes from step to step in {changed[0]}, not in the parameter's own state",
                           fix="keep it in self.state[p], as torch's optimizers keep their step counts")  # fmt: skip


def _tensor(value: Any, optimizer: str, slot: str) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (int, float)):
        return torch.tensor(float(value), dtype=torch.float64)
    raise CaptureError(f"optimizer {optimizer} keeps a {type(value).__name__} as state {slot!r}; tensors and numbers can be compiled")
