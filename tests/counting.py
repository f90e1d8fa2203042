"""What real ranks counted of a looped step: runs of loop_worker.py on gloo, each once a session."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

SCALARS = 1024  # bytes: norms, losses, label counts, and the small collectives in which ranks agree before a step


@cache
def counted(target: str, plan: str, ranks: int) -> list[dict[str, Any]]:
    """What each rank counted, with rank 0's ``explain`` in all."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    with tempfile.TemporaryDirectory() as folder:
        worker = [str(Path(__file__).with_name("loop_worker.py")), target, plan, folder]
        done = subprocess.run([*launcher, *worker], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=800, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        found: list[dict[str, Any]] = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]
    for each in found:
        each["explain"] = found[0]["explain"]
    return found


def alive_before(rank: dict[str, Any], part: str) -> list[int]:
    """Bytes made in the step that are alive when each instruction of ``part`` begins, by microbatch."""
    return [alive for name, _, alive in rank["between"] if name == part]


def main_loop(rank: dict[str, Any], kind: str) -> str:
    """The function of the last loop's ``kind``: ``forward_2`` where there are two."""
    return max(name for name, _, _ in rank["between"] if name.startswith(kind))


def agrees(rank: dict[str, Any], number: int) -> None:
    """A rank's peak is the predicted one within 1 %, and explain says it."""
    peak, said = max(rank["peaks"]), max(rank["said"])
    assert abs(peak - said) <= 0.01 * said, f"rank {number} held {peak:,} bytes at once, {said:,} are predicted"
    e = rank["explain"]["ranks"][number]
    batch = e["peak_bytes"] - e["param_bytes"] - e["optimizer_bytes"] - e["other_bytes"]
    assert abs(batch - said) <= 0.01 * said
