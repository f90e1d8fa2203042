"""``budget(BYTES)``: what to compute again, gather again and offload, so that every rank's peak fits at the least predicted time.

A choice is a level of recomputation (deepseed.solver.remat) and a set of what lies on the host. The passes behind ``lower_reshards`` run
unchecked for each choice that is tried; the peak is the liveness of what they give (deepseed.memory), the time its course in simulated time (deepseed.speed).
Levels are in the order of rising time and falling peaks, so the cheapest that fits is found by bisection; a set of offloads is passed over where it takes longer with nothing
computed again than the best found. The one that is chosen runs through the same passes once more, checked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deepseed import pipeline
from deepseed.explain_text import amount
from deepseed.ir.contract import Pass
from deepseed.ir.program import Program
from deepseed.memory import curve, live_bytes, memory
from deepseed.plan import Plan, PlanError
from deepseed.solver.remat import levels
from deepseed.speed import Machine, course
from deepseed.timing import run_schedule
from deepseed.unroll import original, unroll
from deepseed.view_lanes import storage_kinds

MARGIN = 0.01  # of the budget, left free: a prediction is right within this
SETS: tuple[tuple[str, ...], ...] = (  # what lies on the host, each after what costs less
    (), ("activations",), ("optimizer",), ("optimizer", "gradients"), ("optimizer", "activations"), ("optimizer", "gradients", "params"),
    ("optimizer", "gradients", "params", "activations"),
)  # fmt: skip
BEHIND = [p.name for p in pipeline.SHARED].index("plan_memory")
Arguments = Mapping[str, Mapping[str, Any]]
Hosted = Mapping[tuple[str, str], bool]


@dataclass(frozen=True)
class Choice:
    """``saved`` and ``every``: plan_memory's; ``offload``: of the plan. Predicted: the most bytes on a device, on a host, and seconds a step."""

    saved: float
    every: int
    offload: tuple[str, ...]
    peak: int
    host: int
    seconds: float

    def plan(self, plan: Plan) -> Plan:
        """``plan`` with this choice made."""
        return replace(plan, offload=self.offload)

    def __str__(self) -> str:
        return f"{describe(self)}: peak {amount(self.peak)} on the device, {amount(self.host)} on the host, {1e3 * self.seconds:.3g} ms a step, estimated"


def run_shared(
    p: Program, plan: Plan, arguments: Callable[[Plan], Arguments], *, check: bool = True, on_pass: Callable[[pipeline.Passed], None] | None = None,
    hosted: Hosted | None = None, machine: Machine | None = None, passes: Sequence[Pass] | None = None,
) -> tuple[list[pipeline.Passed], Choice | None]:  # fmt: skip
    """The passes over a captured program that all ranks share, and what a budget in the plan has chosen. ``arguments``: of the passes under a plan.
    ``hosted``: whether an earlier program stores an input on the host; ``machine``: as it was measured, where it was. Raises PlanError where nothing fits the budget."""
    passes = pipeline.SHARED if passes is None else passes

    def timed(plan: Plan) -> Arguments:
        return {**arguments(plan), "schedule_collectives": {"machine": machine, "live": live_bytes}}

    if plan.budget is None:
        return pipeline.run(p, timed(plan), passes, check=check, on_pass=on_pass), None
    head = pipeline.run(p, timed(plan), passes[:BEHIND], check=check, on_pass=on_pass)
    search = Search(head[-1].program, plan, pipeline.SHARED[BEHIND:], timed, hosted=hosted, machine=machine)
    found = search.fit(plan.budget)
    args = with_level(timed(found.plan(plan)), found.saved, found.every)
    return head + pipeline.run(head[-1].program, args, passes[BEHIND:], check=check, on_pass=on_pass), found


