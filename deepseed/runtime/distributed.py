"""The collectives over torch.distributed: gloo on CPU, nccl on GPU, one process a rank, started by torchrun.

``start`` joins the process group, ``DistributedRuntime`` is the ``rt`` of generated source, ``stop`` leaves. Use ``guarded``
around whatever all ranks do together, so that a rank that raises tells the others; they end with a RankError that names it
instead of hanging.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from deepseed.ir.mesh import STAGES, Mesh, whole_axis
from deepseed.runtime.attach import Link, Part
from deepseed.runtime.channels import Channels, Group
from deepseed.runtime.collectives import Finish, Runtime, added, cut, widest
from deepseed.runtime.errors import AgreementError, RankError
from deepseed.runtime.handle import Handle
from deepseed.runtime.neighbours import attach
from deepseed.runtime.pipeline import Place, as_bytes
from deepseed.runtime.watch import Watch

TIMEOUT = float(os.environ.get("DEEPSEED_TIMEOUT", "600"))  # seconds that a rank waits for the others in one collective
TOLD = 60.0  # seconds after which it says so, or half of the timeout
LINGER = 3.0  # seconds that a rank stays after an error, at most, for the others to read what happened
PAUSE = 0.1  # seconds that a process stays when it leaves, for gloo's threads to let go
_SLICE = timedelta(seconds=1)  # how often a waiting rank looks whether another one is in trouble
REDUCING = ("all_reduce", "reduce_scatter")
_REDUCE = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


class World:
    """This process among all ranks of the process group: waiting for the others, and being told of their troubles."""

    def __init__(self, device: torch.device | str, timeout: float) -> None:
        self.device, self.timeout = torch.device(device), timeout
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.watch = Watch(dist.distributed_c10d._get_default_store(), self.rank, self.size)
        self.links: dict[tuple[int, ...], Link | None] = {}
        self.channels: dict[tuple[int, int], Group] = {}  # (sender, receiver): a group of its own for messages
        self.before_leaving: list[Callable[[], None]] = []
        self._depth = 0
        self._failed = False
        self.broken = ""  # what put the ranks out of step: no collective can be trusted from then on
        atexit.register(self.leave)

    def leave(self) -> None:
        """End what needs the interpreter: a thread that asks for it while it goes down aborts the process ("terminate called
        without an active exception"). The watch is one; a thread of gloo lets go of a collective's tensors a moment after the wait
        for it has returned, and cannot be joined (a bare process group that exits at once aborted 4 times in 32, with the pause 0)."""
        atexit.unregister(self.leave)
        for each in self.before_leaving:
            each()
        self.watch.close()
        for link in self.links.values():
            if link is not None:
                link.close()
        if self._failed and self.device.type == "cpu":
            for group in (*self.channels.values(), *dist.distributed_c10d._world.pg_map):
                _never_let_go(group)
        time.sleep(PAUSE)

    def run(self, begin: Callable[[], dist.Work | None], what: str) -> None:
        """Start a collective and wait for it; RankError where another rank failed, died or stays away for ``timeout`` seconds."""
        self.watch.doing = what
        started = time.monotonic()
        try:
            work = begin()
        except (RuntimeError, ValueError) as error:
            raise self.diagnosed(error, what, time.monotonic() - started) from error
        if work is not None:
            self.wait(work, what)

    def wait(self, work: dist.Work, what: str) -> None:
        """Wait for a collective that is under way."""

        def over() -> Exception | None:
            try:
                if self.device.type == "cpu":
                    work.wait(_SLICE)
                else:
                    work.wait()  # waits on the stream; the watchdog of the back end holds the timeout
            except (RuntimeError, ValueError) as error:
                if not work.is_completed():
                    return error
                if not _succeeded(work):
                    raise
            return None

        self.until(over, what)

    def until(self, over: Callable[[], Exception | None], what: str) -> None:
        """Ask whether what this rank waits for is ``over`` (None; else why not yet), which raises where it never will be."""
        self.watch.doing = what
        began, told, lost = time.monotonic(), False, False
        while True:
            try:
                why = over()
            except (OSError, RuntimeError, ValueError) as error:
                why, lost = error, True
            if why is None:
                break
            waited = time.monotonic() - began
            if lost or waited > self.timeout or self.watch.alarmed():
                raise self.watch.diagnose(why, waited) from why
            if not told and waited > min(TOLD, self.timeout / 2):
                told = True
                self.watch.tell(waited, self.timeout)
        self.watch.doing = "computation after " + what.replace(" over ", " on ")

    def diagnosed(self, error: Exception, what: str, seconds: float = 0.0) -> RankError:
        """The error to raise where this rank could not do ``what``."""
        self.watch.doing = what
        return self.watch.diagnose(error, seconds)

    def link(self, ranks: Sequence[int], group: ProcessGroup) -> Link | None:
        """Of a group whose ranks read each other's memory; all of them ask at the same time."""
        if tuple(ranks) not in self.links:
            self.links[tuple(ranks)] = attach(self, ranks, group)
        return self.links[tuple(ranks)]

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Tell the other ranks when the body raises, and stay until they have heard: the first rank may keep the store. An error
        that all have leaves them in step; where one failed alone the others left a collective, and nothing can follow it."""
        if not self._depth:
            if self.broken:
                raise RankError(-1, f"ranks are out of step since this error: {self.broken}\n  fix: end all processes and start again")
            self.watch.turn += 1
        self._depth += 1
        try:
            yield
        except BaseException as error:
            self._failed = True
            if self._depth == 1:
                if not isinstance(error, RankError | AgreementError):  # those every rank has
                    self.watch.failed(error)
                self.watch.leaves(out_of_step=isinstance(error, RankError))
                until = time.monotonic() + LINGER
                while len(said := self.watch.left()) < self.size and time.monotonic() < until:
                    time.sleep(0.1)
                if "out of step" in said:
                    self.broken = f"{type(error).__name__}: {error}"
            raise
        finally:
            self._depth -= 1


_worlds: WeakKeyDictionary[ProcessGroup, World] = WeakKeyDictionary()


def world(device: torch.device | str = "cpu", timeout: float | None = None) -> World:
    """The one World of the process group; a ``timeout`` given changes its."""
    group = dist.group.WORLD
    if group is None:
        raise RuntimeError("there is no process group\n  fix: deepseed.runtime.distributed.start() under a launcher")
    found = _worlds.get(group)
    if found is None:
        found = _worlds[group] = World(device, TIMEOUT)
    found.timeout = found.timeout if timeout is None else timeout
    return found


class DistributedRuntime(Runtime):
    """One process's rank of the mesh; the world must have exactly the mesh's ranks."""

    def __init__(self, mesh: Mesh, device: torch.device | str = "cpu", timeout: float | None = None) -> None:
        size = dist.get_world_size()
        if size != mesh.ranks:
            raise ValueError(f"{mesh} has {mesh.ranks} ranks, but {size} processes were started\n  fix: start {mesh.ranks}, or choose a plan for {size}")
        super().__init__(mesh, dist.get_rank(), device)
        self.world = world(self.device, timeout)
        self.device_mesh: DeviceMesh = init_device_mesh(
            self.device.type, tuple(n for _, n in mesh.axes) or (1,), mesh_dim_names=mesh.names or ("world",)
        )
        self._groups: dict[str, ProcessGroup] = {axis: self.device_mesh.get_group(axis) for axis in mesh.names}
        for axis in dict.fromkeys(map(whole_axis, mesh.names)):
            if axis not in self._groups:  # one group for its sub-axes together
                self._groups[axis] = self.device_mesh[mesh.parts(axis)]._flatten(axis).get_group()
        gloo = {axis: group for axis, group in self._groups.items() if dist.get_backend(group) == "gloo"}
        self._links = {axis: link for axis, group in gloo.items() if (link := self.world.link(mesh.group(axis, self.rank), group)) is not None}
        self._number = 0
        self._channels = Channels(self.world, mesh.group(STAGES, self.rank) if STAGES in mesh.sizes else ())

    def exchange(self, kind: str, x: Tensor, axis: str, reduce: str, *, owned: bool = False) -> Callable[[], Tensor]:
        x = x.resolve_conj().resolve_neg()
        if axis in self._links and x.numel():
            return Part(self._links[axis].start(kind, [x], reduce, self._next(kind, axis)))
        group, n = self._groups[axis], self.mesh.size(axis)
        by_blocks = kind == "reduce_scatter" and reduce == "sum" and self.device.type == "cpu"  # gloo reduces all and throws away
        if kind == "all_gather":
            out = x.new_empty((n, *x.shape))
        elif kind == "reduce_scatter" and not by_blocks:
            out = x.new_empty(x.shape[1:])
        elif kind == "all_reduce":
            out = x if owned else x.clone()
        else:
            out = torch.empty_like(x)
        if not x.numel():
            return lambda: added(out) if by_blocks else out
        what = self._next(kind, axis)
        sent, received = _plain(x), _plain(out)
        began = time.monotonic()
        try:
            if kind == "all_gather":
                work = _named("all_gather_single", "all_gather_into_tensor")(received.view(-1), sent.view(-1), group, async_op=True)
            elif kind == "all_reduce":
                work = dist.all_reduce(received, _REDUCE[reduce], group, async_op=True)
            elif kind == "reduce_scatter" and not by_blocks:
                work = _named("reduce_scatter_single", "reduce_scatter_tensor")(received.view(-1), sent.view(-1), _REDUCE[reduce], group, async_op=True)
            else:
                work = dist.all_to_all_single(received, sent, group=group, async_op=True)
        except (RuntimeError, ValueError) as error:
            raise self.world.diagnosed(error, what, time.monotonic() - began) from error

        def complete() -> Tensor:
            self.world.wait(work, what)
            nonlocal sent  # kept until the exchange is over
            del sent
            return added(out) if by_blocks else out

        return complete

    def _next(self, kind: str, axis: str) -> str:
        self._number += 1
        return f"{kind} over {axis}, number {self._number}"

    def bucket_start(self, kind: str, xs: Sequence[Tensor], axis: str, take: Sequence[Place] = (), put: Sequence[Place] = (), reduce: str = "sum") -> list[Handle]:
        """Without packing, where ranks read each other's memory."""
        link = self._links.get(axis)
        if link is None:
            return super().bucket_start(kind, xs, axis, take, put, reduce)
        n, joined = self.mesh.size(axis), dict(enumerate(put))
        parts = [widest(x, n, joined.get(k)) for k, x in enumerate(xs)]
        parts = [(cut(x, n, take[k]) if take else x).contiguous().resolve_conj().resolve_neg() for k, x in enumerate(parts)]
        under_way = link.start(kind, parts, reduce if kind in REDUCING else "", self._next(kind, axis))
        return [Handle(Part(under_way, k), Finish(n, self.position(axis), take[k] if take else None, joined.get(k))) for k in range(len(xs))]

    def exchange_rows(self, x: Tensor, sends: Sequence[int], receives: Sequence[int], axis: str) -> Callable[[], Tensor]:
        x, what = x.resolve_conj().resolve_neg(), self._next("rows", axis)
        if axis in self._links:
            return Part(self._links[axis].start("rows", [x], "", what, sends), receives=receives)
        out = x.new_empty(sum(receives), *x.shape[1:])
        began = time.monotonic()
        try:
            work = dist.all_to_all_single(_plain(out), _plain(x), list(receives), list(sends), self._groups[axis], async_op=True)
        except (RuntimeError, ValueError) as error:
            raise self.world.diagnosed(error, what, time.monotonic() - began) from error

        def complete() -> Tensor:
            self.world.wait(work, what)
            nonlocal x  # kept until the exchange is over
            del x
            return out

        return complete

    def spread(self, x: Tensor, axis: str, source: int) -> Callable[[], Tensor]:
        what = self._next("broadcast", axis)
        if x.numel():
            self.world.run(lambda: dist.broadcast(as_bytes(x), self.mesh.group(axis, self.rank)[source], self._groups[axis], async_op=True), what)
        return lambda: x

    def post(self, x: Tensor, rank: int) -> None:
        self._channels.post(x, rank)

    def fetch(self, shape: Sequence[int], dtype: torch.dtype, rank: int) -> Callable[[], Tensor]:
        return self._channels.fetch(shape, dtype, rank)

    def flush(self) -> None:
        self._channels.flush()


def _never_let_go(group: object) -> None:
    """A group of gloo whose last reference goes waits for what was started on it: for ever, where another rank stays away."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


def _named(new: str, old: str) -> Callable[..., dist.Work]:
    """A collective by its name since torch 2.13, else by the one before."""
    found: Callable[..., dist.Work] = getattr(dist, new, None) or getattr(dist, old)
    return found


def _plain(x: Tensor) -> Tensor:
    """The same memory as real numbers."""
    return torch.view_as_real(x) if x.is_complex() else x


def _succeeded(work: dist.Work) -> bool:
    """Whether a collective that has completed did what it should: to wait for it then raises its error, or returns at once."""
    try:
        work.wait(_SLICE)
    except (RuntimeError, ValueError):
        return False
    return True


def start(backend: str | None = None, timeout: float = TIMEOUT) -> torch.device:
    """Join the process group that torchrun's environment describes (once), and this process's device."""
    gpu = torch.cuda.is_available() if backend is None else "nccl" in backend
    device = torch.device("cuda", _local_rank()) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group(backend or ("nccl" if gpu else "gloo"), timeout=timedelta(seconds=timeout))
    return device


def stop() -> None:
    if dist.is_initialized():
        found = _worlds.pop(dist.group.WORLD, None) if dist.group.WORLD is not None else None
        if found is not None:
            found.leave()
        dist.destroy_process_group()


@contextmanager
def guarded(rt: DistributedRuntime) -> Iterator[None]:
    """``World.guarded`` of the runtime's world."""
    with rt.world.guarded():
        yield


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))
