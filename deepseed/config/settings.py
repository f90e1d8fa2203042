"""What a config asks for, in DeepSeed's words: a plan, an optimizer, a scheduler, a loss scale, the sizes of batches."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from deepseed.config.batch import Batch, check_without_ranks, triangle
from deepseed.config.fields import AUTO, ConfigError, Section
from deepseed.config.model import CODEGEN, Config, OffloadOptimizer, OffloadParam
from deepseed.config.verdicts import rejections


@dataclass(frozen=True)
class LossScaling:
    """fp16's loss scale. ``static``: 0 is dynamic."""

    static: float
    initial: float
    window: int
    hysteresis: int
    consecutive: bool
    minimum: float


@dataclass(frozen=True)
class Settings:
    """``plan``: the plan that equals the file, without dp where the number of ranks is not known. ``batch``: None where it is not either."""

    plan: str
    batch: Batch | None
    clip_grad_norm: float | None
    optimizer: tuple[str, Mapping[str, Any]] | None = None  # a class of torch.optim, or one of config.objects.OWN; its arguments
    scheduler: tuple[str, Mapping[str, Any]] | None = None
    loss_scaling: LossScaling | None = None
    drop_last: bool = False
    seed: int = 0
    asynchronous: bool = False  # checkpoints are written while training goes on
    codegen: str = "python"

    @property
    def loop_plan(self) -> str:
        """The plan without microbatches: of a loop that accumulates itself."""
        return "+".join(word for word in self.plan.split("+") if not re.fullmatch(r"mb\d+", word))


def settings(config: Config, world_size: int | None = None) -> Settings:
    """Raises ConfigError for what is rejected, contradicts itself, or is ``auto`` where no Trainer has filled it in."""
    from deepseed.config.objects import clipping_of, optimizer_choice, scheduler_choice

    if found := rejections(config):
        raise ConfigError("\n".join(f"{v.key} is not supported: {v.note}" for v in found))
    if auto := _autos(config, ""):
        raise ConfigError(f'{", ".join(auto)}: "auto" is filled in by the HF Trainer\n  fix: a number, or train with deepseed.hf.DeepSeedTrainer')
    if (prints := _int(config.steps_per_print)) is not None and prints < 0:
        raise ConfigError(f"steps_per_print is {prints}\n  fix: a number of steps; 0 or null prints nothing")
    words, ranks = _ranks(config, world_size)
    rows = _int(config.train_batch_size), _int(config.train_micro_batch_size_per_gpu), _int(config.gradient_accumulation_steps)
    batch = triangle(*rows, ranks) if ranks is not None else None
    if ranks is None:
        check_without_ranks(*rows)
    accumulation = batch.accumulation if batch is not None else _int(config.gradient_accumulation_steps) or 1
    words += [f"mb{accumulation}"] if accumulation > 1 else []
    words += _precision(config) + _memory(config)
    return Settings(
        plan="+".join(words) or "zero0", batch=batch, clip_grad_norm=clipping_of(config) or None, optimizer=optimizer_choice(config), scheduler=scheduler_choice(config),
        loss_scaling=_scaling(config), drop_last=bool(config.dataloader_drop_last), seed=int(config.seed or 0),
        asynchronous=bool((config.checkpoint.writer or {}).get("decoupled")), codegen=config.compile.backend if config.compile.backend in CODEGEN else "python",
    )  # fmt: skip


def _ranks(config: Config, world_size: int | None) -> tuple[list[str], int | None]:
    """The words of the mesh, and how many data-parallel ranks there are."""
    split, inner = config.tensor_parallel, config.tensor_parallel.tensor_parallel
    tp = max(int(split.autotp_size), int(split.tp_size), int(inner.tp_size) if inner is not None else 1, 1)
    axes = {"sp": max(int(config.sequence_parallel_size), 1), "tp": tp, "pp": max(int(config.pipeline.stages), 1)}
    words = [f"zero{config.zero_optimization.stage}"] + [f"{axis}{n}" for axis, n in axes.items() if n > 1]
    if world_size is None:
        return words, None
    each = prod(axes.values())
    if world_size % each:
        said = " x ".join(f"{axis}{n}" for axis, n in axes.items() if n > 1)
        raise ConfigError(f"{said} = {each} does not divide {world_size} ranks\n  fix: start a multiple of {each} ranks")
    return [words[0], f"dp{world_size // each}", *words[1:]], world_size // each


