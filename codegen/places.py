"""Places in one piece of memory, given out and taken back while a source is written: what it holds is known before it runs."""

from __future__ import annotations

from dataclasses import dataclass, field

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
