"""C++ for groups means what torch's ops mean: sums of slices, long rows, the ends of a dtype's range, integers, casts to 16 bits."""

from __future__ import annotations

from pathlib import Path

import needs
import pytest
import torch
from test_cpp_nests import apart, compiled, kernel_of

from deepseed.codegen import cpp_nests, inductor

pytestmark = needs.compiler


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


def test_exp_in_float32_has_the_whole_range(tmp_path: Path) -> None:
    """Against float64: 2 units of the last place, of what is below 2**-126 one unit of that; infinite from where 2**128 is."""
    k = kernel_of('''%x : f32[20000] batch "x"
%y = aten.exp(%x) : f32[20000]
%z = aten.log(%y) : f32[20000]
return %y output "y"
return %z output "z"
''')
    x = torch.cat([torch.linspace(-110, 90, 19990), torch.tensor([-103.97, -103.9, -90.0, 88.72, 88.7228, 88.723, 0.0, float("inf"), -float("inf"), float("nan")])])
    y, z = compiled(k, tmp_path)(x)
    exact = x.double().exp()
    held = exact < 2.0**128 * (1 - 2.0**-25)
    assert torch.equal(y.isinf(), x.exp().isinf()) and torch.equal(y.isnan(), x.isnan())
    assert ((y.double() - exact).abs() <= exact * 2.0**-22 + 2.0**-149)[held].all()
    assert ((z - x).abs()[(x > -87) & (x < 88.72)] < 1e-4).all() and z[19992].isfinite()


def test_powers_of_a_number(tmp_path: Path) -> None:
    """2**x of whole x is whole: floor says so."""
    k = kernel_of('''%x : f32[40] batch "x"
%y = aten.pow.Scalar(2.0, %x) : f32[40]
%w = aten.floor(%y) : f32[40]
%n = aten.pow.Scalar(-3.0, %x) : f32[40]
return %w output "w"
return %n output "n"
''')
    x = torch.arange(40.0) - 10
    w, n = compiled(k, tmp_path)(x)
    assert torch.equal(w, (2.0 ** x.double()).floor().float())
    torch.testing.assert_close(n.double(), (-3.0) ** x.double(), rtol=2e-7, atol=0)


@pytest.mark.parametrize("t", ["bf16", "f16"])
def test_casts_and_what_is_compared_round(t: str, tmp_path: Path) -> None:
    compare = "".join(f"%{c} = aten.{c}.Scalar(%h, 0.3) : bool[6]\n%{c}s = aten.{c}.Tensor(%h, %s) : bool[6]\n" for c in ("eq", "le", "gt"))
    k = kernel_of(f'''%x : f32[6] batch "x"
%h : {t}[6] batch "h"
%s : f32[] batch "s"
%b = cast(%x) : {t}[6]
%f = cast(%b) : f32[6]
%y = aten.sub.Tensor(%x, %f) : f32[6]
{compare}return %y output "y"
return %b output "b"
''' + "".join(f'return %{c} output "{c}"\nreturn %{c}s output "{c}s"\n' for c in ("eq", "le", "gt")))
    x = torch.tensor([0.1, 0.2, 0.3, 0.7, 0.9, 1.1])
    xs = [x, x.to(torch.bfloat16 if t == "bf16" else torch.float16), torch.tensor(0.3)]
    got = compiled(k, tmp_path)(*xs)
    assert all(map(torch.equal, got, inductor.python(k)(*xs))) and got[0].abs().max() > 1e-5


def test_integers_are_exact(tmp_path: Path) -> None:
    k = kernel_of('''%x : i64[6] batch "x"
%n : i64[6] batch "n"
%y = aten.pow.Tensor_Tensor(%x, %n) : i64[6]
%q = aten.pow.Tensor_Scalar(%x, 5) : i64[6]
%b = aten.pow.Scalar(3, %n) : i64[6]
%f = aten.floor(%y) : i64[6]
%c = aten.ceil(%y) : i64[6]
%r = aten.round(%y) : i64[6]
%t = aten.trunc(%y) : i64[6]
%a = aten.bitwise_and.Scalar(%y, 1023) : i64[6]
''' + "".join(f'return %{c} output "{c}"\n' for c in "yqbfcrta"))
    xs = [torch.tensor([3, 3, -7, 2, -1, 5]), torch.tensor([38, 39, 22, 62, -3, -1])]
    assert all(map(torch.equal, compiled(k, tmp_path)(*xs), inductor.python(k)(*xs)))


SINGLE = ("leaky_relu(%x)", "leaky_relu(%x, 0.2)", "elu(%x)", "elu(%x, 1.5, 1.1)", "hardtanh(%x)", "hardtanh(%x, -0.5, 2.0)", "hardswish(%x)", "hardsigmoid(%x)", "clamp_min(%x, -0.5)", "clamp_max(%x, 0.5)", "trunc(%x)")
PAIRS = ("fmod.Tensor(%x, %z)", "fmod.Scalar(%x, 1.5)", "remainder.Tensor(%x, %z)", "remainder.Scalar(%x, -1.5)", "atan2(%x, %z)", "fmax(%x, %z)", "fmin(%x, %z)")


def test_expressions_are_torch_s_in_float64(tmp_path: Path) -> None:
    """Among numbers, infinities and what is no number."""
    ends = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 3.0, -3.0, 1e-9])
    x, z = torch.cat([torch.randn(64) * 3, ends]).double(), torch.cat([torch.randn(64) * 3, ends.flip(0)]).double()
    made = [f"%v{n} = aten.{text} : f64[72]" for n, text in enumerate((*SINGLE, *PAIRS))] + [f"%is{n} = aten.{op}(%x) : bool[72]" for n, op in enumerate(("isinf", "isfinite", "isnan"))]
    names = [line.split()[0] for line in made]
    k = kernel_of("\n".join(['%x : f64[72] batch "x"', '%z : f64[72] batch "z"', *made, *(f'return {n} output "{n[1:]}"' for n in names), ""]))
    for line, a, b in zip(made, compiled(k, tmp_path)(x, z), inductor.python(k)(x, z), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-15, equal_nan=True, msg=line)


def test_lerp_arrives_where_it_goes(tmp_path: Path) -> None:
    """From the nearer end: what is large at the other one does not take the small number along."""
    k = kernel_of('''%x : f64[2] batch "x"
%z : f64[2] batch "z"
%v = aten.lerp.Scalar(%x, %z, 1.0) : f64[2]
%w = aten.lerp.Scalar(%x, %z, 0.0) : f64[2]
return %v output "v"
return %w output "w"
''')
    x, z = torch.tensor([1e17, 1.0], dtype=torch.float64), torch.tensor([1.0, 1e17], dtype=torch.float64)
    assert [v.tolist() for v in compiled(k, tmp_path)(x, z)] == [[1.0, 1e17], [1e17, 1.0]]
