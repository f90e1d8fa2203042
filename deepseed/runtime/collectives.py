"""The collectives that generated source calls, on local tensors of any layout, over flat exchanges that a back end gives.

A local tensor is *cut* at a place into the n blocks of an axis, exchanged as one contiguous [n, ...] buffer, and *joined* at a
place. A place is (dim, outer), dimension ``dim`` seen as (outer, n, rest), or where n does not divide it (dim, outer, of, rest): the
n parts of ``of`` are those of ``torch.chunk``, padded to the largest while they travel. See deepseed/ir/collective.py. An axis of
size 1 sends nothing.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from deepseed.ir.layout import chunk
from deepseed.ir.mesh import Mesh
from deepseed.runtime.clock import Clock
from deepseed.runtime.handle import Direct, Handle, done, same
from deepseed.runtime.looks import Looks
from deepseed.runtime.memories import Memories
from deepseed.runtime.pipeline import Messages, Place

SMALL = 1024  # a tensor of less than this part of its bucket is copied out of it: a loss must not keep the whole buffer alive


class Runtime(Messages, Memories):
    """One rank's view of the mesh. A back end gives flat exchanges; each starts at once and returns how to wait for it."""

    def __init__(self, mesh: Mesh, rank: int, device: torch.device | str = "cpu") -> None:
        self.mesh, self.rank, self.device = mesh, rank, torch.device(device)
        self.coordinate = mesh.coordinate(rank)
        self.looks: Looks | Clock | None = None
        self.paged_attention: Callable[..., Tensor] = no_pages  # where a step has pages, this rank's attention over them

    def look(self, name: str, x: object, mb: int = 0) -> None:
        """A value of a program that is looked through for what is not finite, or timed."""
        if self.looks is not None:
            self.looks.look(name, x, mb)

    def look_at(self, names: Sequence[str], values: Sequence[object]) -> None:
        for name, value in zip(names, values, strict=True):
            self.look(name, value)

    def position(self, axis: str) -> int:
        """This rank's number in the group of ``axis``."""
        return self.mesh.position(axis, self.coordinate)

    @abstractmethod
    def exchange(self, kind: str, x: Tensor, axis: str, reduce: str, *, owned: bool = False) -> Callable[[], Tensor]:
        """Start one flat exchange of a contiguous ``x`` among the n ranks of ``axis``.

        all_gather: [...] -> [n, ...]; all_reduce: [...] -> [...]; reduce_scatter: [n, ...] -> [...];
        all_to_all: [n, ...] -> [n, ...], block i from rank i. ``reduce`` is "sum" or "max". ``x`` is not changed, unless it is ``owned``: a buffer that nobody else reads.
        """

    @abstractmethod
    def exchange_rows(self, x: Tensor, sends: Sequence[int], receives: Sequence[int], axis: str) -> Callable[[], Tensor]:
        """Start an exchange of rows of a contiguous ``x`` among the n ranks of ``axis``: the first ``sends[0]`` to rank 0, the next
        ``sends[1]`` to rank 1 ..; the result has ``receives[0]`` rows of rank 0, then ``receives[1]`` of rank 1 .. ``x`` is not changed."""

    def all_gather_start(self, x: Tensor, axis: str, put: Place) -> Handle:
        n = self.mesh.size(axis)
        if n == 1:
            return done(x)
        return Handle(self.exchange("all_gather", widest(x, n, put).contiguous(), axis, ""), Finish(n, self.position(axis), put=put))

    def all_reduce_start(self, x: Tensor, axis: str, reduce: str = "sum") -> Handle:
        if self.mesh.size(axis) == 1:
            return done(x)
        return Handle(self.exchange("all_reduce", x.contiguous(), axis, reduce), same)

    def reduce_scatter_start(self, x: Tensor, axis: str, take: Place, reduce: str = "sum") -> Handle:
        n = self.mesh.size(axis)
        if n == 1:
            return done(x)
        return Handle(self.exchange("reduce_scatter", cut(x, n, take).contiguous(), axis, reduce), Finish(n, self.position(axis), take))

    def all_to_all_start(self, x: Tensor, axis: str, take: Place, put: Place) -> Handle:
        n = self.mesh.size(axis)
        if n == 1:
            return done(x)
        blocks = cut(widest(x, n, put), n, take).contiguous()
        return Handle(self.exchange("all_to_all", blocks, axis, ""), Finish(n, self.position(axis), take, put))

    def dispatch_start(self, x: Tensor, ids: Tensor, axis: str, rows: Place, of: int) -> Handle:
        """The rows that this rank owns, zeros for all others. ``x``: its part of the rows, cut at ``rows``; ``ids``: of all rows, below ``of``."""
        n, dim = self.mesh.size(axis), rows[0]
        if n == 1:
            return done(x)
        r = route(ids, n, self.coordinate[axis], rows[1], of)

        def finish(y: Tensor) -> Tensor:
            return y.new_zeros(len(ids), *y.shape[1:]).index_copy_(0, r.owned, y).movedim(0, dim)

        return Handle(self.exchange_rows(x.movedim(dim, 0).index_select(0, r.held), r.holds, r.owns, axis), finish)

    def combine_start(self, x: Tensor, ids: Tensor, axis: str, rows: Place, of: int) -> Handle:
        """The inverse of ``dispatch_start``: of all rows, this rank's part."""
        n, dim = self.mesh.size(axis), rows[0]
        if n == 1:
            return done(x)
        r = route(ids, n, self.coordinate[axis], rows[1], of)

        def finish(y: Tensor) -> Tensor:
            return torch.empty_like(y).index_copy_(0, r.held, y).movedim(0, dim)

        return Handle(self.exchange_rows(x.movedim(dim, 0).index_select(0, r.owned), r.owns, r.holds, axis), finish)

    def bucket_start(
        self, kind: str, xs: Sequence[Tensor], axis: str, take: Sequence[Place] = (), put: Sequence[Place] = (), reduce: str = "sum"
    ) -> list[Handle]:
        """One exchange for several tensors of one dtype, packed side by side. Place of each: ``take``, where it is cut
        (reduce_scatter, all_to_all), ``put``, where it is joined (all_gather, all_to_all)."""
        n, i = self.mesh.size(axis), self.position(axis)
        if n == 1:
            return [done(x) for x in xs]
        packed, shapes = _packed(xs, n, take, put)
        complete = _Once(self.exchange(kind, packed, axis, reduce if kind in ("all_reduce", "reduce_scatter") else "", owned=True))
        handles, at = [], 0
        for k, shape in enumerate(shapes):
            size = shape.numel()
            finish = Finish(n, i, take[k] if take else None, put[k] if put else None)
            handles.append(Handle(complete, _Unpack(at, size, (n, *shape) if put else tuple(shape), finish)))
            at += size
        return handles

    def wait(self, handle: Handle) -> Tensor:
        return handle.finish(handle.complete())

    def wait_into(self, handle: Handle, out: Tensor) -> Tensor:
        """``wait``, with the result in the memory of ``out``."""
        finish = handle.finish
        if isinstance(handle.complete, Direct) and isinstance(finish, Finish) and finish.lies(out):
            handle.complete.into(out)
            return out
        found = handle.complete()
        return finish.into(found, out) if isinstance(finish, Finish | _Unpack) else out.copy_(finish(found))

    def shard(self, x: Tensor, axis: str, take: Place) -> Tensor:
        """This rank's block; a view where one exists."""
        return block(x, self.mesh.size(axis), self.position(axis), take)

    def microbatch(self, x: Tensor, i: int, m: int, take: Place) -> Tensor:
        """The part of microbatch ``i`` of ``m``; a view where one exists."""
        return block(x, m, i, take)

    def summand(self, x: Tensor, axis: str) -> Tensor:
        """``x`` at coordinate 0 of the axis, zeros elsewhere: they sum up to ``x``."""
        return x if self.position(axis) == 0 else torch.zeros_like(x)

    def share(self, x: Tensor, axis: str) -> Tensor:
        """What this rank adds to the mean over the axis of what each computed of its own rows."""
        return x / self.mesh.size(axis)


