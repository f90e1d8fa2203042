"""What moving and computing costs: bytes a rank sends, flops of an op.

The solver's prices and explain's counts both come from here; the closed forms they are held against are in
deepseed.closed_forms. Bytes are those of the ring algorithms (Thakur et al. 2005), sent by one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from deepseed.ir.collective import IN_TIME, KEYED
from deepseed.ir.collective import LOCAL as LOCAL_STEPS
from deepseed.ir.layout import Element, Partial, Split, routes, weaker
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Op, Type

LATENCY = 65536.0  # a collective costs what sending this many bytes would: between equal volumes, fewer collectives
FLOP = 8.0  # a flop that every rank repeats, in bytes sent: compute is never repeated to save a message
UPDATE_FLOP = 0.01  # the same of the optimizer, whose matrices can be gathered: what a machine computes while it sends a byte
LOCAL = 1e-3  # a local slice or mask, for each byte it reads
WHOLE_WEIGHT = 1000.0  # a weight left whole on a model axis, for each of its bytes


def reshard(have: Element, want: Element, nbytes: int, n: int) -> float | None:
    """Price of one value of ``nbytes`` (whole on this axis) going from one element to another; None: no such move."""
    if weaker(have, want):
        return 0.0
    part = nbytes * (n - 1) / n
    if routes(have, want) is not None:  # rows to their owners, or back; sorting them is what keeps a gather of equal volume
        return part / n + LATENCY + LOCAL * nbytes
    if isinstance(want, Partial):
        return LOCAL * nbytes + 1.0 if have is None and want == Partial("sum") else None
    if have is None:
        return LOCAL * nbytes / n
    if isinstance(have, Partial):
        return part + LATENCY if isinstance(want, Split) and have.op == "sum" else 2 * part + LATENCY
    return part + LATENCY if want is None else part / n + LATENCY


def sent_bytes(kind: str, before: Type, after: Type, axis: str, mesh: Mesh) -> int:
    """Bytes that one rank sends for one step over ``axis`` (n ranks), by the ring algorithms.

    all_gather: the local shard, n-1 times. all_reduce: 2 (n-1)/n of the local tensor. reduce_scatter and all_to_all:
    (n-1)/n of it. dispatch and combine: what n-1 ranks own of a rank's n-th of the rows, where ids are uniform: an expected value.
    Local steps (``shard``, ``summand``) and steps in time: nothing.
    """
    n = mesh.size(axis)
    local = before.local_bytes(mesh)
    if kind == "all_gather":
        return local * (n - 1)
    if kind == "all_reduce":
        return 2 * local * (n - 1) // n
    if kind in ("reduce_scatter", "all_to_all"):
        return local * (n - 1) // n
    if kind in KEYED:
        return max(local, after.local_bytes(mesh)) * (n - 1) // (n * n)
    if kind in (*LOCAL_STEPS, *IN_TIME):
        return 0
    raise ValueError(f"unknown step {kind!r}")


def flops(op: Op, operands: Sequence[Type]) -> int:
    """Floating-point operations of a matmul-like op on the whole tensors (a multiply-add is two); 0 for all others."""
    if op.target == "aten.mm":
        return 2 * prod(operands[0].shape) * operands[1].shape[1]
    if op.target == "aten.bmm":
        return 2 * prod(operands[0].shape) * operands[1].shape[2]
    if op.target in ("aten.addmm", "aten.baddbmm"):
        return 2 * prod(operands[1].shape) * operands[2].shape[-1]
    if op.target == "sdpa":
        (b, h, s, d), t = operands[0].shape, operands[1].shape[2]
        return 2 * b * h * s * t * (d + operands[2].shape[3])
    if op.target == "sdpa_backward":
        (b, h, s, d), t = operands[1].shape, operands[2].shape[2]
        return 2 * b * h * s * t * (3 * d + 2 * operands[3].shape[3])
    if op.target == "paged_attention":
        (t, h, d), e = operands[0].shape, operands[2].shape[2]
        return 2 * h * t * t * (d + e)
    if op.target == "routed_mm":
        return 2 * prod(operands[0].shape) * operands[1].shape[2]
    if op.target == "routed_outer":
        return 2 * prod(operands[0].shape) * operands[1].shape[1]
    if op.target == "aten.convolution":
        return 2 * prod(op.types[0].shape) * prod(operands[1].shape[1:])
    return 0


def reads_weights(op: Op, operands: Sequence[Type]) -> bool:
    """Whether a model axis is there to split this op's weights: a matmul's, or a table that rows are looked up in."""
    return op.target == "embedding" or flops(op, operands) > 0
