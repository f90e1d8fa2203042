"""Small models that pipelines find hard: skips over stages, layers used on all stages, statistics over the batch, losses of many parts.

``MODELS``: name -> (model, batch, loss function). Each has rows that count otherwise in the loss, where labels can be ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROWS, WIDTH, WORDS, TOKENS = 8, 16, 24, 6
Loss = Callable[[nn.Module, Any], Tensor]
Made = tuple[nn.Module, Any, Loss]


class Block(nn.Module):
    """A residual MLP."""

    def __init__(self, width: int = WIDTH, drop: float = 0.0) -> None:
        super().__init__()
        self.norm, self.up, self.down, self.drop = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width), nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(F.gelu(self.up(self.norm(x)))))


class UNet(nn.Module):
    """Down, middle, up; each level's features are concatenated on the way up: every skip crosses all stages between."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.ModuleList([nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)])
        self.norms = nn.ModuleList([nn.GroupNorm(2, 8), nn.GroupNorm(2, 16)])
        self.middle = nn.Conv2d(16, 16, 3, padding=1)
        self.up = nn.ModuleList([nn.ConvTranspose2d(16, 8, 2, stride=2), nn.ConvTranspose2d(16, 8, 2, stride=2)])
        self.leave = nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        skips = [x]
        for conv, norm in zip(self.down, self.norms, strict=True):
            x = F.silu(norm(conv(x)))
            skips.append(x)
        x = self.middle(skips.pop())
        for conv in self.up:
            x = torch.cat([F.silu(conv(x)), skips.pop()], 1)
        return self.leave(x)


class Residual(nn.Module):
    """Convolutions with batch norms: statistics over the whole batch, running ones kept."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if n == 0 else 8, 8, 3, padding=1, bias=False) for n in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(4))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        for n, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = F.relu(norm(conv(x)))
            x = y if n == 0 else x + y
        return self.head(x.mean((2, 3)))


class Deep(nn.Module):
    """A head after each layer: a list of losses. The weights of the heads are one."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, ids: Tensor, labels: Tensor) -> list[Tensor]:
        x, losses = self.words(ids), []
        for layer in self.layers:
            x = layer(x)
            losses.append(F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten(), ignore_index=-100))
        return losses


class Recurrent(nn.Module):
    """One layer, run on each stage, with dropout; the output is tied to the embedding."""

    def __init__(self, times: int = 5) -> None:
        super().__init__()
        self.words, self.layer, self.times = nn.Embedding(WORDS, WIDTH), Block(drop=0.2), times
        self.final = nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for _ in range(self.times):
            x = self.layer(x)
        return self.final(x) @ self.words.weight.T


class Towers(nn.Module):
    """Two towers and a contrastive loss: each row meets all others, those of other microbatches too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Sequential(nn.Linear(12, WIDTH), Block(), Block()) for _ in range(2))
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = F.normalize(self.a(x), dim=-1), F.normalize(self.b(y), dim=-1)
        scores = self.scale.exp() * a @ b.T
        here = torch.arange(len(x), device=x.device)
        return (F.cross_entropy(scores, here) + F.cross_entropy(scores.T, here)) / 2


class Plain(nn.Module):
    """``layers`` blocks; some weights are frozen and one parameter is not used."""

    def __init__(self, layers: int, width: int = WIDTH, frozen: tuple[int, ...] = (), drop: float = 0.0) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(12, width), nn.Linear(width, 5)
        self.layers = nn.ModuleList(Block(width, drop) for _ in range(layers))
        self.unused = nn.Parameter(torch.ones(3))
        for n in frozen:
            self.layers[n].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = layer(x)
        return self.leave(x)


def tokens(ignored: bool = True, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, WORDS, (rows, TOKENS))
    left_out = torch.arange(TOKENS)[None] < torch.arange(rows)[:, None] % 5
    return ids, torch.where(left_out, -100, ids.roll(-1, 1)) if ignored else ids.roll(-1, 1)


def token_loss(model: nn.Module, batch: Any) -> Tensor:
    ids, labels = batch
    return F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), ignore_index=-100)


def listed_loss(model: nn.Module, batch: Any) -> Tensor:
    losses = model(*batch)
    return sum((0.5 + n) * each for n, each in enumerate(losses)) / len(losses)


def squares(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return F.mse_loss(model(x), y)


def classes(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y)


def own(model: nn.Module, batch: Any) -> Tensor:
    return model(*batch)


def _images(rows: int = ROWS) -> Tensor:
    return torch.randn(rows, 3, 8, 8)


MODELS: dict[str, Callable[[], Made]] = {
    "unet": lambda: (UNet(), (_images(), _images()), squares),
    "batch norm": lambda: (Residual(), (_images(), torch.randint(0, 5, (ROWS,))), classes),
    "batch norm, evaluated": lambda: (Residual().eval(), (_images(), torch.randint(0, 5, (ROWS,))), classes),
    "a loss of each layer": lambda: (Deep(), tokens(), listed_loss),
    "one layer five times": lambda: (Recurrent(), tokens(), token_loss),
    "contrastive towers": lambda: (Towers(), (torch.randn(ROWS, 12), torch.randn(ROWS, 12)), own),
    "frozen layers": lambda: (Plain(4, frozen=(0, 2)), (torch.randn(ROWS, 12), torch.randint(0, 5, (ROWS,))), classes),
    "the first half frozen": lambda: (_frozen_half(), (torch.randn(ROWS, 12), torch.randint(0, 5, (ROWS,))), classes),
    "odd sizes": lambda: (Plain(3, 15, drop=0.1), (torch.randn(6, 12), torch.randint(0, 5, (6,))), classes),
    "seven layers": lambda: (Plain(7), (torch.randn(ROWS, 12), torch.randint(0, 5, (ROWS,))), classes),
    "dropout": lambda: (Plain(4, drop=0.3), (torch.randn(ROWS, 12), torch.randint(0, 5, (ROWS,))), classes),
}


def _frozen_half() -> nn.Module:
    model = Plain(4, frozen=(0, 1))
    model.enter.requires_grad_(False)
    return model


def built(name: str) -> Made:
    """The same numbers every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MODELS[name]()
