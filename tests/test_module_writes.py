"""What is written into the module between steps reaches every simulated rank; arguments of the wrong kind are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deepseed
from deepseed.build import CompileError
from deepseed.capture import CaptureError
from deepseed.verify import verify

BATCH = {"x": torch.randn(8, 16, generator=torch.Generator().manual_seed(0)), "y": torch.arange(8)}


def mlp(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 10))


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


@pytest.mark.parametrize("plan", ["zero0", "dp2+zero0", "zero3", "tp2"])
def test_load_state_dict_between_steps(plan: str) -> None:
    model, other = mlp(0), mlp(1)
    step = deepseed.compile(model, plan, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), loss_fn=loss)
    step(BATCH)
    model.load_state_dict(other.state_dict())
    want = float(loss(other, BATCH).detach())
    assert abs(float(step(BATCH)) - want) <= 1e-6 * want


def test_two_steps_of_one_model_share_its_parameters() -> None:
    model, eager = mlp(0), mlp(0)
    optimizer, plain = torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(eager.parameters(), lr=0.1)
    steps = [deepseed.compile(model, plan, optimizer=optimizer, loss_fn=loss) for plan in ("zero3", "tp2")]
    for step in steps * 2:
        plain.zero_grad()
        want = loss(eager, BATCH)
        want.backward()
        plain.step()
        assert abs(float(step(BATCH)) - float(want.detach())) <= 1e-6


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"plan": 3}, "plan=3 is a int"),
        ({"optimizer": torch.optim.Adam}, "pass an instance over the model's parameters"),
        ({"clip_grad_norm": -1.0}, "a number above 0"),
        ({"model": loss}, "model is a function"),
    ],
)
def test_arguments_of_the_wrong_kind(arguments: dict[str, Any], what: str) -> None:
    with pytest.raises(CompileError, match=what):
        deepseed.compile(**{"model": mlp(0), "plan": "zero3", **arguments})


@pytest.mark.parametrize("plan", ["zero1", "zero3"])
def test_small_gradients_are_scattered_too(plan: str) -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
    step = deepseed.compile(
        model, plan, optimizer=torch.optim.AdamW(model.parameters()), loss_fn=lambda m, x: (m(x) ** 2).mean(), clip_grad_norm=1.0
    )
    step(torch.randn(8, 64))
    whole = sum(p.numel() * p.itemsize for p in model.parameters())
    assert step.explain().ranks[0].grad_bytes == whole // 2


class Momentum(nn.Module):
    """A frozen target that follows the trained layer, and a trained weight that is kept small: both are written in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.online, self.target, self.head = nn.Linear(8, 8), nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for old, new in zip(self.target.parameters(), self.online.parameters(), strict=True):
                old.mul_(0.9).add_(new, alpha=0.1)
            self.head.weight.clamp_(-0.2, 0.2)
        self.head.bias.data.mul_(0.5)
        return F.mse_loss(self.head(self.online(x)), self.target(x))


@pytest.mark.parametrize("plan", ["zero1", "zero3"])
def test_forward_writes_into_parameters(plan: str) -> None:
    torch.manual_seed(0)
    report = verify(Momentum(), {"x": torch.randn(4, 8)}, plan, world_size=2)
    assert report.ok, report


def test_forward_writes_into_a_parameter_computed_in_another_dtype() -> None:
    model = Momentum()
    step = deepseed.compile(model, "zero0+bf16", optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(CaptureError, match=r"forward writes into parameter '\w+\.\w+', which is computed in bf16"):
        step({"x": torch.randn(4, 8)})
