"""All ranks of a mesh in one process: the same generated source, one thread a rank, collectives as a rendezvous, messages by mailbox.

Deterministic: only the rank that holds the baton runs; it hands it on, in rank order, where it must wait for a collective or a
message. A collective is computed when its last rank arrives, in the order of the ranks. No run hangs: when every rank waits, the
error says for what; when a rank raises, the others end and the error names the rank.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from deepseed.ir.mesh import Mesh
from deepseed.runtime.arena import Arena
from deepseed.runtime.collectives import Runtime
from deepseed.runtime.errors import RankError
from deepseed.runtime.mailbox import Flush, Mailbox, Receipt

Step = Callable[[Any, list[Tensor]], tuple[Tensor, ...]]


class _Aborted(BaseException):
    """Unwinds a rank because another one failed."""


@dataclass
class _Meeting:
    """One collective of one group: what has been brought, and, once all are there, what each rank gets."""

    group: tuple[int, ...]
    what: str
    brought: dict[int, Tensor] = field(default_factory=dict)
    results: dict[int, Tensor] = field(default_factory=dict)
    complete: bool = False
    sends: dict[int, Sequence[int]] = field(default_factory=dict)

    @property
    def missing(self) -> str:
        return f"waits for {sorted(set(self.group) - set(self.brought))} in {self.what}"


class _Simulation:
    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.batons = [threading.Semaphore(0) for _ in range(mesh.ranks)]
        self.waiting: list[_Meeting | Receipt | Flush | None] = [None] * mesh.ranks
        self.finished = [False] * mesh.ranks
        self.meetings: dict[tuple[tuple[int, ...], int], _Meeting] = {}
        self.counts: dict[tuple[tuple[int, ...], int], int] = {}
        self.boxes: dict[tuple[int, int], Mailbox] = {}
        self.failure: tuple[int, BaseException] | None = None

    def box(self, sender: int, receiver: int) -> Mailbox:
        return self.boxes.setdefault((sender, receiver), Mailbox(sender, receiver))

    def bring(self, rank: int, kind: str, x: Tensor, axis: str, reduce: str, sends: Sequence[int] = ()) -> _Meeting:
        """``sends``: how many rows of ``x`` go to each rank, where they are not equal blocks."""
        group = self.mesh.group(axis, rank)
        number = self.counts.get((group, rank), 0)
        self.counts[group, rank] = number + 1
        what = f"{kind}{f' ({reduce})' if reduce else ''} over {axis} of {str(x.dtype).removeprefix('torch.')}{['*', *x.shape[1:]] if sends else list(x.shape)}"
        meeting = self.meetings.setdefault((group, number), _Meeting(group, what))
        if what != meeting.what:
            others = ", ".join(map(str, meeting.brought))
            raise RuntimeError(f"collective {number} of ranks {list(group)}: rank {rank} does {what}, rank {others} {meeting.what}")
        meeting.brought[rank] = x
        meeting.sends[rank] = sends
        if len(meeting.brought) == len(group):
            parts = [meeting.brought[r] for r in group]
            with _disable_current_modes():  # nobody's account: each rank counts its own (deepseed.runtime.arena)
                made = _rows(parts, [meeting.sends[r] for r in group]) if sends else _compute(kind, parts, reduce)
            meeting.results = dict(zip(group, made, strict=True))
            meeting.brought.clear()
            meeting.complete = True
            del self.meetings[group, number]
        return meeting

    def wait(self, rank: int, until: _Meeting | Receipt | Flush) -> None:
        """Let the others run until what this rank waits for is there."""
        while not until.complete:
            self.waiting[rank] = until
            self._hand_on(rank)
            self.batons[rank].acquire()
            if self.failure is not None:
                raise _Aborted
            self.waiting[rank] = None

    def meet(self, rank: int, meeting: _Meeting) -> Tensor:
        self.wait(rank, meeting)
        return meeting.results.pop(rank)

    def _hand_on(self, rank: int) -> None:
        n = self.mesh.ranks
        for other in ((rank + 1 + i) % n for i in range(n)):
            blocked = self.waiting[other]
            if not self.finished[other] and (blocked is None or blocked.complete):
                self.batons[other].release()
                return
        if not all(self.finished):
            lines = [f"  rank {r} {'has finished' if m is None else m.missing}" for r, m in enumerate(self.waiting)]
            raise RuntimeError("deadlock: no rank can go on\n" + "\n".join(lines))

    def run(self, rank: int, step: Callable[[], None]) -> None:
        """The body of a rank's thread."""
        self.batons[rank].acquire()
        try:
            if self.failure is None:
                with torch.no_grad():
                    step()
                self.finished[rank] = True
                self._hand_on(rank)
        except _Aborted:
            pass
        except BaseException as error:
            if self.failure is None:
                self.failure = (rank, error)
            for baton in self.batons:
                baton.release()


def _rows(parts: Sequence[Tensor], sends: Sequence[Sequence[int]]) -> list[Tensor]:
    """What each rank gets of the rows that each sends to it, in the order of the ranks."""
    pieces = [torch.split(x, list(counts)) for x, counts in zip(parts, sends, strict=True)]
    return [torch.cat([piece[i] for piece in pieces]) for i in range(len(parts))]


