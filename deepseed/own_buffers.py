"""Buffers where each data-parallel rank has its own rows: running statistics of a batch norm. As under DistributedDataParallel, those of the first rank count.

There they are sent before every forward. Here each rank goes on with its own until somebody looks: a program of whose outputs one that is no buffer
depends on them (an evaluation, not a training step), or a save. What the first rank has is the same either way.
"""

from __future__ import annotations

from deepseed.ir.program import OWN_ROWS, Program
from deepseed.passes.canonicalize import canonicalize


def looked_at(p: Program, own: bool) -> frozenset[str]:
    """Buffers that must be alike on all ranks before ``p`` runs, a captured program; ``own``: with rows that are each rank's own."""
    buffers = {i.name: i.key for i in p.inputs if i.role == "buffer"}
    if not own or not buffers:
        return frozenset(buffers.values())
    p = canonicalize(p)  # a batch norm is one op, whose pieces in training do not read its statistics
    reached = {o.ref.name for o in p.outputs if o.role != "buffer"}
    for op in reversed(p.ops):
        if reached.intersection(op.results):
            reached.update(ref.name for ref in op.refs)
    return frozenset(key for name, key in buffers.items() if name in reached)


def written(p: Program) -> frozenset[str]:
    """Buffers that differ from rank to rank behind ``p``."""
    return frozenset(o.key for o in p.outputs if o.role == "buffer") if OWN_ROWS in p.facts else frozenset()
