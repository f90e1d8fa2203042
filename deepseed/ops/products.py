"""Matrix products of 16 bits on a CPU that has no instructions for them: in float32, rounded once, as torch's own are.

Torch emulates these instructions. On a Cascade Lake its products of bfloat16 take 4 to 5 times those of float32, of float16 9 to 250 times; these take 1.15 to 1.3 times, casts included
(tests/bench/bench_products.py). Everywhere else, and of every other dtype, they are torch's.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_PIECE = 1 << 22  # elements of a float32 copy of a part of an operand, or of the result


@cache
def emulated(dtype: torch.dtype) -> bool:
    """Whether this machine's CPU has no instructions for products of ``dtype``: known of x86, elsewhere False."""
    has = torch.cpu.get_capabilities()
    if has.get("architecture") != "x86_64":
        return False
    names = {torch.bfloat16: ("amx_bf16", "avx512_bf16"), torch.float16: ("amx_fp16", "avx512_fp16")}.get(dtype)
    return names is not None and not any(has.get(name, False) for name in names)


def _wide(x: Tensor) -> bool:
    return x.is_cpu and emulated(x.dtype)


def mm(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """[m, k] @ [k, n]"""
    return _mm(a, b, out=out) if _wide(a) else torch.mm(a, b, out=out)


def addmm(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """``beta * c + alpha * (a @ b)``, c broadcast to [m, n]"""
    if not _wide(a):
        return torch.addmm(c, a, b, beta=beta, alpha=alpha)
    return _mm(a, b, c, beta, alpha)


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """[b, m, k] @ [b, k, n]"""
    return torch.bmm(a.float(), b.float()).to(a.dtype) if _wide(a) else torch.bmm(a, b)


def baddbmm(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """``beta * c + alpha * (a @ b)``, c broadcast to [b, m, n]"""
    if not _wide(a):
        return torch.baddbmm(c, a, b, beta=beta, alpha=alpha)
    return torch.baddbmm(c.float(), a.float(), b.float(), beta=beta, alpha=alpha).to(a.dtype)


def accumulate_mm(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``total`` with a @ b added in place, which is rounded there alone."""
    if not _wide(a):
        return total.addmm_(a, b)
    _mm(a, b, total, out=total)
    return total


def _mm(a: Tensor, b: Tensor, c: Tensor | None = None, beta: float = 1, alpha: float = 1, out: Tensor | None = None) -> Tensor:
    """The longest of the three dimensions in pieces, so that copies in float32 stay small."""
    (m, k), n = a.shape, b.shape[1]
    out = a.new_empty(m, n) if out is None else out
    c = None if c is None else c.expand(m, n)
    longest, most = max(m, k, n), _PIECE // max(1, sorted((m, k, n))[1])
    by = longest if longest <= most else max(1, most)

    def product(x: Tensor, y: Tensor, z: Tensor | None) -> Tensor:
        return torch.mm(x, y) if z is None else torch.addmm(z.float(), x, y, beta=beta, alpha=alpha)

    if by >= longest:
        out.copy_(product(a.float(), b.float(), c))
    elif longest == n:
        x = a.float()
        for low in range(0, n, by):
            at = slice(low, low + by)
            out[:, at] = product(x, b[:, at].float(), None if c is None else c[:, at])
    elif longest == m:
        y = b.float()
        for low in range(0, m, by):
            at = slice(low, low + by)
            out[at] = product(a[at].float(), y, None if c is None else c[at])
    else:
        whole = product(a[:, :by].float(), b[:by].float(), c)
        for low in range(by, k, by):
            at = slice(low, low + by)
            whole.addmm_(a[:, at].float(), b[at].float(), alpha=alpha)
        out.copy_(whole)
    return out
