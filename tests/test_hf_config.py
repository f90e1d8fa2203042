"""What the HF Trainer makes of a config and of its arguments, in one process: precision, optimizer and schedule from the file, and each refusal as a user reads it."""

from __future__ import annotations

import inspect
import math
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate")

import transformers
from gloo.trainer import STOCK, config, curves_apart, train, weights_apart
from torch import nn

from deepseed.build import CompileError
from deepseed.config import ConfigError
from deepseed.hf import DeepSeedMixin, DeepSeedTrainingArguments, enable
from deepseed.lr_schedules import WarmupDecayLR

OURS = ("_deepseed", "_take_accelerator")


def test_the_methods_that_the_mixin_overrides_are_the_trainers() -> None:
    """Four make a Trainer DeepSeed's; the others are files, schedule, precision and generation."""
    overridden = {name for name, f in vars(DeepSeedMixin).items() if callable(f) and name not in OURS and not name.startswith("__")}
    assert overridden == {
        "create_optimizer", "_wrap_model", "compute_loss", "save_model",
        "create_scheduler", "compute_loss_context_manager", "prediction_step", "_save", "_save_optimizer_and_scheduler", "_load_optimizer_and_scheduler",
    }  # fmt: skip
    for name in overridden:
        theirs, mine = (inspect.signature(getattr(c, name)).parameters for c in (transformers.Trainer, DeepSeedMixin))
        open_ended = any(p.kind is p.VAR_POSITIONAL for p in mine.values())
        assert open_ended or list(theirs) == list(mine), name
    source = inspect.getsource(transformers.Trainer)
    assert "use_accelerator_prepare = model is self.model" in source and "self.accelerator.backward(loss" in source and "self.accelerator.clip_grad_norm_(" in source
    assert "not self.accelerator.optimizer_step_was_skipped" in source


def test_one_process(tmp_path: Path) -> None:
    ours, stock = (train(str(tmp_path), kind) for kind in ({"zero_optimization": {"stage": 2}}, STOCK))
    assert curves_apart(ours, stock) <= 1e-6 and weights_apart(ours.weights, stock.weights) <= 1e-6


def test_optimizer_and_schedule_of_the_config(tmp_path: Path) -> None:
    params = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
    rates = dict.fromkeys(("total_num_steps", "warmup_min_lr", "warmup_max_lr"), "auto") | {"warmup_num_steps": 3, "warmup_type": "linear"}
    said = {"optimizer": {"type": "Adam", "params": {**params, "adam_w_mode": False}}, "scheduler": {"type": "WarmupDecayLR", "params": {**rates}}}
    run = train(str(tmp_path), config(1, **said), warmup_steps=3, adam_beta1=0.8)
    optimizer = run.trainer.optimizer.optimizer
    assert type(optimizer).__name__ == "Adam" and optimizer.defaults["betas"] == (0.8, 0.999) and optimizer.defaults["lr"] == 0.01
    alone = WarmupDecayLR(type(optimizer)([nn.Parameter(nn.Linear(1, 1).weight)], lr=0.01), total_num_steps=4, warmup_max_lr=0.01, warmup_num_steps=3, warmup_type="linear")
    want = []
    for _ in range(4):
        want.append(alone.optimizer.param_groups[0]["lr"])
        alone.optimizer.step(), alone.step()
    assert run.curve("learning_rate") == want and len(set(want)) > 2


def test_an_overflow_leaves_weights_and_schedule(tmp_path: Path) -> None:
    """A loss scale of 2**40 is halved until the gradients are finite in float16; until then the schedule waits."""
    run = train(str(tmp_path), config(1, fp16={"enabled": "auto", "initial_scale_power": 40, "hysteresis": 1}), fp16=True, max_steps=27, warmup_steps=2)
    skipped = [not math.isfinite(log["grad_norm"]) for log in run.logs]
    assert "fp16" in str(run.trainer.model_wrapped.plan) and sum(skipped) == run.trainer.model_wrapped.skipped > 5 and not any(skipped[sum(skipped) :])
    assert run.trainer.model_wrapped.loss_scale == 2.0 ** (40 - sum(skipped))
    rates = run.curve("learning_rate")
    assert rates[: sum(skipped) + 1] == [0.0] * (sum(skipped) + 1) and rates[sum(skipped) + 1] == 0.005, "the first step that counts has the schedule's first rate"


def test_bf16_of_the_arguments_is_the_plans(tmp_path: Path) -> None:
    """In float32 the loss is another; Accelerate's autocast keeps some ops in float32, so that bfloat16's own rounding is what is allowed."""
    ours, stock = (train(str(tmp_path), kind, bf16=True) for kind in (1, STOCK))
    exact = train(str(tmp_path), 1)
    assert "bf16" in str(ours.trainer.model_wrapped.plan) and curves_apart(ours, exact, "loss") > 1e-7
    assert curves_apart(ours, stock, "loss") <= 2.0**-8 and all(t.dtype.itemsize == 4 for t in ours.weights.values())


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (config(2, train_micro_batch_size_per_gpu=4, gradient_clipping=0.1), {}, r"Please correct the following .*\n- ds train_micro_batch_size_per_gpu=4 vs hf per_device_train_batch_size=2\n- ds gradient_clipping=0.1 vs hf max_grad_norm=0.5\nThe easiest method is to set these DeepSpeed config values to 'auto'."),
    (config(2, scheduler={"type": "WarmupDecayLR", "params": {"total_num_steps": 77}}), {}, r"- ds scheduler.params.total_num_steps=77 vs hf num_training_steps \(calculated\)=4"),
    (config(2, bf16={"enabled": True}), {}, r"- ds bf16.enabled=True vs hf bf16\|bf16_full_eval=False"),
    ({"zero_optimisation": {"stage": 3}}, {}, "unknown key 'zero_optimisation': did you mean 'zero_optimization'"),
    ("missing.json", {}, "'missing.json' is no file, no JSON .*\n  fix: a path to a ds_config.json, or a dict"),
    (config(2, optimizer={"type": "AdamZ", "params": {}}), {}, "unknown optimizer.type 'AdamZ': did you mean 'adam'"),
    (2, {"auto_find_batch_size": True}, "auto_find_batch_size: .*\n  fix: set per_device_train_batch_size"),
]  # fmt: skip


@pytest.mark.parametrize(("said", "changes", "message"), REFUSED)
def test_what_is_refused(tmp_path: Path, said: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        train(str(tmp_path), said, **changes)
    assert re.search(message, str(raised.value), re.DOTALL), str(raised.value)


def test_a_trainer_that_has_trained_is_not_enabled(tmp_path: Path) -> None:
    trainer = train(str(tmp_path), 1, max_steps=1).trainer
    with pytest.raises(CompileError, match=r"is wrapped already\n  fix: enable it before train"):
        enable(trainer)


def test_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"stage": 3}}')
    (said,) = transformers.HfArgumentParser(DeepSeedTrainingArguments).parse_args_into_dataclasses(["--deepspeed", str(file), "--output_dir", str(tmp_path), "--use_cpu"])
    assert said.deepseed == str(file) and said.deepspeed is None
