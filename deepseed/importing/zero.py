"""Checkpoints as DeepSpeed's ``save_checkpoint`` writes them: flat partitions of each rank, put together by the names and shapes that stand beside them.

    mp_rank_00_model_states.pt                          stages 1, 2: module (16 bits or 32), names, counts, scheduler, client state
    zero_pp_rank_R_mp_rank_00_model_states.pt           stage 3: the same, without parameters; frozen ones as rank R's part
    [bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt    rank R's part of the float32 parameters and of the optimizer's state, flat, by group

Stages 1 and 2: all parameters of a group in one vector, cut into equal parts. Stage 3: each parameter cut into equal parts, rank R's parts of a
sub-group one after another. What the module holds in 16 bits is taken from the float32 parameters. Pipeline and tensor parallel ranks are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseed.importing.found import Found, Lazy, window
from deepseed.importing.optimizers import described
from deepseed.importing.records import Record, kept, mapping
from deepseed.runtime.folder import CheckpointError

OPTIM = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
KNOWN = frozenset({  # keys of the engine's own; what else stands there is the client's
    "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params", "frozen_param_fragments", "lr_scheduler", "data_sampler",
    "random_ltd", "skipped_steps", "global_steps", "global_samples", "dp_world_size", "mp_world_size", "checkpoint_parallel_dimensions", "ds_config", "ds_version",
    "universal_checkpoint_info", "num_experts", "ds_autoep_layers",
})  # fmt: skip
Names = Mapping[str, tuple[int, ...]]


@dataclass
class Group:
    """Parameters whose flat parts lie one after another. ``parts``: by kind (fp32, exp_avg, ..), each rank's; ``numbers``: state that is one number."""

    names: Names
    index: int
    parts: dict[str, list[Tensor]]
    numbers: dict[str, Tensor] = field(default_factory=dict)
    paddings: Sequence[int] = ()


def read(folder: Path, optimizer: str | None = None) -> Found:
    """Raises CheckpointError where a file is missing, torn or of another checkpoint, or the format is not understood."""
    models, optims = by_rank(folder, MODEL), by_rank(folder, OPTIM)
    first = mapping(models[min(models)])
    if first.get("param_shapes") is None or not optims:
        raise CheckpointError(
            f"{folder} was not written by ZeRO 1, 2 or 3 ({'no optim_states.pt is there' if not optims else 'it names no partitioned parameters'})\n"
            "  fix: give the whole folder of a tag; without ZeRO, DeepSpeed's files do not say which optimizer state belongs to which parameter"
        )
    states = {rank: _optimizer_state(path) for rank, path in sorted(optims.items())}
    stage = int(_number(states[min(states)].get("zero_stage", 1)))
    _complete(folder, optims, states)
    shapes = [{str(n): tuple(s) for n, s in each.items()} for each in ([first["param_shapes"]] if isinstance(first["param_shapes"], Mapping) else first["param_shapes"])]
    every = list(states.values())
    groups = _stage3(folder, shapes, every) if stage == 3 else _stage12(folder, shapes, every)
    module = first.get("module")
    if not isinstance(module, Mapping):
        raise CheckpointError(f"{models[min(models)]} has no module: pipeline stages write their layers into files of their own\n  fix: make a universal checkpoint of it with DeepSpeed's ds_to_universal, and import that")
    found = Found(f"deepspeed zero{stage}", folder, {})
    tied = {str(alias): str(name) for alias, name in (first.get("shared_params") or {}).items()}
    trained = {name: kinds for group in groups for name, kinds in _placed(folder, group, stage, len(every)).items()}
    order = [name for name in module if name not in tied]
    names = [*order, *(n for n in trained if n not in order)]
    frozen = _frozen(folder, first, models, stage, len(every))
    for name in names:
        if name in trained:
            found.model[name] = trained[name]["fp32"]
        elif name in frozen:
            found.model[name] = widened(frozen[name])
        elif isinstance(t := module.get(name), Tensor) and (stage < 3 or name in (first.get("buffer_names") or ())):  # in stage 3 parameters are placeholders there
            found.model[name] = widened(Lazy.of(t))
    for name, lazy in frozen.items():
        found.model.setdefault(name, widened(lazy))
    found.tied = {alias: name for alias, name in tied.items() if name in found.model}
    for group in groups:
        for name in group.names:
            slots = {slot: lazy for slot, lazy in trained[name].items() if slot != "fp32"}
            found.slots |= {f"{slot}/{name}": lazy for slot, lazy in slots.items()} | {f"{slot}/{name}": Lazy.of(value) for slot, value in group.numbers.items()}
    _options(found, first, every[0], groups, [n for n in names if n in trained], optimizer)
    common(found, first, every[0])
    return found


