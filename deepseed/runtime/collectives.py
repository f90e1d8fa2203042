"""The collectives that generated source calls, on local tensors of any layout, over flat exchanges that a back end gives.

A local tensor is *cut* at (dim, outer) into the n blocks of an axis, exchanged as one contiguous [n, ...] buffer, and
*joined* at (dim, outer): dimension ``dim`` is seen as (outer, n, rest), see deepseed/ir/collective.py. An axis of size 1
sends nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseed.ir.mesh import Mesh

SMALL = 1024  # a tensor of less than this part of its bucket is copied out of it: a loss must not keep the whole buffer alive


@dataclass
class Handle:
    """A collective under way: ``complete`` blocks and gives the exchanged buffer, ``finish`` makes the result of it."""

    complete: Callable[[], Tensor]
    finish: Callable[[Tensor], Tensor]


class Runtime(ABC):
    """One rank's view of the mesh. A back end gives four flat exchanges; each starts at once and returns how to wait for it."""

    def __init__(self, mesh: Mesh, rank: int, device: torch.device | str = "cpu") -> None:
        self.mesh, self.rank, self.device = mesh, rank, torch.device(device)
        self.coordinate = mesh.coordinate(rank)

    @abstractmethod
    def exchange(self, kind: str, x: Tensor, axis: str, reduce: str, *, owned: bool = False) -> Callable[[], Tensor]:
        """Start one flat exchange of a contiguous ``x`` among the n ranks of ``axis``.

        all_gather: [...] -> [n, ...]; all_reduce: [...] -> [...]; reduce_scatter: [n, ...] -> [...];
        all_to_all: [n, ...] -> [n, ...], block i from rank i. ``reduce`` is "sum" or "max". ``x`` is not changed, unless it is ``owned``: a buffer that nobody else reads.
        """

    def all_gather_start(self, x: Tensor, axis: str, dim: int, outer: int) -> Handle:
        if self.mesh.size(axis) == 1:
            return _done(x)
        return Handle(self.exchange("all_gather", x.contiguous(), axis, ""), lambda y: join(y, dim, outer))

    def all_reduce_start(self, x: Tensor, axis: str, reduce: str = "sum") -> Handle:
        if self.mesh.size(axis) == 1:
            return _done(x)
        return Handle(self.exchange("all_reduce", x.contiguous(), axis, reduce), _same)

    def reduce_scatter_start(self, x: Tensor, axis: str, dim: int, outer: int, reduce: str = "sum") -> Handle:
        n = self.mesh.size(axis)
        if n == 1:
            return _done(x)
        return Handle(self.exchange("reduce_scatter", cut(x, n, dim, outer).contiguous(), axis, reduce), _same)

    def all_to_all_start(self, x: Tensor, axis: str, take_dim: int, take_outer: int, put_dim: int, put_outer: int) -> Handle:
        n = self.mesh.size(axis)
        if n == 1:
            return _done(x)
        blocks = cut(x, n, take_dim, take_outer).contiguous()
        return Handle(self.exchange("all_to_all", blocks, axis, ""), lambda y: join(y, put_dim, put_outer))

    def bucket_start(
        self, kind: str, xs: Sequence[Tensor], axis: str, take: Sequence[tuple[int, int]] = (), put: Sequence[tuple[int, int]] = (), reduce: str = "sum"
    ) -> list[Handle]:
        """One exchange for several tensors of one dtype, packed side by side. (dim, outer) of each: ``take``, where it is cut
        (reduce_scatter, all_to_all), ``put``, where it is joined (all_gather, all_to_all)."""
        n = self.mesh.size(axis)
        if n == 1:
            return [_done(x) for x in xs]
        if take:
            blocks = [cut(x, n, *place) for x, place in zip(xs, take, strict=True)]
            shapes = [b.shape[1:] for b in blocks]
            packed = torch.cat([b.reshape(n, -1) for b in blocks], 1)
        else:
            shapes = [x.shape for x in xs]
            packed = torch.cat([x.reshape(-1) for x in xs])
        complete = _Once(self.exchange(kind, packed, axis, reduce if kind in ("all_reduce", "reduce_scatter") else "", owned=True))
        handles, at = [], 0
        for i, shape in enumerate(shapes):
            size = shape.numel()
            if put:
                handles.append(Handle(complete, _Unpack(at, size, (n, *shape), put[i])))
            else:
                handles.append(Handle(complete, _Unpack(at, size, tuple(shape))))
            at += size
        return handles

    def wait(self, handle: Handle) -> Tensor:
        return handle.finish(handle.complete())

    def shard(self, x: Tensor, axis: str, dim: int, outer: int) -> Tensor:
        """This rank's block; a view where one exists."""
        n, i = self.mesh.size(axis), self.coordinate[axis]
        shape = list(x.shape)
        rest = shape[dim] // (outer * n)
        if outer == 1:
            return x.narrow(dim, i * rest, rest)
        return x.reshape(*shape[:dim], outer, n, rest, *shape[dim + 1 :]).select(dim + 1, i).reshape(*shape[:dim], outer * rest, *shape[dim + 1 :])

    def summand(self, x: Tensor, axis: str) -> Tensor:
        """``x`` at coordinate 0 of the axis, zeros elsewhere: they sum up to ``x``."""
        return x if self.coordinate[axis] == 0 else torch.zeros_like(x)


class _Once:
    """Waits once, and remembers."""

    def __init__(self, complete: Callable[[], Tensor]) -> None:
        self._complete: Callable[[], Tensor] | None = complete
        self._result: Tensor | None = None

    def __call__(self) -> Tensor:
        if self._complete is not None:
            self._result, self._complete = self._complete(), None
        assert self._result is not None
        return self._result


@dataclass(frozen=True)
class _Unpack:
    """One tensor's part of a packed buffer; a gathered part is joined at ``place``."""

    at: int
    size: int
    shape: tuple[int, ...]
    place: tuple[int, int] | None = None

    def __call__(self, packed: Tensor) -> Tensor:
        part = packed.narrow(-1, self.at, self.size).view(self.shape)
        if self.place is None and SMALL * self.size < packed.numel():
            return part.clone()
        return part if self.place is None else join(part, *self.place)


def cut(x: Tensor, n: int, dim: int, outer: int) -> Tensor:
    """[n, ...]: dimension ``dim`` seen as (outer, n, rest), n moved to the front. A view where one exists."""
    shape = list(x.shape)
    rest = shape[dim] // (outer * n)
    blocks = x.reshape(*shape[:dim], outer, n, rest, *shape[dim + 1 :]).movedim(dim + 1, 0)
    return blocks.reshape(n, *shape[:dim], outer * rest, *shape[dim + 1 :])


def join(blocks: Tensor, dim: int, outer: int) -> Tensor:
    """The inverse of ``cut``."""
    n, *shape = blocks.shape
    seen = blocks.reshape(n, *shape[:dim], outer, shape[dim] // outer, *shape[dim + 1 :]).movedim(0, dim + 1)
    return seen.reshape(*shape[:dim], shape[dim] * n, *shape[dim + 1 :])


def _same(x: Tensor) -> Tensor:
    return x


def _done(x: Tensor) -> Handle:
    return Handle(lambda: x, _same)
