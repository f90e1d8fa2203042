"""Whether a checkpoint fits a model and an optimizer: every difference by name, with both shapes, dtypes or values.

Names are the model's own. A tied parameter has one tensor and several names; a checkpoint knows them all.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deepseed.runtime.folder import CheckpointError

HOW = ("params", "param_names", "foreach", "fused", "capturable", "differentiable")  # not what the optimizer computes: stays the user's
SHOWN = 3  # differences that an error shows of each kind
Meta = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True)
class Saved:
    """What a checkpoint says of itself. ``model`` and ``slots``: shape and dtype by name, tied names included; ``tied``: further
    name -> first name."""

    folder: Path
    model: Mapping[str, Meta]
    slots: Mapping[str, Meta]
    tied: Mapping[str, str]
    optimizers: Sequence[Mapping[str, Any]]
    frozen: frozenset[str] = frozenset()  # parameters that were left out, because they were not trained

    @staticmethod
    def of(folder: Path, manifest: Mapping[str, Any]) -> Saved:
        found: dict[str, dict[str, Meta]] = {"model": {}, "optimizer": {}}
        for name, t in manifest["tensors"].items():
            kind, _, key = name.partition(".")
            dtype, _, sizes = t.removesuffix("]").partition("[")  # float32[64, 32]
            found[kind][key] = (tuple(int(n) for n in sizes.split(",") if n), getattr(torch, dtype))
        tied = {alias.removeprefix("model."): name.removeprefix("model.") for alias, name in manifest["tied"].items()}
        found["model"] |= {alias: found["model"][name] for alias, name in tied.items()}
        return Saved(folder, found["model"], found["optimizer"], tied, manifest["optimizers"], frozenset(manifest.get("frozen", ())))

    def check(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, cast: bool) -> None:
        """Whether the tensor ``name`` (``model.…``, ``optimizer.…``) can be read as this shape and dtype."""
        kind, _, key = name.partition(".")
        has, kept = (self.model if kind == "model" else self.slots)[key]
        if has != shape:
            raise CheckpointError(f"{self.folder}: {name} is {list(has)} in the checkpoint, {list(shape)} in this step")
        if kept != dtype and not (cast and kept.is_floating_point and dtype.is_floating_point):
            fix = "load(dir, cast=True) casts" if kept.is_floating_point and dtype.is_floating_point else "load it into a model of the same dtypes"
            raise CheckpointError(f"{self.folder}: {name} is {_said(kept)} in the checkpoint, {_said(dtype)} in this step\n  fix: {fix}")


def _said(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# the model --------------------------------------------------------------------------------------------------------------


def tensors_of(model: nn.Module, written: Collection[str] = ()) -> dict[tuple[str, str], Tensor]:
    """Parameters and buffers by role and first name: what ``state_dict()`` has, and the buffers in ``written``."""
    out: dict[tuple[str, str], Tensor] = {("param", name): p for name, p in model.named_parameters()}
    passing = {
        f"{path}.{name}" if path else name for path, m in model.named_modules(remove_duplicate=False) for name in m._non_persistent_buffers_set
    }
    return out | {("buffer", name): b for name, b in model.named_buffers() if name not in passing or name in written}


def tied_names(model: nn.Module) -> dict[str, str]:
    """Further name of a parameter or buffer -> its first name."""
    first = {id(t): name for (_, name), t in tensors_of(model).items()}
    every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: first[id(t)] for name, t in every if first.get(id(t), name) != name}


def check_model(model: nn.Module, saved: Saved) -> dict[tuple[str, str], Tensor]:
    """The model's tensors that the checkpoint has values for. Raises CheckpointError unless they are exactly its own."""
    mine = tensors_of(model)
    buffers = dict(model.named_buffers())
    mine |= {("buffer", name): buffers[name] for name in saved.model if ("param", name) not in mine and name in buffers}
    tied = tied_names(model)
    names = {name: tuple(t.shape) for (_, name), t in mine.items()}
    names |= {alias: names[name] for alias, name in tied.items()}
    left = {name for name in names if name in saved.frozen or tied.get(name) in saved.frozen}
    mine = {key: t for key, t in mine.items() if key[1] not in left}
    names = {name: shape for name, shape in names.items() if name not in left}
    differences(f"{saved.folder} is a checkpoint of another model", names, {name: shape for name, (shape, _) in saved.model.items()}, "in the checkpoint")
    for alias, name in tied.items():
        if alias not in left and saved.tied.get(alias, alias) != saved.tied.get(name, name):
            raise CheckpointError(f"{saved.folder}: {alias} and {name} are one tensor in this model, two in the checkpoint\n  fix: load it into a model that does not tie them")
    return mine


