"""Readable Triton source of paged attention, for decodes and chunks of prompts alike.

    source(Attention(shares=3, width=64, ..)) -> a Python file:   @triton.jit def paged(..): ..      def launch(q, keys, values, table, lengths, starts, tiles, sinks) -> (out,)
    writes(Attention(shares=3, width=64, ..)) -> another:         @triton.jit def put(..): ..        def launch(k, v, keys, values, slots) -> ()

A program computes a tile: some new tokens of one sequence, with all query heads of one kv head, as the rows of its products. It walks over the pages that
the tile sees and keeps a running maximum and sum (online softmax). ``tiles`` [n, 2]: sequence, and its first new token in the tile, counted from its own.
What deepseed.inference.paged says of shapes holds here. New keys and values
are in their pages before: ``put`` copies some tokens of one kv head a program.
"""

from __future__ import annotations

from dataclasses import dataclass

POINTERS = {"f32": "fp32", "f16": "fp16", "bf16": "bf16"}
ROWS = 16  # of a product, at least
TILE = 64  # rows that a tile may have
PUT = 16  # tokens that a program puts into pages


@dataclass(frozen=True)
class Attention:
    """``shares``: query heads of a kv head; ``size``: tokens of a page. ``window`` and ``softcap`` 0: none."""

    shares: int
    width: int
    value_width: int
    size: int
    scale: float
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    dtype: str = "f32"

    def tokens(self, longest: int) -> int:
        """New tokens of a tile, where a sequence has at most ``longest``: a power of two."""
        return 1 << (max(1, min(longest, TILE // self.shares)).bit_length() - 1)


def source(a: Attention, tokens: int = 1) -> str:
    """The file for tiles of ``tokens`` new tokens, 1 for decodes."""
    pointer = f"*{POINTERS[a.dtype]}"
    rows = max(ROWS, 1 << (tokens * a.shares - 1).bit_length())
    wide, value_wide = (max(16, 1 << (n - 1).bit_length()) for n in (a.width, a.value_width))
    large = rows * max(wide, value_wide) >= 1 << 13  # what a program holds of its rows: more warps and fewer keys at a time, else registers spill
    keys, warps = 64 if max(wide, value_wide) <= 128 and not large else 32, 8 if large else 4
    precision = ', input_precision="ieee"' if a.dtype == "f32" else ""
    beginning = f"tl.maximum(first_position - {a.window - 1}, 0) // {keys} * {keys}" if a.window else "0"
    seen = "(at[None, :] <= position[:, None])" + (f" & (at[None, :] > position[:, None] - {a.window})" if a.window else "")
    capped = f"""
        e = tl.exp(-2.0 * tl.abs(logits * {1 / a.softcap!r}))
        logits = tl.where(logits < 0, -{a.softcap!r}, {a.softcap!r}) * (1.0 - e) / (1.0 + e)""" if a.softcap else ""  # fmt: skip
    most, total = ('tl.full([ROWS], float("-inf"), tl.float32)', "tl.zeros([ROWS], tl.float32)") if not a.sinks else (
        f"tl.load(sinks + head * {a.shares} + share, mask=real, other=0.0).to(tl.float32)", "tl.full([ROWS], 1.0, tl.float32)"
    )  # fmt: skip
    return f'''"""Generated, see deepseed/codegen/triton_paged.py: {a}, {tokens} tokens a tile."""

import torch
import triton
import triton.language as tl

ROWS: tl.constexpr = tl.constexpr({rows})


@triton.jit
def paged(q, q_s0, q_s1, q_s2, keys, values, table, lengths, starts, tiles, sinks, out, held, pages, longest):
    sequence = tl.load(tiles + 2 * tl.program_id(0))
    first = tl.load(tiles + 2 * tl.program_id(0) + 1)
    head = tl.program_id(1).to(tl.int64)
    begin = tl.load(starts + sequence)
    new = tl.load(starts + sequence + 1) - begin
    length = tl.load(lengths + sequence)
    row = tl.arange(0, ROWS)
    token = first + row // {a.shares}
    share = row % {a.shares}
    real = (row < {tokens * a.shares}) & (token < new)
    first_position = length - new + first
    position = length - new + token
    where = (begin + token) * (held * {a.shares}) + head * {a.shares} + share
    d = tl.arange(0, {wide})
    v = tl.arange(0, {value_wide})
    query = tl.load(q + (begin + token)[:, None] * q_s0 + (head * {a.shares} + share)[:, None] * q_s1 + d[None, :] * q_s2, mask=real[:, None] & (d < {a.width})[None, :], other=0.0)
    most = {most}
    total = {total}
    made = tl.zeros([ROWS, {value_wide}], tl.float32)
    end = tl.minimum(first_position + {tokens}, length)
    for base in range({beginning}, end, {keys}):
        at = base + tl.arange(0, {keys})
        there = at < end
        page = tl.load(table + sequence * longest + at // {a.size}, mask=there, other=0)
        place = (head * pages + page) * {a.size} + at % {a.size}
        key = tl.load(keys + place[None, :] * {a.width} + d[:, None], mask=there[None, :] & (d < {a.width})[:, None], other=0.0)
        logits = tl.dot(query, key{precision}) * {a.scale!r}{capped}
        logits = tl.where({seen} & there[None, :] & real[:, None], logits, float("-inf"))
        higher = tl.maximum(most, tl.max(logits, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(logits - safe[:, None])
        before = tl.exp(most - safe)
        worth = tl.load(values + place[:, None] * {a.value_width} + v[None, :], mask=there[:, None] & (v < {a.value_width})[None, :], other=0.0)
        made = made * before[:, None] + tl.dot(weights.to(worth.dtype), worth{precision})
        total = total * before + tl.sum(weights, 1)
        most = higher
    made = made / tl.where(real, total, 1.0)[:, None]
    tl.store(out + where[:, None] * {a.value_width} + v[None, :], made.to(out.dtype.element_ty), mask=real[:, None] & (v < {a.value_width})[None, :])


KERNELS = {{  # types of the parameters, block sizes, warps
    "paged": ({{"q": "{pointer}", "q_s0": "i64", "q_s1": "i64", "q_s2": 1, "keys": "{pointer}", "values": "{pointer}", "table": "*i64", "lengths": "*i64", "starts": "*i64", "tiles": "*i64", "sinks": "{pointer}", "out": "{pointer}", "held": "i32", "pages": "i32", "longest": "i32"}}, {warps}),
}}


def launch(q, keys, values, table, lengths, starts, tiles, sinks):
    out = torch.empty(q.shape[0], q.shape[1], {a.value_width}, dtype=q.dtype, device=q.device)
    paged[(tiles.shape[0], keys.shape[0])](q, q.stride(0), q.stride(1), q.stride(2), keys, values, table, lengths, starts, tiles, sinks, out, keys.shape[0], keys.shape[1], table.shape[1], num_warps={warps})
    return (out,)
'''


def writes(a: Attention) -> str:
    """The file that puts new keys and values into their pages."""
    pointer = f"*{POINTERS[a.dtype]}"
    wide, value_wide = (max(16, 1 << (n - 1).bit_length()) for n in (a.width, a.value_width))
    parts = []
    for x, to, axis, size, block in (("k", "keys", "d", a.width, wide), ("v", "values", "e", a.value_width, value_wide)):
        mask = "there[:, None]" + (f" & ({axis} < {size})[None, :]" if size != block else "")
        parts.append(f"""    {axis} = tl.arange(0, {block})
    {x}_ = tl.load({x} + at[:, None] * {x}_s0 + head * {x}_s1 + {axis}[None, :] * {x}_s2, mask={mask}, other=0.0)
    tl.store({to} + (head * room + slot)[:, None] * {size} + {axis}[None, :], {x}_, mask={mask})""")
    body = "\n".join(parts)
    return f'''"""Generated, see deepseed/codegen/triton_paged.py: {a}."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def put(k, k_s0, k_s1, k_s2, v, v_s0, v_s1, v_s2, keys, values, slots, room, tokens):
    at = tl.program_id(0).to(tl.int64) * {PUT} + tl.arange(0, {PUT})
    head = tl.program_id(1).to(tl.int64)
    there = at < tokens
    slot = tl.load(slots + at, mask=there, other=0)
{body}


KERNELS = {{  # types of the parameters, block sizes, warps
    "put": ({{"k": "{pointer}", "k_s0": "i64", "k_s1": "i64", "k_s2": 1, "v": "{pointer}", "v_s0": "i64", "v_s1": "i64", "v_s2": 1, "keys": "{pointer}", "values": "{pointer}", "slots": "*i64", "room": "i32", "tokens": "i32"}}, 4),
}}


def launch(k, v, keys, values, slots):
    put[(triton.cdiv(k.shape[0], {PUT}), k.shape[1])](k, k.stride(0), k.stride(1), k.stride(2), v, v.stride(0), v.stride(1), v.stride(2), keys, values, slots, keys.shape[1] * keys.shape[2], k.shape[0], num_warps=4)
    return ()
'''
