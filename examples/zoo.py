"""Models that are not Hugging Face's, small, as targets of ``deepseed verify`` and ``deepseed zoo``: plain PyTorch, nothing of DeepSeed.

    deepseed verify examples/zoo.py:dit --plan zero3+tp2 --world-size 4
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROWS = 8
Target = tuple[nn.Module, Any, dict[str, Any]]


# a diffusion transformer (Peebles & Xie, 2023): blocks whose norms are scaled, shifted and gated by the timestep and the class


class TimestepEmbedding(nn.Module):
    """``t [B]`` -> sines and cosines at geometric frequencies -> two layers -> ``[B, width]``."""

    def __init__(self, width: int, frequencies: int = 16) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        rate = torch.exp(-math.log(10000.0) * torch.arange(self.frequencies, device=t.device) / self.frequencies)
        angle = t[:, None].to(self.mlp[0].weight.dtype) * rate
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))


class DiTBlock(nn.Module):
    """Attention and MLP on ``x [B, N, width]``; ``c [B, width]`` sets shift, scale and gate of both (adaLN-Zero: gates start at 0)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def attention(self, x: Tensor) -> Tensor:
        b, n, width = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """Predicts the noise in ``x [B, channels, side, side]`` at timestep ``t [B]`` for class ``y [B]``."""

    def __init__(self, side: int = 16, patch: int = 4, channels: int = 4, width: int = 64, depth: int = 2, heads: int = 4, classes: int = 10, drop: float = 0.1) -> None:
        super().__init__()
        self.patch, self.classes, self.drop = patch, classes, drop
        self.embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.register_buffer("position", positions(side // patch, width))
        self.time, self.label = TimestepEmbedding(width), nn.Embedding(classes + 1, width)  # the last class: none (classifier-free guidance)
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.out = nn.Linear(width, patch * patch * channels)
        for layer in (*(block.modulation[1] for block in self.blocks), self.modulation[1], self.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        b, channels, side, _ = x.shape
        n = side // self.patch
        if self.training:
            y = torch.where(torch.rand(b, device=y.device) < self.drop, self.classes, y)
        c = self.time(t) + self.label(y)
        h = self.embed(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.modulation(c)[:, None].chunk(2, dim=-1)
        h = self.out(self.norm(h) * (1 + scale) + shift)
        return h.view(b, n, n, self.patch, self.patch, channels).permute(0, 5, 1, 3, 2, 4).reshape(b, channels, side, side)


def positions(side: int, width: int) -> Tensor:
    """Sines and cosines of a ``side x side`` grid, ``[1, side * side, width]``."""
    rate = 1.0 / 10000 ** (torch.arange(width // 4) / (width // 4))
    at = torch.arange(side)[:, None] * rate
    wave = torch.cat([at.sin(), at.cos()], dim=-1)  # [side, width / 2]
    return torch.cat([wave[:, None].expand(-1, side, -1), wave[None].expand(side, -1, -1)], dim=-1).reshape(1, side * side, width)


def noise_error(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean square error of the predicted noise, at each row's timestep of a linear schedule of 1000."""
    x, t = batch["x"], batch["t"]
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, device=x.device, dtype=x.dtype), 0)[t][:, None, None, None]
    noise = torch.randn(x.shape, device=x.device, dtype=x.dtype)
    return F.mse_loss(model(kept.sqrt() * x + (1 - kept).sqrt() * noise, t, batch["y"]), noise)


def dit() -> Target:
    torch.manual_seed(0)
    model = DiT()
    for p in model.parameters():  # as after some training: at the start the gates are 0 and nothing but the last layer learns
        if not p.any():
            nn.init.normal_(p, std=0.02)
    batch = {"x": torch.randn(ROWS, 4, 16, 16), "t": torch.randint(0, 1000, (ROWS,)), "y": torch.randint(0, 10, (ROWS,))}
    return model.train(), batch, {"loss_fn": noise_error}


# a recommendation model (Naumov et al., 2019): tables for categories, an MLP for numbers, products of every two, an MLP on top


class DLRM(nn.Module):
    """``dense [B, numbers]`` and ``categories [B, tables, bag]`` -> the logit of a click, ``[B]``."""

    def __init__(self, sizes: tuple[int, ...] = (40, 64, 96), numbers: int = 13, width: int = 16) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(size, width, mode="sum") for size in sizes)
        self.bottom = nn.Sequential(nn.Linear(numbers, 64), nn.ReLU(), nn.Linear(64, width), nn.ReLU())
        vectors = len(sizes) + 1
        self.register_buffer("pairs", torch.tril_indices(vectors, vectors, offset=-1))
        self.top = nn.Sequential(nn.Linear(width + vectors * (vectors - 1) // 2, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, dense: Tensor, categories: Tensor) -> Tensor:
        x = self.bottom(dense)
        vectors = torch.stack([x, *(table(categories[:, n]) for n, table in enumerate(self.tables))], dim=1)
        products = torch.bmm(vectors, vectors.transpose(1, 2))[:, self.pairs[0], self.pairs[1]]
        return self.top(torch.cat([x, products], dim=1))[:, 0]


def click_error(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.binary_cross_entropy_with_logits(model(batch["dense"], batch["categories"]), batch["clicked"])


def dlrm() -> Target:
    torch.manual_seed(0)
    sizes = (40, 64, 96)
    categories = torch.stack([torch.randint(0, size, (ROWS, 3)) for size in sizes], dim=1)
    batch = {"dense": torch.randn(ROWS, 13), "categories": categories, "clicked": torch.randint(0, 2, (ROWS,)).float()}
    return DLRM(sizes).train(), batch, {"loss_fn": click_error}
