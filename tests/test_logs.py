"""What is said on stderr: the same lines as ever, or JSON with rank and step; and from which level on."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

import deepseed
from deepseed.api import TrainStep
from deepseed.config import ConfigError
from deepseed.logs import at_step, fail, say, warn


def test_a_line_is_the_line_and_json_has_rank_and_step(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("DEEPSEED_LOG", raising=False)
    say("compiling", seconds=2.5)
    assert capsys.readouterr().err == "deepseed: compiling\n"
    monkeypatch.setenv("DEEPSEED_LOG", "json,warning")
    with at_step(7):
        say("not this")
        warn("compiling", seconds=2.5)
    fail("later", step=9)
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    first.pop("time")
    assert first == {"level": "warning", "rank": 3, "step": 7, "message": "compiling", "seconds": 2.5} and (second["step"], second["level"]) == (9, "error")


def test_an_unknown_word_is_said_once_and_a_handler_of_ones_own_gets_records(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEED_LOG", "xml")
    records: list[logging.LogRecord] = []
    mine = logging.Handler()
    mine.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("deepseed").addHandler(mine)
    try:
        say("one")
        say("two")
    finally:
        logging.getLogger("deepseed").removeHandler(mine)
    assert capsys.readouterr().err.count("fix: one of text, json and one of debug, info, warning, error") == 1
    assert [r.getMessage() for r in records] == ["one", "two"] and records[0].rank == 0  # type: ignore[attr-defined]


def test_what_a_step_says_carries_its_number_and_progress_its_loss(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEED_LOG", "json")
    model = torch.nn.Linear(4, 1)
    step = deepseed.compile(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), loss_fn=lambda m, batch: m(batch["x"]).square().mean())
    assert isinstance(step, TrainStep)
    progress = deepseed.Progress(every=2, samples=8)
    losses = []
    for rows in (4, 8, 4):
        losses.append(step({"x": torch.ones(rows, 4)}))
        progress(step, losses[-1])
    second = float(losses[1])
    said = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert {r["step"] for r in said if "compiling program 2" in r["message"]} == {1}
    headline, speed = (r for r in said if "step=" in r["message"])
    assert headline["message"] == f"step=2, skipped=0, lr=[0.1], mom=[0], loss={second:.6g}" and headline["loss"] == second
    assert speed["message"].startswith("epoch=0/micro_step=2/global_step=2, RunningAvgSamplesPerSec=") and speed["samples_per_second"] > 0


def test_progress_goes_on_in_the_count_of_a_step_that_was_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def begin() -> TrainStep:
        model = torch.nn.Linear(4, 1)
        step = deepseed.compile(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), loss_fn=lambda m, batch: m(batch["x"]).square().mean())
        assert isinstance(step, TrainStep)
        return step

    first, second = begin(), begin()
    for _ in range(3):
        first({"x": torch.ones(4, 4)})
    first.save(tmp_path / "c")
    second.load(tmp_path / "c")
    progress = deepseed.Progress(every=4, samples=4)
    capsys.readouterr()
    for _ in range(2):
        progress(second, second({"x": torch.ones(4, 4)}))
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines() if "lr=" in line] == ["deepseed: step=4"] and progress.steps == 5
    module = deepseed.compile(torch.nn.Linear(4, 1))
    progress = deepseed.Progress(every=1, samples=4)
    for _ in range(2):  # its steps are the user's, and forwards are not steps
        module(torch.ones(1, 4)), module(torch.ones(1, 4))
        progress(module)
    assert progress.steps == 2 and module.steps == 4
    for every in (0, -1, 2.5, True):
        with pytest.raises(ConfigError, match=r"Progress\(every=.*\)\n  fix: a number of steps, 1 or more"):
            deepseed.Progress(every=every, samples=4)  # type: ignore[arg-type]
