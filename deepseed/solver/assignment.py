"""The integer program of one mesh axis: one strategy a class of nodes, least cost of moving values between them.

Variables: x[c, s] = 1 if class c uses strategy s, the only integers. Each use of a value is a continuous *transport*
f[p, l] >= 0 from the producer's elements p to the consumer's elements l, with row sums given by the producer's strategies and
column sums by the consumer's. A value pays each reshard once however many uses share it: z[p, l] >= f[p, l] carries the cost.
The obvious form (want <= sum of y, y <= x) has the same optimum and is 100 times slower. Solved by HiGHS (scipy.optimize.milp).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from time import perf_counter
from typing import Any

import numpy as np
from scipy.optimize import Bounds, milp

from deepseed.ir.layout import Element
from deepseed.rules import Strategy
from deepseed.solver.rows import Rows

Cost = Callable[[Element, Element], float | None]  # None: not allowed

Numbers = np.ndarray[Any, Any]

TIMED_OUT = 1  # a status of milp
_cut_short = 0
_SOLVED: dict[bytes, tuple[Numbers, float]] = {}  # by a problem's digest: equal models, and some plans that differ elsewhere, ask for the same axis again


class Infeasible(ValueError):
    """No assignment satisfies the constraints."""


@dataclass
class Choice:
    """A class of nodes: its strategies, what each costs by itself, how many nodes it stands for."""

    strategies: Sequence[Strategy]
    costs: Sequence[float]
    count: int = 1


@dataclass
class Use:
    """One use of a class of values: operand ``operand`` of class ``user``. Uses of one ``share`` pay a common reshard once."""

    user: int
    operand: int
    share: str
    cost: Cost


@dataclass
class Flow:
    """A class of values: who makes them and who uses them."""

    producer: int
    result: int
    uses: tuple[Use, ...]
    count: int = 1


@dataclass
class Solution:
    picks: list[int]  # strategy of each class
    objective: float
    seconds: float
    integers: int = 0
    variables: int = 0


def solve(choices: Sequence[Choice], flows: Sequence[Flow], *, time_limit: float = 20.0) -> Solution:
    """The cheapest assignment, or the cheapest that ``time_limit`` seconds find (an unrolled recurrence has thousands of classes);
    where they find none, six times as long. Raises Infeasible."""
    started = perf_counter()
    first: list[int] = []
    objective: list[float] = []
    for choice in choices:
        first.append(len(objective))
        objective += [c * choice.count for c in choice.costs]
    integers = len(objective)
    rows = Rows()
    for i, choice in enumerate(choices):
        rows.add([(first[i] + s, 1.0) for s in range(len(choice.strategies))], 1.0, 1.0)
    for flow in flows:
        _add_flow(flow, choices, first, objective, rows)
    scale = _scale(objective)
    found, minimum = _minimum(np.array(objective) / scale, integers, rows, time_limit)
    picks = [int(np.argmax(found[first[i] : first[i] + len(c.strategies)])) for i, c in enumerate(choices)]
    return Solution(picks, minimum * scale, perf_counter() - started, integers, len(objective))


def _minimum(objective: Numbers, integers: int, rows: Rows, time_limit: float) -> tuple[Numbers, float]:
    """The integers, which come first, where ``objective`` is least, and that value; every variable is from 0 to 1."""
    constraint = rows.constraint(len(objective))
    parts = (objective, constraint.A.data, constraint.A.indices, constraint.A.indptr, np.asarray(constraint.lb), np.asarray(constraint.ub), np.array([integers]))
    key = b"".join(sha256(part.tobytes()).digest() for part in parts)
    if key in _SOLVED:
        return _SOLVED[key]
    for limit in (time_limit, 6 * time_limit):
        result = milp(
            objective,
            integrality=np.concatenate([np.ones(integers), np.zeros(len(objective) - integers)]),
            bounds=Bounds(np.zeros(len(objective)), np.ones(len(objective))),
            constraints=constraint,
            options={"mip_rel_gap": 1e-6, "time_limit": limit},
        )
        if result.x is not None or result.status != TIMED_OUT:
            break
    if result.x is None:
        raise Infeasible(str(result.message))
    found = result.x[:integers].copy(), float(result.fun)
    if result.status == TIMED_OUT:
        global _cut_short
        _cut_short += 1
    else:
        _SOLVED[key] = found
    return found


def cut_short() -> int:
    """How many assignments of this process are the best that the time allowed: another run might find a better one."""
    return _cut_short


def _add_flow(flow: Flow, choices: Sequence[Choice], first: list[int], objective: list[float], rows: Rows) -> None:
    source = list(_by_element(choices[flow.producer], first[flow.producer], lambda s: s.results[flow.result]).items())
    together: dict[str, dict[tuple[Element, Element], tuple[float, list[int]]]] = {}
    alone = Counter(use.share for use in flow.uses)
    for use in flow.uses:
        want = list(_by_element(choices[use.user], first[use.user], lambda s, k=use.operand: s.operands[k]).items())  # type: ignore[misc]
        shared = alone[use.share] > 1
        leaving, arriving = [list[int]() for _ in source], [list[int]() for _ in want]
        for (p, _), from_p in zip(source, leaving, strict=True):
            for (w, _), to_w in zip(want, arriving, strict=True):
                cost = use.cost(p, w)
                if cost is None:
                    continue
                f = len(objective)
                objective.append(0.0 if shared else cost * flow.count)
                from_p.append(f)
                to_w.append(f)
                if cost and shared:
                    together.setdefault(use.share, {}).setdefault((p, w), (cost, []))[1].append(f)
        for (_, xs), transports in zip((*source, *want), (*leaving, *arriving), strict=True):
            rows.equal(transports, xs)
    for pairs in together.values():
        for cost, variables in pairs.values():
            z = len(objective)
            objective.append(cost * flow.count)
            for var in variables:
                rows.add([(z, 1.0), (var, -1.0)], 0.0)


def _by_element(choice: Choice, first: int, element: Callable[[Strategy], Element]) -> Mapping[Element, list[int]]:
    out: dict[Element, list[int]] = {}
    for s, strategy in enumerate(choice.strategies):
        out.setdefault(element(strategy), []).append(first + s)
    return out


def _scale(objective: Sequence[float]) -> float:
    positive = [c for c in objective if c > 0]
    return float(np.median(positive)) if positive else 1.0
