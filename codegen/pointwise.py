"""What the back ends that write source write alike of a pointwise op. Each gives its own literals."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from deepseed.ir.program import Op

Write = Callable[[Sequence[str], Op], str]
Literal = Callable[[object, str], str]


def computed(dtype: str) -> str:
    """The dtype in which values of ``dtype`` are computed."""
    return "f32" if dtype in ("f16", "bf16") else dtype


def number(op: Op, name: str, default: float = 1) -> float:
    value = op.kw(name, default)
    assert isinstance(value, int | float)
    return value


def added(sign: str, either: str, literal: Literal) -> Write:
    """``add`` and ``sub`` with their ``alpha``; ``either``: the operator of two truth values."""

    def write(x: Sequence[str], op: Op) -> str:
        alpha = number(op, "alpha")
        if op.type.dtype == "bool":
            return f"{x[0]} {either} {x[1]}"
        return f"{x[0]} {sign} {x[1]}" if alpha == 1 else f"{x[0]} {sign} {literal(alpha, computed(op.type.dtype))} * {x[1]}"

    return write


def lerp(literal: Literal) -> Write:
    """``lerp`` by a number, from the nearer end as torch has it."""

    def write(x: Sequence[str], op: Op) -> str:
        weight = op.args[2]
        assert isinstance(weight, int | float)
        return f"{x[0]} + {x[2]} * ({x[1]} - {x[0]})" if abs(weight) < 0.5 else f"{x[1]} - ({x[1]} - {x[0]}) * {literal(1 - weight, computed(op.type.dtype))}"

    return write


def rsub(literal: Literal) -> Write:
    def write(x: Sequence[str], op: Op) -> str:
        alpha = op.args[2] if len(op.args) > 2 else number(op, "alpha")
        return f"{x[1]} - {x[0]}" if alpha == 1 else f"{x[1]} - {literal(alpha, computed(op.type.dtype))} * {x[0]}"

    return write
