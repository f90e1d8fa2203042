"""One rank of the equality tests: each case verified in float64, or trained in float32 beside eager PyTorch; and ``equal``, which starts them."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from typing import Any

import pipeline_cases
import torch
from matrix import CLIP, OPTIMIZERS, STEPS, built
from torch import nn

import deepseed
from deepseed.api import TrainStep
from deepseed.capture.eager import eager_reference
from deepseed.verify import LOSS_TOLERANCE, TOLERANCE, VerifyReport, verify
from gloo.launch import ranks

Case = tuple[str, str, str]  # model, plan, and an optimizer of the matrix, or a schedule: then the model is deep, and AdamW trains it


def setting(case: Case) -> tuple[nn.Module, Any, Callable[..., Any] | None, str, Any]:
    """Model, batch, loss function (None: the model's own), plan and optimizer factory."""
    model, plan, last = case
    if last in pipeline_cases.SCHEDULES:
        return *pipeline_cases.built(model, pipeline_cases.layers(plan, last)), None, f"{plan}+{last}", OPTIMIZERS["adamw"]
    return *built(model), plan, OPTIMIZERS[last]


def equal(number: int, cases: list[Case]) -> None:
    """Each case on ``number`` real ranks: equal to eager PyTorch on every one, by the program that the simulation runs."""
    got = ranks(number, verified, cases)
    for n, case in enumerate(cases):
        expected = simulated_hash(case, number)
        for rank in range(number):
            report = got[rank][n]
            assert report.ok, f"{case} on rank {rank}: {report}"
            errors = report.loss_rel_error, report.grad_max_rel_error, report.param_max_rel_error
            assert errors[0] <= LOSS_TOLERANCE and max(errors[1:]) <= TOLERANCE, f"{case} on rank {rank}: {report}"
            assert report.program_hash == expected, f"{case}: rank {rank} ran another program than the simulation"
            assert (report.backend, report.world_size, report.steps) == ("gloo", number, STEPS) and report.instances_checked > 10, f"{case}: {report}"
        worst = [max(getattr(got[rank][n], name) for rank in range(number)) for name in ("loss_rel_error", "grad_max_rel_error", "param_max_rel_error")]
        print(f"{number} ranks, {' '.join(case)}: loss {worst[0]:.1e}, gradients {worst[1]:.1e}, parameters {worst[2]:.1e}")


def verified(cases: Sequence[Case]) -> list[VerifyReport]:
    """Each case on this rank; prints the hash of the program that it ran."""
    torch.set_num_threads(1)
    reports = []
    for case in cases:
        module, batch, loss_fn, plan, factory = setting(case)
        report = verify(module, batch, plan, optimizer_factory=factory, loss_fn=loss_fn, clip_grad_norm=CLIP, steps=STEPS, backend="gloo")
        print(f"rank {os.environ['RANK']}: {case[0]} {plan} sha256 {report.program_hash}", flush=True)
        reports.append(report)
    return reports


def simulated_hash(case: Case, ranks: int) -> str:
    """The hash of the program that verify runs on simulated ranks."""
    module, batch, loss_fn, plan, factory = setting(case)
    module = copy.deepcopy(module).double()
    step = TrainStep(
        module, plan, optimizer=factory(module.parameters()), loss_fn=loss_fn, clip_grad_norm=CLIP, world_size=ranks,
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
