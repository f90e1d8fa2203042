"""What a kernel over many tensors is launched with (deepseed.codegen.many_tensors): which tensor and which chunk of it each program has, and a table of the tensors' addresses."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

TABLES = 256  # that are kept
AHEAD = 16  # pinned tables of one length that wait for a capture

_tables: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}  # the one that was made longest ago first
_ahead: dict[int, list[Tensor]] = {}  # pinned memory by its length: none can be had while a graph is captured
_replayed: list[Tensor] = []  # what graphs copy at each replay


@cache
def chunks(sizes: tuple[int, ...], size: int, device: torch.device) -> Tensor:
    """``[programs, 2]``: a tensor's number and that of a chunk of ``size`` elements of it."""
    return torch.tensor([(t, c) for t, n in enumerate(sizes) for c in range(-(-n // size))], dtype=torch.int32, device=device)


@cache
def lengths(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(sizes, dtype=torch.int64, device=device)


@cache
def forms(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Which formula each tensor has: so many have the first, and so on."""
    return torch.tensor([n for n, count in enumerate(counts) for _ in range(count)], dtype=torch.int32, device=device)


def aligned(tensors: Sequence[Sequence[Tensor]], columns: Sequence[int]) -> bool:
    """Whether the tensors of these columns begin where vectors of 16 bytes do."""
    return all(row[n].data_ptr() % 16 == 0 for row in tensors for n in columns)


def addresses(tensors: Sequence[Sequence[Tensor]], device: torch.device) -> Tensor:
    """Where tensors lie, row by row, each row as long as the longest. Copied to the device once: those of a training stay where they are. A CUDA graph that is captured copies them at each replay."""
    width = max(map(len, tensors))
    found = tuple([p for row in tensors for p in (*(x.data_ptr() for x in row), *[0] * (width - len(row)))])
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _in_graph(found, device)
    made = _tables.get((found, device))
    if made is None:
        if device.type == "cuda" and len(waiting := _ahead.setdefault(len(found), [])) < AHEAD:
            waiting.append(_pinned(len(found)))
        made = _tables[found, device] = torch.tensor(found, dtype=torch.int64, device=device)
        while len(_tables) > TABLES:
            _tables.pop(next(iter(_tables)), None)
    return made


def _in_graph(found: tuple[int, ...], device: torch.device) -> Tensor:
    """A table in the graph's own memory, which another may overwrite between replays."""
    waiting = _ahead.get(len(found))
    host = waiting.pop() if waiting else _pinned(len(found))
    host.copy_(torch.tensor(found, dtype=torch.int64))
    _replayed.append(host)
    return torch.empty(len(found), dtype=torch.int64, device=device).copy_(host, non_blocking=True)


def _pinned(n: int) -> Tensor:
    return torch.empty(n, dtype=torch.int64, pin_memory=True)
