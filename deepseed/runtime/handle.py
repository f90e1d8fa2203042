"""How generated source waits: what a started collective or receive gives, and ``rt.wait`` takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass
class Handle:
    """An exchange under way: ``complete`` blocks and gives the exchanged buffer, ``finish`` makes the result of it."""

    complete: Callable[[], Tensor]
    finish: Callable[[Tensor], Tensor]


class Direct(ABC):
    """A ``complete`` that can bring the exchanged buffer into memory that is there already."""

    @abstractmethod
    def __call__(self) -> Tensor: ...

    @abstractmethod
    def into(self, out: Tensor) -> Tensor:
        """``out``: contiguous, with as many elements."""


def same(x: Tensor) -> Tensor:
    return x


def done(x: Tensor) -> Handle:
    """The handle of what needed no exchange."""
    return Handle(lambda: x, same)
