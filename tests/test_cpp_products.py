"""C++ for matrix products: what a product in float64 gives, for any sizes and layouts of the right operand, on every kind of vectors; and where it is used."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cpp_nests import kernel_of
from torch import Tensor

from deepseed.codegen import cpp_files, cpp_products, inductor
from deepseed.ir.kernels import PRODUCT_ROWS
from deepseed.ir.program import Program
from deepseed.ir.text import parse
from deepseed.ir.verify import verify
from deepseed.passes import fuse_products
from deepseed.passes.fuse_products import alone

pytestmark = pytest.mark.skipif(not inductor.compiler(), reason="no C++ compiler")
MACHINES = ("native", "skylake-avx512", "haswell", "x86-64-v2") if platform.machine() in ("x86_64", "AMD64") else ("native",)  # with a matrix unit, perhaps; vectors of 16, 8 and 4 numbers
LAYOUTS = {
    "as it lies": lambda k, n: torch.randn(k, n),
    "turned": lambda k, n: torch.randn(n, k).t(),
    "part of rows": lambda k, n: torch.randn(k, n + 5)[:, 2 : n + 2],
    "every other column": lambda k, n: torch.randn(k, 2 * n)[:, ::2],
    "one row for all": lambda k, n: torch.randn(1, n).expand(k, n),
}


@pytest.fixture(scope="module", params=MACHINES)
def product(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes._NamedFuncPointer:
    """The function, compiled for some machine that this one can be."""
    has = torch.cpu.get_capabilities()
    if request.param == "skylake-avx512" and not all(has.get(f"avx512_{name}", False) for name in ("f", "cd", "bw", "dq", "vl")):
        pytest.skip("no AVX-512 here")
    if request.param == "haswell" and not (has.get("avx2", False) and has.get("fma3", False)):
        pytest.skip("no AVX2 here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpp_files, "FLAGS", tuple(f"-march={request.param}" if flag == "-march=native" else flag for flag in cpp_files.FLAGS))
        return cpp_files.product(tmp_path_factory.mktemp("products"))


def run(f: ctypes._NamedFuncPointer, a: Tensor, b: Tensor) -> Tensor:
    """What lies around the result stays as it is."""
    m, n = a.shape[0], b.shape[1]
    around = torch.full((m + 2, n), torch.nan)
    f(a.data_ptr(), a.stride(0), b.data_ptr(), *b.stride(), around[1:].data_ptr(), m, a.shape[1], n)
    assert around[0].isnan().all() and around[-1].isnan().all()
    return around[1:-1]


def least(a: Tensor, b: Tensor) -> Tensor:
    """What rounding each product and sum once may lose, of each element: depth times half a unit of the sum of magnitudes (Higham, Accuracy and Stability, 3.5). Two more: what a matrix
    unit leaves out, the products of the second part of a number, at most 2^-8 of it, with the third of another, at most 2^-16 (deepseed.codegen.cpp_tiles)."""
    return (a.shape[1] + 2) * 2.0**-24 * (a.double().abs() @ b.double().abs())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(PRODUCT_ROWS.start, 620), depth=st.one_of(st.integers(0, 40), st.integers(370, 400), st.integers(760, 800)), columns=st.integers(0, 140), layout=st.sampled_from(sorted(LAYOUTS)), room=st.integers(0, 20))
def test_products_of_any_size_are_those_of_float64(rows: int, depth: int, columns: int, layout: str, room: int, product: ctypes._NamedFuncPointer) -> None:
    torch.manual_seed(rows * columns + depth)
    a, b = torch.randn(rows, depth + room)[:, room // 2 : room // 2 + depth], LAYOUTS[layout](depth, columns)
    assert bool(((run(product, a, b).double() - a.double() @ b.double()).abs() <= least(a, b)).all())


@pytest.mark.parametrize("layout", ["as it lies", "turned"])
def test_what_is_no_number_stays_in_its_row_and_column(layout: str, product: ctypes._NamedFuncPointer) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(100, 50), LAYOUTS[layout](50, 45)
    a[7, 3], b[20, 44] = torch.inf, torch.nan
    made = run(product, a, b)
    there = torch.ones_like(made, dtype=torch.bool)
    there[7], there[:, 44] = False, False
    assert made[7].isfinite().sum() == 0 and made[:, 44].isnan().all() and made[there].isfinite().all()


@pytest.mark.parametrize("layout", ["as it lies", "turned"])
def test_what_overflows_is_what_float32_makes_of_it(layout: str, product: ctypes._NamedFuncPointer) -> None:
    """Infinity times a number that a sum of parts has zeros in, the largest number, which no bfloat16 holds, and a sum that is too large."""
    torch.manual_seed(0)
    a, b = torch.randn(100, 300), LAYOUTS[layout](300, 45)
    a[7, 3], b[3] = torch.inf, 1.0
    a[20], b[0] = 0.0, 0.5
    a[20, 0], b[0, 5] = torch.finfo(torch.float32).max, 1.0
    a[30], b[:, 6] = 1e30, 1e30
    made = run(product, a, b)
    assert torch.equal(made[7], torch.full((45,), torch.inf)) and made[20, 5] == torch.finfo(torch.float32).max and made[30, 6] == torch.inf
    there = torch.ones_like(made, dtype=torch.bool)
    there[7], there[[20, 30], 6] = False, False
    assert bool(((made.double() - a.double() @ b.double()).abs() <= least(a, b))[there].all())


def test_errors_are_no_larger_than_the_librarys(product: ctypes._NamedFuncPointer) -> None:
    """Of a depth that training has: the root of the mean square, and the largest."""
    torch.manual_seed(0)
    a, b = torch.randn(256, 768), torch.randn(768, 512)
    right = a.double() @ b.double()
    own, theirs = ((made.double() - right).abs() for made in (run(product, a, b), a @ b))
    assert own.square().mean().sqrt() <= 1.25 * theirs.square().mean().sqrt() and own.max() <= 2 * theirs.max()


# where it is used ---------------------------------------------------------------------------------------------------


def step(dtype: str = "f32", rows: int = 128) -> Program:
    lines = f"""%x : {dtype}[{rows}, 256] batch "x"
