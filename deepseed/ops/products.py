"""Matrix products of 16 bits on a CPU that has no instructions for them: larger ones in float32, rounded once, as torch's own are.

Torch emulates these instructions. On a Cascade Lake its products of bfloat16 take 4 to 5 times those of float32, of float16 9 to 250 times; these take 1.1 to 1.3 times, casts included
(tests/bench/bench_products.py). Elsewhere, and of every other dtype, they are torch's.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_PIECE = 1 << 20  # elements of a copy in float32, of which a product has three at a time: 12 MiB, at most
_LEAST = 1 << 22  # multiplications of a product: of smaller ones, which win less than 0.3 ms, torch's own keep torch's order of sums
_FEW = 16  # rows, width or outputs, of which each number is copied for few multiplications: torch's own are as fast


@cache
def emulated(dtype: torch.dtype) -> bool:
    """Whether this machine's CPU has no instructions for products of ``dtype``: known of x86, elsewhere False."""
    has = torch.cpu.get_capabilities()
    if has.get("architecture") != "x86_64":
        return False
    names = {torch.bfloat16: ("amx_bf16", "avx512_bf16"), torch.float16: ("amx_fp16", "avx512_fp16")}.get(dtype)
    return names is not None and not any(has.get(name, False) for name in names)


def _wide(a: Tensor, b: Tensor, dims: int, *others: Tensor | None) -> bool:
    """Not under a dispatch mode, which counts memory or records what runs: there torch's own are one op. Nor what torch refuses: other dtypes or numbers of dimensions."""
    if not a.is_cpu or a.dim() != dims or b.dim() != dims or a.shape[-1] != b.shape[-2] or a.shape[:-2] != b.shape[:-2]:
        return False
    large = a.numel() * b.shape[-1] >= _LEAST and min(*a.shape[-2:], b.shape[-1]) >= _FEW
    return large and emulated(a.dtype) and all(x is None or x.dtype == a.dtype for x in (b, *others)) and not torch._C._len_torch_dispatch_stack()


def mm(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """[m, k] @ [k, n]; ``out``: of that shape."""
    return _mm(a, b, out=out) if _wide(a, b, 2, out) else torch.mm(a, b, out=out)


def addmm(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """``beta * c + alpha * (a @ b)``, c broadcast to [m, n]"""
    return _mm(a, b, c, beta, alpha) if _wide(a, b, 2, c) else torch.addmm(c, a, b, beta=beta, alpha=alpha)


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """[b, m, k] @ [b, k, n]"""
    return _bmm(a, b) if _wide(a, b, 3) else torch.bmm(a, b)


def baddbmm(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """``beta * c + alpha * (a @ b)``, c broadcast to [b, m, n]"""
    return _bmm(a, b, c, beta, alpha) if _wide(a, b, 3, c) else torch.baddbmm(c, a, b, beta=beta, alpha=alpha)


def accumulate_mm(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``total`` with a @ b added in place, which is rounded there alone."""
    return _mm(a, b, total, out=total) if _wide(a, b, 2, total) else total.addmm_(a, b)


def _mm(a: Tensor, b: Tensor, c: Tensor | None = None, beta: float = 1, alpha: float = 1, out: Tensor | None = None) -> Tensor:
    """``out``, which may be ``c``: of each part the operands are copied, multiplied, and the sum is rounded into its place."""
    (m, k), n = a.shape, b.shape[1]
    out = a.new_empty(m, n) if out is None else out
    c = None if c is None else c.expand(m, n)
    small = m * n <= _PIECE
    if small and max(m * k, k * n) <= _PIECE:
        out.copy_(_product(a, b, c, beta, alpha))
    elif small and k >= max(m, n):
        by = max(1, _PIECE // max(m, n, 1))
        whole = _product(a[:, :by], b[:by], c, beta, alpha)
        for low in range(by, k, by):
            at = slice(low, low + by)
            whole.addmm_(a[:, at].float(), b[at].float(), alpha=alpha)
        out.copy_(whole)
    else:
        half = (max(m, n) + 1) // 2
        for at in (slice(0, half), slice(half, None)):
            if m >= n:
                _mm(a[at], b, None if c is None else c[at], beta, alpha, out[at])
            else:
                _mm(a, b[:, at], None if c is None else c[:, at], beta, alpha, out[:, at])
    return out


def _product(a: Tensor, b: Tensor, c: Tensor | None, beta: float, alpha: float) -> Tensor:
    return torch.mm(a.float(), b.float()) if c is None else c.float().addmm_(a.float(), b.float(), beta=beta, alpha=alpha)


def _bmm(a: Tensor, b: Tensor, c: Tensor | None = None, beta: float = 1, alpha: float = 1) -> Tensor:
    """As many at a time as fit into a piece."""
    (many, m, k), n = a.shape, b.shape[2]
    out = a.new_empty(many, m, n)
    c = None if c is None else c.expand(many, m, n)
    by = _PIECE // max(m * k, k * n, m * n, 1)
    for low in range(0, many, max(by, 1)):
        at = slice(low, low + by)
        if by < 2:
            _mm(a[low], b[low], None if c is None else c[low], beta, alpha, out[low])
        elif c is None:
            out[at] = torch.bmm(a[at].float(), b[at].float())
        else:
            out[at] = c[at].float().baddbmm_(a[at].float(), b[at].float(), beta=beta, alpha=alpha)
    return out
