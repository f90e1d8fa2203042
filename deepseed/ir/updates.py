"""``optim.pointwise``: what an optimizer does to one tensor, element by element, as an op that carries its own ops.

    %w.new, %m.new = optim.pointwise(%w, %m, %g, %rate, operands=["param", "s0", "grad", "n0"], numbers=["n0"], body=["%v0 = aten.sign(%grad) : f32[n]", ..], results=["v3", "v1"]) : ..

``operands`` names what the body reads, first the old values of its results, in their order; of ``numbers`` a tensor has one each, and n elements of all others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from deepseed.ir.program import Op, Program
from deepseed.ir.text import format_program, parse

POINTWISE = "optim.pointwise"
SIZE = 1 << 12  # elements of a tensor in a body, for which it writes n


def program_of(kw: Mapping[str, Any], dtypes: Sequence[str], shape: tuple[int, ...] = (SIZE,)) -> Program:
    """The body as a program on a tensor of ``shape``; ``dtypes``: of its operands."""
    return _program(tuple(kw["operands"]), tuple(kw["numbers"]), tuple(kw["body"]), tuple(kw["results"]), tuple(dtypes), shape)


@lru_cache(maxsize=1024)
def _program(operands: tuple[str, ...], numbers: tuple[str, ...], body: tuple[str, ...], results: tuple[str, ...], dtypes: tuple[str, ...], shape: tuple[int, ...]) -> Program:
    n = f"[{', '.join(map(str, shape))}]"
    inputs = [f'%{name} : {dtype}{"[]" if name in numbers else n} batch "{name}"' for name, dtype in zip(operands, dtypes, strict=True)]
    ops = [re.sub(r"(?<=\w)\[n\]", n, line) + ' {phase="update"}' for line in body]
    return parse("\n".join(["program update mesh() facts()", *inputs, *ops, *(f'return %{r} output "{name}"' for r, name in zip(results, operands, strict=False))]))


def body_of(p: Program) -> tuple[str, ...]:
    """The ops of a program on tensors of SIZE elements, as ``program_of`` reads them."""
    lines = [line.partition(" {phase=")[0] for line in format_program(p).splitlines() if " = " in line]
    return tuple([re.sub(rf"(?<=\w)\[{SIZE}\]", "[n]", line) for line in lines])


def place_of(op: Op) -> tuple[object, ...]:
    """What updates have in common that one kernel does: when and where they run, and the dtype of parameters."""
    return op.type.dtype, op.type.host, op.part, op.stage


def formula_of(p: Program, op: Op) -> tuple[object, ...]:
    """What those have in common that have one formula: kind and options, the dtypes of operands; of torch's own the learning rate too."""
    return *place_of(op), op.target, op.kwargs, len(op.args), None if op.target == POINTWISE else op.args[-1], *(p.types[r.name].dtype for r in op.refs)


def updated_of(op: Op) -> tuple[str, ...]:
    """The operands that its results replace, in their order."""
    names = operands_of(op)
    return names[: len(op.results)] if op.target == POINTWISE else tuple([name for name in names if name not in ("grad", "step", "lr")])


def operands_of(op: Op) -> tuple[str, ...]:
    """What the operands of an optimizer's op are to it, but for those behind ``lr``."""
    named, states = op.kw("operands"), op.kw("states", ())
    if isinstance(named, tuple):
        return tuple([str(name) for name in named])
    assert isinstance(states, tuple)
    return ("param", "grad", *map(str, states), "lr")
