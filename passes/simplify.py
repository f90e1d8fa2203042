"""Ops that do nothing, or that a simpler op does: one rule a target, helper of ``canonicalize``.

A rule reads one op (``Group``) and returns its results, or None to keep it. Rules merge an op with its producer only inside
one origin group, so that a decomposed group stays recognisable.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import cast

from deepseed.ir.program import Arg, Op, Ref, Type
from deepseed.passes.group import Decomposition, Group, broadcast, is_float

Results = tuple[Ref] | None
_LOOK_THROUGH = ("reshape", "expand", "cast", "permute")
_INTEGERS = ("bool", "u8", "i8", "i16", "i32", "i64")
_WIDTH = {"bool": 0, "u8": 1, "i8": 1, "i16": 2, "i32": 3, "i64": 4, "bf16": 5, "f16": 5, "f32": 6, "f64": 7}


def _same_type(g: Group) -> Results:
    x = g.ref(0)
    return (x,) if (g.dtype(x), g.shape(x)) == (g.op.type.dtype, g.op.type.shape) else None


def _inner(g: Group) -> Op | None:
    """The producer of the operand, where it is the same op in the same group."""
    found = g.producers.get(g.ref(0).name)
    return found if found is not None and found.target == g.op.target and found.origin == g.op.origin else None


def _again(g: Group, x: Ref, **kwargs: Arg) -> Results:
    """The op itself on the producer's operand."""
    return (g.emit(g.op.target, (x,), g.op.type.dtype, g.op.type.shape, **kwargs),)


def view(g: Group) -> Results:
    """reshape(reshape(x)), expand(expand(x))."""
    if found := _same_type(g):
        return found
    inner = _inner(g)
    return None if inner is None else _again(g, inner.refs[0])


def permute(g: Group) -> Results:
    dims = cast("tuple[int, ...]", g.op.kw("dims"))
    if dims == tuple(range(len(dims))):
        return (g.ref(0),)
    inner = _inner(g)
    if inner is None:
        return None
    before = cast("tuple[int, ...]", inner.kw("dims"))
    return _again(g, inner.refs[0], dims=tuple(before[d] for d in dims))


def cast_(g: Group) -> Results:
    """cast(cast(x)) where the first one loses nothing."""
    if found := _same_type(g):
        return found
    inner = _inner(g)
    if inner is None:
        return None
    x = inner.refs[0]
    a, b = g.dtype(x), inner.type.dtype
    lossless = a in _WIDTH and b in _WIDTH and _WIDTH[a] < _WIDTH[b] and is_float(a) == is_float(b)
    if not lossless:
        return None
    return (x,) if a == g.op.type.dtype else _again(g, x)


def over_no_dims(g: Group) -> Results:
    """A reduction over no dimension."""
    return (g.cast(g.ref(0), g.op.type.dtype),) if g.op.kw("dims") == () else None


def whole(g: Group) -> Results:
    """A slice or pad that changes no size, a cat of one."""
    if g.op.target == "cat":
        parts = cast("tuple[Ref, ...]", g.op.args[0])
        return (parts[0],) if len(parts) == 1 else None
    return _same_type(g) if g.op.kw("step", 1) == 1 else None


# arithmetic with constants ------------------------------------------------------------------------------------------


def constant(g: Group, value: Arg) -> float | None:
    """The number that every element of ``value`` is, if it is a number or comes from ``full``."""
    while isinstance(value, Ref):
        op = g.producers.get(value.name)
        if op is None or op.target not in (*_LOOK_THROUGH, "full"):
            return None
        if op.target == "full":
            filled = op.kw("value")
            return _rounded(float(filled), op.type.dtype) if isinstance(filled, int | float) else None
        if op.target == "cast" and not (is_float(op.type.dtype) and is_float(g.types[op.refs[0].name].dtype)):
            return None
        value = op.refs[0]
    return float(value) if isinstance(value, int | float) else None


def _rounded(value: float, dtype: str) -> float | None:
    """``value`` as the dtype holds it; None where that is not simply known."""
    if dtype == "f64" or value in (0.0, 1.0, -1.0):
        return value
    return struct.unpack("f", struct.pack("f", value))[0] if dtype == "f32" and abs(value) < 3e38 else None


def _neutral(g: Group, position: int, unit: float) -> Results:
    """The operand at ``position``, where the other one is the operation's unit."""
    x, other = g.op.args[position], g.op.args[1 - position]
    if not isinstance(x, Ref) or g.op.kwargs or constant(g, other) != unit:
        return None
    return (x,) if (g.dtype(x), g.shape(x)) == (g.op.type.dtype, g.op.type.shape) else None


def _fold(g: Group) -> Results:
    """A scalar made of two constants."""
    t = g.op.type
    if t.shape != () or t.dtype not in ("f32", "f64") or g.op.kwargs:
        return None
    a, b = (None if n is None else _rounded(n, t.dtype) for n in (constant(g, x) for x in g.op.args[:2]))
    if a is None or b is None:
        return None
    if g.op.target.startswith("aten.div") and b == 0:
        return None
    value = _rounded(a * b if g.op.target.startswith("aten.mul") else a / b, t.dtype)
    return None if value is None else (g.full((), value, t.dtype),)


