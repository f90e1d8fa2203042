"""The processes of replicas, from their start until they have ended."""

from __future__ import annotations

import os
import secrets
import signal
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Listener
from multiprocessing.context import SpawnProcess
from pathlib import Path
from queue import Empty, Queue
from time import monotonic
from typing import Any

from deepseed.inference.errors import InferenceError
from deepseed.serve.replicas import Found


class Started:
    def __init__(self, number: int, target: Callable[..., None], *given: Any) -> None:
        """``target(*given, address, key, number)`` runs in each."""
        import multiprocessing

        self._folder = tempfile.TemporaryDirectory(prefix="deepseed-")
        address, key = str(Path(self._folder.name) / "replicas"), secrets.token_bytes(32)
        self._listener = Listener(address, "AF_UNIX", backlog=number, authkey=key)
        context = multiprocessing.get_context("spawn")
        self._made: Callable[[int], SpawnProcess] = lambda n: context.Process(target=target, args=(*given, address, key, n), name=f"replica {n}")
        self._one, self._ended = threading.Lock(), False  # starts again by one thread at a time
        self.processes = [self._made(n) for n in range(number)]
        for process in self.processes:
            process.start()

    def ready(self) -> list[Found]:
        """Once all have said what they are. Raises InferenceError where one ends before."""
        try:
            return self._wait(range(len(self.processes)))
        except InferenceError:
            self.end(5)
            raise

    def again(self, number: int) -> Found:
        """A replica whose leading process has gone, from its start until it is ready; what is left of it is killed. Raises InferenceError where it ends before."""
        with self._one:
            old = self.processes[number]
            old.join(5)
            if old.pid is not None:
                with suppress(OSError):  # its ranks are of its session
                    os.killpg(old.pid, signal.SIGKILL)
            old.join()
            if self._ended:
                raise InferenceError("the server ends")
            self.processes[number] = self._made(number)
            self.processes[number].start()
            return self._wait([number])[0]

    def _wait(self, numbers: Sequence[int]) -> list[Found]:
        came: Queue[Found] = Queue()

        def accept() -> None:
            for _ in numbers:
                try:
                    connection: Any = self._listener.accept()
                    came.put((connection, connection.recv()))
                except (OSError, EOFError):
                    return  # closed, or it ended while it said who it is

        threading.Thread(target=accept, daemon=True).start()
        out: list[Found] = []
        while len(out) < len(numbers):
            try:
                out.append(came.get(timeout=0.2))
            except Empty:
                for n in numbers:
                    if self.processes[n].exitcode is not None:
                        raise InferenceError(f"replica {n} of {len(self.processes)} ended with exit code {self.processes[n].exitcode} before it was ready\n  fix: see what it said above") from None
        return out

    def end(self, seconds: float = 30.0) -> None:
        """Wait for them, whose connections are closed, and kill who stays."""
        self._ended = True
        until = monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, until - monotonic()))
            if process.exitcode is None:
                process.kill()
                process.join()
        self._listener.close()
        self._folder.cleanup()
