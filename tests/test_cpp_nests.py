"""C++ for groups of fixed shapes: the groups of real programs forward and backward, sizes that fill no vector, any strides, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import needs
import pytest
import torch
from torch import Tensor
from triton_fragments import as_kernel, fragments, random_inputs, resized, retyped

from deepseed.codegen import cpp_files, cpp_nests, inductor
from deepseed.codegen.expressions import CodegenError
from deepseed.codegen.kernels import Kernel, function, kernels
from deepseed.ir.program import Program
from deepseed.ir.text import parse
from deepseed.passes.fuse import fuse
from deepseed.rules.strides import laid_out

pytestmark = needs.compiler
LEAST = {"f64": 1e-12, "f32": 1e-5}  # of numbers above 1, relative


@cache
def real(dtype: str) -> dict[str, Kernel]:
    """The groups of Llama, GPT-2, BERT, T5 and ViT."""
    found = {}
    for text in fragments().values():
        p = fuse(retyped(resized(text), dtype))
        found.update({k.name: k for k in kernels(p, *laid_out(p)).values()})
    return found


def lying(k: Kernel, xs: Sequence[Tensor]) -> list[Tensor]:
    """Operands as the program says they lie."""
    return [x.as_strided(x.shape, s) if 0 in s and x.dim() else torch.empty_strided(x.shape, s, dtype=x.dtype).copy_(x) for x, s in zip(xs, k.strides, strict=True)]


def apart(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    most = 0.0
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        x, y = a.double(), b.double()
        most = max(most, torch.where((x == y) | (x.isnan() & y.isnan()), 0.0, (x - y).abs() / y.abs().clamp(min=1.0)).max().item())
    return most


def kernel_of(text: str, strides: Sequence[tuple[int, ...]] | None = None) -> Kernel:
    p = parse("program kernel mesh() facts()\n" + "".join(f"{line} {{}}\n" if " = " in line else f"{line}\n" for line in text.splitlines()))
    return as_kernel(p, "kernel_here", strides)


def compiled(k: Kernel, folder: Path) -> Any:
    said: list[str] = []
    (code,) = cpp_files.compiled([k], folder, said.append)
    assert not said, said
    return code


@pytest.mark.parametrize("dtype", ["f64", pytest.param("f32", marks=pytest.mark.wide)])
def test_groups_of_real_programs_compute_what_their_functions_do(dtype: str, kernels_folder: Path) -> None:
    """None is refused. float32: sums in another order, and exp to 2 units of its last place."""
    found, said = list(real(dtype).values()), list[str]()
    codes = cpp_files.compiled(found, kernels_folder, said.append)
    assert not said and len(found) > 50
    for k, code in zip(found, codes, strict=True):
        xs = lying(k, random_inputs(k.fragment))
        before = [x.clone() for x in xs]
        got = code(*xs)
        assert apart(got, inductor.python(k)(*xs)) < LEAST[dtype], k.name
        assert all(torch.equal(a, b) for a, b in zip(xs, before, strict=True)), k.name
        assert isinstance(code, cpp_files.Fixed)
        for i, m in code.reused:  # in an operand's memory: the same bits
            assert all(map(torch.equal, code.reusing({m: i})(*lying(k, xs)), got)), (k.name, i, m)


def test_16_bits_are_computed_in_32_and_rounded_where_they_are_stored(tmp_path: Path) -> None:
    """Against float64 on the same numbers: half a unit of the last of 8 bits, and what float32 adds."""
    names = [name for name, k in real("bf16").items() if not any(op.target in ("cast", "bernoulli") for op in k.fragment.ops)][:12]
    chosen = [real("bf16")[name] for name in names]
    for k, code in zip(chosen, cpp_files.compiled(chosen, tmp_path, print), strict=True):
        xs = lying(k, random_inputs(k.fragment))
        wide = replace_dtype(k.fragment, "bf16", "f64")
        exact = inductor.python(Kernel(k.name, wide, k.strides, function(wide, k.name)))(*[x.double() if x.is_floating_point() else x for x in xs])
        for a, b in zip(code(*xs), exact, strict=True):
            assert ((a.double() - b.double()).abs() <= b.double().abs() * 2.0**-8 + 1e-4).all(), k.name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_are_converted_as_torch_does(dtype: torch.dtype, tmp_path: Path) -> None:
    """Every number of 16 bits; of float32 those, the middle between two neighbours, and what is next to it on both sides: there the rounding changes."""
    name = {torch.float16: "f16", torch.bfloat16: "bf16"}[dtype]
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    up, down = (cpp_files.compiled([kernel_of(f'%x : {a}[{n}] batch "x"\n%y = cast(%x) : {b}[{n}]\nreturn %y output "y"\n')], tmp_path, print)[0] for a, b, n in ((name, "f32", 1 << 16), ("f32", name, 7 << 16)))
    (wide,) = up(every)
    same(wide, every.float())
    bits = every.float().view(torch.int32)
    middle = ((every.double() + every.roll(-1).double()) / 2).float().view(torch.int32)
    beyond = torch.linspace(65000.0, 140000.0, 1 << 16).view(torch.int32)  # what no half holds
    given = torch.cat([bits, bits + 1, bits - 1, middle, middle + 1, middle - 1, beyond]).view(torch.float32)
    (narrow,) = down(given)
    same(narrow, given.to(dtype))


def same(got: Tensor, want: Tensor) -> None:
    """Bit for bit, but for which number is none."""
    none = want.isnan()
    assert torch.equal(got.isnan(), none) and torch.equal(got[~none].view(torch.int16), want[~none].view(torch.int16))


@pytest.mark.skipif(not inductor.compiler().endswith("g++") or sys.platform != "linux", reason="its report is GCC's")
@pytest.mark.parametrize(("a", "b"), [("f32", "bf16"), ("f32", "f16"), ("f16", "f32"), ("bf16", "bf16"), ("f16", "f16")])
def test_a_loop_over_16_bits_becomes_vectors(a: str, b: str, tmp_path: Path) -> None:
    """As the compiler reports: without them a store takes nine times as long."""
    k = kernel_of(f'%x : {a}[64, 512] batch "x"\n%y = aten.mul.Tensor(%x, 1.5) : {a}[64, 512]\n%z = cast(%y) : {b}[64, 512]\nreturn %z output "z"\n')
    (tmp_path / "one.cpp").write_text(cpp_nests.LIBRARY + cpp_nests.source(k).text)
    said = subprocess.run([inductor.compiler(), *cpp_files.FLAGS, "-fopt-info-vec-optimized", str(tmp_path / "one.cpp"), "-o", str(tmp_path / "one.so")], capture_output=True, text=True, check=True)
    assert "loop vectorized" in said.stderr, said.stderr


def replace_dtype(p: Program, old: str, new: str) -> Program:
    return parse(str(p).replace(old, new))


CROSS = '''%x : {t}[37, {n}] batch "x"
%i : i64[37, 1] batch "i"
%m = amax(%x, dims=[1], keepdim=true) : {t}[37, 1]
%c = aten.sub.Tensor(%x, %m) : {t}[37, {n}]
%e = aten.exp(%c) : {t}[37, {n}]
%s = sum(%e, dims=[1], keepdim=true) : {t}[37, 1]
%l = aten.log(%s) : {t}[37, 1]
%y = aten.sub.Tensor(%c, %l) : {t}[37, {n}]
%g = gather(%y, %i, dim=1) : {t}[37, 1]
%p = aten.div.Tensor(%e, %s) : {t}[37, {n}]
%total = sum(%g, dims=[0, 1], keepdim=false) : {t}[]
%z = full(value=0.0) : {t}[37, {n}]
%u = scatter_add(%z, %i, %g, dim=1) : {t}[37, {n}]
%d = aten.sub.Tensor(%p, %u) : {t}[37, {n}]
return %g output "g"
return %total output "total"
return %p output "p"
return %d output "d"
'''


@pytest.mark.parametrize("n", [1, 5, 17, 9001])
def test_rows_of_any_length(n: int, tmp_path: Path) -> None:
    """A row that fills no vector, and one that is longer than a stretch of sums."""
    k = kernel_of(CROSS.format(t="f64", n=n))
    torch.manual_seed(0)
    xs = [torch.randn(37, n, dtype=torch.float64) * 3, torch.randint(0, n, (37, 1))]
    assert apart(compiled(k, tmp_path)(*xs), inductor.python(k)(*xs)) < 1e-12
    text = cpp_nests.source(k).text
    assert text.count("exp_(") == 1  # what took effort is kept along the row


def test_an_index_out_of_range_is_said(tmp_path: Path) -> None:
    k = kernel_of(CROSS.format(t="f64", n=5))
    code, i = compiled(k, tmp_path), torch.zeros(37, 1, dtype=torch.int64)
    for wrong in (5, -1):
        i[3] = wrong
        with pytest.raises(IndexError, match="out of range\n  fix"):
            code(torch.randn(37, 5, dtype=torch.float64), i)


def test_other_shapes_are_refused(tmp_path: Path) -> None:
    k = kernel_of(CROSS.format(t="f64", n=5))
    with pytest.raises(ValueError, match=r"compiled for \[\[37, 5\], \[37, 1\]\] and is given \[\[2, 5\]"):
        compiled(k, tmp_path)(torch.randn(2, 5, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.int64))


def test_sums_across_rows_do_not_depend_on_threads(tmp_path: Path) -> None:
    k = kernel_of('''%x : f32[7, 300, 40] batch "x"
%y : f32[7, 300, 40] batch "y"
%v = aten.mul.Tensor(%x, %y) : f32[7, 300, 40]
%s = sum(%v, dims=[0, 1], keepdim=false) : f32[40]
return %s output "s"
''')
    torch.manual_seed(0)
    xs = [torch.randn(7, 300, 40), torch.randn(7, 300, 40)]
    code, threads = compiled(k, tmp_path), torch.get_num_threads()
    found = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        found.append(code(*xs)[0])
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    torch.testing.assert_close(found[0].double(), (xs[0].double() * xs[1].double()).sum((0, 1)), rtol=0, atol=1e-4)  # 2100 products of about 1


def test_what_is_not_a_number_stays_none(tmp_path: Path) -> None:
    """A maximum with one among its lanes, whichever it is in; infinities and what exp makes of them."""
    k = kernel_of('''%x : f32[40, 40] batch "x"
%m = amax(%x, dims=[1], keepdim=true) : f32[40, 1]
%e = aten.exp(%x) : f32[40, 40]
%r = aten.relu(%x) : f32[40, 40]
%t = aten.tanh(%x) : f32[40, 40]
return %m output "m"
return %e output "e"
return %r output "r"
return %t output "t"
''')
    torch.manual_seed(0)
    x = torch.randn(40, 40) * 60
    x.fill_diagonal_(float("nan"))
    x[0, 1], x[1, 2] = float("inf"), float("-inf")
    got, want = compiled(k, tmp_path)(x), inductor.python(k)(x)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isinf(), b.isinf())
        torch.testing.assert_close(a, b, rtol=1e-6, atol=3e-45, equal_nan=True)  # 2 units of what is below 2**-126


def test_operands_and_results_lie_as_the_program_says(tmp_path: Path) -> None:
    """Turned, with gaps, expanded; a view is returned as one; and what comes otherwise is copied first."""
    k = kernel_of('''%x : f64[6, 10] batch "x"
%b : f64[6, 10] batch "b"
%y = aten.mul.Tensor(%x, %b) : f64[6, 10]
%t = permute(%y, dims=[1, 0]) : f64[10, 6]
%v = reshape(%x) : f64[2, 3, 10]
%w = slice(%v, dim=1, start=1, step=1) : f64[2, 2, 10]
return %y output "y"
return %t output "t"
return %w output "w"
''', [(1, 8), (0, 1)])
    torch.manual_seed(0)
    x, b = torch.randn(10, 8, dtype=torch.float64)[:, :6].t(), torch.randn(10, dtype=torch.float64).expand(6, 10)
    code = compiled(k, tmp_path)
    y, t, w = code(x, b)
    assert torch.equal(y, x * b) and torch.equal(t, y.t()) and torch.equal(w, x.reshape(2, 3, 10)[:, 1:])
    assert t.data_ptr() == y.data_ptr() and w.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert torch.equal(code(x.contiguous(), b)[0], y) and torch.equal(code(x, b.contiguous())[0], y)


def test_a_result_may_lie_in_the_memory_of_what_is_read_at_the_same_point(tmp_path: Path) -> None:
    """Not where a later pass, another nest or another point reads it again."""
    softmax = kernel_of("""%x : f64[6, 10] batch "x"
