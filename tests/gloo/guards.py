"""One rank of the tests of values that a model reads from its batch, and of batches given whole or in parts."""

from __future__ import annotations

import contextlib
import copy
import io
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import deepseed
from deepseed.api import TrainStep
from deepseed.runtime.errors import AgreementError


class Masking(nn.Module):
    """Reads its mask in Python, as user models do."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = torch.tanh(self.up(x))
        if mask.all():
            return self.down(h)
        return self.down(h * mask[:, None]) * 2


class Scaled(nn.Module):
    """Reads a Python number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin, self.scale = nn.Linear(8, 4), 1.0

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.lin(x) * self.scale


def weighted(model: Any, batch: Any) -> Tensor:
    """The mean over the rows that count: of the whole batch, not of each rank's rows."""
    error = (model(batch["x"], batch["mask"]) - batch["y"]).square().sum(1)
    return (error * batch["mask"]).sum() / batch["mask"].sum()


def fresh() -> nn.Module:
    torch.manual_seed(0)
    return Masking().double()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def batch(seed: int, holes: tuple[int, ...] = (), rows: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(rows, dtype=torch.bool)
    mask[list(holes)] = False
    return {"x": torch.randn(rows, 8, generator=generator).double(), "mask": mask, "y": torch.randn(rows, 4, generator=generator).double()}


def eager(data: list[dict[str, Tensor]]) -> tuple[list[float], nn.Module]:
    model = fresh()
    optimizer, losses = adamw(model), []
    for each in data:
        optimizer.zero_grad()
        loss = weighted(model, each)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses, model


def count(step: TrainStep) -> int:
    return len(step.programs.cache)


# rows 0-3 are rank 0's, 4-7 rank 1's: no hole; one in rank 1's rows only; none again; one in rank 0's only
RECOMPILING = [batch(0), batch(1, (6,)), batch(2), batch(3, (1,)), batch(4)]
LENGTHS = [(4, 4), (4, 4), (3, 5), (6, 2), (4, 4)]


def part(whole: dict[str, Tensor], lengths: tuple[int, int]) -> dict[str, Tensor]:
    return {key: t.split(list(lengths))[dist.get_rank()] for key, t in whole.items()}


def recompiling(plan: str, mode: str) -> dict[str, Any]:
    """Train on RECOMPILING; losses, number of programs after each step, what was said, and the largest error of a parameter."""
    torch.set_num_threads(1)
    model = fresh()
    step = deepseed.compile(model, plan, optimizer=adamw(model), loss_fn=weighted, batch=mode, backend="gloo")
    assert isinstance(step, TrainStep)
    losses, programs, said = [], [], io.StringIO()
    with contextlib.redirect_stderr(said):
        for whole in RECOMPILING:
            losses.append(float(step(part(whole, (4, 4)) if mode == "local" else whole)))
            programs.append(count(step))
    want, theirs = eager(RECOMPILING)
    state = step.state_dict()
    error = max(float((state[name] - p).abs().max()) for name, p in theirs.named_parameters())
    return {"losses": losses, "want": want, "programs": programs, "said": said.getvalue(), "error": error}


def lengths(plan: str) -> dict[str, Any]:
    """``batch="local"``, equal and different numbers of rows a rank, against eager on the concatenated batch."""
    torch.set_num_threads(1)

    def loss_fn(model: Any, batch: Any) -> Tensor:
        error = (model.down(torch.tanh(model.up(batch["x"]))) - batch["y"]).square().sum(1)
        return (error * batch["mask"]).sum() / batch["mask"].sum()

    model, theirs = fresh(), fresh()
    step = deepseed.compile(model, plan, optimizer=adamw(model), loss_fn=loss_fn, batch="local", backend="gloo")
    optimizer, losses, want = adamw(theirs), [], []
    for seed, rows in enumerate(LENGTHS):
        whole = batch(seed, holes=(1, 2, 7))
        losses.append(float(step(part(whole, rows))))
        optimizer.zero_grad()
        loss = loss_fn(theirs, whole)
        loss.backward()
        optimizer.step()
        want.append(float(loss))
    state = step.state_dict()
    return {"losses": losses, "want": want, "error": max(float((state[n] - p).abs().max()) for n, p in theirs.named_parameters())}


def ranks_that_read_different_values() -> str:
    """After the first step, rank 1's copy of the global batch has a hole that rank 0's has not."""
    torch.set_num_threads(1)
    model = fresh()
    step = deepseed.compile(model, "zero1", optimizer=adamw(model), loss_fn=weighted, backend="gloo")
    step(batch(0))
    try:
        step(batch(1, (2,) if dist.get_rank() else ()))
    except AgreementError as error:
        return str(error)
    return "no error"


def an_attribute(plan: str) -> dict[str, Any]:
    """A Python number that the forward reads changes on all ranks, then on rank 1 alone."""
    torch.set_num_threads(1)
    model, theirs = Scaled().double(), Scaled().double()
    theirs.load_state_dict(model.state_dict())
    step = deepseed.compile(model, plan, optimizer=adamw(model), loss_fn=weighted, backend="gloo")
    assert isinstance(step, TrainStep)
    optimizer, losses, want = adamw(theirs), [], []
    for n, scale in enumerate((1.0, 3.0, 1.0)):
        model.scale = theirs.scale = scale
        losses.append(float(step(batch(n))))
        optimizer.zero_grad()
        loss = weighted(theirs, batch(n))
        loss.backward()
        optimizer.step()
        want.append(float(loss))
    programs, error = count(step), ""
    model.scale = 5.0 if dist.get_rank() else 1.0
    try:
        step(batch(4))
    except AgreementError as caught:
        error = str(caught)
    return {"losses": losses, "want": want, "programs": programs, "said": error}


def initial_values(plan: str) -> dict[str, Any]:
    """Ranks whose models were initialised differently, as without a seed: all take rank 0's."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo") if not dist.is_initialized() else None
    model = fresh()
    if dist.get_rank():
        with torch.no_grad():
            model.up.weight.add_(1.0)
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        step = deepseed.compile(model, plan, optimizer=adamw(model), loss_fn=weighted, backend="gloo", example_batch=batch(0))
        losses = [float(step(each)) for each in [batch(0), batch(1)]]
    state = step.state_dict()
    want, theirs = eager([batch(0), batch(1)])
    return {"losses": losses, "want": want, "said": said.getvalue(), "error": max(float((state[n] - p).abs().max()) for n, p in copy.copy(theirs).named_parameters())}


def all_of_it() -> dict[str, Any]:
    """One start of processes for all."""
    return {
        "global": recompiling("zero1", "global"), "local": recompiling("zero3", "local"), "lengths zero2": lengths("zero2"), "lengths zero0": lengths("zero0"),
        "read": ranks_that_read_different_values(), "initial zero0": initial_values("zero0"), "initial zero3": initial_values("zero3"), "attribute": an_attribute("zero3"),
    }  # fmt: skip
