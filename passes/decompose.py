"""Ops that hide a reduction, taken apart, so that each reduction can be sharded by its own rule: a table for ``canonicalize``.

A decomposition gets the ``Group`` that replaces an op and returns the op's results, or None to keep the op. Formulas follow
PyTorch's kernels (ATen/native), the dtype of each step included. Norms are in ``decompose_norms``, losses in ``decompose_losses``.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from deepseed.ir.program import Ref
from deepseed.passes.group import Decomposition, Group, is_float, wide

Results = Sequence[Ref] | None


# linear algebra -----------------------------------------------------------------------------------------------------


def addmm(g: Group) -> Results:
    """beta * self + alpha * (a @ b). An optimizer's below float32 stays whole: the kernel rounds once, its parts three times."""
    if g.op.phase == "update" and g.op.type.dtype in ("bf16", "f16"):
        return None
    beta, alpha = g.number(3, "beta", 1), g.number(4, "alpha", 1)
    product = g.mm(g.ref(1), g.ref(2))
    if alpha != 1:
        product = g.mul(product, alpha)
    if beta == 0:
        return (product,)
    return (g.add(product, g.ref(0) if beta == 1 else g.mul(g.ref(0), beta)),)


def linear(g: Group) -> Results:
    x, w, bias = g.ref(0), g.ref(1), g.optional(2, "bias")
    rows = g.numel(x, range(len(g.shape(x)) - 1))
    out = g.mm(g.reshape(x, (rows, g.shape(x)[-1])), g.permute(w, (1, 0)))
    if bias is not None:
        out = g.add(out, bias)
    return (g.reshape(out, g.op.type.shape),)


def mv(g: Group) -> Results:
    a, x = g.ref(0), g.ref(1)
    return (g.reshape(g.mm(a, g.reshape(x, (*g.shape(x), 1))), g.op.type.shape),)


def dot(g: Group) -> Results:
    return (g.sum(g.mul(g.ref(0), g.ref(1)), (0,)),)


def convolution(g: Group) -> Results:
    """The bias is added once, so that the input's channels may be split."""
    x, w, bias = g.ref(0), g.ref(1), g.optional(2)
    if bias is None:
        return None
    out = g.emit("aten.convolution", (x, w, None, *g.op.args[3:]), g.op.type.dtype, g.op.type.shape)
    return (g.add(out, g.reshape(bias, (*g.shape(bias), *(1 for _ in g.op.type.shape[2:])))),)


def convolution_backward(g: Group) -> Results:
    """One op for each gradient: only the input's is sent on, the bias's is a sum."""
    grad, x, w, want = g.ref(0), g.ref(1), g.ref(2), g.flags(10)
    if sum(want) < 2 and not want[2]:
        return None
    rest = (None, *g.op.args[4:10])
    out: list[Ref] = []
    for value, mask in ((x, (True, False, False)), (w, (False, True, False))):
        if want[mask.index(True)]:
            out.append(g.emit("aten.convolution_backward", (grad, x, w, *rest, mask), g.dtype(value), g.shape(value)))
    if want[2]:
        out.append(g.sum(grad, [d for d in range(len(g.shape(grad))) if d != 1]))
    return out


# sums, means, norms of vectors --------------------------------------------------------------------------------------


def sum_(g: Group) -> Results:
    x = g.ref(0)
    return (g.sum(x, g.dims(x, g.ints(1, "dim")), bool(g.arg(2, "keepdim", False)), g.op.type.dtype),)


def amax(g: Group) -> Results:
    x = g.ref(0)
    return (g.amax(x, g.dims(x, g.ints(1, "dim")), bool(g.arg(2, "keepdim", False))),)


def amin(g: Group) -> Results:
    x = g.ref(0)
    if not is_float(g.dtype(x)):
        return None
    return (g.neg(g.amax(g.neg(x), g.dims(x, g.ints(1, "dim")), bool(g.arg(2, "keepdim", False)))),)


def mean(g: Group) -> Results:
    x, dtype = g.ref(0), g.op.type.dtype
    dims = g.dims(x, g.ints(1, "dim"))
    return (g.cast(g.div(g.sum(x, dims, bool(g.arg(2, "keepdim", False)), wide(dtype)), g.numel(x, dims)), dtype),)


