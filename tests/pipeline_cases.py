"""Models, plans and schedules of the pipelines' matrix, for simulated ranks: what is drawn from it, and what runs it.

Every model has four layers, eight where more than four stages are cut; labels are ignored in another number in each row, so that no two
microbatches count the same.
"""

from __future__ import annotations

import itertools
import random
from functools import cache
from typing import Any

import torch
from torch import nn

from deepseed.plan import parse_plan
from deepseed.target import load

CLIP = 0.1  # below every model's gradient norm
MODELS = {
    "llama": "LlamaForCausalLM(num_hidden_layers={n})",
    "tied llama": "LlamaForCausalLM(num_hidden_layers={n}, tie_word_embeddings=True)",
    "gpt2": "GPT2LMHeadModel(num_hidden_layers={n})",
    "qwen3": "Qwen3ForCausalLM(num_hidden_layers={n})",
    "t5": "T5ForConditionalGeneration(num_layers={n}, num_decoder_layers={n})",
    "bert": "BertForMaskedLM(num_hidden_layers={n})",
    "vit": "ViTForImageClassification(num_hidden_layers={n})",
}
PLANS = (
    "pp2", "pp4", "pp2+mb8", "tp2+pp2", "dp2+pp2", "zero1+dp2+pp2", "zero2+dp2+pp2", "zero3+dp2+pp2",
    "zero3+dp2+tp2+pp2", "zero3+dp2+tp2+pp4", "zero3+tp2+pp4",
)  # fmt: skip
SCHEDULES = ("gpipe", "1f1b", "interleaved2", "zb")
MATRIX = list(itertools.product(MODELS, PLANS, SCHEDULES))


def sample(size: int = 12) -> list[tuple[str, str, str]]:
    """Of the matrix, ``size`` cases with every model, every plan and every schedule: the shorter ones of more than eight ranks or stages."""
    rng = random.Random(0)
    models = list(MODELS)
    plans = [p for p in PLANS if p != "zero3+dp2+tp2+pp4"]
    rng.shuffle(models)
    rng.shuffle(plans)
    drawn = [(models[n % len(models)], plans[n % len(plans)], SCHEDULES[n % 4]) for n in range(size - 1)]
    return [*drawn, ("llama", "zero3+dp2+tp2+pp4", "1f1b")]


def layers(plan: str, schedule: str) -> int:
    """Eight where the plan cuts more than four stages."""
    p = parse_plan(f"{plan}+{schedule}")
    return 8 if p.stages * p.chunks > 4 else 4


@cache
def built(model: str, depth: int) -> tuple[nn.Module, dict[str, Any]]:
    """Model and batch; in row r, the first r (modulo half a row) labels are ignored: each of two and of four microbatches counts other ones."""
    target = load("hf:" + MODELS[model].format(n=depth))
    batch = dict(target.batch)
    labels = batch["labels"]
    if labels.dim() == 2:
        rows, tokens = labels.shape
        ignored = torch.arange(tokens)[None] < torch.arange(rows)[:, None] % (tokens // 2)
        batch["labels"] = torch.where(ignored, -100, labels)
    return target.model, batch
