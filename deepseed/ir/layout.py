"""How one global tensor lies on the mesh: one element per axis.

An axis either replicates the tensor, splits one of its dimensions, or holds partial values that are still to be reduced.
``Split(dim, outer)`` sees dimension ``dim`` as ``(outer, rest)`` and splits ``rest``: ``Split(0)`` is plain sharding,
``Split(0, 3)`` shards each of three fused blocks. Where the ranks do not divide it, ``Split(dim, outer, of)`` sees the dimension
as ``(outer, of, rest)`` and cuts ``of`` as ``torch.chunk`` does, and DTensor: all ranks hold the same number but the last, which
hold fewer or none. A rank's part is the intersection over the axes, hence two axes may share a dimension only in disjoint
ranges of it (``check``).

Text of a dimension: a product of factors, each split over its axes, major first:
``11008@(tp,dp)``, ``3*768@tp``, ``8@dp*2@tp``; ``50257@tp`` and ``3@tp*64`` (three heads of 64) are uneven over two ranks. Partial
values stand behind the type: ``sum@tp``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod

from deepseed.ir.mesh import Mesh


class LayoutError(ValueError):
    """A layout that does not fit its shape or mesh."""


@dataclass(frozen=True, order=True)
class Split:
    dim: int
    outer: int = 1
    of: int = 0  # the factor that is cut unevenly; 0: an even split


@dataclass(frozen=True, order=True)
class Partial:
    op: str = "sum"  # "sum" or "max"


@dataclass(frozen=True, order=True)
class Owned(Partial):
    """A sum of which each row (of dimension ``dim``) has one summand: the ids ``key`` say which rank owns it, the others hold zeros.

    An id i belongs to the rank with the i-th of ``of`` numbers, where each rank has a contiguous range of them. It is a ``Partial`` and
    may be used as one; beyond that, an op that makes zeros of zeros may be applied to it (deepseed.rules.owned)."""

    dim: int = 0
    key: str = ""  # name of the value of the ids, before it was moved
    of: int = 0


Element = Split | Partial | None  # None: replicate


def weaker(have: Element, want: Element) -> bool:
    """Whether ``have`` may be read as ``want`` as it lies: one summand a row is a sum."""
    return have == want or (isinstance(have, Owned) and want == Partial("sum"))


def routes(have: Element, want: Element) -> Owned | None:
    """How rows are owned, where the move between two elements is one between their split and their owners; None for any other move."""
    split, own = (have, want) if isinstance(want, Owned) else (want, have)
    return own if isinstance(own, Owned) and isinstance(split, Split) and split.dim == own.dim and not split.of else None


@dataclass(frozen=True)
class Layout:
    """The element of each axis that does not replicate, sorted by axis name. ``Layout.of(tp=Split(0))``."""

    elements: tuple[tuple[str, Split | Partial], ...] = ()
    _hash: int = field(init=False, repr=False, compare=False, default=0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash(self.elements))

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[object, ...]:
        return Layout, (self.elements,)  # hashes differ from process to process

    @staticmethod
    def of(**elements: Element) -> Layout:
        return Layout(tuple(sorted((axis, e) for axis, e in elements.items() if e is not None)))

    def on(self, axis: str) -> Element:
        for name, element in self.elements:
            if name == axis:
                return element
        return None

    def with_(self, axis: str, element: Element) -> Layout:
        rest = [(a, e) for a, e in self.elements if a != axis]
        if element is not None:
            rest.append((axis, element))
        return Layout(tuple(sorted(rest, key=lambda pair: pair[0])))

    def splits(self, dim: int) -> tuple[tuple[str, Split], ...]:
        """(axis, element) of the axes that split ``dim``, outermost first."""
        found = [(a, e) for a, e in self.elements if isinstance(e, Split) and e.dim == dim]
        return tuple(sorted(found, key=lambda pair: pair[1]))

    @property
    def partials(self) -> tuple[tuple[str, str], ...]:
        """(axis, "sum" | "max") of the axes over which values are still to be reduced."""
        return tuple((a, e.op) for a, e in self.elements if isinstance(e, Partial))


REPLICATED = Layout()


@lru_cache(maxsize=65536)
def factors(size: int, dim: int, layout: Layout, mesh: Mesh) -> tuple[tuple[int, str | None], ...]:
    """A dimension as the product of its factors, major first: ``((3, None), (4, "tp"), (192, None))`` for ``3*768@tp``.

    A rank of an axis of n holds one index of a factor of n (an even split), or its chunk of a factor that n does not divide.
    Raises LayoutError where the axes overlap or do not divide the dimension.
    """
    out: list[tuple[int, str | None]] = []
    done = 1
    for axis, split in sorted(layout.splits(dim), key=lambda pair: (pair[1].outer, pair[1].of or mesh.size(pair[0]))):
        n, outer = mesh.size(axis), split.outer
        if outer % done:
            raise LayoutError(f"dimension {dim} of size {size}: {axis} splits it inside another axis's range (outer {outer}, {done} taken)")
        if split.of and (split.of < 2 or split.of % n == 0):
            raise LayoutError(f"dimension {dim} of size {size}: {axis}={n} divides {split.of}, which is called an uneven factor")
        if outer > done:
            out.append((outer // done, None))
        out.append((split.of or n, axis))
        done = outer * (split.of or n)
        if size % done:
            raise LayoutError(f"dimension {dim}: {size} is not a multiple of {done} ({axis}={n}{f', {outer} blocks' if outer > 1 else ''}; {size} = {done} * {size // done} + {size % done})")
    if size != done or not out:
        out.append((size // done, None))
    return tuple(out)


def check(shape: Sequence[int], layout: Layout, mesh: Mesh) -> None:
    """Raise LayoutError unless every axis exists, every dimension exists and divides, and no two axes overlap."""
    for axis, element in layout.elements:
        if axis not in mesh.sizes:
            raise LayoutError(f"{mesh} has no axis {axis!r}")
        if isinstance(element, Split):
            if not 0 <= element.dim < len(shape) or element.outer < 1:
                raise LayoutError(f"{axis} splits dimension {element.dim} (outer {element.outer}) of a tensor of {len(shape)} dimensions")
        elif isinstance(element, Owned) and not 0 <= element.dim < len(shape):
            raise LayoutError(f"{axis} owns rows of dimension {element.dim} of a tensor of {len(shape)} dimensions")
        elif element.op not in ("sum", "max"):
            raise LayoutError(f"{axis}: unknown reduction {element.op!r}")
    for dim, size in enumerate(shape):
        factors(size, dim, layout, mesh)


def valid(shape: Sequence[int], layout: Layout, mesh: Mesh) -> bool:
    try:
        check(shape, layout, mesh)
    except LayoutError:
        return False
    return True


def chunk(size: int, n: int, i: int) -> range:
    """The indices of a factor that rank ``i`` of ``n`` holds, by the rule of ``torch.chunk``."""
    each = -(-size // n)
    return range(min(i * each, size), min((i + 1) * each, size))


def part(size: int, axis: str | None, mesh: Mesh) -> int:
    """How many indices of one factor a rank holds: the rank at ``mesh.at``, or the one with the most."""
    if axis is None:
        return size
    return len(chunk(size, mesh.size(axis), dict(mesh.at).get(axis, 0)))


@lru_cache(maxsize=65536)
def local_shape(shape: tuple[int, ...], layout: Layout, mesh: Mesh) -> tuple[int, ...]:
    """The shape of one rank's part: of the rank at ``mesh.at``, or of the largest part."""
    return tuple(
        _product(part(n, axis, mesh) for n, axis in factors(size, dim, layout, mesh)) if size else 0
        for dim, size in enumerate(shape)
    )


