"""The HF Trainer on a compiled plan, beside the stock one with DistributedDataParallel, on real ranks.

FIVE is five printed digits: all is float32 here, whose sums over rows are in another order.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate")

from gloo.launch import ranks
from gloo.trainer import CASES, beside, resumed

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
