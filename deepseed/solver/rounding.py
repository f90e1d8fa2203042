"""Below float32 no contraction of the optimizer is split.

A contraction over a split dimension is a sum of summands that were rounded each for itself. In float64 that is 1e-16; in bfloat16,
where Muon multiplies its matrices, it is 1e-2 of an update, and the plan would show in the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

from deepseed.ir.layout import Partial
from deepseed.ir.program import Op
from deepseed.rules.strategy import Strategy

NARROW = ("bf16", "f16")


def without_split_contractions(op: Op, found: Sequence[Strategy]) -> list[Strategy]:
    """Of the strategies of an update's op, those that leave no narrow partial result of operands that are none, or that are cast."""
    if op.phase != "update" or not any(t.dtype in NARROW for t in op.types):
        return list(found)
    if op.target == "cast":
        return [s for s in found if not any(isinstance(e, Partial) for e in s.results)]
    return [s for s in found if not any(isinstance(e, Partial) for e in s.results) or any(isinstance(e, Partial) for e in s.operands)]
