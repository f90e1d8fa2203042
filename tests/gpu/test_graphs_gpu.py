"""CUDA graphs on a device: steps equal to those that are not captured, loads, new shapes, memory, and what a replay saves (``pytest -s`` prints it, for docs/performance.md)."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepseed
from deepseed.api import TrainStep
from deepseed.runtime.graphs import WARM, Replayed
from deepseed.target import load

MODELS = ("GPT2LMHeadModel", "LlamaForCausalLM", "BertForMaskedLM")
STEPS = WARM + 4


def moved(batch: Any, device: torch.device) -> Any:
    return {key: t.to(device) for key, t in batch.items()}


def made(model: nn.Module, chosen: bool | str, plan: str = "zero0", codegen: str = "python") -> TrainStep:
    step = deepseed.compile(model, plan, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3), clip_grad_norm=1.0, codegen=codegen, cuda_graphs=chosen)
    assert isinstance(step, TrainStep)
    return step


def replayed(step: TrainStep) -> Replayed:
    (e,) = step.programs.current().executables
    assert isinstance(e, Replayed)
    return e


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """float32: the same kernels on the same numbers; sums by atomics (an embedding's gradient) may come in another order, and AdamW's first steps have the size of lr whatever the gradient."""
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-4 * STEPS)


@pytest.mark.parametrize("codegen", ["python", "triton"])
@pytest.mark.parametrize("plan", ["zero0", "zero0+mb2", "zero0+bf16", "zero0+remat"])
@pytest.mark.parametrize("name", MODELS)
def test_steps_are_those_that_are_not_captured(cuda: torch.device, name: str, plan: str, codegen: str) -> None:
    """With dropout where the model has it, and another learning rate at each step."""
    target, runs = load(f"hf:{name}"), []
    for chosen in (False, True):
        step = made(copy.deepcopy(target.model).to(cuda), chosen, plan, codegen)
        assert isinstance(step.optimizer, torch.optim.Optimizer)
        schedule = torch.optim.lr_scheduler.LinearLR(step.optimizer, 0.1, 1.0, STEPS)
        losses = []
        for n in range(STEPS):
            losses.append(step({key: t.roll(n, 0) for key, t in moved(target.batch, cuda).items()}))
            schedule.step()
        runs.append((torch.stack(losses).cpu(), step.state_dict()))
    assert replayed(step).captures == 1 and len(set(runs[1][0].tolist())) == STEPS
    torch.testing.assert_close(runs[1][0], runs[0][0], rtol=1e-5 if "bf16" not in plan else 1e-2, atol=0)
    if "bf16" not in plan:
        close(runs[1][1], runs[0][1])


def test_a_gpu_in_float64_equals_eager(cuda: torch.device) -> None:
    """The replayed steps among them."""
    from deepseed.verify import verify

    target = load("hf:GPT2LMHeadModel")
    report = verify(target.model.to(cuda), moved(target.batch, cuda), "zero0", steps=STEPS, cuda_graphs=True)
    assert report.ok, str(report)


def test_loads_and_moved_parameters(cuda: torch.device, tmp_path: Path) -> None:
    target = load("hf:LlamaForCausalLM")
    step, batch = made(target.model.to(cuda), True), moved(target.batch, cuda)
    for _ in range(STEPS):
        step(batch)
    step.save(tmp_path / "here")
    after = [float(step(batch)) for _ in range(3)]
    step.load(tmp_path / "here")
    assert [float(step(batch)) for _ in range(3)] == pytest.approx(after, rel=1e-5) and replayed(step).captures == 1
    step.load(tmp_path / "here")
    for p in step.model.parameters():
        p.data = p.detach().clone()
    assert [float(step(batch)) for _ in range(3)] == pytest.approx(after, rel=1e-5) and replayed(step).captures == 2


@pytest.mark.parametrize("plan", ["zero1", "zero3", "tp2"])
def test_two_gpus_equal_one(cuda: torch.device, plan: str, tmp_path: Path) -> None:
    """Collectives in the graph."""
    if (found := torch.cuda.device_count()) < 2:
        pytest.skip(f"2 CUDA devices are needed, {found} found")
    worker = Path(__file__).parent / "nccl_worker.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(worker), plan, str(tmp_path / "values.pt"), "graphs"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    target = load("hf:LlamaForCausalLM")
    step = deepseed.compile(target.model, optimizer=torch.optim.SGD(target.model.parameters(), lr=1e-2, momentum=0.9), clip_grad_norm=1.0)
    losses = [float(step(target.batch)) for _ in range(5)]  # type: ignore[arg-type]
    assert torch.load(tmp_path / "values.pt")["losses"] == pytest.approx(losses, rel=1e-5)


def test_memory_of_graphs_is_shared_and_goes(cuda: torch.device) -> None:
    """A second shape takes no second set of activations; dropped programs leave nothing behind."""
    target = load("hf:LlamaForCausalLM(hidden_size=256)")
    step, batch = made(target.model.to(cuda), True), moved(target.batch, cuda)
    held = []
    for rows in (len(batch["input_ids"]), len(batch["input_ids"]) // 2):
        for _ in range(WARM + 1):
            step({key: t[:rows] for key, t in batch.items()})
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        held.append(torch.cuda.memory_reserved())
    assert held[1] <= 1.2 * held[0]


def test_what_the_device_refuses_is_said(cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number that is read in the step: ``auto`` runs it as it is, and other steps can be captured behind it."""
    from deepseed.ops import rng

    own = rng._key_on_device
    monkeypatch.setattr(rng, "_key_on_device", lambda key, start: (int(key[0]), own(key, start))[1])
    target = load("hf:GPT2LMHeadModel")
    step, batch = made(copy.deepcopy(target.model).to(cuda), "auto"), moved(target.batch, cuda)
    losses = [float(step(batch)) for _ in range(STEPS)]
    assert "the device refused" in replayed(step).why
    monkeypatch.undo()
    again = made(copy.deepcopy(target.model).to(cuda), True)
    assert [float(again(batch)) for _ in range(STEPS)] == pytest.approx(losses, rel=1e-5) and replayed(again).captures == 1


def test_what_a_replay_saves(cuda: torch.device) -> None:
    """A model whose kernels are short: a replayed step is not slower than one that Python launches."""
    target, took = load("hf:LlamaForCausalLM(num_hidden_layers=8)"), {}
    batch = moved(target.batch, cuda)
    for codegen in ("python", "triton"):
        for chosen in (False, True):
            step, times = made(copy.deepcopy(target.model).to(cuda), chosen, codegen=codegen), []
            for _ in range(WARM + 12):
                torch.cuda.synchronize()
                began = perf_counter()
                step(batch)
                torch.cuda.synchronize()
                times.append(perf_counter() - began)
            took[codegen, chosen] = median(times[WARM + 2 :])
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}: " + ", ".join(f"{c} {'replayed' if g else 'launched'} {1e3 * s:.2f} ms" for (c, g), s in took.items()))
    assert all(took[c, True] <= took[c, False] for c in ("python", "triton"))
