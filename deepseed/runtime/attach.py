"""Exchanges among ranks of one host: each reads what it needs straight from the memory of the others.

Linux lets a process copy from the memory of another one of the same user in one call (``process_vm_readv``, cross memory attach, as MPI libraries do within a host): no socket, no buffer, no
packing. A rank that starts an exchange tells the others where its tensors lie; one that waits reads its part of them, adds while what it read is in the cache, says that it has read, and goes on
when all others have: from then on its own tensors may change. What is told are messages of some bytes over sockets of the host, so that a rank that dies is noticed when the system closes its sockets.

Ranks sum in one order, whatever the size: all have the same bits. ``DEEPSEED_CMA=0`` on any rank leaves the exchanges of its groups to gloo, as does a host that forbids such reads (a container without CAP_SYS_PTRACE, perhaps).
"""

from __future__ import annotations

import ctypes
import os
import select
import socket
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deepseed.ir.layout import chunk
from deepseed.runtime.collectives import added
from deepseed.runtime.errors import AgreementError
from deepseed.runtime.handle import Direct

if TYPE_CHECKING:
    from deepseed.runtime.distributed import World

PIECE = 1 << 18  # bytes that are read before they are added: what a core's cache holds
LONGEST = 1 << 30  # bytes of one read; a call of Linux moves at most 2 GiB
VECTORS = 512  # reads of one call; Linux takes at most 1024
ALONE = 1 << 14  # bytes of sums that every rank makes by itself: less than to wait for others once more
SLICE = 1.0  # seconds, after which a waiting rank looks whether another one is in trouble
STARTED, SUMMED, READ = range(3)  # what a rank says of an exchange
KINDS = ("all_gather", "all_reduce", "reduce_scatter", "all_to_all", "rows")
CUT = ("reduce_scatter", "all_to_all")  # whose operand is [n, ..], a block for each rank
HEAD = struct.Struct("<IIBBQI")  # call into DeepSeed, number of the exchange in it, what is said, kind, bytes of all tensors, how many; their addresses follow
FEW = 2048  # addresses of one message; where there are more it has the address of where they stand

Said = dict[int, tuple[int, int, tuple[int, ...]]]  # position -> kind, bytes, addresses
Key = tuple[int, int]  # of an exchange: call, number
Span = tuple[int, int, int]  # address there, address here, bytes


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def read(pid: int, spans: Iterable[Span]) -> None:
    """Copy from the memory of process ``pid``. Raises OSError where it is gone, or may not be read."""
    for few in _calls(spans):
        here, there = (_Vector * len(few))(), (_Vector * len(few))()
        for k, (source, target, length) in enumerate(few):
            here[k].base, there[k].base = target, source
            here[k].length = there[k].length = length
        found = _readv()(pid, here, len(few), there, len(few), 0)
        if found != sum(length for _, _, length in few):
            error = ctypes.get_errno()
            raise OSError(error, f"reading the memory of process {pid}: {os.strerror(error) if found < 0 else 'a part of it is not there'}")


def _calls(spans: Iterable[Span]) -> Iterator[list[Span]]:
    """Spans as single calls may have them."""
    few: list[Span] = []
    for source, target, length in spans:
        for low in range(0, length, LONGEST):
            if len(few) == VECTORS or (few and length > PIECE):
                yield few
                few = []
            few.append((source + low, target + low, min(LONGEST, length - low)))
    if few:
        yield few


@cache
def _readv() -> Any:
    function = ctypes.CDLL(None, use_errno=True).process_vm_readv
    function.restype = ctypes.c_ssize_t
    return function


