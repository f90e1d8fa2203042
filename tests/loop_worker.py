"""One rank of a training run whose step has several instructions, and what it really uses.

Counts as cost_worker does, and what only shows between instructions: bytes that live on from one microbatch to the next, gathered weights
that are alive at once, messages to other pipeline ranks. Shares nothing with deepseed.memory, deepseed.unroll or explain's counting.
"""

from __future__ import annotations

import gc
import json
import time
import warnings
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from cost_worker import Sent, here
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import deepseed
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Program
from deepseed.memory import curve, memory
from deepseed.target import load
from deepseed.unroll import unroll

LOOKS = 5  # steps that are looked at


class Alive(TorchDispatchMode):
    """Storages made in a step: the bytes that are alive, the most since ``restart``, and the most of gathered weights at once.

    Gathered is what an all_gather has written, and what is made of such tensors alone: laid out in order, cast, transposed. Of the
    n blocks that gloo's reduce_scatter receives to add them up one is counted, the result: see deepseed.memory."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[int, int] = {}
        self.seen: dict[int, weakref.ref[Any]] = {}  # the storage that an address stood for when it was last looked at
        self.gathered: dict[int, int] = {}
        self.blocks: set[int] = set()  # received to be added up
        self.most = self.most_gathered = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if "allgather" in str(func) or "alltoall" in str(func):
            written = next(t for t in tree_leaves(args) if isinstance(t, Tensor))
            if "allgather" in str(func):
                self._note_gathered(written)
            else:
                self.bytes[written.untyped_storage()._cdata] //= len(written)
                self.blocks.add(written.untyped_storage()._cdata)
        if str(func).startswith(("aten.sum", "aten.add")) and given[0] in self.blocks:
            self.bytes[given[0]] = 0  # its sum is here
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in given:
                storage = t.untyped_storage()
                known = self.seen.get(storage._cdata)
                if known is None or known() is not storage:  # another's address, if one was freed and its end not yet heard of
                    self.bytes[storage._cdata] = storage.nbytes()
                    self.seen[storage._cdata] = made = weakref.ref(storage)
                    weakref.finalize(storage, self._freed, storage._cdata, made)
                if given and all(each in self.gathered for each in given):
                    self._note_gathered(t)
        if "aten.empty" not in str(func) and self.now() > self.most:  # what is empty counts when it is written
            self.most = max(self.most, self.settled())  # what a thread of gloo held a moment longer may settle below an earlier peak
        return out

    def now(self) -> int:
        return sum(self.bytes.values())

    def settled(self) -> int:
        """What is alive once gloo's threads have let go of the buffers of collectives that are over."""
        time.sleep(0.003)
        return self.now()

    def restart(self) -> int:
        """The most bytes that were alive since the last restart."""
        most, self.most = self.most, self.settled()
        return most

    def _note_gathered(self, t: Tensor) -> None:
        self.gathered[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        if sum(self.gathered.values()) > self.most_gathered:
            time.sleep(0.003)
            self.most_gathered = max(self.most_gathered, sum(self.gathered.values()))

    def _freed(self, storage: int, made: weakref.ref[Any]) -> None:
        if self.seen.get(storage) is not made:
            return  # the address is another storage's by now
        del self.seen[storage]
        self.bytes.pop(storage, None)
        self.gathered.pop(storage, None)
        self.blocks.discard(storage)


@dataclass(frozen=True)
class Seen:
    """Of one step, bytes: alive ahead of each instruction, given as (name of its function, microbatch); the most during each; the most of gathered weights."""

    between: list[tuple[tuple[str, int], int]]
    peaks: list[int]
    gathered: int


def watched(step: Callable[[], Any], source: Callable[..., Any]) -> Seen:
    """Run a step of the generated ``source`` and look at what is alive ahead of every instruction."""
    names = source.__globals__
    lane = names["LANE"]
    between: list[tuple[tuple[str, int], int]] = []
    peaks: list[int] = []
    with Alive() as alive:

        def announced(part: Callable[..., None]) -> Callable[..., None]:
            def run(rt: Any, v: Any, m: Any, mb: int) -> None:
                peaks.append(alive.restart())
                between.append(((part.__name__, mb), alive.now()))
                part(rt, v, m, mb)

            return run

        names["LANE"] = tuple((announced(part), mb) for part, mb in lane)
        try:
            step()
        finally:
            names["LANE"] = lane
        peaks.append(alive.restart())
    return Seen(between, peaks[1:], alive.most_gathered)


def settled(looks: Iterable[int]) -> int:
    """What several looks at one number agree on: the least but one. Nearly all that are off are above, where a thread of gloo still held
    the buffer of a collective that is over; of thousands one was below."""
    return sorted(looks)[1]


def predicted(p: Program, rank: int, mesh: Mesh) -> list[int]:
    """What deepseed.memory says of each instruction of a rank: the most bytes beside what stays between steps."""
    lane = mesh.coordinate(rank).get("pp", 0)
    found = unroll(p, lane)
    stays = memory(found.program).resident_bytes
    assert p.schedule is not None
    most = [0] * len(p.schedule.lanes[lane])
    for (instruction, _), row in zip(found.origin, curve(found.program, {}), strict=True):
        most[instruction] = max(most[instruction], sum(row.values()) - stays)
    return most


def main(target: str, plan: str) -> str:
    """What this rank counted, as JSON."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    sent = Sent()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = load(target)
    step = deepseed.compile(found.model, plan, optimizer=torch.optim.AdamW(found.model.parameters()), clip_grad_norm=1.0)
    step(found.batch)
    sent.on = True
    step(found.batch)
    sent.on = False
    run = step.programs.latest.executables[0]._loaded.names["step"]
    gc.collect()
    seen = [watched(lambda: step(found.batch), run) for _ in range(LOOKS)]
    names = [instruction for instruction, _ in seen[0].between]
    between = [(*instruction, settled(s.between[n][1] for s in seen)) for n, instruction in enumerate(names)]
    params = map(here, found.model.parameters())
    explained = step.explain().to_json() if rank == 0 else None
    result = {
        "params": sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in params}.values()),
        "peaks": [settled(peaks) for peaks in zip(*(s.peaks for s in seen), strict=True)], "said": predicted(step.program, rank, step.mesh),
        "between": between, "gathered": settled(s.gathered for s in seen), "sent": sent.by_axis(step.mesh, rank), "messages": sent.messages, "explain": explained,
    }  # fmt: skip
    dist.barrier()
    dist.destroy_process_group()
    return json.dumps(result)
