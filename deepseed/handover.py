"""Optimizer state belongs to the compiled step: what the user's optimizer held moves there, one copy.

``optimizer.state`` is empty from then on; ``optimizer.state_dict()`` and ``load_state_dict()`` work as ever, reading and writing the
step's own state. ``optimizer.state.clear()``, or another dict in its place, starts the state anew, and what is put into it is written into the
step's at the next step. Under a process group every rank must call them, since no rank has all of it. ``model.load_state_dict()`` takes whole
tensors as ever, though the parameters are DTensors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from deepseed.capture.state import STARTED
from deepseed.fits import differences, tied_names
from deepseed.logs import warn
from deepseed.runtime import agree
from deepseed.runtime.elsewhere import Elsewhere
from deepseed.runtime.folder import CheckpointError
from deepseed.runtime.host import Host
from deepseed.runtime.state import State, held, shard


def take_over(optimizer: torch.optim.Optimizer, old: Mapping[str, nn.Parameter], new: Mapping[str, nn.Parameter], taken: Sequence[str]) -> None:
    """Point the optimizer at the model's bound parameters, and drop the state (``slot/parameter``) that the step has now."""
    for key in taken:
        slot, _, name = key.partition("/")
        held = optimizer.state.get(old[name], {}) if name else {}  # no name: the step's own, as a loss scale
        held.pop(slot, None)
        if name and not held:
            optimizer.state.pop(old[name], None)
    bound = {id(p): new[name] for name, p in old.items()}
    for group in optimizer.param_groups:
        group["params"] = [bound.get(id(p), p) for p in group["params"]]


class Handed(defaultdict[Any, Any]):
    """``optimizer.state`` while a step has what it held."""

    def __init__(self, held: Mapping[Any, Any], restart: Callable[[], None]) -> None:
        super().__init__(dict, held)
        self.restart, self.warned = restart, False

    def clear(self) -> None:
        super().clear()
        self.restart()

    def values(self) -> Any:
        if not self and not self.warned:
            self.warned = True
            warn("optimizer.state is empty: the compiled step has the state, and what is changed here is not seen\n  fix: read optimizer.state_dict(), change that and load it, or optimizer.state.clear() to start anew")
        return super().values()

    def __reduce__(self) -> Any:
        return defaultdict, (dict, dict(self))


def follow(
    optimizer: torch.optim.Optimizer, model: nn.Module, host: Host, states: Sequence[State], python: Mapping[str, Callable[[Any], int | float]], fills: Mapping[str, float]
) -> Callable[[], None]:  # fmt: skip
    """Have ``optimizer.state_dict()`` read ``states`` (one a hosted rank), and ``load_state_dict()`` write them: what is of this
    optimizer's parameters. ``python``: keys of what it keeps as Python numbers, and of which type. ``fills``: what state starts as. To be called
    before each step: what comes back takes over what was done to ``optimizer.state``."""

    def mine(own: bool = False) -> list[tuple[str, str, str, nn.Parameter]]:
        """Role, key, slot and parameter of each tensor of state; DeepSeed's bookkeeping too if ``own``."""
        parameters, out = dict(model.named_parameters()), []
        here = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for role, key in states[0].types:
            slot, _slash, name = key.partition("/")
            if role == "state" and (own or slot != STARTED) and name in parameters and id(parameters[name]) in here:
                out.append((role, key, slot, parameters[name]))
        return out

    def show(_: torch.optim.Optimizer) -> None:
        settle()
        for role, key, slot, parameter in mine():
            value = host.whole([s.tensors.get((role, key)) for s in states], states[0].types[role, key], states[0].homes[role, key])
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
                write(states, (role, key), torch.as_tensor(value))
        for name in loaded:
            if ("state", f"{STARTED}/{name}") in states[0].types:
                write(states, ("state", f"{STARTED}/{name}"), torch.ones(()))
        hide(optimizer)
        optimizer.state = Handed(optimizer.state, restart)

    def restart() -> None:
        for role, key, _, _ in mine(own=True):
            for state in (s for s in states if (role, key) in s.tensors):
                state.tensors[role, key].fill_(fills[key])

    def settle() -> None:
        if type(optimizer.state) is not Handed:
            restart()
            load(optimizer)
        elif optimizer.state and any(slot in optimizer.state.get(p, ()) for _, _, slot, p in mine()):
            load(optimizer)

    optimizer.state = Handed(optimizer.state, restart)
    optimizer.register_state_dict_pre_hook(show)
    optimizer.register_state_dict_post_hook(hide)
    optimizer.register_load_state_dict_post_hook(load)
    return settle


