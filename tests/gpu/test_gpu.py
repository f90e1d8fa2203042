"""The same program on a GPU: training equal to the CPU's, the same random bits, attention equal to plain matrix products."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepseed
from deepseed.ops import attention, rng
from deepseed.target import load
from deepseed.verify import verify

STEPS = 3


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def moved(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {key: t.to(device) for key, t in batch.items()}


def train(model: nn.Module, batch: Any, plan: str, optimizer: Any = sgd) -> tuple[list[float], dict[str, Tensor]]:
    step = deepseed.compile(model, plan, optimizer=optimizer(model), clip_grad_norm=1.0)
    losses = [float(step(batch)) for _ in range(STEPS)]
    return losses, {name: t.cpu() for name, t in step.state_dict().items()}


@pytest.mark.parametrize("plan", ["zero0", "zero1+dp2", "zero3+tp2+dp2", "zero3+dp2+pp2+mb4+zb"])
@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_training_on_a_gpu_equals_the_cpu(cuda: torch.device, plan: str, optimizer: Any) -> None:
    """float32: losses to 1e-5; AdamW's first steps have the size of lr whatever the gradient, so its parameters to 0.1 lr a step.
    Simulated ranks run where the model's parameters are."""
    found = load("hf:LlamaForCausalLM")
    there = copy.deepcopy(found.model).to(cuda)
    losses, values = train(found.model, found.batch, plan, optimizer)
    got, have = train(there, moved(found.batch, cuda), plan, optimizer)
    assert all(p.device == cuda for p in there.parameters())
    assert got == pytest.approx(losses, rel=1e-5)
    for name, t in values.items():
        torch.testing.assert_close(have[name], t, rtol=1e-5, atol=1e-5 if optimizer is sgd else 0.1 * 1e-3 * STEPS)


@pytest.mark.parametrize("plan", ["zero0+offload(optimizer)", "zero3+dp2+mb2+offload(optimizer, gradients, params, activations)"])
def test_what_is_offloaded_lies_in_pinned_memory_of_the_host(cuda: torch.device, plan: str) -> None:
    """Numbers of a step are those of the CPU in float64 (verify); the stored parameters and moments are pinned, and stay where they are."""
    found = load("hf:LlamaForCausalLM")
    report = verify(found.model.to(cuda), moved(found.batch, cuda), plan, steps=3)
    assert report.ok, str(report)
    model = found.model.float()
    step = deepseed.compile(model, plan, optimizer=adamw(model), clip_grad_norm=1.0)
    step(moved(found.batch, cuda))
    stored = [t for state in step.states for (role, _), t in state.tensors.items() if role in ("param", "state")]
    before = [t.data_ptr() for t in stored]
    step(moved(found.batch, cuda))
    assert all(t.device.type == "cpu" and t.is_pinned() for t in stored)
    assert [t.data_ptr() for state in step.states for (role, _), t in state.tensors.items() if role in ("param", "state")] == before


def test_the_devices_peak_falls_by_the_moments(cuda: torch.device) -> None:
    """The allocator's peak of a step beside the predicted one: blocks are rounded up to 512 bytes, and workspaces of kernels are not predicted."""
    peaks = {}
    for plan in ("zero0", "zero0+offload(optimizer)"):
        found = load("hf:LlamaForCausalLM(hidden_size=512, intermediate_size=1024)")
        model, batch = found.model.to(cuda), moved(found.batch, cuda)
        step = deepseed.compile(model, plan, optimizer=adamw(model), clip_grad_norm=1.0)
        step(batch)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step(batch)
        torch.cuda.synchronize()
        peaks[plan] = torch.cuda.max_memory_allocated()
        moments = step.explain().ranks[0].optimizer_bytes
    assert peaks["zero0"] - peaks["zero0+offload(optimizer)"] >= 0.9 * moments


@pytest.mark.parametrize("plan", ["zero3+dp2", "zero3+dp2+pp2+mb2+zb", "pp2+mb4+interleaved2"])
@pytest.mark.parametrize("target", ["hf:LlamaForCausalLM(num_hidden_layers=4)", "hf:GPT2LMHeadModel(num_hidden_layers=4)"])
def test_a_gpu_in_float64_equals_eager(cuda: torch.device, target: str, plan: str) -> None:
    """Dropout on where the model has it: the masks are those of the counter-based generator on either side."""
    found = load(target)
    report = verify(found.model.to(cuda), moved(found.batch, cuda), plan, steps=2)
    assert report.ok, str(report)


