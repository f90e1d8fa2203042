"""How idle is a pipeline where all stages take as long? What a schedule says, run in simulated time; and what a plan's reader should know of it."""

from __future__ import annotations

from functools import cache

from deepseed.ir.messages import chain
from deepseed.plan import Plan
from deepseed.solver.schedules import lanes
from deepseed.timeline import simulate


@cache
def idle_share(kind: str, ranks: int, microbatches: int, chunks: int = 1) -> float:
    """The share of a step in which a rank is idle: a forward takes one unit, a backward two, of which ``zb`` puts off one.

    >>> idle_share("1f1b", 4, 8) == 3 / (8 + 3), round(idle_share("zb", 4, 8), 12) == round(1 / (8 + 1), 12)
    (True, True)
    """
    kinds = {"forward": 1.0, "backward": 1.0, "weights": 1.0} if kind == "zb" else {"forward": 1.0, "backward": 2.0}
    times = {(f"{part}.1", stage): units for part, units in kinds.items() for stage in range(ranks * chunks)}
    return simulate(lanes(kind, ranks, microbatches, chunks, 1, set(times)), times, chain(ranks * chunks)).bubble_share


def notes(plan: Plan) -> tuple[str, ...]:
    """``plan.notes``, and a word where a pipeline has fewer microbatches than stages."""
    if plan.stages == 1 or plan.mb is None or plan.mb >= plan.stages:
        return plan.notes
    now, then = (idle_share(plan.kind, plan.stages, m, plan.chunks) for m in (plan.mb, 2 * plan.stages))
    return (*plan.notes, f"mb{plan.mb} is fewer microbatches than pp{plan.stages} has stages: {now:.0%} of the ranks' time is idle (mb{2 * plan.stages}: {then:.0%})")
