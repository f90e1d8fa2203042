"""The engine's data loader: of the dataset each data-parallel rank loads its own rows, and where it is can be saved and restored.

An epoch is one order of the whole dataset, made of the seed and the epoch's number: rank r of n takes its rows r, r+n, r+2n. What was loaded is so
many rows of that order, which says where to go on with any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sized
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler

from deepseed.config import Settings

if TYPE_CHECKING:
    from deepseed.engine.engine import Engine


class Order(Sampler[int]):
    """The rows of one rank, from ``begin`` on of all of an epoch's."""

    def __init__(self, dataset: Sized, ranks: int, rank: int, seed: int) -> None:
        self.dataset, self.ranks, self.rank, self.seed = dataset, ranks, rank, seed
        self.epoch = self.begin = 0

    def __iter__(self) -> Iterator[int]:
        order: list[int] = torch.randperm(len(self.dataset), generator=torch.Generator().manual_seed(self.seed + self.epoch)).tolist()
        left = order[self.begin :]
        while left and len(left) % self.ranks:  # every rank has as many: some rows come twice
            left += order[: -len(left) % self.ranks]
        return iter(left[self.rank :: self.ranks])

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.ranks)  # of a whole epoch


class Loader:
    """A DataLoader whose epochs are shuffled anew, as DeepSpeed's: each ``iter`` is the next epoch, or what is left of the one that was restored.
    ``epoch``: the number of those that have begun."""

    def __init__(self, loader: DataLoader[Any], order: Order | None, rows: int) -> None:
        self.loader, self.order = loader, order
        self.epoch = self.batches = 0  # batches of the epoch so far, of what this loader has loaded itself
        self._each = rows * (order.ranks if order is not None else 1)  # rows of a batch, over all ranks
        self._first = 0  # rows of the epoch that were loaded before its state was restored
        self._restored = False

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        if not self._restored:
            self.epoch, self._first = self.epoch + 1, 0
        self._restored, self.batches = False, 0
        if self.order is not None:
            self.order.epoch, self.order.begin = self.epoch - 1, self._first
            return self._counted(iter(self.loader))
        return self._counted(islice(self.loader, self._first // self._each, None))

    def _counted(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self.batches += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Where it is: the number of the epoch and of its rows that all ranks together have loaded. The same on every rank."""
        return {"epoch": self.epoch, "rows": self._first + self.batches * self._each}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """The next ``iter`` goes on there, in the same order, with any number of ranks and rows a batch."""
        self.epoch, self._first, self.batches = state["epoch"], state["rows"], 0
        self._restored = bool(state["epoch"])


def loader_of(dataset: Any, engine: Engine, collate: Callable[[Any], Any] | None, found: Settings) -> Loader:
    """Batches of ``train_micro_batch_size_per_gpu`` rows."""
    rows, own = engine.train_micro_batch_size_per_gpu(), torch.Generator()  # or each epoch would draw from PyTorch's
    if isinstance(dataset, IterableDataset):
        return Loader(DataLoader(dataset, batch_size=rows, collate_fn=collate, drop_last=found.drop_last, generator=own), None, rows)
    order = Order(dataset, engine.dp_world_size, engine.dp_rank, found.seed)
    return Loader(DataLoader(dataset, batch_sampler=BatchSampler(order, rows, found.drop_last), collate_fn=collate, generator=own), order, rows)
