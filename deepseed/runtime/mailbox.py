"""Messages of simulated ranks: one mailbox an ordered pair, first in, first out, with the checks that real ranks cannot make.

What is taken is a copy. A message that does not have the shape and dtype that its receiver expects, one whose tensor was written
before it was taken, and one that nobody took are errors that name sender, receiver and message.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deepseed.runtime.pipeline import as_bytes, named


@dataclass
class Mailbox:
    """From one rank to another. ``held``: the sender's tensor and the copy that travels, by number, until it is taken."""

    sender: int
    receiver: int
    sent: int = 0
    held: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    receipts: list[Receipt] = field(default_factory=list)

    def put(self, x: Tensor) -> None:
        self.held[self.sent] = (x, x.clone())
        self.sent += 1

    def expect(self, shape: Sequence[int], dtype: torch.dtype) -> Receipt:
        receipt = Receipt(self, len(self.receipts), tuple(shape), dtype)
        self.receipts.append(receipt)
        return receipt

    def unread(self) -> Iterator[str]:
        """What is wrong at the end of a step: a line a message."""
        for number, (x, _) in self.held.items():
            yield f"  message {number} from rank {self.sender} to rank {self.receiver}, {named(x.shape, x.dtype)}, was sent and never taken"
        for receipt in self.receipts[self.sent :]:
            yield f"  message {receipt.number} from rank {self.sender} to rank {self.receiver}, {receipt.expected}, was expected and never sent"


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
        x, copy = self.box.held.pop(self.number)
        if tuple(copy.shape) != self.shape or copy.dtype != self.dtype:
            raise RuntimeError(
                f"{where}: rank {self.box.receiver} expects {self.expected}, rank {self.box.sender} sent {named(copy.shape, copy.dtype)}\n"
                "  fix: a pair of ranks must have its sends and receives in one order; compare the two lanes of the schedule"
            )
        if not torch.equal(as_bytes(x), as_bytes(copy)):
            raise RuntimeError(f"{where}: rank {self.box.sender} wrote the tensor before it was received\n  fix: send a copy, or write after the receiver has answered")
        return copy
