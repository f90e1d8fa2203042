"""Random meshes, plans, schedules and microbatches: no pipeline deadlocks, every value that is sent is received, ranks compute what one device does.

A rank that waits for what nobody sends, or a message that nobody reads, is an error of the simulated ranks. The only refusals that
count as such are those of more stages than the forward has cut points.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import UnsatisfiedAssumption
from random_pipelines import RANKS, cases, run

from deepseed.ir.contract import PassError
from deepseed.plan import parse_plan

pytestmark = pytest.mark.filterwarnings("ignore")
TALLY: Counter[str] = Counter()


@pytest.fixture(autouse=True, scope="module")
def told() -> Iterator[None]:
    yield
    print("\n" + ", ".join(f"{n} {what}" for what, n in sorted(TALLY.items())))


def drawn(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """``examples`` draws, the same every time."""
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck), print_blob=False)


def computes_the_same(case: tuple[str, str]) -> None:
    name, plan = case
    p = parse_plan(plan).resolve()
    assert p.stages > 1 and p.mesh().ranks <= RANKS
    try:
        found = run(name, plan)
    except PassError as error:
        if "cut points" not in str(error):
            raise
        TALLY["refused: too few cut points"] += 1
        raise UnsatisfiedAssumption from None
    assert not found, f"{name} under {plan}: {found}"
    for word in ("pipelines that compute the same", f"of {p.kind}", f"of zero{p.stage}", f"of pp{p.stages}"):
        TALLY[word] += 1


@given(cases())
@drawn(12)
def test_a_random_pipeline_computes_what_one_device_does(case: tuple[str, str]) -> None:
    computes_the_same(case)


@pytest.mark.wide
@given(cases())
@drawn(int(os.environ.get("DEEPSEED_EXAMPLES", "500")))
def test_random_pipelines_compute_what_one_device_does(case: tuple[str, str]) -> None:
    computes_the_same(case)
