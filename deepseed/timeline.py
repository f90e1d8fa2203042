"""A schedule run in simulated time: when each instruction begins and ends on each pipeline rank, and what share of the step is idle.

Discrete events: an instruction begins when its lane is free and what it waits for has arrived. A message leaves when the instruction that
makes it ends; the link of a pair of ranks carries one at a time, in each direction, and the latency of one overlaps with the bytes of the next. What
runs once on several lanes and crosses within itself (the norm of all gradients) begins there when all lanes that it waits for have come to it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import inf

from deepseed.ir.messages import Item, Message, Place, needs, runs_once, sends, within_once
from deepseed.ir.schedule import Instruction, Schedule, format_instruction
from deepseed.solver.schedules import ScheduleError


@dataclass(frozen=True)
class Event:
    """Lane ``lane`` runs ``instruction`` from ``start`` to ``end`` (seconds since the step began)."""

    lane: int
    instruction: Instruction
    start: float
    end: float


@dataclass(frozen=True)
class Transfer:
    """The value ``name`` of ``microbatch`` is on its way from one lane to another from ``start`` to ``end`` (seconds)."""

    name: str
    microbatch: int
    source: int
    target: int
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """Events in the order of each lane, lane by lane; transfers in the order in which each lane sends."""

    schedule: Schedule
    events: tuple[Event, ...]
    transfers: tuple[Transfer, ...]

    @cached_property
    def step_seconds(self) -> float:
        return max((e.end for e in self.events), default=0.0)

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """Seconds that each lane works."""
        out = [0.0] * len(self.schedule.lanes)
        for e in self.events:
            out[e.lane] += e.end - e.start
        return tuple(out)

    @property
    def bubble_share(self) -> float:
        """Idle seconds of all lanes over all lanes' seconds in the step."""
        whole = len(self.schedule.lanes) * self.step_seconds
        return 1 - sum(self.busy) / whole if whole else 0.0


def simulate(
    schedule: Schedule,
    seconds: Mapping[Place, float],
    messages: Mapping[str, Message] | None = None,
    sizes: Mapping[str, int] | None = None,
    bandwidth: float = inf,
    latency: float = 0.0,
) -> Timeline:
    """Run the schedule. ``seconds``: of each (part, stage), one microbatch (0 where none is given); ``sizes``: bytes of each message (0);
    ``bandwidth`` (bytes/s) and ``latency`` (s) of the link between two ranks. Raises ScheduleError naming what each lane waits for when the lanes never end."""
    wire = {name: (sizes or {}).get(name, 0) / bandwidth for name in messages or {}}
    return _Run(schedule, seconds, messages or {}, wire, latency).timeline()