%b : f64[10] batch "b"
%e = aten.exp(%x) : f64[6, 10]
%s = sum(%e, dims=[1], keepdim=true) : f64[6, 1]
%y = aten.div.Tensor(%e, %s) : f64[6, 10]
%z = aten.mul.Tensor(%y, %b) : f64[6, 10]
return %z output "z"
""")
    code, x, b = compiled(softmax, tmp_path), torch.randn(6, 10, dtype=torch.float64), torch.randn(10, dtype=torch.float64)
    assert code.reused == ((0, 0),)
    (want,), given = code(x, b), x.clone()
    (got,) = code.reusing({0: 0})(given, b)
    assert torch.equal(got, want) and got.data_ptr() == given.data_ptr() and not torch.equal(given, x)
    turned = """%x : f64[8, 8] batch "x"
%t = permute(%x, dims=[1, 0]) : f64[8, 8]
%y = aten.add.Tensor(%x, %t) : f64[8, 8]
return %y output "y"
"""
    later = """%x : f64[6, 10] batch "x"
%b : f64[6, 10] batch "b"
%y = aten.neg(%b) : f64[6, 10]
%z = aten.add.Tensor(%x, %b) : f64[6, 10]
return %y output "y"
return %z output "z"
"""
    k = kernel_of(later)
    assert cpp_nests.source(k).reused == ((1, 0), (0, 1), (1, 1))  # not the first result over %x, which is read behind it
    shown = """%x : f64[6, 10] batch "x"
