"""The optimizer and the learning-rate schedule that a config names, made: ``optimizer_of(config, parameters)``, ``scheduler_of(config, optimizer)``.

Names and defaults are DeepSpeed's. Its ``Adam`` is AdamW unless ``adam_w_mode`` is false, and decays nothing unless told to; torch's AdamW decays 0.01.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from torch import Tensor, optim

from deepseed.adam import UncorrectedAdam
from deepseed.config.fields import ConfigError
from deepseed.config.model import Config
from deepseed.lion import Lion
from deepseed.lr_schedules import SCHEDULERS
from deepseed.muon import ADAM, MUON, Muon

NAMES: Mapping[str, str] = {  # DeepSpeed's names, lower case -> the class that steps
    "adam": "AdamW", "adamw": "AdamW", "torch_adam": "Adam", "fusedadam": "AdamW", "deepspeedcpuadam": "AdamW",
    "sgd": "SGD", "adagrad": "Adagrad", "lion": "Lion", "muon": "Muon",
}  # fmt: skip
OWN: Mapping[str, type[optim.Optimizer]] = {"Lion": Lion, "Muon": Muon, "UncorrectedAdam": UncorrectedAdam}
OTHER_DEFAULTS: Mapping[str, Mapping[str, float]] = {"AdamW": {"weight_decay": 0.0}, "Lion": {"lr": 1e-3}}  # where DeepSpeed's are not the class's
NO_OPTION = ("torch_adam", "adam_w_mode", "bias_correction", "max_grad_norm", "fp32_optimizer_states", "set_grad_none", "ns_method")  # switches of DeepSpeed's own
Choice = tuple[str, Mapping[str, Any]]


def optimizer_of(config: Config, parameters: Iterable[Any]) -> optim.Optimizer | None:
    """None where the config names none. ``parameters``: tensors, (name, tensor) pairs, or groups with options of their own; frozen ones are left out.
    Raises ConfigError."""
    chosen = optimizer_choice(config)
    if chosen is None:
        return None
    name, options = chosen
    groups = _groups(parameters)
    if not groups:
        raise ConfigError("the optimizer has nothing to step: no parameter requires grad\n  fix: requires_grad_(True) on what is to be trained")
    made: Callable[..., optim.Optimizer] = optimizer_class(name)
    try:
        return Muon(_of_two_kinds(groups, options)) if name == "Muon" else made(groups, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer.params of {name}: {error}") from None


def scheduler_of(config: Config, optimizer: optim.Optimizer) -> optim.lr_scheduler.LRScheduler | None:
    """None where the config names none. Raises ConfigError."""
    chosen = scheduler_choice(config)
    if chosen is None:
        return None
    made: Callable[..., optim.lr_scheduler.LRScheduler] = _schedule(chosen[0])
    try:
        return made(optimizer, **chosen[1])
    except (TypeError, ValueError) as error:
        raise ConfigError(f"scheduler.params of {chosen[0]}: {error}") from None


def optimizer_choice(config: Config) -> Choice | None:
    """The class that steps, by its name, and its options by torch's. Raises ConfigError for a name or an option that nobody knows."""
    section = config.optimizer
    if section is None:
        return None
    said, params = section.type.lower(), {key: _number(value) for key, value in section.params.items()}
    name = NAMES.get(said) or next((n for n in _torch_optimizers() if n.lower() == said), None)
    if name is None:
        known = [*NAMES, *(n.lower() for n in _torch_optimizers())]
        near = get_close_matches(said, known, n=1)
        raise ConfigError(f"unknown optimizer.type {section.type!r}{f': did you mean {near[0]!r}?' if near else ''}\n  known: {', '.join(sorted(NAMES))}, and any of torch.optim")
    by_torch = bool(params.get("torch_adam", False))
    name = "Adam" if said == "adam" and not params.get("adam_w_mode", True) else name
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in params.items() if key not in NO_OPTION}
    allowed = {*MUON, *ADAM, "muon_lr", "adam_lr"} if name == "Muon" else _arguments(optimizer_class(name))
    _check(options, allowed, "optimizer", name)
    if name in ("Adam", "AdamW") and not params.get("bias_correction", True):
        return "UncorrectedAdam", {"decoupled": name == "AdamW", **options}
    return name, {**({} if by_torch else OTHER_DEFAULTS.get(name, {})), **options}


