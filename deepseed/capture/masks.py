"""Attention masks that depend on constants only are what they say: causal, or nothing.

Under tracing a model builds its causal mask from positions, op by op, where eager PyTorch passes ``is_causal``. Such a mask has
no input above it, so it is computed once here; if it allows exactly the keys up to each query the op becomes causal, if it
allows all it goes. A kernel for causal attention skips half the work and needs no [s, t] tensor.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from deepseed import ops
from deepseed.ir.program import Op, Output, Program, Ref

LARGEST = 2**26  # elements of a mask that is worth computing to look at it
MASKED = {"sdpa": 3, "sdpa_backward": 4}  # position of the mask among the arguments


def name_constant_masks(p: Program) -> Program:
    """``sdpa(q, k, v, mask)`` as ``sdpa(q, k, v, none, causal=true)`` where the mask is constant and causal.

    before: %m = aten.le.Tensor(%keys, %queries) : bool[1, 1, 8, 8]      from iota alone
            %o, %l = sdpa(%q, %k, %v, %m, causal=false, scale=0.5)
    after:  %o, %l = sdpa(%q, %k, %v, none, causal=true, scale=0.5)
    """
    constant = _constants(p)
    kinds: dict[str, str | None] = {}
    new: list[Op] = []
    for op in p.ops:
        at = MASKED.get(op.target)
        mask = op.args[at] if at is not None and len(op.args) > at else None
        if at is not None and isinstance(mask, Ref) and mask.name in constant and not op.kw("causal", False):
            if mask.name not in kinds:
                kinds[mask.name] = _kind(p, mask.name, constant)
            if kinds[mask.name] is not None:
                kwargs = tuple((k, kinds[mask.name] == "causal" if k == "causal" else v) for k, v in op.kwargs)
                op = replace(op, args=(*op.args[:at], None, *op.args[at + 1 :]), kwargs=kwargs)
        new.append(op)
    return replace(p, ops=tuple(new))


def _constants(p: Program) -> frozenset[str]:
    """Values with no input above them."""
    found: set[str] = set()
    for op in p.ops:
        if all(r.name in found for r in op.refs):
            found.update(op.results)
    return frozenset(found)


def _kind(p: Program, mask: str, constant: frozenset[str]) -> str | None:
    """``causal``, ``all``, or None: another mask, or one too large to look at."""
    t = p.types[mask]
    if t.numel > LARGEST or len(t.shape) < 2 or t.shape[-1] != t.shape[-2]:
        return None
    needed, kept = {mask}, []
    for op in reversed(p.ops):
        if needed.intersection(op.results):
            kept.append(op)
            needed.update(r.name for r in op.refs)
    part = replace(p, inputs=(), ops=tuple(reversed(kept)), outputs=(Output(Ref(mask), "output", "mask"),), origins=())
    (value,) = ops.evaluate(part, {}).values()
    allowed: Tensor = value if value.dtype is torch.bool else value == 0
    if value.dtype is not torch.bool and bool(((value != 0) & (value > torch.finfo(value.dtype).min)).any()):
        return None  # a bias, not a mask
    if bool(allowed.all()):
        return "all"
    return "causal" if bool((allowed == torch.ones(t.shape[-2:], dtype=torch.bool).tril()).all()) else None
