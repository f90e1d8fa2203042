"""The Trainer of Hugging Face on a compiled plan: ``DeepSeedTrainer``, or ``class Mine(DeepSeedMixin, SFTTrainer)``, or ``enable(trainer)``.

Everything but four things is the Trainer's own: what it is given as the wrapped model (deepseed.trained), who clips and updates, and how weights
and optimizer state get into its files. ``--deepspeed ds.json`` and ``DeepSeedTrainingArguments(deepspeed=..)`` say the plan, no other package is needed.
"""

from __future__ import annotations

import contextlib
import os
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn

from deepseed.build import CompileError
from deepseed.config import Config, ConfigError, Settings, read, settings
from deepseed.config.auto import fill
from deepseed.config.objects import optimizer_of, scheduler_of
from deepseed.config.read import raw_config
from deepseed.engine.engine import loss_scale_of
from deepseed.ragged import CONVENTION
from deepseed.trained import Trained

STATE = "deepseed"  # the folder in a checkpoint that has the optimizer's state, and what else a step needs
DEFAULT: Mapping[str, Any] = {"zero_optimization": {"stage": 2}}  # of a Trainer that was given no config


class DeepSeedArguments:
    """Before any class of training arguments: ``class Arguments(DeepSeedArguments, SFTConfig)``. ``deepspeed``: a ds_config.json as path or dict."""

    if TYPE_CHECKING:  # the annotation itself is that of the class that follows, from which command lines are made
        deepspeed: Any

    def __post_init__(self) -> None:
        self.deepseed, self.deepspeed = self.deepspeed, None  # the Trainer's own glue needs the package of that name
        super().__post_init__()  # type: ignore[misc]


@dataclass
class DeepSeedTrainingArguments(DeepSeedArguments, transformers.TrainingArguments):
    """``transformers.TrainingArguments``, whose ``--deepspeed FILE`` is DeepSeed's."""


