"""Losses with their backwards, taken apart: elementwise, then a sum over everything; a mean divides by the global count.

The class of a target is looked up by ``gather`` and its gradient placed by ``scatter_add``, so that a split class dimension
(a vocabulary, say) stays split. Helper of ``canonicalize``.
"""

from __future__ import annotations

from collections.abc import Callable

from deepseed.ir.program import Ref
from deepseed.passes.decompose import Results
from deepseed.passes.group import Decomposition, Group, wide

NONE, MEAN, SUM = 0, 1, 2  # the reductions


# by class ------------------------------------------------------------------------------------------------------------


def _targets(g: Group, x: Ref, target: Ref, weight: Ref | None, ignore: int) -> tuple[int, Ref, Ref, Ref | None]:
    """Class dimension, the target as an index of x (1 along that dimension, 0 where ignored), what is ignored, weights."""
    dim = min(1, len(g.shape(x)) - 1)
    ignored = g.compare("eq", target, ignore)
    safe = g.masked_fill(target, ignored, 0)
    shape = list(g.shape(x))
    shape[dim] = 1
    weights = None
    if weight is not None:
        flat = g.gather(weight, g.reshape(safe, (g.numel(safe, range(len(g.shape(safe)))),)), 0)
        weights = g.masked_fill(g.reshape(flat, g.shape(target)), ignored, 0)
    return dim, g.reshape(safe, shape), ignored, weights


def nll_loss(g: Group) -> Results:
    x, target, reduction = g.ref(0), g.ref(1), g.integer(3)
    dtype = g.dtype(x)
    dim, index, ignored, weights = _targets(g, x, target, g.optional(2), g.integer(4))
    loss = g.neg(g.masked_fill(g.reshape(g.gather(x, index, dim), g.shape(target)), ignored, 0))
    every = range(len(g.shape(target)))
    if weights is None:
        counted = g.cast(g.pointwise("logical_not", ignored), wide(dtype))
    else:
        loss, counted = g.mul(loss, weights), g.wide(weights)
    if reduction == NONE and len(every):
        return loss, g.full((), 0, dtype)
    total = g.sum(counted, every)
    out = g.sum(loss, every, dtype=wide(dtype))
    return g.cast(g.div(out, total) if reduction == MEAN else out, dtype), g.cast(total, dtype)


def nll_loss_backward(g: Group) -> Results:
    grad, x, target, reduction = g.ref(0), g.ref(1), g.ref(2), g.integer(4)
    dim, index, ignored, weights = _targets(g, x, target, g.optional(3), g.integer(5))
    each = g.neg(g.div(grad, g.ref(6)) if reduction == MEAN else grad)
    if weights is not None:
        each = g.mul(weights, each)
    each = g.masked_fill(g.expand(each, g.shape(target)), ignored, 0)
    return (g.scatter_add(g.full(g.shape(x), 0, g.dtype(x)), index, g.reshape(each, g.shape(index)), dim),)


# by element ----------------------------------------------------------------------------------------------------------


def loss(position: int, name: str, pointwise: Callable[[Group, Ref, Ref], Ref]) -> Decomposition:
    """An elementwise loss of (input, target) and its reduction, an argument at ``position``."""

    def decompose(g: Group) -> Results:
        reduction, dtype = g.integer(position, name, MEAN), g.op.type.dtype
        out = pointwise(g, g.wide(g.ref(0)), g.wide(g.ref(1)))
        if reduction != NONE:
            every = range(len(g.shape(out)))
            n = g.numel(out, every)
            out = g.sum(out, every)
            out = g.div(out, n) if reduction == MEAN else out
        return (g.cast(out, dtype),)

    return decompose


def loss_backward(position: int, name: str, slope: Callable[[Group, Ref, Ref], Ref]) -> Decomposition:
    """grad * d loss / d input, over n for a mean: last, since a constant grad over n would be rounded to its dtype."""

    def decompose(g: Group) -> Results:
        grad, x, target = (g.wide(g.ref(i)) for i in range(3))
        out = g.mul(slope(g, x, target), grad)
        if g.integer(position, name, MEAN) == MEAN:
            out = g.div(out, g.numel(out, range(len(g.shape(out)))))
        return (g.cast(out, g.op.type.dtype),)

    return decompose