def clipping_of(config: Config) -> float:
    """``gradient_clipping``, or ``max_grad_norm`` among the optimizer's options, as files of old have it."""
    said = config.optimizer.params.get("max_grad_norm") if config.optimizer is not None else None
    clip = float(config.gradient_clipping)
    for key, value in (("gradient_clipping", clip), ("optimizer.params.max_grad_norm", float(said or 0.0))):
        if not value >= 0:
            raise ConfigError(f"{key} is {value:g}\n  fix: a norm above 0; 0 clips nothing")
    if said is None:
        return clip
    if "gradient_clipping" in config.model_fields_set and float(said) != clip:
        raise ConfigError(f"optimizer.params.max_grad_norm is {said} and gradient_clipping {config.gradient_clipping}\n  fix: gradient_clipping alone")
    return float(said)


def scheduler_choice(config: Config) -> Choice | None:
    """The schedule's name and its options. Raises ConfigError for a name or an option that nobody knows."""
    section = config.scheduler
    if section is None or section.type is None:
        return None
    if section.type not in SCHEDULERS and section.type not in (known := _torch_schedulers()):
        near = get_close_matches(section.type, [*SCHEDULERS, *known], n=1)
        raise ConfigError(f"unknown scheduler.type {section.type!r}{f': did you mean {near[0]!r}?' if near else ''}\n  known: {', '.join(SCHEDULERS)}, and any of torch.optim.lr_scheduler")
    options = {key: _number(value) for key, value in section.params.items()}
    arguments = inspect.signature(_schedule(section.type)).parameters
    _check(options, arguments, "scheduler", section.type)
    whole = {key: int(v) if arguments[key].annotation in ("int", int) and isinstance(v, float) and v == int(v) else v for key, v in options.items()}
    return section.type, whole


def optimizer_class(name: str) -> Any:
    return OWN.get(name) or getattr(optim, name)


def _schedule(name: str) -> Any:
    return SCHEDULERS.get(name) or getattr(optim.lr_scheduler, name)


def _torch_optimizers() -> list[str]:
    return [n for n in dir(optim) if isinstance(c := getattr(optim, n), type) and issubclass(c, optim.Optimizer) and c is not optim.Optimizer]


def _torch_schedulers() -> list[str]:
    of = optim.lr_scheduler
    return [n for n in dir(of) if n[0] != "_" and isinstance(c := getattr(of, n), type) and issubclass(c, of.LRScheduler) and c is not of.LRScheduler]


def _arguments(of: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(of).parameters) - {"params"}


def _check(options: Mapping[str, Any], allowed: Iterable[str], section: str, name: str) -> None:
    known = sorted(set(allowed) - {"optimizer"})
    for key in options:
        if key not in known:
            near = get_close_matches(key.lower(), known, n=1)
            raise ConfigError(f"unknown key '{section}.params.{key}' of {name}{f': did you mean {near[0]!r}?' if near else ''}\n  known: {', '.join(known)}")


def _number(value: Any) -> Any:
    """``"5e-5"`` is a number, in a list too."""
    if isinstance(value, list | tuple):
        return [_number(v) for v in value]
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _groups(parameters: Iterable[Any]) -> list[dict[str, Any]]:
    """Groups of trainable parameters, in order; what stands alone is one group."""
    if isinstance(parameters, Tensor | Mapping):
        parameters = [parameters]
    given = list(parameters)
    if not any(isinstance(each, Mapping) for each in given):
        given = [{"params": given}]
    out = []
    for group in given:
        inside = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
        trained = [p for p in (each[1] if isinstance(each, tuple) else each for each in inside) if p.requires_grad]
        if trained:
            out.append({**group, "params": trained})
    return out


def _of_two_kinds(groups: list[dict[str, Any]], options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Muon's groups and AdamW's, by what each parameter says with ``use_muon``; without a word the matrices are Muon's, which is said aloud."""
    every = [p for group in groups for p in group["params"]]
    silent = [p for group in groups for p in group["params"] if not hasattr(p, "use_muon") and "use_muon" not in group]
    if silent:
        matrices = sum(p.dim() >= 2 for p in silent)
        warnings.warn(
            f"Muon: {len(silent)} of {len(every)} parameters have no use_muon; {matrices} with two dimensions or more are stepped by Muon, {len(silent) - matrices} by AdamW\n"
            "  fix: p.use_muon = False on embeddings and heads, True on hidden weights",
            stacklevel=3,
        )
    out = []
    for group in groups:
        for muon, defaults, rate in ((True, MUON, "muon_lr"), (False, ADAM, "adam_lr")):
            chosen = [p for p in group["params"] if getattr(p, "use_muon", group.get("use_muon", p.dim() >= 2)) is muon]
            said = {key: value for key, value in options.items() if key in defaults}
            said |= {"lr": options[rate]} if rate in options else {}
            if chosen:
                out.append({**said, **{k: v for k, v in group.items() if k in defaults}, "params": chosen, "use_muon": muon})
    return out
