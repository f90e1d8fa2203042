"""The model of these checkpoints, its batches and its optimizer: for ``make.py``, which has DeepSpeed, and the test, which has not.

Sizes are odd, so that every partition is padded; the head is tied to the embedding, one matrix is frozen, one buffer is trained by nobody.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, WIDTH, ROWS, LENGTH = 17, 9, 4, 6


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 13), nn.Linear(13, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.frozen.weight.requires_grad_(False)
        self.register_buffer("shift", torch.linspace(-0.5, 0.5, WIDTH))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.frozen(x).tanh() + self.shift.to(x.dtype)
        x = self.norm(x + self.down(torch.nn.functional.gelu(self.up(x))))
        logits = self.head(x)[:, :-1].reshape(-1, VOCABULARY)
        return nn.functional.cross_entropy(logits if x.dtype == torch.float64 else logits.float(), tokens[:, 1:].reshape(-1))


def model() -> Small:
    torch.manual_seed(0)
    return Small()


def groups(model: nn.Module) -> list[dict[str, Any]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return [{"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1}, {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0, "lr": 5e-3}]


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups(model), lr=1e-2, betas=(0.9, 0.95))


def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.StepLR:
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.7)


def batches() -> list[Tensor]:
    """Global batches: three before the checkpoint, three after it."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator) for _ in range(6)]


LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 12, "intermediate_size": 14, "num_hidden_layers": 1, "num_attention_heads": 3, "num_key_value_heads": 1,
    "max_position_embeddings": 16, "tie_word_embeddings": False, "attn_implementation": "eager",
}  # fmt: skip
