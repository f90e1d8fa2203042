"""One small model with a part of every kind: tied embedding, attention, dropout, layer and batch norm, a masked token-weighted loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, WORDS, ROWS, TOKENS = 16, 4, 24, 8, 6


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(TOKENS, WIDTH)
        self.norm, self.batch_norm = nn.LayerNorm(WIDTH), nn.BatchNorm1d(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.drop = nn.Dropout(0.25)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        b, t = ids.shape
        x = self.words(ids) + self.places(torch.arange(t, device=ids.device))
        q, k, v = (y.view(b, t, HEADS, -1).transpose(1, 2) for y in self.qkv(self.norm(x)).chunk(3, -1))
        mask = torch.ones(t, t, dtype=torch.bool, device=ids.device).tril()
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~mask, -1e9)
        x = x + self.drop(self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, -1)))
        x = x + self.drop(self.down(F.gelu(self.up(self.batch_norm(x.transpose(1, 2)).transpose(1, 2)))))
        return self.head(x)


def token_loss(model: nn.Module, batch: Any) -> Tensor:
    ids, labels = batch
    return F.cross_entropy(model(ids).reshape(-1, WORDS), labels.reshape(-1), ignore_index=-100)


def small() -> tuple[nn.Module, tuple[Tensor, Tensor], Any]:
    """Model, batch (each row ignores another number of labels) and loss."""
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = Small()
    ids = torch.randint(0, WORDS, (ROWS, TOKENS))
    torch.random.set_rng_state(state)
    labels = torch.where(torch.arange(TOKENS)[None] > torch.arange(ROWS)[:, None] % 4, ids.roll(-1, 1), -100)
    return model, (ids, labels), token_loss
