"""The collectives over torch.distributed: gloo on CPU, nccl on GPU, one process a rank, started by torchrun.

``start`` joins the process group, ``DistributedRuntime`` is the ``rt`` of generated source, ``stop`` leaves. Use ``guarded``
around a run, so that a rank that raises tells the others; they end with a RankError that names it instead of hanging.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from deepseed.ir.mesh import Mesh
from deepseed.runtime.collectives import Runtime
from deepseed.runtime.errors import RankError
from deepseed.runtime.watch import Watch

TIMEOUT = 600.0  # seconds that a rank waits for the others in one collective
_SLICE = timedelta(seconds=1)  # how often a waiting rank looks whether another one is in trouble
_REDUCE = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


class DistributedRuntime(Runtime):
    """One process's rank of the mesh; the world must have exactly the mesh's ranks."""

    def __init__(self, mesh: Mesh, device: torch.device | str = "cpu", timeout: float = TIMEOUT) -> None:
        world = dist.get_world_size()
        if world != mesh.ranks:
            raise ValueError(f"{mesh} has {mesh.ranks} ranks, but {world} processes were started\n  fix: start {mesh.ranks}, or choose a plan for {world}")
        super().__init__(mesh, dist.get_rank(), device)
        self.timeout = timeout
        self.watch = Watch(dist.distributed_c10d._get_default_store(), self.rank, world)
        self.device_mesh: DeviceMesh = init_device_mesh(
            self.device.type, tuple(n for _, n in mesh.axes) or (1,), mesh_dim_names=mesh.names or ("world",)
        )
        self._groups: dict[str, ProcessGroup] = {axis: self.device_mesh.get_group(axis) for axis in mesh.names}
        self._number = 0

    def exchange(self, kind: str, x: Tensor, axis: str, reduce: str, *, owned: bool = False) -> Callable[[], Tensor]:
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
            return lambda: out.sum(0) if by_blocks else out
        self._number += 1
        what = f"{kind} over {axis}, number {self._number}"
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
            self.watch.doing = what
            raise self.watch.diagnose(error, time.monotonic() - began) from error

        def complete() -> Tensor:
            self._wait(work, what)
            nonlocal sent  # kept until the exchange is over
            del sent
            return out.sum(0) if by_blocks else out

        return complete

    def _wait(self, work: dist.Work, what: str) -> None:
        """Wait for a collective; RankError where another rank failed, died or stays away for ``timeout`` seconds."""
        self.watch.doing = what
        began = time.monotonic()
        while True:
            try:
                if self.device.type == "cpu":
                    work.wait(_SLICE)
                else:
                    work.wait()  # waits on the stream; the watchdog of the back end holds the timeout
                break
            except (RuntimeError, ValueError) as error:
                waited = time.monotonic() - began
                if work.is_completed() or waited > self.timeout or self.watch.alarmed():
                    if work.is_completed() and _succeeded(work):
                        break
                    raise self.watch.diagnose(error, waited) from error
        self.watch.doing = "computation after " + what.replace(" over ", " on ")

    def close(self) -> None:
        self.watch.close()


def _named(new: str, old: str) -> Callable[..., dist.Work]:
    """A collective by its name since torch 2.13, else by the one before."""
    found: Callable[..., dist.Work] = getattr(dist, new, None) or getattr(dist, old)
    return found


def _plain(x: Tensor) -> Tensor:
    """The same memory as real numbers."""
    return torch.view_as_real(x) if x.is_complex() else x


def _succeeded(work: dist.Work) -> bool:
    return work.exception() is None


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
        dist.destroy_process_group()


@contextmanager
def guarded(rt: DistributedRuntime) -> Iterator[None]:
    """Tell the other ranks when the body raises, and stay until they have heard (the first rank keeps the store)."""
    try:
        yield
    except RankError:
        _linger(rt)
        raise
    except BaseException as error:
        rt.watch.failed(error)
        _linger(rt)
        raise


def _linger(rt: DistributedRuntime) -> None:
    if rt.rank == 0:
        time.sleep(3.0)


def _local_rank() -> int:
    import os

    return int(os.environ.get("LOCAL_RANK", "0"))
