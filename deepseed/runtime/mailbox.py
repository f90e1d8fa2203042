"""Messages of simulated ranks: one mailbox an ordered pair, first in, first out, with the checks that real ranks cannot make.

What is taken is a copy. A message that does not have the shape and dtype that its receiver expects, one whose tensor was written
before it was taken, and one that nobody took are errors that name sender, receiver and message.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from weakref import ref

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from deepseed.runtime.pipeline import as_bytes, named


@dataclass
class Mailbox:
    """From one rank to another. ``held``: the copy that travels, by number, until it is taken; ``watched``: the sender's memory, as long as
    it lives, until the message has left."""

    sender: int
    receiver: int
    sent: int = 0
    held: dict[int, Tensor] = field(default_factory=dict)
    watched: dict[int, Watched] = field(default_factory=dict)
    receipts: list[Receipt] = field(default_factory=list)

    def put(self, x: Tensor) -> None:
        with _disable_current_modes():  # the copy is the receiver's
            self.held[self.sent], self.watched[self.sent] = x.clone(), Watched(x)
        self.sent += 1

    def expect(self, shape: Sequence[int], dtype: torch.dtype) -> Receipt:
        receipt = Receipt(self, len(self.receipts), tuple(shape), dtype)
        self.receipts.append(receipt)
        return receipt

    def leave(self, number: int) -> None:
        """The sender may write its tensor from now on. Raises RuntimeError where it did so before."""
        watched = self.watched.pop(number, None)
        with _disable_current_modes():  # what is looked at here is no memory of the rank that asks
            x = watched.tensor if watched is not None else None
            changed = x is not None and not torch.equal(as_bytes(x), as_bytes(self.held[number]))
        if changed:
            raise RuntimeError(
                f"message {number} from rank {self.sender} to rank {self.receiver}: rank {self.sender} wrote the tensor before it had left\n"
                "  fix: send a copy, or write after rt.flush()"
            )

    def unread(self) -> Iterator[str]:
        """What is wrong at the end of a step: a line a message."""
        for number, x in self.held.items():
            yield f"  message {number} from rank {self.sender} to rank {self.receiver}, {named(x.shape, x.dtype)}, was sent and never taken"
        for receipt in self.receipts[self.sent :]:
            yield f"  message {receipt.number} from rank {self.sender} to rank {self.receiver}, {receipt.expected}, was expected and never sent"


class Watched:
    """A tensor's memory, which is not kept alive."""

    def __init__(self, x: Tensor) -> None:
        self._storage, self._like = ref(x.untyped_storage()), (x.dtype, x.storage_offset(), x.shape, x.stride())

    @property
    def tensor(self) -> Tensor | None:
        storage = self._storage()
        dtype, offset, shape, stride = self._like
        return None if storage is None else torch.empty(0, dtype=dtype, device=storage.device).set_(storage, offset, shape, stride)


@dataclass
class Receipt:
    """A receive that was posted: the message with its number."""

    box: Mailbox
    number: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def expected(self) -> str:
        return named(self.shape, self.dtype)

    @property
    def complete(self) -> bool:
        return self.number < self.box.sent

    @property
    def missing(self) -> str:
        return f"waits for rank {self.box.sender} to send message {self.number}, {self.expected} ({self.box.sent} have come from it)"

    def take(self) -> Tensor:
        """The copy, once it is there. Raises RuntimeError where it is not what is expected."""
        where = f"message {self.number} from rank {self.box.sender} to rank {self.box.receiver}"
        if self.number not in self.box.held:
            raise RuntimeError(f"{where} was waited for twice")
        self.box.leave(self.number)
        copy = self.box.held.pop(self.number)
        if tuple(copy.shape) != self.shape or copy.dtype != self.dtype:
            raise RuntimeError(
                f"{where}: rank {self.box.receiver} expects {self.expected}, rank {self.box.sender} sent {named(copy.shape, copy.dtype)}\n"
                "  fix: a pair of ranks must have its sends and receives in one order; compare the two lanes of the schedule"
            )
        return copy


@dataclass
class Flush:
    """What a rank waits for until all that it sent has left: a message leaves when its receiver has posted the receive."""

    boxes: Sequence[Mailbox]

    @property
    def complete(self) -> bool:
        return all(len(box.receipts) >= box.sent for box in self.boxes)

    @property
    def missing(self) -> str:
        waits = [f"rank {box.receiver} to expect message {len(box.receipts)}, {self._named(box)}" for box in self.boxes if len(box.receipts) < box.sent]
        return f"flushes, and waits for {' and for '.join(waits)}"

    def leave(self) -> None:
        for box in self.boxes:
            for number in list(box.watched):
                box.leave(number)

    @staticmethod
    def _named(box: Mailbox) -> str:
        return named(box.held[len(box.receipts)].shape, box.held[len(box.receipts)].dtype)
