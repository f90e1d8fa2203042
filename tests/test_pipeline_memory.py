"""Memory and bytes of a pipeline, counted while it runs: 1F1B's peak is flat in the number of microbatches, GPipe's grows with it."""

from __future__ import annotations

from typing import Any

import pytest
from counting import agrees, alive_before, axes_agree, counted, main_loop

pytest.importorskip("transformers")

wide = pytest.mark.wide


def ranks_of(schedule: str, m: int) -> list[dict[str, Any]]:
    """Two stages; microbatches of two rows, whatever their number."""
    return counted(f"hf:LlamaForCausalLM(vocab_size=1024,num_hidden_layers=4,intermediate_size=512,batch_size={2 * m})", f"pp2+mb{m}+{schedule}", 2)


@pytest.mark.parametrize(("schedule", "m"), [("1f1b", 4), pytest.param("gpipe", 4, marks=wide), *(pytest.param(s, m, marks=wide) for s in ("1f1b", "gpipe") for m in (8, 16))])
@pytest.mark.turn
def test_the_peak_is_the_predicted_one(schedule: str, m: int) -> None:
    for n, rank in enumerate(ranks_of(schedule, m)):
        agrees(rank, n)


@wide
def test_1f1b_is_flat_in_the_number_of_microbatches_and_gpipe_linear() -> None:
    """Peaks are of the same microbatches, 4, 8 and 16 of them. Of GPipe the activations are what is alive before the first backward."""
    for least, *more in zip(*(ranks_of("1f1b", m) for m in (4, 8, 16)), strict=True):
        for rank in more:
            assert max(rank["peaks"]) == pytest.approx(max(least["peaks"]), rel=0.01)
    for ranks in zip(*(ranks_of("gpipe", m) for m in (4, 8, 16)), strict=True):
        four, eight, sixteen = (alive_before(rank, main_loop(rank, "backward"))[0] for rank in ranks)
        assert eight == pytest.approx(2 * four, rel=0.01) and sixteen == pytest.approx(4 * four, rel=0.01)
        peaks = [max(rank["peaks"]) for rank in ranks]
        assert peaks[1] - peaks[0] == pytest.approx(four, rel=0.02) and peaks[2] - peaks[1] == pytest.approx(2 * four, rel=0.02)
    for gpipe, flat in zip(ranks_of("gpipe", 8), ranks_of("1f1b", 8), strict=True):
        assert max(gpipe["peaks"]) > 1.5 * max(flat["peaks"])


@wide
def test_bytes_by_axis_of_three_axes() -> None:
    """zero3 over dp, tp and two stages on eight ranks."""
    found = counted("hf:LlamaForCausalLM(vocab_size=1024,num_hidden_layers=4,batch_size=16)", "zero3+dp2+tp2+pp2+mb4", 8)
    axes_agree(found, {"dp", "tp", "pp"})