def _squared(g: Group, x: Ref, target: Ref) -> Ref:
    d = g.sub(x, target)
    return g.mul(d, d)


def _smooth(g: Group, x: Ref, target: Ref) -> Ref:
    d = g.abs(g.sub(x, target))
    beta = g.number(3, "beta", 1.0)
    if beta == 0:
        return d
    return g.where(g.compare("lt", d, beta), g.div(g.mul(g.mul(d, d), 0.5), beta), g.sub(d, 0.5 * beta))


def _smooth_slope(g: Group, x: Ref, target: Ref) -> Ref:
    d = g.sub(x, target)
    beta = g.number(4, "beta", 1.0)
    sign = g.pointwise("sign", d)
    return sign if beta == 0 else g.where(g.compare("lt", g.abs(d), beta), g.div(d, beta), sign)


def _huber(g: Group, x: Ref, target: Ref) -> Ref:
    d = g.abs(g.sub(x, target))
    delta = g.number(3, "delta", 1.0)
    return g.where(g.compare("lt", d, delta), g.mul(g.mul(d, d), 0.5), g.mul(g.sub(d, 0.5 * delta), delta))


def _huber_slope(g: Group, x: Ref, target: Ref) -> Ref:
    delta = g.number(4, "delta", 1.0)
    return g.emit("aten.clamp", (d := g.sub(x, target), -delta, delta), g.dtype(d), g.shape(d))


def _bce(g: Group, x: Ref, target: Ref) -> Ref:
    def log(v: Ref) -> Ref:
        return g.pointwise("clamp_min", v, -100)

    miss = g.mul(g.sub(target, 1), log(g.pointwise("log1p", g.neg(x))))
    return _weighted(g, 2, g.sub(miss, g.mul(target, log(g.log(x)))))


BCE_EPSILON = 9.999999960041972e-13  # the kernel's 1e-12 is a float32 whatever the operands are


def _bce_slope(g: Group, x: Ref, target: Ref) -> Ref:
    spread = g.pointwise("clamp_min", g.mul(g.pointwise("rsub.Scalar", x, 1), x), BCE_EPSILON)
    return _weighted(g, 3, g.div(g.sub(x, target), spread))


def _weighted(g: Group, position: int, x: Ref) -> Ref:
    weight = g.optional(position, "weight")
    return x if weight is None else g.mul(x, g.wide(weight))


def bce_with_logits(g: Group) -> Results:
    """(1 - t) x - (1 + (w - 1) t) log_sigmoid(x), w: the weight of the positive class."""

    def each(g: Group, x: Ref, target: Ref) -> Ref:
        log = g.sub(g.pointwise("clamp_max", x, 0), g.pointwise("log1p", g.exp(g.neg(g.abs(x)))))
        positive = g.optional(3, "pos_weight")
        if positive is not None:
            log = g.mul(log, g.add(g.mul(target, g.sub(g.wide(positive), 1)), 1))
        return _weighted(g, 2, g.sub(g.mul(g.pointwise("rsub.Scalar", target, 1), x), log))

    return loss(4, "reduction", each)(g)


def _soft_slope(g: Group, x: Ref, target: Ref) -> Ref:
    z = g.exp(g.neg(g.mul(target, x)))
    return g.neg(g.div(g.mul(target, z), g.add(z, 1)))


# margins between classes ------------------------------------------------------------------------------------------------


def multi_margin(g: Group) -> Results:
    """sum over the other classes of max(0, margin - x[y] + x)^p * weight[y], over the number of classes"""
    x, loss, _, _ = _margins(g, g.wide(g.ref(0)), g.ref(1), 2)
    n = g.shape(x)[1]
    return _reduced(g, g.div(g.sum(loss, (1,)), n), 5)


