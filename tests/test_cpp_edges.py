"""C++ for groups where a shortcut would change the numbers: shapes that are tied in part, many dimensions, long thin sums, products that cancel, truth values beside numbers, integers that wrap,
far elements of a large tensor's dropout, values that are kept or under way while others are computed, values that are made again and compared."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import needs
import pytest
import torch
import torch.nn.functional as F
from test_cpp_nests import compiled, kernel_of
from torch import Tensor

import deepseed
from deepseed.codegen import cpp_files, inductor
from deepseed.codegen.cpp_ops import LIBRARY
from deepseed.codegen.index_maps import Index, Quotient, Var, covers, flat, of, reshaped

pytestmark = needs.compiler


def same(text: str, folder: Path, *xs: Tensor) -> None:
    k = kernel_of(text)
    found = compiled(k, folder)
    assert type(found).__name__ == "Fixed", "it runs as Python"
    for got, want in zip(found(*xs), inductor.python(k)(*xs), strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_an_index_covers_a_tensor_or_does_not() -> None:
    a, b, c = Var("a", 2), Var("b", 3), Var("c", 4)
    assert covers([of(a), of(b) * 4 + of(c)], [2, 12]) and covers([of(b), of(a)], [3, 2]) and covers([], [])
    assert covers(reshaped([of(b), of(c)], [3, 4], [2, 6]), [2, 6]), "the quotients are one place"
    assert not covers([of(a), of(a)], [2, 2]) and not covers([of(a) * 2 + of(b)], [6]) and not covers([of(b)], [4]) and not covers([of(b) + 1], [3])
    assert not covers([Index(0, ((Quotient("//", flat([of(b), of(c)], [3, 4]), 6), 1),)), of(b) * 2], [2, 6])


def test_what_is_tied_in_part_is_written_whole(tmp_path: Path) -> None:
    """``y`` has its first dimensions from the space's, and its last ones from nothing: not from row-major order."""
    same('''%x : f64[2, 4, 6] batch "x"
%h = aten.neg(%x) : f64[2, 4, 6]
%t = permute(%h, dims=[0, 2, 1]) : f64[2, 6, 4]
%a = slice(%t, dim=2, start=3, step=1) : f64[2, 6, 1]
%b = slice(%t, dim=2, start=0, step=1) : f64[2, 6, 3]
%y = cat([%a, %b], dim=2) : f64[2, 6, 4]
%z = aten.abs(%y) : f64[2, 6, 4]
return %h output "h"
return %y output "y"
return %z output "z"
''', tmp_path, torch.arange(48.0).double().reshape(2, 4, 6) + 1)


@pytest.mark.parametrize("rank", [11, 12, 13, 23])
def test_each_dimension_has_a_name(rank: int, tmp_path: Path) -> None:
    shape = [2, *[1] * (rank - 2), 3]
    same(f'''%x : f32{shape} batch "x"
%y = aten.neg(%x) : f32{shape}
%z = aten.add.Scalar(%y, 1.0) : f32{shape}
return %z output "z"
''', tmp_path, torch.arange(6.0).reshape(shape))


@pytest.mark.parametrize(("shape", "dims"), [((1000000, 2), (0, 1)), ((800000, 2), (0,)), ((1200000,), (0,)), ((400, 1000, 3), (0, 1)), ((3, 500000), (1,))])
def test_long_sums_keep_their_digits(shape: tuple[int, ...], dims: tuple[int, ...], tmp_path: Path) -> None:
    """A float takes few in one after another: of equal numbers, whose roundings go one way, within 1e-5 of the sum, where two million in one float are 1e-2 away."""
    left = [n for d, n in enumerate(shape) if d not in dims]
    k = kernel_of(f'''%x : f32{list(shape)} batch "x"
%y = aten.mul.Scalar(%x, 1.0) : f32{list(shape)}
%s = sum(%y, dims={list(dims)}, keepdim=false) : f32{left}
return %s output "s"
''')
    x = torch.full(shape, 0.1)
    (got,) = compiled(k, tmp_path)(x)
    torch.testing.assert_close(got.double(), x.double().sum(dims), rtol=1e-5, atol=0)


def test_products_that_cancel_are_zero(tmp_path: Path) -> None:
    """Each product is rounded before they are subtracted."""
    same('''%a : f32[64] batch "a"
%b : f32[64] batch "b"
%p = aten.mul.Tensor(%a, %a) : f32[64]
%q = aten.mul.Tensor(%b, %b) : f32[64]
%d = aten.sub.Tensor(%p, %q) : f32[64]
%r = aten.sqrt(%d) : f32[64]
return %d output "d"
return %r output "r"
''', tmp_path, torch.arange(1.0, 65.0) / 7, torch.arange(1.0, 65.0) / 7)


