"""Named axes and their sizes; a rank is a point of the mesh.

Axes are listed major first: rank = row-major index of the coordinate, so the last axis has neighbouring ranks. An axis may be
given as sub-axes, ``tp=4`` as ``tp_0=2, tp_1=2``: the same ranks in the same order, and ``tp`` still names them together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod

TIME = "mb"  # the axis whose points run one after another: microbatches
STAGES = "pp"  # the axis of ranks on which no tensor is laid out: each of its ranks runs other ops


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
        return Mesh(self.axes, tuple([(name, coordinate[name]) for name, _ in self.axes]))

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
        return self.sizes[axis] if axis in self.sizes else prod(self.sizes[part] for part in self.parts(axis))

    def parts(self, axis: str) -> tuple[str, ...]:
        """The axes that ``axis`` names: itself, or its sub-axes."""
        found = (axis,) if axis in self.sizes else tuple(name for name in self.names if name != axis and whole_axis(name) == axis)
        if not found:
            raise MeshError(f"{self} has no axis {axis!r}")
        return found

    def refined(self, axis: str, sizes: Sequence[int]) -> Mesh:
        """The same ranks with ``axis`` as sub-axes of these sizes, major first."""
        if prod(sizes) != self.size(axis):
            raise MeshError(f"{axis}={self.size(axis)} is not {' x '.join(map(str, sizes))}")
        subs = tuple((f"{axis}_{k}", n) for k, n in enumerate(sizes))
        return Mesh(tuple(pair for name, n in self.axes for pair in (subs if name == axis else ((name, n),))))

    def together(self, axis: str) -> Mesh:
        """The inverse of ``refined``."""
        parts = self.parts(axis)
        whole = Mesh(tuple((axis, self.size(axis)) if name == parts[0] else (name, n) for name, n in self.axes if name not in parts[1:]))
        if not self.at:
            return whole
        where = dict(self.at)
        return whole.seen_from({**where, axis: self.position(axis, where)})

    def without(self, *axes: str) -> Mesh:
        """The mesh of the other axes."""
        return Mesh(tuple(pair for pair in self.axes if pair[0] not in axes), tuple(pair for pair in self.at if pair[0] not in axes))

    def coordinate(self, rank: int) -> dict[str, int]:
        """Where a rank lies: ``{"dp": 1, "tp": 1}``."""
        if not 0 <= rank < self.ranks:
            raise MeshError(f"rank {rank} is not in {self} ({self.ranks} ranks)")
        where: dict[str, int] = {}
        for name, size in reversed(self.axes):
            rank, where[name] = divmod(rank, size)
        return {name: where[name] for name in self.names}

    def position(self, axis: str, coordinate: Mapping[str, int]) -> int:
        """Where a rank lies along ``axis``, or along all its sub-axes together."""
        out = 0
        for part in self.parts(axis):
            out = out * self.sizes[part] + coordinate[part]
        return out

    def rank(self, coordinate: Mapping[str, int]) -> int:
        rank = 0
        for name, size in self.axes:
            rank = rank * size + coordinate[name]
        return rank

    def group(self, axis: str, rank: int) -> tuple[int, ...]:
        """The ranks that differ from ``rank`` along ``axis`` only, in the axis's order."""
        where = self.coordinate(rank)
        parts = self.parts(axis)
        return tuple(self.rank({**where, **dict(zip(parts, at, strict=True))}) for at in product(*(range(self.sizes[part]) for part in parts)))


def whole_axis(name: str) -> str:
    """The axis that a sub-axis belongs to; any other axis is its own.

    >>> whole_axis("tp_1"), whole_axis("tp")
    ('tp', 'tp')
    """
    return re.sub(r"_\d+$", "", name)
