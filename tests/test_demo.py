"""The main job in the examples: the curves of local gloo ranks lie on that of plain PyTorch, small here, in full under ``wide``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SMALL = ["--hidden", "64", "--layers", "1", "--vocab", "512", "--seq", "16", "--batch", "4", "--steps", "4"]


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import demo

    yield demo


def run_demo(out: Path, *arguments: str) -> tuple[str, dict[str, list[dict[str, float]]]]:
    """What it printed, and the records of each run."""
    command = [sys.executable, str(EXAMPLES / "demo.py"), "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=EXAMPLES.parent, env={**os.environ, "COLUMNS": "100"}, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert (out / "curves.png").stat().st_size > 10_000
    return done.stdout, {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in out.glob("*.jsonl")}


def apart(records: dict[str, list[dict[str, float]]], plan: str) -> float:
    losses = {name: [r["loss"] for r in rows if "loss" in r] for name, rows in records.items()}
    return max(abs(a - b) / abs(b) for a, b in zip(losses[plan], losses["eager"], strict=True))


def weights_apart(out: Path, plan: str) -> float:
    have, want = torch.load(out / f"{plan}.pt"), torch.load(out / "eager.pt")
    assert have.keys() == want.keys()
    return max(float((have[name] - want[name]).abs().max()) for name in want)


def test_two_ranks_train_as_plain_pytorch_does(demo: Any, tmp_path: Path) -> None:
    runs = [demo.Run("PyTorch", "eager", 1), demo.Run("zero3", "zero3", 2), demo.Run("tp2", "tp2", 2)]
    demo.train(runs, tmp_path, SMALL)
    whole = sum(t.numel() * t.element_size() for t in torch.load(tmp_path / "eager.pt").values())
    for run in runs[1:]:
        assert len(run.losses) == 4
        assert max(run.differences(runs[0])) <= 1e-5
        assert weights_apart(tmp_path, run.plan) <= 0.1 * 3e-3 * 4  # AdamW, float32: a tenth of lr * steps
        assert run.get("sent") > 0
        for name, copies in (("parameters", 1), ("gradients", 1), ("optimizer", 2)):
            assert 0.5 * whole * copies <= run.get(name) <= 0.51 * whole * copies  # norms too small to split stay whole
    assert demo.generate(runs[1].weights, demo.train_text.parse(SMALL)).startswith("The class")


@pytest.mark.parametrize("loss, code", [(2.0, 0), (2.0 * (1 + 5e-5), 0), (2.0 * (1 + 2e-4), 1), (float("nan"), 1)])
def test_a_curve_that_leaves_is_an_error(demo: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, loss: float, code: int) -> None:
    def train(runs: Sequence[Any], folder: Path, arguments: Sequence[str]) -> None:
        for run in runs:
            last = loss if run.plan == "tp2" else 2.0
            run.records = [{"ready": 0.0}, *({"loss": x, "seconds": 0.1} for x in (4.0, 3.0, 2.5, last))]
            run.weights = folder / "none"

    monkeypatch.setattr(demo, "train", train)
    monkeypatch.setattr(demo, "generate", lambda weights, args: "")
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(tmp_path), *SMALL])
    assert demo.main() == code


@pytest.mark.wide
def test_fifty_steps_of_the_main_job_lie_on_the_curve_of_plain_pytorch(tmp_path: Path) -> None:
    said, records = run_demo(tmp_path)
    assert len([r for r in records["eager"] if "loss" in r]) == 50
    for plan in ("zero0", "zero3", "tp2"):
        assert apart(records, plan) <= 1e-4
        assert weights_apart(tmp_path, plan) <= 0.1 * 3e-3 * 50
    assert "7.2M parameters" in said