class _Run:
    def __init__(self, schedule: Schedule, seconds: Mapping[Place, float], messages: Mapping[str, Message], wire: Mapping[str, float], latency: float) -> None:
        """``wire``: seconds that each message keeps its link."""
        self.schedule, self.messages, self.wire, self.latency = schedule, messages, wire, latency
        self.seconds = dict(seconds)
        for (part, stage), value in seconds.items():
            if runs_once(part) and stage != schedule.lane_of(stage):  # one instruction a lane, for all its stages
                lane = schedule.lane_of(stage)
                self.seconds[part, lane] = self.seconds.get((part, lane), 0.0) + value
        across = {name: message for name, message in messages.items() if not within_once(message)}
        lanes = range(len(schedule.lanes))
        self.sends = [sends(schedule, lane, across) for lane in lanes]
        self.needs = [needs(schedule, lane, across) for lane in lanes]
        self.meets = _meetings(schedule, messages)
        self.arrived: dict[Item, float] = {}
        self.link: dict[tuple[int, int], float] = {}  # when the link of a pair is free
        self.at = [0] * len(schedule.lanes)
        self.free = [0.0] * len(schedule.lanes)
        self.ready: dict[tuple[str, int], float] = {}  # when a lane came to a part that runs once
        self.events: list[list[Event]] = [[] for _ in lanes]
        self.transfers: list[Transfer] = []

    def timeline(self) -> Timeline:
        todo = deque(range(len(self.schedule.lanes)))
        waiting: dict[tuple[str, int], list[int]] = {}  # of each value, or (part, lane) to come: who waits
        while todo:
            lane = todo.popleft()
            while self.at[lane] < len(self.schedule.lanes[lane]):
                missing = self._missing(lane)
                for key in self._came(lane):
                    todo.extend(waiting.pop(key, ()))
                if missing is not None:
                    waiting.setdefault(missing, []).append(lane)
                    break
                for key in self._run(lane):
                    todo.extend(waiting.pop(key, ()))
        if stuck := [lane for lane, program in enumerate(self.schedule.lanes) if self.at[lane] < len(program)]:
            said = "\n  ".join(self._stuck(lane) for lane in stuck)
            many = f"{len(stuck)} of {len(self.schedule.lanes)} lanes never end"
            raise ScheduleError(f"{self.schedule.name}: {many}\n  {said}\n  fix: deepseed.solver.schedules.check names the cycle")
        return Timeline(self.schedule, tuple(e for lane in self.events for e in lane), tuple(self.transfers))

    def _current(self, lane: int) -> Instruction:
        return self.schedule.lanes[lane][self.at[lane]]

    def _came(self, lane: int) -> Iterator[tuple[str, int]]:
        """Note when the lane came to a part that runs once, for those that meet it there."""
        i = self._current(lane)
        if runs_once(i.part) and (i.part, lane) not in self.ready and all(item in self.arrived for item in self.needs[lane][self.at[lane]]):
            self.ready[i.part, lane] = self._begin(lane)
            yield i.part, lane

    def _missing(self, lane: int) -> Item | None:
        """The first value, or (part, lane) to meet, that the lane's next instruction waits for."""
        i = self._current(lane)
        for item in self.needs[lane][self.at[lane]]:
            if item not in self.arrived:
                return item
        for other in self.meets.get((i.part, lane), {}):
            if (i.part, other) not in self.ready:
                return i.part, other
        return None

    def _begin(self, lane: int) -> float:
        return max([self.free[lane], *(self.arrived[item] for item in self.needs[lane][self.at[lane]])])

    def _run(self, lane: int) -> Iterator[Item]:
        i, n = self._current(lane), self.at[lane]
        start = self._begin(lane)
        for other, names in self.meets.get((i.part, lane), {}).items():
            start = max(start, self.ready[i.part, other] + max((self.wire[name] + self.latency for name in names), default=0.0))
        end = start + self.seconds.get((i.part, i.stage), 0.0)
        self.events[lane].append(Event(lane, i, start, end))
        self.free[lane], self.at[lane] = end, n + 1
        for name, microbatch in self.sends[lane][n]:
            target = self.schedule.lane_of(self.messages[name][1][1])
            leave = max(end, self.link.get((lane, target), 0.0))
            self.link[lane, target] = leave + self.wire[name]
            self.arrived[name, microbatch] = leave + self.wire[name] + self.latency
            self.transfers.append(Transfer(name, microbatch, lane, target, leave, self.arrived[name, microbatch]))
            yield name, microbatch

    def _stuck(self, lane: int) -> str:
        i, missing = self._current(lane), self._missing(lane)
        what = "nothing"
        if missing is not None:
            name, n = missing
            what = f"%{name} of microbatch {n}" if name in self.messages else f"lane {n} to come to {name}"
        return f"lane {lane}: {format_instruction(i, lane, self.schedule.loops)} waits for {what}"


def _meetings(schedule: Schedule, messages: Mapping[str, Message]) -> dict[tuple[str, int], dict[int, list[str]]]:
    """Of each (part that runs once, lane): the lanes whose values it waits for within the part, directly or through others, and the
    messages that come from each directly."""
    out: dict[tuple[str, int], dict[int, list[str]]] = {}
    for name, message in messages.items():
        if within_once(message):
            (part, source), (_, target) = message
            here, there = schedule.lane_of(target), schedule.lane_of(source)
            if here != there:
                out.setdefault((part, here), {}).setdefault(there, []).append(name)
    for part, lane in list(out):
        seen, todo = set(out[part, lane]), list(out[part, lane])
        while todo:
            fresh = out.get((part, todo.pop()), {}).keys() - seen
            seen |= fresh
            todo += fresh
        for other in sorted(seen - {lane} - out[part, lane].keys()):
            out[part, lane][other] = []
    return out
