"""The update's part of a captured program: the user's optimizers over gradients that stand ready."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from deepseed.capture.apart import check_apart
from deepseed.capture.batch import DTYPES
from deepseed.capture.convert import Emitter
from deepseed.capture.gradients import Ready
from deepseed.capture.optimizer import Updates
from deepseed.capture.options import Optimizers, fixed_options, listed, owners
from deepseed.capture.state import StateSlot
from deepseed.ir.program import Op, Output, Ref


@dataclass
class Updated:
    """What the updates return and read: see ``Captured``."""

    outputs: list[Output] = field(default_factory=list)
    hyper: dict[str, Callable[[], float]] = field(default_factory=dict)
    state: dict[str, StateSlot] = field(default_factory=dict)
    origins: dict[str, Op] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    moved: frozenset[str] = frozenset()


def update(
    e: Emitter, optimizer: Optimizers, parameters: Mapping[str, nn.Parameter], start: Mapping[str, Ref], ready: Ready, moving: Collection[str], wide: bool
) -> Updated:
    """Emit the update of every parameter that has a gradient and an optimizer. ``start``: what each is updated from."""
    out = Updated()
    if optimizer is None:
        return out
    group_of = owners(optimizer, parameters)
    updates = Updates(e, optimizer, out.hyper, out.state, out.origins, moving, wide)
    for name in ready.narrow:
        if name in group_of:
            grad = ready.of(e, name, DTYPES[parameters[name].dtype])
            new, states = updates.update(name, parameters[name], group_of[name], start[name], grad, ready.overflow)
            out.outputs.append(Output(new, "param", name))
            out.outputs += [Output(ref, "state", key) for key, ref in states.items()]
    for each in listed(optimizer):
        check_apart(each, parameters, ready.narrow)
    out.moved = updates.moved
    out.options = fixed_options(optimizer, out.moved)
    return out