def differences(what: str, mine: Mapping[str, tuple[int, ...]], other: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise CheckpointError where names or shapes differ: the first of each kind."""
    lacking = [f"{n} {list(mine[n])}" for n in mine if n not in other]
    strange = [f"{n} {list(other[n])}" for n in other if n not in mine]
    shapes = [f"{n}: {list(other[n])} {where}, {list(mine[n])} in the model" for n in mine if n in other and other[n] != mine[n]]
    if lacking or strange or shapes:
        lines = [f"{what}: {len(lacking)} tensors of the model are not {where}, {len(strange)} {where} are not in the model, {len(shapes)} have another shape"]
        lines += [f"  not {where}: {line}" for line in lacking[:SHOWN]]
        lines += [f"  not in the model: {line}" for line in strange[:SHOWN]]
        lines += [f"  {line}" for line in shapes[:SHOWN]]
        raise CheckpointError("\n".join([*lines, "  fix: build the model with the configuration that these tensors were made with"]))


# the optimizer ----------------------------------------------------------------------------------------------------------


def options(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """Class and options of each group as plain data; what JSON cannot hold is left out."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = []
    for group in optimizer.param_groups:
        plain = {k: _plain(v) for k, v in group.items() if k not in HOW}
        groups.append({"params": [names.get(id(p), "?") for p in group["params"]], "options": {k: v for k, (fits, v) in plain.items() if fits}})
    return {"class": _class(optimizer), "groups": groups}


def check_optimizers(optimizers: Sequence[torch.optim.Optimizer], model: nn.Module, saved: Saved) -> None:
    """Raises CheckpointError unless they are as many, of the classes and with the groups, as the checkpoint's, in its order."""
    if not saved.optimizers:
        raise CheckpointError(f"{saved.folder} has no optimizer state: no optimizer was compiled where it was saved\n  fix: load(dir, optimizer=False) takes parameters and buffers only")
    if len(saved.optimizers) != len(optimizers):
        raise CheckpointError(
            f"{saved.folder} holds the state of {len(saved.optimizers)} optimizers ({', '.join(str(o['class']).rpartition('.')[2] for o in saved.optimizers)}), this step has {len(optimizers)}\n"
            "  fix: give the optimizers in that order, or load(dir, optimizer=False) for parameters and buffers only"
        )
    for optimizer, was in zip(optimizers, saved.optimizers, strict=True):
        _check_optimizer(was, options(optimizer, model), saved)


def _check_optimizer(was: Mapping[str, Any], now: Mapping[str, Any], saved: Saved) -> None:
    if was["class"] != now["class"]:
        raise CheckpointError(
            f"{saved.folder} holds the state of {was['class']}, this step's optimizer is {now['class']}\n"
            f"  fix: use {was['class'].rpartition('.')[2]}, or load(dir, optimizer=False) for parameters and buffers only"
        )
    before, here = ([g["params"] for g in each["groups"]] for each in (was, now))
    if before != here:
        n = next((i for i, (a, b) in enumerate(zip(before, here, strict=False)) if a != b), min(len(before), len(here)))
        sizes = [f"{len(groups)} groups of {', '.join(str(len(g)) for g in groups)} parameters" for groups in (before, here)]
        a, b = (groups[n] if n < len(groups) else [] for groups in (before, here))
        first = next(((x, y) for x, y in zip([*a, *[None] * len(b)], [*b, *[None] * len(a)], strict=True) if x != y), (None, None))
        raise CheckpointError(
            f"{saved.folder}: the optimizer's groups differ: {sizes[0]} in the checkpoint, {sizes[1]} in this step\n"
            f"  first difference, group {n}: {first[0]} in the checkpoint, {first[1]} in this step\n"
            "  fix: make the groups as they were, or load(dir, optimizer=False)"
        )
    for n, (group, mine) in enumerate(zip(was["groups"], now["groups"], strict=True)):
        for option, value in mine["options"].items():
            old = group["options"].get(option)
            if isinstance(value, bool) and isinstance(old, bool) and old != value:  # a switch is part of what the optimizer is; a number is where training had it
                raise CheckpointError(
                    f"{saved.folder}: {option} of the optimizer's group {n} is {old} in the checkpoint, {value} in this step\n"
                    f"  fix: {now['class'].rpartition('.')[2]}(..., {option}={old}), or load(dir, optimizer=False) for parameters and buffers only"
                )


def restore_options(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Options of each group as they were, in the form that the group has them (tuples, a tensor lr)."""
    for group, was in zip(optimizer.param_groups, saved["groups"], strict=True):
        for option, value in was["options"].items():
            old = group.get(option)
            if isinstance(old, Tensor):
                old.fill_(value)
            else:
                group[option] = tuple(value) if isinstance(old, tuple) else value


def missing_slots(stored: Collection[str], saved: Saved) -> list[str]:
    """Slots that a step stores and the checkpoint lacks, of parameters of which it has others. Of a parameter that was never trained
    it has none: that one starts anew."""
    trained = {key.partition("/")[2] for key in saved.slots}
    return [key for key in stored if key not in saved.slots and key.partition("/")[2] in trained]


def _class(optimizer: torch.optim.Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def _plain(value: Any) -> tuple[bool, Any]:
    """Whether JSON can hold a value, and the value as it does."""
    if isinstance(value, Tensor):
        return value.numel() == 1, value.item() if value.numel() == 1 else None
    if isinstance(value, tuple | list):
        items = [_plain(v) for v in value]
        return all(fits for fits, _ in items), [v for _, v in items]
    return value is None or isinstance(value, bool | int | float | str), value