def local_indices(size: int, dim: int, layout: Layout, mesh: Mesh, coordinate: Mapping[str, int]) -> list[int]:
    """The global indices of ``dim`` that the rank at ``coordinate`` holds, in its local order."""
    indices = [0]
    for n, axis in factors(size, dim, layout, mesh):
        taken = range(n) if axis is None else chunk(n, mesh.size(axis), coordinate[axis])
        indices = [i * n + j for i in indices for j in taken]
    return indices


def format_dim(size: int, dim: int, layout: Layout, mesh: Mesh) -> str:
    groups: list[tuple[int, list[str]]] = []  # (size of the printed factor, its axes)
    for n, axis in factors(size, dim, layout, mesh):
        even = bool(groups) and bool(groups[-1][1]) and groups[-1][0] % mesh.size(groups[-1][1][0]) == 0
        if axis is None and even:
            groups[-1] = (groups[-1][0] * n, groups[-1][1])
        elif axis is not None and even and n == mesh.size(axis) and groups[-1][0] == _product(mesh.size(a) for a in groups[-1][1]):
            groups[-1] = (groups[-1][0] * n, [*groups[-1][1], axis])
        else:
            groups.append((n, [axis] if axis is not None else []))
    return "*".join(str(n) + _axes(axes) for n, axes in groups)


def parse_dim(text: str, dim: int, mesh: Mesh) -> tuple[int, dict[str, Split]]:
    """``3*768@tp`` as dimension ``dim`` -> its size, and the element of each axis."""
    size = 1
    found: dict[str, Split] = {}
    for factor in text.split("*"):
        number, _, names = factor.partition("@")
        outer, n = size, int(number)
        for axis in [name for name in names.strip("()").split(",") if name]:
            ranks = mesh.sizes.get(axis, 1)  # an axis that the mesh lacks is the verifier's to refuse
            found[axis] = Split(dim, outer, n if names == axis and n % ranks else 0)
            outer *= ranks
        size *= n
    return size, found


def _axes(axes: Sequence[str]) -> str:
    return "" if not axes else f"@{axes[0]}" if len(axes) == 1 else f"@({','.join(axes)})"


def _product(numbers: Iterator[int] | Sequence[int]) -> int:
    out = 1
    for n in numbers:
        out *= n
    return out


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a tensor that lies row by row."""
    return tuple(prod(max(n, 1) for n in shape[d + 1 :]) for d in range(len(shape)))
