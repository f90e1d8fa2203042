"""What is written in C++ the compiler takes: whole programs under plans with 16 bits; and what it does not take costs its own kernel only."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import deepseed
from deepseed.codegen import cpp_files, cpp_nests
from deepseed.codegen.inductor import _told, compiler
from deepseed.target import load

pytestmark = pytest.mark.skipif(not compiler(), reason="no C++ compiler")

MODELS = ("GPT2LMHeadModel", "BertForMaskedLM", "LlamaForCausalLM", "T5ForConditionalGeneration", "ViTForImageClassification")
PLANS = ("bf16", "fp16", "zero0+bf16+dp2", "zero1+bf16+dp2+mb2", "zero2+fp16+dp2", "zero3+bf16+dp2", "tp2+bf16", "zero1+dp2")
OFTEN = {("GPT2LMHeadModel", "bf16"), ("BertForMaskedLM", "zero0+bf16+dp2"), ("ViTForImageClassification", "fp16")}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is compiled before, and nothing was said."""
    monkeypatch.setenv("DEEPSEED_CACHE_DIR", str(tmp_path))
    _told.clear()
    return tmp_path


@pytest.mark.parametrize(("name", "plan"), [pytest.param(n, p, marks=() if (n, p) in OFTEN else pytest.mark.wide) for n in MODELS for p in PLANS])
@pytest.mark.turn
def test_the_compiler_takes_all_that_is_written(name: str, plan: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    found = load(f"hf:{name}")
    step = deepseed.compile(found.model, plan, optimizer=torch.optim.AdamW(found.model.parameters()), loss_fn=found.loss_fn, clip_grad_norm=1.0, codegen="cpp")
    with caplog.at_level(logging.INFO, "deepseed"):
        step.compile(found.batch)
    assert not [m for m in caplog.messages if "refuses" in m], caplog.messages


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.norm, self.head = nn.Embedding(97, 40), nn.Embedding(23, 40), nn.LayerNorm(40), nn.Linear(40, 97)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), ids.flatten())


def losses(plan: str, codegen: str) -> list[float]:
    torch.manual_seed(0)
    model = Small()
    ids = torch.randint(0, 97, (3, 23))
    step = deepseed.compile(model, plan, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), loss_fn=lambda m, b: m(b["ids"]), codegen=codegen)
    return [float(step({"ids": ids})) for _ in range(3)]


@pytest.mark.parametrize(("plan", "unit"), [("bf16", 2.0**-6), ("fp16", 2.0**-9)])
def test_a_number_that_was_rounded_is_wide_again(plan: str, unit: float) -> None:
    """A table of which 16 bits are looked up, made wide for a norm: within a unit of the last place of a loss between 4 and 8 (twice 2**-7, 2**-10 of 4)."""
    assert losses(plan, "cpp") == pytest.approx(losses(plan, "python"), abs=2 * unit)


def test_what_the_compiler_refuses_costs_its_own_kernel(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    wrong: list[str] = []
    plain = cpp_nests.source

    def source(k: Any) -> Any:
        made = plain(k)
        if not wrong:
            wrong.append(k.name)
            return type(made)(**{**vars(made), "text": made.text + "\nint nonsense(;\n"})
        return made

    want = losses("zero0", "python")
    monkeypatch.setattr(cpp_files.cpp_nests, "source", source)
    calls: list[str] = []
    fixed = cpp_files.Fixed.__call__
    monkeypatch.setattr(cpp_files.Fixed, "__call__", lambda self, *xs: (calls.append(self.name), fixed(self, *xs))[1])
    with caplog.at_level(logging.INFO, "deepseed"):
        assert losses("zero0", "cpp") == pytest.approx(want, rel=1e-6)  # float32, in other orders of sums
    said = [m for m in caplog.messages if "refuses" in m]
    assert len(said) == 1 and said[0].startswith(f"{wrong[0]} runs as plain Python: ") and "fix: " in said[0]
    assert calls and wrong[0] not in calls


@pytest.mark.parametrize("codegen", ["cpp", "python"])
def test_a_cache_folder_that_cannot_be_written(codegen: str, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """It is only a cache: what is missing is said once, and the step runs."""
    from deepseed.runtime import executable

    want = losses("zero0", "python")
    (folder / "file").write_text("")
    monkeypatch.setenv("DEEPSEED_CACHE_DIR", str(folder / "file"))
    executable._without_files.cache_clear()
    executable._loaded.clear()
    with caplog.at_level(logging.INFO, "deepseed"):
        assert losses("zero0", codegen) == pytest.approx(want, rel=1e-6)
    said = [m for m in caplog.messages if "cannot be kept" in m]
    assert len(said) == (3 if codegen == "cpp" else 1) and all("fix: DEEPSEED_CACHE_DIR=FOLDER" in m for m in said)
