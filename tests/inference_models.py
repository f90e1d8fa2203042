"""Small random models whose greedy outputs vary, and what their own ``generate`` says."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from deepseed.inference.outputs import Completion
from deepseed.tiny import tiny_model

VOCABULARY = 199
FIELDS: dict[str, dict[str, Any]] = {  # windows shorter than the prompts; a tied head on inputs that outweigh their layers repeats the last token
    "MistralForCausalLM": {"sliding_window": 8}, "GptOssForCausalLM": {"sliding_window": 8}, "Gemma3ForCausalLM": {"sliding_window": 8, "tie_word_embeddings": False},
}  # fmt: skip


def varied(name: str, positions: bool = True, **fields: Any) -> Any:
    """Float32. Weights so large that the output is no fixed point; no token ends a text."""
    torch.manual_seed(0)
    model: Any = tiny_model(name, {"vocab_size": VOCABULARY, **({"max_position_embeddings": 128} if positions else {}), **FIELDS.get(name, {}), **fields})[0].eval().float()
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            if p.dim() > 1 or "sinks" in parameter_name:
                p.copy_(torch.randn_like(p) * (2.5 / p.shape[-1] ** 0.5 if p.dim() > 1 else 1.0))
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def generated(model: Any, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    out = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out.append(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)[0, len(prompt) :].tolist())
    return out


@contextmanager
def sealed(model: nn.Module) -> Iterator[None]:
    """``generate`` and the forward of every module of the model raise."""

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model itself was called")

    classes: list[Any] = [*{type(m) for m in model.modules()}]
    before = [(c, c.__dict__.get("forward")) for c in classes]
    model.generate = never  # type: ignore[assignment]
    for c in classes:
        c.forward = never
    try:
        yield
    finally:
        for c, old in before:
            if old is None:
                del c.forward
            else:
                c.forward = old
        del model.generate


def prompts(lengths: Sequence[int] = (2, 17, 40, 1, 9), seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(VOCABULARY) for _ in range(n)] for n in lengths]


def ids(done: list[Completion]) -> list[list[int]]:
    return [c.token_ids for c in done]
