"""One rank of the equality tests: each case verified in float64, or trained in float32 beside eager PyTorch."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence

import torch
from matrix import CLIP, OPTIMIZERS, STEPS, built
from torch import nn

import deepseed
from deepseed.api import TrainStep
from deepseed.capture.eager import eager_reference
from deepseed.verify import VerifyReport, verify

Case = tuple[str, str, str]  # model, plan, optimizer


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
