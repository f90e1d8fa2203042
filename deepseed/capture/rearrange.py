"""Ops that only move elements, written as reshape, permute, slice and unslice: pixel shuffles, diagonals, windows, identities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch

from deepseed.capture.batch import type_of
from deepseed.capture.convert import Emitter
from deepseed.capture.lowering import _cat_refs, _dim, _permute, _unslice
from deepseed.ir.program import Arg, Ref, Type
from deepseed.ops.own import SIZED

_aten = torch.ops.aten
Ints = Sequence[int]


# channels and pixels ----------------------------------------------------------------------------------------------


def _pixel_shuffle(e: Emitter, val: Any, self: Ref, upscale_factor: int) -> Arg:
    """[.., c r r, h, w] -> [.., c, h r, w r]"""
    *lead, c, h, w = e.type(self).shape
    r, n = upscale_factor, len(lead)
    x = e.reshape(self, (*lead, c // (r * r), r, r, h, w))
    x = _permute(e, x, (*range(n), n, n + 3, n + 1, n + 4, n + 2))
    return e.reshape(x, type_of(val).shape)


def _pixel_unshuffle(e: Emitter, val: Any, self: Ref, downscale_factor: int) -> Arg:
    *lead, c, h, w = e.type(self).shape
    r, n = downscale_factor, len(lead)
    x = e.reshape(self, (*lead, c, h // r, r, w // r, r))
    x = _permute(e, x, (*range(n), n, n + 2, n + 4, n + 1, n + 3))
    return e.reshape(x, type_of(val).shape)


def _to_planes(e: Emitter, val: Any, grad_output: Ref, self: Ref, indices: Ref, **_: Any) -> Arg:
    """Gradients added where ``indices``, positions in a plane, say. (PyTorch's own kernel is wrong on operands with gaps in memory.)"""
    t = type_of(val)
    lead, plane, taken = t.shape[:2], prod(t.shape[2:]), prod(e.type(grad_output).shape[2:])
    flat = Type(t.dtype, (*lead, plane))
    x = e.one("scatter_add", (e.full(0.0, flat), e.reshape(indices, (*lead, taken)), e.reshape(grad_output, (*lead, taken))), flat, dim=2)
    return e.reshape(x, t.shape)


def _channel_shuffle(e: Emitter, val: Any, self: Ref, groups: int) -> Arg:
    b, c, *rest = e.type(self).shape
    x = e.reshape(self, (b, groups, c // groups, *rest))
    return e.reshape(_permute(e, x, (0, 2, 1, *range(3, 3 + len(rest)))), (b, c, *rest))


def _rot90(e: Emitter, val: Any, self: Ref, k: int = 1, dims: Ints = (0, 1)) -> Arg:
    t = e.type(self)
    a, b = (_dim(d, len(t.shape)) for d in dims)
    turned = {0: (), 1: (b,), 2: (a, b), 3: (a,)}[k % 4]
    x = e.one("aten.flip", (self, turned), t) if turned else self
    order = list(range(len(t.shape)))
    if k % 2:
        order[a], order[b] = b, a
    return _permute(e, x, order)


def _block_diag(e: Emitter, val: Any, tensors: Sequence[Ref]) -> Arg:
    t = type_of(val)
    rows: list[Ref] = []
    column = 0
    for x in tensors:
        shape = e.type(x).shape
        block = e.reshape(e.cast(x, t.dtype), (1,) * (2 - len(shape)) + shape)
        height, width = e.type(block).shape
        rows.append(_unslice(e, block, (height, t.shape[1]), 1, column))
        column += width
    return _cat_refs(e, rows, 0, t)


# diagonals --------------------------------------------------------------------------------------------------------


def _corner(offset: int, m: int) -> int:
    """Where a diagonal begins in a flattened matrix of m columns."""
    return offset if offset >= 0 else -offset * m


def _ends(rank: int, d1: int, d2: int) -> tuple[int, ...]:
    """The order of dimensions that puts d1, d2 last."""
    return (*(d for d in range(rank) if d not in (d1, d2)), d1, d2)


def _diagonal(e: Emitter, val: Any, self: Ref, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Arg:
    rank = len(e.type(self).shape)
    x = _permute(e, self, _ends(rank, _dim(dim1, rank), _dim(dim2, rank)))
    *lead, n, m = e.type(x).shape
    return e.slice(e.reshape(x, (*lead, n * m)), len(lead), _corner(offset, m), type_of(val).shape[-1], m + 1)


def _undiagonal(e: Emitter, x: Ref, shape: Ints, offset: int, dim1: int, dim2: int) -> Ref:
    """Zeros of ``shape`` with x on a diagonal."""
    rank = len(shape)
    order = _ends(rank, _dim(dim1, rank), _dim(dim2, rank))
    *lead, n, m = (shape[d] for d in order)
    flat = _unslice(e, x, (*lead, n * m), len(lead), _corner(offset, m), m + 1)
    return _permute(e, e.reshape(flat, (*lead, n, m)), [order.index(d) for d in range(rank)])


def _diagonal_backward(e: Emitter, val: Any, grad_output: Ref, input_sizes: Ints, offset: int, dim1: int, dim2: int) -> Arg:
    return _undiagonal(e, grad_output, input_sizes, offset, dim1, dim2)


def _diag_embed(e: Emitter, val: Any, self: Ref, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Arg:
    return _undiagonal(e, self, type_of(val).shape, offset, dim1, dim2)


def _diagonal_scatter(e: Emitter, val: Any, self: Ref, src: Ref, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Arg:
    t = e.type(self)
    d1, d2 = _dim(dim1, len(t.shape)), _dim(dim2, len(t.shape))
    inside = _on_diagonal(e, t.shape[min(d1, d2)], t.shape[max(d1, d2)], offset if d1 < d2 else -offset)
    inside = e.reshape(inside, [n if d in (d1, d2) else 1 for d, n in enumerate(t.shape)])
    return e.one("aten.where.self", (inside, _undiagonal(e, e.cast(src, t.dtype), t.shape, offset, d1, d2), self), t)


def _trace(e: Emitter, val: Any, self: Ref) -> Arg:
    n, m = e.type(self).shape
    line = e.slice(e.reshape(self, (n * m,)), 0, 0, min(n, m), m + 1)
    return e.one("sum", (line,), type_of(val), dims=(0,), keepdim=False)


def _on_diagonal(e: Emitter, n: int, m: int, offset: int = 0) -> Ref:
    """bool[n, m]: column - row == offset"""
    rows = e.reshape(e.one("iota", (), Type("i64", (n,)), start=offset, step=1), (n, 1))
    return e.one("aten.eq.Tensor", (rows, e.one("iota", (), Type("i64", (m,)), start=0, step=1)), Type("bool", (n, m)))


def _eye(e: Emitter, val: Any, n: int, m: int | None = None, **_: Any) -> Arg:
    return e.cast(_on_diagonal(e, n, n if m is None else m), type_of(val).dtype)


# windows ----------------------------------------------------------------------------------------------------------


def _unfold(e: Emitter, val: Any, self: Ref, dimension: int, size: int, step: int) -> Arg:
    """Windows of ``size``, each ``step`` further: a reshape where they do not overlap, else a lookup."""
    t = e.type(self)
    rank = len(t.shape)
    if rank == 0:
        return e.reshape(self, type_of(val).shape)
    d = _dim(dimension, rank)
    n = (t.shape[d] - size) // step + 1
    shape = (*t.shape[:d], n * size, *t.shape[d + 1 :])
    if step == size:
        x = e.slice(self, d, 0, n * size)
    else:
        x = e.one("aten.index_select", (self, d, _places(e, n, size, step)), Type(t.dtype, shape))
    x = e.reshape(x, (*t.shape[:d], n, size, *t.shape[d + 1 :]))
    return _permute(e, x, (*range(d + 1), *range(d + 2, rank + 1), d + 1))


def _unfold_backward(e: Emitter, val: Any, grad_in: Ref, input_sizes: Ints, dim: int, size: int, step: int) -> Arg:
    rank = len(input_sizes)
    if rank == 0:
        return e.reshape(grad_in, ())
    d = _dim(dim, rank)
    x = _permute(e, grad_in, (*range(d + 1), rank, *range(d + 1, rank)))
    n = e.type(x).shape[d]
    x = e.reshape(x, (*input_sizes[:d], n * size, *input_sizes[d + 1 :]))
    if step == size:
        return _unslice(e, x, input_sizes, d, 0)
    index = e.reshape(_places(e, n, size, step), [n * size if k == d else 1 for k in range(rank)])
    t = type_of(val)
    return e.one("scatter_add", (e.full(0, t), e.expand(index, e.type(x).shape), x), t, dim=d)


def _places(e: Emitter, n: int, size: int, step: int) -> Ref:
    """i64[n * size]: of window i its positions step * i + j"""
    starts = e.reshape(e.one("iota", (), Type("i64", (n,)), start=0, step=step), (n, 1))
    inside = e.one("iota", (), Type("i64", (size,)), start=0, step=1)
    return e.reshape(e.one("aten.add.Tensor", (starts, inside), Type("i64", (n, size))), (n * size,))


# resizing ---------------------------------------------------------------------------------------------------------


def _sized(name: str) -> Callable[..., Arg]:
    """The gradient of a resize: the input's shape, one of its arguments, is the result's."""

    def lower(e: Emitter, val: Any, grad_output: Ref, output_size: Ints, input_size: Ints, **rest: Any) -> Arg:
        return e.one(f"sized.{name}", (grad_output,), type_of(val), given=(tuple(output_size), "shape", *rest.values()))

    return lower


def _affine_grid(e: Emitter, val: Any, theta: Ref, size: Ints, align_corners: bool) -> Arg:
    """The corners' coordinates, evenly spaced, times theta."""
    t = type_of(val)
    *space, _ = t.shape[1:]
    k = len(space)
    columns: list[Ref] = []
    for d in reversed(range(k)):
        n = space[d]
        line = e.one("aten.linspace", (-1, 1, n), Type(t.dtype, (n,)), dtype=t.dtype) if n > 1 else e.full(0, Type(t.dtype, (1,)))
        if not align_corners:
            line = e.one("aten.div.Tensor", (e.one("aten.mul.Tensor", (line, n - 1), Type(t.dtype, (n,))), n), Type(t.dtype, (n,)))
        line = e.reshape(line, [n if i == d else 1 for i in range(k + 1)])
        columns.append(e.expand(line, (*space, 1)))
    columns.append(e.full(1, Type(t.dtype, (*space, 1))))
    grid = _cat_refs(e, columns, k, Type(t.dtype, (*space, k + 1)))
    points = e.type(grid).numel // (k + 1)
    base = e.expand(e.reshape(grid, (1, points, k + 1)), (t.shape[0], points, k + 1))
    return e.reshape(e.one("aten.bmm", (base, _permute(e, theta, (0, 2, 1))), Type(t.dtype, (t.shape[0], points, k))), t.shape)


def _as_complex(e: Emitter, val: Any, self: Ref) -> Arg:
    """[.., 2] -> complex, whatever the strides."""
    t = e.type(self)
    d = len(t.shape) - 1
    real, imaginary = (e.reshape(e.slice(self, d, i, 1), t.shape[:-1]) for i in (0, 1))
    return e.one("aten.complex", (real, imaginary), type_of(val))


def _conj(e: Emitter, val: Any, self: Any) -> Any:
    if isinstance(self, complex):
        return self.conjugate()
    t = e.type(self)
    return e.one("aten._conj_physical", (self,), t) if t.dtype in ("c64", "c128") else self


def _floor_divide(e: Emitter, val: Any, self: Ref, other: Any) -> Arg:
    return e.one("aten.div.Tensor_mode", (self, other), type_of(val), rounding_mode="floor")


def _neg(e: Emitter, val: Any, self: Ref) -> Arg:
    return e.one("aten.neg", (self,), e.type(self))


REARRANGED: dict[Any, Callable[..., Arg]] = {
    _aten.pixel_shuffle: _pixel_shuffle, _aten.pixel_unshuffle: _pixel_unshuffle,
    _aten.fractional_max_pool2d_backward: _to_planes,
    _aten.channel_shuffle: _channel_shuffle, _aten.native_channel_shuffle: _channel_shuffle,
    _aten.rot90: _rot90, _aten.block_diag: _block_diag,
    _aten.diagonal: _diagonal, _aten.diagonal_backward: _diagonal_backward, _aten.diag_embed: _diag_embed, _aten.diagonal_scatter: _diagonal_scatter,
    _aten.trace: _trace, _aten.eye: _eye, _aten.unfold: _unfold, _aten.unfold_backward: _unfold_backward, _aten.affine_grid_generator: _affine_grid,
    _aten.view_as_complex: _as_complex, _aten._conj: _conj, _aten._neg_view: _neg, _aten.floor_divide: _floor_divide,
    **{getattr(_aten, name): _sized(name) for name in SIZED},
}  # fmt: skip
