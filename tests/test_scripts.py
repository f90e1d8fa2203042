"""The plain DDP sides (the stock Trainer's too) of ``examples/from_deepspeed``: they train, mean what one process means, and do not depend on how a batch is cut or padded.

FIVE is five printed digits: the scripts print six decimals of losses and norms in float32.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from scripts import ENGINE, FOLDER, TRAINER, WAS, apart, config, original, sizes, start, training, weights_apart

pytest.importorskip("transformers")
FIVE = 1e-5
WEIGHTS = 1e-5  # float32 sums of 16 rows in another order, through 20 steps of AdamW; measured 1e-6
wide = pytest.mark.wide


@pytest.mark.parametrize("name", [*ENGINE, *TRAINER])
def test_a_script_is_the_original_but_for_one_line(name: str) -> None:
    now, was = (FOLDER / f"{name}.py").read_text().splitlines(), original(name).splitlines()
    different = [(a, b) for a, b in zip(now, was, strict=True) if a != b]
    ast.parse(original(name))
    if name == "trl_sft":  # two classes of TRL's, extended
        assert [a for a, _ in different] == ["class Arguments(DeepSeedArguments, SFTConfig):", "class Trainer(DeepSeedMixin, SFTTrainer):"]
    else:
        assert len(different) == 1 and "deepseed" in different[0][0] and WAS.match(different[0][0]), different


@pytest.mark.parametrize(("ranks", "epochs"), [(2, 1), pytest.param(4, 2, marks=wide)])
def test_cifar(tmp_path: Path, ranks: int, epochs: int) -> None:
    steps = start("ddp", ranks, ["cifar", "--deepspeed_config", config(tmp_path), "-e", epochs], tmp_path).steps
    assert [s.number for s in steps] == list(range(1, 21)) and steps[-1].loss < steps[0].loss - 0.1


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=wide)])
def test_bert_whose_last_batch_is_smaller(tmp_path: Path, ranks: int) -> None:
    steps = start("ddp", ranks, ["bert", "--deepspeed_config", config(tmp_path, "ds_bert")], tmp_path).steps
    assert len(steps) == 20 and steps[-1].loss < steps[0].loss


def test_the_loop_means_the_same_on_any_ranks_and_however_a_batch_is_cut(tmp_path: Path) -> None:
    runs, weights = [], []
    for ranks, micro, accumulation in ((2, 2, 4), (2, 8, 1), (2, 1, 8), (1, 16, 1)):
        at = tmp_path / f"{ranks}.{micro}.{accumulation}"
        runs.append(start("ddp", ranks, ["raw_loop", "--deepspeed_config", config(at, **sizes(micro, accumulation)), "--save", at], at).steps)
        weights.append(torch.load(at / "pytorch_model.bin"))
    assert len(runs[0]) == 20 and max(s.norm for s in runs[0]) > 0.5, "no step was clipped"
    assert max(apart(runs[0], other) for other in runs[1:]) <= FIVE
    assert max(weights_apart(weights[0], other) for other in weights[1:]) <= WEIGHTS


# the Trainer ------------------------------------------------------------------------------------------------------------


def test_rows_of_unequal_length_mean_what_unpadded_ones_mean(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    more = ["--do_train", "--do_eval"]
    padded, alone = (start("causal_lm_trainer", 2, [*training(tmp_path / str(micro), micro, 8 // micro), *more], tmp_path / str(micro), original("causal_lm_trainer")) for micro in (8, 1))
    assert len(padded.steps) == 20 and apart(padded.steps, alone.steps) <= FIVE
    assert padded.lines[-1].startswith("eval loss") and (tmp_path / "8" / "model.safetensors").exists()


def test_a_trainer_resumes(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    common = [*training(tmp_path / "out"), "--do_train", "--save_strategy", "steps", "--save_steps", "10"]
    through = start("causal_lm_trainer", 2, common, tmp_path, original("causal_lm_trainer")).steps
    resumed = start("causal_lm_trainer", 2, [*common, "--resume_from_checkpoint", tmp_path / "out" / "checkpoint-10"], tmp_path, original("causal_lm_trainer")).steps
    assert resumed == through[10:]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=wide)])
def test_lora_saves_the_adapter_alone(tmp_path: Path, ranks: int) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("peft")
    from safetensors.torch import load_file

    steps = start("lora", ranks, training(tmp_path), tmp_path, original("lora")).steps
    assert len(steps) == 20 and steps[-1].loss < steps[0].loss
    assert all("lora" in name for name in load_file(tmp_path / "adapter_model.safetensors"))


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=wide)])
def test_sft(tmp_path: Path, ranks: int) -> None:
    pytest.importorskip("trl")
    steps = start("trl_sft", ranks, training(tmp_path), tmp_path, original("trl_sft")).steps
    assert len(steps) == 20 and steps[-1].loss < steps[0].loss


# DeepSpeed itself -------------------------------------------------------------------------------------------------------


@wide
@pytest.mark.parametrize("name", ENGINE)
def test_deepspeed_trains_the_original_as_ddp_does(tmp_path: Path, name: str) -> None:
    ops = pytest.importorskip("deepspeed.ops")
    assert ops
    file = config(tmp_path, "ds_bert" if name == "bert" else "ds_config")
    more = ["-e", 1] if name == "cifar" else []
    without_a_compiler = 'import deepspeed.ops\ndeepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False\n'
    theirs = start(name, 2, ["--deepspeed_config", file, *more], tmp_path, without_a_compiler + original(name)).steps
    assert apart(start("ddp", 2, [name, "--deepspeed_config", file, *more], tmp_path).steps, theirs) <= FIVE
