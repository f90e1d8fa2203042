"""One rank of a pipeline: the messages that the simulation and real processes must agree on, and ranks that end in the middle."""

from __future__ import annotations

import os
import signal
import time
import weakref
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import ProcessGroupGloo

from deepseed.ir.mesh import Mesh
from deepseed.runtime.collectives import Runtime
from deepseed.runtime.distributed import DistributedRuntime, guarded, stop

DTYPES = (
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.bool, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
    torch.complex64, torch.complex128,
)  # fmt: skip
AWAY = 60.0  # seconds that a rank stays away
MANY = 60  # messages sent before the first receive


def mesh_of(ranks: int) -> Mesh:
    return Mesh((("pp", ranks // 2), ("dp", 2))) if ranks == 8 else Mesh((("pp", ranks),))


def neighbours(rt: Runtime) -> tuple[int, int]:
    """(before, after) on the ring of pipeline ranks."""
    p, here = rt.mesh.size("pp"), rt.coordinate["pp"]
    return (here - 1) % p, (here + 1) % p


def ring(rt: Runtime) -> list[Tensor]:
    """Everyone sends many messages both ways, of every dtype, and only then receives."""
    before, after = neighbours(rt)
    shapes = ((3, 2), (), (0, 4))
    for dtype in DTYPES:
        for shape in shapes:
            x = (torch.ones(shape) + rt.rank).to(dtype)
            rt.send(x, after)
            rt.send(x + x if dtype is not torch.bool else ~x, before)
            del x  # the runtime keeps it
    for n in range(MANY):
        rt.send(torch.tensor([n, rt.rank]), after)
    out = []
    for dtype in DTYPES:
        for shape in shapes:
            handles = [rt.receive_start(shape, dtype, before), rt.receive_start(shape, dtype, after)]
            out += [rt.wait(h) for h in reversed(handles)]
    late = [rt.receive_start((2,), torch.int64, before) for _ in range(MANY)]
    out += [rt.wait(h) for h in late[::-1]]
    rt.flush()
    return out


def posted_first(rt: Runtime) -> list[Tensor]:
    """Receives posted long before anything is sent, a microbatch at a time, with a collective of the stage in between."""
    before, after = neighbours(rt)
    handles = [rt.receive_start((4,), torch.float32, before) for _ in range(4)]
    total = rt.all_reduce_start(torch.full((3,), float(rt.rank)), "dp") if "dp" in rt.mesh.sizes else None
    out = [rt.wait(total)] if total is not None else []
    for n in range(4):
        rt.send(torch.full((4,), 10.0 * n + rt.rank), after)
    out += [rt.wait(h) for h in handles]
    for source in range(rt.mesh.size("pp")):
        mine = torch.full((2, 2), float(rt.rank)) if rt.coordinate["pp"] == source else None
        out.append(rt.broadcast(mine, (2, 2), torch.float32, source))
    rt.flush()
    return out


def traffic(rt: Runtime) -> list[Tensor]:
    return [*ring(rt), *posted_first(rt)]


def big(rt: Runtime) -> tuple[list[Tensor], bool]:
    """64 MB both ways at once, sent by all before anyone receives; the first and last number of each, and whether what was sent is let go."""
    n = 16 << 20
    before, after = neighbours(rt)
    kept = []
    for to in (after, before):
        x = torch.arange(n, dtype=torch.int32).add_(rt.rank)
        kept.append(weakref.ref(x))
        rt.send(x, to)
    del x
    got = [rt.wait(rt.receive_start((n,), torch.int32, source)) for source in (before, after)]
    rt.flush()
    return [x[[0, n - 1]] for x in got], all(ref() is None for ref in kept)


class Sent:
    """Counts messages and bytes where a group of two is asked to broadcast, on the sender's side."""

    def __init__(self) -> None:
        self.messages = self.bytes = 0
        broadcast: Any = ProcessGroupGloo.broadcast

        def counted(group: Any, xs: list[Tensor], options: Any) -> Any:
            if group.size() == 2 and group.rank() == 0:
                self.messages += 1
                self.bytes += sum(x.numel() * x.itemsize for x in xs)
            return broadcast(group, xs, options)

        setattr(ProcessGroupGloo, "broadcast", counted)  # noqa: B010


def messages(folder: Path) -> None:
    """What ``traffic`` and ``big`` give on this rank, and what ``ring`` sends."""
    rt = DistributedRuntime(mesh_of(dist.get_world_size()), timeout=60.0)
    sent = Sent()
    with guarded(rt):
        out = ring(rt)
        counted = (sent.messages, sent.bytes)
        out += posted_first(rt)
        again = DistributedRuntime(rt.mesh)  # as after a refined mesh: the same groups
        out += posted_first(again)
        ends, gone = big(rt) if "dp" not in rt.mesh.sizes else ([], True)
    torch.save({"out": out, "big": ends, "gone": gone, "sent": counted, "groups": len(rt.world.channels)}, folder / f"{rt.rank}.pt")


def until_it_receives(rt: DistributedRuntime, rank: int) -> None:
    """Until a rank has sent all and waits for a message of this one: what it says when this one ends is known then."""
    until = time.monotonic() + 30
    while not rt.world.watch._beats()[rank].doing.startswith(f"receiving from pipeline rank {rt.rank} "):
        assert time.monotonic() < until
        time.sleep(0.1)


def trouble(kind: str) -> None:
    """A pipeline of four in which the third dies, raises or stays away in its second microbatch; the others leave in good order."""
    rt = DistributedRuntime(Mesh((("pp", dist.get_world_size()),)), timeout=4.0)
    here, last = rt.coordinate["pp"], rt.mesh.size("pp") - 1
    try:
        with guarded(rt):
            for microbatch in range(4):
                x = rt.wait(rt.receive_start((8,), torch.float32, here - 1)) if here else torch.ones(8)
                if here == 2 and microbatch == 1:
                    rt.flush()
                    until_it_receives(rt, 1)
                    if kind == "die":
                        os.kill(os.getpid(), signal.SIGKILL)
                    if kind == "sleep":
                        time.sleep(AWAY)
                    raise ValueError("a page of the data is missing")
                if here < last:
                    rt.send(x + 1, here + 1)
            for _ in range(4):  # and back
                x = rt.wait(rt.receive_start((8,), torch.float32, here + 1)) if here < last else torch.ones(8)
                if here:
                    rt.send(x + 1, here - 1)
            rt.flush()
        print("not reached", flush=True)
    finally:
        stop()
