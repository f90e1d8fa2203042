"""ds_config.json: real shapes with their verdicts, the forms a config may have, the batch triangle, and DeepSpeed's schedules by its formulas."""

from __future__ import annotations

import base64
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ds_configs import PLANS, REJECTED, WRONG
from typer.testing import CliRunner

from deepseed.cli import app
from deepseed.config import Config, ConfigError, optimizer_of, read, settings, verdicts
from deepseed.config.batch import Batch, triangle
from deepseed.config.read import known_keys
from deepseed.lr_schedules import WarmupCosineLR, WarmupDecayLR, WarmupLR
from deepseed.plan import parse_plan


@pytest.mark.parametrize("name", PLANS)
def test_a_config_is_the_plan(name: str) -> None:
    config, plan = PLANS[name]
    found = settings(read(config), 8)
    assert found.plan == plan
    written = {row.key for row in verdicts(read(config))}
    assert {key for key in config if key not in {k.partition(".")[0] for k in written}} == set(), "a key without a verdict"


def test_the_plans_are_plans() -> None:
    for _, plan in PLANS.values():
        parse_plan(plan)


@pytest.mark.parametrize("name", REJECTED)
def test_what_is_rejected_is_named_with_an_alternative(name: str) -> None:
    config, keys = REJECTED[name]
    found = [row for row in verdicts(read(config)) if row.verdict == "rejected"]
    assert {row.key for row in found} == set(keys) and all(row.note for row in found)
    with pytest.raises(ConfigError, match="is not supported") as error:
        settings(read(config), 8)
    assert all(key in str(error.value) for key in keys)


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(name: str) -> None:
    config, says = WRONG[name]
    with pytest.raises(ConfigError) as error:
        settings(read(config), 8)
    assert says in str(error.value)


def test_every_key_says_what_becomes_of_it() -> None:
    from deepseed.config.fields import Says
    from deepseed.config.verdicts import sections_of

    keys = known_keys(Config)
    assert len(keys) > 150
    for key, field in keys:
        says = [m for m in field.metadata if isinstance(m, Says)]
        assert len(says) == 1, key
        kind, note = says[0].kind, says[0].note
        assert note or kind == "supported" or says[0].of is not None or sections_of(field.annotation), f"{key} is {kind} without a word"


def test_forms_of_a_config(tmp_path: Path) -> None:
    config = {"train_batch_size": 16, "zero_optimization": {"stage": 2}}
    text = json.dumps(config)
    path = tmp_path / "ds config.json"
    path.write_text(text)
    commented = '{ // of a step\n "train_batch_size": 16, # rows\n /* ZeRO */ "zero_optimization": {"stage": 2,},\n}'
    forms: list[Any] = [config, text, path, str(path), base64.urlsafe_b64encode(text.encode()).decode(), commented]
    assert {settings(read(form), 8).plan for form in forms} == {"zero2+dp8"}
    assert read('{"train_batch_size": 8, "tensorboard": {"output_path": "http://x/#a, }"}}').tensorboard.output_path == "http://x/#a, }"
    with pytest.raises(ConfigError, match="not int"):
        read(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="line 2"):
        read('{"train_batch_size": 8,\n "zero_optimization": }')


def test_the_triangle() -> None:
    for micro, accumulation, ranks in itertools.product((1, 3, 8), (1, 2, 5), (1, 4)):
        whole = Batch(micro * accumulation * ranks, micro, accumulation)
        assert triangle(whole.train, micro, accumulation, ranks) == triangle(whole.train, micro, None, ranks) == whole
        assert triangle(whole.train, None, accumulation, ranks) == triangle(None, micro, accumulation, ranks) == whole
    assert triangle(12, None, None, 4) == Batch(12, 3, 1) and triangle(None, 3, None, 4) == Batch(12, 3, 1)
    with pytest.raises(ConfigError, match=r"world_size 10 != 3 \* 1 \* 3"):
        triangle(10, None, None, 3)


def test_the_default_of_clipping_is_deepspeeds() -> None:
    assert settings(read({"train_batch_size": 8}), 8).clip_grad_norm == 1.0
    assert settings(read({"train_batch_size": 8, "gradient_clipping": 0}), 8).clip_grad_norm is None


@pytest.mark.filterwarnings("ignore:Muon")
def test_the_optimizer_is_a_class_that_steps() -> None:
    for config, _ in PLANS.values():
        found = settings(read(config), 8).optimizer
        if found is not None:
            name, arguments = found
            made = optimizer_of(read(config), [torch.nn.Parameter(torch.zeros(2, 2))])
            assert made is not None and type(made).__name__ == name
            assert made.param_groups[0]["lr"] == float(config["optimizer"]["params"]["lr"]) == arguments["lr"]


