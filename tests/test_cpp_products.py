"""C++ for matrix products: what a product in float64 gives, for any sizes and layouts of the right operand, on every kind of vectors; and where it is used."""

from __future__ import annotations

import copy
import platform
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import needs
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cpp_nests import kernel_of
from torch import Tensor

import deepseed
from deepseed.codegen import cpp_files, cpp_products
from deepseed.explain_kernels import explain_kernels
from deepseed.ir.kernels import LEAST_ROWS
from deepseed.ir.program import Program
from deepseed.ir.text import parse
from deepseed.ir.verify import verify
from deepseed.passes import fuse_products
from deepseed.passes.fuse_products import alone
from deepseed.runtime.pipeline import Messages

pytestmark = needs.compiler
IN_SOFTWARE = "a matrix unit in software"
MACHINES = ("native", "skylake-avx512", "haswell", "x86-64-v2", IN_SOFTWARE) if platform.machine() in ("x86_64", "AMD64") else ("native",)  # with a matrix unit, perhaps; vectors of 16, 8 and 4 numbers
LAYOUTS = {
    "as it lies": lambda k, n: torch.randn(k, n),
    "turned": lambda k, n: torch.randn(n, k).t(),
    "part of rows": lambda k, n: torch.randn(k, n + 5)[:, 2 : n + 2],
    "every other column": lambda k, n: torch.randn(k, 2 * n)[:, ::2],
    "one row for all": lambda k, n: torch.randn(1, n).expand(k, n),
}


@pytest.fixture(scope="module", params=MACHINES)
def product(request: pytest.FixtureRequest, kernels_folder: Path) -> cpp_files.Products:
    """The functions, compiled for some machine that this one can be."""
    has = torch.cpu.get_capabilities()
    if request.param == "skylake-avx512" and not all(has.get(f"avx512_{name}", False) for name in ("f", "cd", "bw", "dq", "vl")):
        pytest.skip("no AVX-512 here")
    if request.param == "haswell" and not (has.get("avx2", False) and has.get("fma3", False)):
        pytest.skip("no AVX2 here")
    if request.param == IN_SOFTWARE:
        if not has.get("avx512_bf16", False):
            pytest.skip("no AVX-512 with bfloat16 here")
        asked = "syscall(SYS_arch_prctl, 0x1023, 18) == 0"
        assert cpp_products.SOURCE.count(asked) == 1
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpp_products, "SOURCE", Path(__file__).with_name("matrix_unit.h").read_text() + cpp_products.SOURCE.replace(asked, "true"))
            made = cpp_files.product(kernels_folder)
        assert made.in_tiles
        return made
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpp_files, "FLAGS", tuple(f"-march={request.param}" if flag == "-march=native" else flag for flag in cpp_files.FLAGS))
        return cpp_files.product(kernels_folder)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other processors' flags")
@pytest.mark.parametrize("machine", ["x86-64-v2", "haswell", "skylake-avx512", "sapphirerapids"])
def test_compilers_take_it_for_processors_that_are_not_here(machine: str, tmp_path: Path) -> None:
    source = tmp_path / "products.cpp"
    source.write_text(cpp_products.SOURCE)
    flags = [f"-march={machine}" if flag == "-march=native" else flag for flag in cpp_files.FLAGS]
    empty = tmp_path / "empty.cpp"
    empty.write_text("")
    name = cpp_files.compiler()
    if subprocess.run([name, *flags, "-fsyntax-only", str(empty)], capture_output=True).returncode:
        pytest.skip(f"{name} does not know {machine}")
    done = subprocess.run([name, *flags, "-fsyntax-only", str(source)], capture_output=True, text=True)
    assert not done.returncode, done.stderr


def run(products: cpp_files.Products, a: Tensor, b: Tensor, start: Tensor | None = None) -> Tensor:
    """What lies around the result stays as it is. ``start``: [n], or [m, n], whose place the result takes."""
    around = torch.full((a.shape[0] + 2, b.shape[1]), torch.nan)
    out = around[1:-1]
    if start is not None and start.dim() == 2:
        start = out.copy_(start)
    products.into(out, a, b, start)
    assert around[0].isnan().all() and around[-1].isnan().all()
    return out