def write(states: Sequence[State], key: tuple[str, str], full: Tensor) -> None:
    """Each hosted rank's part of a whole tensor, in place."""
    for state in (s for s in states if key in s.tensors):
        state.tensors[key].copy_(shard(full.to(state.device), state.types[key], state.mesh, state.coordinate))


# the model's own tensors ------------------------------------------------------------------------------------------------


def load_whole(model: nn.Module, host: Host, states: Sequence[State], given: Mapping[str, Any], strict: bool = True) -> tuple[list[str], list[str]]:
    """Write whole tensors by the model's names into the ranks' parts and the module; the names that were missing, and those unexpected, which
    ``strict`` refuses. Raises CheckpointError naming the first of them, and shapes that differ; nothing is written then."""
    mine = model.state_dict(keep_vars=True)
    others = [name for name, t in mine.items() if not isinstance(t, Tensor)]  # a module's extra state
    what = f"the state_dict does not fit {type(model).__name__}"
    if odd := [f"{name} ({type(t).__name__})" for name, t in given.items() if name not in others and (not isinstance(t, Tensor) or isinstance(t, DTensor))]:
        raise CheckpointError(f"{what}: {odd[0]} is not a whole tensor\n  fix: give whole tensors, such as those of step.state_dict()")
    needed, found = ({n: tuple(t.shape) for n, t in each.items() if n not in others} for each in (mine, given))
    tied = tied_names(model)
    missing, unexpected = [n for n in needed if n not in found], [n for n in found if n not in needed]
    if not strict:
        given = {n: t for n, t in given.items() if n not in unexpected} | {name: given[alias] for alias, name in tied.items() if alias in given and name not in given}
        needed, found = ({n: shape for n, shape in each.items() if n in given and n in needed} for each in (needed, found | {n: tuple(given[n].shape) for n in given if n in needed}))
    differences(what, needed, found, "in the state_dict")
    for alias, name in tied.items():
        if alias in given and name in given and not torch.equal(given[alias], given[name]):
            raise CheckpointError(f"{what}: {alias} and {name} are one tensor in the model, and differ in the state_dict")
    host.agree([(f"the values of {n}", agree.fingerprint(t)) for n, t in given.items() if n not in others] if host.backend != "simulate" else [])
    if not states and (empty := [n for n in needed if mine[n].is_meta]):
        raise CheckpointError(f"{empty[0]} is on the meta device: nothing can be written into it\n  fix: step.compile(example_batch) first, where compile had weights=, or load a checkpoint")
    with torch.no_grad():
        for name in (n for n in mine if n not in tied and n not in others and n in given):
            keys = [(role, name) for role in ("param", "buffer") if states and (role, name) in states[0].types]
            if keys:
                write(states, keys[0], given[name])
            else:
                mine[name].copy_(given[name])
    for name in (n for n in others if n in given):
        model.get_submodule(name.rpartition(".")[0]).set_extra_state(given[name])
    if states:
        host.settle(model, states)
    return missing, unexpected


def accept_whole(model: nn.Module, states: Sequence[State]) -> None:
    """Have ``model.load_state_dict()`` take whole tensors where parameters are DTensors: each rank takes its part."""

    def hook(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Mapping[str, Any], *_: Any) -> None:
        if metadata.get("assign_to_params_buffers"):
            raise CheckpointError("load_state_dict(assign=True) would take the parameters out of the compiled step\n  fix: load_state_dict without assign")
        mine = {name: t for table in (module._parameters, module._buffers) for name, t in table.items() if isinstance(t, DTensor) and not isinstance(t, Elsewhere)}
        keys = {id(held(model, role, key)): (role, key) for role, key in states[0].tensors if role in ("param", "buffer")} if mine else {}
        for name, t in mine.items():
            given = state_dict.get(prefix + name)
            if isinstance(given, Tensor) and not isinstance(given, DTensor) and given.shape == t.shape:
                state = states[0]
                part = shard(given.to(state.device, t.dtype), state.types[keys[id(t)]], state.mesh, state.coordinate)
                state_dict[prefix + name] = DTensor.from_local(part.contiguous(), t.device_mesh, t.placements, run_check=False, shape=t.shape, stride=t.stride())

    for module in model.modules():
        module.register_load_state_dict_pre_hook(hook)  # type: ignore[no-untyped-call]
