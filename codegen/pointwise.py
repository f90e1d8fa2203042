"""What the back ends that write source write alike of a pointwise op. Each gives its own literals."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from deepseed.ir.program import FLOATS, Op, Program, Ref

Write = Callable[[Sequence[str], Op], str]
Literal = Callable[[object, str], str]


def computed(dtype: str) -> str:
    """The dtype in which values of ``dtype`` are computed."""
    return "f32" if dtype in ("f16", "bf16") else dtype


_WIDTH = {"bool": 0, "u8": 1, "i8": 1, "i16": 2, "i32": 3, "i64": 4, "f16": 5, "bf16": 5, "f32": 6, "f64": 7}


def compared(p: Program, op: Op) -> str:
    """The dtype in which operands are compared: of truth values, integers and floats the last, of these what has dimensions before what has none, and a number where there is neither."""
    found = ("bool", 0)
    for a in op.args:
        if isinstance(a, Ref):
            t = p.types[a.name]
            here = (t.dtype, 2 if t.shape else 1)
        elif isinstance(a, bool | int | float):
            here = ("bool" if isinstance(a, bool) else "i64" if isinstance(a, int) else "f32", 0)
        else:
            continue
        found = max(found, here, key=lambda e: (0 if e[0] == "bool" else 2 if e[0] in FLOATS else 1, e[1], _WIDTH[e[0]]))
    return found[0]


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
