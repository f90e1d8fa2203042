"""Pipelines on real ranks over gloo: three axes equal to eager PyTorch in float64, and every rank that is left names the one that ended.

Llama, and by ``wide`` others, of four layers, trained for three steps with clipping; each row has another number of labels, so no two microbatches count the same.
"""

from __future__ import annotations

import pytest
from gloo.equality import Case, equal

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

THREE_AXES: dict[int, list[Case]] = {
    2: [("llama", "pp2", "interleaved2"), ("tied llama", "pp2+mb8", "gpipe")],
    4: [
        ("t5", "zero3+dp2+pp2", "zb"), ("gpt2", "zero2+dp2+pp2", "interleaved2"), ("bert", "zero1+tp2+pp2", "zb"), ("vit", "tp2+pp2", "gpipe"),
        ("qwen3", "pp4+mb8", "1f1b"),
    ],
    8: [
        ("llama", "zero3+dp2+tp2+pp2", "1f1b"), ("llama", "zero3+dp2+tp2+pp2", "zb"),
        ("llama", "zero3+dp2+pp4", "1f1b"), ("llama", "zero3+dp2+pp4", "zb"), ("tied llama", "zero3+dp2+tp2+pp2", "1f1b"),
    ],
    16: [("llama", "zero3+dp2+tp2+pp4", "1f1b"), ("llama", "zero3+dp2+tp2+pp4", "zb")],
}  # fmt: skip


@pytest.mark.turn
def test_zero3_and_two_stages_on_four_ranks_are_eager_in_float64() -> None:
    equal(4, [("llama", "zero3+dp2+pp2", "1f1b"), ("llama", "zero3+dp2+pp2", "zb")])


@pytest.mark.wide
@pytest.mark.parametrize("number", THREE_AXES)
def test_three_axes_are_eager_in_float64(number: int) -> None:
    equal(number, THREE_AXES[number])
