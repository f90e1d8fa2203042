"""The rules, one row an op. Where the arguments decide, the row holds a function that writes the form from them.

The rows of pointwise ops are in ``deepseed.rules.pointwise``, the forms of ops that move elements in
``deepseed.rules.shapes``, of images in ``deepseed.rules.spatial``, of matrices in ``deepseed.rules.linalg``, of experts in
``deepseed.rules.routed``, of whole ops that kernels emit again in ``deepseed.rules.fused``.
An op without a row is replicated: never a wrong answer.
"""

from __future__ import annotations

from collections.abc import Callable

from deepseed.ir.program import FLOATS, Ref
from deepseed.rules import fused, linalg, pointwise, routed, shapes, spatial
from deepseed.rules.shapes import names_of, row, with_
from deepseed.rules.signature import Call, Rule


def created(call: Call) -> str:
    """Born in any layout; the operand (seed and step) is whole."""
    return ", ".join(["r!^"] * len(call.operands)) + " -> " + row(names_of(len(call.out)))


def gather(call: Call) -> str:
    """As embedding: the gathered dimension split leaves partial sums. Dimensions of which the index covers a part are whole."""
    dim = call.dim(2)
    source, index = call.shape(0), call.shape(1)
    if not source or not index:
        return ", ".join("1" if t.shape else "." for t in call.operands) + " -> " + ("1" if call.out else ".")
    names = names_of(len(index))
    v = "v!" if call.operands[0].dtype == "bool" else "v~"  # a sum of bools is no gather
    left = [v if d == dim else n if source[d] == index[d] else f"s{d}!^" for d, n in enumerate(names)]
    right = [n if d == dim or source[d] == index[d] else f"i{d}!^" for d, n in enumerate(names)]
    return f"{row(left)}, {row(right)} -> {row(right)}"


def scatter_add(call: Call) -> str:
    """Each rank adds what falls into its rows; an index that is split leaves a partial sum, to which x adds a partial sum."""
    dim = call.dim(3)
    target, index, source = call.shape(0), call.shape(1), call.shape(2)
    if not target or not index:
        return ", ".join("1" if t.shape else "." for t in call.operands) + " -> " + ("1" if call.out else ".")
    names = names_of(len(index))
    free = [index[d] == source[d] and (d == dim or target[d] == index[d]) for d in range(len(index))]
    x = ["v~" if d == dim else n if free[d] else f"x{d}!^" for d, n in enumerate(names)]
    i = [n if free[d] else f"i{d}!^" for d, n in enumerate(names)]
    s = [n if free[d] else f"s{d}!^" for d, n in enumerate(names)]
    return f"{row(x)}, {row(i)}, {row(s)} -> {row(x)}"


def index(call: Call) -> str | None:
    """x[:, i, :]: the indexed dimension is whole. Several indices must stand side by side."""
    where = call.arg(1, "indices")
    if not isinstance(where, tuple) or any(t.dtype in ("bool", "u8") for t in call.operands[1:]):
        return None
    at = [d for d, a in enumerate(where) if isinstance(a, Ref)]
    if not at or at != list(range(at[0], at[-1] + 1)):
        return None
    source = names_of(len(call.shape(0)))
    n = len(call.out) - (len(source) - len(at))
    chosen = call.out[at[0] : at[0] + n]
    picked = [f"i{k}" for k in range(n)]
    ids = [row([picked[n - len(t.shape) + k] if size == chosen[n - len(t.shape) + k] else "1" for k, size in enumerate(t.shape)]) for t in call.operands[1:]]
    left = [f"v{d}!" if d in at else name for d, name in enumerate(source)]
    return ", ".join([row(left), *ids]) + " -> " + row([*source[: at[0]], *picked, *source[at[-1] + 1 :]])


def index_put(call: Call) -> str | None:
    """x[i] += values: x's indexed dimension is whole; a split i leaves a partial sum. Without accumulate, i is whole too."""
    where = call.arg(1, "indices")
    if not isinstance(where, tuple) or any(t.dtype in ("bool", "u8") for t in call.operands[1:-1]):
        return None
    at = [d for d, a in enumerate(where) if isinstance(a, Ref)]
    if not at or at != list(range(at[0], at[-1] + 1)):
        return None
    source = names_of(len(call.out))
    chosen = call.operands[1].shape  # of several indices, all must have the shape of the first
    shape = (*call.out[: at[0]], *chosen, *call.out[at[-1] + 1 :])
    if any(t.shape != chosen for t in call.operands[1:-1]) or call.operands[-1].shape != shape:
        return None
    mark = "" if call.arg(3, "accumulate", False) else "!"
    picked = [f"i{k}{mark}" for k in range(len(chosen))]
    x = row([f"v{d}!" if d in at else name for d, name in enumerate(source)])
    values = row([*source[: at[0]], *picked, *source[at[-1] + 1 :]])
    return ", ".join([x, *[row(picked)] * len(at), values]) + f" -> {x}"


