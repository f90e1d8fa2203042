"""Where values lie in memory: places in one piece of it, given out and taken back while a source is written, and what strides say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from deepseed.ir.program import Op

ALIGNED = 64  # bytes


@dataclass
class Places:
    """``top``: bytes that are needed."""

    top: int = 0
    _holes: list[tuple[int, int]] = field(default_factory=list)  # free places, in order: begin, end

    def take(self, size: int) -> tuple[int, int]:
        """Where ``size`` bytes lie: begin and end, which ``free`` is told."""
        size = -(-max(size, 1) // ALIGNED) * ALIGNED
        hole = next(((a, b) for a, b in self._holes if b - a >= size or b == self.top), (self.top, self.top))  # the last one may grow
        begin, end = hole
        self._holes = [h for h in self._holes if h != hole] + ([(begin + size, end)] if end - begin > size else [])
        self.top = max(self.top, begin + size)
        return begin, begin + size

    def free(self, begin: int, end: int) -> None:
        joined: list[tuple[int, int]] = []
        for a, b in sorted([*self._holes, (begin, end)]):
            if joined and joined[-1][1] == a:
                joined[-1] = (joined[-1][0], b)
            else:
                joined.append((a, b))
        self._holes = joined


def offset(op: Op, strides: Sequence[int]) -> int:
    """Elements from the beginning of its operand, which has these strides, to that of a view of it."""
    return strides[int(str(op.kw("dim", 0)))] * int(str(op.kw("start", 0))) if op.target == "slice" else 0


def extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last, both counted."""
    return sum((size - 1) * s for size, s in zip(shape, strides, strict=True)) + 1


def alike(shape: Sequence[int], a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether strides mean the same: those of one element in a dimension mean nothing."""
    return all(size == 1 or x == y for size, x, y in zip(shape, a, b, strict=True))
