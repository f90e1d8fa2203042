"""A step of the scheduler as plain numbers, which can travel to other ranks, and these as tensors: tokens of all sequences one after another, no padding."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from deepseed.inference.attention import Packing
from deepseed.inference.scheduler import Step


@dataclass(frozen=True)
class Plain:
    """Of each sequence its blocks, length, number of new tokens, and of how many of these, the last ones, the logits are wanted; all new tokens; blocks to copy before."""

    tables: Sequence[Sequence[int]]
    lengths: Sequence[int]
    news: Sequence[int]
    wanted: Sequence[int]
    ids: Sequence[int]
    copies: Sequence[Sequence[int]]

    @classmethod
    def of(cls, step: Step, size: int) -> Plain:
        """``size``: tokens of a block."""
        ends = [p.begin + p.count for p in step.pieces]
        return cls(
            [p.sequence.blocks[: -(-end // size)] for p, end in zip(step.pieces, ends, strict=True)], ends, [p.count for p in step.pieces], [p.wanted for p in step.pieces],
            [t for p in step.pieces for t in p.tokens], step.copies,
        )  # fmt: skip

    def text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Plain:
        return cls(**json.loads(text))

    def copy(self, caches: Sequence[Tensor], device: torch.device) -> None:
        """Blocks that a sequence is about to write into and others still hold."""
        if self.copies:
            old, new = (torch.tensor(x, device=device) for x in zip(*self.copies, strict=True))
            for cache in caches:
                cache.index_copy_(1, new, cache.index_select(1, old))


@dataclass(frozen=True)
class Packed:
    """ids and positions [tokens]; ``last`` [wanted]: the tokens whose logits are wanted."""

    ids: Tensor
    positions: Tensor
    last: Tensor
    packing: Packing


def pack(step: Plain, size: int, device: torch.device) -> Packed:
    lengths, news = np.array(step.lengths), np.array(step.news)
    ends = np.cumsum(news)
    positions = np.arange(ends[-1]) + np.repeat(lengths - ends, news)
    held = np.concatenate([np.array(t, dtype=np.int64)[np.arange(n - new, n) // size] for t, n, new in zip(step.tables, step.lengths, step.news, strict=True)])
    wanted = np.array(step.wanted)
    last = np.arange(wanted.sum()) + np.repeat(ends - np.cumsum(wanted), wanted)
    each = (np.array(step.ids, dtype=np.int64), positions, last, held * size + positions % size)
    ids, at, last, slots = (torch.from_numpy(x).to(device) for x in each)
    return Packed(ids, at, last, Packing(step.tables, step.lengths, step.news, size, slots, device))
