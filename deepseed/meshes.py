"""The two meshes of a plan: that of the ranks, with the pipeline, and that of the program, with time in its place."""

from __future__ import annotations

from math import prod

from deepseed.ir.mesh import STAGES, TIME, Mesh
from deepseed.ir.program import OWN_ROWS, Program
from deepseed.plan import Plan


def rows_of_a_rank(p: Program, ranks: Mesh) -> int:
    """Rows of the batch that a data-parallel rank has; of a captured program."""
    return max(1, rows_of(p) // row_ranks(p, ranks))


def data_ranks(ranks: Mesh) -> int:
    """Over how many ranks the rows of the batch are split."""
    return prod(ranks.sizes.get(axis, 1) for axis in ("dp", "ep"))


def row_ranks(p: Program, ranks: Mesh) -> int:
    """Over how many ranks the program's rows are split: over none where each rank has its own."""
    return 1 if OWN_ROWS in p.facts else data_ranks(ranks)


def rows_of(p: Program) -> int:
    """Rows of the batch: of most of its entries."""
    counts = [i.type.shape[0] for i in p.by_role("batch") if i.type.shape]
    return max(set(counts), key=counts.count) if counts else 1


def microbatches(p: Program, plan: Plan, ranks: Mesh) -> int:
    """How many microbatches a data-parallel rank's rows are cut into. A program that only shows outputs takes what divides its batch."""
    mine = rows_of_a_rank(p, ranks)
    m = plan.microbatches(mine)
    if plan.mb is None and rows_of(p) % row_ranks(p, ranks):
        return 1  # ranks with unequal rows
    if any(o.role == "loss" for o in p.outputs):
        return m
    return max(d for d in range(1, min(m, mine) + 1) if mine % d == 0)


def program_mesh(p: Program, plan: Plan, ranks: Mesh) -> Mesh:
    """The mesh that a captured program is placed on: that of the ranks without the pipeline, and with its microbatches."""
    m = microbatches(p, plan, ranks)
    mesh = ranks.without(STAGES)
    return Mesh((*mesh.axes, (TIME, m))) if m > 1 else mesh


def ranks_of(p: Program) -> Mesh:
    """The mesh of the ranks that run a program: its own without time, with the pipeline in front."""
    mesh, lanes = p.mesh.without(TIME), len(p.schedule.lanes) if p.schedule is not None else 1
    return mesh if lanes == 1 else Mesh(((STAGES, lanes), *mesh.axes))
