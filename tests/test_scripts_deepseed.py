"""The scripts of ``examples/from_deepspeed`` under DeepSeed beside plain DDP, for zero1, 2 and 3 from the file, on 2 and 4 ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scripts import ENGINE, TRAINER, apart, config, original, sizes, start, training, weights_apart
from test_scripts import FIVE, WEIGHTS

wide = pytest.mark.wide
pytest.importorskip("transformers")
STAGES = [pytest.param(1, marks=wide), 2, pytest.param(3, marks=wide)]
RANKS = [2, pytest.param(4, marks=wide)]


def files(tmp_path: Path, name: str, stage: int, **changes: int) -> list[object]:
    """Arguments that name the config of this stage."""
    if name in TRAINER:
        return ["--deepspeed", config(tmp_path, "ds_auto", stage=stage)]
    return ["--deepspeed_config", config(tmp_path, "ds_bert" if name == "bert" else "ds_config", stage=stage, **changes)]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["raw_loop", *(pytest.param(n, marks=wide) for n in ENGINE if n != "raw_loop")])
def test_a_script_that_calls_initialize(tmp_path: Path, name: str, stage: int, ranks: int) -> None:
    more = ["-e", ranks // 2] if name == "cifar" else []
    arguments = [*files(tmp_path, name, stage), *more]
    want, got = start("ddp", ranks, [name, *arguments], tmp_path), start(name, ranks, arguments, tmp_path)
    assert len(want.steps) == 20 and apart(want.steps, got.steps) <= FIVE
    assert want.runs == 0 and got.runs >= 20, "compiled programs did not train"


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["lora", *(pytest.param(n, marks=wide) for n in TRAINER if n != "lora")])
@pytest.mark.turn
def test_a_script_with_a_trainer(tmp_path: Path, name: str, stage: int, ranks: int) -> None:
    for package in ("accelerate", *(("peft",) if name == "lora" else ("trl", "datasets") if name == "trl_sft" else ())):
        pytest.importorskip(package)
    more = {"causal_lm_trainer": ["--do_train", "--do_eval"], "trl_sft": ["--pad_to_multiple_of", 16]}.get(name, [])  # each length is a program
    want = start(name, ranks, [*training(tmp_path / "ddp"), *more], tmp_path, original(name))
    got = start(name, ranks, [*training(tmp_path / "ours"), *more, *files(tmp_path, name, stage)], tmp_path)
    assert len(want.steps) == 20 and apart(want.steps, got.steps) <= FIVE
    assert want.runs == 0 and got.runs >= 20, "compiled programs did not train"
    if name == "causal_lm_trainer":
        losses = [float(each.lines[-1].split()[-1]) for each in (want, got)]
        assert abs(losses[0] - losses[1]) <= FIVE * losses[0]
    kept = [sorted(p.name for p in (tmp_path / side).glob("*.safetensors")) for side in ("ddp", "ours")]
    assert kept[0] == kept[1] and kept[0]
    from safetensors.torch import load_file

    assert weights_apart(*(load_file(tmp_path / side / kept[0][0]) for side in ("ddp", "ours"))) <= WEIGHTS


@wide
@pytest.mark.parametrize("stage", STAGES)
def test_however_a_batch_is_cut_the_weights_are_equal(tmp_path: Path, stage: int) -> None:
    weights, runs = [], []
    for micro, accumulation in ((2, 4), (8, 1), (1, 8)):
        at = tmp_path / f"{micro}.{accumulation}"
        runs.append(start("raw_loop", 2, [*files(at, "raw_loop", stage, **sizes(micro, accumulation)), "--save", at], at).steps)
        weights.append(torch.load(at / "pytorch_model.bin"))
    assert max(apart(runs[0], other) for other in runs[1:]) <= FIVE
    assert max(weights_apart(weights[0], other) for other in weights[1:]) <= WEIGHTS


@wide
@pytest.mark.parametrize("stage", STAGES)
def test_padded_rows_mean_what_unpadded_ones_mean(tmp_path: Path, stage: int) -> None:
    """Against stock DDP, where each row stands alone."""
    pytest.importorskip("accelerate")
    alone = start("causal_lm_trainer", 2, [*training(tmp_path / "ddp", 1, 8), "--do_train"], tmp_path, original("causal_lm_trainer")).steps
    padded = start("causal_lm_trainer", 2, [*training(tmp_path / "ours", 8, 1), "--do_train", *files(tmp_path, "causal_lm_trainer", stage)], tmp_path).steps
    assert apart(alone, padded) <= FIVE


@wide
def test_a_trainer_resumes(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    common = [*training(tmp_path / "out"), "--do_train", "--save_strategy", "steps", "--save_steps", "10", *files(tmp_path, "causal_lm_trainer", 2)]
    through = start("causal_lm_trainer", 2, common, tmp_path).steps
    resumed = start("causal_lm_trainer", 2, [*common, "--resume_from_checkpoint", tmp_path / "out" / "checkpoint-10"], tmp_path).steps
    assert apart(resumed, through[10:]) <= FIVE