def test_bf16_with_the_fused_kernels(cuda: torch.device) -> None:
    found = load("hf:LlamaForCausalLM")
    batch = moved(found.batch, cuda)
    losses, _ = train(copy.deepcopy(found.model).to(cuda), batch, "zero0")
    narrow, _ = train(copy.deepcopy(found.model).to(cuda), batch, "zero0+bf16")
    assert narrow == pytest.approx(losses, rel=2e-2)


@pytest.mark.parametrize(("plan", "gpus"), [("zero1", 2), ("pp2+mb4+1f1b", 2), ("pp2+mb4+zb", 2), ("zero3+dp2+pp2+mb4+zb", 4), ("zero3+dp2+tp2+pp2+mb4", 8)])
def test_several_gpus_equal_one(plan: str, gpus: int, tmp_path: Path) -> None:
    if (found := torch.cuda.device_count()) < gpus:
        pytest.skip(f"{gpus} CUDA devices are needed, {found} found")
    worker = Path(__file__).parent / "nccl_worker.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}", str(worker), plan, str(tmp_path / "values.pt")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    got = torch.load(tmp_path / "values.pt")
    target = load("hf:LlamaForCausalLM")
    losses, values = train(target.model, target.batch, "zero0")
    assert got["losses"] == pytest.approx(losses, rel=1e-5)
    for name, t in values.items():
        torch.testing.assert_close(got["values"][name], t, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(7,), (64, 33), (3, 50, 17), (40000,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_random_bits_are_the_cpus(cuda: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    key = torch.tensor([5, 11])
    for index in (None, tuple(((2, 1), (n // 2, None)) if n % 2 == 0 else ((n, None),) for n in shape)):
        local = shape if index is None else tuple(n // 2 if n % 2 == 0 else n for n in shape)
        for draw, low, high, site in ((rng.bernoulli, 0.3, None, "site/0"), (rng.uniform, -1.0, 2.0, "site/1")):
            numbers = (low,) if high is None else (low, high)
            here, there = (draw(k, local, *numbers, site, dtype, index) for k in (key, key.to(cuda)))
            assert torch.equal(there.cpu(), here)
        here, there = rng.normal(key, local, 0.0, 1.0, "site/2", dtype, index), rng.normal(key.to(cuda), local, 0.0, 1.0, "site/2", dtype, index)
        torch.testing.assert_close(there.cpu(), here)  # the bits are equal; log and cos are the device's own


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", ["none", "causal", "bool", "bias"])
@pytest.mark.parametrize("heads", [4, 2])
def test_attention_equals_plain_matrix_products(cuda: torch.device, dtype: torch.dtype, mask: str, heads: int) -> None:
    """Whichever kernel serves, against float64 on the CPU; 33 keys are no whole tile."""
    torch.manual_seed(0)
    b, h, s, d = 2, 4, 33, 16
    q, g = (torch.randn(b, h, s, d).to(dtype) for _ in range(2))
    k, v = (torch.randn(b, heads, s, d).to(dtype) for _ in range(2))
    given = {"bool": torch.rand(b, 1, s, s) > 0.2, "bias": torch.randn(b, 1, s, s).to(dtype)}.get(mask)
    if mask == "bool" and given is not None:
        given[..., 0] = True
    causal = mask == "causal"
    wide = [t.double().requires_grad_() for t in (q, k, v)]
    repeated = [t.repeat_interleave(h // t.shape[1], 1) for t in wide]
    scores = repeated[0] @ repeated[1].mT / d**0.5
    if given is not None:
        scores = scores.masked_fill(~given, float("-inf")) if mask == "bool" else scores + given.double()
    if causal:
        scores = scores.masked_fill(~torch.ones(s, s, dtype=torch.bool).tril(), float("-inf"))
    want = scores.softmax(-1) @ repeated[2]
    grads = torch.autograd.grad(want, wide, g.double())
    on = [t.to(cuda) if t is not None else None for t in (q, k, v, given, g)]
    out, lse = attention.sdpa(on[0], on[1], on[2], on[3], causal, d**-0.5)  # type: ignore[arg-type]
    got = attention.sdpa_backward(on[4], on[0], on[1], on[2], on[3], out, lse, causal, d**-0.5)  # type: ignore[arg-type]
    tol = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(lse.cpu().double(), torch.logsumexp(scores, -1).detach(), rtol=tol, atol=tol)
    for mine, theirs in zip((out, *got), (want, *grads), strict=True):
        torch.testing.assert_close(mine.cpu().double(), theirs.detach(), rtol=tol, atol=tol * float(theirs.detach().abs().max()))
