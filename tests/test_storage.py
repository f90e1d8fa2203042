"""Parameters that are stored in parts, where the cheapest use of them would be as one rank's summand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from deepseed.verify import verify


class Sums(nn.Module):
    """Two sums over the batch meet behind a bias: added to one rank's partial sum, the bias would save a reduction."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.bias = nn.Linear(6, 8), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return ((h.sum(0) + self.bias) + h.square().sum(0)).square().mean()


@pytest.mark.parametrize(("plan", "ranks"), [("zero0", 2), ("zero1", 2), ("zero3", 2), ("zero3", 4), ("zero3+tp2", 4)])
def test_a_bias_on_a_partial_sum(plan: str, ranks: int) -> None:
    report = verify(Sums(), (torch.randn(8, 6),), plan, world_size=ranks, backend="simulate", steps=2)
    assert report.ok, str(report)
