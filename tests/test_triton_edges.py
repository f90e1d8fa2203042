"""Triton's kernels where a float32 is no number of 16 bits: casts that the model writes, what is compared, the end of a uniform's range; integers that are whole already; truth values beside numbers."""

from __future__ import annotations

import needs
import pytest
import torch
from test_triton import check
from torch import Tensor
from triton_worker import Interpreter

from deepseed.codegen import triton_values
from deepseed.ir.text import parse
from deepseed.ops import rng

pytestmark = needs.triton
X = torch.tensor([0.1, 0.2, 0.3, 0.7, 0.9, 1.1, 1.00390625, 1.01171875, -0.3, 0.0, float("inf"), float("nan")])  # two of them are halfway between numbers of bf16


def same(interpreter: Interpreter, text: str, *xs: Tensor) -> None:
    lines = [f"{line} {{}}" if " = " in line and "{" not in line else line for line in text.strip().splitlines()]
    check(interpreter, parse("\n".join(["program kernel mesh() facts()", *lines, ""])), list(xs), 0.0)


@pytest.mark.parametrize("t", ["bf16", "f16"])
def test_casts_that_the_model_writes_round(t: str, interpreter: Interpreter) -> None:
    same(interpreter, f'''%x : f32[12] batch "x"
%b = cast(%x) : {t}[12]
%f = cast(%b) : f32[12]
%y = aten.sub.Tensor(%x, %f) : f32[12]
return %y output "y"
return %b output "b"
''', X)


@pytest.mark.parametrize("t", [torch.bfloat16, torch.float16])
def test_what_is_compared_rounds(t: torch.dtype, interpreter: Interpreter) -> None:
    dtype = {torch.bfloat16: "bf16", torch.float16: "f16"}[t]
    made = [f"%{c}{n} = aten.{c}.{how} : bool[12]" for c in ("eq", "gt", "le") for n, how in enumerate(("Scalar(%h, 0.3)", "Tensor(%h, %s)"))]
    returns = [f'return {line.split()[0]} output "{line.split()[0][1:]}"' for line in made]
    same(interpreter, "\n".join([f'%h : {dtype}[12] batch "h"', '%s : f32[] batch "s"', *made, *returns]), X.to(t), torch.tensor(0.3))


def test_integers_are_whole(interpreter: Interpreter) -> None:
    same(interpreter, '''%x : i64[6] batch "x"
%y = aten.add.Tensor(%x, %x) : i64[6]
%f = aten.floor(%y) : i64[6]
%c = aten.ceil(%y) : i64[6]
return %f output "f"
return %c output "c"
''', torch.arange(6) - 3)


def test_truth_values_are_numbers_beside_numbers(interpreter: Interpreter) -> None:
    made = [f"%{c}{n} = aten.{c}.Scalar(%x, {n}) : bool[4]" for c in ("eq", "ne", "lt") for n in (2, 1, 0)] + ["%t = aten.lt.Tensor(%x, %n) : bool[4]"]
    same(interpreter, "\n".join(['%x : bool[4] batch "x"', '%n : i64[] batch "n"', *made, *(f'return {line.split()[0]} output "{line.split()[0][1:]}"' for line in made)]), torch.tensor([True, False, True, True]), torch.tensor(2))


def test_lerp_by_a_tensor_arrives_where_it_goes(interpreter: Interpreter) -> None:
    same(interpreter, '''%x : f32[4] batch "x"
%z : f32[4] batch "z"
%w : f32[4] batch "w"
%v = aten.lerp.Tensor(%x, %z, %w) : f32[4]
return %v output "v"
''', torch.tensor([1e8, 1.0, 1e8, 1.0]), torch.tensor([1.0, 1e8, 1.0, 1e8]), torch.tensor([1.0, 1.0, 0.0, 0.0]))


def test_a_uniform_number_is_below_its_end(interpreter: Interpreter) -> None:
    """Of a million of [1000, 1001), some thirty round up to 1001 where nothing keeps them below."""
    same(interpreter, '''%r : i64[2] batch "r"
%x : f32[1048576] batch "x"
%u = uniform(%r, low=1000.0, high=1001.0, site="s") : f32[1048576]
%y = aten.mul.Tensor(%u, %x) : f32[1048576]
return %y output "y"
''', torch.tensor([3, 5]), torch.ones(1 << 20))


def test_the_number_below_is_the_reference_s() -> None:
    assert all(triton_values._below(high) == rng._below(high, torch.float32) for high in (1.0, 1001.0, 0.0, -2.0, 0.1, -0.1, 2.0**-130, 2.0**24))
