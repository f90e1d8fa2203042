"""What a rank says of a step whose numbers are not finite."""

from __future__ import annotations

from typing import Any

import torch

import deepseed
from deepseed.api import TrainStep
from deepseed.nonfinite import NonFinite, NonFiniteError


class Root(torch.nn.Module):
    """Its slope at 0 is infinite."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sqrt(x * x)


class Log(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.log(x.abs())


class Net(torch.nn.Module):
    """``middle`` is what is looked for: at zeros of ``up`` its value or slope is infinite."""

    def __init__(self, middle: type[torch.nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.middle, self.down = torch.nn.Linear(4, 8), middle(), torch.nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(self.middle(self.up(x)))
        return out


def loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    return model(batch["x"]).square().mean()  # type: ignore[no-any-return]


def zeros_from(row: int, rows: int = 8) -> torch.Tensor:
    """Rows of numbers, and zeros from ``row`` on: with no bias in ``up`` what it gives there is zero."""
    x = torch.linspace(-1, 1, 4 * rows, dtype=torch.float64).reshape(rows, 4)
    x[row:] = 0
    return x


def case(middle: type[torch.nn.Module], plan: str, weight: float | None = None, entry: float | None = None, zeros: int | None = None, **options: Any) -> NonFinite | None:
    """What is found of a step that has ``weight`` in a parameter, ``entry`` in its batch, or rows of zeros."""
    model = Net(middle).double()
    with torch.no_grad():
        model.up.bias.zero_()
        if weight is not None:
            model.down.weight[2, 5] = weight
    x = zeros_from(8 if zeros is None else zeros)
    if entry is not None:
        x[6, 2] = entry
    step = deepseed.compile(model, plan, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), loss_fn=loss, check_finite=True, **options)
    assert isinstance(step, TrainStep)
    step.compile({"x": x})
    before = step.state_dict()
    try:
        step({"x": x})
    except NonFiniteError as error:
        assert all(torch.allclose(t, before[name], 0, 0, equal_nan=True) for name, t in step.state_dict().items()), "a step that is refused changes nothing"
        return error.found
    return None


CASES: tuple[dict[str, Any], ...] = ({"zeros": 5}, {"weight": float("nan")})


def all_cases(plans: list[str]) -> list[tuple[Any, ...]]:
    """On a real rank: node, text and place of each."""
    out: list[tuple[Any, ...]] = []
    for plan in plans:
        for given in CASES:
            found = case(Log, plan, **given)
            out.append((None,) if found is None else (found.node, found.text, found.ranks))
    return out
