"""A step of the scheduler as tensors: tokens of all sequences one after another, no padding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deepseed.inference.attention import Packing
from deepseed.inference.scheduler import Step


@dataclass(frozen=True)
class Packed:
    """ids and positions [tokens]; ``last`` [wanted]: the tokens whose logits are wanted."""

    ids: Tensor
    positions: Tensor
    last: Tensor
    packing: Packing


def pack(step: Step, size: int, device: torch.device) -> Packed:
    """``size``: tokens of a block."""
    pieces = step.pieces
    begins, counts = np.array([p.begin for p in pieces]), np.array([p.count for p in pieces])
    ends = np.cumsum(counts)
    positions = np.arange(ends[-1]) + np.repeat(begins - (ends - counts), counts)
    ids = np.fromiter((t for p in pieces for t in p.sequence.tokens[p.begin : p.begin + p.count]), np.int64, int(ends[-1]))
    held = np.concatenate([np.array(p.sequence.blocks, dtype=np.int64)[np.arange(p.begin, p.begin + p.count) // size] for p in pieces])
    last = (ends - 1)[[p.wanted for p in pieces]]
    to = [torch.from_numpy(x).to(device) for x in (ids, positions, last, held * size + positions % size)]
    tables = [p.sequence.blocks[: -(-(p.begin + p.count) // size)] for p in pieces]
    return Packed(to[0], to[1], to[2], Packing(tables, (begins + counts).tolist(), counts.tolist(), size, to[3], device))
