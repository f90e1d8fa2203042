"""Emitted Triton kernels in the interpreter against the python back end, on fragments of real programs, and what they read and write."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_fragments import fragments, random_inputs, reference, resized, retyped
from triton_worker import Interpreter

from deepseed.codegen.triton import source
from deepseed.ir.program import Program
from deepseed.ir.text import parse

installed = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install 'deepseed[triton]'")
NAMES = sorted(fragments())
RESIZED = [name for name in NAMES if not name.startswith(("vit", "update_all"))]
F32, F64 = 1e-5, 1e-12


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    process = Interpreter()
    yield process
    process.close()


def apart(got: Tensor, want: Tensor) -> float:
    """The largest difference, of numbers above 1 relative to them; what is not finite must be the same."""
    assert got.shape == want.shape
    if got.numel() == 0:
        return 0.0
    if not got.dtype.is_floating_point:
        return float(not torch.equal(got, want))
    a, b = got.double(), want.double()
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(same, 0.0, (a - b).abs() / b.abs().clamp(min=1.0)).max().item()


def check(interpreter: Interpreter, p: Program, inputs: list[Tensor], tolerance: float) -> None:
    got, _ = interpreter.run(source(p), inputs)
    want = reference(p, inputs)
    for o, a, b in zip(p.outputs, got, want, strict=True):
        assert a.dtype == b.dtype
        assert (error := apart(a, b)) <= tolerance, f"%{o.ref.name}: {error:.1e}\n{p}\n{source(p)}"


def ulps(got: Tensor, want: Tensor) -> float:
    """In units of the last place of bfloat16 at ``want``; below 2**-10 of the tensor's largest number, in units there."""
    largest = want.abs().max().clamp(min=2.0**-100)
    size = torch.maximum(want.abs(), largest * 2.0**-10)
    unit = torch.exp2(torch.floor(torch.log2(size)) - 7)
    same = (got.double() == want.double()) | (got.isnan() & want.isnan())
    return torch.where(same, 0.0, (got.double() - want.double()).abs() / unit).max().item()


@installed
@pytest.mark.parametrize("name", NAMES)
def test_fragments_of_real_programs(interpreter: Interpreter, name: str) -> None:
    p = parse(fragments()[name])
    check(interpreter, p, random_inputs(p), F32)


@installed
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(RESIZED), rows=st.integers(1, 4), tokens=st.integers(1, 9), head=st.sampled_from([2, 4, 6, 18]), inner=st.integers(1, 70),
    words=st.integers(2, 90), dtype=st.sampled_from(["f32", "f64", "bf16"]), strided=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
def test_any_sizes_dtypes_and_strides(
    interpreter: Interpreter, name: str, rows: int, tokens: int, head: int, inner: int, words: int, dtype: str, strided: bool, seed: int
) -> None:
    p = resized(fragments()[name], rows, tokens, head, inner, words)
    if dtype != "bf16":
        p = retyped(p, dtype)
        check(interpreter, p, random_inputs(p, seed, strided), F32 if dtype == "f32" else F64)
        return
    short = retyped(p, "bf16")
    inputs = random_inputs(short, seed, strided)
    got, _ = interpreter.run(source(short), inputs)
    want = reference(p, [x.float() if x.dtype == torch.bfloat16 else x for x in inputs])
    for o, a, b in zip(short.outputs, got, want, strict=True):
        if a.dtype == torch.bfloat16 and a.numel():
            assert ulps(a.float(), b.float()) <= 2, f"%{o.ref.name}\n{short}\n{source(short)}"
