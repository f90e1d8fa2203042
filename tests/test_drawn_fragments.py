"""Fragments drawn at random through each back end that writes kernels, against the interpreter: in float64 where a compiler is at hand, in Triton's interpreter too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import needs
import pytest
import torch
from drawn_fragments import drawn, inputs_of
from triton_fragments import as_kernel
from triton_worker import Interpreter

from deepseed.codegen import cpp_files, cpp_nests, triton
from deepseed.codegen.expressions import CodegenError
from deepseed.ir.program import Program
from deepseed.ops import evaluate

WITHIN = 1e-12  # of float64: sums in another order, products of ten numbers


def with_inputs(seeds: range) -> Iterator[tuple[int, Program]]:
    for seed in seeds:
        p = drawn(seed)
        if p.inputs:
            yield seed, p


def check(seed: int, p: Program, inputs: list[torch.Tensor], got: list[torch.Tensor], source: str) -> None:
    values = evaluate(p, dict(zip([i.name for i in p.inputs], inputs, strict=True)))
    for o, a in zip(p.outputs, got, strict=True):
        b = values[o.key]
        assert a.shape == b.shape and a.dtype == b.dtype, f"seed {seed}, %{o.ref.name}: {a.dtype}{list(a.shape)}\n{p}"
        error = ((a - b).abs() / b.abs().clamp(min=1.0)).max().item() if a.numel() else 0.0
        assert error <= WITHIN, f"seed {seed}, %{o.ref.name}: {error:.1e}\n{p}\n{source}"


def through_cpp(seeds: range, folder: Path) -> tuple[int, int]:
    """How many ran as C++, and how many were refused."""
    programs, said = dict(with_inputs(seeds)), list[str]()
    wanted = {seed: as_kernel(p, f"drawn_{seed}") for seed, p in programs.items()}
    made = 0
    for (seed, k), code in zip(wanted.items(), cpp_files.compiled(list(wanted.values()), folder, said.append), strict=True):
        inputs = inputs_of(k.fragment, seed)
        if isinstance(code, cpp_files.Fixed):
            made += 1
            text, got = cpp_nests.source(k).text, list(code(*inputs))
            check(seed, k.fragment, inputs, got, text)
            for i, m in code.reused:  # in an operand's memory
                check(seed, k.fragment, inputs, list(code.reusing({m: i})(*(x.clone() for x in inputs))), text)
    return made, len(wanted) - made


def through_triton(seeds: range, interpreter: Interpreter) -> tuple[int, int]:
    made, refused = 0, 0
    for seed, p in with_inputs(seeds):
        p, inputs = replace(p, name="kernel"), inputs_of(p, seed)
        try:
            source = triton.source(p)
        except CodegenError:
            refused += 1
            continue
        got, traffic = interpreter.run(source, inputs)
        made += 1
        check(seed, p, inputs, list(got), source)
        assert traffic.launches == triton.launches(p), f"seed {seed}\n{p}"
    return made, refused


@needs.compiler
@pytest.mark.parametrize("seeds", [range(40), *(pytest.param(range(n, n + 250), marks=pytest.mark.wide) for n in range(100, 2100, 250))], ids=str)
def test_cpp_computes_what_was_drawn(seeds: range, tmp_path: Path) -> None:
    made, refused = through_cpp(seeds, tmp_path)
    assert made > 0.9 * len(seeds) and refused < 0.1 * len(seeds), (made, refused)


@needs.triton
@pytest.mark.parametrize("seeds", [range(40), *(pytest.param(range(n, n + 250), marks=pytest.mark.wide) for n in range(100, 2100, 250))], ids=str)
def test_triton_computes_what_was_drawn(seeds: range, interpreter: Interpreter) -> None:
    made, refused = through_triton(seeds, interpreter)
    assert made > 0.9 * len(seeds) and refused < 0.1 * len(seeds), (made, refused)


@needs.triton
def test_two_registers_have_two_names(interpreter: Interpreter) -> None:
    """Its lookups make a second register of ``v6_sum`` and have a value ``v6_sum_1``."""
    assert through_triton(range(1093, 1094), interpreter) == (1, 0)
