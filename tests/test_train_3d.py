"""The example of three axes: its curve lies on that of one device, on real ranks and on simulated ones."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deepseed.runtime.executable import cache_dir

pytest.importorskip("transformers")
EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "train_3d.py"
SMALL = ["--hidden", "32", "--vocab", "384", "--seq", "12", "--batch", "8", "--steps", "4"]


def run(tmp_path: Path, *arguments: str) -> tuple[str, list[dict[str, float]], float]:
    """What it printed, its records, and the largest relative difference that it says."""
    command = [sys.executable, "-W", "ignore", str(EXAMPLE), "--compare", "--log", str(tmp_path / "log.jsonl"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path), "DEEPSEED_CACHE_DIR": str(cache_dir())}, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    said = re.search(r"largest relative difference from one device over (\d+) steps: (\S+)", done.stdout)
    assert said is not None and int(said[1]) == len(records), done.stdout
    apart = max(abs(r["loss"] - r["one_device"]) / r["one_device"] for r in records)
    assert float(said[2]) == pytest.approx(apart, rel=0.1) or apart == 0
    assert len({r["tokens"] for r in records}) > 1, "each batch has another number of labels"
    return done.stdout + done.stderr, records, apart


@pytest.mark.turn
def test_two_stages_on_real_ranks_train_as_one_device_does(tmp_path: Path) -> None:
    said, records, apart = run(tmp_path, *SMALL, "--ranks", "2", "--plan", "zero3+pp2+mb4+zb", "--layers", "2")
    assert "mesh(pp=2) (gloo)" in said and len(records) == 4
    assert "zero3 does nothing with dp1: no other data-parallel rank to share the state with" in said
    assert apart <= 1e-5


@pytest.mark.turn
def test_three_axes_simulated_in_float64_train_as_one_device_does(tmp_path: Path) -> None:
    said, records, apart = run(tmp_path, *SMALL, "--simulate", "--dtype", "float64", "--layers", "2")
    assert "dp2+zero3+tp2+pp2+mb4 on mesh(pp=2, dp=2, tp=2) (simulate)" in said and len(records) == 4
    assert apart <= 1e-12


@pytest.mark.wide
@pytest.mark.parametrize(("dtype", "allowed"), [("float32", 1e-4), ("float64", 1e-10)])
def test_fifty_steps_of_three_axes_on_eight_ranks(tmp_path: Path, dtype: str, allowed: float) -> None:
    said, records, apart = run(tmp_path, "--dtype", dtype)
    assert "mesh(pp=2, dp=2, tp=2) (gloo)" in said and len(records) == 50
    assert records[-1]["loss"] < records[0]["loss"] - 1.0
    assert apart <= allowed