def by_rank(folder: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    """Files by data-parallel rank. Raises CheckpointError where there are several model-parallel ranks, or none."""
    matches = [(m, p) for p in sorted(folder.iterdir()) if (m := pattern.fullmatch(p.name))]
    if parallel := sorted({int(m[2]) for m, _ in matches} - {0}):
        raise CheckpointError(
            f"{folder} was written by {len(parallel) + 1} tensor- or pipeline-parallel ranks, whose parts only DeepSpeed can put together\n"
            "  fix: make a universal checkpoint of it with DeepSpeed's ds_to_universal, and import that"
        )
    if not matches and pattern is MODEL:
        raise CheckpointError(f"{folder / 'mp_rank_00_model_states.pt'} is missing, and so is every other file of the model\n  fix: give the folder of one tag, such as global_step100")
    return {int(m[1] or 0): p for m, p in matches}


def _optimizer_state(path: Path) -> dict[str, Any]:
    found = mapping(path).get("optimizer_state_dict")
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path} holds no optimizer_state_dict\n  fix: copy it again, or import another checkpoint")
    return dict(found)


def _complete(folder: Path, files: Mapping[int, Path], states: Mapping[int, Mapping[str, Any]]) -> None:
    """Whether exactly the ranks that wrote are there."""
    said = {rank: max(count) if isinstance(count := state.get("partition_count", len(files)), list | tuple) else int(count) for rank, state in states.items()}
    if len(set(said.values())) > 1:
        odd = next(r for r in said if said[r] != said[min(said)])
        raise CheckpointError(f"{files[min(said)]} is of {said[min(said)]} ranks, {files[odd].name} of {said[odd]}: files of two checkpoints are mixed\n  fix: import a folder that one job has written")
    ranks = said[min(said)]
    example = files[min(files)].name
    if gone := [rank for rank in range(ranks) if rank not in files]:
        name = re.sub(r"pp_rank_\d+", f"pp_rank_{gone[0]}", example)
        raise CheckpointError(f"{folder / name} is missing: {ranks} ranks wrote this checkpoint, files of {len(files)} are there\n  fix: copy the files of all ranks (of all nodes) into one folder")
    if more := [rank for rank in files if rank >= ranks]:
        raise CheckpointError(f"{files[more[0]]} belongs to another checkpoint: {ranks} ranks wrote this one\n  fix: delete the files that an earlier job with more ranks has left")


def _stage12(folder: Path, shapes: Sequence[Names], states: Sequence[Mapping[str, Any]]) -> list[Group]:
    flat: list[Any] = [state.get("single_partition_of_fp32_groups") for state in states]
    _count(folder, "single_partition_of_fp32_groups", flat, len(shapes))
    paddings = states[0].get("param_alignment_paddings") or [() for _ in shapes]
    out = []
    for n, names in enumerate(shapes):
        group = Group(names, n, {"fp32": [f[n] for f in flat]}, paddings=list(paddings[n]))
        _slots(group, [_base(state.get("base_optimizer_state"), n) for state in states], states[0])
        out.append(group)
    return out


def _stage3(folder: Path, shapes: Sequence[Names], states: Sequence[Mapping[str, Any]]) -> list[Group]:
    flat: list[Any] = [state.get("fp32_flat_groups") for state in states]
    _count(folder, "fp32_flat_groups", flat, len(shapes))
    base = [state.get("optimizer_state_dict") or {} for state in states]
    owner = {i: g for g, group in enumerate(base[0].get("param_groups", [])) for i in group["params"]}
    out = []
    for n, names in enumerate(shapes):
        group = Group(names, owner.get(n, 0), {"fp32": [f[n] for f in flat]})
        _slots(group, [dict(each.get("state", {}).get(n, {})) for each in base], states[0])
        out.append(group)
    return out


