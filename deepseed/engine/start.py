"""``initialize`` and what a script calls before it: arguments of its command line, the process group."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler

from deepseed.bucket import Bucket
from deepseed.config import ConfigError, read, settings
from deepseed.config.objects import optimizer_of, scheduler_of
from deepseed.config.read import Source
from deepseed.engine.data import loader_of
from deepseed.engine.engine import Engine
from deepseed.runtime.distributed import start
from deepseed.runtime.host import launched

Optimizer = torch.optim.Optimizer
Scheduler = LRScheduler | Any  # anything with step(), as DeepSpeed takes it


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Optimizer | Callable[[Iterable[Any]], Optimizer] | None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Any = None,
    lr_scheduler: Scheduler | Callable[[Optimizer], Scheduler] | None = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[[Any], Any] | None = None,
    config: Source | None = None,
    config_params: Source | None = None,
    *,
    loss_fn: Callable[[nn.Module, Any], torch.Tensor] | None = None,
    ragged: Bucket | None = None,
    weights: str | os.PathLike[str] | None = None,
) -> tuple[Engine, Optimizer | None, Any, Scheduler | None]:
    """(engine, optimizer, data loader, scheduler), as ``deepspeed.initialize``; what was not asked for is None.

    model: any ``nn.Module``. optimizer: over its parameters, or what makes one of them; else the config's. model_parameters: what the config's
    optimizer gets; by default all that require grad. training_data: a dataset, from which each data-parallel rank loads its own rows.
    config: a ds_config.json as path, dict, JSON text or base64; also ``args.deepspeed_config``. loss_fn: for ``train_batch`` of a model that returns no
    loss. ragged: how batches are padded whose lengths differ from rank to rank, and to which lengths; by default HF's names, to the longest.
    weights: files that parameters are read from, as of ``deepseed.compile``: the model may be on the meta device.
    Raises ConfigError, PlanError and CompileError.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"initialize(model={type(model).__name__})\n  fix: an nn.Module")
    if isinstance(model, DataParallel | DistributedDataParallel):
        raise ConfigError(f"initialize(model={type(model).__name__}): ranks are the engine's own\n  fix: the model inside of it, model.module")
    if mpu is not None:
        raise ConfigError('initialize(mpu=..): ranks have their places from the plan\n  fix: "tensor_parallel": {"autotp_size": N} in the config, or a plan')
    named = getattr(args, "deepspeed_config", None) or getattr(args, "deepscale_config", None)
    given = [source for source in (config, config_params, named) if source is not None]
    if not given:
        raise ConfigError("initialize without a config\n  fix: config=, or --deepspeed_config FILE on the command line and args=")
    if len({str(source) for source in given}) > 1:
        raise ConfigError(f"two configs: {given[0]} and {given[1]}\n  fix: one of config= and --deepspeed_config")
    if dist_init_required is not False:
        init_distributed(distributed_port=distributed_port)
    parsed = read(given[0])
    found = settings(parsed, dist.get_world_size() if dist.is_initialized() else 1)
    if optimizer is not None and hasattr(optimizer, "params") and not hasattr(optimizer, "step"):  # a placeholder for the config's, as Accelerate's DummyOptim
        optimizer, model_parameters = None, getattr(optimizer, "params")  # noqa: B009
        if parsed.optimizer is None:
            raise ConfigError('initialize(optimizer=..) is a placeholder, and the config has no optimizer\n  fix: "optimizer" in the config')
    if optimizer is None:
        made = optimizer_of(parsed, model_parameters if model_parameters is not None else model.named_parameters())
    elif isinstance(optimizer, Optimizer):
        made = optimizer
    elif callable(optimizer) and not hasattr(optimizer, "params"):
        made = optimizer([p for p in (model_parameters if model_parameters is not None else model.parameters()) if p.requires_grad])
    else:
        raise ConfigError(f"initialize(optimizer={type(optimizer).__name__})\n  fix: an optimizer of torch's kind, or a function that makes one of parameters")
    scheduler = lr_scheduler
    if made is not None:
        scheduler = scheduler_of(parsed, made) if lr_scheduler is None else lr_scheduler(made) if callable(lr_scheduler) and not hasattr(lr_scheduler, "step") else lr_scheduler
    engine = Engine(model, parsed, found, made, scheduler, loss_fn, ragged, weights)
    if training_data is not None:
        engine.training_dataloader = loader_of(training_data, engine, collate_fn, found)
    return engine, made, engine.training_dataloader, scheduler


def init_distributed(dist_backend: str | None = None, auto_mpi_discovery: bool = True, distributed_port: int = 29500, verbose: bool = True, **_: Any) -> None:
    """Join the process group that a launcher, torchrun, srun or mpirun describes; alone, a group of one. A second call does nothing."""
    if dist.is_initialized():
        return
    if launched():
        start(dist_backend)
    else:
        dist.init_process_group(dist_backend or "gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """``--deepspeed`` and ``--deepspeed_config FILE``, as DeepSpeed's scripts have them."""
    group = parser.add_argument_group("DeepSeed", "a ds_config.json")
    group.add_argument("--deepspeed", default=False, action="store_true", help="train by the config (a script asks for it)")
    group.add_argument("--deepspeed_config", default=None, type=str, help="path of a ds_config.json")
    return parser
