"""Rules of ops on whole matrices (solve, eigh, distances), of transforms and scans of whole dimensions: what is beside them is free."""

from __future__ import annotations

from collections.abc import Callable

from deepseed.rules import pointwise
from deepseed.rules.signature import Call, Rule


def matrices(spec: str) -> Callable[[Call], str | None]:
    """``"2 2 -> 2 1"``: how many of the last dimensions of each operand and result are whole; those before them are batch dimensions,
    aligned at the right."""
    left, _, right = spec.partition("->")
    inner = [int(n) for side in (left, right) for n in side.split()]
    count = len(left.split())

    def form(call: Call) -> str | None:
        tensors = (*call.operands, *call.results)
        if len(call.operands) != count or len(tensors) != len(inner):
            return None
        shapes = [t.shape for t in tensors]
        empty = [n > 0 and shape == (0,) for n, shape in zip(inner, shapes, strict=True)]  # a result that was not asked for
        batch = max((len(shape) - n for shape, n, e in zip(shapes, inner, empty, strict=True) if not e), default=0)
        sizes = [max((shape[d - batch + len(shape) - n] for shape, n, e in zip(shapes, inner, empty, strict=True)
                      if not e and d - batch + len(shape) - n >= 0), default=1) for d in range(batch)]  # fmt: skip
        words: list[str] = []
        for slot, (shape, n, e) in enumerate(zip(shapes, inner, empty, strict=True)):
            if e:
                words.append(f"e{slot}!^")
                continue
            if len(shape) < n:
                return None
            first = batch - (len(shape) - n)
            names = [f"b{first + i}" if size == sizes[first + i] else "1" for i, size in enumerate(shape[: len(shape) - n])]
            words.append(" ".join([*names, *(f"m{slot}d{i}!^" for i in range(n))]) or ".")
        return ", ".join(words[:count]) + " -> " + ", ".join(words[count:])

    form.__doc__ = f"batch dimensions are free, the last ones whole: {spec} of them"
    return form


def solve(call: Call) -> str | None:
    """batch dimensions are free, matrices and right-hand sides whole"""
    a, b = call.shape(0), call.shape(1)
    vector = len(b) == 1 or (len(b) == len(a) - 1 and b == a[:-1])
    n = 1 if vector else 2
    return matrices(f"2 {n} -> {n} 2 1 0")(call)


def pinv(call: Call) -> str | None:
    """batch dimensions are free, matrices whole"""
    return matrices(f"2 {'0 ' * (len(call.operands) - 1)}-> 2")(call)


def fft(call: Call) -> str:
    """The transformed dimensions are whole, the others are free."""
    rank = len(call.shape(0))
    dims = call.arg(1, "dim", ())
    whole = {d % rank for d in dims if isinstance(d, int)} if isinstance(dims, tuple) and rank else set(range(rank))

    def side(x: str) -> str:
        return " ".join(f"{x}{d}!^" if d in whole else f"d{d}" for d in range(rank)) or "."

    return f"{side('t')} -> {side('f')}"


def cdist(call: Call) -> str | None:
    """`*b m d!, *b n d! -> *b m n`"""
    names = _batch(call)
    return None if names is None else f"{names[0]} m d!, {names[1]} n d! -> {names[-1]} m n"


def cdist_backward(call: Call) -> str | None:
    """`*b m n, *b m d!, *b n d!, *b m n -> *b m d!`"""
    names = _batch(call)
    return None if names is None else f"{names[0]} m n, {names[1]} m d!, {names[2]} n d!, {names[3]} m n -> {names[4]} m d!"


def _batch(call: Call) -> list[str] | None:
    """Per tensor the words of its batch dimensions, aligned at the right."""
    shapes = [t.shape[:-2] for t in (*call.operands, *call.results)]
    out = call.out[:-2]
    if any(len(t.shape) < 2 for t in (*call.operands, *call.results)) or any(len(s) > len(out) for s in shapes):
        return None
    return [" ".join(f"b{len(out) - len(s) + i}" if n == out[len(out) - len(s) + i] else "1" for i, n in enumerate(s)) for s in shapes]


