"""Training through a compiled module beside the eager one, step by step; in one process and on each rank of several."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from small import WORDS, small
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F

import deepseed
from deepseed.api import Module
from deepseed.capture.eager import eager_reference

LossOf = Callable[[Any, Any], Tensor]
Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def module(model: nn.Module, plan: str, **options: Any) -> Module:
    made = deepseed.compile(model, plan, **options)
    assert isinstance(made, Module)
    return made


class Mlp(nn.Module):
    def __init__(self, seed: int = 0, sizes: Sequence[int] = (8, 16, 4)) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.down = nn.Linear(sizes[0], sizes[1]), nn.Linear(sizes[1], sizes[2])
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.tanh(self.up(x)))
        return out


def pairs(count: int, rows: int = 8) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(rows, 8, generator=g).double(), torch.randn(rows, 4, generator=g).double()) for _ in range(count)]


def mse(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def tokens(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """A mean over the labels that count, outside of the model."""
    logits = model(batch[0])
    return F.cross_entropy(logits.reshape(-1, WORDS), batch[1].reshape(-1), ignore_index=-100)


def error(a: Tensor | None, b: Tensor | None) -> float:
    """Of a DTensor this rank's part: ``full_tensor`` of torch 2.13 mixes up parts where two axes split inside of a dimension."""
    if a is None or b is None:
        return 0.0 if a is b else float("inf")
    if isinstance(a, DTensor):
        b = distribute_tensor(b.detach(), a.device_mesh, a.placements).to_local() if a.shape == b.shape else b
        a = a.to_local()
    if not a.numel() and a.shape == b.shape:
        return 0.0
    return float((a.detach() - b.detach()).abs().max()) if a.shape == b.shape else float("inf")


def beside(
    ours: Module, theirs: nn.Module, loss_of: LossOf, batches: Sequence[Any], optimizer: Optimizer = adamw, clip: float | None = None, scheduler: Any = None
) -> dict[str, float]:  # fmt: skip
    """The largest differences of losses, gradients, norms and parameters over a step a batch. Parameters that this rank does not store are left out."""
    pair = ours, theirs
    optimizers = [optimizer(m.parameters()) for m in pair]
    schedulers = [scheduler(o) for o in optimizers] if scheduler is not None else []
    worst = dict.fromkeys(("loss", "grad", "norm", "param"), 0.0)

    def note(what: str, value: float) -> None:
        worst[what] = max(worst[what], value if value == value else float("inf"))

    for batch in batches:
        step = ours.steps
        loss = loss_of(ours, batch)
        with eager_reference(theirs, rng=torch.tensor([0, step])):
            want = loss_of(theirs, batch)
            want.backward()
        loss.backward()
        note("loss", error(loss, want))
        here = [(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True) if type(p).__name__ != "Elsewhere"]
        for p, q in here:
            note("grad", error(p.grad, q.grad))
        if clip is not None:
            norms = [nn.utils.clip_grad_norm_(m.parameters(), clip) for m in pair]
            note("norm", error(norms[0], norms[1]))
        for each in (*optimizers, *schedulers):
            each.step()
        for o in optimizers:
            o.zero_grad()
        for p, q in here:
            note("param", error(p, q))
        theirs_now = theirs.state_dict()
        for name, t in ours.state_dict().items():
            note("param", error(t.double(), theirs_now[name].double()))
    return worst


def train_small(plan: str, **options: Any) -> dict[str, float]:
    """Tied embedding, attention, dropout, layer and batch norm."""
    model, (ids, labels), _ = small()
    model = model.double()
    theirs = copy.deepcopy(model)
    g = torch.Generator().manual_seed(3)
    batches = [(ids[torch.randperm(len(ids), generator=g)], labels) for _ in range(3)]
    clip = None if "pp" in plan else 0.5
    return beside(module(model, plan, example_batch=batches[0][0], **options), theirs, tokens, batches, sgd, clip)


def own_rows(plan: str) -> dict[str, float]:
    """Each rank its own rows, which the eager loop sees one part after another: the mean of the parts' losses is what is differentiated."""
    model, rank, count = Mlp(), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    theirs, batches = copy.deepcopy(model), pairs(3, 4 * count)
    ours = module(model, plan, batch="local", example_batch=(batches[0][0][4 * rank : 4 * rank + 4],))
    optimizers = [adamw(m.parameters()) for m in (ours, theirs)]
    worst = dict.fromkeys(("loss", "grad", "param", "input"), 0.0)

    def note(what: str, a: Tensor | None, b: Tensor | None) -> None:
        worst[what] = max(worst[what], error(a, b))

    for x, y in batches:
        parts = [(a.clone().requires_grad_(), b) for a, b in zip(x.split(4), y.split(4), strict=True)]
        losses = [mse(theirs, part).sqrt() for part in parts]
        torch.stack(losses).mean().backward()
        mine = x[4 * rank : 4 * rank + 4].clone().requires_grad_()
        out = ours(mine)
        assert out.shape == (4, 4)
        loss = F.mse_loss(out, y[4 * rank : 4 * rank + 4]).sqrt()
        loss.backward()
        note("loss", loss, losses[rank])
        note("input", mine.grad, parts[rank][0].grad * count)  # of the rank's own loss
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            note("grad", p.grad, q.grad)
        for o in optimizers:
            o.step()
            o.zero_grad()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            note("param", p, q)
    with torch.no_grad():
        assert ours(batches[0][0][4 * rank : 4 * rank + 4]).shape == (4, 4)
    return worst


def local_on_ranks(plans: Sequence[str]) -> dict[str, dict[str, float]]:
    torch.set_num_threads(1)
    return {plan: own_rows(plan) for plan in plans}


def on_ranks(plans: Sequence[str]) -> dict[str, dict[str, float]]:
    torch.set_num_threads(1)
    return {plan: train_small(plan) for plan in plans}
