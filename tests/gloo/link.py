"""An artificial link between ranks, for tests: collectives of an axis arrive one after another, none sooner than ``latency + bytes sent / bandwidth`` after the last rank has started it.

Its clock is the wall's, and a wait sleeps until the arrival; or each op takes what it took in the median of some steps, of all ranks' mean CPU time, and a wait sets the clock forward: then neither other work
on the machine nor what one step differs from another is measured, and what is left is the order in which ranks start, send and wait. What is sent is sent over gloo in both cases, and the numbers are those of any other step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepseed.runtime.clock import Clock
from deepseed.runtime.distributed import DistributedRuntime, _named


@dataclass
class _Underway:
    axis: str
    seconds: float
    stamps: Tensor
    work: dist.Work
    arrival: float | None = None


@dataclass
class Link:
    latency: float
    bandwidth: float
    wall: bool = False
    ahead: float = 0.0  # how far a clock of CPU time was set forward
    began: float = 0.0
    free: dict[str, float] = field(default_factory=dict)
    queue: dict[str, list[_Underway]] = field(default_factory=dict)
    sending: float = 0.0  # of all that was started
    waited: float = 0.0  # since it was looked at last
    open: bool = False
    takes: list[float] = field(default_factory=list)  # of the values in the order of their making, once it is known: the clock is these
    made: int = 0  # values of this step

    def now(self) -> float:
        if self.takes:
            return self.ahead
        return (time.perf_counter() if self.wall else time.thread_time()) + self.ahead - self.began

    def started(self) -> float:
        """By the clock, within an op that starts to send: all that it computes is done."""
        return self.now() + (self.takes[self.made] if self.takes else 0.0)

    def next(self) -> None:
        """A value is made."""
        if self.takes:
            self.ahead += self.takes[self.made]
        self.made += 1

    def begin(self) -> None:
        """All ranks' clocks are at zero."""
        dist.barrier()
        self.ahead = self.sending = self.waited = 0.0
        self.made = 0
        self.free, self.queue, self.open = {}, {}, True
        self.began = time.perf_counter() if self.wall else time.thread_time()

    def until(self, arrival: float, entered: float) -> None:
        """A wait that was ``entered`` ends: what it computes (it adds up what was sent, and waits for gloo) comes after the arrival."""
        held = max(0.0, arrival - entered)
        self.waited += held
        if not self.wall:
            self.ahead += held
        elif (left := arrival - self.now()) > 0:
            time.sleep(left)


class LinkedRuntime(DistributedRuntime):
    """``link``: closed until it is begun."""

    link = Link(0.0, 1.0)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._links = {}  # all that is sent goes through ``exchange``: no rank reads another's memory

    def exchange(self, kind: str, x: Tensor, axis: str, reduce: str, *, owned: bool = False) -> Callable[[], Tensor]:
        if not self.link.open or not x.numel():
            return super().exchange(kind, x, axis, reduce, owned=owned)
        n, link = self.mesh.size(axis), self.link
        sent = {"all_reduce": 2 * x.nbytes * (n - 1) // n, "all_gather": x.nbytes * (n - 1)}.get(kind, x.nbytes * (n - 1) // n)
        complete = super().exchange(kind, x, axis, reduce, owned=owned)
        stamp, stamps = torch.tensor([link.started()], dtype=torch.float64), torch.empty(n, dtype=torch.float64)
        work = _named("all_gather_single", "all_gather_into_tensor")(stamps, stamp, self._groups[axis], async_op=True)
        mine = _Underway(axis, link.latency + sent / link.bandwidth, stamps, work)
        link.queue.setdefault(axis, []).append(mine)
        link.sending += mine.seconds

        def arrived() -> Tensor:
            entered = link.now()
            out = complete()
            while mine.arrival is None:
                first = link.queue[axis].pop(0)
                first.work.wait()
                first.arrival = link.free[axis] = max(link.free.get(axis, 0.0), float(first.stamps.max())) + first.seconds
            link.until(mine.arrival, entered)
            return out

        return arrived


class LinkClock(Clock):
    """By the link's clock; ``held``: of each value, how long its making stood still for the link."""

    def __init__(self, rt: LinkedRuntime) -> None:
        self.link, self.held = rt.link, list[float]()
        super().__init__(rt.rank, rt.device)

    def look(self, name: str, x: object, mb: int = 0) -> None:
        self.held.append(self.link.waited)
        self.link.waited = 0.0
        self.link.next()
        super().look(name, x, mb)

    def _now(self) -> float:
        return self.link.now()


@dataclass(frozen=True)
class Ran:
    """One step of one rank, in seconds: by value, without what it stood still (``took``), and that (``held``); of the link (``sending``); of all (``seconds``)."""

    took: dict[str, float]
    held: dict[str, float]
    sending: float
    seconds: float


def linked_steps(target: str, plan: str, latency: float, bandwidth: float, steps: int, wall: bool, machine: str = "") -> tuple[str, list[Ran], list[float]]:
    """Train on this rank over the link: the program's text, what each step but the first took, and the losses. But for the wall's clock the ops take in the last step the medians of those before."""
    import deepseed
    from deepseed import build
    from deepseed.build import looked
    from deepseed.runtime import host
    from deepseed.speed import parse_machine
    from deepseed.target import load

    host.DistributedRuntime = LinkedRuntime  # type: ignore[misc]
    LinkedRuntime.link = link = Link(latency, bandwidth, wall)
    build.measured = lambda ranks: parse_machine(machine)
    torch.manual_seed(0)
    found = load(target)
    step: Any = deepseed.compile(found.model, plan, optimizer=torch.optim.AdamW(found.model.parameters(), lr=1e-3), clip_grad_norm=1.0, backend="gloo")
    at = step._find(found.batch, "step")
    run, = looked(at.built, step.host)
    place = {name: n for op in at.built.program.ops for n, name in enumerate(op.results)}  # other values are there when a step begins
    out: list[Ran] = []
    each: list[Tensor] = []  # of each step, what its values took
    losses: list[float] = []

    def timed(rt: LinkedRuntime, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        link.begin()
        rt.looks = clock = LinkClock(rt)
        try:
            results = run(rt, inputs)
        finally:
            rt.looks, link.open = None, False
        took: dict[str, float] = {}
        held: dict[str, float] = {}
        for m, h in zip(clock.moments(), clock.held, strict=True):
            took[m.name] = took.get(m.name, 0.0) + m.end - m.begin - h
            held[m.name] = held.get(m.name, 0.0) + h
        out.append(Ran(took, held, link.sending, link.now()))
        mine = [0.0] * len(clock.held)
        for n, (m, h) in enumerate(zip(clock.moments(), clock.held, strict=True)):
            if m.name in place:
                mine[n - place[m.name]] += m.end - m.begin - h  # all results of an op are there with its first one
        each.append(torch.tensor(mine, dtype=torch.float64))
        return results

    for n in range(steps + (not wall)):
        if n == steps:
            mean = torch.stack(each[1:])
            dist.all_reduce(mean)
            link.takes = (mean / dist.get_world_size()).median(0).values.tolist()
        shown = step._run_on(at, step._given(at), [timed])
        losses.append(float(shown["loss", "loss"]))
        step.steps += 1
    return str(at.built.program), out[1:] if wall else out[-1:], losses
