"""torch.distributed's agent of one node, with another way to end ranks: quickly where one is lost, with time to save where the job is told to stop.

A signal to stop goes to each rank's process and not to what it has started: a data loader's workers are needed until the step is over. Ranks that end
with PREEMPTED have saved; the others are waited for. Where a rank fails, the others and all that they have started end within seconds.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsSpecs

PREEMPTED = 128 + signal.SIGTERM  # exit code of a rank that was told to stop, and has saved
SETTLE = 3.0  # seconds between asking the ranks that are left to end and ending them
INTERRUPTED = 10  # the same after Ctrl-C, which every rank has heard
STUCK = 30.0  # seconds after SIGKILL: a process that the kernel holds is left


class Agent(LocalElasticAgent):
    """``heard``: the signals that asked this launcher to stop, in this start of the ranks or before. ``groups``: they go to all that ranks have started.
    ``lost``: set by another thread where another node has lost a rank. ``ended``: local ranks that were ended because another was lost; ``overdue``: that
    were still there after ``grace`` seconds."""

    def __init__(self, spec: WorkerSpec, logs: LogsSpecs, grace: float, heard: list[signal.Signals], lost: threading.Event, groups: bool = False) -> None:
        super().__init__(spec, logs_specs=logs)
        self.grace, self.heard, self.lost, self.groups = grace, heard, lost, groups
        self.ended: set[int] = set()
        self.overdue: set[int] = set()
        self._processes: dict[int, int] = {}
        self._until = float("inf")
        self._ending = False

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # nohup
        self._processes = super()._start_workers(worker_group)
        signal.signal(signal.SIGTERM, self._hear)
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else self._hear)
        if self.heard:
            self._stop()
        return self._processes

    def _hear(self, number: int, frame: object) -> None:
        self.heard.append(signal.Signals(number))
        if len(self.heard) == 1:
            self._stop()

    def _stop(self) -> None:
        self._until = time.monotonic() + self.grace
        for process in self._processes.values():
            with suppress(ProcessLookupError):
                (os.killpg if self.groups else os.kill)(process, signal.SIGTERM)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        """All processes are left unreaped until none runs: torch's own look ends whatever runs beside one that has failed."""
        codes = {rank: _code(process) for rank, process in self._processes.items()}
        alive, now = [rank for rank, code in codes.items() if code is None], time.monotonic()
        if alive and now < self._until + STUCK:
            if not self._ending and (self.lost.is_set() or any(code not in (None, 0, PREEMPTED) for code in codes.values())):
                self._ending, self._until = True, now + SETTLE
                self.ended |= set(alive)
                self._signal(alive, signal.SIGTERM)
            elif PREEMPTED in codes.values() and self._until == float("inf"):
                self._until = now + self.grace
            elif now > self._until:
                self.overdue |= set() if self._ending else set(alive)
                self._signal(alive, signal.SIGKILL)
            return RunResult(state=WorkerState.HEALTHY)
        if any(codes.values()):
            self._signal(codes, signal.SIGKILL)  # each rank leads a process group: what it has started ends too
        found: RunResult = super()._monitor_workers(worker_group)
        self._processes = {}
        return found

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = INTERRUPTED) -> None:
        super()._shutdown(death_sig, min(timeout, INTERRUPTED))

    def _signal(self, ranks: Iterable[int], number: signal.Signals) -> None:
        for rank in ranks:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._processes[rank], number)


def _code(process: int) -> int | None:
    """The exit code of a child (minus the signal that ended it), which stays to be reaped; None while it runs."""
    try:
        found = os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return 0
    if found is None:
        return None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
