"""Rows on their way to their owners and back, as every rank of a runtime runs it: the same on real ranks and on simulated ones."""

from __future__ import annotations

import torch
from torch import Tensor

from deepseed.runtime.collectives import Runtime

ROWS, OF = 24, 12


def keys() -> list[Tensor]:
    """Ids at random; all of the first rank; all of the last; in turn."""
    drawn = torch.randint(0, OF, (ROWS,), generator=torch.Generator().manual_seed(0))
    return [drawn, torch.zeros(ROWS, dtype=torch.int64), torch.full((ROWS,), OF - 1), torch.arange(ROWS) % OF, drawn.to(torch.int32)]


def there_and_back(rt: Runtime, axis: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Of each set of ids, of rows in dimension 0 and 1, in one block and in two: the rows that this rank owns, and its part again."""
    n, i = rt.mesh.size(axis), rt.coordinate[axis]
    out = []
    for ids in keys():
        for place in ((0, 1), (0, 2), (1, 1), (1, 2)):
            whole = torch.arange(ROWS * 5).reshape(ROWS, 5).to(dtype)
            part = rt.shard(whole if place[0] == 0 else whole.t().contiguous(), axis, place)
            owned = rt.wait(rt.dispatch_start(part, ids, axis, place, OF))
            out += [owned, rt.wait(rt.combine_start(owned, ids, axis, place, OF))]
            assert torch.equal(out[-1], part), (n, i, place)
    return tuple(out)