def moments(g: Group, x: Ref, dims: Sequence[int], correction: float = 0) -> tuple[Ref, Ref, Ref]:
    """mean, x - mean, variance over ``dims``, kept as size 1; two passes."""
    n = g.numel(x, dims)
    mean = g.div(g.sum(x, dims, True), n)
    centred = g.sub(x, mean)
    return mean, centred, g.div(g.sum(g.mul(centred, centred), dims, True), max(n - correction, 0))


def var(root: bool, with_mean: bool, spelling: str) -> Decomposition:
    """``spelling`` of the correction: "" (unbiased=True), "dim" (dim, unbiased, keepdim), "correction"."""

    def decompose(g: Group) -> Results:
        x, dtype = g.ref(0), g.op.type.dtype
        dims = g.dims(x, g.ints(1, "dim") if spelling else None)
        if spelling == "correction":
            given = g.arg(2, "correction")
            correction = 1.0 if given is None else float(g.number(2, "correction"))
        else:
            correction = float(bool(g.arg(2 if spelling else 1, "unbiased", True)))
        mean, _, variance = moments(g, g.wide(x), dims, correction)
        values = [g.sqrt(variance) if root else variance, *([mean] if with_mean else [])]
        return [g.reshape(g.cast(v, dtype), t.shape) for v, t in zip(values, g.op.types, strict=True)]

    return decompose


def vector_norm(order: int, dim: int) -> Decomposition:
    """Order and dim at these positions of the schema (dim < 0: over all)."""

    def decompose(g: Group) -> Results:
        x, dtype = g.ref(0), g.op.type.dtype
        p = 2 if g.arg(order, "ord", 2) is None else g.number(order, "ord", 2)
        dims = g.dims(x, g.ints(dim, "dim") if dim >= 0 else None)
        keepdim = bool(g.arg(dim + 1, "keepdim", False)) if dim >= 0 else False
        if g.dtype(x).startswith("c") or (p < 0 and p != -inf):
            return None
        x = g.wide(g.cast(x, dtype) if wide(dtype) != wide(g.dtype(x)) else x)
        if p == inf:
            out = g.amax(g.abs(x), dims, keepdim)
        elif p == -inf:
            out = g.neg(g.amax(g.neg(g.abs(x)), dims, keepdim))
        elif p == 2:
            out = g.sqrt(g.sum(g.mul(x, x), dims, keepdim))
        elif p == 0:
            out = g.sum(g.cast(g.compare("ne", x, 0), g.dtype(x)), dims, keepdim)
        elif p == 1:
            out = g.sum(g.abs(x), dims, keepdim)
        else:
            powers = g.pointwise("pow.Tensor_Scalar", g.abs(x), p)
            out = g.pointwise("pow.Tensor_Scalar", g.sum(powers, dims, keepdim), 1.0 / p)
        return (g.cast(out, dtype),)

    return decompose


def logsumexp(g: Group) -> Results:
    x = g.wide(g.ref(0))
    dims = g.dims(x, g.ints(1, "dim"))
    top = g.amax(x, dims, True)
    top = g.masked_fill(top, g.compare("eq", g.abs(top), inf), 0)  # a row of infinities stays one
    out = g.add(g.log(g.sum(g.exp(g.sub(x, top)), dims, True)), top)
    return (g.cast(g.reshape(out, g.op.type.shape), g.op.type.dtype),)


# softmax ------------------------------------------------------------------------------------------------------------


def softmax(g: Group, safe: bool = False) -> Results:
    x = g.wide(g.cast(g.ref(0), g.op.type.dtype) if wide(g.op.type.dtype) != wide(g.dtype(g.ref(0))) else g.ref(0))
    dims = g.dims(x, (g.integer(1, "dim"),))
    top = g.amax(x, dims, True)
    e = g.exp(g.sub(x, top))
    out = g.div(e, g.sum(e, dims, True))
    if safe:  # a row without any finite score gives zeros
        out = g.masked_fill(out, g.compare("eq", top, -inf), 0)
    return (g.cast(out, g.op.type.dtype),)


