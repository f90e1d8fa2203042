"""`explain --kernels --codegen triton --measure` on a device: each group's kernels, or what was faster there, by the clock."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deepseed.cli import app


def test_each_kernel_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("triton")
    monkeypatch.setenv("DEEPSEED_CACHE_DIR", str(tmp_path))
    done = CliRunner().invoke(app, ["explain", "hf:LlamaForCausalLM(num_hidden_layers=1)", "--kernels", "--codegen", "triton", "--measure", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["kernels"] and all(1e-7 < k["seconds"] < 0.1 and k["share"] > 0 for k in found["kernels"])
    assert found["machine"]["memory"] > 1e11  # bytes a second, measured for this: of a device