def test_the_loss_scale() -> None:
    found = settings(read({"train_batch_size": 8, "fp16": {"enabled": True, "initial_scale_power": 12, "hysteresis": 1}}), 8).loss_scaling
    assert found is not None and (found.static, found.initial, found.window, found.hysteresis, found.minimum) == (0, 4096, 1000, 1, 1)


def command(*words: str) -> Any:
    return CliRunner().invoke(app, ["config", "check", *words])


def test_the_command(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(PLANS["zero3 offload both"][0]))
    done = command(str(path), "--world-size", "8", "--json")
    said = json.loads(done.output)
    assert done.exit_code == 0 and said["plan"] == "zero3+dp8+offload(optimizer,params)" and said["error"] is None
    assert {"key": "zero_optimization.stage", "verdict": "supported", "note": ""} in said["keys"]
    path.write_text(json.dumps(REJECTED["apex"][0]))
    done = command(str(path))
    assert done.exit_code == 1 and "rejected" in done.output and "use bf16 or fp16" in done.output
    path.write_text('{"zero_optimisation": {"stage": 3}}')
    for words in ([str(path)], [str(path), "--json"]):
        done = command(*words)
        assert done.exit_code == 2 and "did you mean 'zero_optimization'?" in done.output
    assert json.loads(done.output)["plan"] is None


