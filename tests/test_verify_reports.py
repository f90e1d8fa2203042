"""What ``verify`` says where it cannot say equal: who is to blame, and what cannot be compared."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

from deepseed.build import CompileError
from deepseed.verify import _Errors, _Run, verify


def blocks() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))


X = {"x": torch.randn(8, 6, generator=torch.Generator().manual_seed(1))}


def square(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(batch["x"]).square().mean()
    return loss


@pytest.mark.parametrize("plan", ["zero3+dp2", "tp2", "dp2+mb2", "pp2+mb2"])
def test_another_loss_is_blamed_on_no_pass(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks of a pipeline have ops of their own, sends among them, which are no op of the reference execution."""
    monkeypatch.setattr(sys.modules["deepseed.verify"], "_loss", lambda model, batch, loss_fn: 2 * square(model, batch))
    report = verify(blocks(), X, plan, loss_fn=square, steps=1)
    assert not report.ok and report.blame.startswith("capture: output loss 'loss'"), report


class Masked(nn.Module):
    """A root of what is masked out is NaN, and so is its gradient, masked or not."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return torch.where(h > 0, h.sqrt(), h)


def test_what_is_not_finite_in_eager_pytorch_is_not_said_to_differ() -> None:
    torch.manual_seed(0)
    with pytest.raises(CompileError, match=r"eager PyTorch's own gradient of up\.weight is not finite in step 0: \d+ of 24 elements, nan at \d+(.|\n)*fix: "):
        verify(Masked(), X, "zero3", world_size=2, loss_fn=square, steps=2)


def test_a_loss_that_is_not_finite_in_a_later_step_is_no_equality() -> None:
    errors = _Errors()
    errors.steps(_Run([1.0, float("nan")], [{}, {}], [{}, {}]), _Run([1.0, 1.0], [{}, {}], [{}, {}]))
    assert not errors.ok