class DeepSeedMixin:
    """Before a Trainer class. The config is ``args.deepseed``, as ``DeepSeedTrainingArguments`` has it; without one ZeRO-2."""

    args: Any
    model: Any
    model_wrapped: Any
    accelerator: Any
    optimizer: Any
    lr_scheduler: Any
    deepseed_config: Any = None
    _deepseed_weights: Mapping[str, Tensor] | None = None  # whole, while they are saved

    # the plan ---------------------------------------------------------------------------------------------------------------

    def _deepseed(self, steps: int | None = None) -> tuple[Config, Settings]:
        """What the config says, with "auto" filled in from the arguments; without the number of steps there is no schedule in it."""
        config = dict(raw_config(self.deepseed_config or getattr(self.args, "deepseed", None) or DEFAULT)[0])
        if steps is None:
            config.pop("scheduler", None)
        for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
            config.setdefault(key, "auto")
        for word in ("bf16", "fp16"):  # the Trainer's argument is enough
            if getattr(self.args, word):
                config.setdefault("bfloat16" if word == "bf16" and "bfloat16" in config else word, {"enabled": True})
        filled = read(fill(config, self.args, getattr(self.model, "config", None), steps if steps is not None else 1))
        found = settings(filled, self.args.world_size)
        shared = [word for word in found.plan.split("+") if word.startswith(("tp", "sp", "pp"))]
        if shared:
            raise ConfigError(f"{'+'.join(shared)}: the Trainer gives every rank rows of its own, which ranks of {shared[0]} would have to share\n  fix: zero alone, or deepseed.compile in a loop of your own")
        if self.args.fsdp:
            raise ConfigError("fsdp: the plan shares parameters already, and both cannot\n  fix: leave fsdp= out; zero3 is what full_shard is")
        if self.args.auto_find_batch_size:
            raise ConfigError(
                "auto_find_batch_size: a rank that runs out of memory would try again with fewer rows, and the others would wait for it\n"
                "  fix: set per_device_train_batch_size; `deepseed explain` predicts each rank's memory, and more gradient_accumulation_steps keep the global batch"
            )
        return filled, found

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The config's where it names one, else the Trainer's; ``step()`` does nothing, since the compiled update has done it."""
        if self.optimizer is None:
            config, _ = self._deepseed()
            if config.optimizer is not None:
                self.optimizer = optimizer_of(config, self.model.named_parameters())
        found: torch.optim.Optimizer = super().create_optimizer(model)  # type: ignore[misc]
        found.step = types.MethodType(_updated, found)  # type: ignore[method-assign]
        return found

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        config, _ = self._deepseed(num_training_steps)
        if self.lr_scheduler is None and config.scheduler is not None:
            self.lr_scheduler = scheduler_of(config, _bare(self.optimizer if optimizer is None else optimizer))
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]

    # the loop ---------------------------------------------------------------------------------------------------------------

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        wrapped = self.model_wrapped
        if isinstance(wrapped, Trained) and (model is wrapped or wrapped.model is model):
            return wrapped
        if not training:
            return model
        _, found = self._deepseed()
        made = Trained(
            model, found.loop_plan, optimizer=_bare(self.optimizer), clip_grad_norm=self.args.max_grad_norm or float("inf"), loss_scale=loss_scale_of(found.loss_scaling),
            batch="local", seed=self.args.seed, buckets=CONVENTION,
        )  # fmt: skip
        self._take_accelerator(made)
        return made

    def _take_accelerator(self, made: Trained) -> None:
        """Backward, clipping and the update are the compiled ones; precision is the plan's; what is unwrapped is the model."""
        accelerator, unwrap = self.accelerator, type(self.accelerator).unwrap_model
        accelerator.scaler = None

        def backward(loss: Tensor, **_: Any) -> None:
            torch.autograd.backward(loss * made.loss_scale if made.loss_scale != 1.0 else loss)

        def clip_grad_norm_(parameters: Any, max_norm: float, norm_type: int = 2) -> Tensor:
            before = made.skipped
            made.update()
            self.optimizer._is_overflow = made.skipped != before  # then the schedule waits
            return made.grad_norm.float()

        def unwrap_model(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return unwrap(accelerator, model.model if isinstance(model, Trained) else model, *args, **kwargs)

        accelerator.backward, accelerator.clip_grad_norm_, accelerator.unwrap_model = backward, clip_grad_norm_, unwrap_model

    def compute_loss_context_manager(self) -> Any:
        """No autocast: the plan says in which dtype the model computes, and the module is compiled so."""
        return contextlib.nullcontext() if isinstance(self.model_wrapped, Trained) else super().compute_loss_context_manager()  # type: ignore[misc]

    def compute_loss(self, model: Any, inputs: Any, *args: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
        if isinstance(num_items_in_batch, int):  # else each number would be a program of its own
            num_items_in_batch = torch.tensor(num_items_in_batch)
        return super().compute_loss(model, inputs, *args, num_items_in_batch=num_items_in_batch, **kwargs)  # type: ignore[misc]

    def prediction_step(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Generation reads the model's parameters itself, so it has them whole."""
        if isinstance(model, Trained) and getattr(self.args, "predict_with_generate", False):
            with model.gathered():
                return super().prediction_step(model.model, *args, **kwargs)  # type: ignore[misc]
        return super().prediction_step(model, *args, **kwargs)  # type: ignore[misc]

    # files ------------------------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Files that ``from_pretrained`` reads; of a model of PEFT the adapter. Every rank must call it."""
        made = self.model_wrapped
        self._deepseed_weights = made.state_dict() if isinstance(made, Trained) and made.states else None
        try:
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        finally:
            self._deepseed_weights = None

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict=self._deepseed_weights if state_dict is None else state_dict)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        made = self.model_wrapped
        assert isinstance(made, Trained)
        made.save(os.path.join(output_dir, STATE), frozen=False)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, "scheduler.pt"))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not os.path.isdir(os.path.join(checkpoint, STATE)):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        self.model_wrapped.load(os.path.join(checkpoint, STATE))
        self.lr_scheduler.load_state_dict(torch.load(os.path.join(checkpoint, "scheduler.pt"), weights_only=True))


class DeepSeedTrainer(DeepSeedMixin, transformers.Trainer):
    """``transformers.Trainer`` on a compiled plan."""


def enable(trainer: transformers.Trainer, config: Any = None) -> transformers.Trainer:
    """Make a Trainer that a script has built one of DeepSeed's, before ``train()``. ``config``: a ds_config.json as path or dict. Raises CompileError after it."""
    if isinstance(trainer.model_wrapped, Trained) or trainer.model_wrapped is not trainer.model:
        raise CompileError(f"enable({type(trainer).__name__}): its model is wrapped already\n  fix: enable it before train() and evaluate()")
    if not isinstance(trainer, DeepSeedMixin):
        trainer.__class__ = type(f"DeepSeed{type(trainer).__name__}", (DeepSeedMixin, type(trainer)), {})
    trainer.deepseed_config = config  # type: ignore[attr-defined]
    return trainer


def _updated(self: torch.optim.Optimizer, closure: Any = None) -> None:
    """The compiled update has stepped already."""


def _bare(optimizer: Any) -> Any:
    """The torch optimizer in Accelerate's wrapper."""
    inner = getattr(optimizer, "optimizer", None)
    return inner if isinstance(inner, torch.optim.Optimizer) else optimizer