@dataclass(frozen=True)
class Finish:
    """What rank ``i`` of ``n`` makes of what an exchange brought: a block without its padding, of what was cut at ``take``; joined blocks, [n, ..], at ``put``."""

    n: int
    i: int
    take: Place | None = None
    put: Place | None = None

    def __call__(self, found: Tensor) -> Tensor:
        if self.put is None:
            return found if self.take is None else own(found, self.n, self.i, self.take)
        return join(found if self.take is None else _own_of_each(found, self.n, self.i, self.take), self.put)

    def into(self, found: Tensor, out: Tensor) -> Tensor:
        if self.put is None or self.take is not None:
            return out.copy_(self(found))
        return join_into(found, self.put, out)

    def lies(self, out: Tensor) -> bool:
        """Whether the memory of ``out`` is that of gathered blocks one behind the other."""
        return self.take is None and self.put is not None and len(self.put) == 2 and self.put[1] * prod(out.shape[: self.put[0]]) == 1 and out.is_contiguous()


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
    """One tensor's part of a packed buffer, and what is made of it."""

    at: int
    size: int
    shape: tuple[int, ...]
    finish: Finish

    def part(self, packed: Tensor) -> Tensor:
        return packed.narrow(-1, self.at, self.size).view(self.shape)

    def into(self, packed: Tensor, out: Tensor) -> Tensor:
        return self.finish.into(self.part(packed), out)

    def __call__(self, packed: Tensor) -> Tensor:
        part = self.part(packed)
        if self.finish.put is None and SMALL * self.size < packed.numel():
            part = part.clone()
        return self.finish(part)


