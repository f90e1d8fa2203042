"""The HF Trainer on a compiled plan, beside the stock one with DistributedDataParallel, on real ranks.

FIVE is five printed digits: all is float32 here, whose sums over rows are in another order.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate")

from gloo.launch import ranks
from gloo.trainer import CASES, adapted, beside, evaluated, fine_tuned, resumed, saved, written

FIVE = 1e-5
WEIGHTS = 1e-6  # of float32, through 4 steps of AdamW; measured 1e-7
wide = pytest.mark.wide


@pytest.mark.parametrize("number", [2, pytest.param(4, marks=wide)])
def test_a_trainer_is_the_stock_one(tmp_path: Path, number: int) -> None:
    for found in ranks(number, beside, str(tmp_path), [("ragged", 3), ("label smoothing", 1)]):
        assert all(curve <= FIVE and weights <= WEIGHTS for curve, weights in found), found


@wide
@pytest.mark.parametrize("name", CASES)
def test_what_a_trainer_can_be_told(tmp_path: Path, name: str) -> None:
    for found in ranks(2, beside, str(tmp_path), [(name, stage) for stage in (1, 2, 3)]):
        assert all(curve <= FIVE and weights <= WEIGHTS for curve, weights in found), found


def test_a_run_that_is_resumed_is_the_uninterrupted_one(tmp_path: Path) -> None:
    for same, other in ranks(2, resumed, str(tmp_path / "run"), [3, 1]):
        assert same == ([0.0] * 6, 0.0)
        assert max(map(abs, other[0])) <= 1e-6 and other[1] <= WEIGHTS


def test_evaluation_predictions_and_the_best_model(tmp_path: Path) -> None:
    for found in ranks(2, evaluated, str(tmp_path), 3):
        assert found["before"][0] == pytest.approx(found["before"][1], rel=FIVE) and found["losses"] <= FIVE and found["curve"] <= FIVE, found
        assert found["best"][0] == found["best"][1] != "checkpoint-4", found
        assert found["rows"] == ((7, 8, 32),) * 2 and found["labels"] and found["logits"] <= 1e-4 and found["weights"] <= 1e-5, found


@pytest.mark.parametrize("tied", [pytest.param(False, marks=wide), True])
def test_from_pretrained_reads_what_save_model_wrote(tmp_path: Path, tied: bool) -> None:
    for found in ranks(2, saved, str(tmp_path), 3, tied):
        assert found == {"weights": 0.0, "generated": True, "head in the file": not tied, "is tied": tied}


def test_a_model_of_peft(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    for found in ranks(2, adapted, str(tmp_path), 3):
        assert found["curve"] <= FIVE and found["weights"] <= WEIGHTS and found["resumed"] == 0.0 and found["steps"] == [3, 4], found
        assert len(found["adapter"]) == len(found["trained"]) == 4 and all("lora" in key for key in found["adapter"]), found
        assert "model.safetensors" not in found["files"] and found["base in the checkpoint"] == [], found


def test_generation_in_evaluation(tmp_path: Path) -> None:
    for found in ranks(2, written, str(tmp_path), 3):
        assert found["same"] and found["shape"][0] >= 6, found


def test_a_trainer_of_trl(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    for found in ranks(2, fine_tuned, str(tmp_path), 2):
        assert found["trained"] and found["curve"] <= FIVE and found["weights"] <= WEIGHTS and found["accuracy"], found
