"""What one op of a lowered program costs one rank: bytes sent to others, bytes moved between its memories, flops."""

from __future__ import annotations

from dataclasses import replace

from deepseed import cost
from deepseed.ir.collective import MEMORIES
from deepseed.ir.program import Op, Program


def is_collective(op: Op) -> bool:
    """Whether an op starts a collective."""
    return op.target.endswith(".start") and op.target not in (*MEMORIES, "receive.start")


def moved_bytes(p: Program, op: Op) -> int:
    """Bytes that a move between host and device brings."""
    return sum(t.local_bytes(p.mesh) for t in op.types)


def sent_bytes(p: Program, op: Op) -> int:
    """Bytes that one rank sends for a started collective."""
    kind, axis = op.target.removesuffix(".start"), str(op.kw("axis"))
    return sum(cost.sent_bytes(kind, p.types[r.name], t, axis, p.mesh) for r, t in zip(op.refs, op.types, strict=False))


def matmul_flops(p: Program) -> int:
    """Of one rank: the same formula on local shapes."""
    return sum(local_flops(p, op) for op in p.ops)


def local_flops(p: Program, op: Op) -> int:
    """Matmul flops of one op on one rank."""
    local = [replace(t, shape=t.local(p.mesh)) for t in op.types]
    flops = cost.flops(replace(op, types=tuple(local)), [replace(t, shape=t.local(p.mesh)) for t in (p.types[r.name] for r in op.refs)])
    matrices = {"routed_mm": p.types[op.refs[1].name], "routed_outer": op.type}.get(op.target) if len(op.refs) > 1 else None
    if matrices is not None:  # a rank computes the rows of its matrices, on average
        flops = flops * matrices.local(p.mesh)[0] // matrices.shape[0]
    return flops