%y = aten.neg(%x) : f64[6, 10]
%v = reshape(%x) : f64[60]
return %y output "y"
return %v output "v"
"""
    rolled = """%x : f64[6, 10] batch "x"
%a = slice(%x, dim=1, start=0, step=1) : f64[6, 5]
%b = slice(%x, dim=1, start=5, step=1) : f64[6, 5]
%y = cat([%b, %a], dim=1) : f64[6, 10]
%z = aten.neg(%y) : f64[6, 10]
return %z output "z"
"""
    for text in (turned, shown, rolled):
        k = kernel_of(text)
        assert not cpp_nests.source(k).reused, text


@pytest.mark.parametrize("dtype", ["f32", "f64", "bf16"])
@pytest.mark.turn
def test_what_is_written_over_an_operand_is_the_same_whatever_the_width(dtype: str, tmp_path: Path) -> None:
    """What is left of a row beside its whole vectors is read before it is written too."""
    given = "".join(f'%{name} : {{t}}[6, {{n}}] batch "{name}"\n' for name in "abcd") + '%w : {t}[{n}] batch "w"\n'
    ops = "%p = aten.mul.Tensor(%a, %b) : {t}[6, {n}]\n%s = aten.add.Tensor(%p, %c) : {t}[6, {n}]\n%y = aten.mul.Tensor(%s, %w) : {t}[6, {n}]\n"
    ops += "%e = aten.sub.Tensor(%y, %d) : {t}[6, {n}]\n%q = aten.mul.Tensor(%e, %e) : {t}[6, {n}]\n%l = sum(%q, dims=[0, 1], keepdim=false) : {t}[]\n%z = aten.mul.Tensor(%e, %w) : {t}[6, {n}]\n"
    text = given + ops + 'return %y output "y"\nreturn %z output "z"\nreturn %l output "l"\n'
    kernels = [as_kernel(kernel_of(text.format(t=dtype, n=n)).fragment, f"wide_{n}") for n in range(1, 68)]
    count = 0
    for k, code in zip(kernels, cpp_files.compiled(kernels, tmp_path, print), strict=True):
        xs = random_inputs(k.fragment)
        assert isinstance(code, cpp_files.Fixed)
        want = code(*xs)
        for i, m in code.reused:
            got = code.reusing({m: i})(*(x.clone() for x in xs))
            assert all(map(torch.equal, got, want)), (k.name, i, m, float((got[-1] - want[-1]).abs()))
            count += 1
    assert count > 4 * len(kernels)


@pytest.mark.parametrize(("ops", "row"), [
    ("%a = sum(%x, dims=[1], keepdim=false) : f64[33]\n%y = aten.add.Tensor(%a, %x) : f64[33, 33]", 33),
    ("%a = amax(%x, dims=[0], keepdim=true) : f64[1, 5]\n%c = reshape(%a) : f64[5, 1]\n%y = aten.add.Tensor(%c, %x) : f64[5, 5]", 5),
    ("%a = sum(%x, dims=[0], keepdim=true) : f64[1, 100]\n%y = sum(%a, dims=[1], keepdim=true) : f64[1, 1]", 100),
])  # fmt: skip
def test_what_a_sum_is_read_along_is_not_what_it_is_made_along(ops: str, row: int, tmp_path: Path) -> None:
    k = kernel_of(f'%x : f64[{row}, {row}] batch "x"\n{ops}\nreturn %y output "y"\n')
    xs, said = random_inputs(k.fragment), list[str]()
    (code,) = cpp_files.compiled([k], tmp_path, said.append)  # compiled, or Python where no nest makes it
    assert apart(code(*xs), inductor.python(k)(*xs)) <= LEAST["f64"]


REFUSED = {
    "c64": ('%x : c64[4] batch "x"\n%y = aten.neg(%x) : c64[4]\nreturn %y output "y"\n', "no C\\+\\+ type"),
    "empty": ('%x : f32[4, 0] batch "x"\n%y = aten.neg(%x) : f32[4, 0]\nreturn %y output "y"\n', "0 elements"),
    "unknown": ('%x : f32[4] batch "x"\n%y = aten.digamma(%x) : f32[4]\nreturn %y output "y"\n', "digamma"),
    "every second": ('%x : f32[4] batch "x"\n%y = unslice(%x, dim=0, start=0, step=2) : f32[8]\nreturn %y output "y"\n', "step 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_cpp_is_refused_and_runs_as_python(case: str, tmp_path: Path) -> None:
    text, why = REFUSED[case]
    k = kernel_of(text)
    with pytest.raises(CodegenError, match=why):
        cpp_nests.source(k)
    said: list[str] = []
    (code,) = cpp_files.compiled([replace(k, name=f"kernel_{case.replace(' ', '_')}", source=function(k.fragment, f"kernel_{case.replace(' ', '_')}"))], tmp_path, said.append)
    (want,) = inductor.python(k)(*(xs := random_inputs(k.fragment) if case != "c64" else [torch.randn(4, dtype=torch.complex64)]))
    assert torch.equal(code(*xs)[0], want) and len(said) == 1 and "runs as plain Python" in said[0]


def test_one_library_a_program_and_it_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    k = kernel_of(CROSS.format(t="f64", n=5))
    other = replace(k, name="kernel_other", source=k.source.replace("kernel_here", "kernel_other"))
    cpp_files.compiled([k, other], tmp_path, print)
    assert len(list(tmp_path.glob("*.so"))) == 1
    with monkeypatch.context() as patch:
        patch.setattr(cpp_files.subprocess, "run", lambda *a, **b: pytest.fail("it is there already"))
        cpp_files.compiled([k, other], tmp_path, print)
    named = tmp_path / "compiler"
    named.write_text("a compiler")
    before = cpp_files._identity.__wrapped__(str(named))
    named.write_text("a newer compiler")
    assert before != cpp_files._identity.__wrapped__(str(named))
    monkeypatch.setattr(cpp_files, "_identity", lambda name: ("another",))
    cpp_files.compiled([k, other], tmp_path, print)
    assert len(list(tmp_path.glob("*.so"))) == 2


@pytest.mark.parametrize("size", [0, 500])
def test_a_library_that_is_cut_off_is_compiled_again(size: int, tmp_path: Path) -> None:
    text = 'extern "C" int works() { return 1; }'
    cpp_files.library(text, tmp_path)
    (path,) = tmp_path.glob("*.so")
    whole = path.read_bytes()
    path.unlink()  # what is loaded stays whole
    path.write_bytes(whole[:size])
    other = "import sys, pathlib; from deepseed.codegen import cpp_files; print(cpp_files.library(sys.argv[2], pathlib.Path(sys.argv[1])).works())"
    assert subprocess.run([sys.executable, "-c", other, str(tmp_path), text], capture_output=True, text=True, check=False).stdout == "1\n"
    assert path.stat().st_size > 500
    loads = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).works())"
    assert subprocess.run([sys.executable, "-c", loads, str(path)], capture_output=True, text=True, check=False).stdout == "1\n"


def test_a_library_that_cannot_be_loaded_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise OSError("failed to map segment")

    monkeypatch.setattr(cpp_files.ctypes, "CDLL", refuse)
    said: list[str] = []
    cpp_files.compiled([kernel_of(CROSS.format(t="f64", n=6))], tmp_path, said.append)
    assert len(said) == 1 and "cannot be loaded" in said[0] and "failed to map segment" in said[0] and "fix: DEEPSEED_CACHE_DIR" in said[0]


def test_a_compiler_that_compiles_nothing_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    k, said = kernel_of(CROSS.format(t="f64", n=7)), list[str]()
    other = replace(k, name="kernel_other", source=k.source.replace("kernel_here", "kernel_other"))
    assert len(cpp_files.compiled([k, other], tmp_path / "kept", said.append)) == 2
    assert said == [f"kernels run as plain Python: {broken} compiles nothing: it left with 3\n  fix: CXX=PROGRAM, a C++ compiler that works"]


def test_a_compiler_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    monkeypatch.setattr(inductor, "_told", set())
    said: list[str] = []
    (code,) = cpp_files.compiled([kernel_of(CROSS.format(t="f64", n=8))], tmp_path, said.append)
    assert isinstance(code, cpp_files.Fixed) and len(said) == 1 and said[0].startswith("CXX='/no/such/compiler' is no program: ") and "fix: " in said[0]
