"""The options of the user's optimizers: which group owns a parameter, and which numbers are values of the program or its inputs.

Groups are counted over all optimizers of the step: with ``[muon, adamw]`` and one group each, ``"lr/1"`` is AdamW's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from deepseed.capture.errors import CaptureError
from deepseed.ir.program import Arg

Optimizers = Optimizer | Sequence[Optimizer] | None
# schedulers' own notes, and what only says which kernels eager PyTorch takes
HIDDEN = ("params", "param_names", "initial_lr", "foreach", "fused", "capturable", "differentiable", "max_lr", "min_lr", "base_momentum", "max_momentum")
SHOWN = 4  # names that a message lists


@dataclass(frozen=True)
class Number:
    """A float of an option: ``betas[1]`` is ``("betas", 1)``, ``momentum`` is ``("momentum", None)``."""

    option: str
    at: int | None

    def read(self, group: Mapping[str, Any]) -> float:
        return float(group[self.option] if self.at is None else group[self.option][self.at])

    def __str__(self) -> str:
        return self.option if self.at is None else f"{self.option}.{self.at}"


def listed(optimizers: Optimizers) -> tuple[Optimizer, ...]:
    """One optimizer, several or none, as a tuple."""
    return () if optimizers is None else tuple(optimizers) if isinstance(optimizers, Iterable) else (optimizers,)


def all_groups(optimizers: Optimizers) -> list[tuple[Optimizer, dict[str, Any]]]:
    return [(optimizer, group) for optimizer in listed(optimizers) for group in optimizer.param_groups]


def owners(optimizers: Optimizers, parameters: Mapping[str, nn.Parameter]) -> dict[str, int]:
    """Parameter name -> index of its group. Raises CaptureError for parameters that are not the model's, or have two owners."""
    names = {id(p): name for name, p in parameters.items()}
    found: dict[str, int] = {}
    at = {id(group): n for n, (_, group) in enumerate(all_groups(optimizers))}
    everything = all_groups(optimizers)
    for optimizer in listed(optimizers):
        kind, strange = type(optimizer).__name__, 0
        for group in optimizer.param_groups:
            for p in group["params"]:
                name = names.get(id(p))
                if name is None:
                    strange += 1
                elif name in found:
                    other = type(everything[found[name]][0]).__name__
                    raise CaptureError(f"parameter {name!r} is in two optimizers, {other} and {kind}", fix="give each parameter to one optimizer")
                else:
                    found[name] = at[id(group)]
        if strange:
            total = sum(len(g["params"]) for g in optimizer.param_groups)
            raise CaptureError(
                f"{strange} of the {total} parameters of {kind} are not among the model's {len(parameters)}",
                fix="build the optimizer from model.parameters() of this very model, after the last change of its parameters",
            )
        hooks = sum(len(getattr(optimizer, name, ())) for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"))
        if hooks:
            raise CaptureError(f"{kind} has {hooks} step hooks, which a compiled step cannot call", fix="remove them, or call them around step(batch)")
    return found


def ownerless(optimizers: Optimizers, parameters: Mapping[str, nn.Parameter]) -> str:
    """A sentence on the trainable parameters that no optimizer has; empty if there are none."""
    owned = {id(p) for _, group in all_groups(optimizers) for p in group["params"]}
    left = [name for name, p in parameters.items() if p.requires_grad and id(p) not in owned]
    if not left:
        return ""
    shown = ", ".join(left[:SHOWN]) + (f" and {len(left) - SHOWN} more" if len(left) > SHOWN else "")
    total = sum(p.requires_grad for p in parameters.values())
    return f"{len(left)} of the {total} trainable parameters are in no optimizer and stay as they are: {shown}"


def has_rate(group: Mapping[str, Any]) -> bool:
    """Whether the group's ``lr`` is a number, which the program then takes as an input."""
    lr = group.get("lr")
    return is_number(lr) or (isinstance(lr, Tensor) and lr.numel() == 1)


def read_options(hyper: Mapping[str, Callable[[], float]]) -> dict[str, float]:
    """What a step reads of its optimizers' groups: ``{"lr/0": 0.001}``. Raises CaptureError where one is no finite number: it would be in every parameter."""
    out = {key: read() for key, read in hyper.items()}
    for key, value in out.items():
        if not isfinite(value):
            option, _, group = key.partition("/")
            raise CaptureError(f"{option} of the optimizer's group {group} is {value}: nothing was computed with it", fix=f"a number; look at what sets it, such as a scheduler: param_groups[{group}][{option!r}]")
    return out


def with_numbers(group: Mapping[str, Any], values: Mapping[Number, Any]) -> dict[str, Any]:
    """The group's options with some numbers replaced; other numbers that are kept as tensors are Python's."""
    out: dict[str, Any] = {k: v.item() if isinstance(v, Tensor) and v.numel() == 1 else v for k, v in group.items()}
    for number, value in values.items():
        old = out[number.option]
        out[number.option] = value if number.at is None else tuple(value if i == number.at else o for i, o in enumerate(old))
    return out


def numbers_of(group: Mapping[str, Any], options: Collection[str]) -> tuple[Number, ...]:
    """The floats of these options."""
    out: list[Number] = []
    for option in sorted(options):
        value: Any = group.get(option)
        if isinstance(value, (tuple, list)):
            out += [Number(option, i) for i, v in enumerate(value) if is_number(v)]
        elif is_number(value):
            out.append(Number(option, None))
    return tuple(out)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def fixed_options(optimizers: Optimizers, moved: Collection[str] = ()) -> dict[str, Any]:
    """What the program has of the optimizers' options: ``"weight_decay/0"`` -> its value; of one that is an input (``moved``) the
    signs of its numbers; ``"params/0"`` -> how many parameters the group has. If anything changes, capture again."""
    out: dict[str, Any] = {}
    for i, (_, group) in enumerate(all_groups(optimizers)):
        out[f"params/{i}"] = len(group["params"])
        for option, value in group.items():
            if option not in HIDDEN and not (option == "lr" and has_rate(group)):
                key = f"{option}/{i}"
                out[key] = [(n.read(group) > 0) - (n.read(group) < 0) for n in numbers_of(group, (option,))] if key in moved else plain(value)
    return out


def changed_options(optimizers: Optimizers, before: Mapping[str, Any]) -> set[str]:
    """Names of the options whose numbers differ from ``fixed_options`` of before: worth being inputs from now on."""
    now = fixed_options(optimizers)
    return {key.rpartition("/")[0] for key, value in now.items() if not key.startswith("params/") and before.get(key, value) != value}


def stated_options(optimizers: Optimizers) -> list[tuple[str, object]]:
    """Every option by a name for people, ``lr`` too: what all ranks must have alike at every step."""
    named = listed(optimizers)
    out: list[tuple[str, object]] = []
    for optimizer in named:
        for i, group in enumerate(optimizer.param_groups):
            of = f" of {type(optimizer).__name__}" + (f"'s group {i}" if len(optimizer.param_groups) > 1 else "")
            out += [(f"{option}{of}", plain(value)) for option, value in group.items() if option not in HIDDEN]
            out.append((f"the number of parameters{of}", len(group["params"])))
    return out


def plain(value: Any) -> Arg:
    if isinstance(value, (tuple, list)):
        return tuple(plain(v) for v in value)
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    return value if isinstance(value, (bool, int, float, str)) or value is None else repr(value)
