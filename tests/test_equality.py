"""The promise: every plan means what eager PyTorch means. Lock-step in float64 against the user's own module, loss and optimizer.

The whole matrix is marked ``wide``; a seeded sample of it, each model and each kind of plan at least once, runs every time.
"""

from __future__ import annotations

import itertools
import random

import pytest
from matrix import CLIP, MODELS, OPTIMIZERS, STEPS, built
from torch import nn

from deepseed.verify import verify

PLANS = [f"zero{stage}+dp{n}" for stage in range(4) for n in (2, 4)] + ["tp2", "tp4", "zero1+tp2+dp2", "zero3+tp2+dp2"]
MATRIX = list(itertools.product(MODELS, PLANS, OPTIMIZERS))


def sample() -> list[tuple[str, str, str]]:
    """Each model with three plans, so that each plan is met; and fewer key-value heads than tp ranks."""
    rng = random.Random(0)
    plans = rng.sample(PLANS, len(PLANS))
    return [(model, plans[(3 * i + k) % len(plans)], rng.choice(sorted(OPTIMIZERS))) for i, model in enumerate(MODELS) for k in range(3)] + [("llama", "tp4", "adamw")]


def check(model: str, plan: str, optimizer: str) -> None:
    module, batch, loss_fn = built(model)
    report = verify(module, batch, plan, optimizer_factory=OPTIMIZERS[optimizer], loss_fn=loss_fn, clip_grad_norm=CLIP, steps=STEPS)
    assert report.ok, str(report)
    assert report.instances_checked > 20


@pytest.mark.parametrize(("model", "plan", "optimizer"), sample())
def test_a_plan_means_what_eager_means(model: str, plan: str, optimizer: str) -> None:
    check(model, plan, optimizer)


@pytest.mark.wide
@pytest.mark.parametrize(("model", "plan", "optimizer"), MATRIX)
def test_every_plan_means_what_eager_means(model: str, plan: str, optimizer: str) -> None:
    check(model, plan, optimizer)


def test_the_sample_meets_every_model_and_plan() -> None:
    assert {m for m, _, _ in sample()} == set(MODELS)
    assert {p for _, p, _ in sample()} == set(PLANS)


def test_the_batches_are_uneven() -> None:
    """A different number of ignored labels on each data-parallel rank, and dropout on where the model has it."""
    for model in ("llama", "gpt2", "bert"):
        module, batch, _ = built(model)
        ignored = [(part == -100).sum().item() for part in batch["labels"].chunk(4)]
        assert len(set(ignored)) >= 3 and ignored[0] + ignored[1] != ignored[2] + ignored[3], ignored
        assert module.training
    dropouts = [m.p for m in built("gpt2")[0].modules() if isinstance(m, nn.Dropout)]
    assert dropouts and min(dropouts) > 0
