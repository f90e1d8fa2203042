"""What forward takes from outside of torch: random numbers that are refused, arrays and queues that are watched; labels of few classes."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import deepseed
from deepseed.capture import CaptureError
from deepseed.verify import verify


class Drawing(nn.Module):
    def __init__(self, source: str) -> None:
        super().__init__()
        self.source, self.one, self.other = source, nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        u = random.random() if self.source == "random" else numpy.random.rand()
        return (self.one(x) if u < 0.5 else self.other(x)).square().mean()


@pytest.mark.parametrize("source", ["random", "numpy.random"])
def test_numbers_that_are_drawn_once_are_refused(source: str) -> None:
    model = Drawing(source)
    step = deepseed.compile(model, "zero1+dp2", optimizer=torch.optim.SGD(model.parameters(), lr=0.1), backend="simulate")
    with pytest.raises(CaptureError, match=rf"Drawing draws from Python's {source}(.|\n)*fix: draw with torch.rand"):
        step({"x": torch.randn(8, 6)})


class Scaled(nn.Module):
    def __init__(self, held: Any) -> None:
        super().__init__()
        self.held, self.one = held, nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return (self.one(x) * float(self.held[0])).square().mean()


@pytest.mark.parametrize("held", [numpy.ones(3), deque([1.0, 2.0]), bytearray([1, 2])], ids=["array", "deque", "bytearray"])
def test_what_is_changed_in_place_is_seen(held: Any) -> None:
    model = Scaled(held)
    step = deepseed.compile(model, "zero1+dp2", optimizer=torch.optim.SGD(model.parameters(), lr=0.0), backend="simulate")
    batch = {"x": torch.randn(8, 6)}
    for value in (1, 2, 3):
        model.held[0] = value
        assert float(step(batch)) == pytest.approx(float(model(**batch)), rel=1e-5)


@pytest.mark.parametrize("classes", [2, 3, 6])
def test_planes_of_labels_of_few_classes(classes: int) -> None:
    model = nn.Conv2d(3, classes, 1)
    generator = torch.Generator().manual_seed(0)
    batch = (torch.randn(8, 3, 4, 4, generator=generator), torch.randint(0, classes, (8, 4, 4), generator=generator))
    report = verify(model, batch, "zero1+dp2", loss_fn=lambda model, batch: functional.cross_entropy(model(batch[0]), batch[1]), steps=1)
    assert report.ok, report
