"""A checkpoint that a thread of each process writes while training goes on.

The threads meet on a board, not in the process group. Each writes its files and leaves a note of them; rank 0's closes the folder and leaves a note of how
it ended. A process does not end before its thread has.
"""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # noqa: F401  # registered before this file is: it ends later
import threading
from collections.abc import Callable
from contextlib import suppress

from deepseed.checkpoint import Saving
from deepseed.logs import warn
from deepseed.runtime.board import Board
from deepseed.runtime.folder import CheckpointError, discard
from deepseed.runtime.host import Attempt, agreed, attempted

_UNSETTLED: set[Writing] = set()  # under way, or failed without that anybody has asked


class Writing:
    """``saving.held`` are copies. ``processes``: how many write. ``then``: what rank 0 does once the checkpoint is in its place."""

    def __init__(self, saving: Saving, board: Board, first: bool, processes: int, then: Callable[[], None]) -> None:
        self.saving, self._board, self._first, self._processes, self._then = saving, board, first, processes, then
        self._end: Attempt[None] = (None, f"{saving.what}: the thread that writes has ended", CheckpointError)
        self._thread = threading.Thread(target=self._run, name="deepseed checkpoint", daemon=False)  # the interpreter waits for it
        _UNSETTLED.add(self)
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def settle(self) -> Attempt[None]:
        """How it ended, once it has."""
        self._thread.join()
        _UNSETTLED.discard(self)
        return self._end

    def _run(self) -> None:
        saving, key = self.saving, self.saving.folder.name
        mine = attempted(saving.what, saving.write)
        saving.held.clear()

        def close() -> None:
            saving.close(agreed([mine, *(self._board.read(f"{key}/wrote", rank) for rank in range(1, self._processes))]), self._then)

        def end() -> Attempt[None]:
            if not self._first:
                self._board.post(f"{key}/wrote", mine)
                found: Attempt[None] = self._board.read(f"{key}/ended", 0)
                return found
            ended = attempted(saving.what, close)
            if ended[1]:
                with suppress(OSError):
                    discard(saving.folder)
            self._board.post(f"{key}/ended", ended)
            return ended

        found = attempted(saving.what, end)
        self._end = found[0] if found[0] is not None else (None, found[1], found[2])
        if not self._end[1]:
            _UNSETTLED.discard(self)


def join() -> None:
    """Until every thread that writes has ended."""
    for writing in list(_UNSETTLED):
        writing._thread.join()


threading._register_atexit(join)  # type: ignore[attr-defined]  # while executors still take work, which the writing gives them


@atexit.register
def _unasked() -> None:
    """The interpreter ends: what nobody has asked for is said."""
    for writing in list(_UNSETTLED):
        if text := writing.settle()[1]:
            warn(text)
