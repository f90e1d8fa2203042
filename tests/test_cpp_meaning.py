"""C++ for groups means what torch's ops mean: sums of slices, long rows, the ends of a dtype's range, integers, casts to 16 bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_cpp_nests import apart, compiled, kernel_of

from deepseed.codegen import cpp_nests, inductor

pytestmark = pytest.mark.skipif(not inductor.compiler(), reason="no C++ compiler")


def test_rows_that_are_kept_fit_a_stack(tmp_path: Path) -> None:
    """24 values of 60000 elements that took effort: 11.5 MB, of which one is kept and the others are made again."""
    n, many = 60000, 24
    lines = [f'%x : f64[2, {n}] batch "x"']
    for j in range(many):
        lines += [f"%m{j} = aten.mul.Scalar(%x, {j + 1}.5) : f64[2, {n}]", f"%e{j} = aten.sin(%m{j}) : f64[2, {n}]"]
        lines += [f"%a{j} = aten.add.Tensor(%a{j - 1}, %e{j}) : f64[2, {n}]"] if j else [f"%a0 = aten.neg(%e0) : f64[2, {n}]"]
    lines += [f"%s = sum(%a{many - 1}, dims=[1], keepdim=true) : f64[2, 1]", f"%p0 = aten.mul.Tensor(%e0, %s) : f64[2, {n}]"]
    lines += [f"%p{j} = aten.add.Tensor(%p{j - 1}, %e{j}) : f64[2, {n}]" for j in range(1, many)]
    k = kernel_of("\n".join([*lines, f'return %p{many - 1} output "p"', ""]))
    assert cpp_nests.source(k).text.count(f"_row[{n}];") == 1
    x = torch.randn(2, n, dtype=torch.float64)
    assert apart(compiled(k, tmp_path)(x), inductor.python(k)(x)) < 1e-10  # relative, of sums of 60000 numbers


WHOLE_AND_A_SLICE = """%x : f64[8, 5, 2] batch "x"
%h = aten.sin(%x) : f64[8, 5, 2]
%all = sum(%h, dims=[0, 1], keepdim=true) : f64[1, 1, 2]
%one = slice(%h, dim=0, start=6, step=2) : f64[1, 5, 2]
%part = sum(%one, dims=[0, 1], keepdim=false) : f64[2]
return %all output "all"
return %one output "one"
return %part output "part"
"""
A_SLICE = """%x : f64[8, 5, 2] batch "x"
%h = aten.sin(%x) : f64[8, 5, 2]
%one = slice(%h, dim=0, start=6, step=2) : f64[1, 5, 2]
%part = sum(%one, dims=[0, 1], keepdim=false) : f64[2]
%m = amax(%one, dims=[1], keepdim=true) : f64[1, 1, 2]
%d = aten.mul.Tensor(%h, %m) : f64[8, 5, 2]
return %part output "part"
return %d output "d"
"""


@pytest.mark.parametrize("text", [WHOLE_AND_A_SLICE, A_SLICE, A_SLICE.replace("sum(", "sum_of_squares(").replace(", dims=[0, 1], keepdim=false) : f64[2]", ") : f64[]")])
def test_a_sum_takes_each_element_of_its_operand_once(text: str, tmp_path: Path) -> None:
    """Of a slice: not once for each step of the whole."""
    k, x = kernel_of(text), torch.randn(8, 5, 2, dtype=torch.float64)
    assert apart(compiled(k, tmp_path)(x), inductor.python(k)(x)) < 1e-13
