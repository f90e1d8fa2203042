""""auto", as the HF Trainer defines it: a key that says "auto" is filled in from the Trainer's arguments, any other value must equal them.

A key that is absent stays absent. Two stages: what the arguments know when they are made, then what needs the model and the number of steps.
All mismatches are reported at once, at the end, in the Trainer's words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from math import prod
from types import SimpleNamespace
from typing import Any

from deepseed.config.fields import AUTO, ConfigError

BY_HIDDEN_SIZE = ("zero_optimization.reduce_bucket_size", "zero_optimization.stage3_prefetch_bucket_size", "zero_optimization.stage3_param_persistence_threshold")
FILLED = (  # the keys that may say "auto"
    "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping", "optimizer.params.lr", "optimizer.params.betas", "optimizer.params.eps",
    "optimizer.params.weight_decay", "scheduler.params.warmup_min_lr", "scheduler.params.warmup_max_lr", "fp16.enabled", "bf16.enabled", *BY_HIDDEN_SIZE,
    "scheduler.params.total_num_steps", "scheduler.params.warmup_num_steps",
)  # fmt: skip
DEFAULTS = SimpleNamespace(  # of transformers' TrainingArguments
    world_size=1, per_device_train_batch_size=8, gradient_accumulation_steps=1, max_grad_norm=1.0, learning_rate=5e-5, adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8,
    weight_decay=0.0, save_on_each_node=False, fp16=False, fp16_full_eval=False, bf16=False, bf16_full_eval=False, get_warmup_steps=lambda steps: 0,
)  # fmt: skip
AXES = (("tensor_parallel", "autotp_size"), ("tensor_parallel", "tp_size"), ("sequence_parallel_size",), ("pipeline", "stages"))  # ranks that share their rows


@dataclass
class Filling:
    """A config on its way; ``mismatches``: a line each. ``strict``: other values must be the arguments'."""

    config: dict[str, Any]
    strict: bool = True
    mismatches: list[str] = field(default_factory=list)

    def from_arguments(self, arguments: Any, auto_find_batch_size: bool = False) -> None:
        """The first stage. ``arguments``: whatever has the attributes of transformers' TrainingArguments. ``auto_find_batch_size``: the batch may differ."""
        a = arguments
        self._match("train_micro_batch_size_per_gpu", a.per_device_train_batch_size, None if auto_find_batch_size else "per_device_train_batch_size")
        self._match("gradient_accumulation_steps", a.gradient_accumulation_steps, "gradient_accumulation_steps")
        rows = a.world_size // self._sharing() * a.per_device_train_batch_size * a.gradient_accumulation_steps
        self._match("train_batch_size", rows, None if auto_find_batch_size else "train_batch_size (calculated)")
        self._match("gradient_clipping", a.max_grad_norm, "max_grad_norm")
        self._match("optimizer.params.lr", a.learning_rate, "learning_rate")
        self._match("optimizer.params.betas", [a.adam_beta1, a.adam_beta2], "adam_beta1+adam_beta2")
        self._match("optimizer.params.eps", a.adam_epsilon, "adam_epsilon")
        self._match("optimizer.params.weight_decay", a.weight_decay, "weight_decay")
        self._match("scheduler.params.warmup_min_lr", 0)
        self._match("scheduler.params.warmup_max_lr", a.learning_rate, "learning_rate")
        if a.save_on_each_node:
            self.config["checkpoint"] = {**self.config.get("checkpoint", {}), "use_node_local_storage": a.save_on_each_node}
        self._match("fp16.enabled", a.fp16 or a.fp16_full_eval, "fp16|fp16_full_eval")
        self._match("bf16.enabled", a.bf16 or a.bf16_full_eval, "bf16|bf16_full_eval")

    def from_model(self, arguments: Any, model_config: Any, num_training_steps: int) -> None:
        """The second stage, as training begins. Raises ConfigError for a hidden size that is needed and not there, and for all mismatches."""
        if autos := [key for key in BY_HIDDEN_SIZE if self._get(key) == AUTO]:
            h = hidden_size(model_config)
            if h is None:
                raise ConfigError(
                    "The model's config file has neither `hidden_size` nor `hidden_sizes` entry, therefore it's not possible to automatically fill out the following `auto` "
                    f"entries in the DeepSpeed config file: {autos}. You can fix that by replacing `auto` values for these keys with an integer value of your choice."
                )
            sizes = (h * h, int(0.9 * h * h), 10 * h)
            for key, size in list(zip(BY_HIDDEN_SIZE, sizes, strict=True))[: 3 if self._get("zero_optimization.stage") == 3 else 1]:
                self._match(key, size)
            for key in BY_HIDDEN_SIZE[1:]:  # below stage 3 nothing reads them
                if self._get("zero_optimization.stage") != 3 and self._get(key) == AUTO:
                    del self.config["zero_optimization"][key.partition(".")[2]]
        self._match("scheduler.params.total_num_steps", num_training_steps, "num_training_steps (calculated)")
        self._match("scheduler.params.warmup_num_steps", max(1, arguments.get_warmup_steps(num_training_steps)), "warmup_steps")
        if self.mismatches:
            raise ConfigError(
                "Please correct the following DeepSpeed config values that mismatch TrainingArguments values:\n" + "\n".join(self.mismatches)
                + "\nThe easiest method is to set these DeepSpeed config values to 'auto'."
            )  # fmt: skip

    def _match(self, path: str, value: Any, argument: str | None = None) -> None:
        """Fill ``path`` in, or note that it is not ``argument``'s value; without an argument it may be any."""
        *parents, key = path.split(".")
        node = self._node(parents)
        if node is None or node.get(key) is None:
            return
        if node[key] == AUTO:
            node[key] = value
        elif self.strict and argument is not None and node[key] != value:
            self.mismatches.append(f"- ds {path}={node[key]} vs hf {argument}={value}")

    def _get(self, path: str) -> Any:
        *parents, key = path.split(".")
        node = self._node(parents)
        return None if node is None else node.get(key)

    def _node(self, parents: Sequence[str]) -> dict[str, Any] | None:
        node: Any = self.config
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        return node if isinstance(node, dict) else None

    def _sharing(self) -> int:
        """How many ranks work on the same rows."""
        said = [self._get(".".join(path)) for path in AXES]
        tp, other_tp, *rest = [n if isinstance(n, int) and n > 1 else 1 for n in said]
        return prod([max(tp, other_tp), *rest])


