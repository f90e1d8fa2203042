"""What is computed again, offloaded or chosen to fit a budget changes no number: every way of it with every way to share a step, on three models.

All of it is marked ``wide``; three of the cases run every time. Lock-step in float64 against eager PyTorch, dropout on where the model has it.
"""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch

import deepseed
from deepseed.target import Target, load
from deepseed.verify import VerifyReport, verify

MODELS = {
    "Llama": "hf:LlamaForCausalLM(num_hidden_layers=2)",
    "GPT-2": "hf:GPT2LMHeadModel(num_hidden_layers=2,resid_pdrop=0.1,attn_pdrop=0.1,embd_pdrop=0.1)",
    "T5": "hf:T5ForConditionalGeneration(num_layers=2,num_decoder_layers=2,dropout_rate=0.1)",
}
MEMORY = ("remat", "offload(optimizer)", "offload(optimizer,params)", "offload(gradients)", "offload(activations)", "budget")
PLANS = ("zero1+dp2", "zero2+dp2+mb2", "zero3+dp2", "tp2", "pp2")
QUICK = (("Llama", "zero3+dp2", "remat"), ("GPT-2", "tp2", "offload(optimizer,params)"), ("Llama", "zero2+dp2+mb2", "budget"))
CASES = list(itertools.product(MODELS, PLANS, MEMORY))
PART = 0.7  # of the peak without a budget, that a budget leaves


@cache
def target(model: str) -> Target:
    return load(MODELS[model])


@cache
def free_peak(model: str, plan: str) -> int:
    """Bytes that the fullest rank needs under ``plan`` alone, in the model's float32."""
    found = target(model)
    step = deepseed.compile(found.model, plan, optimizer=torch.optim.AdamW(found.model.parameters()), clip_grad_norm=1.0, backend="simulate")
    step.compile(found.batch)
    return max(rank.peak_bytes for rank in step.explain().ranks)


def check(model: str, plan: str, word: str) -> VerifyReport:
    """Trains two steps; in float64 numbers are twice as long, and so is the budget."""
    found = target(model)
    budget = int(2 * PART * free_peak(model, plan)) if word == "budget" else None
    report = verify(found.model, found.batch, f"{plan}+{word}" if budget is None else f"{plan}+budget({budget})", loss_fn=found.loss_fn, steps=2, backend="simulate")
    assert report.ok, str(report)
    if budget is not None:
        assert max(report.counted_peak_bytes) <= budget, (report.counted_peak_bytes, budget)
    if word.startswith("offload"):
        assert min(report.counted_host_bytes) > 0
    return report


@pytest.mark.parametrize(("model", "plan", "word"), QUICK)
def test_memory_changes_no_number(model: str, plan: str, word: str) -> None:
    check(model, plan, word)


@pytest.mark.wide
@pytest.mark.parametrize(("model", "plan", "word"), [case for case in CASES if case not in QUICK])
def test_no_kind_of_memory_changes_a_number(model: str, plan: str, word: str) -> None:
    check(model, plan, word)


def test_every_case_is_met() -> None:
    assert set(QUICK) <= set(CASES) and len(CASES) == 90
