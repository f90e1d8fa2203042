"""Optimizer state belongs to the compiled step: what the user's optimizer held moves there, one copy.

``optimizer.state`` is empty from then on; ``optimizer.state_dict()`` and ``load_state_dict()`` work as ever, reading and writing the
step's own state. Under a process group every rank must call them, since no rank has all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deepseed.capture.state import STARTED
from deepseed.runtime.host import Host
from deepseed.runtime.state import State, shard


def take_over(optimizer: torch.optim.Optimizer, old: Mapping[str, nn.Parameter], new: Mapping[str, nn.Parameter], taken: Sequence[str]) -> None:
    """Point the optimizer at the model's bound parameters, and drop the state (``slot/parameter``) that the step has now."""
    for key in taken:
        slot, _, name = key.partition("/")
        held = optimizer.state.get(old[name], {})
        held.pop(slot, None)
        if not held:
            optimizer.state.pop(old[name], None)
    bound = {id(p): new[name] for name, p in old.items()}
    for group in optimizer.param_groups:
        group["params"] = [bound.get(id(p), p) for p in group["params"]]


def follow(
    optimizer: torch.optim.Optimizer, model: nn.Module, host: Host, states: Sequence[State], python: Mapping[str, Callable[[Any], int | float]]
) -> None:  # fmt: skip
    """Have ``optimizer.state_dict()`` read ``states`` (one a hosted rank), and ``load_state_dict()`` write them: what is of this
    optimizer's parameters. ``python``: keys of what it keeps as Python numbers, and of which type."""

    def mine() -> list[tuple[str, str, str, nn.Parameter]]:
        """Role, key, slot and parameter of each tensor of state, without DeepSeed's bookkeeping."""
        parameters, out = dict(model.named_parameters()), []
        here = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for role, key in states[0].tensors:
            slot, _slash, name = key.partition("/")
            if role == "state" and slot != STARTED and id(parameters[name]) in here:
                out.append((role, key, slot, parameters[name]))
        return out

    def show(_: torch.optim.Optimizer) -> None:
        for role, key, slot, parameter in mine():
            value = host.whole([s.tensors[role, key] for s in states], states[0].types[role, key])
            optimizer.state[parameter][slot] = python[key](value.item()) if key in python else value.clone()

    def hide(_: torch.optim.Optimizer, shown: object = None) -> None:
        for p in (p for g in optimizer.param_groups for p in g["params"]):
            optimizer.state.pop(p, None)

    def load(_: torch.optim.Optimizer) -> None:
        loaded: set[str] = set()
        for role, key, slot, parameter in mine():
            value = optimizer.state.get(parameter, {}).get(slot)
            if value is not None:
                loaded.add(key.partition("/")[2])
                _write(states, (role, key), torch.as_tensor(value))
        for name in loaded:
            if ("state", f"{STARTED}/{name}") in states[0].tensors:
                _write(states, ("state", f"{STARTED}/{name}"), torch.ones(()))
        hide(optimizer)

    optimizer.register_state_dict_pre_hook(show)
    optimizer.register_state_dict_post_hook(hide)
    optimizer.register_load_state_dict_post_hook(load)


def _write(states: Sequence[State], key: tuple[str, str], full: Tensor) -> None:
    for state in states:
        state.tensors[key].copy_(shard(full.to(state.device), state.types[key], state.mesh, state.coordinate))