def index_select(call: Call) -> str:
    """The indexed dimension is whole, the index is free."""
    if not call.shape(0):
        return "., " + ("." if not call.shape(1) else "i!") + " -> ."
    names = names_of(len(call.shape(0)))
    dim = call.dim(1)
    return with_(names, dim, "v!") + ", " + ("i" if call.shape(1) else ".") + " -> " + with_(names, dim, "i" if call.shape(1) else "1")


def scatter(call: Call) -> str:
    """The dimension in the arguments is whole; dimensions of which the index covers a part are whole."""
    target = call.out
    if not target:
        return ", ".join("1" if t.shape else "." for t in call.operands) + " -> ."
    dim = call.dim(1)
    covered = [all(t.shape[d] == size for t in call.operands) and d != dim for d, size in enumerate(target)]
    words = [row([f"d{d}" if covered[d] else f"{x}{d}!^" for d in range(len(target))]) for x in "xis"[: len(call.operands)]]
    return ", ".join(words) + f" -> {words[0]}"


def baddbmm(call: Call) -> str:
    """x, b m k, b k n -> b m n, x broadcast"""
    shape = call.shape(0)
    words = [w if size != 1 else "1" for w, size in zip("bmn"[3 - len(shape) :], shape, strict=True)]
    return f"{row(words)}, b m k, b k n -> b m n"


def _heads(call: Call, q: int, k: int) -> tuple[str, str]:
    """The head dimension of queries and of keys: query heads are (kv group)."""
    kv = call.shape(k)[1]
    return f"(h={kv} g={call.shape(q)[1] // kv})", "h"


def _mask(call: Call, mask: int, heads: str) -> str:
    words = ["b", heads, "s!", "t!"]
    shape = call.shape(mask)
    return row([w if size != 1 else "1" for w, size in zip(words[4 - len(shape) :], shape, strict=True)])


def sdpa(call: Call) -> str:
    """Batch, kv head and group are free; both sequences are whole (a split sequence becomes an all_to_all to heads)."""
    heads, kv = _heads(call, 0, 1)
    tensors = [f"b {heads} s! d!", f"b {kv} t! d!", f"b {kv} t! e!"]
    if len(call.operands) == 4:
        tensors.append(_mask(call, 3, heads))
    return ", ".join(tensors) + f" -> b {heads} s! e!, b {heads} s!"


def paged_attention(call: Call) -> str:
    """Kv head and group are free, and a rank's cache has its kv heads; the tokens of all sequences are whole."""
    kv = call.shape(1)[1]
    heads = f"(h={kv} g={call.shape(0)[1] // kv})"
    sinks = [heads] if len(call.operands) == 4 else []
    return ", ".join([f"t! {heads} d!", "t! h d!", "t! h e!", *sinks]) + f" -> t! {heads} e!"


def sdpa_backward(call: Call) -> str:
    """Linear in the incoming gradient; k and v collect a partial sum over the group."""
    heads, kv = _heads(call, 1, 2)
    q, k, v, out = f"b {heads} s! d!", f"b {kv} t! d!", f"b {kv} t! e!", f"b {heads} s! e!"
    mask = [_mask(call, 4, heads)] if len(call.operands) == 7 else []
    return ", ".join([out, q, k, v, *mask, out, f"b {heads} s!"]) + f" -> {q}, {k}, {v}"


def whole_dim(position: int, linear: str = "") -> Rule:
    """The same shape throughout, dimension ``args[position]`` whole: softmax, cumsum."""

    def form(call: Call) -> str:
        """The same shape throughout; the dimension in the arguments is whole."""
        names = names_of(len(call.out))
        one = with_(names, call.dim(position), "w!") if names else "."
        return ", ".join([one] * len(call.operands)) + " -> " + ", ".join([one] * len(call.results))

    return Rule(form, linear)


def selection(position: int, keepdim: int | None = None, default: int | None = -1) -> Rule:
    """Dimension ``args[position]`` is whole in the operand; whole in the results, or missing where ``keepdim`` is an argument."""

    def form(call: Call) -> str:
        """The dimension in the arguments is whole, the others are free."""
        names = names_of(len(call.shape(0)))
        if not names:
            return ". -> " + ", ".join(["."] * len(call.results))
        if call.arg(position, "dim", default) is None:
            return row([n + "!" for n in names]) + " -> " + row(["1"] * len(call.out))
        dim = call.dim(position)
        if keepdim is None:
            out = with_(names, dim, "k!^")
        else:
            out = with_(names, dim, "1") if call.arg(keepdim, "keepdim", False) else row(names[:dim] + names[dim + 1 :])
        return with_(names, dim, "w!^" if keepdim is None else "w!") + " -> " + ", ".join([out] * len(call.results))

    return Rule(form)


def last_two(call: Call) -> str:
    """tril, triu: the matrix is whole, the batch is free."""
    names = names_of(len(call.out))
    one = row([n + "!" if d >= len(names) - 2 else n for d, n in enumerate(names)])
    return f"{one} -> {one}"


