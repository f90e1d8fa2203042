"""What one op of a lowered program costs one rank: bytes sent to others, bytes moved between its memories, flops; and which ops a step computes again."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from deepseed import cost
from deepseed.ir.collective import MEMORIES
from deepseed.ir.program import Op, Program
from deepseed.ir.schedule import kind_of, loop_of


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


def repeated(p: Program) -> frozenset[str]:
    """The matmuls that a later loop over the microbatches computes again: it has as many of the same place in the model, phase and type
    (of another target, where one of them was fused with what follows)."""
    looped = [op for op in p.ops if op.part and kind_of(op.part) != "once" and local_flops(p, op)]
    keys = {op.name: (op.path, op.line, op.phase, op.types) for op in looped}
    left = Counter((loop_of(op.part), keys[op.name]) for op in looped)
    last = {key: loop for loop, key in sorted(left, key=lambda k: k[0])}
    out = set()
    for op in looped:
        loop, key = loop_of(op.part), keys[op.name]
        if loop < last[key] and left[loop, key] <= left[last[key], key]:
            out.add(op.name)
        left[loop, key] -= loop < last[key]
    return frozenset(out)