def _count(folder: Path, key: str, flat: Sequence[Any], groups: int) -> None:
    for rank, each in enumerate(flat):
        if not isinstance(each, list | tuple) or len(each) != groups or not all(isinstance(t, Tensor) for t in each):
            has = len(each) if isinstance(each, list | tuple) else "no"
            raise CheckpointError(f"{folder}: rank {rank} has {has} partitions in {key}, the model's file names {groups} groups of parameters\n  fix: import a folder that one job has written")


def _base(base: Any, n: int) -> dict[str, Any]:
    """State of group ``n`` in the optimizer's own state_dict, or, where it was saved to be elastic, in a list."""
    if isinstance(base, list | tuple):
        return dict(base[n])
    if not isinstance(base, Mapping) or not base.get("state"):
        return {}
    index = base["param_groups"][n]["params"][0]
    return dict(base["state"].get(index, {}))


def _slots(group: Group, found: Sequence[Mapping[str, Any]], state: Mapping[str, Any]) -> None:
    """Optimizer state of a group: what is as long as the partition is cut as it is, a number holds for each parameter."""
    for slot, value in found[0].items():
        if any(slot not in each for each in found):
            raise CheckpointError(f"{slot} of {next(iter(group.names))} and others is in the files of some ranks only\n  fix: import a folder that one job has written")
        if isinstance(value, Tensor) and value.dim() > 0:
            group.parts[slot] = [each[slot].flatten() for each in found]
        elif isinstance(value, Tensor | int | float) and not isinstance(value, bool):
            group.numbers[slot] = torch.tensor(_number(value), dtype=torch.float32)
    if group.parts.keys() - {"fp32"} and "step" not in group.numbers:
        groups = (state.get("base_optimizer_state") or {}) if not isinstance(state.get("base_optimizer_state"), list) else {}
        said = state.get("base_optimizer_state_step", next((g["step"] for g in groups.get("param_groups", []) if "step" in g), None))
        if said is not None:
            group.numbers["step"] = torch.tensor(_number(said), dtype=torch.float32)