def cross(call: Call) -> str:
    """As pointwise; the dimension of three is whole."""
    dim = call.arg(2, "dim", -1)
    at = (dim if isinstance(dim, int) else -1) % len(call.out)
    return pointwise.form(call).replace(f"d{at}", "w!^") if len(call.out) < 10 else pointwise.form(call)


def searchsorted(call: Call) -> str | None:
    """The sorted sequence is whole, what is looked up is free."""
    if len(call.operands) != 2:
        return None
    sequence, n = call.shape(0), len(call.out)
    values = [f"d{i}" for i in range(n)]
    rows = ["s!^"] if len(sequence) == 1 else [*values[:-1], "s!^"]
    return f"{' '.join(rows)}, {' '.join(values) or '.'} -> {' '.join(values) or '.'}"


def isin(call: Call) -> str:
    """`*b, *t! -> *b`"""
    return "*b, " + (" ".join(f"t{i}!^" for i in range(len(call.shape(1)))) or ".") + " -> *b"


def all_whole(call: Call) -> str:
    """Every dimension is whole."""
    words = [" ".join(f"w{slot}d{d}!^" for d in range(len(t.shape))) or "." for slot, t in enumerate((*call.operands, *call.results))]
    return ", ".join(words[: len(call.operands)]) + " -> " + ", ".join(words[len(call.operands) :])


WHOLE = """
aten.bartlett_window aten.blackman_window aten.blackman_window.periodic aten.hamming_window aten.hamming_window.periodic
aten.hamming_window.periodic_alpha aten.hamming_window.periodic_alpha_beta aten.hann_window aten.hann_window.periodic
aten.kaiser_window aten.kaiser_window.periodic aten.kaiser_window.beta aten.fft_fftfreq aten.fft_rfftfreq aten.linspace
aten.logspace aten.tril_indices aten.triu_indices aten.median aten.nanmedian aten._pdist_forward
aten._pdist_backward
"""

RULES: dict[str, Rule] = {
    # matrices
    "aten._linalg_det": Rule(matrices("2 -> 0 2 1")),
    "aten._linalg_slogdet": Rule(matrices("2 -> 0 0 2 1")),
    "aten._linalg_eigh": Rule(matrices("2 -> 1 2")),
    "aten._linalg_svd": Rule(matrices("2 -> 2 1 2")),
    "aten._linalg_solve_ex": Rule(solve),
    "aten.linalg_inv_ex": Rule(matrices("2 -> 2 0")),
    "aten.linalg_cholesky_ex": Rule(matrices("2 -> 2 0")),
    "aten.linalg_lu_factor_ex": Rule(matrices("2 -> 2 1 0")),
    "aten.linalg_lu_solve": Rule(matrices("2 1 2 -> 2")),
    "aten.lu_unpack": Rule(matrices("2 1 -> 2 2 2")),
    "aten.linalg_qr": Rule(matrices("2 -> 2 2")),
    "aten.linalg_matrix_exp": Rule(matrices("2 -> 2")),
    "aten.linalg_pinv.atol_rtol_tensor": Rule(pinv),
    "aten.linalg_solve_triangular": Rule(matrices("2 2 -> 2"), "1"),
    "aten.triangular_solve": Rule(matrices("2 2 -> 2 2")),
    "aten.cholesky_solve": Rule(matrices("2 2 -> 2"), "0"),
    "aten.cholesky_inverse": Rule(matrices("2 -> 2")),
    # distances, products
    "aten._cdist_forward": Rule(cdist),
    "aten._cdist_backward": Rule(cdist_backward, "0"),
    "aten.linalg_cross": Rule(cross, "0|1"),
    # transforms
    "aten._fft_r2c": Rule(fft, "0"),
    "aten._fft_c2r": Rule(fft, "0"),
    "aten._fft_c2c": Rule(fft, "0"),
    "aten.view_as_real": Rule("*b -> *b r!^", "0"),
    # search
    "aten.searchsorted.Tensor": Rule(searchsorted),
    "aten.bucketize.Tensor": Rule("*b, s!^ -> *b"),
    "aten.isin.Tensor_Tensor": Rule(isin),
    **{target: Rule(all_whole) for target in WHOLE.split()},
}