def least(a: Tensor, b: Tensor) -> Tensor:
    """What rounding each product and sum once may lose, of each element: depth times half a unit of the sum of magnitudes (Higham, Accuracy and Stability, 3.5). Two more: what a matrix
    unit leaves out, the products of the second part of a number, at most 2^-8 of it, with the third of another, at most 2^-16 (deepseed.codegen.cpp_tiles)."""
    return (a.shape[1] + 2) * 2.0**-24 * (a.double().abs() @ b.double().abs())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(LEAST_ROWS, 620), depth=st.one_of(st.integers(0, 40), st.integers(370, 400), st.integers(760, 800)), columns=st.integers(0, 140), left=st.booleans(), layout=st.sampled_from(sorted(LAYOUTS)), room=st.integers(0, 20), begins=st.integers(0, 2))
@pytest.mark.turn
def test_products_of_any_size_are_those_of_float64(rows: int, depth: int, columns: int, left: bool, layout: str, room: int, begins: int, product: cpp_files.Products) -> None:
    torch.manual_seed(rows * columns + depth)
    a, b = torch.randn(rows, depth + room)[:, room // 2 : room // 2 + depth], LAYOUTS[layout](depth, columns)
    a = a.t().contiguous().t() if left else a
    start = [None, torch.randn(columns), torch.randn(rows, columns)][begins]
    right = a.double() @ b.double() + (0 if start is None else start.double())
    more = 0 if start is None else 2.0**-24 * (right.abs() + 2 * start.double().abs())  # of the last sum, and of what it is added to
    assert bool(((run(product, a, b, start).double() - right).abs() <= least(a, b) + more).all())


@pytest.mark.parametrize("layout", ["as it lies", "turned"])
def test_what_is_no_number_stays_in_its_row_and_column(layout: str, product: cpp_files.Products) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(100, 50), LAYOUTS[layout](50, 45)
    a[7, 3], b[20, 44] = torch.inf, torch.nan
    made = run(product, a, b)
    there = torch.ones_like(made, dtype=torch.bool)
    there[7], there[:, 44] = False, False
    assert made[7].isfinite().sum() == 0 and made[:, 44].isnan().all() and made[there].isfinite().all()


@pytest.mark.parametrize("layout", ["as it lies", "turned"])
def test_what_overflows_is_what_float32_makes_of_it(layout: str, product: cpp_files.Products) -> None:
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


@pytest.mark.parametrize("layout", ["as it lies", "turned"])
@pytest.mark.parametrize("exponents", [(-54, -54), (-60, -60), (-100, 0), (0, -105)])
def test_small_numbers_are_as_exact(exponents: tuple[int, int], layout: str, product: cpp_files.Products) -> None:
    """Parts of them, and of their products, would be zero to a matrix unit: beside numbers of usual size too."""
    torch.manual_seed(0)
    small, usual = torch.randn(100, 300) * 2.0 ** exponents[0], torch.randn(20, 300)
    a, b = torch.cat([small, usual]), LAYOUTS[layout](300, 45) * 2.0 ** exponents[1]
    assert bool(((run(product, a, b).double() - a.double() @ b.double()).abs() <= least(a, b) + 300 * 2.0**-150).all())  # what a float32 below 2^-126 rounds to


def test_sums_whose_products_are_zero_are_zero(product: cpp_files.Products) -> None:
    made = run(product, torch.full((90, 70), 2.0**-64), torch.full((70, 40), 2.0**-64))
    assert bool((made == 0).all()) if product.in_tiles else bool((made == 70 * 2.0**-128).all())


def test_errors_are_no_larger_than_the_librarys(product: cpp_files.Products) -> None:
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
    """The forward one, that of the input's gradient and that of the weight's."""
    assert {op.name: op.kernel for op in verify(alone(step(), products=True)).ops if op.kernel} == {"y": "y", "d": "d", "g": "g"}
    assert not any(op.kernel for op in alone(step()).ops)


@pytest.mark.parametrize("p", [step("f64"), step("bf16")], ids=["float64", "bfloat16"])
def test_others_are_the_librarys(p: Program) -> None:
    assert not any(op.kernel for op in alone(p, products=True).ops)


def test_few_rows_are_the_librarys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the result, whatever is summed over: the gradient of a weight has as many as the weight."""
    monkeypatch.setattr(fuse_products, "LEAST", 1)
    assert {op.name for op in alone(step(rows=84), products=True).ops if op.kernel} == {"g"}


@pytest.mark.parametrize(
    ("rows", "depth", "turned", "in_tiles", "own"),
    [(512, 40, False, False, True), (513, 40, False, False, False), (513, 40, False, True, True), (768, 256, True, False, True), (768, 255, True, False, False), (768, 40, True, True, True)],
)  # fmt: skip
def test_which_products_pay(rows: int, depth: int, turned: bool, in_tiles: bool, own: bool) -> None:
    """By vectors the library's copies of the weights pay for many rows, and copying a turned operand for few tokens does not."""
    a = torch.empty(depth, rows).t() if turned else torch.empty(rows, depth)
    assert cpp_files.Products(None, in_tiles).pay(a) == own and not cpp_files.Products(None, in_tiles).pay(torch.empty(rows, 2 * depth)[:, ::2])


@pytest.mark.parametrize(("depth", "columns", "own"), [(256, 64, True), (256, 63, False), (64, 8192, True), (63, 8192, False)])
def test_narrow_products_are_the_librarys(depth: int, columns: int, own: bool) -> None:
    given = f'%x : f32[4096, {depth}] batch "x"\n%w : f32[{depth}, {columns}] batch "w"\n'
    p = parse(f'program p mesh() facts()\n{given}%y = aten.mm(%x, %w) : f32[4096, {columns}] {{phase="forward"}}\nreturn %y output "y"\n')
    assert any(op.kernel for op in alone(verify(p), products=True).ops) == own


def test_what_is_said_of_a_biased_product() -> None:
    p = verify(parse('program p mesh() facts()\n%x : f32[128, 256] batch "x"\n%w : f32[256, 192] batch "w"\n%b : f32[192] batch "b"\n%y = aten.addmm(%b, %x, %w) : f32[128, 192] {phase="forward"}\nreturn %y output "y"\n'))
    (kernel,) = explain_kernels(alone(p, products=True), p).kernels
    assert (kernel.flops, kernel.bytes_read, kernel.bytes_written) == (2 * 128 * 256 * 192, 4 * (128 * 256 + 256 * 192 + 192), 4 * 128 * 192)


def test_small_products_are_the_librarys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse_products, "LEAST", 128 * 256 * 192 + 1)
    assert not any(op.kernel for op in alone(step(), products=True).ops)


