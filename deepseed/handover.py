"""Optimizer state belongs to the compiled step: what the user's optimizer held moves there, one copy.

``optimizer.state`` is empty from then on; ``optimizer.state_dict()`` and ``load_state_dict()`` work as ever, reading and writing the
step's own state. Under a process group every rank must call them, since no rank has all of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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


def follow(optimizer: torch.optim.Optimizer, model: nn.Module, host: Host, states: Sequence[State]) -> None:
    """Have ``optimizer.state_dict()`` read ``states`` (one a hosted rank), and ``load_state_dict()`` write them."""

    def show(_: torch.optim.Optimizer) -> None:
        parameters = dict(model.named_parameters())
        for role, key in _own(states):
            slot, _slash, name = key.partition("/")
            optimizer.state[parameters[name]][slot] = host.whole([s.tensors[role, key] for s in states], states[0].types[role, key]).clone()

    def hide(_: torch.optim.Optimizer, shown: object = None) -> None:
        for p in (p for g in optimizer.param_groups for p in g["params"]):
            optimizer.state.pop(p, None)

    def load(_: torch.optim.Optimizer) -> None:
        parameters = dict(model.named_parameters())
        loaded: set[str] = set()
        for role, key in _own(states):
            slot, _slash, name = key.partition("/")
            value = optimizer.state.get(parameters[name], {}).get(slot)
            if value is not None:
                loaded.add(name)
                _write(states, (role, key), torch.as_tensor(value))
        for name in loaded:
            if ("state", f"{STARTED}/{name}") in states[0].tensors:
                _write(states, ("state", f"{STARTED}/{name}"), torch.ones(()))
        hide(optimizer)

    optimizer.register_state_dict_pre_hook(show)
    optimizer.register_state_dict_post_hook(hide)
    optimizer.register_load_state_dict_post_hook(load)


def _own(states: Sequence[State]) -> list[tuple[str, str]]:
    """The keys of the optimizer's own state, without DeepSeed's bookkeeping."""
    return [(role, key) for role, key in states[0].tensors if role == "state" and not key.startswith(f"{STARTED}/")]


def _write(states: Sequence[State], key: tuple[str, str], full: Tensor) -> None:
    for state in states:
        state.tensors[key].copy_(shard(full.to(state.device), state.types[key], state.mesh, state.coordinate))