def _integers(g: Group) -> Results:
    """Integers and numbers make floats of the result's dtype, which torch would take from its default."""
    t = g.op.type
    if not is_float(t.dtype) or not all(isinstance(a, Ref | int | float) for a in g.op.args) or any(g.dtype(r) not in _INTEGERS for r in g.op.refs):
        return None
    args = [g.cast(a, t.dtype) if isinstance(a, Ref) else a for a in g.op.args]
    return (g.emit(g.op.target, args, t.dtype, t.shape, **dict(g.op.kwargs)),)


def mul(g: Group) -> Results:
    return _fold(g) or _neutral(g, 0, 1.0) or _neutral(g, 1, 1.0) or square_of_roots(g) or _integers(g)


def power(g: Group) -> Results:
    """x to the 1."""
    return _neutral(g, 0, 1.0) if g.op.args[1] == 1 else None


def div(g: Group) -> Results:
    return _fold(g) or _neutral(g, 0, 1.0) or _integers(g)


def add(g: Group) -> Results:
    return _neutral(g, 0, 0.0) or _neutral(g, 1, 0.0) or _integers(g)


def sub(g: Group) -> Results:
    return _neutral(g, 0, 0.0) or _integers(g)


def both(g: Group) -> Results:
    """x and true; the operands are bool."""
    return _neutral(g, 0, 1.0) or _neutral(g, 1, 1.0) if g.op.type.dtype == "bool" else None


def either(g: Group) -> Results:
    """x or false; the operands are bool."""
    return _neutral(g, 0, 0.0) or _neutral(g, 1, 0.0) if g.op.type.dtype == "bool" else None


def where(g: Group) -> Results:
    a, b = g.op.args[1:3]
    if a != b or not isinstance(a, Ref):
        return None
    return (a,) if (g.dtype(a), g.shape(a)) == (g.op.type.dtype, g.op.type.shape) else None


def square_of_roots(g: Group) -> Results:
    """The square of a vector of norms is the vector of their sums of squares: a norm of norms needs one reduction.

    before: %n = sqrt(%a), %m = sqrt(%b), %c = cat([%n, %m]), %s = mul(%c, %c)
    after:  %s = cat([%a, %b])
    """
    x = g.op.args[0]
    if x != g.op.args[1] or not isinstance(x, Ref):
        return None
    joined = _through(g, x)
    producer = g.producers.get(joined.name)
    parts = (joined,) if producer is None or producer.target != "cat" else producer.refs
    squares = [_radicand(g, part) for part in parts]
    if not all(squares):
        return None
    shaped = [g.cast(g.reshape(s, g.shape(part)), g.op.type.dtype) for s, part in zip(squares, parts, strict=True) if s is not None]
    out = g.cat(shaped, cast(int, producer.kw("dim", 0))) if producer is not None and producer.target == "cat" else shaped[0]
    g.ops = [replace(op, origin="") for op in g.ops]
    return (g.reshape(out, g.op.type.shape),)


def _through(g: Group, x: Ref) -> Ref:
    """Behind reshapes and casts between floats."""
    while (op := g.producers.get(x.name)) is not None and op.target in ("reshape", "cast") and is_float(g.dtype(op.refs[0])):
        x = op.refs[0]
    return x


def _radicand(g: Group, x: Ref) -> Ref | None:
    """y of sqrt(y) where y is a sum of squares."""
    root = g.producers.get(_through(g, x).name)
    total = g.producers.get(root.refs[0].name) if root is not None and root.target == "aten.sqrt" else None
    square = g.producers.get(total.refs[0].name) if total is not None and total.target == "sum" else None
    if root is None or square is None:
        return None
    squares = square.target == "aten.mul.Tensor" and square.args[0] == square.args[1]
    return root.refs[0] if squares or square.target == "cat" else None


# an index that is a view --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Line:
    """start + step * (index along ``axis``); axis None: constant. The axis counts from the right, as broadcasting does."""

    axis: int | None
    start: int
    step: int


def _line(g: Group, x: Ref) -> _Line | None:
    """The integer value as a line along one of its dimensions, if it is one."""
    op = g.producers.get(x.name)
    if op is None or not op.type.dtype.startswith("i"):
        return None
    if op.target == "iota":
        start, step = op.kw("start", 0), op.kw("step", 1)
        return _Line(1 if op.type.shape[0] > 1 else None, start, step) if isinstance(start, int) and isinstance(step, int) else None
    if op.target == "full":
        value = op.kw("value")
        return _Line(None, int(value), 0) if isinstance(value, int | float) else None
    if op.target in ("cast", "expand", "aten.clone"):
        return _line(g, op.refs[0])
    if op.target in ("aten.add.Tensor", "aten.mul.Tensor") and not op.kwargs and isinstance(op.args[0], Ref) and isinstance(op.args[1], int):
        inner, n = _line(g, op.args[0]), op.args[1]
        if inner is None:
            return None
        return _Line(inner.axis, inner.start + n, inner.step) if "add" in op.target else _Line(inner.axis, inner.start * n, inner.step * n)
    if op.target == "reshape":
        return _reshaped(_line(g, op.refs[0]), g.shape(op.refs[0]), op.type.shape)
    return None


