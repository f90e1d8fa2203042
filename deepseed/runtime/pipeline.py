"""What passes between pipeline ranks and between microbatches: messages, sums over microbatches, and wholes of their parts.

A message has no tag: the n-th that a rank receives from another one is the n-th that the other sent to it, since every schedule
has both in one order (deepseed/ir/schedule.py). A send never waits for its receiver. ``to`` and ``source`` are positions on ``pp``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deepseed.ir.mesh import STAGES, Mesh
from deepseed.ops import accumulate_mm, embedding_backward, mm
from deepseed.runtime.handle import Handle, same

Place = tuple[int, int] | tuple[int, int, int, int]


class Messages(ABC):
    """One rank among the ranks of its pipeline. A back end gives ``post``, ``fetch``, ``spread`` and ``flush``."""

    mesh: Mesh
    rank: int
    device: torch.device
    coordinate: Mapping[str, int]

    @abstractmethod
    def post(self, x: Tensor, rank: int) -> None:
        """Start to send a contiguous ``x`` to ``rank``; it is kept until it has left."""

    @abstractmethod
    def fetch(self, shape: Sequence[int], dtype: torch.dtype, rank: int) -> Callable[[], Tensor]:
        """Start to receive the next message of ``rank``; the result waits for it and gives a tensor of its own."""

    @abstractmethod
    def spread(self, x: Tensor, axis: str, source: int) -> Callable[[], Tensor]:
        """Start to give all ranks of ``axis`` the contiguous ``x`` of the one at ``source``; elsewhere ``x`` is a buffer, which is written."""

    @abstractmethod
    def flush(self) -> None:
        """Wait until everything that was sent has left: the end of a step."""

    def send(self, x: Tensor, to: int) -> None:
        """Send ``x`` to a pipeline rank, without waiting. Until the receiver has it nobody may write ``x``, which is kept alive."""
        self.post(x.resolve_conj().resolve_neg().contiguous(), self._neighbour(to))

    def receive_start(self, shape: Sequence[int], dtype: torch.dtype, source: int) -> Handle:
        """Post the receive of the next message of a pipeline rank; ``wait`` gives a contiguous tensor that shares no memory."""
        return Handle(self.fetch(tuple(shape), dtype, self._neighbour(source)), same)

    def broadcast(self, x: Tensor | None, shape: Sequence[int], dtype: torch.dtype, source: int) -> Tensor:
        """The value of the pipeline rank ``source`` on all of them; the others may give None. Raises ValueError where the
        value of ``source`` is missing, or is not of ``shape`` and ``dtype``."""
        alone = STAGES not in self.mesh.sizes or self.mesh.size(STAGES) == 1
        if alone or self.coordinate[STAGES] == source:
            if x is None or tuple(x.shape) != tuple(shape) or x.dtype != dtype:
                have = "nothing" if x is None else named(x.shape, x.dtype)
                raise ValueError(f"broadcast from pipeline rank {source}: {named(shape, dtype)} is expected, rank {self.rank} has {have}")
            return x if alone else self.spread(x.contiguous(), STAGES, source)()
        return self.spread(torch.empty(tuple(shape), dtype=dtype, device=self.device), STAGES, source)()

    def accumulate(self, acc: Tensor | None, x: Tensor, op: str = "sum", own: bool = False) -> Tensor:
        """``acc`` with the value of one more microbatch, in place. The first one (``acc`` is None) starts it: ``x`` itself where the
        caller's tensor is its ``own`` (nothing else reads or sends that memory), else a copy."""
        if acc is None:
            return x if own else x.clone()
        if op == "max":
            return torch.maximum(acc, x, out=acc)
        return acc.logical_or_(x) if acc.dtype is torch.bool else acc.add_(x)

    def accumulate_mm(self, acc: Tensor | None, a: Tensor, b: Tensor, kernel: Any = None) -> Tensor:
        """``acc`` with one more microbatch's product, which is added up in there; by a ``kernel`` where one is given, if it knows how (``added``)."""
        if kernel is None:
            return mm(a, b) if acc is None else accumulate_mm(acc, a, b)
        if acc is not None and hasattr(kernel, "added"):
            added: Tensor = kernel.added(acc, a, b)
            return added
        return self.accumulate(acc, kernel(a, b)[0], own=True)

    def accumulate_rows(self, acc: Tensor | None, g: Tensor, ids: Tensor, rows: int) -> Tensor:
        """``acc`` with one more microbatch's gradient of an embedding: the rows that it has."""
        if acc is None or g.device.type != "cpu":  # elsewhere rows would be added in any order
            return self.accumulate(acc, embedding_backward(g, ids, rows), own=True)
        return acc.index_add_(0, ids.reshape(-1), g.reshape(-1, g.shape[-1]))

    def collect(self, parts: Sequence[Tensor], put: Place) -> Tensor:
        """The whole of a value that was split over microbatches, from its part of each. ``put``: where they are joined, as in
        ``all_gather_start``: dimension ``dim`` is seen as (outer, microbatches, rest)."""
        dim, outer = put[0], put[1]
        seen = [x.reshape(*x.shape[:dim], outer, x.shape[dim] // max(outer, 1), *x.shape[dim + 1 :]) for x in parts]
        return torch.cat(seen, dim + 1).flatten(dim, dim + 1)

    def _neighbour(self, position: int) -> int:
        """The rank at ``position`` of this rank's pipeline."""
        group = self.mesh.group(STAGES, self.rank)
        if not 0 <= position < len(group) or group[position] == self.rank:
            raise ValueError(f"rank {self.rank} is pipeline rank {self.coordinate[STAGES]} of {len(group)}: no message goes between it and pipeline rank {position}")
        return group[position]


def named(shape: Sequence[int], dtype: torch.dtype) -> str:
    """
    >>> named((2, 3), torch.float32)
    'float32[2, 3]'
    """
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"


def as_bytes(x: Tensor) -> Tensor:
    """The memory of a contiguous tensor, as it is: a back end need not know its dtype, and NaNs are equal."""
    return x.view(-1).view(torch.uint8)
