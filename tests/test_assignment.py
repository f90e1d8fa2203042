"""The integer program of one axis against every assignment there is, and what is solved once."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import milp

from deepseed.ir.layout import Element, Partial, Split
from deepseed.rules import Strategy
from deepseed.solver.assignment import Choice, Flow, Infeasible, Use, solve

ELEMENTS: list[Element] = [None, Split(0), Split(1), Partial()]
Prices = dict[tuple[Element, Element], float | None]


def price_in(prices: Prices, have: Element, want: Element) -> float | None:
    return prices[have, want]


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Choice], list[Flow], list[list[tuple[Use, Prices]]]]:
    """Each class reads values of the classes before it; uses of one share have the same prices."""
    choices, flows, priced = list[Choice](), list[Flow](), list[list[tuple[Use, Prices]]]()
    element, price = st.sampled_from(ELEMENTS), st.sampled_from([0.0, 1.0, 2.5, 7.0])
    for _ in range(draw(st.integers(2, 4))):
        ways = draw(st.lists(st.tuples(element, element, element), min_size=1, max_size=3, unique=True))
        choices.append(Choice([Strategy((a, b), (r,)) for a, b, r in ways], [draw(price) for _ in ways], draw(st.integers(1, 3))))
    for made in range(len(choices) - 1):
        users = draw(st.lists(st.tuples(st.integers(made + 1, len(choices) - 1), st.integers(0, 1)), min_size=1, max_size=3, unique=True))
        prices: dict[str, Prices] = {share: {pair: draw(st.one_of(st.none(), price)) for pair in product(ELEMENTS, ELEMENTS)} for share in ("once", "again")}
        shares = [draw(st.sampled_from(list(prices))) for _ in users]
        mine = [(Use(user, k, share, partial(price_in, prices[share])), prices[share]) for (user, k), share in zip(users, shares, strict=True)]
        flows.append(Flow(made, 0, tuple(use for use, _ in mine), draw(st.integers(1, 3))))
        priced.append(mine)
    return choices, flows, priced


def price_of(picks: tuple[int, ...], choices: list[Choice], flows: list[Flow], priced: list[list[tuple[Use, Prices]]]) -> float | None:
    total = sum(c.costs[pick] * c.count for c, pick in zip(choices, picks, strict=True))
    for flow, mine in zip(flows, priced, strict=True):
        have = choices[flow.producer].strategies[picks[flow.producer]].results[0]
        paid: dict[Any, float] = {}
        for use, prices in mine:
            want = choices[use.user].strategies[picks[use.user]].operands[use.operand]
            cost = prices[have, want]
            if cost is None:
                return None
            paid[use.share, want] = cost
        total += flow.count * sum(paid.values())
    return total


@settings(deadline=None)
@given(problems())
def test_no_assignment_is_cheaper(problem: tuple[list[Choice], list[Flow], list[list[tuple[Use, Prices]]]]) -> None:
    choices, flows, priced = problem
    every = [price_of(picks, choices, flows, priced) for picks in product(*(range(len(c.strategies)) for c in choices))]
    least = min((price for price in every if price is not None), default=None)
    if least is None:
        with pytest.raises(Infeasible):
            solve(choices, flows)
        return
    found = solve(choices, flows)
    assert found.objective == pytest.approx(least, rel=1e-6, abs=1e-9)  # mip_rel_gap
    assert price_of(tuple(found.picks), choices, flows, priced) == pytest.approx(least, rel=1e-6, abs=1e-9)


def test_an_equal_problem_is_solved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def watched(*args: Any, **options: Any) -> Any:
        asked.append(1)
        return milp(*args, **options)

    monkeypatch.setattr("deepseed.solver.assignment.milp", watched)
    monkeypatch.setattr("deepseed.solver.assignment._SOLVED", {})
    ways = [Strategy((None,), (None,)), Strategy((Split(0),), (Split(0),))]

    def found(price: float) -> list[int]:
        return solve([Choice(ways, [0.0, 1.0]), Choice(ways, [price, 0.0])], [Flow(0, 0, (Use(1, 0, "once", lambda p, w: 0.0 if p == w else None),))]).picks

    assert found(0.123) == [0, 0] and len(asked) == 1
    assert found(0.123) == [0, 0] and len(asked) == 1
    assert found(4.567) == [1, 1] and len(asked) == 2
