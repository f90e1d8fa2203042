"""Which values of a run are not finite: what ``rt.look`` of source that was generated with looks is given, seen on the device and read once at the end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Look:
    """A value with elements that are not finite, as one rank has it. ``first``: its first such element's number, ``value``: which it is."""

    rank: int
    name: str
    mb: int
    shape: tuple[int, ...]
    count: int
    nan: bool
    first: int
    value: float


class Looks:
    """Of one rank in one run."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._seen: list[tuple[str, int, tuple[int, ...]]] = []
        self._numbers: list[Tensor] = []

    def look(self, name: str, x: object, mb: int = 0) -> None:
        if not isinstance(x, Tensor) or not (x.is_floating_point() or x.is_complex()) or not x.numel():
            return
        flat = torch.view_as_real(x).sum(-1).flatten() if x.is_complex() else x.flatten()
        wrong = ~torch.isfinite(flat)
        first = wrong.to(torch.uint8).argmax()
        self._seen.append((name, mb, tuple(x.shape)))
        self._numbers.append(torch.stack([wrong.sum().double(), flat.isnan().any().double(), first.double(), flat[first].double()]))

    def found(self) -> list[Look]:
        """In the order in which they were made."""
        if not self._numbers:
            return []
        by_device: dict[torch.device, list[int]] = {}
        for n, numbers in enumerate(self._numbers):
            by_device.setdefault(numbers.device, []).append(n)
        read: dict[int, list[float]] = {}
        for ns in by_device.values():
            read |= dict(zip(ns, torch.stack([self._numbers[n] for n in ns]).tolist(), strict=True))
        return [Look(self.rank, *self._seen[n], int(count), bool(nan), int(first), value) for n, (count, nan, first, value) in sorted(read.items()) if count]
