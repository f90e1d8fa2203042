"""Attention over pages: new keys and values go into the pages of a cache, and queries attend to their own sequence's pages.

A program has it as the op ``paged_attention``, once an attention layer; the runtime has the caches. A step is packed: T tokens of S sequences, one after another, no padding; a
sequence may bring one token (a decode) or many (a chunk of its prompt). ``reference`` says what it means, one sequence and one query at a time; what runs is faster
(``deepseed.inference.attention``).

    q [T, heads, width]  k [T, kv heads, width]  v [T, kv heads, value width]
    keys [kv heads, blocks, block, width]  values [kv heads, blocks, block, value width]
    blocks [S, longest] int64   the blocks of each sequence, in order     slots [T] int64   where each new token goes, block * size + offset
    context [S] int64   tokens of each sequence, the new ones included    starts [S + 1] int64   where its new tokens begin in T
"""

from __future__ import annotations

import torch
from torch import Tensor


def reference(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, blocks: Tensor, slots: Tensor, context: Tensor, starts: Tensor,
    scale: float, window: int, softcap: float, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """Loops over sequences and queries. ``window`` 0: all that came before; ``softcap`` 0: none; ``sinks`` [heads]: one more logit
    in each softmax, whose value is nothing."""
    size, group = keys.shape[2], q.shape[1] // keys.shape[0]
    write(k, v, keys, values, slots)
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    for s in range(context.shape[0]):
        begin, end, length = int(starts[s]), int(starts[s + 1]), int(context[s])
        own = blocks[s, : -(-length // size)]
        held = keys[:, own].flatten(1, 2)[:, :length].repeat_interleave(group, 0)  # heads, length, width
        worth = values[:, own].flatten(1, 2)[:, :length].repeat_interleave(group, 0)
        for t in range(begin, end):
            position = length - (end - t)
            first = max(0, position - window + 1) if window else 0
            logits = wide((held[:, first : position + 1] @ q[t, :, :, None]).squeeze(-1)) * scale
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
            if sinks is not None:
                logits = torch.cat([logits, sinks.to(logits.dtype)[:, None]], 1)
            weights = torch.softmax(logits, -1)[:, : position + 1 - first].to(q.dtype)
            out[t] = (weights[:, None] @ worth[:, first : position + 1]).squeeze(1)
    return out


def wide(x: Tensor) -> Tensor:
    """In at least float32: softmax and what comes before it."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def write(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """New keys and values into their slots."""
    keys.flatten(1, 2).index_copy_(1, slots, k.transpose(0, 1))
    values.flatten(1, 2).index_copy_(1, slots, v.transpose(0, 1))
