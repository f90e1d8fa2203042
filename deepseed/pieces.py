"""A tensor of the model as it lies in files: whole, or in pieces that are stacked and joined; any box of it is found there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from deepseed.hf_names import Made
from deepseed.runtime.folder import CheckpointError
from deepseed.runtime.safetensors import Stored
from deepseed.runtime.saved import Box, Ints, common


@dataclass(frozen=True)
class Piece:
    """A tensor in a file as a part of one of the model's, in which it begins at ``at``; ``stacked``: the dimension of which it is one index."""

    stored: Stored
    at: Ints
    stacked: int | None = None

    @property
    def sizes(self) -> Ints:
        own = self.stored.shape
        return own if self.stacked is None else (*own[: self.stacked], 1, *own[self.stacked :])

    def meets(self, box: Box) -> Box | None:
        """What it has of a box of the model's tensor: None where they do not meet."""
        if (met := common(box, self.at, self.sizes)) is None:
            return None
        at, sizes = met
        return Box(at, tuple(a - b + c for a, b, c in zip(at, box.at, box.local, strict=True)), sizes)

    def part(self, file: Tensor, box: Box) -> Tensor:
        """The values of a box that lies in it, from the bytes of the mapped file."""
        here = tuple(a - b for d, (a, b) in enumerate(zip(box.at, self.at, strict=True)) if d != self.stacked)
        got = self.stored.part(file, Box(here, (), tuple(n for d, n in enumerate(box.sizes) if d != self.stacked)))
        return got if self.stacked is None else got.unsqueeze(self.stacked)


@dataclass(frozen=True)
class Source:
    """Where a tensor of the model is in the files: whole under one name, or in pieces."""

    names: Sequence[str]
    pieces: Sequence[Piece]

    @staticmethod
    def whole(name: str, stored: Stored) -> Source:
        """A tensor that is as it is in the file."""
        return Source([name], [Piece(stored, (0,) * len(stored.shape))])

    @staticmethod
    def made(name: str, made: Made, files: Mapping[str, Stored]) -> Source:
        """The tensor ``name`` of the model as tensors of the files that are stacked and joined. Raises CheckpointError where these do not fit together."""
        pieces: list[Piece] = []
        start = 0
        for group in made.groups:
            for index, part in enumerate(group):
                one = Piece(files[part], (), made.stack)
                at = [0] * len(one.sizes)
                if made.stack is not None:
                    at[made.stack] = index
                if made.join is not None:
                    at[made.join] += start
                pieces.append(replace(one, at=tuple(at)))
            start += pieces[-1].sizes[made.join] if made.join is not None else 0
        source = Source([part for group in made.groups for part in group], pieces)
        if sum(prod(p.sizes) for p in pieces) != prod(source.shape):
            raise CheckpointError(f"{name} is made of {len(pieces)} tensors that do not fit together, such as {source.names[0]} {list(pieces[0].stored.shape)}")
        return source

    @property
    def dtype(self) -> torch.dtype:
        return self.pieces[0].stored.dtype

    @property
    def shape(self) -> Ints:
        """As far as the pieces reach."""
        ends = [[a + n for a, n in zip(p.at, p.sizes, strict=True)] for p in self.pieces]
        return tuple(map(max, zip(*ends, strict=True)))
