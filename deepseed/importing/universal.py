"""DeepSpeed's universal checkpoints, as its ``ds_to_universal`` writes them: a folder a parameter, whole tensors, whatever ranks wrote it.

    zero/NAME/fp32.pt, exp_avg.pt, exp_avg_sq.pt, step.pt       {"param": tensor, ..} or the tensor
    zero/optimizer_state.pt                                     options of each group, loss scale
    *_model_states.pt                                           as in the checkpoint that it was made of
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseed.importing.found import Found, Lazy
from deepseed.importing.optimizers import described
from deepseed.importing.records import load, mapping
from deepseed.importing.zero import MODEL, common, widened
from deepseed.runtime.folder import CheckpointError

FP32 = "fp32.pt"


def read(folder: Path, optimizer: str | None = None) -> Found:
    """Raises CheckpointError where a file is missing or torn, or tensors do not fit one another."""
    models = sorted(p for p in folder.iterdir() if MODEL.fullmatch(p.name))
    if not models:
        raise CheckpointError(f"{folder / 'mp_rank_00_model_states.pt'} is missing\n  fix: copy the whole folder that ds_to_universal has written")
    first, state = mapping(models[0]), mapping(folder / "zero" / "optimizer_state.pt")
    shapes = [first["param_shapes"]] if isinstance(first.get("param_shapes"), Mapping) else list(first.get("param_shapes") or [])
    whole = len({m[2] for p in models if (m := MODEL.fullmatch(p.name))}) == 1
    said = {str(n): tuple(s) for each in shapes for n, s in each.items()} if whole else {}
    tied = {str(alias): str(name) for alias, name in (first.get("shared_params") or {}).items()}
    module: Mapping[str, Any] = saved if isinstance(saved := first.get("module"), Mapping) else {}
    folders = {p.parent.relative_to(folder / "zero").as_posix().replace("/", "."): p.parent for p in (folder / "zero").rglob(FP32)}
    if gone := [name for name in said if name not in folders]:
        raise CheckpointError(f"{folder / 'zero' / gone[0] / FP32} is missing: {len(said)} parameters were trained, {len(gone)} of them are not there\n  fix: copy the whole folder that ds_to_universal has written")
    found = Found("deepspeed universal", folder, {})
    order = [n for n in module if n not in tied]
    for name in [*order, *sorted(n for n in folders if n not in order and n not in tied)]:
        if name in folders:
            _one(found, name, folders[name], said.get(name))
        elif isinstance(t := module[name], Tensor) and name in (first.get("buffer_names") or ()):
            found.model[name] = widened(Lazy.of(t))
    for name, lazy in _left(first, models, found).items():
        found.model[name] = widened(lazy)
    found.tied = {alias: name for alias, name in tied.items() if name in found.model}
    for alias in found.tied:
        found.model.pop(alias, None)
    _steps(found, shapes, state)
    _groups(found, shapes, state, first, optimizer)
    common(found, first, state)
    return found


def _one(found: Found, name: str, folder: Path, shape: tuple[int, ...] | None) -> None:
    """A parameter and its state."""
    value = _tensor(folder / FP32)
    shape = tuple(value.shape) if shape is None else shape
    found.model[name] = _shaped(value, shape, folder / FP32)
    for path in sorted(p for p in folder.glob("*.pt") if p.name != FP32):
        t = _tensor(path)
        found.slots[f"{path.stem}/{name}"] = Lazy.of(t.to(torch.float32)) if t.dim() == 0 else _shaped(t, shape, path)


def _tensor(path: Path) -> Tensor:
    found = load(path)
    found = found.get("param") if isinstance(found, Mapping) else found
    if isinstance(found, int | float):
        return torch.tensor(float(found))
    if not isinstance(found, Tensor):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, not a tensor\n  fix: make the universal checkpoint anew")
    return found


def _shaped(t: Tensor, shape: tuple[int, ...], path: Path) -> Lazy:
    return Lazy.of(t) if tuple(t.shape) == shape else Lazy.joined(shape, [t.flatten()], str(path))


def _left(first: Mapping[str, Any], models: list[Path], found: Found) -> dict[str, Lazy]:
    """Frozen parameters that have no folder: of stage 3, where each file has a part."""
    shapes = {str(n): tuple(s) for n, s in (first.get("frozen_param_shapes") or {}).items() if n not in found.model or prod(found.model[n].shape) != prod(s)}
    files = sorted(models, key=lambda p: int((MODEL.fullmatch(p.name) or [0, 0])[1] or 0))
    fragments = [mapping(p)["frozen_param_fragments"] for p in files] if shapes else []
    return {name: Lazy.joined(shape, [f[name].flatten() for f in fragments], name) for name, shape in shapes.items()}


def _steps(found: Found, shapes: list[Any], state: Mapping[str, Any]) -> None:
    """Of stage 3 no parameter has a step of its own: it stands in the optimizer's state of each sub-group."""
    base = state.get("optimizer_state_dict")
    for n, names in enumerate(shapes):
        own = base.get("state", {}).get(n, {}) if isinstance(base, Mapping) else {}
        for slot, value in own.items():
            if isinstance(value, int | float) or (isinstance(value, Tensor) and value.dim() == 0):
                for name in (str(each) for each in names if f"{slot}/{each}" not in found.slots):
                    found.slots[f"{slot}/{name}"] = Lazy.of(torch.tensor(float(value), dtype=torch.float32))


def _groups(found: Found, shapes: list[Any], state: Mapping[str, Any], first: Mapping[str, Any], optimizer: str | None) -> None:
    """Which parameter is in which group: in stage 3 the parameters are listed by sub-group."""
    said = state.get("param_groups") or []
    owner = {i: g for g, group in enumerate(said) for i in group.get("params", ())}
    grouped: dict[int, list[str]] = {}
    for n, names in enumerate(shapes):
        grouped.setdefault(owner.get(n, n), []).extend(str(name) for name in names)
    options = [{k: v for k, v in said[g].items() if k != "params"} if g < len(said) else {} for g in sorted(grouped)]
    described(found, options, [grouped[g] for g in sorted(grouped)], first.get("ds_config") or {}, optimizer)
