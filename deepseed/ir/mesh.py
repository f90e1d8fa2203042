"""Named axes and their sizes; a rank is a point of the mesh.

Axes are listed major first: rank = row-major index of the coordinate, so the last axis has neighbouring ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod


class MeshError(ValueError):
    """A mesh with a bad axis, or a question about an axis that it does not have."""


@dataclass(frozen=True)
class Mesh:
    """``Mesh((("dp", 2), ("tp", 4)))``: 8 ranks; rank 5 lies at dp=1, tp=1.

    ``at``: the coordinate from which one rank sees the mesh. Local shapes are then that rank's own: parts of an uneven
    dimension differ from rank to rank. Without it they are those of the largest part."""

    axes: tuple[tuple[str, int], ...] = ()
    at: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        names = [name for name, _ in self.axes]
        if len(set(names)) != len(names):
            raise MeshError(f"axis named twice in {self}")
        for name, size in self.axes:
            if not name.isidentifier() or size < 1:
                raise MeshError(f"axis {name}={size}: a name and a size of at least 1 are needed")
        if self.at and ([a for a, _ in self.at] != names or any(not 0 <= i < n for (_, i), (_, n) in zip(self.at, self.axes, strict=True))):
            raise MeshError(f"{self}: a point of the mesh has one position on each axis, in their order, below its size")

    def __str__(self) -> str:
        def listed(pairs: tuple[tuple[str, int], ...]) -> str:
            return "(" + ", ".join(f"{name}={n}" for name, n in pairs) + ")"

        return f"mesh{listed(self.axes)}" + (f" at{listed(self.at)}" if self.at else "")

    def seen_from(self, coordinate: Mapping[str, int]) -> Mesh:
        """The mesh as the rank at ``coordinate`` sees it."""
        return replace(self, at=tuple((name, coordinate[name]) for name in self.names))

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        return dict(self.axes)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.axes)

    @property
    def ranks(self) -> int:
        return prod(size for _, size in self.axes)

    def size(self, axis: str) -> int:
        if axis not in self.sizes:
            raise MeshError(f"{self} has no axis {axis!r}")
        return self.sizes[axis]

    def coordinate(self, rank: int) -> dict[str, int]:
        """Where a rank lies: ``{"dp": 1, "tp": 1}``."""
        if not 0 <= rank < self.ranks:
            raise MeshError(f"rank {rank} is not in {self} ({self.ranks} ranks)")
        where: dict[str, int] = {}
        for name, size in reversed(self.axes):
            rank, where[name] = divmod(rank, size)
        return {name: where[name] for name in self.names}

    def rank(self, coordinate: Mapping[str, int]) -> int:
        rank = 0
        for name, size in self.axes:
            rank = rank * size + coordinate[name]
        return rank

    def group(self, axis: str, rank: int) -> tuple[int, ...]:
        """The ranks that differ from ``rank`` along ``axis`` only, in the axis's order."""
        where = self.coordinate(rank)
        return tuple(self.rank({**where, axis: i}) for i in range(self.size(axis)))