@dataclass(frozen=True)
class Route:
    """Which rows one rank exchanges with each of the n ranks: it follows from ids that all of them have, so no sizes travel."""

    held: Tensor  # of the rows in this rank's part, where they stand there, in the order of their owners
    holds: list[int]  # how many of them each rank owns
    owned: Tensor  # of the rows that this rank owns, where they stand among all, in the order of the parts
    owns: list[int]  # how many of them stand in each rank's part


def route(ids: Tensor, n: int, i: int, outer: int, of: int) -> Route:
    """The route of rank ``i`` of ``n``. Id k of ``of`` is the rank's with the k-th of n equal ranges; the rows are seen as (outer, n, rest)
    and part j of them is rank j's. Raises IndexError where an id is not below ``of``."""
    parts = cut(torch.arange(len(ids), device=ids.device), n, (0, outer))
    owner = (ids // (of // n))[parts]
    held, mine = torch.sort(owner[i], stable=True)[1], owner == i
    counts = torch.stack([torch.bincount(owner[i], minlength=n)[:n], mine.sum(1)]).tolist()
    if sum(counts[0]) != parts.shape[1]:
        raise IndexError(f"a row id of {int(ids.max())}, but there are {of}")
    return Route(held, counts[0], parts[mine], counts[1])


# blocks -------------------------------------------------------------------------------------------------------------


def cut(x: Tensor, n: int, take: Place) -> Tensor:
    """[n, ...]: dimension ``dim`` seen as (outer, of, rest), ``of`` cut into n parts, which move to the front. Uneven parts are padded
    to the first one's size. A view where one exists."""
    dim, outer, of, rest = _place(x, n, take)
    each, shape = -(-of // n), list(x.shape)
    if of % n:
        blocks = x.new_zeros(n, *shape[:dim], outer * each * rest, *shape[dim + 1 :])
        _fill(blocks, x, n, take)
        return blocks
    blocks = x.reshape(*shape[:dim], outer, n, each * rest, *shape[dim + 1 :]).movedim(dim + 1, 0)
    return blocks.reshape(n, *shape[:dim], outer * each * rest, *shape[dim + 1 :])


def _fill(blocks: Tensor, x: Tensor, n: int, take: Place) -> None:
    """Write ``cut`` of ``x`` into ``blocks``; what is padding stays."""
    dim, outer, of, rest = _place(x, n, take)
    each = -(-of // n)
    there, seen = _seen(blocks, dim + 1, outer, each, rest), _seen(x, dim, outer, of, rest)
    for k in range(n):
        held = chunk(of, n, k)
        there[k].narrow(dim + 1, 0, len(held)).copy_(seen.narrow(dim + 1, held.start, len(held)))


def _packed(xs: Sequence[Tensor], n: int, take: Sequence[Place], put: Sequence[Place]) -> tuple[Tensor, list[torch.Size]]:
    """Tensors side by side in one buffer, [n, ..] where they are cut, and the shape of a block of each. No copies are made on the way."""
    joined = dict(enumerate(put))
    if take:
        xs = [widest(x, n, joined.get(k)) for k, x in enumerate(xs)]
        shapes = [_block(x, n, place) for x, place in zip(xs, take, strict=True)]
    else:
        shapes = [_widened(x, n, joined.get(k)) for k, x in enumerate(xs)]
    even = all(len(place) == 2 for place in (*take, *put))
    if even and all(x.is_contiguous() for x in xs) and all(place[1] * prod(x.shape[: place[0]]) == 1 for x, place in zip(xs, take, strict=False)):
        return torch.cat([x.view(n, -1) for x in xs], 1) if take else torch.cat([x.view(-1) for x in xs]), shapes
    lead = (n,) if take else ()
    packed, at = (xs[0].new_empty if even else xs[0].new_zeros)(*lead, sum(shape.numel() for shape in shapes)), 0
    for k, (x, shape) in enumerate(zip(xs, shapes, strict=True)):
        there = packed.narrow(-1, at, shape.numel()).view((*lead, *shape))
        if take:
            _fill(there, x, n, take[k])
        else:
            _widen(there, x, n, joined.get(k))
        at += shape.numel()
    return packed, shapes


def block(x: Tensor, n: int, i: int, take: Place) -> Tensor:
    """Block ``i`` of the ``n`` of ``cut``, without padding; a view where one exists."""
    dim, outer, of, rest = _place(x, n, take)
    held = chunk(of, n, i)
    if outer == 1:
        return x.narrow(dim, held.start * rest, len(held) * rest)
    return _seen(x, dim, outer, of, rest).narrow(dim + 1, held.start, len(held)).flatten(dim, dim + 2)


def join(blocks: Tensor, put: Place) -> Tensor:
    """The inverse of ``cut``: padding is dropped."""
    n, *shape = blocks.shape
    dim, outer = put[0], put[1]
    seen = blocks.reshape(n, *shape[:dim], outer, shape[dim] // max(outer, 1), *shape[dim + 1 :]).movedim(0, dim + 1)
    if len(put) == 2:
        return seen.reshape(*shape[:dim], shape[dim] * n, *shape[dim + 1 :])
    _, _, of, rest = put
    each = -(-of // n)
    if outer * prod(shape[:dim]) == 1 and blocks.is_contiguous():
        whole = seen.reshape(*shape[:dim], outer, n * each, rest, *shape[dim + 1 :]).narrow(dim + 1, 0, of)
    else:  # one copy, of what is no padding
        parts = seen.reshape(*shape[:dim], outer, n, each, rest, *shape[dim + 1 :]).unbind(dim + 1)
        whole = torch.cat([part.narrow(dim + 1, 0, len(chunk(of, n, k))) for k, part in enumerate(parts)], dim + 1)
    return whole.reshape(*shape[:dim], outer * of * rest, *shape[dim + 1 :])


def join_into(blocks: Tensor, put: Place, out: Tensor) -> Tensor:
    """``join`` in the memory of ``out``: one copy, where the parts are even."""
    if len(put) > 2:
        return out.copy_(join(blocks, put))
    (n, *shape), dim, outer = blocks.shape, put[0], put[1]
    seen = blocks.reshape(n, *shape[:dim], outer, shape[dim] // max(outer, 1), *shape[dim + 1 :]).movedim(0, dim + 1)
    torch.unflatten(out, dim, (outer, n, shape[dim] // max(outer, 1))).copy_(seen)
    return out


def no_pages(*_: object, **__: object) -> Tensor:
    raise RuntimeError("paged attention outside of an inference engine: this runtime has no pages")


def widest(x: Tensor, n: int, put: Place | None) -> Tensor:
    """A rank's part padded to the size of the largest, where the parts that will be joined are uneven."""
    shape = _widened(x, n, put)
    return x if shape == x.shape else _widen(x.new_zeros(shape), x, n, put)


def _widen(there: Tensor, x: Tensor, n: int, put: Place | None) -> Tensor:
    """Write ``widest`` of ``x`` into ``there``; what is padding stays."""
    if put is None or len(put) == 2:
        return there.copy_(x)
    dim, outer, of, rest = put
    held = x.shape[dim] // max(outer * rest, 1)
    _seen(there, dim, outer, -(-of // n), rest).narrow(dim + 1, 0, held).copy_(_seen(x, dim, outer, held, rest))
    return there


def _widened(x: Tensor, n: int, put: Place | None) -> torch.Size:
    if put is None or len(put) == 2:
        return x.shape
    dim, outer, of, rest = put
    return torch.Size((*x.shape[:dim], outer * -(-of // n) * rest, *x.shape[dim + 1 :]))


def _block(x: Tensor, n: int, take: Place) -> torch.Size:
    """The shape of a block of ``cut``."""
    dim, outer, of, rest = _place(x, n, take)
    return torch.Size((*x.shape[:dim], outer * -(-of // n) * rest, *x.shape[dim + 1 :]))


def added(blocks: Tensor | tuple[Tensor, Tensor], out: Tensor | None = None) -> Tensor:
    """Their sum; of two the one addition, which takes a fraction of the time of a reduction, and is rounded alike."""
    if len(blocks) == 2:
        return torch.add(blocks[0], blocks[1], out=out)
    assert isinstance(blocks, Tensor)
    return torch.sum(blocks, 0, dtype=blocks.dtype, out=out)


def own(x: Tensor, n: int, i: int, take: Place) -> Tensor:
    """What rank ``i`` holds of a block of ``cut``: without its padding."""
    if len(take) == 2:
        return x
    dim, outer, of, rest = take
    each, held = -(-of // n), len(chunk(of, n, i))
    return x if held == each else _seen(x, dim, outer, each, rest).narrow(dim + 1, 0, held).flatten(dim, dim + 2)


def _own_of_each(blocks: Tensor, n: int, i: int, take: Place) -> Tensor:
    """``own`` of every one of blocks that are not joined yet; they are joined at another dimension."""
    if len(take) == 2:
        return blocks
    dim, outer, of, rest = take
    return own(blocks, n, i, (dim + 1, outer, of, rest))


def _place(x: Tensor, n: int, place: Place) -> tuple[int, int, int, int]:
    """(dim, outer, of, rest); the dimension is outer * of * rest."""
    if len(place) == 4:
        return place
    dim, outer = place
    return dim, outer, n, x.shape[dim] // max(outer * n, 1)


def _seen(x: Tensor, dim: int, outer: int, of: int, rest: int) -> Tensor:
    return x.reshape(*x.shape[:dim], outer, of, rest, *x.shape[dim + 1 :])