def log_softmax(g: Group) -> Results:
    x = g.wide(g.ref(0))
    dims = g.dims(x, (g.integer(1, "dim"),))
    shifted = g.sub(x, g.amax(x, dims, True))
    return (g.cast(g.sub(shifted, g.log(g.sum(g.exp(shifted), dims, True))), g.op.type.dtype),)


def softmax_backward(g: Group) -> Results:
    grad, out = g.wide(g.ref(0)), g.wide(g.ref(1))
    dims = g.dims(out, (g.integer(2, "dim"),))
    return (g.cast(g.mul(g.sub(grad, g.sum(g.mul(grad, out), dims, True)), out), g.op.type.dtype),)


def log_softmax_backward(g: Group) -> Results:
    grad, out = g.wide(g.ref(0)), g.wide(g.ref(1))
    dims = g.dims(out, (g.integer(2, "dim"),))
    return (g.cast(g.sub(grad, g.mul(g.exp(out), g.sum(grad, dims, True))), g.op.type.dtype),)


# others -------------------------------------------------------------------------------------------------------------


def embedding(g: Group) -> Results:
    w, ids = g.ref(0), g.ref(1)
    return (g.emit("embedding", (w, ids), g.dtype(w), (*g.shape(ids), *g.shape(w)[1:])),)


def embedding_backward(g: Group) -> Results:
    """The padding row gets no gradient. Kept where gradients are scaled by frequency."""
    grad, ids, padding = g.ref(0), g.ref(1), g.integer(3)
    if g.arg(4, "scale_grad_by_freq", False):
        return None
    if padding >= 0:
        grad = g.masked_fill(grad, g.reshape(g.compare("eq", ids, padding), (*g.shape(ids), 1)), 0)
    return (g.emit("embedding_backward", (grad, ids), g.op.type.dtype, g.op.type.shape),)


def _halves(g: Group, x: Ref, dim: int) -> tuple[Ref, Ref]:
    n = g.shape(x)[dim] // 2
    return g.slice(x, dim, 0, n), g.slice(x, dim, n, n)


def glu(g: Group) -> Results:
    a, b = _halves(g, g.ref(0), g.dims(g.ref(0), (g.integer(1, "dim", -1),))[0])
    return (g.mul(a, g.pointwise("sigmoid", b)),)


def glu_backward(g: Group) -> Results:
    grad, dim = g.ref(0), g.dims(g.ref(1), (g.integer(2, "dim"),))[0]
    a, b = _halves(g, g.ref(1), dim)
    gate = g.pointwise("sigmoid", b)
    return (g.cat((g.mul(grad, gate), g.pointwise("sigmoid_backward", g.mul(grad, a), gate)), dim),)


DECOMPOSITIONS: dict[str, Decomposition] = {
    "aten.addmm": addmm,
    "aten.baddbmm": addmm,
    "aten.linear": linear,
    "aten.mv": mv,
    "aten.dot": dot,
    "aten.convolution": convolution,
    "aten.convolution_backward": convolution_backward,
    "aten.sum": sum_,
    "aten.sum.dim_IntList": sum_,
    "aten.amax": amax,
    "aten.max": amax,
    "aten.amin": amin,
    "aten.min": amin,
    "aten.mean": mean,
    "aten.mean.dim": mean,
    "aten.linalg_vector_norm": vector_norm(1, 2),
    "aten.norm.Scalar": vector_norm(1, -1),
    "aten.norm.ScalarOpt_dim": vector_norm(1, 2),
    "aten.logsumexp": logsumexp,
    "aten._softmax": softmax,
    "aten._safe_softmax": lambda g: softmax(g, safe=True),
    "aten._log_softmax": log_softmax,
    "aten._softmax_backward_data": softmax_backward,
    "aten._log_softmax_backward_data": log_softmax_backward,
    "aten.embedding": embedding,
    "aten.embedding_dense_backward": embedding_backward,
    "aten.glu": glu,
    "aten.glu_backward": glu_backward,
    **{
        f"aten.{name}{'_mean' if both else ''}{'.' + spelling if spelling else ''}": var(name == "std", both, spelling)
        for name in ("var", "std")
        for both in (False, True)
        for spelling in ("", "dim", "correction")
    },
}