def test_truth_values_are_numbers_beside_numbers(tmp_path: Path) -> None:
    compare = [(f"{c}{n}", f"aten.{c}.Scalar(%x, {n})") for c in ("eq", "ne", "lt", "ge") for n in (2, -1, 1, 0)] + [(f"{c}t", f"aten.{c}.Tensor(%x, %n)") for c in ("eq", "lt", "gt")]
    lines = [f"%{name.replace('-', 'm')} = {text} : bool[4]" for name, text in compare]
    same("\n".join(['%x : bool[4] batch "x"', '%n : i64[] batch "n"', *lines, *(f'return {line.split()[0]} output "{line.split()[0][1:]}"' for line in lines), ""]), tmp_path, torch.tensor([True, False, True, True]), torch.tensor(2))


def test_integers_wrap(tmp_path: Path) -> None:
    same('''%x : i64[4] batch "x"
%y = aten.add.Scalar(%x, 1) : i64[4]
%a = aten.gt.Tensor(%y, %x) : bool[4]
%m = aten.mul.Tensor(%x, %x) : i64[4]
%c = aten.lt.Scalar(%m, 0) : bool[4]
%n = aten.abs(%x) : i64[4]
%d = aten.lt.Scalar(%n, 0) : bool[4]
return %a output "a"
return %c output "c"
return %d output "d"
''', tmp_path, torch.tensor([2**63 - 1, 5, 3037000500, -(2**63)]))


def sums_that_wrap(folder: Path) -> None:
    """Along a row in one stretch and in several, along several dimensions, across rows, of squares, of one element beside others, of powers; 5 rows of any number."""
    for n, dtype in enumerate(("i64", "i32")):
        kind = {"i64": torch.int64, "i32": torch.int32}[dtype]
        numbers = torch.Generator().manual_seed(0)
        x = torch.randint(torch.iinfo(kind).min, torch.iinfo(kind).max, (6, 5000), generator=numbers, dtype=kind)
        small, number = x[:, :12].contiguous(), torch.arange(6).reshape(6, 1) * 2
        same(f'''%x : {dtype}[6, 5000] batch "x"
%a = sum(%x, dims=[1], keepdim=true) : {dtype}[6, 1]
%b = sum(%x, dims=[0], keepdim=false) : {dtype}[5000]
%c = sum(%x, dims=[0, 1], keepdim=false) : {dtype}[]
return %a output "a"
return %b output "b"
return %c output "c"
''', folder / f"{n}", x)
        same(f'''%x : {dtype}[6, 12] batch "x"
%n : i64[6, 1] batch "n"
%a = sum(%x, dims=[1], keepdim=true) : {dtype}[6, 1]
%b = aten.lt.Tensor(%a, %x) : bool[6, 12]
%c = aten.pow.Tensor_Scalar(%x, 3) : {dtype}[6, 12]
%d = aten.addcmul(%x, %c, %x, value=3) : {dtype}[6, 12]
%e = scatter_add(%d, %n, %a, dim=1) : {dtype}[6, 12]
return %a output "a"
return %b output "b"
return %d output "d"
return %e output "e"
''', folder / f"{n}", small, number)
        k = kernel_of(f'%x : {dtype}[503, 12] batch "x"\n%a = sum(%x, dims=[1], keepdim=true) : {dtype}[503, 1]\n%b = aten.lt.Tensor(%a, %x) : bool[503, 12]\nreturn %a output "a"\nreturn %b output "b"\n')
        made, why = cpp_files.functions({k: [(1, 1), (12, 1)]}, {503: "T"})
        assert not why, why
        code = cpp_files.callables({k: [(1, 1), (12, 1)]}, made, cpp_files.library(LIBRARY + made[k.name].text, folder, cpp_files.EXACT), {503: "T"})[k.name]
        a, b = code(small)
        want = small.sum(1, keepdim=True, dtype=kind)
        assert torch.equal(a, want) and torch.equal(b, want < small)


