"""Of a program in which each data-parallel rank has its own rows: is nothing that depends on them taken for the same on all ranks?

What depends on the rows is written as whole along ``dp``, and is another tensor on each rank. A rule that keeps whole values whole holds for
it; a move does not: a rank's part of one rank's rows would meet parts of others'. Only a ``share`` makes a summand of it, of the mean.
"""

from __future__ import annotations

from deepseed.check.typing import MOVES, TypingError, describe, operand_types
from deepseed.ir.program import OWN_ROWS, Program

AXIS = "dp"
ROLES = ("batch", "tangent", "rng")  # what differs from rank to rank
ALIKE = ("grad", "pending", "param", "state", "norm")  # what may not


def check_own_rows(p: Program) -> None:
    """Raises TypingError at the first move over ``dp`` of what is a rank's own. Of a lowered program; one without own rows passes."""
    if OWN_ROWS not in p.facts:
        return
    own = {i.name for i in p.inputs if i.role in ROLES}
    for op in p.ops:
        if not any(ref.name in own for ref in op.refs) or (op.target == "share" and op.kw("axis") == AXIS):
            continue
        if op.target in MOVES and op.kw("axis") == AXIS:
            raise TypingError(f"{describe(op, operand_types(p, op), p.mesh)}\n  mixes rows over {AXIS}, of which each rank has its own; only a share of a gradient may be added up")
        own.update(op.results)
    for o in p.outputs:
        if o.role in ALIKE and o.ref.name in own:
            raise TypingError(f"{o.role} {o.key!r} is %{o.ref.name}, each rank's own along {AXIS}: it is no share of the mean")
