"""Messages over torch.distributed: a group of two ranks for each direction of a pair, on which the sender broadcasts.

A broadcast in a group of two is a message, with all that a collective has: it runs beside the computation, is waited for in short
slices (a receive of gloo that times out closes every connection of its group), and can be asked whether it is over. Each
direction has its own group, hence its own queue (a communicator of nccl): neighbours may send to each other first, both. A group is
made by its two ranks alone: torch's own ``new_group`` is called by all ranks, 56 times for each pipeline of 8.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import permutations
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroupGloo, _get_default_store

from deepseed.runtime.pipeline import as_bytes

if TYPE_CHECKING:
    from deepseed.runtime.distributed import World

Group = Any  # torch's Backend, whose stub lacks the collectives
POSTED = 1800.0  # seconds that a receive may be posted before its message comes, at least


class Channels:
    """This rank's messages to and from the ``ranks`` of its pipeline. All of them make one at the same time."""

    def __init__(self, world: World, ranks: Sequence[int]) -> None:
        self.world, self.ranks = world, tuple(ranks)
        self._under_way: deque[tuple[dist.Work, Tensor, str]] = deque()
        self._numbers: Counter[tuple[int, int]] = Counter()
        for pair in sorted(permutations(ranks, 2), key=lambda pair: (min(pair), max(pair), pair)):  # one order for all: two wait for each other in each
            if world.rank in pair and pair not in world.channels:
                world.channels[pair] = _channel(world, pair)

    def post(self, x: Tensor, rank: int) -> None:
        """Start to send a contiguous ``x``, which is kept until it has left (and this rank has sent or received something after that)."""
        self._let_go()
        if x.numel():
            what = self._what("sending to", self.world.rank, rank)
            self._under_way.append((self._begin(x, self.world.rank, rank, what), x, what))

    def fetch(self, shape: Sequence[int], dtype: torch.dtype, rank: int) -> Callable[[], Tensor]:
        """Start to receive the next message of ``rank``."""
        self._let_go()
        out = torch.empty(tuple(shape), dtype=dtype, device=self.world.device)
        if not out.numel():
            return lambda: out
        what = self._what("receiving from", rank, self.world.rank)
        work = self._begin(out, rank, self.world.rank, what)

        def complete() -> Tensor:
            self.world.wait(work, what)
            self._let_go()
            return out

        return complete

    def flush(self) -> None:
        """Wait until everything that was posted has left."""
        while self._under_way:
            self._left()

    def _let_go(self) -> None:
        """Of what has left."""
        while self._under_way and self._under_way[0][0].is_completed():
            self._left()

    def _left(self) -> None:
        """Wait for the message that was sent first, and let go of its tensor."""
        work, _, what = self._under_way[0]
        self.world.wait(work, what)
        self._under_way.popleft()

    def _what(self, doing: str, sender: int, receiver: int) -> str:
        other = receiver if sender == self.world.rank else sender
        self._numbers[sender, receiver] += 1
        return f"{doing} pipeline rank {self.ranks.index(other)} (rank {other}), message {self._numbers[sender, receiver]}"

    def _begin(self, x: Tensor, sender: int, receiver: int, what: str) -> dist.Work:
        began = time.monotonic()
        try:
            return _send_first(self.world.channels[sender, receiver], x)
        except (RuntimeError, ValueError) as error:
            self.world.watch.doing = what
            raise self.world.watch.diagnose(error, time.monotonic() - began) from error


def hand(world: World, x: Tensor | None, shape: Sequence[int], dtype: torch.dtype, source: int, target: int) -> Tensor | None:
    """The tensor ``x`` of rank ``source`` on rank ``target``; None on the others. All ranks must call it, in one order of all such calls."""
    if source == target or world.rank not in (source, target):
        return x if world.rank == target else None
    if (source, target) not in world.channels:
        world.channels[source, target] = _channel(world, (source, target))
    out = torch.empty(tuple(shape), dtype=dtype, device=world.device) if x is None else x.to(world.device).contiguous()
    if out.numel():
        world.run(lambda: _send_first(world.channels[source, target], out), f"a part of a tensor from rank {source} to rank {target}")
    return out if world.rank == target else None


def _channel(world: World, pair: tuple[int, int]) -> Group:
    """The group of a sender, its rank 0, and a receiver."""
    store, rank = PrefixStore(f"deepseed.channel/{pair[0]}/{pair[1]}", _get_default_store()), pair.index(world.rank)
    timeout = timedelta(seconds=max(world.timeout, POSTED))
    if world.device.type == "cpu":
        return ProcessGroupGloo(store, rank, 2, timeout)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    group = dist.ProcessGroupNCCL(store, rank, 2, options)
    _send_first(group, torch.zeros(1, device=world.device)).wait()  # makes the communicator, for which both ranks wait: not in mid-pipeline
    return group


def _send_first(group: Group, x: Tensor) -> dist.Work:
    """Start the message ``x``, contiguous, from rank 0 to rank 1 of a group of two."""
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor, options.asyncOp = 0, 0, True
    work: dist.Work = group.broadcast([as_bytes(x)], options)
    return work
