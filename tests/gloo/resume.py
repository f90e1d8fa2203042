"""A training with everything that a checkpoint must bring back, for the resume matrix: simulated, or one rank of several.

A transformer with dropout, a tied table and a running mean; AdamW with two groups under a scheduler that moves lr; a dynamic
loss scale with an overflow behind it and a growth ahead; batches from a shuffled loader that crosses an epoch; and a mask that the
loop draws from PyTorch's own generator.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import deepseed
from deepseed.api import TrainStep
from gloo.checkpoint import everything, packed

FIRST, MORE = 3, 3  # steps before the checkpoint, and after it
WORDS, WIDTH, HEADS, LAYERS, TOKENS, ROWS, BATCHES = 24, 16, 4, 1, 8, 24, 4
BAD = 1  # the step whose loss is infinite


class Block(nn.Module):
    """The queries' and keys' biases have no gradient but rounding, which Adam would make steps of: there are none."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.rest, self.up, self.down, self.drop = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.view(*x.shape[:2], HEADS, -1).transpose(1, 2) for y in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.drop(self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)))
        return x + self.drop(self.down(F.gelu(self.up(self.rest(x)))))


class Writer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.blocks, self.norm = nn.Embedding(WORDS, WIDTH), nn.ModuleList(Block() for _ in range(LAYERS)), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.words.weight
        nn.init.normal_(self.words.weight, std=0.3)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("scale", torch.ones(WIDTH), persistent=False)

    def forward(self, ids: Tensor, keep: Tensor) -> Tensor:
        x = self.words(ids) * keep[..., None]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x) * self.scale.to(x.dtype)
        if self.training:
            self.mean.mul_(0.9).add_(x.detach().to(self.mean.dtype).mean((0, 1)), alpha=0.1)
        out: Tensor = self.head(x - self.mean.to(x.dtype))
        return out


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    out = model(batch["ids"], batch["keep"]).flatten(0, 1)
    return F.cross_entropy(out if out.dtype is torch.float64 else out.float(), batch["labels"].flatten()) * batch["weight"]


class Shuffled:
    """Endless batches of a data set, each epoch in an order of its own; ``state_dict`` says where it is, as a stateful loader's does."""

    def __init__(self, seed: int = 0) -> None:
        self.rows = torch.randint(0, WORDS, (BATCHES * ROWS, TOKENS + 1), generator=torch.Generator().manual_seed(7))
        self.order, self.at = torch.Generator().manual_seed(seed), 0
        self.start = self.order.get_state()

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            self.order.set_state(self.start)
            for at, rows in enumerate(torch.randperm(len(self.rows), generator=self.order).split(ROWS)):
                if at >= self.at:
                    self.at = at + 1
                    yield self.rows[rows]
            self.at, self.start = 0, self.order.get_state()

    def state_dict(self) -> dict[str, Any]:
        return {"epoch started with": self.start, "batches": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start, self.at = state["epoch started with"], state["batches"]


@dataclass(frozen=True)
class Went:
    """What a run comes to. ``heads``: the first tokens of each batch."""

    losses: list[float]
    heads: list[list[int]]
    scales: list[tuple[float, int]]
    rates: list[list[Any]]
    values: dict[str, Tensor]

    @property
    def exactly(self) -> Any:
        """What no rounding reaches."""
        return self.heads, self.scales, self.rates


class Training:
    """A step, and what a user keeps beside it. ``seed``: of all that a checkpoint overwrites."""

    def __init__(self, plan: str, seed: int = 0, dtype: torch.dtype = torch.float64, backend: str = "simulate") -> None:
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        self.dtype, model = dtype, Writer().to(dtype)
        flat = [[p for p in model.parameters() if (p.dim() == 1) == one] for one in (False, True)]
        optimizer = torch.optim.AdamW([{"params": flat[0], "weight_decay": 0.1}, {"params": flat[1], "weight_decay": 0.0}], lr=1e-3 * (1 + seed), fused=True)
        step = deepseed.compile(model, plan, optimizer=optimizer, loss_fn=loss_fn, clip_grad_norm=1.0, loss_scale=deepseed.LossScale(initial=2.0**12, window=2), backend=backend, seed=seed)
        assert isinstance(step, TrainStep)
        self.step = step
        self.restart(seed)

    def restart(self, seed: int) -> None:
        """The user's own objects anew, as in a new process."""
        optimizer, self.step.seed = self.step.optimizer, seed
        assert isinstance(optimizer, torch.optim.Optimizer)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01 * (1 + seed), total_steps=20, cycle_momentum=False)
        self.loader, self.drawn = Shuffled(seed), torch.manual_seed(100 + seed)
        self.batches = iter(self.loader)

    def save(self, folder: Any) -> None:
        self.step.save(folder, extra={"scheduler": self.scheduler.state_dict(), "loader": self.loader.state_dict(), "torch": torch.get_rng_state()})

    def load(self, folder: Any, **options: Any) -> None:
        extra = self.step.load(folder, **options)
        self.scheduler.load_state_dict(extra["scheduler"])
        self.loader.load_state_dict(extra["loader"])
        torch.set_rng_state(extra["torch"])

    def run(self, steps: int) -> Went:
        losses, heads, scales, rates = [], [], [], []
        for _ in range(steps):
            rows = next(self.batches)
            keep = (torch.rand(ROWS, TOKENS) > 0.1).to(self.dtype)
            weight = torch.tensor(float("inf") if self.step.steps == BAD else 1.0, dtype=self.dtype)
            losses.append(float(self.step({"ids": rows[:, :-1].contiguous(), "labels": rows[:, 1:].contiguous(), "keep": keep, "weight": weight})))
            heads.append(rows[:4, 0].tolist())
            scales.append((self.step.loss_scale, self.step.skipped))
            groups = self.step.optimizer.param_groups  # type: ignore[union-attr]
            rates.append([(g["lr"], g["initial_lr"], g["weight_decay"]) for g in groups])
            self.scheduler.step()
        return Went(losses, heads, scales, rates, everything(self.step))


# ranks ------------------------------------------------------------------------------------------------------------------


def told(went: Went) -> dict[str, Any]:
    """As plain data: tensors between processes would be shared memory."""
    return {"losses": went.losses, "exactly": went.exactly, "values": packed(went.values)}


def writes(plan: str, folder: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    training = Training(plan, backend="gloo")
    training.run(FIRST)
    training.save(folder)
    return told(training.run(MORE))


def goes_on(plan: str, folders: list[str]) -> list[dict[str, Any]]:
    """From each folder: the first before the first batch, the others in the step that has trained since."""
    torch.set_num_threads(1)
    training, out = Training(plan, seed=3, backend="gloo"), []
    for folder in folders:
        training.restart(5)
        training.load(folder)
        assert training.step.steps == FIRST
        out.append(told(training.run(MORE)))
    return out
