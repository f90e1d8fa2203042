"""budget(BYTES): what is chosen fits, costs the least of what was there to choose, runs within that memory, and means what the model means."""

from __future__ import annotations

import itertools
import re
from functools import cache
from typing import Any

import pytest
import torch

import deepseed
from deepseed import pipeline
from deepseed.budget import BEHIND, MARGIN, SETS, Search
from deepseed.capture import capture
from deepseed.ir.amounts import format_bytes, parse_bytes
from deepseed.meshes import program_mesh
from deepseed.plan import Plan, PlanError, parse_plan
from deepseed.target import Target, load
from deepseed.verify import verify

wide = pytest.mark.wide
LLAMA = "hf:LlamaForCausalLM(num_hidden_layers=2)"


@cache
def target(text: str = LLAMA) -> Target:
    return load(text)


@cache
def search(text: str) -> Search:
    """Of a plan's words without a budget."""
    plan, found = parse_plan(text), target()
    optimizer = torch.optim.AdamW(found.model.parameters())
    captured = capture(found.model, found.batch, optimizer=optimizer, clip_grad_norm=1.0)
    mesh = program_mesh(captured.program, plan, plan.mesh())

    def arguments(plan: Plan) -> dict[str, dict[str, Any]]:
        return pipeline.arguments(mesh, plan.stage, {}, plan=plan)

    head = pipeline.run(captured.program, arguments(plan), pipeline.SHARED[:BEHIND], check=False)
    return Search(head[-1].program, plan, pipeline.SHARED[BEHIND:], arguments)


@wide
def test_of_all_choices_the_cheapest_that_fits() -> None:
    """Against trying everything. Bisection takes peaks to fall from level to level: where one does not, a level that costs more may be taken."""
    s = search("zero1+dp2")
    all_of = [s.choice(saved, every, offload) for (saved, every), offload in itertools.product(s.levels, s.sets)]
    peaks = sorted({c.peak for c in all_of})
    assert len(peaks) > 10 and peaks[0] < peaks[-1] / 3
    exact = 0
    for room in peaks[:: max(1, len(peaks) // 8)]:
        budget = next(b for b in range(room, 2 * room) if b - int(MARGIN * b) >= room)
        found = s.fit(budget)
        best = min((c for c in all_of if c.peak <= room), key=lambda c: c.seconds)
        assert found.peak <= room and found.seconds <= 1.1 * best.seconds, f"{budget}: {found}, and {best}"
        exact += found.seconds <= best.seconds
    assert exact >= 6


def test_a_finer_grid_keeps_the_best_of_the_coarser_one() -> None:
    """Where peaks do not fall from level to level, the levels between may not fit."""
    s = object.__new__(Search)
    s.levels = [(0.0, n) for n in range(38)]
    for first, good in itertools.product(range(20), range(38)):
        prices = {first: 2.0, good: 1.0}
        assert s._refined(first, lambda n, prices=prices: prices.get(n, float("inf"))) in prices  # type: ignore[misc]


def test_enough_memory_changes_nothing() -> None:
    s = search("zero1+dp2")
    found = s.fit(1 << 40)
    assert found.offload == () and found.saved == 1.0 and found.seconds == min(c.seconds for c, _ in s.tried.values())


def test_what_the_plan_offloads_stays_offloaded() -> None:
    s = search("zero1+dp2+offload(optimizer)")
    assert all("optimizer" in each for each in s.sets) and len(s.sets) < len(SETS)


@pytest.mark.turn
def test_too_small_a_budget_says_what_would_do_and_what_fills_it() -> None:
    found = target()
    with pytest.raises(PlanError, match="is too small: the least is") as error:
        deepseed.compile(found.model, "zero1+dp2+budget(100KiB)", optimizer=torch.optim.AdamW(found.model.parameters()), example_batch=found.batch)
    said = str(error.value)
    assert "with offload(optimizer, gradients, params, activations)" in said and re.search(r"at its peak, .*: .*gradients \d+\.\d KiB", said), said
    needed = int(said.partition("fix: budget(")[2].partition(")")[0])
    s = search("zero1+dp2")
    s.fit(needed)
    with pytest.raises(PlanError):
        s.fit(needed * 97 // 100)




@pytest.mark.parametrize(
    ("plan", "part"),
    [("zero1+dp2", 0.5), pytest.param("zero3+dp2", 0.5, marks=wide), pytest.param("zero2+dp2+pp2+mb2", 0.6, marks=wide), pytest.param("tp2", 0.4, marks=wide), pytest.param("zero3+dp2", 0.6, marks=wide)],
)
def test_a_step_runs_within_its_budget_and_is_equal(plan: str, part: float) -> None:
    """The arena enforces the budget: an op that asked for more would fail."""
    free = search(plan).choice(1.0, 0, ())
    budget = int(part * free.peak)
    report = verify(target().model, target().batch, f"{plan}+budget({2 * budget})", backend="simulate")  # float64 takes twice the memory
    assert report.ok, str(report)
    assert report.counted_peak_bytes and all(n <= 2 * budget for n in report.counted_peak_bytes)


def test_a_later_program_finds_its_state_where_the_first_put_it() -> None:
    found = load(LLAMA)
    step = deepseed.compile(found.model, "zero1+dp2+budget(1MiB)", optimizer=torch.optim.AdamW(found.model.parameters()))
    step(found.batch)
    assert any(i.type.host for i in step.program.by_role("state"))
    shorter = {k: v[:, :8] for k, v in found.batch.items()}
    step(shorter)
    assert all(i.type.host for i in step.program.by_role("state") if i.type.shape) and step.programs.compiled == 2


def test_amounts() -> None:
    assert parse_plan("budget(8GiB)").budget == 8 * 2**30 and str(parse_plan("budget(8192 MiB)+zero1")) == "zero1+budget(8GiB)"
    for n in (1, 1024, 1536, 2**20 + 1, 3 * 2**30):
        assert parse_bytes(format_bytes(n)) == n
    for wrong in ("budget(0)", "budget(lots)", "budget()"):
        with pytest.raises(PlanError, match="is no amount of memory"):
            parse_plan(wrong)
