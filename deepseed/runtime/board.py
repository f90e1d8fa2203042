"""Notes that processes leave for each other in the store where they met: so their threads agree, while the process group is training's.

No collective is used, so nothing has to be called in one order; whoever waits for a note of a process that has died is told so.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch.distributed as dist

from deepseed.runtime.errors import RankError
from deepseed.runtime.stores import own

if TYPE_CHECKING:
    from deepseed.runtime.distributed import World

POLL = 0.02  # seconds between two looks
SILENCE = 30.0  # seconds without a beat of the watch: dead


class Board(Protocol):
    def post(self, key: str, note: Any) -> None: ...
    def read(self, key: str, rank: int) -> Any: ...
    def before_leaving(self, do: Callable[[], None]) -> None: ...


class Alone:
    """Of the one process there is."""

    def __init__(self) -> None:
        self._notes: dict[str, Any] = {}

    def post(self, key: str, note: Any) -> None:
        self._notes[key] = note

    def read(self, key: str, rank: int) -> Any:
        return self._notes[key]

    def before_leaving(self, do: Callable[[], None]) -> None:
        return None


class Shared:
    """Of all ranks of a process group, over a connection of its own: a thread that waits keeps nobody else from the store."""

    def __init__(self, world: World) -> None:
        self._world, self._store = world, own(dist.distributed_c10d._get_default_store(), "board")

    def post(self, key: str, note: Any) -> None:
        self._store.set(f"{key}/{self._world.rank}", pickle.dumps(note))  # type: ignore[arg-type]  # bytes are taken as they are

    def read(self, key: str, rank: int) -> Any:
        """A rank's note, once it is there. Raises RankError where the rank dies before, or the store is gone."""
        name, beat, since = f"{key}/{rank}", -1, time.monotonic()
        try:
            while not self._store.check([name]):
                time.sleep(POLL)
                now = self._world.watch.beat(rank)
                if now != beat:
                    beat, since = now, time.monotonic()
                elif time.monotonic() - since > SILENCE and rank != self._world.rank:
                    raise RankError(rank, f"rank {rank} died: it has shown no life for {SILENCE:.0f} s")
            return pickle.loads(self._store.get(name))
        except RankError:
            raise
        except RuntimeError as error:
            raise RankError(0, f"the store where ranks meet is gone ({str(error).splitlines()[0][:200]})") from error

    def before_leaving(self, do: Callable[[], None]) -> None:
        """Call it while the others can still be heard."""
        self._world.before_leaving.append(do)
