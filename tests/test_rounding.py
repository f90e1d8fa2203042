"""A model that multiplies rounding: steps are compared one by one then, and a wrong step is still found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepseed.verify as verification
from deepseed.rounding import growth, shaken
from deepseed.verify import TOLERANCE, verify


class Chaos(nn.Module):
    """A logistic map, many times over: a difference of the last place doubles with each turn."""

    def __init__(self, turns: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.turns, self.first, self.last = turns, nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sigmoid(self.first(x))
        for _ in range(self.turns):
            h = 3.99 * h * (1 - h)
        return self.last(h).square().mean()


BATCH = (torch.randn(8, 4, generator=torch.Generator().manual_seed(0)),)


def far(a: Any, b: Any) -> float:
    return verification._compare(a, b)[0]


def test_growth_is_measured_on_the_eager_side() -> None:
    def run(model: nn.Module) -> Any:
        losses, grads = [], []
        for _ in range(2):
            model.zero_grad()
            loss = model(BATCH[0].double())
            loss.backward()
            losses.append(float(loss.detach()))
            grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
        return losses, grads

    calm, wild = growth(Chaos(1).double(), run, far), growth(Chaos(24).double(), run, far)
    assert max(calm) < 1e-14 and min(wild) > 1e-12
    model = Chaos(1).double()
    other = shaken(model)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert 0 < float(((q - p) / p).detach().abs().max()) <= 2 * 2.0**-52


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


@pytest.mark.parametrize("plan", ["zero1", "zero3"])
def test_steps_are_compared_one_by_one(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tolerances so small that a run of three steps is not determined to them, and each step is."""
    model = Chaos(6)
    calm = verify(model, BATCH, plan, world_size=2, optimizer_factory=sgd, backend="simulate")
    assert calm.ok and calm.growth == 0
    monkeypatch.setattr(verification, "TOLERANCE", TOLERANCE * 1e-3)
    monkeypatch.setattr(verification, "LOSS_TOLERANCE", 1e-17)
    strict = verify(model, BATCH, plan, world_size=2, optimizer_factory=sgd, backend="simulate")
    assert strict.growth > 0 and "a unit in the last place" in str(strict)


def test_a_wrong_step_is_found_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled side's learning rate is off by a millionth from the second step on."""
    model, made = Chaos(24), []

    def factory(parameters: Any) -> torch.optim.Optimizer:
        made.append(sgd(parameters))
        return made[-1]

    plain = verification.TrainStep.__call__

    def wrong(self: Any, batch: Any) -> Any:
        out = plain(self, batch)
        for optimizer in made:
            if any(p is q for g in optimizer.param_groups for p in g["params"] for q in self.model.parameters()):
                optimizer.param_groups[0]["lr"] = 0.1 * (1 + 1e-6)
        return out

    monkeypatch.setattr(verification.TrainStep, "__call__", wrong)
    report = verify(model, BATCH, "zero1", world_size=2, optimizer_factory=factory, backend="simulate")
    assert not report.ok and report.growth > 0 and report.param_max_rel_error > TOLERANCE
