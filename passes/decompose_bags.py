"""Embedding bags, taken apart: rows looked up, then added up by the number of their bag. Helper of ``canonicalize``.

Bags of one length, as a 2-d input makes them, are a dimension: their sum, mean and maximum reduce it. Others are added up by
``embedding_backward``, which sums rows by id. Kept: a maximum over bags of different lengths, gradients scaled by frequency.
"""

from __future__ import annotations

from dataclasses import dataclass

from deepseed.ir.program import Ref
from deepseed.passes.decompose import Results
from deepseed.passes.group import Decomposition, Group

SUM, MEAN, MAX = 0, 1, 2


@dataclass(frozen=True)
class _Bags:
    """n indices in ``count`` bags; ``length``: where all have the same, else 0."""

    indices: Ref
    offsets: Ref
    n: int
    count: int
    length: int

    def of_each(self, g: Group) -> Ref:
        """i64[n]: the bag of each index."""
        if self.length:
            rows = g.reshape(g.emit("iota", (), "i64", (self.count,), start=0, step=1), (self.count, 1))
            return g.reshape(g.expand(rows, (self.count, self.length)), (self.n,))
        positions = g.emit("iota", (), g.dtype(self.offsets), (self.n,), start=0, step=1)
        after = g.emit("aten.searchsorted.Tensor", (self.offsets, positions), "i64", (self.n,), right=True)
        return g.pointwise("clamp_max", g.sub(after, 1), self.count - 1)


def _bags(g: Group, indices: Ref, offsets: Ref, count: int) -> _Bags:
    n, length = g.shape(indices)[0], 0
    made = g.producers.get(offsets.name)
    if made is not None and made.target == "iota" and made.kw("start", 0) == 0 and g.shape(offsets) == (count,):
        step = made.kw("step", 1)
        length = step if isinstance(step, int) and step * count == n else 0
    return _Bags(indices, offsets, n, count, length)


def _kept(g: Group, indices: Ref, padding: int, dtype: str) -> Ref | None:
    """1 where an index counts, 0 where it is padding; None: all count."""
    return None if padding < 0 else g.cast(g.compare("ne", indices, padding), dtype)


def embedding_bag(g: Group) -> Results:
    weight, indices, offsets = (g.ref(i) for i in range(3))
    mode, scaled = g.integer(4, "mode", SUM), g.optional(6, "per_sample_weights")
    padding = g.integer(8, "padding_idx", -1)
    out, bag_of, sizes, largest = g.op.types
    b = _bags(g, indices, offsets, out.shape[0])
    if g.arg(3, "scale_grad_by_freq", False) or (mode == MAX and (not b.length or padding >= 0)):
        return None
    wide = g.wide(weight)
    rows = g.emit("embedding", (wide, indices), g.dtype(wide), (b.n, out.shape[1]))
    kept = _kept(g, indices, padding, g.dtype(wide))
    for factor in (kept, None if scaled is None else g.wide(scaled)):
        if factor is not None:
            rows = g.mul(rows, g.reshape(factor, (b.n, 1)))
    size = _sizes(g, b, kept, g.dtype(wide))
    chosen = g.full(largest.shape, 0, largest.dtype)
    if mode == MAX:
        table = g.reshape(rows, (b.count, b.length, out.shape[1]))
        total = g.amax(table, (1,))
        at = g.emit("aten.argmax", (table, 1, False), "i64", out.shape)
        chosen = g.cast(g.gather(g.reshape(indices, (b.count, b.length)), at, 1), largest.dtype)
    else:
        total = _total(g, b, rows)
        if mode == MEAN:
            total = g.div(total, g.pointwise("clamp_min", g.reshape(size, (b.count, 1)), 1))
    every = g.cast(b.of_each(g), bag_of.dtype)
    bags = every if bag_of.shape == (b.n,) else g.full(bag_of.shape, 0, bag_of.dtype)
    counted = g.cast(size, sizes.dtype) if sizes.shape == (b.count,) else g.full(sizes.shape, 0, sizes.dtype)
    return g.cast(total, out.dtype), bags, counted, g.reshape(chosen, largest.shape)


def _total(g: Group, b: _Bags, rows: Ref) -> Ref:
    """Rows [n, d] added up by bag: [count, d]."""
    d = g.shape(rows)[1]
    if b.length:
        return g.sum(g.reshape(rows, (b.count, b.length, d)), (1,))
    return g.emit("embedding_backward", (rows, b.of_each(g)), g.dtype(rows), (b.count, d))


def _sizes(g: Group, b: _Bags, kept: Ref | None, dtype: str) -> Ref:
    """How many indices of each bag count."""
    if kept is None and b.length:
        return g.full((b.count,), b.length, dtype)
    ones = g.full((b.n,), 1, dtype) if kept is None else kept
    return g.reshape(_total(g, b, g.reshape(ones, (b.n, 1))), (b.count,))


def embedding_bag_backward(g: Group) -> Results:
    """The gradient of a bag goes to each of its rows."""
    grad, indices, offsets = g.wide(g.ref(0)), g.ref(1), g.ref(2)
    mode, scaled, padding = g.integer(8), g.optional(10), g.integer(11, "padding_idx", -1)
    count, d = g.shape(grad)
    b = _bags(g, indices, offsets, count)
    if g.arg(7) or (mode == MAX and (not b.length or padding >= 0)):
        return None
    if mode == MAX:
        zero = g.full(g.op.type.shape, 0, g.dtype(grad))
        return (g.cast(g.scatter_add(zero, g.cast(g.ref(5), "i64"), grad, 0), g.op.type.dtype),)
    kept = _kept(g, indices, padding, g.dtype(grad))
    if mode == MEAN:
        grad = g.div(grad, g.pointwise("clamp_min", g.reshape(_sizes(g, b, kept, g.dtype(grad)), (count, 1)), 1))
    rows = _rows(g, b, grad, d)
    for factor in (kept, None if scaled is None else g.wide(scaled)):
        if factor is not None:
            rows = g.mul(rows, g.reshape(factor, (b.n, 1)))
    return (g.cast(g.emit("embedding_backward", (rows, indices), g.dtype(rows), g.op.type.shape), g.op.type.dtype),)


def _rows(g: Group, b: _Bags, grad: Ref, d: int) -> Ref:
    """[count, d] of each bag as [n, d] of each index."""
    if b.length:
        return g.reshape(g.expand(g.reshape(grad, (b.count, 1, d)), (b.count, b.length, d)), (b.n, d))
    return g.emit("embedding", (grad, b.of_each(g)), g.dtype(grad), (b.n, d))


def sample_weights_backward(g: Group) -> Results:
    """The product of each looked up row with the gradient of its bag."""
    grad, weight, indices, offsets = g.wide(g.ref(0)), g.wide(g.ref(1)), g.ref(2), g.ref(3)
    padding = g.integer(6, "padding_idx", -1)
    count, d = g.shape(grad)
    b = _bags(g, indices, offsets, count)
    rows = g.emit("embedding", (weight, indices), g.dtype(weight), (b.n, d))
    out = g.sum(g.mul(rows, _rows(g, b, grad, d)), (1,))
    kept = _kept(g, indices, padding, g.dtype(out))
    return (g.cast(out if kept is None else g.mul(out, kept), g.op.type.dtype),)


BAGS: dict[str, Decomposition] = {
    "aten._embedding_bag": embedding_bag,
    "aten._embedding_bag_forward_only": embedding_bag,
    "aten._embedding_bag_backward": embedding_bag_backward,
    "aten._embedding_bag_per_sample_weights_backward": sample_weights_backward,
}