%w : {dtype}[192, 256] batch "w"
%t = permute(%w, dims=[1, 0]) : {dtype}[256, 192]
%y = aten.mm(%x, %t) : {dtype}[{rows}, 192]
%d = aten.mm(%y, %w) : {dtype}[{rows}, 256]
%u = permute(%y, dims=[1, 0]) : {dtype}[192, {rows}]
%g = aten.mm(%u, %x) : {dtype}[192, 256]
return %d output "d"
return %g output "g"
"""
    return verify(parse("program p mesh() facts()\n" + "".join(f'{line} {{phase="forward"}}\n' if " = " in line else f"{line}\n" for line in lines.splitlines())))


def test_large_products_of_rows_are_groups() -> None:
    """Not that of a turned operand, which a library copies as well: the gradient of a weight."""
    assert {op.name: op.kernel for op in verify(alone(step(), products=True)).ops if op.kernel} == {"y": "y", "d": "d"}
    assert not any(op.kernel for op in alone(step()).ops)


@pytest.mark.parametrize("p", [step("f64"), step("bf16"), step(rows=84), step(rows=513)], ids=["float64", "bfloat16", "few rows", "many rows"])
def test_others_are_the_librarys(p: Program) -> None:
    assert not any(op.kernel for op in alone(p, products=True).ops)


def test_small_products_are_the_librarys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse_products, "LEAST", 128 * 256 * 192 + 1)
    assert not any(op.kernel for op in alone(step(), products=True).ops)


TEXT = '%x : f32[96, 40] batch "x"\n%w : f32[40, 33] batch "w"\n%y = aten.mm(%x, %w) : f32[96, 33]\nreturn %y output "y"\n'


def test_a_kernel_is_the_product_where_it_pays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else, and with several threads, the library's: to the bit."""
    monkeypatch.setattr(cpp_files, "pays", lambda: True)
    said: list[str] = []
    (code,) = cpp_files.compiled([kernel_of(TEXT)], tmp_path, said.append)
    assert isinstance(code, cpp_files.Product) and not said
    x, w = torch.randn(96, 40), torch.randn(40, 33)
    calls: list[int] = []
    whole = code.function

    class Counted:
        def __call__(self, *args: object) -> None:
            calls.append(1)
            whole(*args)

    code.function = Counted()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        (own,) = code(x, w)
        assert len(calls) == 1 and bool(((own.double() - x.double() @ w.double()).abs() <= least(x, w)).all())
        (turned,) = code(x.t().contiguous().t(), w)
        torch.set_num_threads(2)
        (many,) = code(x, w)
        assert len(calls) == 1 and torch.equal(many, x @ w) and torch.allclose(turned, own, atol=1e-4)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(cpp_files, "pays", lambda: False)
    (code,) = cpp_files.compiled([kernel_of(TEXT)], tmp_path, said.append)
    assert not isinstance(code, cpp_files.Product) and torch.equal(code(x, w)[0], x @ w) and not said


@pytest.mark.parametrize("text", [TEXT.replace("96", "84"), TEXT.replace("f32", "f64")], ids=["few rows", "float64"])
def test_what_it_is_not_made_for_is_the_librarys(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_files, "pays", lambda: True)
    (code,) = cpp_files.compiled([kernel_of(text)], tmp_path, lambda line: None)
    assert not isinstance(code, cpp_files.Product)


def test_a_source_that_is_refused_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_files, "pays", lambda: True)
    monkeypatch.setattr(cpp_products, "SOURCE", "no C++")
    said: list[str] = []
    (code,) = cpp_files.compiled([kernel_of(TEXT)], tmp_path, said.append)
    x, w = torch.randn(96, 40), torch.randn(40, 33)
    assert torch.equal(code(x, w)[0], x @ w) and len(said) == 1 and said[0].startswith("matrix products are torch's: ")