def _placed(folder: Path, group: Group, stage: int, ranks: int) -> dict[str, dict[str, Lazy]]:
    """Each parameter of a group, and its state, as they lie in the partitions: by name, by kind."""
    out: dict[str, dict[str, Lazy]] = {}
    at = 0
    need = sum(-(-prod(s) // ranks) for s in group.names.values()) if stage == 3 else sum(map(prod, group.names.values())) + sum(group.paddings)
    for kind, parts in group.parts.items():
        have = min(p.numel() for p in parts) if stage == 3 else sum(p.numel() for p in parts)
        if have < need:
            raise CheckpointError(f"{folder}: {kind} of {next(iter(group.names))} and {len(group.names) - 1} more has {have} elements, its {len(group.names)} parameters have {need}\n  fix: import a folder that one job has written")
    for n, (name, shape) in enumerate(group.names.items()):
        size = -(-prod(shape) // ranks) if stage == 3 else prod(shape)
        out[name] = {kind: Lazy.joined(shape, [p[at : at + size] for p in parts] if stage == 3 else window(parts, at, size), name) for kind, parts in group.parts.items()}
        at += size + (group.paddings[n] if group.paddings else 0)
    return out


def _frozen(folder: Path, first: Mapping[str, Any], models: Mapping[int, Path], stage: int, ranks: int) -> dict[str, Lazy]:
    """Parameters that no optimizer has: whole in the first file, in stage 3 a part in each."""
    shapes = {str(n): tuple(s) for n, s in (first.get("frozen_param_shapes") or {}).items()}
    if not shapes:
        return {}
    if stage < 3:
        return {name: Lazy.of(first["frozen_param_fragments"][name].view(shape)) for name, shape in shapes.items()}
    if gone := [rank for rank in range(ranks) if rank not in models]:
        raise CheckpointError(f"{folder / f'zero_pp_rank_{gone[0]}_mp_rank_00_model_states.pt'} is missing: it holds a part of each of {len(shapes)} frozen parameters\n  fix: copy the files of all ranks into one folder")
    fragments = [first if rank == min(models) else mapping(models[rank]) for rank in range(ranks)]
    return {name: Lazy.joined(shape, [f["frozen_param_fragments"][name].flatten() for f in fragments], name) for name, shape in shapes.items()}


def widened(t: Lazy) -> Lazy:
    """Floats of 16 bits as float32, as the trained parameters are: DeepSpeed casts the module, a plan's word casts here."""
    return t.as_(torch.float32) if t.dtype.is_floating_point and t.dtype.itemsize < 4 else t


def _options(found: Found, first: Mapping[str, Any], state: Mapping[str, Any], groups: Sequence[Group], order: Sequence[str], optimizer: str | None) -> None:
    base = state.get("optimizer_state_dict") or state.get("base_optimizer_state")
    said = base.get("param_groups", []) if isinstance(base, Mapping) else []
    config = first.get("ds_config") or {}
    shuffled = bool((config.get("zero_optimization") or {}).get("round_robin_gradients")) if isinstance(config, Mapping) else False
    grouped: dict[int, list[str]] = {}
    for group in groups:
        grouped.setdefault(group.index, []).extend(group.names)
    options = [{k: v for k, v in said[g].items() if k != "params"} if g < len(said) else {} for g in sorted(grouped)]
    if any("lr" not in o for o in options) and found.slots:  # elastic ones have no groups
        schedule = first.get("lr_scheduler") or {}
        now, begun = (schedule.get(key) if isinstance(schedule, Mapping) else None for key in ("_last_lr", "base_lrs"))
        if isinstance(now, list) and len(now) == len(options):
            options = [{**o, "lr": lr, **({"initial_lr": begun[n]} if isinstance(begun, list) else {})} for n, (o, lr) in enumerate(zip(options, now, strict=True))]
        found.notes.append("the options of the groups are not there: weight decay, betas and the like stay as the optimizer is made" + ("" if now else ", and so does lr"))
    described(found, options, [sorted(grouped[g], key=order.index) if shuffled else grouped[g] for g in sorted(grouped)], config, optimizer)


def common(found: Found, model: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Counts, loss scale, schedule, and what the client gave to ``save_checkpoint``."""
    found.step = int(model.get("global_steps", 0))
    skipped = int(model.get("skipped_steps", 0))
    found.slots |= loss_scale(state.get("loss_scaler"), skipped) if found.slots else {}
    client, left = kept({k: v for k, v in model.items() if k not in KNOWN})
    schedule, odd = kept(dict(model["lr_scheduler"])) if isinstance(model.get("lr_scheduler"), Mapping) else ({}, [])
    if left or odd:
        found.notes.append(f"left out, since they are no plain data: {', '.join([*left, *(f'lr_scheduler.{n}' for n in odd)])}")
    config = model.get("ds_config")
    found.extra = {
        "client_state": client, "lr_scheduler": _schedule(schedule, found) if schedule else None, "skipped_steps": skipped, "global_steps": found.step,
        "global_samples": int(model.get("global_samples", 0)),
        "micro_steps": found.step * int((config.get("gradient_accumulation_steps") if isinstance(config, Mapping) else 1) or 1),
    }  # fmt: skip


def _schedule(state: Mapping[str, Any], found: Found) -> dict[str, Any]:
    """A schedule's state; DeepSpeed's own, which counts from -1, as deepseed.lr_schedules has it."""
    if set(state) != {"last_batch_iteration"}:
        return dict(state)
    i = int(state["last_batch_iteration"])
    return {"last_epoch": i + 1, "_step_count": i + 2, "_last_lr": [g["lr"] for g in found.groups if "lr" in g]}


def loss_scale(scaler: Any, skipped: int) -> dict[str, Lazy]:
    """A moving loss scale as state of the step; none where the scale stays."""
    if not isinstance(scaler, Record) or not scaler.get("dynamic"):
        return {}
    window, last = max(1, int(scaler.get("scale_window", 1000))), int(scaler.get("last_overflow_iter", -1))
    stable = int(scaler.get("cur_iter", 0)) - last - 2  # it grows where this, of the step to come, is a multiple of the window above 0: the first time a step later than here
    good = stable % window if stable >= 0 else -1
    values = {"loss_scale": float(scaler.get("cur_scale")), "good_steps": float(good), "patience": float(scaler.get("cur_hysteresis", 1)), "skipped_steps": float(skipped)}
    return {key: Lazy.of(torch.tensor(value, dtype=torch.float32)) for key, value in values.items()}


def _number(value: Any) -> float:
    """A number, also of an enum's stand-in."""
    return _number(value.arguments[0]) if isinstance(value, Record) else float(value)