def _reshaped(line: _Line | None, before: tuple[int, ...], after: tuple[int, ...]) -> _Line | None:
    """Only dimensions of size 1 may come and go."""
    if line is None or line.axis is None:
        return line
    if [n for n in before if n != 1] != [n for n in after if n != 1]:
        return None
    inside = sum(n != 1 for n in before[len(before) - line.axis :])  # which of the others it is, counted from the right
    axes = [len(after) - d for d in reversed(range(len(after))) if after[d] != 1]
    return _Line(axes[inside - 1], line.start, line.step)


def index(g: Group) -> Results:
    """Indexing with aranges is slicing, moving and broadcasting.

    before: %m : bool[B, T], %b = reshape(iota) : i64[B, 1, 1, 1], %y = aten.index.Tensor(%m, [%b, iota]) : bool[B, 1, 1, T]
    after:  %y = reshape(%m) : bool[B, 1, 1, T]
    """
    x, given = g.ref(0), cast("tuple[Ref | None, ...]", g.op.args[1])
    shape = g.shape(x)
    dims = [d for d, i in enumerate(given) if i is not None]
    lines = [_line(g, i) for i in given if i is not None]
    if not dims or dims != list(range(dims[0], dims[-1] + 1)):
        return None
    spread = broadcast([g.shape(i) for i in given if i is not None])
    axes = [line.axis for line in lines if line is not None and line.axis is not None]
    if None in lines or len(set(axes)) != len(axes):
        return None
    for d, line in zip(dims, lines, strict=True):
        assert line is not None
        n = 1 if line.axis is None else spread[len(spread) - line.axis]
        start = line.start + shape[d] if line.start < 0 and line.axis is None else line.start
        if start < 0 or (line.axis is not None and line.step < 1) or start + (n - 1) * line.step >= shape[d]:
            return None
        x = g.slice(x, d, start, n, line.step if n > 1 else 1)
    # from the dimensions' order to that of the broadcast axes; constants have size 1 and go anywhere
    order = sorted(range(len(dims)), key=lambda k: -(cast(_Line, lines[k]).axis or 0))
    if order != sorted(order):
        x = g.permute(x, (*range(dims[0]), *(dims[k] for k in order), *range(dims[-1] + 1, len(shape))))
    thin = tuple(n if len(spread) - a in axes else 1 for a, n in enumerate(spread))
    x = g.reshape(x, (*shape[: dims[0]], *thin, *shape[dims[-1] + 1 :]))
    return (g.expand(x, g.op.type.shape),)


SIMPLIFICATIONS: dict[str, Decomposition] = {
    "reshape": view,
    "expand": view,
    "permute": permute,
    "cast": cast_,
    "aten.clone": _same_type,
    "aten.contiguous": _same_type,
    "aten.detach": _same_type,
    "aten.alias": _same_type,
    "aten.lift_fresh_copy": _same_type,
    "sum": over_no_dims,
    "amax": over_no_dims,
    "slice": whole,
    "pad": whole,
    "cat": whole,
    "aten.mul.Tensor": mul,
    "aten.mul.Scalar": mul,
    "aten.div.Tensor": div,
    "aten.div.Scalar": div,
    "aten.pow.Tensor_Scalar": power,
    "aten.add.Tensor": add,
    "aten.sub.Tensor": sub,
    "aten.bitwise_and.Tensor": both,
    "aten.logical_and": both,
    "aten.bitwise_or.Tensor": either,
    "aten.logical_or": either,
    "aten.where.self": where,
    "aten.index.Tensor": index,
}


def functional_batch_norm(op: Op, types: dict[str, Type]) -> Op | None:
    """``native_batch_norm`` as the op that does not write into its operands: in training, the new statistics are results."""
    if op.target != "aten.native_batch_norm":
        return None
    x, weight, bias, mean, variance, training, momentum, eps = op.args
    if not training:
        return replace(op, target="aten._native_batch_norm_legit_no_training", args=(x, weight, bias, mean, variance, momentum, eps))
    if not isinstance(mean, Ref) or not isinstance(variance, Ref):
        return replace(op, target="aten._native_batch_norm_legit.no_stats", args=(x, weight, bias, training, momentum, eps))
    results = (*op.results, f"{op.name}.running_mean", f"{op.name}.running_var")
    new = (*op.types, types[mean.name], types[variance.name])
    return replace(op, target="aten._native_batch_norm_legit_functional", results=results, types=new)