def test_the_exit_code_of_the_command_by_file(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    for kind, code in ((PLANS, (0,)), (REJECTED, (1,)), (WRONG, (1, 2))):
        for name, (config, *_) in kind.items():
            path.write_text(config if isinstance(config, str) else json.dumps(config))
            done = command(str(path), "--world-size", "8", "--json")
            said = json.loads(done.output)
            if name in ("batch auto", "clipping auto", "lr auto"):  # an error where no Trainer is; a file is checked for the Trainer too
                assert done.exit_code == 0 and said["auto"], name
                continue
            assert done.exit_code in code and (said["plan"] is None) == bool(done.exit_code) and set(said) == {"keys", "plan", "auto", "error"}, name
            assert any(row["verdict"] == "rejected" for row in said["keys"]) == (kind is REJECTED or name == "1-bit"), name


def test_a_trainers_config_is_checked_with_its_default_arguments(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"train_batch_size": "auto", "gradient_accumulation_steps": "auto", "bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}')
    said = json.loads(command(str(path), "--json").output)
    assert said["plan"] == "zero3" and said["auto"] == ["train_batch_size", "gradient_accumulation_steps", "zero_optimization.reduce_bucket_size", "bf16.enabled"]
    done = command(str(path), "--world-size", "4")
    assert done.exit_code == 0 and "plan: zero3+dp4   (\"auto\" as the HF Trainer's default arguments fill it in)" in done.output
    path.write_text('{"train_batch_size": 8, "steps_per_print": "auto"}')
    done = command(str(path))
    assert done.exit_code == 1 and "nothing that the HF Trainer fills in here" in done.output


def rates(make: Any, steps: int, lr: float = 0.5) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = make(optimizer)
    out = [optimizer.param_groups[0]["lr"]]
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        out.append(optimizer.param_groups[0]["lr"])
    return out


def test_warmup_by_its_formula() -> None:
    n, least, most = 5, 0.1, 0.7
    log = [least, *(least + (most - least) * (math.log(i + 1) / math.log(n) if i < n else 1.0) for i in range(9))]
    assert rates(lambda o: WarmupLR(o, least, most, n), 9) == pytest.approx(log, rel=1e-15)
    linear = [least, *(least + (most - least) * min(1.0, i / n) for i in range(9))]
    assert rates(lambda o: WarmupLR(o, least, most, n, "linear"), 9) == pytest.approx(linear, rel=1e-15)
    assert rates(lambda o: WarmupLR(o, warmup_num_steps=2), 9)[-1] == 0.5  # the optimizer's own rate


def test_warmup_and_decay_by_their_formula() -> None:
    n, total, most = 4, 10, 0.6
    line = [0.0, *(most * (i / n if i < n else max(0.0, (total - i) / (total - n))) for i in range(13))]
    assert rates(lambda o: WarmupDecayLR(o, total, 0.0, most, n, "linear"), 13) == pytest.approx(line, rel=1e-15)


def test_cosine_by_its_formula() -> None:
    n, total, lr, floor = 4, 10, 0.5, 0.01
    warm = [0.2 + 0.8 * i / n for i in range(n)]
    down = [floor + (1 - floor) * (1 + math.cos(math.pi * min(1.0, (i - n + 1) / (total - n)))) / 2 for i in range(n, 13)]
    assert rates(lambda o: WarmupCosineLR(o, total, 0.2, n, floor, "linear"), 13, lr) == pytest.approx([0.0, *(lr * r for r in warm + down)], rel=1e-15)


def test_a_schedule_goes_on_where_it_was() -> None:
    def made() -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
        return optimizer, WarmupDecayLR(optimizer, 20, warmup_num_steps=5)

    optimizer, first = made()
    for _ in range(7):
        optimizer.step()
        first.step()
    other, second = made()
    second.load_state_dict(first.state_dict())
    for o, s in ((optimizer, first), (other, second)):
        o.step()
        s.step()
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_a_warmup_that_is_none_is_refused() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    with pytest.raises(ValueError, match="positive integer, got 0"):
        WarmupLR(optimizer, warmup_num_steps=0)
    with pytest.raises(ValueError, match="one of log, linear"):
        WarmupLR(optimizer, warmup_type="cubic")


# what DeepSpeed's parser does with it, and what is done here -------------------------------------------------------------


def refused(config: Any, says: str, world_size: int | None = 8) -> None:
    with pytest.raises(ConfigError) as error:
        settings(read(config), world_size)
    assert says in str(error.value)


def test_a_typo_at_the_top_does_not_train_stage_0() -> None:
    refused({"train_batch_size": 8, "zero_optimisation": {"stage": 3}}, "unknown key 'zero_optimisation': did you mean 'zero_optimization'?")


def test_an_unknown_key_inside_a_section() -> None:
    refused({"train_batch_size": 8, "zero_optimization": {"stage": 3, "overlap_com": True}}, "unknown key 'zero_optimization.overlap_com': did you mean 'zero_optimization.overlap_comm'?")


def test_auto_where_no_trainer_fills_it_in() -> None:
    refused({"train_batch_size": 8, "zero_optimization": {"stage": "auto"}}, 'zero_optimization.stage is "auto"')
    refused({"train_batch_size": "auto"}, 'train_batch_size: "auto" is filled in by the HF Trainer\n  fix: a number, or train with')
    refused({"train_batch_size": 8, "gradient_clipping": "auto"}, 'gradient_clipping: "auto" is filled in by the HF Trainer')


def test_a_number_may_be_text() -> None:
    for said in (5e8, "5e8", 500000000, "500000000"):
        assert read({"train_batch_size": 8, "zero_optimization": {"stage": 2, "reduce_bucket_size": said}}).zero_optimization.reduce_bucket_size == 500_000_000


def test_parameters_are_offloaded_at_stage_3_only() -> None:
    for stage in (0, 1, 2):
        refused({"train_batch_size": 8, "zero_optimization": {"stage": stage, "offload_param": {"device": "cpu"}}}, f"offload_param needs ZeRO stage 3, the stage is {stage}")


def test_an_unknown_optimizer_is_an_error_at_parse() -> None:
    refused({"train_batch_size": 8, "optimizer": {"type": "AdamZ"}}, "unknown optimizer.type 'AdamZ'")


def test_fp16_and_bf16_at_once() -> None:
    for old in ("bf16", "bfloat16"):
        refused({"train_batch_size": 8, "fp16": {"enabled": True}, old: {"enabled": True}}, "bfloat16 and fp16 modes cannot be simultaneously enabled")


def test_a_key_that_is_said_twice() -> None:
    refused('{"train_batch_size": 8, "zero_optimization": {"stage": 1, "stage": 3}}', "Found duplicate keys in DeepSpeed config: stage")


def test_the_triangles_messages() -> None:
    ranks = "Check batch related parameters. train_batch_size is not equal to micro_batch_per_gpu * gradient_acc_step * world_size"
    refused({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 2}, f"{ranks} 8 != 3 * 2 * 1", 1)
    refused({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 2}, f"{ranks} for any number of ranks: 6 does not divide 8", None)
    for world_size in (8, None):
        for none in ({}, {"gradient_accumulation_steps": 2}):
            refused(none, "Either train_batch_size or train_micro_batch_size_per_gpu needs to be provided", world_size)
        refused({"train_batch_size": 0}, "Train batch size: 0 has to be greater than 0", world_size)
        refused({"train_micro_batch_size_per_gpu": -1}, "Micro batch size per gpu: -1 has to be greater than 0", world_size)
        refused({"train_batch_size": 8, "gradient_accumulation_steps": 0}, "Gradient accumulation steps: 0 has to be greater than 0", world_size)
    refused({"train_batch_size": 4, "train_micro_batch_size_per_gpu": 1}, "Gradient accumulation steps: 0 has to be greater than 0")
    refused({"train_batch_size": 4}, "Micro batch size per gpu: 0 has to be greater than 0")
    assert issubclass(ConfigError, ValueError), "DeepSpeed asserts; -O must not switch a check off"


# keys of the survey: what must become of each -----------------------------------------------------------------------------

SUPPORTED_KEYS = """train_batch_size=8 train_micro_batch_size_per_gpu=1 gradient_accumulation_steps=1 gradient_clipping=1.0 zero_optimization.stage=1 fp16.enabled=true fp16.loss_scale=0
fp16.initial_scale_power=16 fp16.loss_scale_window=1000 fp16.hysteresis=2 fp16.min_loss_scale=1 bf16.enabled=true optimizer.type="AdamW" optimizer.params.lr=1 optimizer.params.betas=[0.9,0.99]
optimizer.params.eps=1 optimizer.params.weight_decay=1 optimizer.params.adam_w_mode=true scheduler.type="WarmupLR" zero_optimization.offload_optimizer.device="cpu"
zero_optimization.offload_param.device="cpu" tensor_parallel.autotp_size=2 sequence_parallel_size=2 data_types.grad_accum_dtype="fp32"
steps_per_print=1 wall_clock_breakdown=true memory_breakdown=true tensorboard.enabled=true csv_monitor.job_name="x" wandb.project="x" flops_profiler.profile_step=2"""
MAPPED_KEYS = """zero_allow_untested_optimizer=true checkpoint.load_universal=true fp16.auto_cast=true optimizer.params.bias_correction=true
optimizer.params.torch_adam=true zero_optimization.reduce_bucket_size=1 zero_optimization.allgather_bucket_size=1 zero_optimization.overlap_comm=true zero_optimization.contiguous_gradients=true
zero_optimization.reduce_scatter=true zero_optimization.allgather_partitions=true zero_optimization.stage3_prefetch_bucket_size=1 zero_optimization.stage3_max_live_parameters=1
zero_optimization.stage3_max_reuse_distance=1 zero_optimization.stage3_param_persistence_threshold=1 zero_optimization.stage3_gather_16bit_weights_on_model_save=true
zero_optimization.stage3_gather_fp16_weights_on_model_save=true zero_optimization.sub_group_size=1 zero_optimization.offload_optimizer.pin_memory=true prescale_gradients=true
gradient_predivide_factor=2.0 communication_data_type="fp32" zero_optimization.round_robin_gradients=true zero_optimization.ignore_unused_parameters=true
activation_checkpointing.partition_activations=true activation_checkpointing.cpu_checkpointing=true flops_profiler.enabled=true comms_logger.enabled=true monitor_config={}
compile.deepcompile=true zero_optimization.elastic_checkpoint=true dump_state=true zero_optimization.cpu_offload=true
aio={"block_size":1} zero_optimization.offload_param.nvme_path="/x\""""
REJECTED_KEYS = """comet={"enabled":true} amp={"enabled":true} optimizer.params.comm_backend_name="nccl" optimizer.params.cuda_aware=true optimizer.params.freeze_step=1 compression_training={"x":1}
autotuning={"enabled":true} elasticity={"enabled":true} curriculum_learning={"enabled":true} data_efficiency={"enabled":true} progressive_layer_drop={"enabled":true} eigenvalue={"enabled":true}
sparse_attention={"mode":"fixed"} hybrid_engine={"enabled":true} nebula={"enabled":true} datastates_ckpt={"enabled":true} zero_optimization.zero_quantized_weights=true
zero_optimization.zero_quantized_gradients=true zero_optimization.zero_hpz_partition_size=8 zero_optimization.mics_shard_size=4 zero_optimization.mics_hierarchical_params_gather=true
zero_optimization.zenflow={"x":1} zero_optimization.offload_optimizer.super_offload=true expert_parallel={"enabled":true} mpu=1 zero_optimization.offload_optimizer.ratio=0.5"""


@pytest.mark.parametrize(("verdict", "keys"), [("supported", SUPPORTED_KEYS), ("mapped", MAPPED_KEYS), ("rejected", REJECTED_KEYS)])
def test_every_key_of_the_survey_has_its_verdict(verdict: str, keys: str) -> None:
    for each in keys.split():
        key, _, value = each.partition("=")
        config = json.loads(value)
        for part in reversed(key.split(".")):
            config = {part: config}
        config.get("optimizer", {}).setdefault("type", "AdamW")
        config.get("scheduler", {}).setdefault("type", "WarmupLR")
        row = next(row for row in verdicts(read(config)) if row.key == key)
        assert row.verdict == verdict, key
        assert row.note or verdict == "supported", key
