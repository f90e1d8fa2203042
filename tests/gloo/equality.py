"""One rank of the equality tests: each case verified in float64, or trained in float32 beside eager PyTorch."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import deepseed
from deepseed.api import TrainStep
from deepseed.capture.eager import eager_reference
from deepseed.target import load
from deepseed.verify import VerifyReport, verify

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
CLIP = 1.0
Case = tuple[str, str, str]  # model, plan, optimizer


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
    torch.manual_seed(0)
    if model == "mlp":
        return Mlp(), (torch.randn(8, 32), torch.randn(8, 16)), squared_error
    target = load(MODELS[model])
    return target.model, target.batch, None


def verified(cases: Sequence[Case]) -> list[VerifyReport]:
    """Each case on this rank; prints the hash of the program that it ran."""
    torch.set_num_threads(1)
    reports = []
    for model, plan, optimizer in cases:
        module, batch, loss_fn = built(model)
        report = verify(module, batch, plan, optimizer_factory=OPTIMIZERS[optimizer], loss_fn=loss_fn, clip_grad_norm=CLIP, steps=STEPS, backend="gloo")
        print(f"rank {os.environ['RANK']}: {model} {plan} sha256 {report.program_hash}", flush=True)
        reports.append(report)
    return reports


def simulated_hash(case: Case, ranks: int) -> str:
    """The hash of the program that verify runs on simulated ranks."""
    model, plan, optimizer = case
    module, batch, loss_fn = built(model)
    module = copy.deepcopy(module).double()
    step = TrainStep(
        module, plan, optimizer=OPTIMIZERS[optimizer](module.parameters()), loss_fn=loss_fn, clip_grad_norm=CLIP, world_size=ranks,
        backend="simulate", widen=True, grads=True, quiet=True,
    )  # fmt: skip
    wide = {k: t.double() if t.is_floating_point() else t for k, t in batch.items()} if isinstance(batch, dict) else tuple(t.double() for t in batch)
    return step.compile(wide).program_hash


def float32(cases: Sequence[Case]) -> list[tuple[float, float, float]]:
    """Per case: the largest relative error of the losses, of the parameters, and their largest difference, against eager float32."""
    torch.set_num_threads(1)
    return [_float32(*case) for case in cases]


def _float32(model: str, plan: str, optimizer: str) -> tuple[float, float, float]:
    module, batch, loss_fn = built(model)
    ours, theirs = copy.deepcopy(module), copy.deepcopy(module)
    step = deepseed.compile(ours, plan, optimizer=OPTIMIZERS[optimizer](ours.parameters()), loss_fn=loss_fn, clip_grad_norm=CLIP, backend="gloo")
    eager = OPTIMIZERS[optimizer](theirs.parameters())
    loss_error = 0.0
    for number in range(STEPS):
        loss = step(batch)
        eager.zero_grad()
        with eager_reference(theirs, rng=torch.tensor([0, number])):
            want = loss_fn(theirs, batch) if loss_fn else theirs(**batch).loss
            want.backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), CLIP)
        eager.step()
        loss_error = max(loss_error, abs(float(loss) - float(want)) / abs(float(want)))
    state = step.state_dict()
    largest = max(float(p.abs().max()) for p in theirs.parameters())
    difference = max(float((state[n] - p).abs().max()) for n, p in theirs.named_parameters())
    return loss_error, difference / largest, difference
