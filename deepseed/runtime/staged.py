"""Copies in host memory of what a process writes, so that training may go on and write into the originals. The memory is kept from one save to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from deepseed.runtime.saved import Ints, Share

Key = tuple[int, str, Ints]  # which of the hosted ranks, the tensor, where the box begins in it


class Staged:
    def __init__(self) -> None:
        self._memory: dict[Key, Tensor] = {}

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self._memory.values())

    def of(self, hosted: int) -> int:
        """Bytes of one of the hosted ranks."""
        return sum(t.nbytes for (n, _, _), t in self._memory.items() if n == hosted)

    def lacking(self, held: Sequence[Sequence[Share]]) -> int:
        """Bytes that a copy needs beyond those that there are."""
        return sum(share.values.nbytes for key, share in _keyed(held).items() if self._fitting(key, share) is None)

    def copy(self, held: Sequence[Sequence[Share]]) -> list[list[Share]]:
        """The same shares with values of their own. When it returns the originals may change."""
        keyed = _keyed(held)
        self._memory = {key: t for key, share in keyed.items() if (t := self._fitting(key, share)) is not None}
        out: list[list[Share]] = [[] for _ in held]
        devices = set()
        for key, share in keyed.items():
            if key not in self._memory:
                self._memory[key] = torch.empty(share.values.shape, dtype=share.values.dtype, pin_memory=share.values.is_cuda)
            self._memory[key].copy_(share.values, non_blocking=True)
            devices |= {share.values.device} if share.values.is_cuda else set()
            out[key[0]].append(replace(share, values=self._memory[key]))
        for device in devices:
            torch.cuda.synchronize(device)
        return out

    def _fitting(self, key: Key, share: Share) -> Tensor | None:
        t = self._memory.get(key)
        return t if t is not None and (t.shape, t.dtype) == (share.values.shape, share.values.dtype) else None


def _keyed(held: Sequence[Sequence[Share]]) -> dict[Key, Share]:
    return {(n, share.name, share.box.at): share for n, own in enumerate(held) for share in own}


def available() -> int | None:
    """Bytes of host memory that can be had without swapping; None where the system does not tell."""
    return host_memory().get("available")


def host_memory() -> dict[str, int]:
    """Bytes of the host's memory, ``total`` and ``available``; empty where the system does not tell."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return {name: int(lines[key].split()[0]) * 1024 for name, key in (("total", "MemTotal"), ("available", "MemAvailable"))}
    except (OSError, KeyError, ValueError):
        return {}
