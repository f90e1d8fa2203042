"""Forms of the ops that move elements: reshape, permute, slice, pad, cat. Each function writes the form from the shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import gcd

from deepseed.ir.program import Arg, Op
from deepseed.rules.signature import Call


def names_of(n: int) -> list[str]:
    return [f"d{i}" for i in range(n)]


def row(names: list[str]) -> str:
    return " ".join(names) or "."


def with_(names: list[str], dim: int, word: str) -> str:
    return row([*names[:dim], word, *names[dim + 1 :]])


def dims_of(call: Call) -> tuple[int, ...]:
    """The ``dims`` of permute, sum, amax."""
    dims = call.op.kw("dims", ())
    return tuple(d for d in dims if isinstance(d, int)) if isinstance(dims, tuple) else ()


def reshape(call: Call) -> str:
    """The common refinement of both shapes, from the left: [8, 3] -> [4, 6] is ``(f0=4 f1=2) f2=3 -> f0=4 (f1=2 f2=3)``.

    Where two boundaries do not nest, what follows is whole until both sides have a boundary together."""
    sides = ([*call.shape(0)], [*call.out])
    if 0 in sides[0]:  # no elements: nothing to split
        return row([f"a{i}!^" for i in range(len(sides[0]))]) + " -> " + row([f"b{i}!^" for i in range(len(sides[1]))])
    words: tuple[list[list[str]], list[list[str]]] = ([[] for _ in sides[0]], [[] for _ in sides[1]])
    at = [0, 0]
    taken = [1, 1]  # since the last common boundary
    count = 0
    while True:
        for s in (0, 1):
            while at[s] < len(sides[s]) and sides[s][at[s]] == 1:
                at[s] += 1
        if at[0] == len(sides[0]) and at[1] == len(sides[1]):
            return " -> ".join(row([f"({' '.join(w)})" if w else "1" for w in side]) for side in words)
        shared = gcd(sides[0][at[0]], sides[1][at[1]]) if taken[0] == taken[1] else 1
        if shared > 1:
            for s in (0, 1):
                words[s][at[s]].append(f"f{count}={shared}")
                sides[s][at[s]] //= shared
        else:
            s = 0 if taken[0] <= taken[1] else 1
            size = sides[s][at[s]]
            words[s][at[s]].append(f"f{count}={size}!^")
            taken[s] *= size
            sides[s][at[s]] = 1
        count += 1


def permute(call: Call) -> str:
    """The same factors in the order of ``dims``."""
    names = names_of(len(call.out))
    return row(names) + " -> " + row([names[d] for d in dims_of(call)])


def reduction(call: Call) -> str:
    """sum and amax: a dimension in ``dims`` is missing from the result."""
    names = names_of(len(call.shape(0)))
    dims = dims_of(call)
    keep = bool(call.op.kw("keepdim"))
    return row(names) + " -> " + row(["1" if d in dims else n for d, n in enumerate(names) if keep or d not in dims])


def _blocks(size: int, b: int, inner: str, name: str) -> str:
    """A dimension as blocks of ``b``: only the inside of a block may be split."""
    return f"({name}={size // b}!^ {inner}={b})"


def _window(call: Call, whole: tuple[int, ...], part: tuple[int, ...]) -> tuple[str, str]:
    """The tensor that is cut, and what is cut out.

    A window that starts and ends at multiples of b is a number of blocks of b, and each block may be split. With a step j
    that covers the dimension, ``(n j) -> n``."""
    names = names_of(len(whole))
    dim = call.dim(1)
    start, step = call.op.kw("start", 0), call.op.kw("step", 1)
    size, length = whole[dim], part[dim]
    if isinstance(start, int) and isinstance(step, int):
        if step == 1 and (b := gcd(start, length, size)) > 0:
            return with_(names, dim, _blocks(size, b, "i", "p")), with_(names, dim, _blocks(length, b, "i", "q"))
        if step > 1 and length * step == size and start < step:
            return with_(names, dim, f"(i j={step}!^)"), with_(names, dim, "i")
    return with_(names, dim, "p!^"), with_(names, dim, "q!^")


def slice_(call: Call) -> str:
    """A window of whole blocks of b: ``(p! b) -> (q! b)``; every j-th element: ``(n j!) -> n``; else the dimension is whole."""
    return " -> ".join(_window(call, call.shape(0), call.out))


def unslice(call: Call) -> str:
    """As slice, from right to left."""
    return " -> ".join(reversed(_window(call, call.out, call.shape(0))))


def pad(call: Call) -> str:
    """A padded dimension is made of blocks as in ``slice``."""
    pads = call.op.kw("pads")
    left: list[str] = []
    right: list[str] = []
    for d, (size, new) in enumerate(zip(call.shape(0), call.out, strict=True)):
        low = pads[2 * d] if isinstance(pads, tuple) else 0
        b = gcd(size, new, low) if isinstance(low, int) else 0
        same = size == new
        left.append(f"d{d}" if same else _blocks(size, b, f"d{d}", f"p{d}") if b else f"p{d}!^")
        right.append(f"d{d}" if same else _blocks(new, b, f"d{d}", f"q{d}") if b else f"q{d}!^")
    return row(left) + " -> " + row(right)


def cat(call: Call) -> str:
    """Parts whose lengths are multiples of b are blocks of b, and each block may be split."""
    dim = call.dim(1, default=0)
    names = names_of(len(call.out))
    sizes = [t.shape[dim] for t in call.operands]
    b = gcd(*sizes)
    if b == 0:
        return ", ".join(with_(names, dim, f"p{k}!^") for k in range(len(sizes))) + " -> " + with_(names, dim, "q!^")
    parts = [with_(names, dim, _blocks(size, b, "i", f"p{k}")) for k, size in enumerate(sizes)]
    return ", ".join(parts) + " -> " + with_(names, dim, _blocks(call.out[dim], b, "i", "q"))


def resize_window(op: Op, now: Mapping[str, int], wanted: Mapping[str, int]) -> Op:
    """slice and unslice with blocks of another size: the window starts at the same block."""
    start = op.kw("start", 0)
    if "i" not in now or "j" in now or not isinstance(start, int):
        return op
    return _with(op, "start", start // now["i"] * wanted["i"])


def resize_pad(op: Op, now: Mapping[str, int], wanted: Mapping[str, int]) -> Op:
    pads = op.kw("pads")
    if not isinstance(pads, tuple):
        return op
    out: list[Arg] = []
    for i, n in enumerate(pads):
        name = f"d{i // 2}"
        out.append(n // now[name] * wanted[name] if isinstance(n, int) and n and name in now else n)
    return _with(op, "pads", tuple(out))


def _with(op: Op, key: str, value: Arg) -> Op:
    return replace(op, kwargs=tuple((k, value if k == key else v) for k, v in op.kwargs))
