"""``deepseed env``: complete, quick, and there even where what it asks fails."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from deepseed import env
from deepseed.cli import app


def test_what_is_said_as_text_and_as_json() -> None:
    begun = time.process_time()
    done = CliRunner().invoke(app, ["env", "--json"])
    assert time.process_time() - begun < 3 and done.exit_code == 0
    found = json.loads(done.output)
    assert found["versions"]["torch"] == torch.__version__ and found["torch"]["gloo"] is True and found["machine"]["cores"] >= 1
    assert len(found["torch"]["devices"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert {v["verdict"] for v in found["verdicts"]} <= {"good", "note", "bad"} and any(v["what"].startswith(f"torch {torch.__version__}") for v in found["verdicts"])
    shown = CliRunner().invoke(app, ["env"]).output
    assert all(f"\n{section}\n" in f"\n{shown}" for section in found) and f"torch         {torch.__version__}" in shown


def test_a_version_that_does_not_fit_has_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "_version", {"torch": "2.9.1", "triton": "3.6.0"}.get)
    found = {v["what"].split()[0]: v for v in env._verdicts()}
    assert found["torch"] == {"verdict": "bad", "what": "torch 2.9.1 (at least 2.11, below 2.14)", "fix": 'pip install "torch>=2.11,<2.14"'}
    assert found["triton"]["verdict"] == "good" and found["wandb"]["what"].endswith("optional)")


def test_it_never_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise OSError("no such thing")

    for name in ("_torch", "_cores", "_memory", "_disk", "_caches", "_verdicts"):
        monkeypatch.setattr(env, name, broken)
    done = CliRunner().invoke(app, ["env"])
    assert done.exit_code == 0 and done.output.count("cannot be asked: OSError: no such thing") == 6
