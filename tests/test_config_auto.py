""""auto": what the HF Trainer fills in, key by key; and the same as transformers' own class on drawn configs."""

from __future__ import annotations

import copy
import random
from types import SimpleNamespace
from typing import Any

import pytest
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from deepseed.config import ConfigError, fill, read, settings
from deepseed.config.auto import BY_HIDDEN_SIZE, Filling
from deepseed.config.auto import FILLED as FILLED_KEYS


def arguments(**other: Any) -> Any:
    given = {
        "world_size": 4, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_grad_norm": 0.7, "learning_rate": 3e-5, "adam_beta1": 0.85, "adam_beta2": 0.95,
        "adam_epsilon": 1e-7, "weight_decay": 0.02, "save_on_each_node": False, "fp16": False, "fp16_full_eval": False, "bf16": True, "bf16_full_eval": False,
    }  # fmt: skip
    return SimpleNamespace(**{**given, **other}, get_warmup_steps=lambda steps: int(0.1 * steps))


def at(config: Any, path: str) -> Any:
    for key in path.split("."):
        config = config[key]
    return config


def nested(path: str, value: Any) -> dict[str, Any]:
    for key in reversed(path.split(".")):
        value = {key: value}
    found: dict[str, Any] = value
    return found


FILLED: dict[str, tuple[Any, str | None]] = {  # key -> (what is filled in, the argument that another value must equal)
    "train_micro_batch_size_per_gpu": (3, "per_device_train_batch_size"),
    "gradient_accumulation_steps": (2, "gradient_accumulation_steps"),
    "train_batch_size": (24, "train_batch_size (calculated)"),
    "gradient_clipping": (0.7, "max_grad_norm"),
    "optimizer.params.lr": (3e-5, "learning_rate"),
    "optimizer.params.betas": ([0.85, 0.95], "adam_beta1+adam_beta2"),
    "optimizer.params.eps": (1e-7, "adam_epsilon"),
    "optimizer.params.weight_decay": (0.02, "weight_decay"),
    "scheduler.params.warmup_min_lr": (0, None),
    "scheduler.params.warmup_max_lr": (3e-5, "learning_rate"),
    "fp16.enabled": (False, "fp16|fp16_full_eval"),
    "bf16.enabled": (True, "bf16|bf16_full_eval"),
    "scheduler.params.total_num_steps": (50, "num_training_steps (calculated)"),
    "scheduler.params.warmup_num_steps": (5, "warmup_steps"),
    "zero_optimization.reduce_bucket_size": (100, None),
}
BOTH_STAGES: dict[str, Any] = {"model_config": SimpleNamespace(hidden_size=10), "num_training_steps": 50}


@pytest.mark.parametrize("key", FILLED)
def test_a_key_that_says_auto_is_filled_in(key: str) -> None:
    assert at(fill(nested(key, "auto"), arguments(), **BOTH_STAGES), key) == FILLED[key][0]


@pytest.mark.parametrize("key", FILLED)
def test_another_value_must_be_the_trainers(key: str) -> None:
    value, argument = FILLED[key]
    other = not value if isinstance(value, bool) else 17
    if argument is None:
        assert at(fill(nested(key, other), arguments(), **BOTH_STAGES), key) == other
    else:
        with pytest.raises(ValueError) as error:
            fill(nested(key, other), arguments(), **BOTH_STAGES)
        assert f"\n- ds {key}={other} vs hf {argument}={value}\n" in str(error.value)
    assert fill(nested(key, value), arguments(), **BOTH_STAGES) == nested(key, value)


def test_the_keys_that_may_say_auto() -> None:
    assert set(FILLED_KEYS) == {*FILLED, "zero_optimization.stage3_prefetch_bucket_size", "zero_optimization.stage3_param_persistence_threshold"}


def test_an_absent_key_is_never_added_and_the_callers_dict_is_left_alone() -> None:
    for config in ({}, {"optimizer": {"type": "AdamW"}}, {"zero_optimization": {"stage": 3}}, {"bf16": {}}, {"scheduler": {"params": {}}}):
        kept = copy.deepcopy(config)
        assert fill(config, arguments(), **BOTH_STAGES) == config == kept
    config = {"optimizer": {"params": {"lr": "auto"}}}
    assert fill(config, arguments()) != config and config == {"optimizer": {"params": {"lr": "auto"}}}


