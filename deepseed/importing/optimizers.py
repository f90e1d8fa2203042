"""Which optimizer a checkpoint of others is of, where it does not name it: the options of its groups do, or DeepSpeed's config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deepseed.config import read
from deepseed.config.objects import NO_OPTION, OWN, optimizer_choice, optimizer_class
from deepseed.fits import HOW
from deepseed.importing.found import Found
from deepseed.runtime.folder import CheckpointError

_SCHEDULERS = ("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum")  # what schedulers of torch write into a group


def described(found: Found, options: Sequence[Mapping[str, Any]], names: Sequence[Sequence[str]], config: Any, optimizer: str | None) -> None:
    """The optimizer's class and its groups, as far as anything says them."""
    if optimizer == "none" or not found.slots:
        found.slots.clear()
        return
    found.optimizer = class_of(options, config, optimizer, found.source)
    found.groups = [{"params": list(n), **options_of(o, found.optimizer)} for n, o in zip(names, options, strict=True)]


def class_of(groups: Sequence[Mapping[str, Any]], config: Any, said: str | None, source: Path) -> str:
    """``torch.optim.adamw.AdamW`` and the like. ``said``: by the user, a class's name. Raises CheckpointError where nothing tells."""
    if said is not None:
        return _path(_named(said))
    keys = [{k for k in g if k not in (*HOW, *_SCHEDULERS)} for g in groups]
    fits = [c for c in _known() if keys and keys[0] and all(_fits(c, k, g) for k, g in zip(keys, groups, strict=True))]
    section = config.get("optimizer") if isinstance(config, Mapping) else None
    if len(fits) != 1 and isinstance(section, Mapping) and section.get("type"):
        choice = optimizer_choice(read({"train_batch_size": 1, "optimizer": dict(section)}))
        if choice is not None:
            return _path(optimizer_class(choice[0]))
    if len(fits) != 1:
        which = f"it has the options of {', '.join(c.__name__ for c in fits)}" if fits else f"its groups have the options {', '.join(sorted(keys[0] if keys else ())) or 'none'}"
        raise CheckpointError(f"{source} does not say which optimizer its state is of: {which}\n  fix: --optimizer AdamW (a class of torch.optim, or module.Class), or --optimizer none to leave its state out")
    return _path(fits[0])


def options_of(group: Mapping[str, Any], optimizer: str) -> dict[str, Any]:
    """A group's options that the class has, or a scheduler has written, as plain data."""
    made = next((c for c in _known() if _path(c) == optimizer), None)
    allowed = {*_group(made), *_SCHEDULERS} if made is not None else {k for k in group if k not in (*NO_OPTION, "step")}
    plain = {k: v.item() if isinstance(v, Tensor) and v.numel() == 1 else list(v) if isinstance(v, tuple) else v for k, v in group.items()}
    return {k: v for k, v in plain.items() if k in allowed and k not in HOW and (v is None or isinstance(v, bool | int | float | str | list))}


def defaults(optimizer: str | None) -> dict[str, Any]:
    """All options of a group of this class, as it makes them; none of a class that is not known."""
    made = next((c for c in _known() if _path(c) == optimizer), None)
    return {k: v for k, v in _group(made).items() if k != "params"} if made is not None else {}


def _fits(c: type[torch.optim.Optimizer], keys: set[str], group: Mapping[str, Any]) -> bool:
    """Whether a class makes groups with these options; Adam and AdamW differ in one value."""
    own = _group(c)
    same = all(own[k] == group[k] for k in ("decoupled_weight_decay", "use_muon") if k in own and k in group)
    return set(own) - set(HOW) == keys and same


def _group(c: type[torch.optim.Optimizer]) -> Mapping[str, Any]:
    try:
        return dict(c([nn.Parameter(torch.zeros(1))]).param_groups[0])  # type: ignore[call-arg]
    except (TypeError, ValueError):
        return {}


def _known() -> list[type[torch.optim.Optimizer]]:
    inside = [getattr(torch.optim, n) for n in dir(torch.optim)]
    return [c for c in [*inside, *OWN.values()] if isinstance(c, type) and issubclass(c, torch.optim.Optimizer) and c is not torch.optim.Optimizer]


def _named(said: str) -> type[torch.optim.Optimizer] | str:
    known = {c.__name__.lower(): c for c in _known()}
    if "." not in said and said.lower() not in known:
        raise CheckpointError(f"--optimizer {said}: torch.optim has no such class\n  fix: one of {', '.join(c.__name__ for c in known.values())}, or module.Class of another")
    return known.get(said.rpartition(".")[2].lower(), said) if said.startswith("torch.optim.") or "." not in said else said


def _path(c: type[torch.optim.Optimizer] | str) -> str:
    return c if isinstance(c, str) else f"{c.__module__}.{c.__qualname__}"