def fill(config: Mapping[str, Any], arguments: Any, model_config: Any = None, num_training_steps: int | None = None, auto_find_batch_size: bool = False) -> dict[str, Any]:
    """A copy of ``config`` with both stages done; the first alone where ``num_training_steps`` is not known. Raises ConfigError.

    >>> from types import SimpleNamespace
    >>> arguments = SimpleNamespace(world_size=2, per_device_train_batch_size=4, gradient_accumulation_steps=8, max_grad_norm=1.0, learning_rate=5e-5, adam_beta1=0.9,
    ...     adam_beta2=0.999, adam_epsilon=1e-8, weight_decay=0.0, save_on_each_node=False, fp16=False, fp16_full_eval=False, bf16=True, bf16_full_eval=False)
    >>> fill({"train_batch_size": "auto", "bf16": {"enabled": "auto"}}, arguments)
    {'train_batch_size': 64, 'bf16': {'enabled': True}}
    """
    filling = Filling(deepcopy(dict(config)))
    filling.from_arguments(arguments, auto_find_batch_size)
    if num_training_steps is not None:
        filling.from_model(arguments, model_config, num_training_steps)
    return filling.config


def by_default(config: Mapping[str, Any], world_size: int | None = None) -> dict[str, Any]:
    """A copy of ``config`` with every "auto" as the Trainer's default arguments and a model of hidden size 1024 fill it in."""
    filling = Filling(deepcopy(dict(config)), strict=False)
    arguments = SimpleNamespace(**{**vars(DEFAULTS), "world_size": world_size or filling._sharing()})
    filling.from_arguments(arguments)
    filling.from_model(arguments, SimpleNamespace(hidden_size=1024), 1000)
    return filling.config


def hidden_size(model_config: Any) -> int | None:
    """The largest where there are several; a model of text and more has it with its text."""
    of: Any
    for of in (model_config, getattr(model_config, "text_config", None)):
        if hasattr(of, "hidden_size"):
            return None if of.hidden_size is None else int(of.hidden_size)
        if hasattr(of, "hidden_sizes"):
            return int(max(of.hidden_sizes))
    return None
