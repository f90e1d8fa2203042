"""The two memories of a rank on a machine without an accelerator: an account of live storages, with a limit for the device's.

A dispatch mode sees every tensor that an op makes, temporaries included, and a finalizer when its storage goes; it knows nothing of the
program, so that what it counts can be held against what deepseed.memory predicts. A storage is the host's where an operand of the op that
made it is, or where the source says so (``on_host``: moves, and what is made of nothing); all others are the device's. Where these would
be more than the limit the op fails, as it would on an accelerator. What was there before a step and is no input of it is the caller's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from linecache import getline
from typing import Any
from weakref import finalize

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deepseed.ir.amounts import parse_bytes


class DeviceMemoryError(torch.OutOfMemoryError):
    """An op asked for more than a rank's device memory has: names rank, op, source line, and the bytes."""


class Arena(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """One rank's account. ``limit``: bytes of the device, None to count only. ``peak`` and ``host_peak``: the most that was live in a step,
    of all steps so far."""

    def __init__(self, rank: int, limit: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rank, self.limit = rank, limit
        self.now = self.host_now = self.peak = self.host_peak = 0
        self.kept = 0  # bytes of the host that are held beside a step: copies of what a checkpoint is written from
        self._live: dict[int, tuple[int, bool, object]] = {}  # by storage: bytes, whether the host's, and a token of this life of it
        self._hosting = False

    @contextmanager
    def step(self, inputs: Sequence[Tensor], host: Sequence[bool]) -> Iterator[None]:
        """Count while the body runs. ``host``: which inputs lie on the host."""
        self._live.clear()
        self.now, self.host_now = 0, self.kept
        self._given(inputs, host)
        with self:
            yield

    def _given(self, inputs: Sequence[Tensor], host: Sequence[bool]) -> None:
        for x, there in zip(inputs, host, strict=True):
            self._see(x, there, "the inputs of the step")

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """What the body makes lies on the host."""
        before, self._hosting = self._hosting, True
        try:
            yield
        finally:
            self._hosting = before

    def reserve(self, nbytes: int) -> Callable[[], None]:
        """Count bytes that another thread will fill; the result ends that."""
        token = object()
        self._add(id(token), nbytes, False, token, "a collective's result")
        return lambda: self._gone(id(token), token)

    def take(self, x: Tensor) -> Tensor:
        """Count what another thread made for this rank."""
        self._see(x, False, "a collective's result")
        return x

    def __torch_dispatch__(self, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [t for t in _tensors((out,)) if t.untyped_storage()._cdata not in self._live]
        if made:
            given = {t.untyped_storage()._cdata for t in _tensors((*args, *(kwargs or {}).values()))}
            host = self._hosting or any(key in self._live and self._live[key][1] for key in given)
            for t in made:
                if t.untyped_storage()._cdata not in given:  # else it is a view of the caller's
                    self._see(t, host, str(func))
        return out

    def _see(self, t: Tensor, host: bool, what: str) -> None:
        storage = t.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        token = object()
        finalize(storage, self._gone, key, token).atexit = False
        self._add(key, storage.nbytes(), host, token, what)

    def _add(self, key: int, nbytes: int, host: bool, token: object, what: str) -> None:
        self._live[key] = nbytes, host, token
        if host:
            self.host_now += nbytes
            self.host_peak = max(self.host_peak, self.host_now)
            return
        self.now += nbytes
        self.peak = max(self.peak, self.now)
        if self.limit is not None and self.now > self.limit:
            raise DeviceMemoryError(
                f"rank {self.rank} is out of device memory: {what} asked for {nbytes} bytes{_line()}; "
                f"{self.now - nbytes} of {self.limit} bytes are in use (and {self.host_now} on the host)\n"
                "  fix: a larger device_memory (DEEPSEED_DEVICE_MEMORY), or a plan that holds less: zero3, remat, offload(..), more ranks or microbatches"
            )

    def _gone(self, key: int, token: object) -> None:
        """A storage has ended; that of an earlier step, or one whose place another took, is not counted any more."""
        found = self._live.get(key)
        if found is None or found[2] is not token:
            return
        del self._live[key]
        if found[1]:
            self.host_now -= found[0]
        else:
            self.now -= found[0]


def accounts(given: str | int | None, device: torch.device, ranks: Sequence[int]) -> list[Arena]:
    """An arena a rank where memory is counted: ``given``, by default ``$DEEPSEED_DEVICE_MEMORY``, says how much each has. An accelerator
    has its own allocator. Raises ValueError on what is no amount of memory."""
    said = os.environ.get("DEEPSEED_DEVICE_MEMORY", "") if given is None else str(given)
    if not said or device.type != "cpu":
        return []
    limit = None if said.strip().lower() == "unlimited" else _amount(said)
    return [Arena(rank, limit) for rank in ranks]


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for v in values:
        if isinstance(v, Tensor):
            yield v
        elif isinstance(v, list | tuple):
            yield from _tensors(v)


def _line() -> str:
    """The line of generated source that runs, if one does."""
    frame = sys._getframe(1)
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).startswith("deepseed.generated."):
            return f" in `{getline(frame.f_code.co_filename, frame.f_lineno).strip()}` ({frame.f_code.co_filename}:{frame.f_lineno})"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def _amount(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise ValueError(f"device_memory={error}\n  fix: write one of these; unlimited counts only") from None
