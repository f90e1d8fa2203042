"""What each op of docs/ir.md computes, in torch; and the single-device reference interpreter.

``run`` executes one op, ``evaluate`` a program. Generated source calls the own ops as ``deepseed.ops.reshape(x, shape)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deepseed.ir.kernels import CONTIGUOUS, MASKED
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Op, Program
from deepseed.ops import library as _library
from deepseed.ops.attention import sdpa, sdpa_backward
from deepseed.ops.own import (
    amax,
    cast,
    cat,
    embedding,
    embedding_backward,
    expand,
    full,
    gather,
    iota,
    pad,
    permute,
    present,
    reshape,
    scatter_add,
    sized,
    slice,
    sum,
    sum_of_squares,
    unslice,
)
from deepseed.ops.products import accumulate_mm, addmm, baddbmm, bmm, mm
from deepseed.ops.rng import bernoulli, normal, uniform
from deepseed.ops.routed import routed_mm, routed_outer
from deepseed.ops.table import OWN, OpError, Shape, arguments, dtype_name, function, overload, torch_dtype

__all__ = [
    "OWN", "OpError", "accumulate_mm", "addmm", "amax", "arguments", "baddbmm", "bernoulli", "bmm", "cast", "cat", "dtype_name", "embedding", "embedding_backward", "evaluate",
    "expand", "full", "function", "gather", "iota", "mm", "normal", "overload", "pad", "permute", "present", "reshape", "routed_mm", "routed_outer", "run",
    "scatter_add", "sdpa", "sdpa_backward", "sized", "slice", "sum", "sum_of_squares", "torch_dtype", "uniform", "unslice",
]  # fmt: skip

_library.register()

_WHOLE_IDENTITY = ("reshard", "wait", "all_gather.start", "all_reduce.start", "reduce_scatter.start", "all_to_all.start", "dispatch.start", "combine.start", "shard", "summand", "share", "to_host.start", "to_device.start")


def run(op: Op, operands: Sequence[Tensor], mesh: Mesh) -> tuple[Tensor, ...]:
    """The op's results on one rank's operands (in the order of ``op.refs``), of shapes ``op.types[i].local(mesh)``.

    Raises OpError where the op is unknown, is a collective (the runtime's), or gives another dtype or shape.
    """
    return _run(op, operands, [t.local(mesh) for t in op.types])


def evaluate(p: Program, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The outputs, by value name, of the whole program on one device; ``inputs`` by value name, whole.

    Layouts are ignored: reshards and collectives are the identity on whole values. A value is freed after its last use.
    """
    values: dict[str, Tensor] = {}
    for i in p.inputs:
        if i.name not in inputs:
            raise OpError(f"evaluate {p.name}: no value for input %{i.name} ({i.role} {i.key!r})")
        values[i.name] = inputs[i.name]
    last = {ref.name: n for n, op in enumerate(p.ops) for ref in op.refs}
    kept = {o.ref.name for o in p.outputs}
    for n, op in enumerate(p.ops):
        operands = [values[ref.name] for ref in op.refs]
        results = tuple(operands) if op.target in _WHOLE_IDENTITY else _run(op, operands, [t.shape for t in op.types])
        values.update(zip(op.results, results, strict=False))
        del operands, results
        for name in {*(ref.name for ref in op.refs), *op.results} - kept:
            if last.get(name, -1) <= n:
                values.pop(name, None)
    return {o.ref.name: values[o.ref.name] for o in p.outputs}


def _run(op: Op, operands: Sequence[Tensor], shapes: Sequence[Shape]) -> tuple[Tensor, ...]:
    results: Any
    try:
        if shapes and all(0 in shape for shape in shapes):  # kernels differ in whether they accept this: an uneven split leaves ranks with nothing
            results = tuple(torch.empty(shape, dtype=torch_dtype(t.dtype)) for shape, t in zip(shapes, op.types, strict=True))
        elif op.target in OWN:
            results = OWN[op.target](operands, dict(op.kwargs), shapes, torch_dtype(op.type.dtype))
        else:
            rows = CONTIGUOUS.get(op.target, ())
            args, kwargs = arguments(op, [x.contiguous() if n in rows else x for n, x in enumerate(operands)] if rows else operands)
            results = present(function(op.target)(*args, **kwargs), args[MASKED[op.target]] if op.target in MASKED else None)
    except OpError as error:
        raise OpError(f"{_where(op)}: {error}") from None
    except (RuntimeError, TypeError, IndexError, ValueError) as error:
        given = ", ".join(f"{dtype_name(x.dtype)}{list(x.shape)}" for x in operands)
        raise OpError(f"{_where(op)} on {given}: {error}") from error
    out = present(results)
    out = (out,) if isinstance(out, Tensor) else out
    if len(out) < len(op.results):
        raise OpError(f"{_where(op)}: {len(out)} results, the op line names {len(op.results)}")
    for name, result, shape, type_ in zip(op.results, out, shapes, op.types, strict=False):
        if result.shape != shape or result.dtype != torch_dtype(type_.dtype):
            raise OpError(f"{_where(op)}: %{name} came out as {dtype_name(result.dtype)}{list(result.shape)}, its type says {type_.dtype}{list(shape)}")
    return out


def _where(op: Op) -> str:
    return f"%{op.name} = {op.target}" + (f" at {op.path}" if op.path else "") + (f" ({op.line})" if op.line else "")