class Link:
    """This rank's connections with the others of a group, ``ranks``, all on this host; ``pids`` and ``sockets`` by position (None: itself)."""

    def __init__(self, world: World, ranks: Sequence[int], pids: Sequence[int], sockets: Sequence[socket.socket | None]) -> None:
        self.world, self.ranks, self.pids, self.me = world, tuple(ranks), pids, ranks.index(world.rank)
        self.number = 0
        self._sockets = {k: s for k, s in enumerate(sockets) if s is not None}
        self._by_handle = {s.fileno(): k for k, s in self._sockets.items()}
        self._heard: dict[tuple[Key, int], Said] = {}  # by exchange and what is said
        self._closed: set[int] = set()
        self._poll = select.poll()
        for s in self._sockets.values():
            s.setblocking(False)
            self._poll.register(s, select.POLLIN)
        self._under_way: dict[Key, Exchange] = {}  # whose tensors others may read
        self._turn = 0  # the call into DeepSeed: all ranks make the same ones, and an error may end one at another exchange on each

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def others(self) -> Iterator[int]:
        return iter(self._sockets)

    def close(self) -> None:
        for s in self._sockets.values():
            s.close()

    def start(self, kind: str, xs: Sequence[Tensor], reduce: str, what: str, sends: Sequence[int] = ()) -> Exchange:
        """``xs``: contiguous, and not changed until the exchange is over; [n, ..] where a block goes to each rank. ``sends``: rows for each rank."""
        if self.world.watch.turn != self._turn:
            self._turn, self.number = self.world.watch.turn, 0
            self._under_way.clear()
            self._heard = {key: said for key, said in self._heard.items() if key[0][0] >= self._turn}
        self.number += 1
        key = self._turn, self.number
        under_way = self._under_way[key] = Exchange(self, key, kind, xs, reduce, what, sends)
        return under_way

    def over(self, key: Key) -> None:
        del self._under_way[key]

    def say(self, position: int, key: Key, what: int, kind: int = 0, nbytes: int = 0, addresses: Sequence[int] = (), of: int = 0) -> None:
        """``of``: how many addresses there are, where those given are of a table of them."""
        message = HEAD.pack(*key, what, kind, nbytes, of or len(addresses)) + struct.pack(f"<{len(addresses)}Q", *addresses)
        while True:
            try:
                self._sockets[position].send(message)
                return
            except BlockingIOError:  # its queue is full: it may wait for room in ours
                self._listen(0.01)
            except (BrokenPipeError, ConnectionResetError) as error:
                raise ConnectionError(f"rank {self.ranks[position]} has closed its connection") from error

    def hear(self, key: Key, what: int, seconds: float) -> bool:
        """Whether all others have said ``what`` of the exchange within ``seconds``. Raises ConnectionError where one is gone that has not."""
        until, wait = time.monotonic() + seconds, 0.0
        while True:
            self._listen(wait)
            missing = self._sockets.keys() - self._heard.get((key, what), {}).keys()
            if not missing:
                return True
            if gone := missing & self._closed:
                raise ConnectionError(f"rank {self.ranks[min(gone)]} has closed its connection")
            wait = until - time.monotonic()
            if wait <= 0:
                return False

    def said(self, key: Key, what: int) -> Said:
        """What ``hear`` has heard, once."""
        return self._heard.pop((key, what))

    def _listen(self, seconds: float) -> None:
        for handle, _ in self._poll.poll(max(seconds, 0.0) * 1e3):
            position = self._by_handle[handle]
            with suppress(BlockingIOError):
                while True:
                    try:
                        message = self._sockets[position].recv(1 << 20)
                    except ConnectionResetError:  # it left before it had read all from here: what it said before is still to be heard
                        continue
                    if not message:
                        self._closed.add(position)
                        self._poll.unregister(handle)
                        break
                    turn, number, what, kind, nbytes, many = HEAD.unpack_from(message)
                    if turn < self._turn:
                        continue
                    addresses = struct.unpack_from(f"<{(len(message) - HEAD.size) // 8}Q", message, HEAD.size)
                    if len(addresses) < many:
                        table = (ctypes.c_uint64 * many)()
                        read(self.pids[position], [(addresses[0], ctypes.addressof(table), 8 * many)])
                        addresses = tuple(table)
                    self._heard.setdefault(((turn, number), what), {})[position] = kind, nbytes, addresses