def test_sums_of_integers_wrap_where_nothing_may_overflow(tmp_path: Path) -> None:
    """The compiler has each overflow of a number with a sign end the process."""
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {inductor.compiler()} -fsanitize=signed-integer-overflow -fsanitize-undefined-trap-on-error "$@"\n')
    compiler.chmod(0o755)
    code = f"from pathlib import Path; from test_cpp_edges import sums_that_wrap; sums_that_wrap(Path({str(tmp_path)!r}))"
    env = {**os.environ, "CXX": str(compiler), "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).resolve().parents[:2]))}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])


def test_a_maximum_has_no_number_wherever_one_of_its_row_has_none(tmp_path: Path) -> None:
    """Across rows, and of rows of any number."""
    x = torch.randn(40, 24)
    x[3, 5] = x[0, 7] = x[39, 7] = float("nan")
    same('%x : f32[40, 24] batch "x"\n%m = amax(%x, dims=[0], keepdim=false) : f32[24]\n%n = amax(%x, dims=[0, 1], keepdim=false) : f32[]\nreturn %m output "m"\nreturn %n output "n"\n', tmp_path, x)
    k = kernel_of('%x : f32[503, 24] batch "x"\n%m = amax(%x, dims=[1], keepdim=false) : f32[503]\nreturn %m output "m"\n')
    made, _ = cpp_files.functions({k: [(1,)]}, {503: "T"})
    (m,) = cpp_files.callables({k: [(1,)]}, made, cpp_files.library(LIBRARY + made[k.name].text, tmp_path, cpp_files.EXACT), {503: "T"})[k.name](x)
    torch.testing.assert_close(m, x.amax(1), rtol=0, atol=0, equal_nan=True)


def test_masks_of_elements_beyond_an_int(tmp_path: Path) -> None:
    """A rank's part of a tensor of more than 2**31 elements draws what the whole one draws there."""
    same('''%r : i64[2] batch "r"
%x : f32[4, 8] batch "x"
%b = bernoulli(%r, p=0.5, site="s", index=[[[4]], [[1000000000, 16, 8]]]) : f32[4, 8]
%y = aten.mul.Tensor(%b, %x) : f32[4, 8]
return %y output "y"
''', tmp_path, torch.tensor([3, 5]), torch.ones(4, 8))


def test_lerp_by_a_tensor_arrives_where_it_goes(tmp_path: Path) -> None:
    same('''%x : f32[4] batch "x"
%z : f32[4] batch "z"
%w : f32[4] batch "w"
%v = aten.lerp.Tensor(%x, %z, %w) : f32[4]
return %v output "v"
''', tmp_path, torch.tensor([1e8, 1.0, 1e8, 1.0]), torch.tensor([1.0, 1e8, 1.0, 1e8]), torch.tensor([1.0, 1.0, 0.0, 0.0]))


# models -------------------------------------------------------------------------------------------------------------


class Kept(torch.nn.Module):
    """Returns ``h``, which the next op is the last to read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (torch.nn.Linear(16, n, bias=False, dtype=torch.float64) for n in (16, 16, 4, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = self.a(x)
        u = torch.tanh(self.b(x))
        return h, u, self.c(h * 2.0 + 1.0)


class Skips(Kept):
    """Sends ``h`` over the cut, which the next op is the last to read."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = self.a(x)
        return (self.d(self.b(h * 2.0 + 1.0)) + self.c(h),)


@pytest.mark.parametrize(("kind", "plan"), [(Kept, "mb2"), (Skips, "pp2(cut=[d])+mb2")])
def test_what_is_kept_or_under_way_is_not_written_over(kind: type[Kept], plan: str) -> None:
    torch.manual_seed(0)
    model, x = kind(), torch.randn(8, 16, dtype=torch.float64)
    want = model(x)
    got = deepseed.compile(model, plan, codegen="cpp", example_batch=(x,), world_size=2 if "pp" in plan else 1)(x)
    for a, b in zip(got if isinstance(got, tuple) else (got,), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


class Best(torch.nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor], pick: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.l, self.act, self.pick = torch.nn.Linear(16, 128, bias=False, dtype=dtype), act, pick

    def forward(self, x: Tensor) -> Tensor:
        return self.pick(self.act(self.l(x.to(self.l.weight.dtype)))).float().square().sum()


PICKS: dict[str, Callable[[Tensor], Tensor]] = {
    "amax": lambda y: y.amax(-1),
    "topk": lambda y: torch.where(y >= y.detach().topk(4).values[..., -1:], y, 0.0),
    "winner": lambda y: torch.where(y == y.detach().max(-1, keepdim=True).values, y, 0.0),
    "scaled": lambda y: y / y.abs().amax(-1, keepdim=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", [F.gelu, F.silu])
@pytest.mark.parametrize("pick", PICKS)
def test_what_is_compared_is_what_the_forward_made(pick: str, act: Any, dtype: torch.dtype) -> None:
    """A value made again with other last bits is not its own largest one: no element would be chosen."""
    x, made = torch.randn(64, 16, generator=torch.Generator().manual_seed(3)), dict[str, Tensor]()
    for codegen in ("python", "cpp"):
        torch.manual_seed(0)
        step = deepseed.compile(Best(act, PICKS[pick], dtype), "zero0", loss_fn=lambda m, b: m(b), codegen=codegen)
        _, grads = step.loss_and_grads(x)
        made[codegen] = grads["l.weight"].float()
    apart = (made["cpp"] - made["python"]).norm() / made["python"].norm()
    assert apart < (1e-5 if dtype == torch.float32 else 2e-2), f"{float(apart)} apart"  # roundings of some sixty rows; in 16 bits of each product too
