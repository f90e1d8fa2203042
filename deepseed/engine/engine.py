"""The engine: a model in its user's loop, with DeepSpeed's names and its meaning of each.

``engine(x)`` is the model's forward on this data-parallel rank's rows; ``backward(loss)`` divides by the accumulation, scales, and leaves
gradients with those that wait; ``step()`` counts a microbatch, and at the boundary updates, and steps the schedule unless a gradient
overflowed. What is computed is what DistributedDataParallel computes: each rank's own loss, the mean of their gradients.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import deepseed
from deepseed.api import TrainStep
from deepseed.bucket import Bucket
from deepseed.build import CompileError
from deepseed.capture.gradients import LossScale
from deepseed.checkpoints import Checkpoints
from deepseed.config import Config, Settings
from deepseed.config.settings import LossScaling
from deepseed.engine.batches import to_device
from deepseed.engine.report import Report
from deepseed.engine.saving import load_checkpoint, save_16bit_model, save_checkpoint
from deepseed.ragged import CONVENTION
from deepseed.runtime import preempt
from deepseed.trained import Trained

LossFn = Callable[[nn.Module, Any], Tensor]


class Engine:
    """See ``deepseed.initialize``. What it has not itself is the model's."""

    def __init__(
        self, model: nn.Module, config: Config, found: Settings, optimizer: torch.optim.Optimizer | None, scheduler: Any, loss_fn: LossFn | None, ragged: Bucket | None, weights: str | os.PathLike[str] | None
    ) -> None:
        assert found.batch is not None
        self.__dict__["module"] = model
        self.settings, self.optimizer, self.lr_scheduler, self.loss_fn = found, optimizer, scheduler, loss_fn
        self.config: Mapping[str, Any] = config.model_dump(by_alias=True, exclude_unset=True)
        self._sizes = found.batch
        scale = loss_scale_of(found.loss_scaling)
        self.report = Report(config, self.global_rank, found.batch.train)
        self.monitor = self.report.monitor
        self.training_dataloader: Any = None
        self.micro_steps = self.global_steps = self.global_samples = 0
        self._boundary: bool | None = None
        self._rows: Iterator[Any] | None = None
        self._steps: TrainStep | None = None
        self._checkpoints: dict[str, Checkpoints] = {}  # by folder
        if optimizer is not None:
            optimizer.step = MethodType(_refused, optimizer)  # type: ignore[method-assign]
        if "+pp" in found.plan:
            made = deepseed.compile(model, found.plan, optimizer=optimizer, clip_grad_norm=found.clip_grad_norm or float("inf"), loss_scale=scale, loss_fn=loss_fn, batch="local", seed=found.seed, weights=weights, codegen=found.codegen)
            assert isinstance(made, TrainStep)
            self._steps = made
            self.compiled: Any = made
        else:
            self.compiled = Trained(
                model, found.loop_plan, optimizer=optimizer, clip_grad_norm=found.clip_grad_norm or float("inf") if optimizer is not None else None,
                loss_scale=scale if optimizer is not None else None, batch="local", seed=found.seed, buckets=ragged or CONVENTION, weights=weights,
                codegen=found.codegen,
            )  # fmt: skip

    # the loop -----------------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output for this rank's rows, in the model's own form."""
        with self.report.timed("forward", self):
            return self._loop().forward(*to_device(args, self.device), **to_device(kwargs, self.device))

    forward = __call__

    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
        """Gradients of ``loss / gradient_accumulation_steps()`` (of ``loss``, with ``scale_wrt_gas=False``) join those that wait; what was differentiated."""
        compiled = self._loop()
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            said = f"a {type(loss).__name__}" if not isinstance(loss, Tensor) else f"{list(loss.shape)}" + ("" if loss.requires_grad else ", which requires no grad")
            raise CompileError(f"engine.backward(loss): the loss is {said}\n  fix: one float made of what engine(..) returned, outside of torch.no_grad()")
        if self.module.training:
            self.report.lost(loss)
        loss = loss / self.gradient_accumulation_steps() if scale_wrt_gas and self.gradient_accumulation_steps() > 1 else loss
        scale = compiled.loss_scale if self.optimizer is not None else 1.0
        with self.report.timed("backward", self):
            torch.autograd.backward(loss * scale if scale != 1.0 else loss, retain_graph=retain_graph)
        return loss.detach()

    def scale(self, loss: Tensor) -> Tensor:
        """For a loop that calls ``backward`` on the loss itself: ``engine.scale(loss).backward()``."""
        self.report.lost(loss)
        return loss * (self._loop().loss_scale / self.gradient_accumulation_steps())

    def step(self, lr_kwargs: Mapping[str, Any] | None = None) -> None:
        """A microbatch is done; at the boundary parameters are updated, and the schedule steps."""
        compiled = self._loop()
        if self.optimizer is None:
            raise CompileError('engine.step() without an optimizer\n  fix: "optimizer" in the config, or initialize(optimizer=..)')
        boundary = self.is_gradient_accumulation_boundary()
        if boundary:
            before = compiled.skipped
            with self.report.timed("step", self):
                compiled.update()
            self._done(compiled.skipped == before, lr_kwargs)
        self.micro_steps += 1
        if boundary:
            self.report.stepped(self)

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> Tensor:
        """All microbatches of one step, from ``data_iter`` or the engine's own data: the mean loss of them over all ranks. The way a pipeline trains."""
        count = self.gradient_accumulation_steps()
        batches = [next(data_iter) if data_iter is not None else self._next_rows() for _ in range(count)]
        if self._steps is not None:
            before = self._steps.skipped
            with self.report.timed("step", self):
                loss = self._steps(to_device(_joined(batches), self.device))
            self._done(self._steps.skipped == before, None)
            self.micro_steps += count
            self.report.stepped(self, loss)
            return loss
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            loss = self._loss(batch)
            total += float(self.backward(loss))
            self.step()
        return self._mean(total)

    @torch.no_grad()
    def eval_batch(self, data_iter: Iterator[Any]) -> Tensor:
        """The mean loss over all ranks of as many batches as a step has."""
        count, mode = self.gradient_accumulation_steps(), self.module.training
        self.eval()
        try:
            if self._steps is not None:
                return self._steps.loss(to_device(_joined([next(data_iter) for _ in range(count)]), self.device))
            total = sum((float(self._loss(next(data_iter))) for _ in range(count)), 0.0)
        finally:
            self.train(mode)
        return self._mean(torch.tensor(total / count, dtype=torch.float64))

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the next ``step()`` updates."""
        return self._boundary if self._boundary is not None else (self.micro_steps + 1) % self.gradient_accumulation_steps() == 0

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Say it, until ``None`` leaves it to the count again."""
        self._boundary = is_boundary

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Legal at every stage: gradients that wait are reduced as late as the plan allows anyway."""
        yield

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients that wait."""
        self._loop().drop()

    # what is asked of it --------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.compiled.host.device  # type: ignore[no-any-return]

    @property
    def global_rank(self) -> int:
        return dist.get_rank() if dist.is_initialized() else 0

    @property
    def local_rank(self) -> int:
        return int(os.environ.get("LOCAL_RANK", "0"))

    @property
    def world_size(self) -> int:
        return dist.get_world_size() if dist.is_initialized() else 1

    @property
    def dp_world_size(self) -> int:
        return int(self.compiled.mesh.sizes.get("dp", 1))

    @property
    def dp_rank(self) -> int:
        return int(self.compiled.host.coordinates[0].get("dp", 0))

    @property
    def skipped_steps(self) -> int:
        return int(self.compiled.skipped) if self.optimizer is not None else 0

    def gradient_accumulation_steps(self) -> int:
        return self._sizes.accumulation

    def train_micro_batch_size_per_gpu(self) -> int:
        return self._sizes.micro

    def train_batch_size(self) -> int:
        return self._sizes.train

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Change how many microbatches a step has. Raises CompileError where rows do not divide."""
        each = self._sizes.micro * self.dp_world_size
        if train_batch_size <= 0 or train_batch_size % each:
            raise CompileError(f"train_batch_size={train_batch_size} is no multiple of {self._sizes.micro} rows x {self.dp_world_size} ranks = {each}\n  fix: {max(1, round(train_batch_size / each)) * each}")
        self._sizes = replace(self._sizes, train=train_batch_size, accumulation=train_batch_size // each)

    def get_lr(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups] if self.optimizer is not None else []

    def get_global_grad_norm(self) -> float | None:
        """Of the latest update, before clipping; None before the first."""
        return float(self.compiled.grad_norm) if ("norm", "grad_norm") in self.compiled._shown else None

    def was_step_applied(self) -> bool:
        """Whether the latest ``step()`` updated the parameters."""
        return self._applied

    _applied = False

    @property
    def cur_scale(self) -> float:
        return float(self.compiled.loss_scale)

    @property
    def preempted(self) -> bool:
        """Whether SIGTERM has asked to stop: the same on all ranks after each step. Then ``save_checkpoint`` and ``sys.exit(143)``. Every rank must ask."""
        return preempt.asked(self.global_steps, "engine")

    def zero_optimization(self) -> bool:
        return self.zero_optimization_stage() > 0

    def zero_optimization_stage(self) -> int:
        return int(self.compiled.plan.stage)

    def fp16_enabled(self) -> bool:
        return bool(self.compiled.plan.precision == "fp16")

    def bfloat16_enabled(self) -> bool:
        return bool(self.compiled.plan.precision == "bf16")

    def gradient_clipping(self) -> float:
        return self.settings.clip_grad_norm or 0.0

    def train(self, mode: bool = True) -> Engine:
        self.module.train(mode)
        return self

    def eval(self) -> Engine:
        return self.train(False)

    def compile(self, *_: Any, **__: Any) -> None:
        """It is compiled at its first batch."""

    def destroy(self) -> None:
        """Nothing is left to be undone: hooks there are none."""

    def offload_states(self, *_: Any, **__: Any) -> None:
        """Refused: where state lies is a part of the program."""
        raise CompileError('engine.offload_states(): state does not move between steps\n  fix: "offload_optimizer": {"device": "cpu"} in the config has it on the host at all times')

    reload_states = offload_states

    def module_state_dict(self) -> dict[str, Tensor]:
        """Whole tensors; every rank must call it."""
        return self.compiled.state_dict()  # type: ignore[no-any-return]

    state_dict = module_state_dict
    save_checkpoint, load_checkpoint, save_16bit_model = save_checkpoint, load_checkpoint, save_16bit_model

    def __getattr__(self, name: str) -> Any:
        if "module" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.__dict__["module"], name)

    # ----------------------------------------------------------------------------------------------------------------------

    def _loop(self) -> Trained:
        if not isinstance(self.compiled, Trained):
            raise CompileError(f"{self.settings.plan}: a pipeline runs a step as a whole\n  fix: engine.train_batch(data_iter)")
        return self.compiled

    def _done(self, applied: bool, lr_kwargs: Mapping[str, Any] | None) -> None:
        self._applied = applied
        self.global_steps += 1
        self.global_samples += self.train_batch_size()
        if applied and self.lr_scheduler is not None:
            self.lr_scheduler.step(**(lr_kwargs or {}))

    def _loss(self, batch: Any) -> Tensor:
        """The model's own loss, or the user's."""
        if self.loss_fn is not None:
            found: Any = self.loss_fn(self, batch)  # type: ignore[arg-type]
        else:
            out = self(**batch) if isinstance(batch, Mapping) else self(*batch) if isinstance(batch, tuple | list) else self(batch)
            found = out if isinstance(out, Tensor) else out["loss"] if isinstance(out, Mapping) else getattr(out, "loss", None)
        if not isinstance(found, Tensor) or found.numel() != 1:
            raise CompileError(f"train_batch: {type(self.module).__name__} gave no loss\n  fix: initialize(loss_fn=lambda model, batch: ...)")
        return found

    def _mean(self, total: Tensor) -> Tensor:
        """Over the ranks."""
        if self.world_size > 1:
            total = total.to(self.device if self.device.type != "mps" else "cpu")
            dist.all_reduce(total)
        return total / self.world_size

    def _next_rows(self) -> Any:
        """The next microbatch of the engine's own data, epoch after epoch."""
        if self.training_dataloader is None:
            raise CompileError("train_batch() without an iterator, and initialize had no training_data\n  fix: train_batch(iter(loader))")
        for _ in range(2):
            if self._rows is None:
                self._rows = iter(self.training_dataloader)
            for batch in self._rows:
                return batch
            self._rows = None
        raise CompileError("train_batch(): the dataset has no rows")


def _refused(self: torch.optim.Optimizer, closure: Any = None) -> None:
    """In place of an engine's ``optimizer.step``, which would find no gradients and train nothing."""
    raise CompileError(f"{type(self).__name__}.step(): the engine updates the parameters\n  fix: engine.step(); the gradients that wait are the engine's")


_refused._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # or a scheduler that is made later would wrap it, and one made before warn


def _joined(batches: list[Any]) -> Any:
    """The rows of all microbatches, one after another."""
    first = batches[0]
    if len(batches) == 1:
        return first
    if isinstance(first, Mapping):
        return {key: _joined([b[key] for b in batches]) for key in first}
    if isinstance(first, tuple | list):
        return type(first)(_joined([b[n] for b in batches]) for n in range(len(first)))
    return torch.cat(batches) if isinstance(first, Tensor) and first.dim() else first


def loss_scale_of(found: LossScaling | None) -> LossScale | float | None:
    if found is None:
        return None
    if found.static:
        return found.static
    return LossScale(found.initial, found.window, minimum=found.minimum, hysteresis=found.hysteresis)
