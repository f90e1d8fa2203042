"""Rectangles of a global tensor: cut into pieces, and where two of them meet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from torch import Tensor

LARGEST = 64 * 2**20  # bytes of a box in a file: reading a corner of it costs at most that
Ints = tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """A rectangle of a global tensor: where it starts there (``at``) and in the rank's own part (``local``), and its sizes."""

    at: Ints
    local: Ints
    sizes: Ints

    def of(self, part: Tensor) -> Tensor:
        """The view of it in a rank's part."""
        return part[tuple(slice(i, i + n) for i, n in zip(self.local, self.sizes, strict=True))]


def cut(box: Box, itemsize: int, largest: int = LARGEST) -> Iterator[Box]:
    """A box in pieces of at most ``largest`` bytes, along its first dimensions."""
    if not box.sizes or prod(box.sizes) * itemsize <= largest:
        yield box
        return
    dim = next(d for d, n in enumerate(box.sizes) if n > 1)
    rows = max(1, largest * box.sizes[dim] // (prod(box.sizes) * itemsize))
    for start in range(0, box.sizes[dim], rows):
        moved = [tuple(i + start if d == dim else i for d, i in enumerate(place)) for place in (box.at, box.local)]
        sizes = tuple(min(rows, n - start) if d == dim else n for d, n in enumerate(box.sizes))
        yield from cut(Box(moved[0], moved[1], sizes), itemsize, largest)


def common(box: Box, start: Ints, sizes: Ints) -> tuple[Ints, Ints] | None:
    """Where a box meets another one of its tensor, which begins at ``start``: start and sizes."""
    at = tuple(map(max, box.at, start))
    end = tuple(min(a + n, b + m) for a, n, b, m in zip(box.at, box.sizes, start, sizes, strict=True))
    both = tuple(e - a for a, e in zip(at, end, strict=True))
    return (at, both) if all(n > 0 for n in both) else None