def test_all_mismatches_are_said_at_once_as_training_begins() -> None:
    config = {"train_batch_size": 99, "gradient_clipping": 2, "optimizer": {"params": {"lr": 1}}, "scheduler": {"params": {"total_num_steps": 3}}}
    fill(config, arguments())  # the first stage alone says nothing yet
    with pytest.raises(ConfigError) as error:
        fill(config, arguments(), **BOTH_STAGES)
    assert str(error.value) == (
        "Please correct the following DeepSpeed config values that mismatch TrainingArguments values:\n"
        "- ds train_batch_size=99 vs hf train_batch_size (calculated)=24\n- ds gradient_clipping=2 vs hf max_grad_norm=0.7\n- ds optimizer.params.lr=1 vs hf learning_rate=3e-05\n"
        "- ds scheduler.params.total_num_steps=3 vs hf num_training_steps (calculated)=50\nThe easiest method is to set these DeepSpeed config values to 'auto'."
    )


ZERO3 = {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"}}


@pytest.mark.parametrize(
    ("model_config", "h"),
    [
        (SimpleNamespace(hidden_size=768), 768),
        (SimpleNamespace(hidden_sizes=[64, 256, 128]), 256),
        (SimpleNamespace(text_config=SimpleNamespace(hidden_size=33)), 33),
        (SimpleNamespace(text_config=SimpleNamespace(hidden_sizes=[7, 9])), 9),
        (SimpleNamespace(hidden_size=5, text_config=SimpleNamespace(hidden_size=33)), 5),
    ],
)
def test_sizes_that_follow_from_the_hidden_size(model_config: Any, h: int) -> None:
    found = fill(ZERO3, arguments(), model_config, 50)["zero_optimization"]
    assert found == {"stage": 3, "reduce_bucket_size": h * h, "stage3_prefetch_bucket_size": int(0.9 * h * h), "stage3_param_persistence_threshold": 10 * h}
    two = fill({"zero_optimization": {**ZERO3["zero_optimization"], "stage": 2}}, arguments(), model_config, 50)["zero_optimization"]
    assert two == {"stage": 2, "reduce_bucket_size": h * h}, "the others are for stage 3: DeepSpeed's own models drop an auto that is left"


def test_no_hidden_size_is_said_only_where_it_is_needed() -> None:
    for none in (None, SimpleNamespace(), SimpleNamespace(hidden_size=None)):
        with pytest.raises(ConfigError, match=r"neither `hidden_size` nor `hidden_sizes` entry(.|\n)*\['zero_optimization.reduce_bucket_size', 'zero_opt"):
            fill(ZERO3, arguments(), none, 50)
        assert fill({"zero_optimization": {"stage": 3, "reduce_bucket_size": 5}}, arguments(), none, 50)


def test_the_rest_of_the_arguments() -> None:
    assert fill({"fp16": {"enabled": "auto"}}, arguments(fp16_full_eval=True)) == {"fp16": {"enabled": True}}
    assert fill({"bf16": {"enabled": "auto"}}, arguments(bf16=False)) == {"bf16": {"enabled": False}}
    assert fill({}, arguments(save_on_each_node=True)) == {"checkpoint": {"use_node_local_storage": True}}
    no_warmup = arguments()
    no_warmup.get_warmup_steps = lambda steps: 0
    assert at(fill({"scheduler": {"params": {"warmup_num_steps": "auto"}}}, no_warmup, **BOTH_STAGES), "scheduler.params.warmup_num_steps") == 1
    found = {"train_micro_batch_size_per_gpu": 5, "train_batch_size": 7}
    assert fill(found, arguments(), auto_find_batch_size=True, **BOTH_STAGES) == found


def test_ranks_that_share_their_rows_are_no_data_parallel_ranks() -> None:
    """The Trainer multiplies by all ranks; under tp or sp that is no triangle."""
    for axis in ({"tensor_parallel": {"autotp_size": 2}}, {"sequence_parallel_size": 2}, {"pipeline": {"stages": 2}}):
        config = {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", **axis}
        filled = fill(config, arguments(), **BOTH_STAGES)
        assert filled["train_batch_size"] == 12 and settings(read(filled), 4).batch is not None


def test_the_trainers_own_examples() -> None:
    """The two configs of transformers' documentation, ZeRO 2 and 3, with every "auto" that they have."""
    both = {
        "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2, "min_loss_scale": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}},
        "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "steps_per_print": 2000, "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": False,
    }  # fmt: skip
    zero2 = {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}, "allgather_partitions": True, "allgather_bucket_size": 2e8, "overlap_comm": True, "reduce_scatter": True, "reduce_bucket_size": 2e8, "contiguous_gradients": True}
    zero3 = {**ZERO3["zero_optimization"], "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9, "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9, "stage3_gather_16bit_weights_on_model_save": True}
    for zero, plan in ((zero2, "zero2+dp4+mb2+offload(optimizer)"), (zero3, "zero3+dp4+mb2")):
        found = settings(read(fill({**both, "zero_optimization": zero}, arguments(), **BOTH_STAGES)), 4)
        assert found.plan == plan and found.clip_grad_norm == 0.7 and found.batch is not None and found.batch.train == 24
        assert found.optimizer == ("AdamW", {"lr": 3e-5, "betas": (0.85, 0.95), "eps": 1e-7, "weight_decay": 0.02})
        assert found.scheduler == ("WarmupLR", {"warmup_min_lr": 0, "warmup_max_lr": 3e-5, "warmup_num_steps": 5})
        with pytest.raises(ConfigError, match='"auto" is filled in by the HF Trainer'):
            settings(read({**both, "zero_optimization": zero}), 4)


class Theirs:
    """transformers' class over a dict, without the packages that it imports."""

    fill_match, fill_only, is_auto = HfTrainerDeepSpeedConfig.fill_match, HfTrainerDeepSpeedConfig.fill_only, HfTrainerDeepSpeedConfig.is_auto
    process, finalize = HfTrainerDeepSpeedConfig.trainer_config_process, HfTrainerDeepSpeedConfig.trainer_config_finalize

    def __init__(self, config: dict[str, Any]) -> None:
        self.config, self.mismatches = copy.deepcopy(config), list[str]()

    def find_config_node(self, path: str) -> tuple[Any, str]:
        *parents, key = path.split(".")
        node: Any = self.config
        for parent in parents:
            node = node.get(parent) if node is not None else None
        return node, key

    def get_value(self, path: str) -> Any:
        node, key = self.find_config_node(path)
        return None if node is None else node.get(key)

    def is_true(self, path: str) -> bool:
        return bool(self.get_value(path))

    def is_zero3(self) -> bool:
        return bool(self.get_value("zero_optimization.stage") == 3)


def test_drawn_configs_as_transformers_fills_them() -> None:
    draw, raised, filled = random.Random(0), 0, 0
    keys = [*FILLED, "zero_optimization.stage3_prefetch_bucket_size", "zero_optimization.stage3_param_persistence_threshold"]
    for _ in range(400):
        a = arguments(fp16=draw.random() < 0.3, bf16_full_eval=draw.random() < 0.3, save_on_each_node=draw.random() < 0.1)
        config: dict[str, Any] = {"zero_optimization": {"stage": draw.choice([0, 2, 3])}} if draw.random() < 0.8 else {}
        for key in draw.sample(keys, draw.randint(0, 8)):
            *parents, last = key.split(".")
            node = config
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = draw.choice(["auto", "auto", "auto", FILLED.get(key, (4, None))[0], 17, None])
        sizes: Any = draw.choice([SimpleNamespace(hidden_size=6), SimpleNamespace(text_config=SimpleNamespace(hidden_sizes=[2, 3])), SimpleNamespace()])
        loose = draw.random() < 0.2
        theirs, ours = Theirs(config), Filling(copy.deepcopy(config))
        said: list[str] = []
        for begin, finish in ((theirs.process, theirs.finalize), (ours.from_arguments, ours.from_model)):
            begin(a, loose)
            try:
                finish(a, SimpleNamespace(config=sizes) if finish == theirs.finalize else sizes, 50)
                said.append("")
            except ValueError as error:
                said.append(str(error))
        assert said[0] == said[1]
        if not said[0]:  # what theirs leaves as it is, DeepSpeed's models drop
            for key in BY_HIDDEN_SIZE[1:]:
                if theirs.get_value(key) == "auto":
                    del theirs.config["zero_optimization"][key.partition(".")[2]]
        assert said[0] or theirs.config == ours.config
        raised, filled = raised + bool(said[0]), filled + (theirs.config != config)
    assert raised > 50 and filled > 100, "both outcomes were drawn"