class Exchange:
    """One exchange of several tensors under way; each ``result`` is taken once, and waits."""

    def __init__(self, link: Link, key: Key, kind: str, xs: Sequence[Tensor], reduce: str, what: str, sends: Sequence[int]) -> None:
        self.link, self.key, self.kind, self.reduce, self.what = link, key, kind, reduce, what
        self._tables: list[Any] = []  # of addresses, while others may read them
        self.xs, self.sends = [torch.view_as_real(x) if x.is_complex() and reduce else x for x in xs], sends
        self.complex, self.left = bool(reduce) and xs[0].is_complex(), len(xs)
        self._found: Said | None = None
        self._sums: list[Tensor] | None = None
        self._scratch: Tensor | None = None  # a piece of each rank's
        nbytes = 0 if kind == "rows" else sum(x.nbytes for x in xs)
        self.nbytes = nbytes
        for p in link.others:
            self._say(p, STARTED, KINDS.index(kind), nbytes, [x.data_ptr() + self._offset(x, p) for x in xs])

    def _offset(self, x: Tensor, position: int) -> int:
        """Bytes from the start of ``x`` to what the rank at ``position`` reads of it."""
        if self.kind == "rows":
            return sum(self.sends[:position]) * (x.nbytes // max(len(x), 1))
        return position * (x.nbytes // self.link.size) if self.kind in CUT else 0

    def result(self, k: int = 0, out: Tensor | None = None, receives: Sequence[int] = ()) -> Tensor:
        """What the exchange makes of tensor ``k``, in the contiguous ``out`` where one is given. ``receives``: rows from each rank."""
        found, x, n, me = self._arrived(), self.xs[k], self.link.size, self.link.me
        try:
            if self.kind == "all_reduce":
                made = self._all_sums(found)[k]
            elif self.kind == "reduce_scatter":
                made = torch.empty(x.shape[1:], dtype=x.dtype)
                self._sum(made.view(-1), x[me].view(-1), [found[p][2][k] if p != me else 0 for p in range(n)])
            elif self.kind == "rows":
                made = x.new_empty(sum(receives), *x.shape[1:])
                self._copy(k, torch.split(made, list(receives)), torch.split(x, list(self.sends))[me], found)
            else:
                made = x.new_empty(x.shape if self.kind in CUT else (n, *x.shape)) if out is None else out.view(n, *(x.shape[1:] if self.kind in CUT else x.shape))
                self._copy(k, list(made), x[me] if self.kind in CUT else x, found)
        except OSError as error:
            raise self.link.world.diagnosed(error, self.what) from error
        self.left -= 1
        if not self.left and self.kind != "all_reduce":
            self._over()
        return torch.view_as_complex(made) if self.complex else made

    def _copy(self, k: int, targets: Sequence[Tensor], own: Tensor, found: Said) -> None:
        for p in self.link.others:
            read(self.link.pids[p], [(found[p][2][k], targets[p].data_ptr(), targets[p].nbytes)])
        mine = targets[self.link.me]
        if mine.data_ptr() != own.data_ptr():
            mine.copy_(own)

    def _sum(self, out: Tensor, own: Tensor, addresses: Sequence[int]) -> None:
        """The sum (or the largest) of every rank's flat part, in ``out``: a part of the others' begins at the addresses."""
        n, me, size = self.link.size, self.link.me, out.element_size()
        if self._scratch is None:
            self._scratch = torch.empty(n, PIECE, dtype=torch.uint8)
        scratch = self._scratch.view(out.dtype)
        for low in range(0, out.numel(), PIECE // size):
            count = min(PIECE // size, out.numel() - low)
            parts, mine, there = scratch[:, :count], own.narrow(0, low, count), out.narrow(0, low, count)
            for p in self.link.others:
                read(self.link.pids[p], [(addresses[p] + low * size, parts[p].data_ptr(), count * size)])
            if n == 2 and self.reduce == "sum":
                added((mine, parts[1 - me]), there)
            else:
                parts[me].copy_(mine)
                added(parts, there) if self.reduce == "sum" else torch.amax(parts, 0, out=there)

    def _all_sums(self, found: Said) -> list[Tensor]:
        """Every rank sums a part of each tensor, and reads the others' sums; where there is little to sum, all of it."""
        if self._sums is None:
            n, me = self.link.size, self.link.me
            sums = [torch.empty_like(x) for x in self.xs]
            flat = [(x.view(-1), s.view(-1)) for x, s in zip(self.xs, sums, strict=True)]
            alone = self.nbytes <= ALONE
            for k, (x, s) in enumerate(flat):
                held = range(x.numel()) if alone else chunk(x.numel(), n, me)
                at = held.start * x.element_size()
                self._sum(s[held.start : held.stop], x[held.start : held.stop], [found[p][2][k] + at if p != me else 0 for p in range(n)])
            if not alone:
                for p in self.link.others:
                    self._say(p, SUMMED, addresses=[s.data_ptr() for s in sums])
                theirs = self._wait(SUMMED)
                for p in self.link.others:
                    spans = []
                    for address, s in zip(theirs[p][2], sums, strict=True):
                        held, size = chunk(s.numel(), n, p), s.element_size()
                        spans.append((address + held.start * size, s.data_ptr() + held.start * size, len(held) * size))
                    read(self.link.pids[p], spans)
            self._over()  # before any sum is given away: what others read of it may be changed then
            self._sums = sums
        return self._sums

    def _arrived(self) -> Said:
        """Where the others' tensors lie."""
        if self._found is None:
            self._found = self._wait(STARTED)
            mine = KINDS.index(self.kind), self.nbytes, len(self.xs)
            for p, (kind, nbytes, addresses) in self._found.items():
                if (kind, nbytes, len(addresses)) != mine:
                    raise AgreementError(
                        f"ranks disagree in {self.what}: rank {self.link.world.rank} does {_said(*mine)}, rank {self.link.ranks[p]} {_said(kind, nbytes, len(addresses))}"
                        "\n  fix: every rank must run the same program on batches of the same shape"
                    )
        return self._found

    def _over(self) -> None:
        """All that was read from here has been read when this returns."""
        for p in self.link.others:
            self._say(p, READ)
        self._wait(READ)
        self.link.over(self.key)

    def _say(self, position: int, what: int, kind: int = 0, nbytes: int = 0, addresses: Sequence[int] = ()) -> None:
        of = len(addresses)
        if of > FEW:
            self._tables.append((ctypes.c_uint64 * of)(*addresses))
            addresses = [ctypes.addressof(self._tables[-1])]
        try:
            self.link.say(position, self.key, what, kind, nbytes, addresses, of)
        except OSError as error:
            raise self.link.world.diagnosed(error, self.what) from error

    def _wait(self, what: int) -> Said:
        self.link.world.until(lambda: None if self.link.hear(self.key, what, SLICE) else TimeoutError("no word from the others"), self.what)
        return self.link.said(self.key, what)


@dataclass(frozen=True)
class Part(Direct):
    """What an exchange makes of one of its tensors, as a handle waits for it."""

    exchange: Exchange
    k: int = 0
    receives: Sequence[int] = ()

    def __call__(self) -> Tensor:
        return self.exchange.result(self.k, receives=self.receives)

    def into(self, out: Tensor) -> Tensor:
        return self.exchange.result(self.k, out)


def _said(kind: int, nbytes: int, tensors: int) -> str:
    return f"{KINDS[kind]} of {nbytes:,} bytes in {tensors} tensor{'s' if tensors != 1 else ''}"
