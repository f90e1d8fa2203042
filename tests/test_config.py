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
    assert read('{"train_batch_size": 8, "tensorboard": {"output_path": "http://x/#a, }"}}').tensorboard == {"output_path": "http://x/#a, }"}
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


def test_the_command(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(PLANS["zero3 offload both"][0]))
    done = CliRunner().invoke(app, ["config", "check", str(path), "--world-size", "8", "--json"])
    said = json.loads(done.output)
    assert done.exit_code == 0 and said["plan"] == "zero3+dp8+offload(optimizer,params)"
    assert {"key": "zero_optimization.stage", "verdict": "supported", "note": ""} in said["keys"]
    path.write_text(json.dumps(REJECTED["apex"][0]))
    done = CliRunner().invoke(app, ["config", "check", str(path)])
    assert done.exit_code == 1 and "rejected" in done.output and "use bf16 or fp16" in done.output
    path.write_text('{"zero_optimisation": {"stage": 3}}')
    done = CliRunner().invoke(app, ["config", "check", str(path)])
    assert done.exit_code == 2 and "did you mean 'zero_optimization'?" in done.output


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
