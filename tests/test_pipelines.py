"""The promise under pipelines: every plan with stages means what eager PyTorch means, for models from Hugging Face and for such as pipelines find hard.

Lock-step in float64 against the user's own module, loss and optimizer: three steps, clipping below the norm, another number of labels in
each microbatch. The whole matrix is ``wide``; a part of it that meets every schedule and every kind of plan runs every time.
"""

from __future__ import annotations

import re

import pipeline_models
import pytest
from pipeline_cases import CLIP, MATRIX, MODELS, PLANS, SCHEDULES, built, layers
from pipeline_models import ROWS

from deepseed.ir.contract import PassError
from deepseed.plan import parse_plan
from deepseed.verify import VerifyReport, verify

pytestmark = pytest.mark.filterwarnings("ignore")
wide = pytest.mark.wide

HARD_CLIP = 0.01
STATISTICS, TOGETHER = "batch norm", "contrastive towers"  # models that need all rows at once
APART = [name for name in pipeline_models.MODELS if name not in (STATISTICS, TOGETHER)]
HARD_PLANS = (
    "pp2", "pp2+interleaved2", "pp4+zb", "pp2+mb2+zb", "tp2+pp2+gpipe", "zero1+dp2+pp2+zb", "zero2+dp2+pp2+interleaved2", "zero3+dp2+pp2",
    "zero3+dp2+pp4+gpipe", "zero3+dp2+tp2+pp2+zb", "zero3+dp3+pp2", "mb2", "zero2+dp2+mb3",
)  # fmt: skip
QUICK = [("llama", "zero3+tp2+pp2", "zb"), ("gpt2", "zero1+dp2+pp2", "interleaved2")]
QUICK_HARD = [
    ("unet", "zero3+dp2+pp2"), ("unet", "pp4"), ("one layer five times", "zero2+dp2+pp2+gpipe"), ("a loss of each layer", "tp2+pp2+zb"),
    ("the first half frozen", "pp2+mb4+zb"), ("frozen layers", "zero1+dp2+pp2+interleaved2"), ("odd sizes", "zero3+dp2+pp2+mb3"),
    ("one layer five times", "pp2+interleaved2+mb1"), ("a loss of each layer", "zero2+dp2+sp2+mb2"),
]  # fmt: skip


def equal(report: VerifyReport, plan: str) -> None:
    assert report.ok, str(report)
    assert report.world_size == parse_plan(plan).mesh().ranks and report.instances_checked > 10


def check(model: str, plan: str, schedule: str) -> None:
    module, batch = built(model, layers(plan, schedule))
    equal(verify(module, batch, f"{plan}+{schedule}", clip_grad_norm=CLIP, backend="simulate"), plan)


def check_hard(model: str, plan: str) -> None:
    module, batch, loss = pipeline_models.built(model)
    equal(verify(module, batch, plan, loss_fn=loss, clip_grad_norm=HARD_CLIP, backend="simulate"), plan)


@pytest.mark.parametrize(("model", "plan", "schedule"), QUICK)
def test_a_pipeline_means_what_eager_means(model: str, plan: str, schedule: str) -> None:
    pytest.importorskip("transformers")
    check(model, plan, schedule)


@pytest.mark.parametrize(("model", "plan"), QUICK_HARD)
@pytest.mark.turn
def test_hard_models(model: str, plan: str) -> None:
    """Skips over stages, layers and heads on all of them, weights that are frozen, sizes that nothing divides."""
    check_hard(model, plan)


@wide
@pytest.mark.parametrize(("model", "plan", "schedule"), MATRIX)
def test_every_pipeline_means_what_eager_means(model: str, plan: str, schedule: str) -> None:
    check(model, plan, schedule)


@wide
@pytest.mark.parametrize("model", APART)
@pytest.mark.parametrize("plan", HARD_PLANS)
def test_hard_models_under_every_plan(model: str, plan: str) -> None:
    if model == "odd sizes" and "mb2" in plan:  # of six rows
        plan = plan.replace("mb2", "mb3")
    if model != "odd sizes":  # of eight rows
        plan = plan.replace("mb3", "mb4")
    check_hard(model, plan)


def test_the_quick_part_meets_every_schedule_and_stage() -> None:
    plans = [parse_plan(f"{plan}+{schedule}") for _, plan, schedule in QUICK] + [parse_plan(plan) for _, plan in QUICK_HARD]
    assert {p.kind for p in plans} == {"gpipe", "1f1b", "interleaved", "zb"} and {p.stage for p in plans} == {0, 1, 2, 3}
    assert {m for m, _ in QUICK_HARD} <= set(APART) and {m for m, _, _ in QUICK} <= set(MODELS)
    assert len(MATRIX) == len(MODELS) * len(PLANS) * len(SCHEDULES)


@pytest.mark.parametrize("model", ["llama", "t5", "bert"])
def test_microbatches_count_unequal_labels(model: str) -> None:
    pytest.importorskip("transformers")
    _, batch = built(model, 4)
    for m in (2, 4):
        counts = [int((rows != -100).sum()) for rows in batch["labels"].chunk(m)]
        assert len(set(counts)) == m, counts


# models that need all rows at once ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["pp2+mb1", pytest.param("pp2+mb2+bn(exact)+zb", marks=wide), "pp2+mb4+bn(local)", pytest.param("zero3+dp2+pp2+bn(local)+zb", marks=wide)])
def test_batch_norms(plan: str) -> None:
    """Exact over all microbatches, or of each: eager then sees the same rows together."""
    check_hard(STATISTICS, plan)


def test_statistics_over_microbatches_have_their_price_and_their_way_out() -> None:
    with pytest.raises(PassError, match=r"13 loops over the microbatches compute 5\.\d times the step: .* at norms\.0 \(pipeline_models\.py:\d+\)\n  fix: bn\(local\)"):
        check_hard(STATISTICS, "pp2")


@pytest.mark.parametrize("plan", ["pp2+mb1+gpipe", pytest.param("zero3+dp2+pp2+mb1+zb", marks=wide)])
def test_rows_that_meet_in_the_loss(plan: str) -> None:
    check_hard(TOGETHER, plan)


def test_rows_of_other_microbatches_cannot_be_met() -> None:
    with pytest.raises(PassError, match=rf"\(pipeline_models\.py:\d+\) needs %\S+ \[{ROWS}, 16\] of all 4 microbatches at once.*\n  fix: a plan without mb") as found:
        check_hard(TOGETHER, "pp2")
    assert re.search(r"%\S+ = aten", str(found.value))