def turned(position: int) -> Callable[[Call], str]:
    """flip, roll: the dimensions ``args[position]`` are whole (all, where there are none: roll of the flat tensor)."""

    def form(call: Call) -> str:
        """The dimensions in the arguments are whole, the others are free."""
        dims = call.arg(position, "dims", ())
        whole = {d % len(call.out) for d in dims if isinstance(d, int)} if isinstance(dims, tuple) and call.out else set()
        one = row([n + "!" if d in whole or not whole else n for d, n in enumerate(names_of(len(call.out)))])
        return f"{one} -> {one}"

    return form


def _cast(call: Call) -> str:
    """0, between floats: summands are rounded as a product's are"""
    source, target = call.operands[0].dtype, call.results[0].dtype
    return "0" if source == target or (source in FLOATS and target in FLOATS) else ""


def _zero(key: str, then: str) -> Callable[[Call], str]:
    def linear(call: Call) -> str:
        return then if call.op.kw(key, 0) == 0 else ""

    linear.__doc__ = f"{then}, where {key} is 0"
    return linear


RULES: dict[str, Rule] = {
    # shape and dtype
    "reshape": Rule(shapes.reshape, "0", "0"),
    "permute": Rule(shapes.permute, "0", "0"),
    "expand": Rule(pointwise.form, "0", "0"),
    "cast": Rule(pointwise.form, _cast),
    "share": Rule(pointwise.form, "0"),
    "slice": Rule(shapes.slice_, "0", "0", resize=shapes.resize_window),
    "unslice": Rule(shapes.unslice, "0", resize=shapes.resize_window),
    "pad": Rule(shapes.pad, _zero("value", "0"), resize=shapes.resize_pad),
    "cat": Rule(shapes.cat, "all"),
    # creation
    "full": Rule(created, _zero("value", "born")),
    "iota": Rule(created),
    "bernoulli": Rule(created),
    "uniform": Rule(created),
    "normal": Rule(created),
    # reductions
    "sum": Rule(shapes.reduction, "0"),
    "sum_of_squares": Rule("*d -> ."),
    "amax": Rule(shapes.reduction, "", "0", reduce="max"),
    "aten.cumsum": whole_dim(1, "0"),
    "aten.cumprod": whole_dim(1),
    "aten.logcumsumexp": whole_dim(1),
    "aten.cummax": whole_dim(1),
    "aten.cummin": whole_dim(1),
    "aten.prod.dim_int": selection(1, keepdim=2),
    "aten.any.dim": selection(1, keepdim=2),
    "aten.all.dim": selection(1, keepdim=2),
    "aten.median.dim": selection(1, keepdim=2),
    "aten.nanmedian.dim": selection(1, keepdim=2),
    "aten.mode": selection(1, keepdim=2),
    "aten.kthvalue": selection(2, keepdim=3),
    "aten.argmax": selection(1, keepdim=2, default=None),
    "aten.argmin": selection(1, keepdim=2, default=None),
    "aten.max.dim": selection(1, keepdim=2),
    "aten.min.dim": selection(1, keepdim=2),
    "aten.topk": selection(2),
    "aten.sort": selection(1),
    "aten.sort.stable": selection(9),
    "aten._softmax": whole_dim(1),
    "aten._log_softmax": whole_dim(1),
    "aten._softmax_backward_data": whole_dim(2, "0"),
    "aten._log_softmax_backward_data": whole_dim(2, "0"),
    "aten.tril": Rule(last_two, "0"),
    "aten.triu": Rule(last_two, "0"),
    "aten.flip": Rule(turned(1), "0", "0"),
    "aten.roll": Rule(turned(2), "0", "0"),
    # products
    "aten.mm": Rule("m k, k n -> m n", "0|1"),
    "aten.bmm": Rule("b m k, b k n -> b m n", "0|1"),
    "aten.mv": Rule("m k, k -> m", "0|1"),
    "aten.dot": Rule("k, k -> .", "0|1"),
    "aten.baddbmm": Rule(baddbmm, "0+1|0+2", adds=0),
    # lookups
    "embedding": Rule("v~ d, *b -> *b d", "0"),
    "embedding_backward": Rule("*b d, *b -> v~ d", "0"),
    "gather": Rule(gather, "0"),
    "scatter_add": Rule(scatter_add, "0+2", adds=0),
    "aten.index.Tensor": Rule(index, "0"),
    "aten.index_select": Rule(index_select, "0"),
    "aten.index_put": Rule(index_put, lambda c: "0+2" if c.arg(3, "accumulate", False) else "", adds=0),
    "aten.scatter.src": Rule(scatter),
    "aten.scatter.value": Rule(scatter),
    "aten.scatter_reduce.two": Rule(scatter),
    # attention
    "sdpa": Rule(sdpa),
    "sdpa_backward": Rule(sdpa_backward, "0"),
    "paged_attention": Rule(paged_attention),
    **routed.RULES,
    **spatial.RULES,
    **linalg.RULES,
    **fused.FUSED,
}


def rule_of(target: str) -> Rule | None:
    """The row of an op, or None: replicate."""
    return RULES.get(target) or pointwise.rule(target)
