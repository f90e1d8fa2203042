"""``as_strided`` without strides: a reshape, a reshape and a permutation, or a gather from the flattened tensor.

Strides belong to the trace: the fake operand says how its storage was laid out then. A program has no strides, so the storage is
rebuilt in row-major order and each element is named by its position in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import Tensor

from deepseed.capture.batch import type_of
from deepseed.capture.convert import Emitter
from deepseed.capture.errors import CaptureError
from deepseed.ir.program import Arg, Ref, Type

Ints = Sequence[int]


def as_strided(e: Emitter, val: Any, self: Ref, size: Ints, stride: Ints, storage_offset: int | None = None) -> Arg:
    """The elements of ``self``'s storage at ``offset + sum(index * stride)``."""
    flat, base = _storage(e, self)
    offset = (base if storage_offset is None else storage_offset) - base
    order = _dense(size, stride)
    if order is not None and offset == 0 and prod(size) == e.type(flat).numel:
        x = e.reshape(flat, [size[d] for d in order])
        return _permuted(e, x, [order.index(d) for d in range(len(size))])
    return e.reshape(e.one("gather", (flat, _positions(e, size, stride, offset)), Type(e.type(flat).dtype, (prod(size),)), dim=0), type_of(val).shape)


def as_strided_scatter(e: Emitter, val: Any, self: Ref, src: Ref, size: Ints, stride: Ints, storage_offset: int | None = None) -> Arg:
    """``self`` with those elements replaced by ``src``; positions must be distinct."""
    flat, base = _storage(e, self)
    offset = (base if storage_offset is None else storage_offset) - base
    order = _dense(size, stride)
    if order is None and len(set(_enumerate(size, stride))) != prod(size):
        raise CaptureError("as_strided_scatter writes one element twice", path=e.where.path, line=e.where.line, fix="write to a tensor that does not overlap itself")
    t = e.type(flat)
    if order is not None and offset == 0 and prod(size) == t.numel:
        flat = e.reshape(_permuted(e, src, order), t.shape)
    else:
        flat = e.one("aten.scatter.src", (flat, 0, _positions(e, size, stride, offset), e.reshape(src, (prod(size),))), t)
    return _from_storage(e, flat, _operand(e))


def _operand(e: Emitter) -> Tensor:
    assert e.node is not None
    given = e.node.args[0]
    return given.meta["val"]  # type: ignore[no-any-return, union-attr]


def _storage(e: Emitter, x: Ref) -> tuple[Ref, int]:
    """``x`` flattened in the order of its storage, and the position of its first element there."""
    fake = _operand(e)
    order = _dense(fake.shape, fake.stride())
    if order is None:
        raise CaptureError(
            f"as_strided of a tensor {list(fake.shape)} with strides {list(fake.stride())}, which leaves gaps in its storage",
            path=e.where.path, line=e.where.line, fix="call .contiguous() on it first",
        )  # fmt: skip
    return e.reshape(_permuted(e, x, order), (fake.numel(),)), int(fake.storage_offset())


def _from_storage(e: Emitter, flat: Ref, fake: Tensor) -> Ref:
    order = _dense(fake.shape, fake.stride())
    assert order is not None
    return _permuted(e, e.reshape(flat, [fake.shape[d] for d in order]), [order.index(d) for d in range(fake.dim())])


def _dense(size: Ints, stride: Ints) -> list[int] | None:
    """The dimensions, major first, if the strides are those of a permuted row-major tensor; else None."""
    order = sorted(range(len(size)), key=lambda d: (-stride[d] if size[d] != 1 else 0, d))
    order = [d for d in order if size[d] == 1] + [d for d in order if size[d] != 1]
    step = 1
    for d in reversed(order):
        if size[d] != 1 and stride[d] != step:
            return None
        step *= size[d]
    return order


def _permuted(e: Emitter, x: Ref, dims: Ints) -> Ref:
    t = e.type(x)
    if list(dims) == sorted(dims):
        return x
    return e.one("permute", (x,), Type(t.dtype, tuple(t.shape[d] for d in dims)), dims=tuple(dims))


def _positions(e: Emitter, size: Ints, stride: Ints, offset: int) -> Ref:
    """i64[prod(size)]: the position of each element in the flattened storage."""
    total: Ref | None = None if size else e.one("iota", (), Type("i64", (1,)), start=offset, step=1)
    for d, (n, step) in enumerate(zip(size, stride, strict=True)):
        line = e.one("iota", (), Type("i64", (n,)), start=offset if d == 0 else 0, step=step) if step else e.full(offset if d == 0 else 0, Type("i64", (n,)))
        line = e.reshape(line, [n if i == d else 1 for i in range(len(size))])
        shape = tuple(size[: d + 1]) + (1,) * (len(size) - d - 1)
        total = line if total is None else e.one("aten.add.Tensor", (total, line), Type("i64", shape))
    assert total is not None
    return e.reshape(total, (prod(size),))


def _enumerate(size: Ints, stride: Ints) -> list[int]:
    positions = [0]
    for n, step in zip(size, stride, strict=True):
        positions = [p + i * step for p in positions for i in range(n)]
    return positions
