"""Reads and writes by index, written with the few that have a rule: gather, scatter, scatter_add, index, embedding, where."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch

from deepseed.capture.batch import type_of
from deepseed.capture.convert import Emitter, as_aten
from deepseed.capture.lowering import _dim, _permute, _split, _split_sizes
from deepseed.ir.program import Arg, Ref, Type

_aten = torch.ops.aten


# along one dimension ----------------------------------------------------------------------------------------------


def _spread(e: Emitter, index: Ref, shape: Sequence[int], dim: int) -> Ref:
    """A 1-d index of dimension ``dim`` as an index of every element of ``shape``."""
    n = e.type(index).numel
    return e.expand(e.reshape(index, [n if d == dim else 1 for d in range(len(shape))]), shape)


def _along(e: Emitter, self: Ref, dim: int, index: Ref, source: Ref) -> tuple[int, Ref, Ref]:
    """The dimension, index and source of index_add and its like as those of scatter_add; 0-d tensors as vectors."""
    t = e.type(self)
    d = _dim(dim, len(t.shape))
    shape = [e.type(index).numel if k == d else n for k, n in enumerate(t.shape)] or [1]
    return d, _spread(e, index, shape, d), e.reshape(e.cast(source, t.dtype), shape)


def _index_add(e: Emitter, val: Any, self: Ref, dim: int, index: Ref, source: Ref, alpha: float = 1) -> Arg:
    t = e.type(self)
    d, index, source = _along(e, self, dim, index, source)
    if alpha != 1:
        source = e.one("aten.mul.Tensor", (source, alpha), e.type(source))
    out = e.one("scatter_add", (_vector(e, self), index, source), Type(t.dtype, t.shape or (1,)), dim=d)
    return e.reshape(out, t.shape)


def _index_copy(e: Emitter, val: Any, self: Ref, dim: int, index: Ref, source: Ref) -> Arg:
    t = e.type(self)
    d, index, source = _along(e, self, dim, index, source)
    return e.reshape(e.one("aten.scatter.src", (_vector(e, self), d, index, source), Type(t.dtype, t.shape or (1,))), t.shape)


def _index_reduce(e: Emitter, val: Any, self: Ref, dim: int, index: Ref, source: Ref, reduce: str, include_self: bool = True) -> Arg:
    t = e.type(self)
    d, index, source = _along(e, self, dim, index, source)
    left = {} if include_self else {"include_self": False}
    out = e.one("aten.scatter_reduce.two", (_vector(e, self), d, index, source, reduce), Type(t.dtype, t.shape or (1,)), **left)
    return e.reshape(out, t.shape)


def _index_fill(e: Emitter, val: Any, self: Ref, dim: int, index: Ref, value: Any) -> Arg:
    t = e.type(self)
    shape = [e.type(index).numel if k == _dim(dim, len(t.shape)) else n for k, n in enumerate(t.shape)] or [1]
    filled = e.expand(e.cast(value, t.dtype), shape) if isinstance(value, Ref) else e.full(value, Type(t.dtype, tuple(shape)))
    return _index_copy(e, val, self, dim, index, filled)


def _scatter_reduce(e: Emitter, val: Any, self: Ref, dim: int, index: Ref, src: Ref, reduce: str, include_self: bool = True) -> Arg:
    if reduce == "sum" and include_self:
        return e.one("scatter_add", (self, index, src), type_of(val), dim=_dim(dim, len(e.type(self).shape)))
    return as_aten(e, _aten.scatter_reduce.two, val, {"self": self, "dim": dim, "index": index, "src": src, "reduce": reduce, "include_self": include_self})


def _vector(e: Emitter, x: Ref) -> Ref:
    return e.reshape(x, e.type(x).shape or (1,))


# into the flattened tensor ------------------------------------------------------------------------------------------


def _flat_index(e: Emitter, index: Ref, n: int) -> Ref:
    """Positions counted from the end made positive, in one dimension."""
    t = e.type(index)
    return e.reshape(e.one("aten.remainder.Scalar", (index, n), t), (t.numel,))


def _take(e: Emitter, val: Any, self: Ref, index: Ref) -> Arg:
    t = e.type(self)
    n = e.type(index).numel
    out = e.one("gather", (e.reshape(self, (t.numel,)), _flat_index(e, index, t.numel)), Type(t.dtype, (n,)), dim=0)
    return e.reshape(out, type_of(val).shape)


def _put(e: Emitter, val: Any, self: Ref, index: Ref, source: Ref, accumulate: bool = False) -> Arg:
    t = e.type(self)
    flat = Type(t.dtype, (t.numel,))
    x, i, source = e.reshape(self, flat.shape), _flat_index(e, index, t.numel), e.reshape(source, (e.type(index).numel,))
    out = e.one("scatter_add", (x, i, source), flat, dim=0) if accumulate else e.one("aten.scatter.src", (x, 0, i, source), flat)
    return e.reshape(out, t.shape)


# by several indices -----------------------------------------------------------------------------------------------


def _first(at: Sequence[int], rank: int) -> tuple[int, ...] | None:
    """The order of dimensions that puts ``at`` first, where they do not stand side by side; else None."""
    return None if list(at) == list(range(at[0], at[-1] + 1)) else (*at, *(d for d in range(rank) if d not in at))


def _index(e: Emitter, val: Any, self: Ref, indices: Sequence[Ref | None]) -> Arg:
    """``x[i, :, j]`` is ``x.movedim(2, 1)[i, j]``: PyTorch puts the dimensions of indices that stand apart first."""
    at = [d for d, i in enumerate(indices) if i is not None]
    order = _first(at, len(e.type(self).shape)) if at else None
    if order is not None:
        self, indices = _permute(e, self, order), [indices[d] for d in at]
    return as_aten(e, _aten.index.Tensor, val, {"self": self, "indices": indices})


def _index_put(e: Emitter, val: Any, self: Ref, indices: Sequence[Ref | None], values: Ref, accumulate: bool = False, **_: Any) -> Arg:
    t = e.type(self)
    at = [d for d, i in enumerate(indices) if i is not None]
    found = [i for i in indices if i is not None]
    if any(e.type(i).dtype in ("bool", "u8") for i in found):
        masked = _mask_put(e, self, at[0], found[0], values, accumulate) if len(found) == 1 else None
        if masked is not None:
            return masked
        return as_aten(e, _aten.index_put.default, val, {"self": self, "indices": indices, "values": values, "accumulate": accumulate})
    order = _first(at, len(t.shape))
    if order is not None:
        self, at = _permute(e, self, order), list(range(len(at)))
    shape = tuple(torch.broadcast_shapes(*(e.type(i).shape for i in found)))  # type: ignore[no-untyped-call]
    inside = e.type(self).shape
    values = e.expand(e.cast(values, t.dtype), (*inside[: at[0]], *shape, *inside[at[-1] + 1 :]))
    where = (*(None for _ in range(at[0])), *(e.expand(i, shape) for i in found))
    out = e.one("aten.index_put", (self, where, values, accumulate), e.type(self))
    return out if order is None else _permute(e, out, [order.index(d) for d in range(len(order))])


def _mask_put(e: Emitter, self: Ref, dim: int, mask: Ref, values: Ref, accumulate: bool) -> Ref | None:
    """``x[mask] = v`` where v is the same for all that the mask chooses."""
    t, m, v = e.type(self), e.type(mask).shape, e.type(values).shape
    rest = len(t.shape) - dim - len(m)
    chosen = len(v) - rest - 1  # where v has the dimension of what is chosen
    if chosen >= 0 and v[chosen] != 1:
        return None
    if chosen >= 0:
        values = e.reshape(values, (*v[:chosen], *(1 for _ in m), *v[chosen + 1 :]))
    mask = e.reshape(e.cast(mask, "bool"), (*(1 for _ in range(dim)), *m, *(1 for _ in range(rest))))
    values = e.expand(e.cast(values, t.dtype), t.shape)
    if not accumulate:
        return e.one("aten.where.self", (mask, values, self), t)
    return e.one("aten.add.Tensor", (self, e.one("aten.where.self", (mask, values, e.full(0, Type(t.dtype, ()))), t)), t)


def _masked_fill(e: Emitter, val: Any, self: Ref, mask: Ref, value: Ref) -> Arg:
    t = type_of(val)
    return e.one("aten.where.self", (mask, e.cast(value, t.dtype), self), t)


# by mask, in order --------------------------------------------------------------------------------------------------


def _ranks(e: Emitter, mask: Ref, shape: Sequence[int], available: int) -> tuple[Ref, Ref, int]:
    """Mask, the number of each chosen row among the chosen, and the elements in a row: a mask that was expanded over the last
    dimensions chooses whole rows."""
    made = next((op for op in reversed(e.ops) if mask.name in op.results), None)
    rows = list(shape)
    if made is not None and made.target == "expand" and tuple(shape) == e.type(mask).shape:
        small = (1,) * (len(shape) - len(e.type(made.refs[0]).shape)) + e.type(made.refs[0]).shape
        k = len(shape)
        while k and small[k - 1] == 1:
            k -= 1
        if available % max(prod(shape[k:]), 1) == 0:
            mask, rows = made.refs[0], list(shape[:k])
    mask = e.expand(mask, (*rows, *(1 for _ in shape[len(rows) :])))
    n = prod(rows)
    flat = e.cast(e.reshape(mask, (n,)), "i64")
    count = e.one("aten.cumsum", (flat, 0), Type("i64", (n,)))
    number = e.one("aten.clamp_min", (e.one("aten.sub.Tensor", (count, 1), Type("i64", (n,))), 0), Type("i64", (n,)))
    return mask, number, prod(shape[len(rows) :])


def _masked_scatter(e: Emitter, val: Any, self: Ref, mask: Ref, source: Ref) -> Arg:
    """The elements of source, in order, where the mask is true: rows looked up by their number."""
    t, available = type_of(val), e.type(source).numel
    self = e.expand(self, t.shape)
    if not available:
        return self
    mask, number, width = _ranks(e, mask, t.shape, available)
    table = e.reshape(source, (available // width, width))
    found = e.one("embedding", (table, number), Type(t.dtype, (e.type(number).numel, width)))
    return e.one("aten.where.self", (mask, e.reshape(found, t.shape), self), t)


def _masked_scatter_backward(e: Emitter, val: Any, grad_output: Ref, mask: Ref, sizes: Sequence[int]) -> Arg:
    t, available = e.type(grad_output), prod(sizes)
    if not available:
        return e.full(0, type_of(val))
    mask, number, width = _ranks(e, mask, t.shape, available)
    chosen = e.one("aten.where.self", (mask, grad_output, e.full(0, Type(t.dtype, ()))), t)
    rows = e.reshape(chosen, (e.type(number).numel, width))
    return e.reshape(e.one("embedding_backward", (rows, number), Type(t.dtype, (available // width, width))), sizes)


def _repeat_interleave(e: Emitter, val: Any, repeats: Ref, **_: Any) -> Arg:
    """Which element each of the repeated ones is: a search in the running totals."""
    t, n = e.type(repeats), type_of(val).shape[0]
    total = e.one("aten.cumsum", (repeats, 0), t)
    return e.cast(e.one("aten.searchsorted.Tensor", (total, e.one("iota", (), Type(t.dtype, (n,)), start=0, step=1)), Type("i64", (n,)), right=True), type_of(val).dtype)


INDEXING: dict[Any, Callable[..., Arg]] = {
    _aten.index_add: _index_add, _aten.index_copy: _index_copy, _aten.index_fill: _index_fill, _aten.index_reduce: _index_reduce,
    _aten.scatter_reduce.two: _scatter_reduce, _aten.take: _take, _aten.put: _put,
    _aten.index.Tensor: _index, _aten._unsafe_index.Tensor: _index, _aten.index_put: _index_put, _aten._unsafe_index_put: _index_put, _aten._index_put_impl: _index_put,
    _aten.masked_fill.Tensor: _masked_fill, _aten.masked_scatter: _masked_scatter, _aten.masked_scatter_backward: _masked_scatter_backward,
    _aten.repeat_interleave.Tensor: _repeat_interleave,
    _aten.unsafe_split.Tensor: _split, _aten.unsafe_split_with_sizes: _split_sizes,
}  # fmt: skip
