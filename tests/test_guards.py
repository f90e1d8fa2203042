"""Values that a model reads out of its batch: one compiled step serves them all, and ranks change programs together."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from gloo import guards
from gloo.launch import ranks

import deepseed
from deepseed.api import TrainStep
from deepseed.build import CompileError
from deepseed.capture.eager import eager_reference
from deepseed.target import load

pytestmark = pytest.mark.filterwarnings("ignore")


def close(a: Any, b: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64), rtol=tolerance, atol=tolerance)


# one process ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "plan"), [("hf:LlamaForCausalLM", "zero3+dp2"), ("hf:GPT2LMHeadModel", "tp2"), ("hf:BertForMaskedLM", "zero1+dp2")])
def test_padded_and_unpadded_masks_are_eager_under_one_step(target: str, plan: str) -> None:
    found = load(target)
    padded = found.batch
    assert not padded["attention_mask"].bool().all()
    unpadded = {**padded, "attention_mask": torch.ones_like(padded["attention_mask"])}
    elsewhere = {**padded, "attention_mask": padded["attention_mask"].roll(1, 0)}
    batches = [padded, unpadded, elsewhere, unpadded]
    ours, theirs = copy.deepcopy(found.model).double(), copy.deepcopy(found.model).double()
    step = TrainStep(ours, plan, optimizer=torch.optim.AdamW(ours.parameters()), clip_grad_norm=1.0, widen=True, grads=True, quiet=True)
    optimizer = torch.optim.AdamW(theirs.parameters())
    for number, batch in enumerate(batches):
        loss = step(batch)
        optimizer.zero_grad()
        with eager_reference(theirs, rng=torch.tensor([0, number]), widen=True):
            want = theirs(**batch).loss
            want.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        close(loss, want.detach())
    state = step.state_dict()
    for name, p in theirs.named_parameters():
        close(state[name], p.detach(), 1e-10)
    assert guards.count(step) <= 2  # one where the model's masks are computed, two where it reads them


def test_a_value_that_returns_finds_its_program(capsys: pytest.CaptureFixture[str]) -> None:
    model = guards.fresh()
    step = deepseed.compile(model, "zero1+dp2", optimizer=guards.adamw(model), loss_fn=guards.weighted, backend="simulate")
    assert isinstance(step, TrainStep)
    losses = [float(step(batch)) for batch in guards.RECOMPILING]
    want, theirs = guards.eager(guards.RECOMPILING)
    close(losses, want)
    for name, p in theirs.named_parameters():
        close(step.state_dict()[name], p.detach())
    assert guards.count(step) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "compiling program" in line]
    assert len(said) == 1 and "compiling program 2" in said[0] and "value" in said[0]


def test_the_number_of_programs_is_bounded(capsys: pytest.CaptureFixture[str]) -> None:
    """The program used longest ago goes, and comes again where its batches do; the state is the step's all along."""
    model = guards.fresh()
    step = deepseed.compile(model, "zero0+dp2", optimizer=guards.adamw(model), loss_fn=guards.weighted, backend="simulate", max_programs=2)
    batches = [guards.batch(n, rows=rows) for n, rows in enumerate((4, 8, 4, 12, 4, 8))]
    losses = [float(step(batch)) for batch in batches]
    want, _ = guards.eager(batches)
    close(losses, want)
    assert guards.count(step) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "dropping" in line]
    assert ["x f64[8, 8]" in said[0], "x f64[12, 8]" in said[1], len(said)] == [True, True, 2]
    with pytest.raises(CompileError, match=r"max_programs=0"):
        deepseed.compile(model, "zero0", max_programs=0)


# real ranks -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> list[dict[str, Any]]:
    return ranks(2, guards.all_of_it)


@pytest.mark.parametrize("mode", ["global", "local"])
def test_ranks_recompile_together_when_one_ranks_rows_differ(real: list[dict[str, Any]], mode: str) -> None:
    for rank, each in enumerate(real):
        got = each[mode]
        close(got["losses"], got["want"])
        assert got["error"] < 1e-14 and got["programs"] == [1, 2, 2, 2, 2]
        assert got["said"].count("compiling program 2") == (1 if rank == 0 else 0)  # one line, from one rank
        assert "padding" not in got["said"]  # rows that ranks have joined are no padded batch


@pytest.mark.parametrize("plan", ["zero0", "zero2"])
def test_local_batches_of_any_lengths_are_the_concatenated_batch(real: list[dict[str, Any]], plan: str) -> None:
    for each in real:
        got = each[f"lengths {plan}"]
        close(got["losses"], got["want"])
        assert got["error"] < 1e-14


def test_ranks_that_read_different_values_are_told_so(real: list[dict[str, Any]]) -> None:
    for each in real:
        assert "guards.py:" in each["read"] and "= True on rank 0" in each["read"] and "= False on rank 1" in each["read"] and "fix:" in each["read"]


@pytest.mark.parametrize("plan", ["zero0", "zero3"])
def test_models_initialised_differently_start_as_rank_0s(real: list[dict[str, Any]], plan: str) -> None:
    for rank, each in enumerate(real):
        got = each[f"initial {plan}"]
        close(got["losses"], got["want"])
        assert got["error"] < 1e-14
        assert ("different values of 1 tensors, such as param 'up.weight'" in got["said"]) == (rank == 0)


def test_a_python_number_that_changes_on_all_ranks_and_on_one(real: list[dict[str, Any]]) -> None:
    for each in real:
        got = each["attribute"]
        close(got["losses"], got["want"])
        assert got["programs"] == 2
        assert "the Python value scale, guards.py:" in got["said"] and "5.0' on rank 1" in got["said"], got["said"]
