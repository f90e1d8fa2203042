"""The user's own loop with the update compiled (deepseed.trained), on real ranks beside what DistributedDataParallel means."""

from __future__ import annotations

import pytest
from gloo.launch import ranks
from gloo.trained import on_ranks

wide = pytest.mark.wide
PLANS = ("zero0", "zero1", "zero2", "zero3")


def exact(found: dict[str, dict[str, float]]) -> None:
    for case, worst in found.items():
        assert worst["loss"] <= 1e-12 and max(worst.values()) <= 1e-10, (case, worst)


def test_every_stage_is_ddp() -> None:
    for found in ranks(2, on_ranks, [(plan, {"own_loss": own}) for plan in PLANS for own in (True, False)]):
        exact(found)


@wide
def test_three_ranks_and_two_axes() -> None:
    for found in ranks(3, on_ranks, [(plan, {"micro": 1}) for plan in PLANS]):
        exact(found)
    for found in ranks(4, on_ranks, [(f"{plan}+tp2", {}) for plan in PLANS]):
        exact(found)
