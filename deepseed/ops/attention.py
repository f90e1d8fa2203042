"""sdpa and its backward: torch's fused kernels where one accepts the operands, plain matrix products elsewhere.

q [b, h, s, d], k and v [b, h / group, t, d]; the mask broadcasts to [b, h, s, t] and is bool (true: attend) or added to the
scores; ``causal`` lets query i see keys 0..i. Results: out [b, h, s, dv] and the rows' logsumexp [b, h, s], float32
(float64 for float64). A row with no key left gives zeros (logsumexp 0).
"""

from __future__ import annotations

import torch
from torch import Tensor

_aten = torch.ops.aten


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    k, v = _repeat_heads(k, q.shape[1]), _repeat_heads(v, q.shape[1])
    kernel = _kernel(q, k, v, mask, causal)
    if kernel == "cpu":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=_additive(mask, q), scale=scale)
        return out, lse
    if kernel == "flash":
        out, lse = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]
        return out, lse
    if kernel == "efficient":
        out, lse = _aten._scaled_dot_product_efficient_attention(q, k, v, _bias(mask, q, k), True, 0.0, causal, scale=scale)[:2]
        return out, lse[..., : q.shape[2]]
    scores = _scores(q, k, mask, causal, scale)
    lse = _finite(torch.logsumexp(scores, -1))
    p = torch.exp(scores - lse[..., None])
    return torch.matmul(p, v.to(p.dtype)).to(q.dtype), lse


def paged_attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, window: int, softcap: float) -> Tensor:
    """q [t, h, d], k [t, h / group, d], v [t, h / group, e]: the tokens of one sequence from its start, nothing in the cache before. A token sees
    what came before it, of that the last ``window`` where that is not 0; ``sinks`` [h] are one more logit in each softmax. What the runtime calls
    has many sequences and their caches (``deepseed.inference``)."""
    k, v = k.repeat_interleave(q.shape[1] // k.shape[1], 1), v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = torch.einsum("shd,thd->hst", q.to(wide), k.to(wide)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    at = torch.arange(len(q), device=q.device)
    unseen = at > at[:, None]
    if window:
        unseen |= at <= at[:, None] - window
    scores = scores.masked_fill(unseen, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(wide)[:, None, None].expand(-1, len(q), 1)], -1)
    return torch.einsum("hst,the->she", torch.softmax(scores, -1)[..., : len(q)], v.to(wide)).to(q.dtype)


def sdpa_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    heads = k.shape[1]
    k, v = _repeat_heads(k, q.shape[1]), _repeat_heads(v, q.shape[1])
    kernel = _kernel(q, k, v, mask, causal)
    if kernel == "cpu":
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            g, q, k, v, out if out.stride(-1) == 1 else out.contiguous(), lse.contiguous(), 0.0, causal, attn_mask=_additive(mask, q), scale=scale
        )
    elif kernel == "flash":
        unused = torch.empty((), dtype=torch.int64, device=q.device)  # the generator's state: no dropout
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_backward(
            g, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, causal, unused, unused, scale=scale
        )
    elif kernel == "efficient":
        unused = torch.empty((), dtype=torch.int64, device=q.device)
        rows = -(-q.shape[2] // 32) * 32  # the kernel stores its logsumexp in whole tiles
        tiles = torch.nn.functional.pad(lse, (0, rows - q.shape[2]), value=float("inf"))
        dq, dk, dv, _ = _aten._scaled_dot_product_efficient_attention_backward(
            g, q, k, v, _bias(mask, q, k), out, tiles, unused, unused, 0.0, [True, True, True, False], causal, scale=scale
        )
    else:
        wide = lse.dtype
        p = torch.exp(_scores(q, k, mask, causal, scale) - lse[..., None])
        g, out, full_v = g.to(wide), out.to(wide), v.to(wide)
        dv = torch.matmul(p.mT, g).to(v.dtype)
        ds = p * (torch.matmul(g, full_v.mT) - (g * out).sum(-1, keepdim=True)) * scale
        dq = torch.matmul(ds, k.to(wide)).to(q.dtype)
        dk = torch.matmul(ds.mT, q.to(wide)).to(k.dtype)
    return dq, _sum_heads(dk, heads), _sum_heads(dv, heads)


def _kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> str:
    """"cpu", "flash", "efficient", or "math"."""
    if (mask is not None and causal) or 0 in q.shape or 0 in k.shape or q.shape[-1] != v.shape[-1]:
        return "math"
    if q.device.type == "cpu":
        dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        return "cpu" if q.dtype in dtypes and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1 else "math"
    if q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16, torch.float32) and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1:
        square = not causal or q.shape[2] == k.shape[2]
        if mask is None and square and q.dtype is not torch.float32 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256:
            return "flash"
        if square and q.shape[-1] % 8 == 0:
            return "efficient"
    return "math"


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    scores = torch.matmul(q.to(wide), k.to(wide).mT) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype is torch.bool else scores + mask
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~seen, float("-inf"))
    return scores


def _finite(lse: Tensor) -> Tensor:
    """0 for a row without a key, as the kernels have it."""
    return torch.where(lse == float("-inf"), 0.0, lse)


def _additive(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """The mask as numbers to add, in q's dtype, of four dimensions."""
    if mask is None:
        return None
    if mask.dtype is torch.bool:
        zero = torch.zeros((), dtype=q.dtype, device=q.device)
        mask = torch.where(mask, zero, float("-inf"))
    mask = mask.to(q.dtype)
    return mask[(None,) * (4 - mask.dim())]


def _bias(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The additive mask, expanded, its rows padded in memory to 16 elements as the efficient kernel wants them."""
    mask = _additive(mask, q)
    if mask is None:
        return None
    t = k.shape[2]
    padded = torch.nn.functional.pad(mask.expand(*mask.shape[:-1], t), (0, -t % 16))
    return padded[..., :t].expand(q.shape[0], q.shape[1], q.shape[2], t)


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Each of x's heads ``heads / x.shape[1]`` times, as repeat_interleave."""
    b, h, t, d = x.shape
    return x if h == heads else x[:, :, None].expand(b, h, heads // h, t, d).reshape(b, heads, t, d)


def _sum_heads(x: Tensor, heads: int) -> Tensor:
    b, h, t, d = x.shape
    return x if h == heads else x.view(b, heads, h // heads, t, d).sum(2)
