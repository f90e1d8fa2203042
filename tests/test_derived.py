"""What each forward computes anew and keeps on a module (a weight under a hook's norm, an extra loss), and reentrant checkpoints."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import deepseed
from deepseed.capture import CaptureError, capture
from deepseed.verify import verify

BATCH = {"x": torch.randn(8, 16, generator=torch.Generator().manual_seed(0)), "y": torch.arange(8)}
warnings.filterwarnings("ignore", category=FutureWarning)


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def normed(which: str) -> nn.Module:
    torch.manual_seed(0)
    norm = getattr(nn.utils, which)
    return nn.Sequential(norm(nn.Linear(16, 32)), nn.Tanh(), norm(nn.Linear(32, 10)))


@pytest.mark.parametrize("plan", ["zero3x2", "tp2"])
@pytest.mark.parametrize("which", ["weight_norm", "spectral_norm"])
def test_a_weight_that_a_hook_computes(which: str, plan: str) -> None:
    name, _, ranks = plan.partition("x")
    report = verify(normed(which), BATCH, name, world_size=int(ranks) if ranks else None, loss_fn=loss, backend="simulate", steps=2)
    assert report.ok, str(report)


def test_training_with_a_hooks_weight_follows_eager() -> None:
    model, eager = normed("weight_norm"), normed("weight_norm")
    before = model[0].weight
    step = deepseed.compile(model, "zero3", optimizer=torch.optim.SGD(model.parameters(), lr=0.5), loss_fn=loss, world_size=2)
    plain = torch.optim.SGD(eager.parameters(), lr=0.5)
    for _ in range(3):
        plain.zero_grad()
        want = loss(eager, BATCH)
        want.backward()
        plain.step()
        assert abs(float(step(BATCH)) - float(want.detach())) <= 1e-5
    assert model[0].weight is before  # given back: no fake tensor, and no later step's


class Extra(nn.Module):
    """``how``: written then read (by the loss), read then written, written and never read; set back to what it was, read and written."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.first = how, nn.Linear(16, 10)
        self.extra: Tensor | None = None if how == "reset" else torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.how == "reset":
            self.extra = None
            h = h if self.extra is None else h + self.extra
        if self.how == "carries":
            h = h + self.extra
        self.extra = h.square().mean()
        return h


def with_extra(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return loss(model, batch) + 0.1 * model.extra if model.how == "loss" else loss(model, batch)


def test_an_extra_loss_kept_on_a_module() -> None:
    torch.manual_seed(0)
    report = verify(Extra("loss"), BATCH, "zero2", world_size=3, loss_fn=with_extra, backend="simulate", steps=2)
    assert report.ok, str(report)


def test_a_state_that_each_forward_begins_anew() -> None:
    torch.manual_seed(0)
    model = Extra("reset")
    report = verify(model, BATCH, "zero3", world_size=2, loss_fn=with_extra, backend="simulate", steps=2)
    assert report.ok, str(report)
    capture(model, BATCH, loss_fn=with_extra)
    assert model.extra is None


@pytest.mark.parametrize("how", ["carries", "outside"])
def test_what_steps_or_others_depend_on_is_refused(how: str) -> None:
    model = Extra(how)
    with pytest.raises(CaptureError, match=r"stores a tensor of its forward on itself \(Extra.extra\)"):
        capture(model, BATCH, loss_fn=with_extra)


class Blocks(nn.Module):
    """``frozen``: what comes in wants no gradient, so reentrant checkpoints give none to what is inside."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.frozen, self.embed = frozen, nn.Linear(16, 16)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(3)))
        self.out = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.frozen else self.embed(x)
        x = checkpoint(self.blocks[0], x, use_reentrant=True)
        return self.out(checkpoint_sequential(self.blocks[1:], 2, x, use_reentrant=True))


@pytest.mark.parametrize("frozen", [False, True])
def test_reentrant_checkpoints_have_torchs_own_gradients(frozen: bool) -> None:
    """Beside PyTorch as it is, not beside a reference that shares the switch."""
    torch.manual_seed(0)
    model = Blocks(frozen).double()
    batch = {"x": BATCH["x"].double(), "y": BATCH["y"]}
    eager = copy.deepcopy(model)
    want = loss(eager, batch)
    want.backward()
    step = deepseed.compile(model, "zero1", optimizer=torch.optim.SGD(model.parameters(), lr=0.5), loss_fn=loss, world_size=2)
    assert abs(float(step(batch)) - float(want.detach())) <= 1e-12
    now = step.state_dict()
    for name, p in eager.named_parameters():
        new = p.detach() if p.grad is None else p.detach() - 0.5 * p.grad
        assert float((now[name] - new).abs().max()) <= 1e-12, name
    assert (eager.blocks[0][0].weight.grad is None) == frozen


class Recording(nn.Module):
    """Takes what its layers give by hooks that it puts on them at its first call, as transformers does for hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        if not getattr(self, "installed", False):
            for layer in self.layers:
                layer.register_forward_hook(lambda module, args, out: self.found.append(out))
            self.installed = True
        self.found: list[Tensor] = []
        for layer in self.layers:
            x = layer(x).tanh()
        found, self.found = self.found, []
        return sum((f.square().mean() for f in found), x.mean()) * len(found)


@pytest.mark.parametrize("first", [False, True])
def test_hooks_that_a_first_call_puts_on(first: bool) -> None:
    """They are put on once, whether the first program is compiled before its first step or by it; and one program serves all steps."""
    torch.manual_seed(0)
    model, other, x = Recording().double(), Recording().double(), torch.randn(4, 8, dtype=torch.float64)
    other.load_state_dict(model.state_dict())
    step = deepseed.compile(model, "dp2", optimizer=torch.optim.SGD(model.parameters(), lr=0.1), loss_fn=lambda m, b: m(b), example_batch=x if first else None)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for _ in range(3):
        loss = other(x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.allclose(step(x), loss, rtol=1e-14, atol=0)
    assert step.programs.compiled == 1 and [len(layer._forward_hooks) for layer in model.layers] == [1, 1]
    assert torch.allclose(model(x), other(x), rtol=1e-13, atol=0)