def multi_margin_backward(g: Group) -> Results:
    grad = g.wide(g.ref(0))
    x, _, slope, index = _margins(g, g.wide(g.ref(1)), g.ref(2), 3)
    rows, n = g.shape(x)
    scale = n * (rows if g.integer(6, "reduction", MEAN) == MEAN else 1)
    if g.integer(6, "reduction", MEAN) == NONE:
        grad = g.reshape(grad, (rows, 1))
    each = g.div(g.mul(slope, grad), scale)
    out = g.scatter_add(each, index, g.neg(g.sum(each, (1,), True)), 1)
    return (g.cast(g.reshape(out, g.op.type.shape), g.op.type.dtype),)


def _margins(g: Group, x: Ref, target: Ref, at: int) -> tuple[Ref, Ref, Ref, Ref]:
    """x as rows, the loss of each class, its slope (both 0 for the class that is meant), the target as an index of x."""
    x = g.reshape(x, (1,) * (2 - len(g.shape(x))) + g.shape(x))
    rows = g.shape(x)[0]
    index = g.reshape(target, (rows, 1))
    p, margin, weight = g.integer(at, "p", 1), g.number(at + 1, "margin", 1), g.optional(at + 2, "weight")
    z = g.add(g.sub(x, g.gather(x, index, 1)), margin)
    other = g.scatter_add(g.full(g.shape(x), 0, g.dtype(x)), index, g.full((rows, 1), 1, g.dtype(x)), 1)
    outside = g.pointwise("logical_or", g.compare("le", z, 0), g.compare("ne", other, 0), dtype="bool")
    z = g.masked_fill(z, outside, 0)
    loss = g.mul(z, z) if p == 2 else z
    slope = g.masked_fill(g.mul(z, 2) if p == 2 else g.full(g.shape(z), 1, g.dtype(z)), outside, 0)
    if weight is not None:
        factor = g.reshape(g.gather(g.wide(weight), g.reshape(target, (rows,)), 0), (rows, 1))
        loss, slope = g.mul(loss, factor), g.mul(slope, factor)
    return x, loss, slope, index


def _reduced(g: Group, each: Ref, at: int) -> Results:
    reduction = g.integer(at, "reduction", MEAN)
    if reduction != NONE:
        n = g.numel(each, range(len(g.shape(each))))
        each = g.sum(each, range(len(g.shape(each))))
        each = g.div(each, n) if reduction == MEAN else each
    return (g.cast(g.reshape(each, g.op.type.shape), g.op.type.dtype),)


LOSSES: dict[str, Decomposition] = {
    "aten.nll_loss_forward": nll_loss,
    "aten.nll_loss2d_forward": nll_loss,
    "aten.nll_loss_backward": nll_loss_backward,
    "aten.nll_loss2d_backward": nll_loss_backward,
    "aten.mse_loss": loss(2, "reduction", _squared),
    "aten.mse_loss_backward": loss_backward(3, "reduction", lambda g, x, target: g.mul(g.sub(x, target), 2)),
    "aten.l1_loss": loss(2, "reduction", lambda g, x, target: g.abs(g.sub(x, target))),
    "aten.smooth_l1_loss": loss(2, "reduction", _smooth),
    "aten.smooth_l1_loss_backward": loss_backward(3, "reduction", _smooth_slope),
    "aten.huber_loss": loss(2, "reduction", _huber),
    "aten.huber_loss_backward": loss_backward(3, "reduction", _huber_slope),
    "aten.binary_cross_entropy_with_logits": bce_with_logits,
    "aten.soft_margin_loss": loss(2, "reduction", lambda g, x, target: g.pointwise("log1p", g.exp(g.mul(g.neg(target), x)))),
    "aten.soft_margin_loss_backward": loss_backward(3, "reduction", _soft_slope),
    "aten.multi_margin_loss": multi_margin,
    "aten.multi_margin_loss_backward": multi_margin_backward,
    "aten.binary_cross_entropy": loss(3, "reduction", _bce),
    "aten.binary_cross_entropy_backward": loss_backward(4, "reduction", _bce_slope),
}
