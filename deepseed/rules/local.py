"""What an op needs to know of its rank: the only ops whose arguments depend on where they run.

A lookup in a split table gets ``start``, the first row of this rank's part; a creation op gets ``index``, the global indices
that it fills. Where each block of a dimension is split, positions that count blocks shrink with them: the ``start`` of slice and
unslice, the ``pads`` of pad, the ``groups`` of a convolution. Every other op is the same line on every rank: its shapes come
from the layouts of its result types.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

from deepseed.ir.layout import factors, local_indices
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Arg, Op, Type

LOOKUPS = {  # op -> the operand that is looked up in by number; None: the result
    "embedding": 0, "embedding_backward": None, "gather": 0, "scatter_add": None, "routed_mm": 1, "routed_outer": None,
}  # fmt: skip
GROUPS = {"aten.convolution": (8, 0), "aten.convolution_backward": (9, 1)}  # argument, and the operand that is the input
CREATIONS = ("iota", "bernoulli", "uniform", "normal")


def localize_op(op: Op, operand_types: Sequence[Type], mesh: Mesh, coordinate: Mapping[str, int]) -> Op:
    """The op as the rank at ``coordinate`` runs it: ``op`` itself, or with ``start=`` or ``index=`` added.

    ``operand_types`` carry the layouts in which the op reads its operands. ``index`` holds, per dimension, its factors as
    (size, this rank's coordinate or none)."""
    if op.target in LOOKUPS:
        at = LOOKUPS[op.target]
        table = op.type if at is None else operand_types[at]
        dim = op.kw("dim", 0)
        if isinstance(dim, int) and table.shape and table.layout.splits(dim % len(table.shape)):
            dim %= len(table.shape)
            return _with(op, "start", local_indices(table.shape[dim], dim, table.layout, mesh, coordinate)[0])
    elif op.target in CREATIONS and any(op.type.layout.splits(d) for d in range(len(op.type.shape))):
        index = tuple(
            tuple((n, None if axis is None else coordinate[axis]) for n, axis in factors(size, dim, op.type.layout, mesh))
            for dim, size in enumerate(op.type.shape)
        )
        return _with(op, "index", index)
    elif op.target in ("slice", "unslice"):
        dim, start = op.kw("dim"), op.kw("start", 0)
        if isinstance(dim, int) and isinstance(start, int) and start and op.kw("step", 1) == 1:
            return _with(op, "start", start // _pieces(op.type, dim, mesh))
    elif op.target == "pad":
        pads = op.kw("pads")
        if isinstance(pads, tuple) and any(op.type.layout.splits(k // 2) for k, n in enumerate(pads) if n):
            return _with(op, "pads", tuple(n // _pieces(op.type, k // 2, mesh) if isinstance(n, int) else n for k, n in enumerate(pads)))
    elif op.target in GROUPS:
        at, x = GROUPS[op.target]
        groups = op.args[at]
        if isinstance(groups, int) and groups > 1:
            return replace(op, args=(*op.args[:at], groups // _pieces(operand_types[x], 1, mesh), *op.args[at + 1 :]))
    return op


def _pieces(t: Type, dim: int, mesh: Mesh) -> int:
    """Into how many parts a dimension is split."""
    return prod(mesh.size(axis) for axis, _ in t.layout.splits(dim))


def _with(op: Op, key: str, value: Arg) -> Op:
    return replace(op, kwargs=(*((k, v) for k, v in op.kwargs if k != key), (key, value)))
