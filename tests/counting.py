"""What real ranks counted: cost_worker.py, or loop_worker.py for a step of several instructions, on gloo; each once a session."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import cost_worker
import loop_worker
from gloo.launch import ranks as launched

SCALARS = 1024  # bytes: norms, losses, label counts, and the small collectives in which ranks agree before a step

BATCH = 16384  # bytes: a step holds its part of a batch, which the counting workers do not see being made


@cache
def counted(target: str, plan: str, ranks: int, by: str = "loop_worker") -> list[dict[str, Any]]:
    """What each rank counted, with rank 0's ``explain`` in all."""
    worker = {"loop_worker": loop_worker.main, "cost_worker": cost_worker.main}[by]
    found: list[dict[str, Any]] = [json.loads(said) for said in launched(ranks, worker, target, plan)]
    for each in found:
        each["explain"] = found[0]["explain"]
    return found


def alive_before(rank: dict[str, Any], part: str) -> list[int]:
    """Bytes made in the step that are alive when each instruction of ``part`` begins, by microbatch."""
    return [alive for name, _, alive in rank["between"] if name == part]


def main_loop(rank: dict[str, Any], kind: str) -> str:
    """The function of the last loop's ``kind``: ``forward_2`` where there are two."""
    return max(name for name, _, _ in rank["between"] if name.startswith(kind))


def axes_agree(found: list[dict[str, Any]], axes: set[str]) -> None:
    """What ranks sent over each axis: in the mean what explain's table says, and one rank the most that it says of a rank."""
    e = found[0]["explain"]
    for rank in found:
        assert set(rank["sent"]) == axes
    for axis in axes:
        mean = sum(rank["sent"][axis] for rank in found) / len(found)
        (row,) = (c for c in e["closed_forms"] if c["what"] == f"sent over {axis}")
        assert abs(mean - row["counted"]) <= 0.01 * row["counted"] + SCALARS
        said = sum(c["bytes"] for c in e["collectives"] if c["axis"] == axis)
        assert min(abs(rank["sent"][axis] - said) for rank in found) <= 0.01 * said + SCALARS


def agrees(rank: dict[str, Any], number: int) -> None:
    """A rank's peak is the predicted one within 1 %, and explain says it. So is what it holds at most during each instruction, but for the rows
    of a batch; where it sends messages, these stay until the receiver takes them, which only the clock knows."""
    for (name, mb, _), peak, said in zip(rank["between"], rank["peaks"], rank["said"], strict=True):
        assert rank["messages"] or abs(peak - said) <= 0.01 * said + BATCH, f"rank {number} held {peak:,} bytes at once in {name} of microbatch {mb}, {said:,} are predicted"
    peak, said = max(rank["peaks"]), max(rank["said"])
    assert abs(peak - said) <= 0.01 * said, f"rank {number} held {peak:,} bytes at once, {said:,} are predicted"
    e = rank["explain"]["ranks"][number]
    batch = e["peak_bytes"] - e["param_bytes"] - e["optimizer_bytes"] - e["other_bytes"]
    assert abs(batch - said) <= 0.01 * said
