"""``python -m deepseed.rules > docs/rules.md``: the table of rules as a page."""

from __future__ import annotations

from collections.abc import Callable

from deepseed.rules.pointwise import LINEAR, MONOTONE, POINTWISE
from deepseed.rules.signature import Call, Rule
from deepseed.rules.table import RULES

HEAD = """# What may be split, and what follows from it?

Written by `python -m deepseed.rules` from the table of rules; edit the rules, not this page.

A rule names the dimensions of an op's operands and results: equal names are one *factor*. A factor split over a mesh axis is
split wherever it stands, an operand without it is whole, and a result without it is partial over the axis: a sum, or what the
column *leaves* says; "added to 0" means that operand 0 is partial then too. `(a b)` is one dimension made of two factors, `name!` is never split, `name~` only so that a rank has one
contiguous range, `name+` never so that a rank has nothing of it, `*b` is any number of dimensions. *Partial together* lists the operands that may be partial sums when the
result is one: `0|1` either alone, `0+1` both together, `all` every operand, `born` a result without operands.

An op without a rule is legal where everything is whole on every axis, so an unknown op is slow and never wrong.

| op | factors | partial sum together | partial max together | leaves |
|---|---|---|---|---|
"""


def page() -> str:
    """The whole page."""
    rows = [_row(f"`{target}`", rule) for target, rule in RULES.items()]
    plain = sorted(POINTWISE - set(LINEAR) - set(MONOTONE))
    passing = sorted(set(LINEAR) | set(MONOTONE))
    linear = "\n".join(f"| `{t}` | {_cell(LINEAR.get(t, ''))} | {_cell(MONOTONE.get(t, ''))} |" for t in passing)
    return (
        HEAD + "\n".join(rows) + "\n\n## Pointwise ops\n\n"
        "Dimensions aligned at the right are one factor; an operand's dimension of size 1 is broadcast and has none. "
        "These pass partial values (a scalar 0 counts as partial, another scalar where a tensor may be partial forbids it):\n\n"
        "| op | partial sum together | partial max together |\n|---|---|---|\n" + linear + f"\n\nThe other {len(plain)} pass none:\n\n" + ", ".join(f"`{t}`" for t in plain) + "\n"
    )


def _row(name: str, rule: Rule) -> str:
    form = f"`{rule.form}`" if isinstance(rule.form, str) else _first(rule.form)
    linear = _cell(rule.linear) if isinstance(rule.linear, str) else _first(rule.linear)
    leaves = rule.reduce + (f", added to {rule.adds}" if rule.adds is not None else "")
    return f"| {name} | {form} | {linear} | {_cell(rule.monotone)} | {leaves} |"


def _first(function: Callable[[Call], str | None]) -> str:
    """What a function says of itself: its docstring, on one line."""
    return " ".join((function.__doc__ or "").split()).replace("``", "`")


def _cell(text: str) -> str:
    return text.replace("|", " \\| ") if text else "-"


if __name__ == "__main__":
    print(page(), end="")
