"""Who failed: each rank beats in the shared store; when something goes wrong, the beats and what they say name the culprit.

A thread of each rank posts, once a second, a count, what the rank is doing (``all_reduce over tp, number 12``) and at which
node of its program and line of its script it is. A rank that raises posts why. A rank whose collective fails or takes too long raises the alarm and looks: a rank that posted a
failure is the culprit, else one whose count stands still (it died), else one that is in no collective and at no message (it fell behind).
Failures belong to a turn, one call into DeepSeed: all ranks make the same calls, and an error that was caught is over.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple

from torch.distributed.distributed_c10d import Store

from deepseed.logs import warn
from deepseed.runtime.errors import RankError
from deepseed.runtime.stores import own
from deepseed.runtime.whereabouts import main_thread

BEAT = 1.0  # seconds
SILENCE = 4.0  # seconds without a beat: dead
MESSAGE = ("sending to ", "receiving from ")  # how a rank says that it waits for one other rank


class Beat(NamedTuple):
    """``number``: of the beat. ``at``: the node and the script's line."""

    number: int
    doing: str
    at: str

    def text(self) -> str:
        return f"{self.doing}; {self.at}" if self.at else self.doing


class Watch:
    def __init__(self, store: Store, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self.doing = "start"
        self.turn = 0
        self._mine = own(store, "watch")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="deepseed watch", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        count = 0
        while not self._stop.wait(BEAT if count else 0):
            count += 1
            try:
                self._mine.set(f"beat/{self.rank}", json.dumps([count, self.doing, main_thread()]))
            except RuntimeError:
                return  # the store is gone: whoever waits in a collective finds out

    def close(self) -> None:
        self._stop.set()
        self._thread.join(2 * BEAT)

    def failed(self, error: BaseException) -> None:
        """Tell the others that this rank raised ``error``."""
        try:
            self._mine.set(f"failed/{self.turn}/{self.rank}", f"{type(error).__name__}: {error}")
            self._mine.set(f"alarm/{self.turn}", str(self.rank))
        except RuntimeError:
            pass

    def leaves(self, out_of_step: bool) -> None:
        """Tell the others that this rank's turn has ended in an error, and whether it left a collective that was under way."""
        with suppress(RuntimeError):
            self._mine.set(f"left/{self.turn}/{self.rank}", "out of step" if out_of_step else "in step")

    def left(self) -> list[str]:
        """What the ranks that have left this turn said; one that is gone with the store has left."""
        keys = [f"left/{self.turn}/{rank}" for rank in range(self.world)]
        try:
            return [self._mine.get(key).decode() for key in keys if self._mine.check([key])]
        except RuntimeError:
            return ["out of step"] * self.world

    def alarmed(self) -> bool:
        """Whether any rank is in trouble."""
        try:
            return bool(self._mine.check([f"alarm/{self.turn}"]))
        except RuntimeError:
            return True

    def diagnose(self, error: BaseException, seconds: float) -> RankError:
        """The error to raise where this rank's collective failed or took ``seconds``: names the culprit. Takes some seconds."""
        what = f"rank {self.rank} gave up after {seconds:.1f} s in {self.doing}"
        try:
            self._mine.set(f"alarm/{self.turn}", str(self.rank))
            before = self._beats()
            until = time.monotonic() + SILENCE
            while time.monotonic() < until:
                for rank in range(self.world):
                    if rank != self.rank and self._mine.check([f"failed/{self.turn}/{rank}"]):
                        why = self._mine.get(f"failed/{self.turn}/{rank}").decode()
                        return RankError(rank, f"rank {rank} failed: {why}\n  {what}")
                time.sleep(0.2)
            after = self._beats()
        except RuntimeError as gone:
            return RankError(0, f"rank 0, which keeps the store where ranks meet, is gone ({_first_line(gone)})\n  {what}")
        none = Beat(0, "", "")
        silent = [r for r in range(self.world) if r != self.rank and after.get(r, none).number <= before.get(r, none).number]
        if silent:
            last = after[silent[0]].text() if silent[0] in after else "never seen"
            many = f" (and {', '.join(map(str, silent[1:]))})" if silent[1:] else ""
            return RankError(silent[0], f"rank {silent[0]}{many} died, last seen in {last}\n  {what} ({_first_line(error)})")
        late = [r for r in range(self.world) if r != self.rank and not waits(after.get(r, none).doing)]
        culprit = late[0] if late else -1
        blame = f"rank {culprit} did not come to a {'message' if self.doing.startswith(MESSAGE) else 'collective'}" if late else "ranks wait for each other"
        return RankError(culprit, f"{blame}\n  {what} ({_first_line(error)}); all ranks live:\n{_places(after)}")

    def tell(self, seconds: float, timeout: float) -> None:
        """Print, on the first rank that asks in this turn, how long it waits and where all ranks are."""
        with suppress(RuntimeError):
            if self._mine.add(f"told/{self.turn}", 1) == 1:
                head = f"rank {self.rank} has waited {seconds:.0f} s, and gives up after {timeout:.0f} (DEEPSEED_TIMEOUT)"
                warn(f"{head}\n{_places(self._beats())}")

    def beat(self, rank: int) -> int:
        """The number of a rank's latest beat."""
        return Beat(*json.loads(self._mine.get(f"beat/{rank}"))).number if self._mine.check([f"beat/{rank}"]) else 0

    def _beats(self) -> dict[int, Beat]:
        out: dict[int, Beat] = {}
        for rank in range(self.world):
            key = f"beat/{rank}"
            if self._mine.check([key]):
                out[rank] = Beat(*json.loads(self._mine.get(key)))
        return out


def waits(doing: str) -> bool:
    """Whether a rank that does this is in a collective, or at a message.

    >>> waits("all_reduce over tp, number 12"), waits("receiving from pipeline rank 1 (rank 2), message 3")
    (True, True)
    >>> waits("computation after receiving from pipeline rank 1 (rank 2), message 3")
    False
    """
    return " over " in doing or doing.startswith(MESSAGE)


def _places(beats: Mapping[int, Beat]) -> str:
    return "\n".join(f"  rank {rank}: {beats[rank].text()}" for rank in sorted(beats))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
