"""Mixed precision by hand, eagerly, on one device: what a compiled step in bf16 or fp16 must equal. No DeepSeed in it.

Parameters are cast for forward and backward (autograd casts their gradients back), the optimizer updates the float32 ones, and the loss
is scaled by ``torch.amp.GradScaler``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.stateless import _reparametrize_module

from deepseed.capture.batch import rebuild, tensors

Factory = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]


def adamw(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """With torch's fused kernel, which is what a compiled step calls."""
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, fused=True)


@dataclass
class Eager:
    """A loop over one model. ``window``: good steps after which the scale grows."""

    model: nn.Module
    dtype: torch.dtype
    factory: Factory = adamw
    loss_fn: Callable[..., Tensor] | None = None
    clip: float | None = None
    scale: float | None = None
    window: int = 1000
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        self.model = copy.deepcopy(self.model)
        self.optimizer = self.factory(list(self.model.parameters()))
        self.scaler = torch.amp.GradScaler("cpu", init_scale=self.scale or 1.0, growth_interval=self.window, enabled=self.scale is not None)
        self.skipped = 0

    def step(self, batch: Any) -> Tensor:
        """One step; the loss, not scaled."""
        self.optimizer.zero_grad()
        swapped = {name: p.to(self.dtype) for name, p in self.model.named_parameters()}
        given = rebuild(batch, {key: t.to(self.dtype) if t.is_floating_point() else t for key, t in tensors(batch).items()})
        with _reparametrize_module(self.model, swapped, tie_weights=True):
            loss: Tensor = self.model(**given).loss if self.loss_fn is None else self.loss_fn(self.model, given)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        before = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.skipped += self.scaler.get_scale() < before
        return loss.detach()

    def parameters(self) -> Mapping[str, Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters()}

    def state(self) -> Mapping[str, Tensor]:
        """The optimizer's, as ``step.optimizer_state()`` names it."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        return {f"{slot}/{names[id(p)]}": t for p, slots in self.optimizer.state.items() for slot, t in slots.items() if isinstance(t, Tensor)}


def differing(have: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> list[str]:
    """The names of ``want`` whose tensors are not the same bits."""
    return [name for name, t in want.items() if not torch.equal(have[name], t)]


WORDS, WIDTH, HEADS, ROWS, TOKENS = 32, 32, 2, 8, 6  # half of each is whole vectors of a CPU: kernels round their rest otherwise


class Tiny(nn.Module):
    """One layer of a transformer with a tied table, and nothing that 16 bits cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(WORDS, WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        q, k, v = (y.view(*ids.shape, HEADS, -1).transpose(1, 2) for y in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape))
        out: Tensor = self.head(x + self.down(F.gelu(self.up(x))))
        return out


def token_loss(model: nn.Module, batch: Any) -> Tensor:
    ids, labels = batch
    return F.cross_entropy(model(ids).reshape(-1, WORDS).float(), labels.reshape(-1), ignore_index=-100)


def tiny() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """The model, ids and labels; each row ignores another number of labels."""
    torch.manual_seed(0)
    model = Tiny()
    ids = torch.randint(0, WORDS, (ROWS, TOKENS))
    return model, (ids, torch.where(torch.arange(TOKENS)[None] > torch.arange(ROWS)[:, None] % 4, ids.roll(-1, 1), -100))