class Search:
    """The choices for ``p``, a program after ``lower_reshards``. ``tail``: the passes behind it; ``arguments``: theirs under a plan. ``hosted``: whether an
    earlier program stores an input on the host, where there is one."""

    def __init__(
        self, p: Program, plan: Plan, tail: Sequence[Pass], arguments: Callable[[Plan], Arguments], *, hosted: Hosted | None = None, machine: Machine | None = None
    ) -> None:
        self.p, self.plan, self.tail, self.arguments, self.machine = p, plan, tail, arguments, machine or Machine()
        sets = [tuple(s for s in _ORDER if s in {*plan.offload, *more}) for more in SETS]
        self.sets = [s for n, s in enumerate(sets) if s not in sets[:n] and (not hosted or _as_stored(s, hosted))]
        self.levels = [(0.0, 1)] if plan.remat else levels(p, self.machine)
        self.tried: dict[tuple[float, int, tuple[str, ...]], tuple[Choice, Program]] = {}

    def fit(self, budget: int) -> Choice:
        """The cheapest choice found whose peak leaves ``MARGIN`` of ``budget`` bytes. Raises PlanError with the least that would do, and
        what fills it."""
        room = budget - int(MARGIN * budget)
        best: Choice | None = None
        for offload in self.sets:
            free = self._at(0, offload)
            if best is not None and free.seconds >= best.seconds:
                continue
            first = 0 if free.peak <= room else self._bisect(offload, room)
            if first is not None:
                found = self._fastest(offload, room, first)
                best = found if best is None or found.seconds < best.seconds else best
        if best is None:
            raise PlanError(self._impossible(budget))
        return best

    def _bisect(self, offload: tuple[str, ...], room: int) -> int | None:
        """The first level that fits, as if peaks fell up to the level with the least; None where that does not fit."""
        low, high = 0, self._refined(0, lambda n: self._at(n, offload).peak)
        if self._at(high, offload).peak > room:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            if self._at(middle, offload).peak <= room:
                high = middle
            else:
                low = middle
        return high

    def _refined(self, first: int, price: Callable[[int], float]) -> int:
        """The level from ``first`` on with the least price: the best of a grid, which is made finer around it."""
        best, low, high = first, first, len(self.levels) - 1
        while True:
            width = max(1, (high - low) // 4)
            grid: list[int] = sorted({*range(low, high + 1, width), high, best})  # a finer grid may miss the best of the coarser one
            best = min(grid, key=price)
            if width == 1:
                return best
            low, high = max(first, best - width), min(len(self.levels) - 1, best + width)

    def _fastest(self, offload: tuple[str, ...], room: int, first: int) -> Choice:
        """Of the levels from ``first`` on. What is computed again need not be moved: with activations on the host a later level may be
        faster, and a grid that is refined around its best point looks for it."""
        if "activations" not in offload:
            return self._at(first, offload)

        def price(level: int) -> float:
            found = self._at(level, offload)
            return found.seconds if found.peak <= room else float("inf")

        return self._at(self._refined(first, price), offload)

    def _at(self, level: int, offload: tuple[str, ...]) -> Choice:
        saved, every = self.levels[level]
        return self.choice(saved, every, offload)

    def choice(self, saved: float, every: int, offload: tuple[str, ...]) -> Choice:
        """Run the passes and count."""
        key = (saved, every, offload)
        if key not in self.tried:
            args = with_level(self.arguments(replace(self.plan, offload=offload)), saved, every)
            p = pipeline.run(self.p, args, self.tail, check=False)[-1].program
            found = [memory(step) for step in lanes(p)]
            seconds = run_schedule(p, self.machine).timeline.step_seconds if p.schedule is not None else course(p, p.ops, self.machine).seconds
            self.tried[key] = Choice(saved, every, offload, max(m.peak_bytes for m in found), max(m.host_bytes for m in found), seconds), p
        return self.tried[key][0]

    def _impossible(self, budget: int) -> str:
        """What fills the least peak that was found."""
        least, p = min(self.tried.values(), key=lambda found: found[0].peak)
        kinds = storage_kinds(p)
        rows = []
        for step in lanes(p):
            flat = {name: kinds.get(original(name), "other") for name in step.types}
            rows += [(sum(row.values()), row, op.name) for op, row in zip(step.ops, curve(step, flat), strict=True)]
        _, row, at = max(rows, key=lambda found: found[0])
        fills = ", ".join(f"{kind} {amount(n)}" for kind, n in sorted(row.items(), key=lambda item: -item[1]) if n)
        needed = -(-least.peak * 100 // 99)
        free = self.tried[*self.levels[0], self.sets[0]][0]
        how = describe(least)
        return (
            f"budget({amount(budget)}) is too small: the least is {amount(needed)} ({needed} bytes), with {how}; as the plan is, {amount(free.peak)}\n"
            f"  at its peak, {at}: {fills}\n"
            f"  fix: budget({needed}), or more ranks to share {'the parameters' if self.plan.stage == 3 else 'the state (zero3)'}, or microbatches (mb{2 * (self.plan.mb or 1)})"
        )


def _as_stored(offload: tuple[str, ...], hosted: Hosted) -> bool:
    """Whether state and parameters lie where they are stored: under ``optimizer`` both on the host, under ``params`` the parameters."""
    state, params = (any(there for (role, _), there in hosted.items() if role == of) for of in ("state", "param"))
    return ("optimizer" in offload or "params" in offload) == params and ("optimizer" in offload) == (state or ("optimizer" in offload and not _has_state(hosted)))


def _has_state(hosted: Hosted) -> bool:
    return any(role == "state" for role, _ in hosted)


_ORDER = ("optimizer", "gradients", "params", "activations")


def lanes(p: Program) -> list[Program]:
    """What each pipeline rank runs, in a straight line."""
    return [unroll(p, lane).program for lane in range(len(p.schedule.lanes))] if p.schedule is not None else [p]


def with_level(arguments: Arguments, saved: float, every: int) -> dict[str, Mapping[str, Any]]:
    level = {"saved": saved, "every": every} if (saved, every) != (1.0, 0) else {}
    return {**arguments, "plan_memory": {**{k: v for k, v in arguments["plan_memory"].items() if k == "gathers"}, **level}}


def describe(c: Choice) -> str:
    """
    >>> describe(Choice(0.25, 1, ("optimizer",), 0, 0, 0.0))
    'offload(optimizer) and 25 % of what the backward reads kept beside the input of each layer'
    """
    words = [f"offload({', '.join(c.offload)})"] if c.offload else []
    if c.saved < 1.0:
        beside = "" if not c.every else " beside the input of " + ("each layer" if c.every == 1 else f"every {c.every}th layer")
        words.append(f"{c.saved:.0%} of what the backward reads kept{beside}".replace("%", " %"))
    return " and ".join(words) or "nothing computed again and nothing offloaded"