def _precision(config: Config) -> list[str]:
    bf16 = bool(config.bf16.enabled or (config.bfloat16 is not None and config.bfloat16.enabled))
    if config.fp16.enabled and bf16:
        raise ConfigError("bfloat16 and fp16 modes cannot be simultaneously enabled")
    words = ["fp16"] if config.fp16.enabled else ["bf16"] if bf16 else []
    said = config.data_types.grad_accum_dtype or config.communication_data_type or ("fp32" if config.fp32_allreduce else None)
    if said and said not in ("fp32", "bf16", "fp16"):
        raise ConfigError(f"communication_data_type is {said!r}: one of fp32, bf16, fp16")
    if said and said != (words or ["fp32"])[0]:
        words.append(f"grads({said})")
    return words


def _memory(config: Config) -> list[str]:
    zero, checkpointing = config.zero_optimization, config.activation_checkpointing
    optimizer = zero.offload_optimizer or OffloadOptimizer(device="cpu" if zero.cpu_offload or config.compile.offload_opt_states else "none")
    params = zero.offload_param or OffloadParam(device="cpu" if zero.cpu_offload_param or config.compile.offload_parameters else "none")
    on = [name for name, device in (("optimizer", optimizer.device), ("params", params.device)) if device in ("cpu", "nvme")]
    if "params" in on and zero.stage != 3:
        raise ConfigError(f"offload_param needs ZeRO stage 3, the stage is {zero.stage}\n  fix: \"stage\": 3, or leave offload_param out")
    if "optimizer" in on and zero.stage == 0:
        raise ConfigError('offload_optimizer needs ZeRO stage 1, 2 or 3, the stage is 0\n  fix: "stage": 1')
    disks = {section.nvme_path for section in (optimizer, params) if section.device == "nvme"}
    if None in disks:
        raise ConfigError('the device "nvme" needs "nvme_path", a folder\n  fix: name one, or use the device "cpu"')
    if len(disks) > 1:
        raise ConfigError(f"offload_optimizer and offload_param name two folders: {', '.join(map(str, sorted(map(str, disks))))}\n  fix: one folder for both")
    on += ["activations"] if checkpointing.cpu_checkpointing or config.compile.offload_activation else []
    remat = bool(checkpointing.partition_activations or checkpointing.number_checkpoints or config.pipeline.activation_checkpoint_interval)
    words = ["remat"] if remat else []
    return words + ([f"offload({','.join(on)}{f',disk={disks.pop()}' if disks else ''})"] if on else [])


def _scaling(config: Config) -> LossScaling | None:
    f = config.fp16
    if not f.enabled:
        return None
    return LossScaling(
        float(f.loss_scale), 2.0 ** int(f.initial_scale_power), int(f.loss_scale_window), int(f.hysteresis), bool(f.consecutive_hysteresis), float(f.min_loss_scale)
    )


def _autos(section: Section, prefix: str) -> list[str]:
    """Paths of the keys that are still ``auto``."""
    out: list[str] = []
    for name, info in type(section).model_fields.items():
        value, key = getattr(section, name), f"{prefix}{info.alias or name}"
        if isinstance(value, Section):
            out += _autos(value, f"{key}.")
        elif isinstance(value, dict):
            out += [f"{key}.{k}" for k, v in value.items() if v == AUTO]
        elif value == AUTO:
            out.append(key)
    return out


def _int(value: Any) -> int | None:
    return None if value is None else int(value)
