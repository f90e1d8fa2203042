"""Told to stop (SIGTERM: a preemption, a time limit): every rank stops after the same step, without a collective a step.

A rank that is told, and has finished step s, writes ``stop after step s + 1`` into the store where the ranks met; the first one to write wins. Every rank
looks there after each step, a message of tens of microseconds. No rank can finish step s + 1 without the one that wrote, which begins it only after it
has written: so all of them find it in time, and ``asked(n)`` is the same on every rank for each n, however often it is asked. It needs steps that no rank can
finish alone, as those of training are: gradients, or a pipeline's messages, or the loss, go through all of them.
"""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import Store

from deepseed.runtime.stores import own

CODE = 128 + signal.SIGTERM  # exit code of a process that was told to stop, and has saved: no launcher starts it again
_told = False
_former: Any = None
_listens = False
_stores: WeakKeyDictionary[ProcessGroup, Store] = WeakKeyDictionary()


def listen() -> None:
    """Hear SIGTERM from now on, which then no longer ends this process: whoever calls this must ask. A handler that was there is called too."""
    global _listens, _former
    if _listens:
        return
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("SIGTERM is heard by the main thread alone\n  fix: ask for the first time there: engine.preempted, or deepseed.Checkpoints(..)")
    _former = signal.signal(signal.SIGTERM, _hear)
    _listens = True


def _hear(number: int, frame: FrameType | None) -> None:
    global _told
    _told = True
    if callable(_former):
        _former(number, frame)


def asked(step: int, of: str = "") -> bool:
    """Whether to save and stop now that ``step`` steps are done; the same on all ranks. Every rank must ask, after the same steps (not each one). ``of``: who
    counts these steps, where more than one does."""
    listen()
    store = _store()
    if store is None:
        return _told
    key = f"stop after/{of}"
    found = store.get(key) if store.check([key]) else store.compare_set(key, "", str(step + 1)) if _told else b""
    return bool(found) and step >= int(found)


def leave() -> NoReturn:
    """End this process, which has saved."""
    sys.stdout.flush()
    raise SystemExit(CODE)


def _store() -> Store | None:
    """None: this process is alone."""
    group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    if group is None or dist.get_world_size() == 1:
        return None
    if group not in _stores:
        _stores[group] = own(dist.distributed_c10d._get_default_store(), "preempt")
    return _stores[group]
