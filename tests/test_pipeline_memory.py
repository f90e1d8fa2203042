"""Memory and bytes of a pipeline, counted while it runs: 1F1B's peak is flat in the number of microbatches, GPipe's grows with it."""

from __future__ import annotations

from typing import Any

import pytest
from counting import SCALARS, agrees, alive_before, counted, main_loop

pytest.importorskip("transformers")

wide = pytest.mark.wide


def ranks_of(schedule: str, m: int) -> list[dict[str, Any]]:
    """Two stages; microbatches of two rows, whatever their number."""
    return counted(f"hf:LlamaForCausalLM(vocab_size=1024,num_hidden_layers=4,intermediate_size=512,batch_size={2 * m})", f"pp2+mb{m}+{schedule}", 2)


@pytest.mark.parametrize(("schedule", "m"), [("1f1b", 4), pytest.param("1f1b", 8, marks=wide), ("gpipe", 4), pytest.param("gpipe", 8, marks=wide)])
def test_the_peak_is_the_predicted_one(schedule: str, m: int) -> None:
    for n, rank in enumerate(ranks_of(schedule, m)):
        agrees(rank, n)


@wide
def test_1f1b_is_flat_in_the_number_of_microbatches_and_gpipe_linear() -> None:
    """Peaks are of the same microbatches, 4 and 8 of them. Of GPipe the activations are what is alive before the first backward."""
    for four, eight in zip(ranks_of("1f1b", 4), ranks_of("1f1b", 8), strict=True):
        assert max(eight["peaks"]) == pytest.approx(max(four["peaks"]), rel=0.01)
    for n, (four, eight) in enumerate(zip(ranks_of("gpipe", 4), ranks_of("gpipe", 8), strict=True)):
        activations = [alive_before(rank, main_loop(rank, "backward"))[0] for rank in (four, eight)]
        assert activations[1] == pytest.approx(2 * activations[0], rel=0.01)
        more = max(eight["peaks"]) - max(four["peaks"])
        assert more == pytest.approx(activations[0], rel=0.02)
        assert max(eight["peaks"]) > 1.5 * max(ranks_of("1f1b", 8)[n]["peaks"])


@wide
def test_bytes_by_axis_of_three_axes() -> None:
    """zero3 over dp, tp and two stages on eight ranks: what each rank sends over each axis, held against the most that explain says of a rank,
    and the sum over the pipeline against its mean."""
    found = counted("hf:LlamaForCausalLM(vocab_size=1024,num_hidden_layers=4,batch_size=16)", "zero3+dp2+tp2+pp2+mb4", 8)
    e = found[0]["explain"]
    assert set(found[0]["sent"]) == {"dp", "tp", "pp"}
    for axis in ("dp", "tp", "pp"):
        mean = sum(rank["sent"].get(axis, 0) for rank in found) / len(found)
        (row,) = (c for c in e["closed_forms"] if c["what"] == f"sent over {axis}")
        assert abs(mean - row["counted"]) <= 0.01 * row["counted"] + SCALARS
        said = {c["axis"]: 0 for c in e["collectives"]}
        for c in e["collectives"]:
            said[c["axis"]] += c["bytes"]
        assert min(abs(rank["sent"].get(axis, 0) - said[axis]) for rank in found) <= 0.01 * said[axis] + SCALARS