TEXT = '%x : f32[96, 40] batch "x"\n%w : f32[40, 33] batch "w"\n%y = aten.mm(%x, %w) : f32[96, 33]\nreturn %y output "y"\n'
BIASED = TEXT.replace("%y = aten.mm(", '%b : f32[33] batch "b"\n%y = aten.addmm(%b, ')


class Counted:
    """The functions, and how often they are called."""

    def __init__(self, products: cpp_files.Products | None, in_tiles: bool) -> None:
        assert products is not None
        self.whole, self.in_tiles, self.calls = products, in_tiles, 0

    def into(self, *args: Tensor) -> None:
        self.calls += 1
        self.whole.into(*args)

    def pay(self, a: Tensor) -> bool:
        return replace(self.whole, in_tiles=self.in_tiles).pay(a)


def counted(text: str, folder: Path, patch: pytest.MonkeyPatch, in_tiles: bool = False) -> tuple[Any, Counted]:
    patch.setattr(cpp_files, "pays", lambda: True)
    said: list[str] = []
    (code,) = cpp_files.compiled([kernel_of(text)], folder, said.append)
    assert isinstance(code, cpp_files.Product) and not said
    code.products = counts = Counted(code.products, in_tiles)  # type: ignore[assignment]
    return code, counts


@pytest.mark.usefixtures("one_thread")
def test_a_kernel_is_the_product_where_it_pays(kernels_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else, and with several threads, the library's: to the bit."""
    code, counts = counted(TEXT, kernels_folder, monkeypatch)
    x, w = torch.randn(96, 40), torch.randn(40, 33)
    (own,) = code(x, w)
    assert counts.calls == 1 and bool(((own.double() - x.double() @ w.double()).abs() <= least(x, w)).all())
    torch.set_num_threads(2)
    (many,) = code(x, w)
    assert counts.calls == 1 and torch.equal(many, x @ w)
    torch.set_num_threads(1)
    monkeypatch.setattr(cpp_files, "pays", lambda: False)
    (code,) = cpp_files.compiled([kernel_of(TEXT)], kernels_folder, lambda line: None)
    assert code.products is None and torch.equal(code(x, w)[0], x @ w)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("depth", "in_tiles", "own"), [(40, False, False), (40, True, True), (256, False, True)])
