"""Moves between a rank's two memories, which generated source starts early and waits for late.

On an accelerator the host's side is pinned, and a stream of its own copies in the order in which moves were started: one that brought
something to the host has ended when its ``wait`` returns, and with it all that were started before, so that the host may then write what
these read. Without one the "device" is memory like the host's, and a move is a copy, counted where the runtime has an arena.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cached_property

import torch
from torch import Tensor

from deepseed.runtime.arena import Arena
from deepseed.runtime.handle import Handle, same

HOST = torch.device("cpu")


class Memories:
    """The memory side of a runtime. ``arena``: the account of this rank, where one is kept."""

    device: torch.device
    host = HOST
    arena: Arena | None = None

    @property
    def on_host(self) -> AbstractContextManager[None]:
        """Around what is made on the host of no operands."""
        return self.arena.on_host() if self.arena is not None else nullcontext()

    def to_host_start(self, x: Tensor) -> Handle:
        """Start to bring ``x`` to the host; the result is contiguous and shares no memory. ``x`` is kept until the wait."""
        with self.on_host:
            y = torch.empty(x.shape, dtype=x.dtype, device=self.host, pin_memory=x.is_cuda)
        return self._start(x, y)

    def to_device_start(self, x: Tensor) -> Handle:
        """Start to bring ``x`` to the device; as ``to_host_start``."""
        return self._start(x, torch.empty(x.shape, dtype=x.dtype, device=self.device))

    def _start(self, x: Tensor, y: Tensor) -> Handle:
        if self.device.type != "cuda":
            return Handle(_Copied(x, y.copy_(x)), same)
        side = self._side
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            y.copy_(x, non_blocking=True)
        return Handle(_Copied(x, y, side.record_event()), same)

    @cached_property
    def _side(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]


class _Copied:
    """What a move reads, and what it gives once that is there."""

    def __init__(self, x: Tensor, y: Tensor, done: torch.cuda.Event | None = None) -> None:
        self._x: Tensor | None = x
        self._y, self._done = y, done

    def __call__(self) -> Tensor:
        if self._done is not None and self._y.is_cuda:
            torch.cuda.current_stream(self._y.device).wait_event(self._done)
        elif self._done is not None:
            self._done.synchronize()
        self._x = None
        return self._y


def stored_on(x: Tensor, host: bool, device: torch.device) -> Tensor:
    """``x`` where a value lies that is stored on the host (pinned beside an accelerator) or on the device."""
    if not host:
        return x.to(device)
    x = x.to(HOST)
    return x.pin_memory() if device.type == "cuda" and not x.is_pinned() else x
