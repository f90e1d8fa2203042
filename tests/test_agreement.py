"""Kernels beside PyTorch's own numbers, as a device's are before they are trusted: those of the interpreter agree, and what a compiler could do wrong is seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import needs
import pytest
import torch
from test_triton_templates import attention, product
from torch import Tensor
from triton_fragments import as_kernel, fragments, parse, resized, retyped
from triton_worker import Interpreter

from deepseed.codegen import triton_files
from deepseed.codegen.agreement import difference
from deepseed.codegen.autotune import operands
from deepseed.codegen.inductor import python
from deepseed.codegen.kernels import Kernel
from deepseed.codegen.triton import can_emit, source
from deepseed.ir.program import Program

pytestmark = needs.triton
CPU = torch.device("cpu")


def kernels(dtype: str) -> list[Kernel]:
    found = [retyped(parse(text), dtype) for text in fragments().values()]
    found += [p for group, mask, causal in ((2, "none", True), (1, "bool", False), (1, "bias", True)) for p in attention(1, 2, group, 9, 11, 16, 8, mask, causal, dtype)]
    found += [product(9, 20, 17, dtype, epilogue) for epilogue in ("none", "gelu", "residual")]
    return [as_kernel(p, f"k{n}") for n, p in enumerate(found) if can_emit(p)]


class Runs:
    """A kernel's ``launch`` in the interpreter, and what it made."""

    def __init__(self, interpreter: Interpreter, k: Kernel) -> None:
        self.interpreter, self.k, self.made = interpreter, k, list[Tensor]()

    def __call__(self, *xs: Tensor) -> Sequence[Tensor]:
        self.made = list(self.interpreter.run(source(self.k.fragment), list(xs))[0])
        return self.made


def instead(made: Sequence[Tensor], *xs: Tensor) -> Sequence[Tensor]:
    return made


def worst(x: Tensor) -> Tensor:
    """One number changed, the largest; of what is no float, all."""
    x = x.clone(memory_format=torch.contiguous_format)
    if x.is_floating_point():
        x.view(-1)[x.abs().argmax()] *= 1.25
    else:
        x = ~x if x.dtype == torch.bool else x + 1
    return x


@pytest.mark.parametrize(("dtype", "each"), [("bf16", 4), *(pytest.param(d, 1, marks=pytest.mark.wide) for d in ("f32", "bf16", "f16"))])
def test_kernels_agree_and_changed_ones_do_not(interpreter: Interpreter, dtype: str, each: int) -> None:
    """Of Llama, GPT-2, BERT, T5 and ViT, attention and products: no kernel is refused, and each of its results is, with one number that is a quarter larger, not a number, or of another type."""
    torch.manual_seed(0)
    seen = 0
    for k in kernels(dtype)[::each]:
        given, runs = operands(k, CPU), Runs(interpreter, k)
        said = difference(k, runs, given)
        assert not said, f"{said}\n{k.fragment}"
        for n, right in enumerate(runs.made):
            if not right.numel() or not right.double().abs().max() > 0 or not right.double().isfinite().all():
                continue
            others = [worst(right), right.double() if right.dtype != torch.float64 else right.float()] + ([right * float("nan")] if right.is_floating_point() else [])
            for other in others:
                said = difference(k, partial(instead, [*runs.made[:n], other, *runs.made[n + 1 :]]), given)
                assert said.startswith((f"result {n}", "100% of")), f"{n}: {said!r}\n{k.fragment}"
                seen += 1
    assert seen > 200 / each


class Device:
    """What there would be on a device: a clock that says the same for all, and a launch that is given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, launch: Callable[[Kernel], Callable[..., Sequence[Tensor]]], p: Program) -> None:
        self.k, self.launches, self.said = as_kernel(p, "kernel_norm"), 0, list[str]()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
        monkeypatch.setattr(triton_files, "operands", lambda k, device: operands(k, CPU))
        monkeypatch.setattr(triton_files, "on_device", self.clock)
        monkeypatch.setattr(triton_files, "launch_of", lambda name, text, folder: launch(self.k))

    def clock(self, f: Callable[..., object], given: list[Tensor]) -> float:
        self.launches += 1
        f(*given)
        return 1.0

    def compiled(self, folder: Path) -> Callable[..., Sequence[Tensor]]:
        (made,) = triton_files.compiled([self.k], folder, self.said.append)
        return made


def off(k: Kernel) -> Callable[..., Sequence[Tensor]]:
    return lambda *xs: [x * 1.01 for x in python(k)(*xs)]


def refused(k: Kernel) -> Callable[..., Sequence[Tensor]]:
    def launch(*xs: Tensor) -> Sequence[Tensor]:
        raise RuntimeError("PassManager::run failed")

    return launch


def full(k: Kernel) -> Callable[..., Sequence[Tensor]]:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_a_kernel_that_is_wrong_on_a_device_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Python function runs, which is said in each process; found once a folder."""
    p = parse(fragments()["gpt2_3"])
    device = Device(monkeypatch, off, p)
    given = operands(device.k, CPU)
    made = device.compiled(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(made(*given), python(device.k)(*given), strict=True))
    (said,) = device.said
    assert said.startswith("kernel_norm runs as plain Python: result 0, float32[") and "of its largest number from float64" in said
    launches = device.launches
    device.compiled(tmp_path)
    assert device.said == [said, said] and device.launches == launches


def test_a_kernel_that_does_not_compile_for_a_device_runs_as_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch, refused, parse(fragments()["gpt2_3"]))
    made = device.compiled(tmp_path)
    given = operands(device.k, CPU)
    assert all(torch.equal(a, b) for a, b in zip(made(*given), python(device.k)(*given), strict=True))
    assert device.said == ["kernel_norm runs as plain Python: Triton does not compile it for this device: PassManager::run failed"]


def test_an_error_of_the_device_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch, full, parse(fragments()["gpt2_3"]))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        device.compiled(tmp_path)


def test_what_agrees_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And without memory for the comparison too, which is said."""
    device = Device(monkeypatch, lambda k: lambda *xs: [x * 1.0 for x in python(k)(*xs)], parse(fragments()["gpt2_3"]))
    assert device.compiled(tmp_path) is not python(device.k) and not device.said

    def none(*_: object) -> str:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(triton_files, "difference", none)
    device.compiled(tmp_path / "other")
    assert len(device.said) == 1 and "was not held against PyTorch's own numbers: no memory" in device.said[0]


@pytest.mark.parametrize("dtype", [pytest.param("f32", marks=pytest.mark.wide), "bf16", pytest.param("f16", marks=pytest.mark.wide)])
def test_kernels_of_real_sizes_agree(interpreter: Interpreter, dtype: str) -> None:
    """Norms of 4096 features, forward and backward with the sums over rows, and the loss of 32000 words with its gradient: the longest sums."""
    torch.manual_seed(0)
    for name in ("llama_3", "llama_4", "gpt2_3", "gpt2_6", "bert_13"):
        p = retyped(resized(fragments()[name], rows=1, tokens=3, head=1024, inner=14336, words=32000 if name == "llama_3" else 320), dtype)
        k = as_kernel(p, name)
        said = difference(k, Runs(interpreter, k), operands(k, CPU))
        assert not said, f"{said}\n{p}"
