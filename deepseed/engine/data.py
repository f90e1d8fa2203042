"""The engine's data loader: of the dataset each data-parallel rank loads its own rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, RandomSampler

from deepseed.config import Settings

if TYPE_CHECKING:
    from deepseed.engine.engine import Engine


class Loader:
    """A DataLoader whose epochs are shuffled anew, as DeepSpeed's: each ``iter`` is the next epoch."""

    def __init__(self, loader: DataLoader[Any], sampler: DistributedSampler[Any] | None) -> None:
        self.loader, self.sampler, self.epoch = loader, sampler, 0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        if self.sampler is not None:
            self.sampler.set_epoch(self.epoch)
        self.epoch += 1
        return iter(self.loader)


def loader_of(dataset: Any, engine: Engine, collate: Callable[[Any], Any] | None, found: Settings) -> Loader:
    """Batches of ``train_micro_batch_size_per_gpu`` rows."""
    if isinstance(dataset, IterableDataset):
        return Loader(DataLoader(dataset, batch_size=engine.train_micro_batch_size_per_gpu(), collate_fn=collate, drop_last=found.drop_last), None)
    ranks = engine.dp_world_size
    sampler: Any = DistributedSampler(dataset, ranks, engine.dp_rank) if ranks > 1 else RandomSampler(dataset, generator=torch.Generator().manual_seed(found.seed))
    rows = BatchSampler(sampler, engine.train_micro_batch_size_per_gpu(), found.drop_last)
    return Loader(DataLoader(dataset, batch_sampler=rows, collate_fn=collate), sampler if ranks > 1 else None)
