"""What an op needs to know of its rank: the only ops whose arguments depend on where they run.

A lookup in a split table gets ``start``, the first row of this rank's part; a creation op gets ``index``, the global indices
that it fills. Where each block of a dimension is split, positions that count blocks shrink with them: the ``start`` of slice and
unslice, the ``pads`` of pad, the ``groups`` of a convolution. Every other op is the same line on every rank: its shapes come
from the layouts of its result types, as the rank sees them (``Mesh.at``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from deepseed.ir.layout import chunk, factors, local_indices
from deepseed.ir.mesh import TIME, Mesh
from deepseed.ir.program import Arg, Op, Type
from deepseed.ir.schedule import kind_of

LOOKUPS = {  # op -> the operand that is looked up in by number; None: the result
    "embedding": 0, "embedding_backward": None, "gather": 0, "scatter_add": None, "routed_mm": 1, "routed_outer": None,
}  # fmt: skip
GROUPS = {"aten.convolution": (8, 0), "aten.convolution_backward": (9, 1)}  # argument, and the operand that is the input
CREATIONS = ("iota", "bernoulli", "uniform", "normal")


def localize_timed(op: Op, operand_types: Sequence[Type], mesh: Mesh, coordinate: Mapping[str, int]) -> Op:
    """``localize_op`` for every microbatch: what differs between them is given as ``index.mb=``, ``start.mb=``, a list of one value each.

    ``coordinate`` has no position on ``mb``; shapes are the same for all."""
    m = mesh.sizes.get(TIME, 0)
    first = localize_op(op, operand_types, mesh, {**coordinate, TIME: 0} if m else coordinate)
    if m == 0 or first is op or op.target not in (*LOOKUPS, *CREATIONS) or kind_of(op.part or "once.0") == "once":
        return first
    each = [localize_op(op, operand_types, mesh, {**coordinate, TIME: i}) for i in range(m)]
    kwargs = tuple((k, v) if all(e.kw(k) == v for e in each) else (f"{k}.{TIME}", tuple(e.kw(k) for e in each)) for k, v in first.kwargs)
    return replace(first, kwargs=kwargs)


def localize_op(op: Op, operand_types: Sequence[Type], mesh: Mesh, coordinate: Mapping[str, int]) -> Op:
    """The op as the rank at ``coordinate`` runs it: ``op`` itself, or with ``start=`` or ``index=`` added.

    ``operand_types`` carry the layouts in which the op reads its operands. ``index`` holds, per dimension, its factors as (size,)
    where all of it is there, else (size, first, number of indices)."""
    if op.target in LOOKUPS:
        at = LOOKUPS[op.target]
        table = op.type if at is None else operand_types[at]
        dim = op.kw("dim", 0)
        if isinstance(dim, int) and table.shape and table.layout.splits(dim % len(table.shape)):
            dim %= len(table.shape)
            return _with(op, "start", next(iter(local_indices(table.shape[dim], dim, table.layout, mesh, coordinate)), table.shape[dim]))
    elif op.target in CREATIONS and any(op.type.layout.splits(d) for d in range(len(op.type.shape))):
        index = tuple(
            tuple((n,) if axis is None else (n, *_range(chunk(n, mesh.size(axis), coordinate[axis]))) for n, axis in factors(size, dim, op.type.layout, mesh))
            for dim, size in enumerate(op.type.shape)
        )
        return _with(op, "index", index)
    elif op.target in ("slice", "unslice"):
        dim, start = op.kw("dim"), op.kw("start", 0)
        if isinstance(dim, int) and isinstance(start, int) and start and op.kw("step", 1) == 1:
            return _with(op, "start", _shrunk(start, op.type if op.target == "unslice" else operand_types[0], dim, mesh.seen_from(coordinate)))
    elif op.target == "pad":
        pads = op.kw("pads")
        if isinstance(pads, tuple) and any(op.type.layout.splits(k // 2) for k, n in enumerate(pads) if n):
            here = mesh.seen_from(coordinate)
            return _with(op, "pads", tuple(_shrunk(n, op.type, k // 2, here) if isinstance(n, int) else n for k, n in enumerate(pads)))
    elif op.target in GROUPS:
        at, x = GROUPS[op.target]
        groups = op.args[at]
        if isinstance(groups, int) and groups > 1:
            return replace(op, args=(*op.args[:at], _shrunk(groups, operand_types[x], 1, mesh.seen_from(coordinate)), *op.args[at + 1 :]))
    return op


def _shrunk(n: int, t: Type, dim: int, mesh: Mesh) -> int:
    """``n`` elements of the whole dimension are so many of the part that this rank holds of each block."""
    return n * t.local(mesh)[dim] // t.shape[dim] if t.shape[dim] else n


def _range(indices: range) -> tuple[int, int]:
    return indices.start, len(indices)


def _with(op: Op, key: str, value: Arg) -> Op:
    return replace(op, kwargs=(*((k, v) for k, v in op.kwargs if k != key), (key, value)))
