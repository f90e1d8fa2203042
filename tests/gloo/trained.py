"""Training in the user's own loop, update and all compiled, beside eager PyTorch on every rank's rows: what DistributedDataParallel computes."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepseed.trained import Trained
from gloo.module import error


class Net(nn.Module):
    """A batch norm, whose statistics are each rank's own, a tied weight, and a parameter that only some batches use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up, self.norm, self.down = nn.Embedding(12, 8), nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 8)
        self.extra = nn.Parameter(torch.ones(8))
        self.double()

    def forward(self, ids: Tensor, labels: Tensor | None = None, extra: bool = False) -> dict[str, Tensor]:
        h = self.down(torch.tanh(self.norm(self.up(self.embed(ids)))))
        h = h * self.extra if extra else h
        logits = h @ self.embed.weight.T
        out = {"logits": logits}
        if labels is not None:
            out["loss"] = F.cross_entropy(logits, labels, ignore_index=-100)
        return out


def rows(ranks: int, steps: int, micro: int) -> list[list[list[tuple[Tensor, Tensor]]]]:
    """By step, microbatch and rank; unequal numbers of labels count."""
    g = torch.Generator().manual_seed(1)
    found = []
    for _ in range(steps * micro * ranks):
        ids, labels = (torch.randint(0, 12, (6,), generator=g) for _ in range(2))
        labels[torch.rand(6, generator=g) < 0.4] = -100
        labels[0] = 3
        found.append((ids, labels))
    return [[found[(s * micro + m) * ranks :][:ranks] for m in range(micro)] for s in range(steps)]


def train(plan: str, own_loss: bool = True, micro: int = 2, clip: float | None = 0.2) -> dict[str, float]:
    world = int(os.environ["WORLD_SIZE"])
    model = Net()
    theirs = copy.deepcopy(model)
    ours = Trained(model, plan, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2), clip_grad_norm=clip, batch="local", quiet=True)
    dp = ours.mesh.sizes.get("dp", 1)
    part = ours.host.coordinates[0].get("dp", 0)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-2)
    assert world % dp == 0
    worst = dict.fromkeys(("loss", "norm", "grad", "param"), 0.0)

    def loss_of(m: Any, ids: Tensor, labels: Tensor, extra: bool) -> Tensor:
        if own_loss:
            found: Tensor = m(ids, labels=labels, extra=extra)["loss"]
            return found
        return F.cross_entropy(m(ids, extra=extra)["logits"].float().double(), labels, ignore_index=-100, label_smoothing=0.1)

    for step, parts in enumerate(rows(dp, 3, micro)):
        optimizer.zero_grad()
        mine = []
        for batches in parts:
            extra = step == 1
            for r, (ids, labels) in enumerate(batches):
                loss = loss_of(theirs, ids, labels, extra) / micro
                (loss / dp).backward()
                mine.append(float(loss.detach())) if r == part else None
        for n, batches in enumerate(parts):
            loss = loss_of(ours, *batches[part], extra) / micro
            loss.backward()
            worst["loss"] = max(worst["loss"], abs(float(loss.detach()) - mine[n]))
        assert all(p.grad is None for p in ours.model.parameters())
        for name, p in theirs.named_parameters():
            worst["grad"] = max(worst["grad"], error(ours.gradient(name), p.grad))
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), clip or float("inf"))
        optimizer.step()
        ours.update()
        if clip is not None:
            worst["norm"] = max(worst["norm"], abs(float(ours.grad_norm) - float(norm)))
        now = ours.state_dict()
        for name, p in theirs.named_parameters():
            worst["param"] = max(worst["param"], error(now[name], p))
    return worst


def on_ranks(cases: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, dict[str, float]]:
    torch.set_num_threads(1)
    return {f"{plan} {options}": train(plan, **options) for plan, options in cases}
