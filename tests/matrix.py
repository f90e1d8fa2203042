"""The models, optimizers and settings of the equality matrix, for simulated and for real ranks."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from deepseed.target import load

LR = {"adamw": 1e-3, "sgd": 1e-2}
OPTIMIZERS = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=LR["adamw"]),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=LR["sgd"], momentum=0.9),
}
MODELS = {
    "llama": "hf:LlamaForCausalLM",
    "tied llama": "hf:LlamaForCausalLM(tie_word_embeddings=True)",
    "gpt2": "hf:GPT2LMHeadModel",
    "bert": "hf:BertForMaskedLM",
    "mlp": "",
}
STEPS = 3
CLIP = 0.1  # the gradients of every model are clipped at 0.1


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def squared_error(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return ((model(x) - y) ** 2).mean()


@cache
def built(model: str) -> tuple[nn.Module, Any, Any]:
    """Model, batch and loss function (None: the model's own)."""
    torch.manual_seed(0)
    if model == "mlp":
        return Mlp(), (torch.randn(8, 32), torch.randn(8, 16)), squared_error
    target = load(MODELS[model])
    return target.model, target.batch, None