def _compute(kind: str, parts: Sequence[Tensor], reduce: str) -> list[Tensor]:
    """What each rank gets; no result shares memory with another one or with an operand. ``reduce`` of a broadcast is its source."""
    if kind == "all_gather":
        return [torch.stack(list(parts)) for _ in parts]
    if kind == "all_to_all":
        return [torch.stack([part[i] for part in parts]) for i in range(len(parts))]
    if kind == "broadcast":
        return [parts[int(reduce)].clone() for _ in parts]
    total = parts[0].clone()
    for part in parts[1:]:
        if reduce == "max":
            torch.maximum(total, part, out=total)
        elif total.dtype is torch.bool:
            total.logical_or_(part)
        else:
            total += part
    if kind == "reduce_scatter":
        return [total[i].clone() for i in range(len(parts))]
    return [total, *(total.clone() for _ in parts[1:])]


class SimulatedRuntime(Runtime):
    def __init__(self, simulation: _Simulation, rank: int, device: torch.device | str) -> None:
        super().__init__(simulation.mesh, rank, device)
        self._simulation = simulation
        self._unflushed = 0  # messages sent since the last flush

    def exchange(self, kind: str, x: Tensor, axis: str, reduce: str, *, owned: bool = False) -> Callable[[], Tensor]:
        meeting = self._simulation.bring(self.rank, kind, x, axis, reduce)
        n = self.mesh.size(axis)
        nbytes = {"all_gather": n * x.nbytes, "reduce_scatter": x.nbytes // n, "all_reduce": 0 if owned else x.nbytes}.get(kind, x.nbytes)
        return self._under_way(x, nbytes, lambda: self._simulation.meet(self.rank, meeting))

    def _under_way(self, x: Tensor, nbytes: int, arrive: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Where memory is counted: what an exchange reads, and the place for what it brings, are held from its start to its end."""
        if self.arena is None:
            return arrive
        held, release, take = [x], self.arena.reserve(nbytes), self.arena.take

        def complete() -> Tensor:
            y = arrive()
            release()
            held.clear()
            return take(y)

        return complete

    def exchange_rows(self, x: Tensor, sends: Sequence[int], receives: Sequence[int], axis: str) -> Callable[[], Tensor]:
        meeting = self._simulation.bring(self.rank, "rows", x, axis, "", sends)

        def complete() -> Tensor:
            out = self._simulation.meet(self.rank, meeting)
            if len(out) != sum(receives):
                raise RuntimeError(f"{meeting.what}: {sum(receives)} rows are due on rank {self.rank}, {len(out)} came")
            return out

        nbytes = sum(receives) * x.nbytes // max(1, len(x))
        return self._under_way(x, nbytes, complete)

    def post(self, x: Tensor, rank: int) -> None:
        self._simulation.box(self.rank, rank).put(x)
        self._unflushed += 1

    def fetch(self, shape: Sequence[int], dtype: torch.dtype, rank: int) -> Callable[[], Tensor]:
        receipt = self._simulation.box(rank, self.rank).expect(shape, dtype)

        def complete() -> Tensor:
            self._simulation.wait(self.rank, receipt)
            return receipt.take()

        empty = torch.empty(0, dtype=dtype)
        return self._under_way(empty, prod(shape) * dtype.itemsize, complete)

    def spread(self, x: Tensor, axis: str, source: int) -> Callable[[], Tensor]:
        return self.exchange("broadcast", x, axis, str(source))

    def flush(self) -> None:
        sent = Flush([box for box in self._simulation.boxes.values() if box.sender == self.rank])
        self._simulation.wait(self.rank, sent)
        sent.leave()
        self._unflushed = 0

    def ended(self) -> None:
        """Raises RuntimeError where the step has left messages under way."""
        if self._unflushed:
            raise RuntimeError(f"rank {self.rank} ended its step with {self._unflushed} messages under way\n  fix: rt.flush() at the end of the step")


def simulate(
    mesh: Mesh, steps: Sequence[Step], inputs: Sequence[list[Tensor]], device: torch.device | str = "cpu", arenas: Sequence[Arena] = ()
) -> list[tuple[Tensor, ...]]:
    """Run ``steps[rank](rt, inputs[rank])`` for every rank of the mesh; what each returned. ``arenas``: accounts of memory, one a rank.

    Raises RankError naming the rank that raised (its exception is the cause), or that no rank could go on, or the messages that
    nobody took.
    """
    if len(steps) != mesh.ranks or len(inputs) != mesh.ranks:
        raise ValueError(f"{mesh} has {mesh.ranks} ranks, but {len(steps)} steps and {len(inputs)} lists of inputs are given")
    simulation = _Simulation(mesh)
    results: list[tuple[Tensor, ...]] = [()] * mesh.ranks

    def body(rank: int) -> None:
        rt = SimulatedRuntime(simulation, rank, device)
        rt.arena = arenas[rank] if arenas else None
        results[rank] = steps[rank](rt, inputs[rank])
        rt.ended()

    threads = [
        threading.Thread(target=simulation.run, args=(rank, lambda rank=rank: body(rank)), name=f"rank {rank}", daemon=True)
        for rank in range(mesh.ranks)
    ]
    for thread in threads:
        thread.start()
    simulation.batons[0].release()
    for thread in threads:
        thread.join()
    if simulation.failure is not None:
        rank, error = simulation.failure
        raise RankError(rank, f"rank {rank} of {mesh} at {mesh.coordinate(rank)}: {type(error).__name__}: {error}") from error
    unread = [(box.receiver, line) for box in simulation.boxes.values() for line in box.unread()]
    if unread:
        raise RankError(unread[0][0], f"messages are left at the end of the step on {mesh}\n" + "\n".join(line for _, line in unread))
    return results
