"""Layer, group, RMS and batch norms with their backwards, taken apart: statistics are sums, the rest is pointwise.

All four normalise ``xhat = (x - mean) * rstd`` over some dimensions; with gw = grad * weight, over n elements,
``dx = rstd * (gw - sum(gw) / n - xhat * sum(gw * xhat) / n)``. Helper of ``canonicalize``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deepseed.ir.program import Op, Ref, Type
from deepseed.passes.decompose import Results, moments
from deepseed.passes.group import Decomposition, Group

EPSILON = {"f64": 2.0**-52, "f32": 2.0**-23, "bf16": 2.0**-7, "f16": 2.0**-10}


def _affine(g: Group, x: Ref, weight: Ref | None, bias: Ref | None, shape: Sequence[int]) -> Ref:
    """x * weight + bias, both reshaped to broadcast."""
    if weight is not None:
        x = g.mul(x, g.cast(g.reshape(weight, shape), g.dtype(x)))
    return x if bias is None else g.add(x, g.cast(g.reshape(bias, shape), g.dtype(x)))


def _input_grad(g: Group, gw: Ref, xhat: Ref, rstd: Ref, dims: Sequence[int], centred: bool = True) -> Ref:
    n = g.numel(xhat, dims)
    slope = g.div(g.sum(g.mul(gw, xhat), dims, True), n)
    if centred:
        gw = g.sub(gw, g.div(g.sum(gw, dims, True), n))
    return g.mul(rstd, g.sub(gw, g.mul(xhat, slope)))


def _finish(g: Group, values: Sequence[Ref | None]) -> Results:
    """Each value in the dtype and shape of its result; a gradient that was not asked for (None) has no result."""
    return [g.reshape(g.cast(v, t.dtype), t.shape) for v, t in zip([v for v in values if v is not None], g.op.types, strict=True)]


# over the last dimensions -------------------------------------------------------------------------------------------


def _inner(g: Group, x: Ref, normalized: Sequence[int] | None) -> tuple[range, range]:
    rank, inner = len(g.shape(x)), len(normalized or ())
    return range(rank - inner), range(rank - inner, rank)


def layer_norm(g: Group) -> Results:
    x = g.wide(g.ref(0))
    _, inner = _inner(g, x, g.ints(1))
    weight, bias = g.optional(2), g.optional(3)
    mean, centred, variance = moments(g, x, inner)
    rstd = g.rsqrt(g.add(variance, g.number(4, "eps")))
    return _finish(g, (_affine(g, g.mul(centred, rstd), weight, bias, g.shape(x)[inner.start :]), mean, rstd))


def layer_norm_backward(g: Group) -> Results:
    grad, x, mean, rstd, weight = g.wide(g.ref(0)), g.wide(g.ref(1)), g.wide(g.ref(3)), g.wide(g.ref(4)), g.optional(5)
    outer, inner = _inner(g, x, g.ints(2))
    want = g.flags(7)
    xhat = g.mul(g.sub(x, mean), rstd)
    return _finish(
        g,
        (
            _input_grad(g, _affine(g, grad, weight, None, g.shape(x)[inner.start :]), xhat, rstd, inner) if want[0] else None,
            g.sum(g.mul(grad, xhat), outer) if want[1] else None,
            g.sum(grad, outer) if want[2] else None,
        ),
    )


def rms_norm(g: Group) -> Results:
    x = g.wide(g.ref(0))
    _, inner = _inner(g, x, g.ints(1))
    eps = EPSILON[g.dtype(g.ref(0))] if g.arg(3, "eps") is None else g.number(3, "eps")
    rstd = g.rsqrt(g.add(g.div(g.sum(g.mul(x, x), inner, True), g.numel(x, inner)), eps))
    return _finish(g, (_affine(g, g.mul(x, rstd), g.optional(2), None, g.shape(x)[inner.start :]), rstd))


def rms_norm_backward(g: Group) -> Results:
    grad, x, rstd, weight = g.wide(g.ref(0)), g.wide(g.ref(1)), g.wide(g.ref(3)), g.optional(4)
    outer, inner = _inner(g, x, g.ints(2))
    want = g.flags(5)
    xhat = g.mul(x, rstd)
    gw = _affine(g, grad, weight, None, g.shape(x)[inner.start :])
    return _finish(
        g,
        (
            _input_grad(g, gw, xhat, rstd, inner, centred=False) if want[0] else None,
            g.sum(g.mul(grad, xhat), outer) if want[1] else None,
        ),
    )


# over groups of channels --------------------------------------------------------------------------------------------


def group_norm(g: Group) -> Results:
    weight, bias, n, c, inner, groups, eps = g.optional(1), g.optional(2), *(g.integer(i) for i in range(3, 7)), g.number(7, "eps")
    x = g.reshape(g.wide(g.ref(0)), (n, groups, c // groups, inner))
    mean, centred, variance = moments(g, x, (2, 3))
    rstd = g.rsqrt(g.add(variance, eps))
    return _finish(g, (_affine(g, g.mul(centred, rstd), weight, bias, (groups, c // groups, 1)), mean, rstd))


def group_norm_backward(g: Group) -> Results:
    n, c, inner, groups = (g.integer(i) for i in range(5, 9))
    want, weight = g.flags(9), g.optional(4)
    grad, x = (g.reshape(g.wide(g.ref(i)), (n, groups, c // groups, inner)) for i in (0, 1))
    mean, rstd = (g.reshape(g.wide(g.ref(i)), (n, groups, 1, 1)) for i in (2, 3))
    xhat = g.mul(g.sub(x, mean), rstd)
    return _finish(
        g,
        (
            _input_grad(g, _affine(g, grad, weight, None, (groups, c // groups, 1)), xhat, rstd, (2, 3)) if want[0] else None,
            g.sum(g.mul(grad, xhat), (0, 3)) if want[1] else None,
            g.sum(grad, (0, 3)) if want[2] else None,
        ),
    )


# over the batch -----------------------------------------------------------------------------------------------------


def batch_norm(training: int | bool, momentum: int, running: bool = True) -> Decomposition:
    """Positions of ``training`` (or its value) and of momentum (eps follows). Results: out, mean, rstd, then what the op has of:
    reserve (bytes for its backward), new running mean and variance (the unbiased one)."""

    def decompose(g: Group) -> Results:
        x, weight, bias = g.wide(g.ref(0)), g.optional(1), g.optional(2)
        old = (g.ref(3), g.ref(4)) if running else ()
        factor, eps = g.number(momentum), g.number(momentum + 1)
        dims, row = _channels(g, x)
        if training if isinstance(training, bool) else g.arg(training):
            mean, centred, variance = moments(g, x, dims)
            n = g.numel(x, dims)
            unbiased = n / (n - 1) if n > 1 else float("inf")
            new = [_running(g, o, b, factor, s) for o, b, s in zip(old, (mean, variance), (1.0, unbiased), strict=False)]
        else:
            mean, variance = (g.reshape(g.cast(v, g.dtype(x)), row) for v in old)
            centred, new = g.sub(x, mean), list(old)
        rstd = g.rsqrt(g.add(variance, eps))
        out = _affine(g, g.mul(centred, rstd), weight, bias, row)
        types = g.op.types
        saved = [g.full(t.shape, 0, t.dtype) if t.shape == (0,) else v for t, v in zip(types[1:3], (mean, rstd), strict=True)]
        reserve = [g.full(t.shape, 0, t.dtype) for t in types[3:4] if len(types) == 6]
        return _finish(g, (out, *saved, *reserve, *(new if len(types) > 3 else ())))

    return decompose


def _running(g: Group, old: Ref, batch: Ref, factor: float, scale: float) -> Ref:
    """(1 - factor) * old + factor * scale * batch"""
    return g.add(g.mul(g.cast(old, g.dtype(batch)), 1 - factor), g.reshape(g.mul(batch, factor * scale), g.shape(old)))


def batch_norm_backward(g: Group) -> Results:
    grad, x, weight, train, eps, want = g.wide(g.ref(0)), g.wide(g.ref(1)), g.optional(2), bool(g.arg(7)), g.number(8), g.flags(9)
    dims, row = _channels(g, x)
    if train:
        mean, rstd = (g.reshape(g.cast(g.ref(i), g.dtype(x)), row) for i in (5, 6))
    else:
        mean, variance = (g.reshape(g.cast(g.ref(i), g.dtype(x)), row) for i in (3, 4))
        rstd = g.rsqrt(g.add(variance, eps))
    xhat = g.mul(g.sub(x, mean), rstd)
    gw = _affine(g, grad, weight, None, row)
    return _finish(
        g,
        (
            (_input_grad(g, gw, xhat, rstd, dims) if train else g.mul(gw, rstd)) if want[0] else None,
            g.sum(g.mul(grad, xhat), dims) if want[1] else None,
            g.sum(grad, dims) if want[2] else None,
        ),
    )


def mixed(op: Op, types: Mapping[str, Type]) -> bool:
    """Whether torch has no kernel for the op as it was: a weight in 16 bits, and running statistics in 32."""
    found = [op.args[i] for i in WEIGHT_AND_MEAN.get(op.target, ())]
    return len({types[a.name].dtype for a in found if isinstance(a, Ref)}) > 1


def _channels(g: Group, x: Ref) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """All dimensions but 1, and the shape in which one number a channel broadcasts."""
    shape = g.shape(x)
    return tuple(d for d in range(len(shape)) if d != 1), (shape[1], *(1 for _ in shape[2:]))


NORMS: dict[str, Decomposition] = {
    "aten.native_layer_norm": layer_norm,
    "aten.native_layer_norm_backward": layer_norm_backward,
    "aten._fused_rms_norm": rms_norm,
    "aten._fused_rms_norm_backward": rms_norm_backward,
    "aten.native_group_norm": group_norm,
    "aten.native_group_norm_backward": group_norm_backward,
    "aten._native_batch_norm_legit_functional": batch_norm(5, 6),
    "aten._native_batch_norm_legit_no_training": batch_norm(False, 5),
    "aten._native_batch_norm_legit.no_stats": batch_norm(3, 4, running=False),
    "aten._batch_norm_with_update_functional": batch_norm(True, 5),
    "aten.native_batch_norm_backward": batch_norm_backward,
    "aten.batch_norm_backward": batch_norm_backward,
}
WEIGHT_AND_MEAN = {  # of ops with running statistics, the arguments
    "aten._native_batch_norm_legit_functional": (1, 3), "aten._native_batch_norm_legit_no_training": (1, 3), "aten._batch_norm_with_update_functional": (1, 3),
    "aten.native_batch_norm_backward": (2, 3), "aten.batch_norm_backward": (2, 3),
}  # fmt: skip
