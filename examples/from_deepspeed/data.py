"""What the scripts of this folder train on, made from what every Python carries, and the line that they print a step."""

from __future__ import annotations

from collections.abc import Sequence
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.distributed as dist
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast, TrainerCallback

ABOUT = ("assignment", "function", "import", "with")  # topics of the manual with some 20 to 45 paragraphs each


def report(step: int, loss: Tensor | float, norm: Tensor | float | None) -> None:
    """One line, by the first rank: the loss as the mean over ranks, and the gradient's norm before clipping."""
    mean = torch.as_tensor(loss, dtype=torch.float64).detach().clone()
    dist.all_reduce(mean)
    if dist.get_rank() == 0:
        print(f"step {step} loss {float(mean) / dist.get_world_size():.6f} norm {float(norm or 0):.6f}", flush=True)


class PrintSteps(TrainerCallback):
    """The same line from what the Trainer logs a step."""

    def on_log(self, args: object, state: Any, control: object, logs: dict[str, float] | None = None, **kwargs: object) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            print(f"step {state.global_step} loss {logs['loss']:.6f} norm {float(logs['grad_norm']):.6f}", flush=True)


def images(count: int) -> list[tuple[Tensor, int]]:
    """Pictures of CIFAR-10's shape, each a noisy stripe pattern of its class."""
    g = torch.Generator().manual_seed(0)
    rows = torch.arange(32.0)
    out = []
    for n in range(count):
        pattern = torch.sin(rows * (n % 10 + 1) / 5)[:, None] * torch.cos(rows * (n % 10) / 7)
        out.append((pattern.expand(3, 32, 32) + 0.5 * torch.randn(3, 32, 32, generator=g), n % 10))
    return out


def paragraphs(*names: str) -> list[str]:
    """Of Python's own manual: of the topics of these names, or of all."""
    texts = [topics[name] for name in names or sorted(topics)]
    return [" ".join(p.split()) for text in texts for p in text.split("\n\n") if len(p.split()) > 4]


def labelled(count: int) -> list[tuple[str, int]]:
    """The first few words of a paragraph, and the number of the topic that it is from."""
    each = [[(p, label) for p in paragraphs(name)] for label, name in enumerate(ABOUT)]
    rows = [pair for group in zip(*each, strict=False) for pair in group]
    return [(" ".join(text.split()[: 3 + n * 7 % 18]), label) for n, (text, label) in enumerate(rows[n % len(rows)] for n in range(count))]


def tokenizer(vocab: int = 384) -> PreTrainedTokenizerFast:
    """A byte-level BPE of a piece of the manual, the same on every rank."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(paragraphs(*ABOUT), vocab_size=vocab, show_progress=False, special_tokens=["<pad>", "<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, pad_token="<pad>", eos_token="<eos>")


def windows(count: int, length: int, vocab: int = 384) -> list[dict[str, Tensor]]:
    """Token windows of equal length."""
    text = "\n".join(paragraphs())[: 8 * count * length]
    ids = torch.tensor(tokenizer(vocab)(text)["input_ids"][: count * length])
    return [{"input_ids": row, "labels": row} for row in ids.view(count, length)]


def padded(rows: Sequence[tuple[str, int]], tokens: PreTrainedTokenizerFast, longest: int = 48) -> dict[str, Tensor]:
    """A batch as long as its longest row, up to a multiple of 8."""
    batch = dict(tokens([text for text, _ in rows], padding=True, pad_to_multiple_of=8, truncation=True, max_length=longest, return_tensors="pt"))
    return {**batch, "labels": torch.tensor([label for _, label in rows])}
