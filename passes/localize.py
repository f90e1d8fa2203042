"""Fix what depends on a rank's coordinate: index origins, random counters, shape arguments. Layouts stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from deepseed.ir.contract import program_pass
from deepseed.ir.mesh import STAGES, TIME
from deepseed.ir.program import Program
from deepseed.ir.subaxes import on_axes_of
from deepseed.rules.lanes import on_lane
from deepseed.rules.local import localize_timed


@program_pass(requires={"lowered"}, provides={"local"})
def localize(p: Program, coordinate: Mapping[str, int]) -> Program:
    """The program of the rank at ``coordinate``: the ops of its stages, each as it must be called on local tensors. What differs between
    microbatches is listed for all of them.

    before: %i = iota(start=0, step=1) : i64[8@dp]
    after:  %i = iota(start=0, step=1, index=[[[2, 1, 1], [4]]]) : i64[8@dp]     at dp=1 of 2: second of two pieces of 4
    """
    where = on_axes_of(coordinate, p.mesh.without(TIME))
    p = on_lane(p, coordinate.get(STAGES, 0))
    ops = tuple(localize_timed(op, tuple(p.types[ref.name] for ref in op.refs), p.mesh, where) for op in p.ops)
    return replace(p, ops=ops, mesh=p.mesh.seen_from({**where, TIME: 0}))
