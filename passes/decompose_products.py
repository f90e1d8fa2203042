"""Products with a sum inside, taken apart: three-way products, batched additions, weight normalisation. Helper of ``canonicalize``."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, prod

from deepseed.ir.program import Ref
from deepseed.passes.decompose import Results
from deepseed.passes.group import Decomposition, Group, broadcast, is_float, wide


def _scaled(g: Group, product: Ref, beta_at: int) -> Results:
    """beta * self + alpha * product"""
    beta, alpha = g.number(beta_at, "beta", 1), g.number(beta_at + 1, "alpha", 1)
    if alpha != 1:
        product = g.mul(product, alpha)
    if beta == 0:
        return (g.expand(product, g.op.type.shape),)
    return (g.add(product, g.ref(0) if beta == 1 else g.mul(g.ref(0), beta)),)


def addmv(g: Group) -> Results:
    a, x = g.ref(1), g.ref(2)
    return _scaled(g, g.reshape(g.mm(a, g.reshape(x, (*g.shape(x), 1))), g.shape(a)[:1]), 3)


def addr(g: Group) -> Results:
    a, b = g.ref(1), g.ref(2)
    return _scaled(g, g.mul(g.reshape(a, (*g.shape(a), 1)), b), 3)


def addbmm(g: Group) -> Results:
    """The batch is one more contracted dimension."""
    a, b = g.ref(1), g.ref(2)
    n, rows, inner = g.shape(a)
    left = g.reshape(g.permute(a, (1, 0, 2)), (rows, n * inner))
    return _scaled(g, g.mm(left, g.reshape(b, (n * inner, g.shape(b)[2]))), 3)


def vdot(g: Group) -> Results:
    if not is_float(g.dtype(g.ref(0))):
        return None
    return (g.sum(g.mul(g.ref(0), g.ref(1)), (0,)),)


def contract(g: Group, a: Ref, b: Ref, dims: Sequence[int]) -> Ref:
    """``(a * b).sum(dims, keepdim)`` of two tensors of one rank, as one batched matrix product."""
    summed = [d for d in dims if g.shape(a)[d] != 1 and g.shape(b)[d] != 1]
    a = g.sum(a, [d for d in dims if d not in summed and g.shape(a)[d] != 1], True)
    b = g.sum(b, [d for d in dims if d not in summed and g.shape(b)[d] != 1], True)
    sa, sb = g.shape(a), g.shape(b)
    both = [d for d in range(len(sa)) if d not in summed and sa[d] != 1 and sb[d] != 1]
    left = [d for d in range(len(sa)) if d not in summed and sa[d] != 1 and sb[d] == 1]
    right = [d for d in range(len(sa)) if d not in summed and d not in both and d not in left]
    batch, m, k, n = prod(sa[d] for d in both), prod(sa[d] for d in left), prod(sa[d] for d in summed), prod(sb[d] for d in right)
    x = g.reshape(g.permute(a, [*both, *left, *summed, *right]), (batch, m, k))
    y = g.reshape(g.permute(b, [*both, *summed, *right, *left]), (batch, k, n))
    order = [*both, *left, *right, *summed]
    out = g.reshape(g.mm(x, y), [1 if d in summed else max(sa[d], sb[d]) for d in order])
    return g.permute(out, [order.index(d) for d in range(len(sa))])


def trilinear(g: Group) -> Results:
    """i1 and i3 are multiplied where they lie, then contracted with i2: no product of all three is made."""
    one, two, three = (_with_ones(g, g.ref(i), g.ints(3 + i) or ()) for i in range(3))
    dims = g.ints(6) or ()
    shape = broadcast([g.shape(one), g.shape(three)])
    alone = [d for d in dims if g.shape(two)[d] == 1]
    first = contract(g, one, three, alone) if alone else g.mul(one, three)
    if not alone:
        first = g.expand(first, shape)
    out = contract(g, first, two, [d for d in dims if d not in alone])
    return (g.reshape(out, g.op.type.shape),)


def _with_ones(g: Group, x: Ref, dims: Sequence[int]) -> Ref:
    shape = list(g.shape(x))
    for d in sorted(dims):
        shape.insert(d, 1)
    return g.reshape(x, shape)


# weight normalisation, renormalisation --------------------------------------------------------------------------------


def _others(g: Group, v: Ref, dim: int) -> tuple[int, ...]:
    return tuple(d for d in range(len(g.shape(v))) if d != dim % len(g.shape(v)))


def weight_norm(g: Group) -> Results:
    """w = v * g / norm(v), the norm over all dimensions but one."""
    v, scale = g.wide(g.ref(0)), g.wide(g.ref(1))
    norm = g.sqrt(g.sum(g.mul(v, v), _others(g, v, g.integer(2, "dim", 0)), True))
    out, norms = g.op.types
    return g.cast(g.mul(v, g.div(scale, norm)), out.dtype), g.reshape(g.cast(norm, norms.dtype), norms.shape)


def weight_norm_backward(g: Group) -> Results:
    grad, v, scale = (g.wide(g.ref(i)) for i in range(3))
    others = _others(g, v, g.integer(4, "dim", 0))
    norm = g.reshape(g.cast(g.ref(3), g.dtype(v)), g.shape(scale))
    along = g.sum(g.mul(grad, v), others, True)
    dv = g.mul(g.div(scale, norm), g.sub(grad, g.mul(v, g.div(along, g.mul(norm, norm)))))
    return [g.cast(x, t.dtype) for x, t in zip((dv, g.div(along, norm)), g.op.types, strict=True)]


def renorm(g: Group) -> Results:
    """Slices of a p-norm above the limit are scaled down to it."""
    x, p, limit = g.wide(g.ref(0)), g.number(1), g.number(3)
    if p <= 0 or p == inf:
        return None
    size = g.abs(x)
    powers = size if p == 1 else g.mul(x, x) if p == 2 else g.pointwise("pow.Tensor_Scalar", size, p)
    norm = g.sum(powers, _others(g, x, g.integer(2)), True)
    norm = norm if p == 1 else g.sqrt(norm) if p == 2 else g.pointwise("pow.Tensor_Scalar", norm, 1.0 / p)
    factor = g.mul(g.pointwise("reciprocal", g.add(norm, 1e-7)), limit)
    factor = g.where(g.compare("gt", norm, limit), factor, g.full((), 1, g.dtype(norm)))
    return (g.cast(g.mul(x, factor), g.op.type.dtype),)


# distances ----------------------------------------------------------------------------------------------------------


def euclidean_distance(g: Group) -> Results:
    """sqrt(|a|^2 + |b|^2 - 2 a b), the product of matrices that PyTorch makes of many points."""
    a, b = g.ref(0), g.ref(1)
    ones = [g.full((*g.shape(x)[:-1], 1), 1, g.dtype(x)) for x in (a, b)]
    norms = [g.sum(g.mul(x, x), (len(g.shape(x)) - 1,), True) for x in (a, b)]
    left = g.cat((g.mul(a, -2), norms[0], ones[0]), len(g.shape(a)) - 1)
    right = g.cat((b, ones[1], norms[1]), len(g.shape(b)) - 1)
    out = g.op.type.shape
    lead, k = out[:-2], g.shape(left)[-1]
    batch = prod(lead)
    x = g.reshape(g.expand(left, (*lead, out[-2], k)), (batch, out[-2], k))
    y = g.permute(g.reshape(g.expand(right, (*lead, out[-1], k)), (batch, out[-1], k)), (0, 2, 1))
    return (g.sqrt(g.pointwise("clamp_min", g.reshape(g.mm(x, y), out), 0)),)


# sums and extrema that count or skip ------------------------------------------------------------------------------------


def _reduced(g: Group) -> tuple[tuple[int, ...], bool]:
    return g.dims(g.ref(0), g.ints(1, "dim")), bool(g.arg(2, "keepdim", False))


def some(every: bool) -> Decomposition:
    """any: some element is not 0; all: none is 0. Counted, so that split dimensions add up."""

    def decompose(g: Group) -> Results:
        x = g.ref(0)
        dims, keepdim = _reduced(g)
        if not g.shape(x):
            dims = ()
        hit = g.compare("eq" if every else "ne", g.cast(x, "i64") if g.dtype(x) == "bool" else x, 0)
        count = g.sum(g.cast(hit, "i64"), dims, keepdim)
        out = g.compare("eq" if every else "ne", g.reshape(count, g.op.type.shape), 0)
        return (g.cast(out, g.op.type.dtype),)

    return decompose


def count_nonzero(g: Group) -> Results:
    x = g.ref(0)
    return (g.reshape(g.sum(g.cast(g.compare("ne", x, 0), "i64"), g.dims(x, g.ints(1, "dim"))), g.op.type.shape),)


def nansum(g: Group) -> Results:
    x = g.ref(0)
    dims, keepdim = _reduced(g)
    if not is_float(g.dtype(x)):
        return None
    return (g.sum(g.masked_fill(x, g.pointwise("isnan", x, dtype="bool"), 0), dims, keepdim, g.op.type.dtype),)


def prod_(g: Group) -> Results:
    """One dimension after the other."""
    x, dtype = g.ref(0), g.op.type.dtype
    x = g.cast(x, dtype)
    while g.shape(x):
        x = g.emit("aten.prod.dim_int", (x, len(g.shape(x)) - 1), dtype, g.shape(x)[:-1])
    return (x,)


def aminmax(g: Group) -> Results:
    x = g.ref(0)
    if not is_float(g.dtype(x)):
        return None
    dim = g.op.kw("dim")
    dims = g.dims(x, (dim,) if isinstance(dim, int) else None)
    keepdim = bool(g.op.kw("keepdim", False))
    return g.neg(g.amax(g.neg(x), dims, keepdim)), g.amax(x, dims, keepdim)


def log_sigmoid(g: Group) -> Results:
    """min(x, 0) - log1p(e), e = exp(-|x|), which the backward reads."""
    x = g.wide(g.ref(0))
    e = g.exp(g.neg(g.abs(x)))
    out = g.sub(g.pointwise("clamp_max", x, 0), g.pointwise("log1p", e))
    values = (out, e if g.op.types[1].shape == g.shape(x) else g.full(g.op.types[1].shape, 0, wide(g.op.types[1].dtype)))
    return [g.cast(v, t.dtype) for v, t in zip(values, g.op.types, strict=True)]


PRODUCTS: dict[str, Decomposition] = {
    "aten.addmv": addmv,
    "aten.addr": addr,
    "aten.addbmm": addbmm,
    "aten.vdot": vdot,
    "aten._trilinear": trilinear,
    "aten._weight_norm_interface": weight_norm,
    "aten._weight_norm_interface_backward": weight_norm_backward,
    "aten.renorm": renorm,
    "aten._euclidean_dist": euclidean_distance,
    "aten.any": some(False),
    "aten.any.dim": some(False),
    "aten.any.dims": some(False),
    "aten.all": some(True),
    "aten.all.dim": some(True),
    "aten.all.dims": some(True),
    "aten.count_nonzero": count_nonzero,
    "aten.count_nonzero.dim_IntList": count_nonzero,
    "aten.nansum": nansum,
    "aten.prod": prod_,
    "aten.aminmax": aminmax,
    "aten.log_sigmoid_forward": log_sigmoid,
}
