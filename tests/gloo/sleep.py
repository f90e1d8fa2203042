"""One rank that runs its lane of a schedule with every part replaced by a sleep of known length, and small messages between.

What is left of a step is the schedule itself: the order of the instructions, who waits for whom, and what a message costs.
A sleeper wakes when the machine lets it: simulated time is of the parts as they were, measured in the step it is compared with.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean, median

import torch
import torch.distributed as dist
from torch import Tensor

from deepseed.ir.mesh import Mesh
from deepseed.ir.messages import Item, Message, Place, chain, needs, receives, sends
from deepseed.ir.schedule import Schedule
from deepseed.runtime.collectives import Runtime
from deepseed.runtime.distributed import DistributedRuntime, guarded, start, stop
from deepseed.solver.schedules import lanes
from deepseed.timeline import simulate

WORDS = 16  # numbers in a message
CLOSE = 1.05  # how much longer than in simulated time a step may take
Step = tuple[float, float]  # seconds that it took, and in simulated time


@dataclass(frozen=True)
class Case:
    """A schedule, and how long (s) each (part, stage) sleeps."""

    name: str
    ranks: int
    microbatches: int
    chunks: int = 1
    unit: float = 0.05  # of a forward; a backward takes two, and where weights are apart each half takes one
    tilt: float = 0.0  # the last stage takes this much more than the first

    @property
    def schedule(self) -> Schedule:
        return lanes(self.name, self.ranks, self.microbatches, self.chunks)

    @property
    def messages(self) -> dict[str, Message]:
        return chain(self.schedule.stages)

    @property
    def seconds(self) -> dict[Place, float]:
        s = self.schedule
        split = any(i.kind == "weights" for lane in s.lanes for i in lane)
        units = {"forward": 1, "weights": 1, "backward": 1 if split else 2}
        return {
            (i.part, i.stage): self.unit / self.chunks * units[i.kind] * (1 + self.tilt * i.stage / max(s.stages - 1, 1))
            for lane in s.lanes for i in lane if i.kind in units
        }  # fmt: skip


def asleep(rt: Runtime, s: Schedule, messages: Mapping[str, Message], seconds: Mapping[Place, float]) -> dict[Place, float]:
    """One step of this rank's lane. Each message says which it is, and is looked at. Returns how long each of its parts took, on average, but for what it waited."""
    here, number = rt.coordinate["pp"], {name: n for n, name in enumerate(messages)}
    posted, used, made = receives(s, here, messages), needs(s, here, messages), sends(s, here, messages)
    handles: dict[Item, Callable[[], Tensor]] = {}
    took: dict[Place, list[float]] = {}

    def receive(item: Item) -> None:
        handle = rt.receive_start((WORDS,), torch.int64, s.lane_of(messages[item[0]][0][1]))
        handles[item] = lambda: rt.wait(handle)

    for n, i in enumerate(s.lanes[here]):
        began = time.monotonic()
        for item in posted[n]:
            receive(item)
        waits = time.monotonic()
        for name, microbatch in used[n]:
            got = handles.pop((name, microbatch))()
            if got[:2].tolist() != [number[name], microbatch]:
                raise ValueError(f"lane {here}, {i}: %{name} of microbatch {microbatch} is due, and {got[:2].tolist()} of {list(number)} came")
        due = time.monotonic()
        time.sleep(seconds.get((i.part, i.stage), 0.0))
        for name, microbatch in made[n]:
            rt.send(torch.tensor([number[name], microbatch] + [0] * (WORDS - 2)), s.lane_of(messages[name][1][1]))
        took.setdefault((i.part, i.stage), []).append(waits - began + time.monotonic() - due)
    rt.flush()
    return {place: fmean(each) for place, each in took.items()}


def latency(rt: Runtime, rounds: int = 30) -> float:
    """Seconds of one small message, from here to the next rank and back, halved: the median, the same on all ranks. Who begins has slept
    before, as in a step: what a message costs is not what it costs to ranks that have just done the same."""
    took = [0.0]
    if rt.coordinate["pp"] < 2:
        for _ in range(rounds):
            if rt.coordinate["pp"] == 0:
                time.sleep(0.02)
                began = time.monotonic()
                rt.send(torch.zeros(WORDS), 1)
                rt.wait(rt.receive_start((WORDS,), torch.float32, 1))
                took.append((time.monotonic() - began) / 2)
            else:
                rt.send(rt.wait(rt.receive_start((WORDS,), torch.float32, 0)), 0)
        rt.flush()
    return float(rt.broadcast(torch.tensor(median(took)), (), torch.float32, 0))


def timed(cases: list[Case], steps: int, most: int = 0) -> list[tuple[float, list[Step]]]:
    """Of each case the latency of a message, and of each step its seconds, from the moment that all ranks begin to the last one's end, beside simulated time.
    ``most``: steps to take until one is within ``CLOSE`` of simulated time, since other work on the machine delays messages too."""
    torch.set_num_threads(1)
    start("gloo")
    rt = DistributedRuntime(Mesh((("pp", dist.get_world_size()),)), timeout=60.0)
    out = []
    with guarded(rt):
        for case in cases:
            s, messages, seconds = case.schedule, case.messages, case.seconds
            wire, took = latency(rt), list[Step]()
            while len(took) < steps or (len(took) < most and all(real > CLOSE * simulated for real, simulated in took)):  # the same numbers on all ranks
                rt.wait(rt.all_reduce_start(torch.ones(1), "pp"))
                began = time.monotonic()
                slept = asleep(rt, s, messages, seconds)
                here = torch.tensor([-began, time.monotonic(), *(slept.get(place, 0.0) for place in seconds)], dtype=torch.float64)
                minus, end, *slept_all = rt.wait(rt.all_reduce_start(here, "pp", "max")).tolist()  # one machine: one clock
                took.append((minus + end, predicted(case, wire, dict(zip(seconds, slept_all, strict=True)))))
            out.append((wire, took))
    stop()
    return out


def predicted(case: Case, wire: float, slept: Mapping[Place, float] | None = None) -> float:
    """Seconds of a step in simulated time, whose parts take what they were told to sleep, or ``slept``."""
    return simulate(case.schedule, slept or case.seconds, case.messages, latency=wire).step_seconds
