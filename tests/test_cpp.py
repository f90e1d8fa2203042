"""C++ for packed steps: groups of ops on any number of rows, products of few rows, and what runs where there is no compiler."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_fragments import DTYPES, fragments, random_inputs, reference, resized, retyped

from deepseed.codegen import cpp_files
from deepseed.codegen.cpp import source
from deepseed.codegen.cpp_ops import LIBRARY
from deepseed.codegen.cpp_step import side_by_side
from deepseed.codegen.expressions import CodegenError
from deepseed.codegen.kernels import Kernel, function
from deepseed.inference import native
from deepseed.ir.program import Program
from deepseed.ir.text import parse
from deepseed.ir.verify import verify
from deepseed.rules.strides import contiguous

pytestmark = pytest.mark.skipif(native.load() is None, reason="no C++ compiler")
ROWS = 503  # stands for any number
LEAST = {"f64": 1e-12, "f32": 2e-6, "bf16": 2.0**-7}  # of numbers of about 1


def kernel_of(p: Program, name: str = "kernel") -> tuple[Kernel, list[tuple[int, ...]]]:
    strides = tuple([contiguous(i.type.shape) for i in p.inputs])
    return Kernel(name, p, strides, function(p, name)), [contiguous(p.types[o.ref.name].shape) for o in p.outputs]


def apart(got: Tensor, want: Tensor) -> float:
    """Relative for numbers above 1; what is not finite must be the same."""
    assert got.shape == want.shape and got.dtype == want.dtype
    a, b = got.double(), want.double()
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(same, 0.0, (a - b).abs() / b.abs().clamp(min=1.0)).max().item() if a.numel() else 0.0


GROUPS = {
    "rms_norm": '''%x : f32[1, 503, 24] batch "x"
%y : f32[1, 503, 24] batch "y"
%w : f32[24] batch "w"
%v0 = aten.add.Tensor(%x, %y) : f32[1, 503, 24]
%v1 = aten.pow.Tensor_Scalar(%v0, 2) : f32[1, 503, 24]
%v2 = sum(%v1, dims=[2], keepdim=true) : f32[1, 503, 1]
%v3 = aten.div.Tensor(%v2, 24) : f32[1, 503, 1]
%v4 = aten.add.Tensor(%v3, 1e-05) : f32[1, 503, 1]
%v5 = aten.rsqrt(%v4) : f32[1, 503, 1]
%v6 = aten.mul.Tensor(%v0, %v5) : f32[1, 503, 24]
%v7 = aten.mul.Tensor(%w, %v6) : f32[1, 503, 24]
return %v0 output "v0"
return %v7 output "v7"
''',
    "rope": '''%x : f32[1, 503, 3, 16] batch "x"
%c : f32[1, 1, 503, 16] batch "c"
%s : f32[1, 1, 503, 16] batch "s"
%v = permute(%x, dims=[0, 2, 1, 3]) : f32[1, 3, 503, 16]
%v0 = aten.mul.Tensor(%v, %c) : f32[1, 3, 503, 16]
%v1 = slice(%v, dim=3, start=0, step=1) : f32[1, 3, 503, 8]
%v2 = slice(%v, dim=3, step=1, start=8) : f32[1, 3, 503, 8]
%v3 = aten.neg(%v2) : f32[1, 3, 503, 8]
%v4 = cat([%v3, %v1], dim=3) : f32[1, 3, 503, 16]
%v5 = aten.mul.Tensor(%v4, %s) : f32[1, 3, 503, 16]
%v6 = aten.add.Tensor(%v0, %v5) : f32[1, 3, 503, 16]
return %v6 output "v6"
''',
    "heads": '''%x : f32[503, 48] batch "x"
%v0 = aten.exp(%x) : f32[503, 48]
%v1 = reshape(%v0) : f32[503, 6, 8]
%v2 = amax(%v1, dims=[1], keepdim=false) : f32[503, 8]
%v3 = expand(%v2) : f32[503, 8]
%v4 = aten.gelu(%v3) : f32[503, 8]
return %v4 output "v4"
''',
    "pairs": '''%x : f32[1006, 10] batch "x"
%w : f32[1006, 1] batch "w"
%v0 = slice(%x, dim=1, start=0, step=2) : f32[1006, 5]
%v1 = slice(%x, dim=1, start=1, step=2) : f32[1006, 5]
%v2 = aten.clamp(%v0, none, 0.5) : f32[1006, 5]
%v3 = aten.gt.Scalar(%v1, 0) : bool[1006, 5]
%v6 = aten.clamp(%v1, -0.25, none) : f32[1006, 5]
%v4 = aten.where.self(%v3, %v2, %v6) : f32[1006, 5]
%v5 = aten.mul.Tensor(%v4, %w) : f32[1006, 5]
return %v5 output "v5"
''',
    "positions": '''%x : i64[1, 503, 1] batch "x"
%w : f32[8] batch "w"
%v0 = cast(%x) : f32[1, 503, 1]
%v1 = aten.mul.Tensor(%v0, %w) : f32[1, 503, 8]
%v2 = cat([%v1, %v1], dim=2) : f32[1, 503, 16]
%v3 = aten.cos(%v2) : f32[1, 503, 16]
%v4 = aten.sin(%v2) : f32[1, 503, 16]
return %v3 output "v3"
return %v4 output "v4"
''',
}  # fmt: skip


def program(name: str, text: str) -> Program:
    return parse(f"program {name} mesh() facts()\n" + "".join(f'{line} {{phase="forward"}}\n' if " = " in line else f"{line}\n" for line in text.splitlines()))


@pytest.mark.parametrize("dtype", ["f64", "f32", "bf16"])
def test_groups_on_any_number_of_rows(tmp_path: Path, dtype: str) -> None:
    wanted, programs = {}, {}
    for name, text in GROUPS.items():
        p = retyped(program(name, text), dtype)
        k, lying = kernel_of(p, name)
        wanted[k], programs[name] = lying, text.replace("f32", dtype)
    made, why = cpp_files.functions(wanted, {ROWS: "T"})
    assert not why
    code = cpp_files.callables(wanted, made, cpp_files.library("\n".join([LIBRARY, *(f.text for f in made.values())]), tmp_path, cpp_files.EXACT), {ROWS: "T"})
    for name, text in programs.items():
        for n in (1, 2, 9):
            p = program(name, text.replace("1006", str(2 * n)).replace("503", str(n)))
            inputs = [x.clamp(max=50) if not x.dtype.is_floating_point else x for x in random_inputs(p, n)]
            exact = [x.double() if x.dtype.is_floating_point else x for x in inputs]
            for got, want in zip(code[name](*inputs), reference(retyped(p, "f64") if dtype == "f32" else parse(str(p).replace(dtype, "f64")), exact), strict=True):
                assert apart(got.to(want.dtype), want) <= LEAST[dtype], (name, n)


def test_operands_that_lie_otherwise(tmp_path: Path) -> None:
    p = program("rope", GROUPS["rope"].replace("f32", "f64"))
    k, lying = kernel_of(p)
    made, _ = cpp_files.functions({k: lying}, {ROWS: "T"})
    code = cpp_files.callables({k: lying}, made, cpp_files.library(LIBRARY + made[k.name].text, tmp_path, cpp_files.EXACT), {ROWS: "T"})[k.name]
    x, c, s = torch.randn(1, 16, 5, 3).double().permute(0, 2, 3, 1), torch.randn(1, 1, 5, 32).double()[..., ::2], torch.randn(1, 1, 5, 16).double()
    assert torch.equal(code(x, c, s)[0], code(x.contiguous(), c.contiguous(), s)[0])


@pytest.mark.parametrize("text", [
    '%x : f32[503, 4] batch "x"\n%v = sum(%x, dims=[0], keepdim=true) : f32[1, 4]\nreturn %v output "v"\n',
    '%x : f32[503, 4] batch "x"\n%v = slice(%x, dim=0, start=1, step=1) : f32[502, 4]\nreturn %v output "v"\n',
    '%x : f32[6, 503] batch "x"\n%v = reshape(%x) : f32[1, 3018]\nreturn %v output "v"\n', '%x : f32[503, 503] batch "x"\n%v = aten.neg(%x) : f32[503, 503]\nreturn %v output "v"\n',
    '%x : f32[503, 4] batch "x"\n%y : f32[503, 4] batch "y"\n%v = cat([%x, %y], dim=0) : f32[1006, 4]\nreturn %v output "v"\n',
])  # fmt: skip
def test_what_mixes_rows_is_refused(text: str) -> None:
    k, lying = kernel_of(program("p", text))
    with pytest.raises(CodegenError):
        source(k.fragment, k.name, k.strides, lying, {ROWS: "T"})


def test_fragments_of_real_programs(tmp_path: Path) -> None:
    """Norms, activations, softmax and their gradients, as one row each, in float64."""
    wanted, programs = {}, {}
    for name in sorted(fragments()):
        p = retyped(resized(fragments()[name]), "f64")
        k, lying = kernel_of(p, name)
        wanted[k], programs[k.name] = lying, p
    made, why = cpp_files.functions(wanted, {})
    assert len(made) >= 25, why
    loaded = cpp_files.library("\n".join([LIBRARY, *(f.text for f in made.values())]), tmp_path, cpp_files.EXACT)
    code = cpp_files.callables(wanted, made, loaded, {})
    for name in made:
        inputs = random_inputs(programs[name])
        for got, want in zip(code[name](*inputs), reference(programs[name], inputs), strict=True):
            assert apart(got, want) <= 1e-12, name


@settings(max_examples=120, deadline=None)
@given(st.integers(1, 33), st.integers(1, 300), st.integers(1, 140), st.booleans(), st.booleans(), st.sampled_from([1, 2, 3]))
def test_products_of_few_rows(rows: int, width: int, outputs: int, by_columns: bool, bias: bool, threads: int) -> None:
    g = torch.Generator().manual_seed(rows * width)
    x, b = torch.randn(rows, width, generator=g, dtype=torch.float64), torch.randn(outputs, generator=g, dtype=torch.float64)
    w = torch.randn(outputs, width, generator=g, dtype=torch.float64).t() if by_columns else torch.randn(width, outputs, generator=g, dtype=torch.float64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = native.biased(b, x, w) if bias else native.product(x, w)
    finally:
        torch.set_num_threads(before)
    assert (got - (x @ w + (b if bias else 0))).abs().max() <= 1e-12


@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 2e-5), (torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10)])  # a rounding of the result, which is of about 10
def test_products_of_small_dtypes(dtype: torch.dtype, least: float) -> None:
    g = torch.Generator().manual_seed(0)
    for rows in (1, 3, 8, 17):
        x, w = torch.randn(rows, 130, generator=g).to(dtype), torch.randn(70, 130, generator=g).to(dtype)
        for lying in (w.t(), w.t().contiguous()):
            want = x.double() @ w.double().t()
            assert ((native.product(x, lying).double() - want).abs() / want.abs().clamp(min=1)).max() <= least


def test_a_library_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = 'extern "C" int two() { return 2; }'
    assert cpp_files.library(text, tmp_path).two() == 2
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
    assert cpp_files.library(text, tmp_path).two() == 2


def test_what_the_compiler_refuses(tmp_path: Path) -> None:
    with pytest.raises(CodegenError, match=r"(?s)refuses .*\.cpp.*\n  fix: "):
        cpp_files.library("nonsense", tmp_path)


@pytest.mark.parametrize("broken", ["no compiler", "a compiler that refuses"])
def test_an_engine_without_a_compiler(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from inference_models import generated, ids, prompts, varied

    from deepseed.inference import executable
    from deepseed.inference.engine import Engine

    def refuses(*_: Any) -> Any:
        raise CodegenError("refused")

    said: list[str] = []
    if broken == "no compiler":
        monkeypatch.setattr(native, "load", lambda: None)
    else:
        monkeypatch.setattr(executable.cpp_files, "library", refuses)
        monkeypatch.setattr(executable, "say", said.append)
    model = varied("LlamaForCausalLM")
    want = generated(model, prompts((5, 9)), 8)
    assert ids(Engine(model, block=4, max_length=128).generate(prompts((5, 9)), max_tokens=8)) == want
    assert said == ([] if broken == "no compiler" else ["refused"])


@pytest.mark.parametrize("tokens", [5, 40], ids=["whole step", "groups"])
def test_ops_of_a_served_step_round_one_by_one(tokens: int) -> None:
    """A square less the same square is zero: a product that is taken from another one unrounded is not."""
    pytest.importorskip("transformers")
    from inference_models import generated, ids, prompts, varied

    from deepseed.inference.engine import Engine

    class Act(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.clamp(min=-1e9)  # x, which no compiler knows
            return torch.nn.functional.silu(x) + 1e12 * (x * x - y * y)

    model = varied("LlamaForCausalLM")
    for layer in model.model.layers:
        layer.mlp.act_fn = Act()
    want = generated(model, prompts((tokens,)), 8)
    assert ids(Engine(model, block=4, max_length=128).generate(prompts((tokens,)), max_tokens=8)) == want


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("token", [199, 1 << 40, -1])
def test_an_id_beyond_its_table_is_refused_by_a_whole_step_too(token: int, quantize: str | None) -> None:
    pytest.importorskip("transformers")
    from inference_models import ids, prompts, varied

    from deepseed.inference.engine import Engine
    from deepseed.inference.scheduler import Piece, Running, Step

    engine = Engine(varied("LlamaForCausalLM"), block=4, max_length=128, quantize=quantize, prefix=False)
    want = ids(engine.generate(prompts((3,)), max_tokens=4))
    assert engine.executable.whole is not None
    step = Step((Piece(Running(0, [5, token, 7], 3, 8, blocks=[0]), 0, 3, 1),), ())
    for whole in (engine.executable.whole, None):
        engine.executable.whole = whole
        with pytest.raises(IndexError, match="out of range" if whole is None else "an index is out of range\n  fix: "):
            engine.executable.run(step)
    assert ids(engine.generate(prompts((3,)), max_tokens=4)) == want


def test_dtypes_have_c_types() -> None:
    assert set(DTYPES) <= set(cpp_files.DTYPES)


def test_products_of_one_operand_stand_side_by_side() -> None:
    p = program("p", """%x : f64[503, 8] batch "x"
%a : f64[4, 8] batch "a"
%b : f64[6, 8] batch "b"
%c : f64[6, 6] batch "c"
%at = permute(%a, dims=[1, 0]) : f64[8, 4]
%y = aten.mm(%x, %at) : f64[503, 4]
%n = aten.neg(%y) : f64[503, 4]
%bt = permute(%b, dims=[1, 0]) : f64[8, 6]
%z = aten.mm(%x, %bt) : f64[503, 6]
%ct = permute(%c, dims=[1, 0]) : f64[6, 6]
%u = aten.mm(%z, %ct) : f64[503, 6]
%v = aten.mm(%x, %bt) : f64[503, 6]
return %n output "n"
return %u output "u"
return %v output "v"
""")
    q = side_by_side(p)
    assert [op.name for op in verify(q).ops] == ["at", "y", "bt", "z", "v", "n", "ct", "u"]
    inputs = random_inputs(parse(str(p).replace("503", "3")))
    assert all(torch.equal(a, b) for a, b in zip(reference(parse(str(p).replace("503", "3")), inputs), reference(parse(str(q).replace("503", "3")), inputs), strict=True))
