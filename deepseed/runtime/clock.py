"""When each value of a run was there: what ``rt.look`` of source that was generated with looks is given, by the clock of the device."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch


class Moment(NamedTuple):
    """A value of a program, of a microbatch, was made between ``begin`` and ``end``, in seconds since the run began."""

    name: str
    mb: int
    begin: float
    end: float


class Clock:
    """Of one rank in one run: a value's time is that since the value before it was there."""

    def __init__(self, rank: int, device: torch.device) -> None:
        self.rank, self._cuda = rank, device.type == "cuda"
        self.began = time.time()
        self._names: list[tuple[str, int]] = []
        self._times: list[float | torch.cuda.Event] = [self._now()]

    def look(self, name: str, x: object, mb: int = 0) -> None:
        self._names.append((name, mb))
        self._times.append(self._now())

    def moments(self) -> list[Moment]:
        """In the order in which they were made."""
        if self._cuda:
            torch.cuda.synchronize()
        first = self._times[0]
        seconds = [first.elapsed_time(t) / 1e3 if isinstance(first, torch.cuda.Event) else float(t) - first for t in self._times]  # type: ignore[arg-type]
        return [Moment(name, mb, a, b) for (name, mb), a, b in zip(self._names, seconds, seconds[1:], strict=False)]

    def _now(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event
