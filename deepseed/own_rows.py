"""``batch="local"`` of a module: each data-parallel rank has its own rows, and its own loss; the objective is the mean of these.

That is what DistributedDataParallel computes, and it is another program than the one over all ranks' rows: a loss that divides by its
tokens, a batch norm, a draw are each rank's own. So the program is captured on one rank's rows, nothing of it is placed on ``dp``, and
each gradient passes a ``share``: what the rank computed, divided by the number of ranks, is its summand of the gradient of the mean.
From there on, reductions, shards and updates are as ever.

That only holds while nothing before the shares believes that the ranks hold the same: deepseed.check.own_rows sees to it.
"""

from __future__ import annotations

from dataclasses import replace

from deepseed.ir.contract import PassError
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import OWN_ROWS, Builder, Op, Program, Ref

AXIS = "dp"


def with_own_rows(p: Program, ranks: Mesh) -> Program:
    """The captured program of one rank's rows as each of the ranks computes it: every gradient ends in its share of the mean."""
    if ranks.sizes.get(AXIS, 1) == 1:
        return p
    if ranks.sizes.get("ep", 1) > 1:
        raise PassError(f'{ranks}: experts over ep get rows of all data-parallel ranks, so batch="local" cannot leave each rank its own\n  fix: a plan without ep, or batch="global"')
    out = Builder(p)
    for op in p.ops:
        out.emit(op)
    outputs = []
    for o in p.outputs:
        if o.role in ("grad", "pending"):
            name = out.fresh(f"{o.ref.name}.share")
            out.emit(Op((name,), "share", (Ref(o.ref.name),), (p.types[o.ref.name],), (("axis", AXIS),), "backward"))
            o = replace(o, ref=Ref(name))
        outputs.append(o)
    return out.program(outputs=outputs, add={OWN_ROWS})