def test_a_turned_left_operand_is_copied_where_that_pays(depth: int, in_tiles: bool, own: bool, kernels_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the gradient of a weight; one that lies in neither way is the library's."""
    code, counts = counted(TEXT.replace("40", str(depth)), kernels_folder, monkeypatch, in_tiles)
    x, w = torch.randn(depth, 96).t(), torch.randn(depth, 33)
    assert bool(((code(x, w)[0].double() - x.double() @ w.double()).abs() <= least(x, w)).all()) and counts.calls == own
    x = torch.randn(96, 2 * depth)[:, ::2]
    assert torch.equal(code(x, w)[0], x @ w) and counts.calls == own


@pytest.mark.usefixtures("one_thread")
def test_a_row_is_added_to_each(kernels_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, counts = counted(BIASED, kernels_folder, monkeypatch)
    x, w, b = torch.randn(96, 40), torch.randn(40, 33), torch.randn(33)
    right = b.double() + x.double() @ w.double()
    given = {"x": x, "w": w, "b": b}
    names = [i.name for i in kernel_of(BIASED).fragment.inputs]
    assert bool(((code(*[given[name] for name in names])[0].double() - right).abs() <= least(x, w) + 2.0**-24 * right.abs()).all()) and counts.calls == 1
    given["b"] = torch.randn(66)[::2]
    assert torch.equal(code(*[given[name] for name in names])[0], torch.addmm(given["b"], x, w)) and counts.calls == 1


@pytest.mark.usefixtures("one_thread")
def test_a_product_is_added_to_a_total_in_place(kernels_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, counts = counted(TEXT, kernels_folder, monkeypatch)
    x, w, total = torch.randn(96, 40), torch.randn(40, 33), torch.randn(96, 33)
    right = total.double() + x.double() @ w.double()
    bound = least(x, w) + 2.0**-24 * (right.abs() + total.double().abs())
    made = code.added(total, x, w)
    assert made is total and counts.calls == 1 and bool(((made.double() - right).abs() <= bound).all())
    apart = torch.zeros(33, 96).t()
    assert code.added(apart, x, w) is apart and counts.calls == 1 and torch.equal(apart, torch.zeros(33, 96).t().addmm_(x, w))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("text", [TEXT.replace("96", "84"), TEXT.replace("f32", "f64")], ids=["few rows", "float64"])
def test_what_it_is_not_made_for_is_the_librarys(text: str, kernels_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_files, "pays", lambda: True)
    (code,) = cpp_files.compiled([kernel_of(text)], kernels_folder, lambda line: None)
    assert isinstance(code, cpp_files.Product) and code.products is None


def test_a_source_that_is_refused_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_files, "pays", lambda: True)
    monkeypatch.setattr(cpp_products, "SOURCE", "no C++")
    said: list[str] = []
    (code,) = cpp_files.compiled([kernel_of(TEXT)], tmp_path, said.append)
    x, w = torch.randn(96, 40), torch.randn(40, 33)
    assert torch.equal(code(x, w)[0], x @ w) and len(said) == 1 and said[0].startswith("matrix products are torch's: ")


@pytest.mark.usefixtures("one_thread")
def test_a_step_adds_gradients_of_weights_up_as_they_are_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Three steps of two microbatches, beside float64: within what their float32 rounds."""
    monkeypatch.setenv("DEEPSEED_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("DEEPSEED_REMEMBER", "0")  # the pass is another one here
    monkeypatch.setattr(fuse_products, "LEAST", 1)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(96, 128), torch.nn.GELU(), torch.nn.Linear(128, 96))
    right, batch = copy.deepcopy(model).double(), {"x": torch.randn(256, 96)}

    def loss_of(m: torch.nn.Module, b: dict[str, Tensor]) -> Tensor:
        return m(b["x"]).square().mean()

    step = deepseed.compile(model, "mb2", optimizer=torch.optim.SGD(model.parameters(), lr=0.1), loss_fn=loss_of, codegen="cpp")
    optimizer = torch.optim.SGD(right.parameters(), lr=0.1)
    for _ in range(3):
        loss = loss_of(right, {"x": batch["x"].double()})
        assert abs(float(step(batch)) - loss.item()) < 1e-6
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    own = step.state_dict()
    assert all(torch.allclose(own[name].double(), t, rtol=0.0, atol=1e-6) for name, t in right.state_dict().items())
    source = step.programs.current().executables[0].source
    assert len(re.findall(r"rt\.accumulate_mm\(.*, kernel_mm_\w+\)", source)) == source.count("rt.accumulate_mm(") == 2 and "kernel_addmm_" in source


def test_a_kernel_that_cannot_add_is_added_to_the_total() -> None:
    """As another back end's: a function that gives a tuple."""
    a, b = torch.randn(3, 4), torch.randn(4, 2)
    runtime: Any = SimpleNamespace(accumulate=lambda acc, x, own: Messages.accumulate(runtime, acc, x, own=own))
    first = Messages.accumulate_mm(runtime, None, a, b, lambda a, b: (a @ b,))
    total = Messages.accumulate_mm(runtime, first, a, b, lambda a, b: (a @ b,))
    assert total is first and torch.equal(total, a @ b + a @ b)
