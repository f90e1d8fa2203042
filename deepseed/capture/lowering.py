"""Aten ops that become DeepSeed's own ops (docs/ir.md): views, casts, creations, slices, sums, embeddings, attention.

Each function takes the emitter, the traced fake result and the op's arguments by their schema names. What is not in the table
stays as aten; losses, norms and activations are canonicalize's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from deepseed.capture.batch import type_of
from deepseed.capture.convert import Emitter, as_aten
from deepseed.capture.errors import CaptureError
from deepseed.capture.strides import as_strided, as_strided_scatter
from deepseed.ir.program import FLOATS, Arg, Ref, Type

_aten = torch.ops.aten


def _dim(d: int, rank: int) -> int:
    return d + max(rank, 1) if d < 0 else d


def _window(size: int, start: int | None, end: int | None, step: int) -> tuple[int, int]:
    """First index and length of a Python slice of a dimension."""
    taken = range(size)[start:end:step]
    return (taken.start if len(taken) else 0), len(taken)


# views, copies, casts ---------------------------------------------------------------------------------------------


def _reshape(e: Emitter, val: Any, self: Ref, **_: Any) -> Arg:
    return e.reshape(self, type_of(val).shape)


def _same(e: Emitter, val: Any, self: Ref, **_: Any) -> Arg:
    return self


def _permute(e: Emitter, x: Ref, dims: Sequence[int]) -> Ref:
    t = e.type(x)
    if list(dims) == sorted(dims):
        return x
    return e.one("permute", (x,), Type(t.dtype, tuple(t.shape[d] for d in dims)), dims=tuple(dims))


def _permute_dims(e: Emitter, val: Any, self: Ref, dims: Sequence[int]) -> Arg:
    rank = len(e.type(self).shape)
    return _permute(e, self, [_dim(d, rank) for d in dims])


def _transpose(e: Emitter, val: Any, self: Ref, dim0: int = 0, dim1: int = 1) -> Arg:
    rank = len(e.type(self).shape)
    order = list(range(rank))
    if rank > 1:
        a, b = _dim(dim0, rank), _dim(dim1, rank)
        order[a], order[b] = b, a
    return _permute(e, self, order)


def _expand(e: Emitter, val: Any, self: Ref, **_: Any) -> Arg:
    return e.expand(self, type_of(val).shape)


def _cast(e: Emitter, val: Any, self: Ref, **_: Any) -> Arg:
    return e.cast(self, type_of(val).dtype)


def _copy(e: Emitter, val: Any, self: Ref, src: Ref, **_: Any) -> Arg:
    t = e.type(self)
    return e.expand(e.cast(src, t.dtype), t.shape)


def _repeat(e: Emitter, val: Any, self: Ref, repeats: Sequence[int]) -> Arg:
    shape = (1,) * (len(repeats) - len(e.type(self).shape)) + e.type(self).shape
    split = [n for pair in zip((1,) * len(shape), shape, strict=True) for n in pair]
    wide = [n for pair in zip(repeats, shape, strict=True) for n in pair]
    return e.reshape(e.expand(e.reshape(self, split), wide), type_of(val).shape)


# creations --------------------------------------------------------------------------------------------------------


def _filled(value: bool | int | float) -> Callable[..., Arg]:
    return lambda e, val, **_: e.full(value, type_of(val))


def _full(e: Emitter, val: Any, fill_value: float, **_: Any) -> Arg:
    return e.full(fill_value, type_of(val))


def _scalar(e: Emitter, val: Any, s: float, **_: Any) -> Arg:
    return e.full(s, type_of(val))


def _fill(e: Emitter, val: Any, self: Ref, value: Any) -> Arg:
    t = type_of(val)
    return e.expand(e.cast(value, t.dtype), t.shape) if isinstance(value, Ref) else e.full(value, t)


def _arange(e: Emitter, val: Any, end: float, start: float = 0, step: float = 1, **_: Any) -> Arg:
    t = type_of(val)
    if all(isinstance(n, int) for n in (start, step)):
        return e.one("iota", (), t, start=start, step=step)
    counted = e.one("iota", (), Type("f64", t.shape), start=0, step=1)
    scaled = e.one("aten.mul.Tensor", (counted, float(step)), Type("f64", t.shape))
    return e.cast(e.one("aten.add.Tensor", (scaled, float(start)), Type("f64", t.shape)), t.dtype)


# parts ------------------------------------------------------------------------------------------------------------


def _slice(e: Emitter, val: Any, self: Ref, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Arg:
    shape = e.type(self).shape
    d = _dim(dim, len(shape))
    first, length = _window(shape[d], start, end, step)
    return e.slice(self, d, first, length, step)


def _select(e: Emitter, val: Any, self: Ref, dim: int, index: int) -> Arg:
    shape = e.type(self).shape
    d = _dim(dim, len(shape))
    return e.reshape(e.slice(self, d, index % shape[d], 1), type_of(val).shape)


def _unslice(e: Emitter, x: Ref, shape: Sequence[int], dim: int, start: int, step: int = 1) -> Ref:
    t = e.type(x)
    if t.shape == tuple(shape):
        return x
    return e.one("unslice", (x,), Type(t.dtype, tuple(shape)), dim=dim, start=start, step=step)


def _slice_backward(e: Emitter, val: Any, grad_output: Ref, input_sizes: Sequence[int], dim: int, start: int, end: int, step: int) -> Arg:
    d = _dim(dim, len(input_sizes))
    return _unslice(e, grad_output, input_sizes, d, _window(input_sizes[d], start, end, step)[0], step)


def _select_backward(e: Emitter, val: Any, grad_output: Ref, input_sizes: Sequence[int], dim: int, index: int) -> Arg:
    d = _dim(dim, len(input_sizes))
    one = [1 if i == d else n for i, n in enumerate(input_sizes)]
    return _unslice(e, e.reshape(grad_output, one), input_sizes, d, index % input_sizes[d])


def _slice_scatter(
    e: Emitter, val: Any, self: Ref, src: Ref, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Arg:
    t = e.type(self)
    d = _dim(dim, len(t.shape))
    size = t.shape[d]
    first, length = _window(size, start, end, step)
    src = e.cast(src, t.dtype)
    if length == size:
        return src
    if step == 1:
        parts = [e.slice(self, d, 0, first)] if first else []
        parts += [src] if length else []
        parts += [e.slice(self, d, first + length, size - first - length)] if first + length < size else []
        return _cat_refs(e, parts, d, t)
    inside = _unslice(e, e.full(True, Type("bool", e.type(src).shape)), t.shape, d, first, step)
    return e.one("aten.where.self", (inside, _unslice(e, src, t.shape, d, first, step), self), t)


def _select_scatter(e: Emitter, val: Any, self: Ref, src: Ref, dim: int, index: int) -> Arg:
    shape = e.type(self).shape
    d = _dim(dim, len(shape))
    i = index % shape[d]
    return _slice_scatter(e, val, self, e.reshape(src, [1 if k == d else n for k, n in enumerate(shape)]), d, i, i + 1)


def _pad(e: Emitter, val: Any, self: Ref, pad: Sequence[int], value: float = 0) -> Arg:
    t = e.type(self)
    rank = len(t.shape)
    both = [(pad[2 * i], pad[2 * i + 1]) for i in range(len(pad) // 2)]
    both = [(0, 0)] * (rank - len(both)) + both[::-1]
    x = self
    for d, (low, high) in enumerate(both):
        if low < 0 or high < 0:
            cut_low, cut_high = max(-low, 0), max(-high, 0)
            x = e.slice(x, d, cut_low, e.type(x).shape[d] - cut_low - cut_high)
    grown = [(max(low, 0), max(high, 0)) for low, high in both]
    if not any(n for pair in grown for n in pair):
        return x
    shape = tuple(n + low + high for n, (low, high) in zip(e.type(x).shape, grown, strict=True))
    value = float(value) if t.dtype in FLOATS else int(value)
    return e.one("pad", (x,), Type(t.dtype, shape), pads=tuple(n for pair in grown for n in pair), value=value)


def _split_sizes(e: Emitter, val: Any, self: Ref, split_sizes: Sequence[int], dim: int = 0) -> Arg:
    d = _dim(dim, len(e.type(self).shape))
    parts: list[Ref] = []
    at = 0
    for n in split_sizes:
        parts.append(e.slice(self, d, at, n))
        at += n
    return tuple(parts)


def _split(e: Emitter, val: Any, self: Ref, split_size: int, dim: int = 0) -> Arg:
    size = e.type(self).shape[_dim(dim, len(e.type(self).shape))]
    return _split_sizes(e, val, self, [min(split_size, size - at) for at in range(0, size, max(split_size, 1))] or [0], dim)


def _unbind(e: Emitter, val: Any, self: Ref, dim: int = 0) -> Arg:
    n = e.type(self).shape[_dim(dim, len(e.type(self).shape))]
    return tuple(_select(e, v, self, dim, i) for v, i in zip(val, range(n), strict=True))


def _cat_refs(e: Emitter, parts: Sequence[Ref], dim: int, t: Type) -> Ref:
    parts = [e.cast(p, t.dtype) for p in parts]
    return parts[0] if len(parts) == 1 else e.one("cat", (tuple(parts),), t, dim=dim)


def _cat(e: Emitter, val: Any, tensors: Sequence[Ref], dim: int = 0) -> Arg:
    t = type_of(val)
    parts = [p for p in tensors if e.type(p).shape != (0,) or t.shape == (0,)]  # torch skips empty vectors
    return _cat_refs(e, parts, _dim(dim, len(t.shape)), t)


def _stack(e: Emitter, val: Any, tensors: Sequence[Ref], dim: int = 0) -> Arg:
    t = type_of(val)
    d = _dim(dim, len(t.shape))
    return _cat_refs(e, [e.reshape(p, (*t.shape[:d], 1, *t.shape[d + 1 :])) for p in tensors], d, t)


# reductions, rows -------------------------------------------------------------------------------------------------


def _reduce(target: str) -> Callable[..., Arg]:
    def reduce(e: Emitter, val: Any, self: Ref, dim: Sequence[int] | None = None, keepdim: bool = False, **_: Any) -> Arg:
        t, rank = type_of(val), len(e.type(self).shape)
        dims = tuple(sorted(_dim(d, rank) for d in dim)) if dim else tuple(range(rank))
        if rank == 0:
            return e.cast(self, t.dtype)
        return e.one(target, (self,), t, dims=dims, keepdim=keepdim)

    return reduce


def _embedding(e: Emitter, val: Any, weight: Ref, indices: Ref, scale_grad_by_freq: bool = False, sparse: bool = False, **_: Any) -> Arg:
    if scale_grad_by_freq or sparse:
        raise CaptureError(
            f"an embedding with {'scale_grad_by_freq' if scale_grad_by_freq else 'sparse gradients'} cannot be captured",
            path=e.where.path, line=e.where.line, fix="switch the option off on this embedding",
        )  # fmt: skip
    return e.one("embedding", (weight, indices), type_of(val))


def _embedding_backward(
    e: Emitter, val: Any, grad_output: Ref, indices: Ref, num_weights: int, padding_idx: int, scale_grad_by_freq: bool
) -> Arg:
    if scale_grad_by_freq:
        raise CaptureError("an embedding with scale_grad_by_freq cannot be captured", path=e.where.path, line=e.where.line, fix="switch it off")
    if padding_idx >= 0:
        g, ids = e.type(grad_output), e.type(indices)
        kept = e.one("aten.ne.Scalar", (indices, padding_idx), Type("bool", ids.shape))
        zero = e.full(0, Type(g.dtype, ()))
        grad_output = e.one("aten.where.self", (e.reshape(kept, (*ids.shape, 1)), grad_output, zero), g)
    return e.one("embedding_backward", (grad_output, indices), type_of(val))


def _gather(e: Emitter, val: Any, self: Ref, dim: int, index: Ref, **_: Any) -> Arg:
    return e.one("gather", (self, index), type_of(val), dim=_dim(dim, len(e.type(self).shape)))


def _scatter_add(e: Emitter, val: Any, self: Ref, dim: int, index: Ref, src: Ref) -> Arg:
    return e.one("scatter_add", (self, index, src), type_of(val), dim=_dim(dim, len(e.type(self).shape)))


def _norm(target: Any) -> Callable[..., Arg]:
    """Layer and group norm keep mean and rstd in float32 where a narrow input meets a float32 weight, as their kernels do."""

    def norm(e: Emitter, val: Any, input: Ref, weight: Ref | None = None, **rest: Any) -> Arg:
        if weight is not None and e.type(weight).dtype == "f32" != e.type(input).dtype:
            val = (val[0], val[1].float(), val[2].float())
        return as_aten(e, target, val, {"input": input, "weight": weight, **rest})

    return norm


# attention, random draws ------------------------------------------------------------------------------------------


def _sdpa(
    e: Emitter, val: Any, query: Ref, key: Ref, value: Ref, dropout_p: float = 0.0, is_causal: bool = False,
    attn_mask: Ref | None = None, attn_bias: Ref | None = None, scale: float | None = None, **_: Any,
) -> Arg:  # fmt: skip
    """Any kernel of attention, by its first two results; what else it gives (sequence offsets, the state of its generator) only
    its own backward reads, and that is raised too. A row's logsumexp is [b, h, s], however the kernel pads it."""
    causal = _causal(e, query, key, dropout_p, is_causal)
    q = e.type(query)
    out, lse = Type(q.dtype, (*q.shape[:-1], e.type(value).shape[-1])), Type("f64" if q.dtype == "f64" else "f32", q.shape[:-1])
    mask = attn_mask if attn_bias is None else attn_bias
    results = e.op("sdpa", (query, key, value, mask), (out, lse), causal=causal, scale=1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    return (*results, *(v if isinstance(v, int) else None for v in (val or ())[2:]))


def _sdpa_backward(
    e: Emitter, val: Any, query: Ref, key: Ref, value: Ref, out: Ref, logsumexp: Ref, grad_out: Ref | None = None, grad_out_: Ref | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, attn_mask: Ref | None = None, attn_bias: Ref | None = None, scale: float | None = None,
    grad_input_mask: Sequence[bool] = (), **_: Any,
) -> Arg:  # fmt: skip
    causal = _causal(e, query, key, dropout_p, is_causal)
    if len(grad_input_mask) == 4 and grad_input_mask[3]:
        raise CaptureError(
            "a fused attention kernel that computes the gradient of its mask", path=e.where.path, line=e.where.line,
            fix="use the math kernel there: with torch.nn.attention.sdpa_kernel(SDPBackend.MATH)",
        )  # fmt: skip
    q, grad = e.type(query), grad_out if grad_out_ is None else grad_out_
    results = e.op(
        "sdpa_backward", (grad, query, key, value, attn_mask if attn_bias is None else attn_bias, out, logsumexp), (q, e.type(key), e.type(value)),
        causal=causal, scale=1 / math.sqrt(q.shape[-1]) if scale is None else scale,
    )  # fmt: skip
    return (*results, None) if len(grad_input_mask) == 4 else results


def _causal(e: Emitter, query: Ref, key: Ref, dropout_p: float, is_causal: bool) -> bool:
    """Whether query i sees keys 0..i only; refuses what the own op does not mean."""
    s, t = e.type(query).shape[2], e.type(key).shape[2]
    name = str(e.node.target) if e.node is not None else "attention"
    if dropout_p:
        raise CaptureError(
            f"{name} with dropout {dropout_p} draws its random numbers inside the kernel", path=e.where.path, line=e.where.line,
            fix="use the math kernel, whose dropout is drawn by counter: with torch.nn.attention.sdpa_kernel(SDPBackend.MATH)",
        )  # fmt: skip
    if is_causal and s != t and "flash_attention" in name and not name.partition(".default")[0].partition("_backward")[0].endswith("cpu"):
        raise CaptureError(
            f"{name}, causal, of {s} queries and {t} keys: this kernel lets the last query see all keys", path=e.where.path, line=e.where.line,
            fix="give the mask as a tensor",
        )  # fmt: skip
    return is_causal


def _draw(target: str) -> Callable[..., Arg]:
    def drawn(e: Emitter, val: Any, rng: Ref, size: Any, dtype: Any, **numbers: Any) -> Arg:
        return e.one(target, (rng,), type_of(val), **numbers)

    return drawn


_KERNELS = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention", "fused_attention_overrideable")

def _paged(e: Emitter, val: Any, q: Ref, k: Ref, v: Ref, sinks: Ref | None, layer: int, scale: float, window: int, softcap: float) -> Arg:
    operands = (q, k, v) if sinks is None else (q, k, v, sinks)
    return e.one("paged_attention", operands, type_of(val), layer=layer, scale=scale, window=window, softcap=softcap)


LOWERINGS: dict[Any, Callable[..., Arg]] = {
    **dict.fromkeys((_aten.view.default, _aten._unsafe_view, _aten.reshape, _aten._reshape_alias, _aten.unsqueeze, _aten.squeeze), _reshape),
    **dict.fromkeys((_aten.detach, _aten.alias, _aten.lift_fresh_copy, _aten.lift_fresh, _aten.lift, _aten.clone, _aten.contiguous), _same),
    **dict.fromkeys((_aten.t, _aten.transpose), _transpose), _aten.permute: _permute_dims,
    **dict.fromkeys((_aten.expand, _aten.broadcast_to), _expand), _aten.repeat: _repeat,
    **dict.fromkeys((_aten._to_copy, _aten.to), _cast), _aten.copy: _copy,
    **dict.fromkeys((_aten.zeros, _aten.zeros_like, _aten.new_zeros, _aten.empty, _aten.empty_like, _aten.new_empty), _filled(0)),
    **dict.fromkeys((_aten.empty_strided, _aten.new_empty_strided, _aten.zero), _filled(0)),
    **dict.fromkeys((_aten.ones, _aten.ones_like, _aten.new_ones), _filled(1)),
    **dict.fromkeys((_aten.full, _aten.full_like, _aten.new_full), _full), _aten.scalar_tensor: _scalar, _aten.fill: _fill,
    _aten.arange: _arange, _aten.slice: _slice, _aten.select: _select,
    _aten.slice_backward: _slice_backward, _aten.select_backward: _select_backward,
    _aten.as_strided: as_strided, _aten.as_strided_scatter: as_strided_scatter,
    _aten.slice_scatter: _slice_scatter, _aten.select_scatter: _select_scatter, _aten.constant_pad_nd: _pad,
    _aten.split: _split, _aten.split_with_sizes: _split_sizes, _aten.unbind: _unbind, _aten.cat: _cat, _aten.stack: _stack,
    _aten.sum: _reduce("sum"), _aten.amax: _reduce("amax"), _aten.max.default: _reduce("amax"),
    _aten.embedding: _embedding, _aten.embedding_dense_backward: _embedding_backward,
    **{norm: _norm(norm) for norm in (_aten.native_layer_norm.default, _aten.native_group_norm.default)},
    _aten.gather: _gather, _aten.scatter_add: _scatter_add,
    **{getattr(_aten, f"_scaled_dot_product_{kernel}"): _sdpa for kernel in _KERNELS},
    **{getattr(_aten, f"_scaled_dot_product_{kernel}_backward"): _sdpa_backward for kernel in _KERNELS},
    torch.ops.deepseed.paged: _paged,
    torch.ops.deepseed.bernoulli: _draw("bernoulli"), torch.ops.deepseed.uniform: _draw("uniform"), torch.ops.deepseed.normal: _draw("normal"),
}  # fmt: skip
