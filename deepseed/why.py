"""Why does a node lie as it does, and what would the alternatives cost? Every decision of the solver can be questioned.

For each axis the integer program is solved again with the node's class forced to another strategy, all other nodes free to
follow; the answer is the difference of the optima, in the solver's unit: bytes that a rank sends in a step (work that is
repeated, and weights left whole, are priced in the same unit).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

from deepseed.explain_text import amount
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Op, Program
from deepseed.ir.text import format_op, format_type
from deepseed.passes.solve_placements import AxisReport, Placement
from deepseed.rules import Strategy, rule_of, show
from deepseed.solver.assignment import Choice, Infeasible, solve

SHOWN = 8
PARTS = {
    "data": "split the batch; what was split is not gathered, weights are used whole",
    "experts": "split rows, and tables of experts by number; no table moves, its rows come to it",
    "sequence": "split the sequence; weights are used whole",
    "model": "split the weights in use; neither weights nor the batch are gathered",
    "storage": "where parameters and optimizer state live, as the ZeRO stage says, and the update",
}


class UnknownName(ValueError):
    """A name that is no value of the program and no input's key: gives the nearest ones."""


@dataclass(frozen=True)
class Alternative:
    """``more``: how much worse the whole step would be (None: impossible, whatever the other nodes do)."""

    strategy: Strategy
    more: float | None
    chosen: bool = False


def why(p: Program, mesh: Mesh, zero: int, name: str) -> str:
    """The answer for the value ``name`` (or the parameter with that key) of a canonical program. Raises UnknownName."""
    placement = Placement(replace(p, mesh=mesh), zero, {})
    placed = placement.run()
    i = find(p, name)
    item = placement.items[i]
    lines = [_line(placed, i)]
    rule = rule_of(item.target) if isinstance(item, Op) else None
    if rule is not None and isinstance(rule.form, str):
        lines.append(f'  rule: "{rule.form}"')
    for report in placement.reports:
        lines += _axis(placement, report, i)
    if not placement.reports:
        lines.append("  one device: there is nothing to decide")
    return "\n".join(lines)


def alternatives(report: AxisReport, item: int) -> list[Alternative]:
    """Each strategy of the node's class on this axis, the chosen one first, then by cost."""
    c = report.class_of[item]
    choice, picked = report.choices[c], report.solution.picks[c]
    out: list[Alternative] = []
    for s, strategy in enumerate(choice.strategies):
        if strategy == choice.strategies[picked] or strategy in choice.strategies[:s]:
            continue
        forced: list[Choice] = [*report.choices]
        forced[c] = Choice([strategy], [choice.costs[s]], choice.count)
        try:
            out.append(Alternative(strategy, solve(forced, report.flows).objective - report.solution.objective))
        except Infeasible:
            out.append(Alternative(strategy, None))
    out.sort(key=lambda a: float("inf") if a.more is None else a.more)
    return [Alternative(choice.strategies[picked], 0.0, chosen=True), *out]


def find(p: Program, name: str) -> int:
    """The position of a value or of an input's key among inputs and ops."""
    wanted = name.removeprefix("%")
    named = [(i.name, i.key) for i in p.inputs] + [op.results for op in p.ops]
    for i, names in enumerate(named):
        if wanted in names:
            return i
    known = [*p.types, *(i.key for i in p.inputs)]
    near = get_close_matches(wanted, known, n=3, cutoff=0.3) or [k for k in known if wanted in k][:3]
    raise UnknownName(f"the program has no value %{wanted}\n  fix: " + (f"did you mean {', '.join('%' + n for n in near)}?" if near else "name a parameter, or a value of `deepseed dump TARGET --after canonicalize -o -`"))


def _line(placed: Program, i: int) -> str:
    if i < len(placed.inputs):
        item = placed.inputs[i]
        return f"%{item.name} : {format_type(item.type, placed.mesh)} {item.role} {item.key!r}"
    return format_op(placed.ops[i - len(placed.inputs)], placed.types, placed.mesh)


def _axis(placement: Placement, report: AxisReport, i: int) -> list[str]:
    found = alternatives(report, i)
    same = sum(c == report.class_of[i] for c in report.class_of)
    shared = f"; {same} nodes of this kind decide together" if same > 1 else ""
    title = f"\nover {report.axis} ({report.part}: {PARTS.get(report.part, '')}){shared}"
    if len(found) == 1:
        return [title, f"  {_strategy(placement, i, found[0].strategy)}", "  fixed: nothing else is allowed here"]
    lines = [title]
    for a in found[: SHOWN + 1]:
        verdict = "chosen" if a.chosen else "impossible" if a.more is None else "no worse" if a.more < 0.5 else f"+{amount(a.more)} a step"
        lines.append(f"  {verdict:20} {_strategy(placement, i, a.strategy)}")
    if len(found) > SHOWN + 1:
        lines.append(f"  and {len(found) - SHOWN - 1} more, all costlier")
    return lines


def _strategy(placement: Placement, i: int, s: Strategy) -> str:
    operands: Sequence[str] = [f"%{r.name} {show(e)}" for r, e in zip(placement.refs[i], s.operands, strict=False)]
    results = ", ".join(show(e) for e in s.results)
    return f"{', '.join(operands)} -> {results}" if operands else results
