"""codegen=: groups become functions, functions become compiled code that is kept, and nothing but speed depends on it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from small import small, token_loss
from torch import Tensor

import deepseed
from deepseed import build
from deepseed import kernels as back_ends
from deepseed.api import TrainStep
from deepseed.codegen import cpp_files, inductor
from deepseed.codegen.kernels import COMPILED, Kernel, kernels
from deepseed.explain_kernels import explain_kernels
from deepseed.ir.text import parse
from deepseed.memory import as_kernels, memory
from deepseed.ops import rng, traced
from deepseed.passes.fuse import fuse
from deepseed.passes.localize import localize
from deepseed.rules.strides import laid_out

COMPILER = pytest.mark.skipif(not inductor.compiler(), reason="no C++ compiler")

PROGRAM = """program p mesh() facts(explicit, lowered, placed)
%x : f64[6, 10] batch "x"
%rng : i64[2] rng "rng"
%i : i64[6, 1] batch "i"
%e = aten.exp(%x) : f64[6, 10] {phase="forward"}
%d = bernoulli(%rng, p=0.5, site="drop") : f64[6, 10] {phase="forward"}
%y = aten.mul.Tensor(%e, %d) : f64[6, 10] {phase="forward"}
%s = sum(%y, dims=[1], keepdim=true) : f64[6, 1] {phase="forward"}
%z = aten.div.Tensor(%y, %s) : f64[6, 10] {phase="forward"}
%u = scatter_add(%z, %i, %s, dim=1) : f64[6, 10] {phase="forward"}
%g = gather(%u, %i, dim=1) : f64[6, 1] {phase="forward"}
return %u output "u"
return %g output "g"
"""


def kernel() -> Kernel:
    p = localize(fuse(parse(PROGRAM)), {})
    (k,) = set(kernels(p, *laid_out(p)).values())
    return k


def operands() -> list[Tensor]:
    torch.manual_seed(0)
    given = {"f64": torch.randn(6, 10, dtype=torch.float64), "rng": torch.tensor([7, 3]), "i": torch.randint(0, 10, (6, 1))}
    return [given["rng"] if i.type.shape == (2,) else given["i"] if i.type.dtype == "i64" else given["f64"] for i in kernel().fragment.inputs]


def test_a_kernel_reads_as_its_ops_do() -> None:
    k = kernel()
    assert k.name.startswith("kernel_exp_bernoulli_mul_sum_")
    assert "torch.exp(i0)" in k.source and "del " in k.source and k.source.count("return") == 1


@pytest.mark.parametrize("index", [None, [[[6]], [[5], [4, 1, 2]]], [[[12, 3, 6]], [[10]]]])
def test_traced_draws_are_the_same_bits(index: rng.Index | None) -> None:
    seeds, shape = torch.tensor([11, 4]), (6, 10)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert torch.equal(traced.bernoulli(seeds, shape, 0.3, "a.b", dtype, index), rng.bernoulli(seeds, shape, 0.3, "a.b", dtype, index))
        assert torch.equal(traced.uniform(seeds, shape, -1.0, 3.0, "a.b", dtype, index), rng.uniform(seeds, shape, -1.0, 3.0, "a.b", dtype, index))


def test_traced_moves_are_the_same() -> None:
    from deepseed import ops

    x = torch.randn(3, 4)
    for dim, start, step, shape in ((1, 2, 1, (3, 9)), (0, 1, 2, (7, 4))):
        assert torch.equal(traced.unslice(x, shape, dim, start, step), ops.unslice(x, shape, dim, start, step))
    i, v = torch.tensor([[2], [0], [3]]), torch.randn(3, 1)
    assert torch.equal(traced.scatter_add(x, i, v, 1), ops.scatter_add(x, i, v, 1))
    assert torch.equal(traced.scatter_add(x[:, 1:], i, v, 1, 1), ops.scatter_add(x[:, 1:], i, v, 1, 1))
    for dtype in (torch.int64, torch.float32):
        assert torch.equal(traced.iota(5, 2, 3, dtype), ops.iota(5, 2, 3, dtype))


@COMPILER
@pytest.mark.turn
def test_inductor_compiles_once_and_other_strides_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    k, xs, said, counts = kernel(), operands(), list[str](), list[tuple[int, int]]()
    token = COMPILED.set(lambda done, of: counts.append((done, of)))
    (code,) = inductor.compiled([k], tmp_path, said.append)
    COMPILED.reset(token)
    want = inductor.python(k)(*xs)

    def same(got: Sequence[Tensor]) -> None:
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0.0, atol=1e-13)

    same(code(*xs))
    assert counts[-1] == (1, 1)
    other = [x.t().contiguous().t() if x.shape == (6, 10) else x for x in xs]
    assert other[0].stride() != xs[0].stride()
    same(code(*other))
    monkeypatch.setattr(inductor, "_compile", lambda path: pytest.fail("it is there already"))
    (again,) = inductor.compiled([k], tmp_path, said.append)
    same(again(*xs))
    same(again(*other))
    assert not said


def test_where_inductor_fails_the_function_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> None:
        raise RuntimeError("no such lowering")

    k, xs, said = kernel(), operands(), list[str]()
    monkeypatch.setattr(inductor, "_compile", broken)
    monkeypatch.setattr(inductor, "compiler", lambda: True)
    (code,) = inductor.compiled([k], tmp_path, said.append)
    assert all(torch.equal(a, b) for a, b in zip(code(*xs), inductor.python(k)(*xs), strict=True))
    assert "no such lowering" in said[-1]


def test_code_that_returns_an_operand_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor drops an addition of zeros; what updates the result in place later would change the operand."""
    k, xs = kernel(), operands()
    want = inductor.python(k)(*xs)
    monkeypatch.setattr(inductor, "_compile", lambda path: path.touch())
    monkeypatch.setattr(inductor, "compiler", lambda: True)
    monkeypatch.setattr(inductor, "load", lambda path: lambda *given: (given[0], want[1]))
    (code,) = inductor.compiled([k], tmp_path, print)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(code(*xs), want, strict=True))


def test_without_a_compiler_the_function_runs_and_it_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    k, said = kernel(), list[str]()
    monkeypatch.setattr(inductor, "compiler", lambda: False)
    monkeypatch.setattr(inductor, "_told", set())
    for _ in range(2):
        inductor.compiled([k], tmp_path, said.append)
    assert len(said) == 1 and "fix: install g++" in said[0] and not list(tmp_path.iterdir())


# whole steps --------------------------------------------------------------------------------------------------------


def trained(plan: str, codegen: str, **options: object) -> tuple[list[float], dict[str, Tensor], TrainStep]:
    torch.manual_seed(0)
    model, batch, _ = small()
    optimizer = torch.optim.SGD(model.double().parameters(), lr=0.1, momentum=0.9)  # AdamW would make numbers of gradients that are zero but for rounding
    step = TrainStep(model, plan, optimizer=optimizer, loss_fn=token_loss, clip_grad_norm=1.0, backend="simulate", widen=True, quiet=True, codegen=codegen, **options)  # type: ignore[arg-type]
    return [float(step(batch)) for _ in range(3)], step.state_dict(), step


@pytest.mark.parametrize("plan", ["zero0", "zero3+dp2", "tp2", "pp2+mb2", "zero2+dp2+mb2"])
def test_steps_of_kernels_compute_what_steps_of_ops_do(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions stand for compiled code: all that a back end is given, and every call, without a compiler."""
    monkeypatch.setitem(back_ends.BACK_ENDS, "functions", lambda wanted, folder, tell: [inductor.python(k) for k in wanted])
    monkeypatch.setattr(build, "PRODUCTS", {"functions": "joined"})  # matrix products and attention too
    losses, values, _ = trained(plan, "python")
    again, others, step = trained(plan, "functions")
    assert "kernel_mm_" in (text := step.programs.current().executables[0].source) and "torch.mm" not in text
    assert losses == pytest.approx(again, rel=1e-13)
    for key, t in values.items():
        torch.testing.assert_close(others[key], t, rtol=0.0, atol=1e-12)


@COMPILER
@pytest.mark.parametrize("plan", ["zero0", "zero3+dp2"])
def test_steps_of_cpp_compute_what_steps_of_ops_do(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []

    def compiled(wanted: Sequence[Kernel], folder: Path, tell: Callable[[str], object]) -> Sequence[back_ends.Compiled]:
        made.extend(codes := cpp_files.compiled(wanted, folder, tell))
        return codes

    monkeypatch.setitem(back_ends.BACK_ENDS, "cpp", compiled)
    losses, values, _ = trained(plan, "python")
    again, others, _ = trained(plan, "cpp")
    assert len(made) > 5 and all(isinstance(code, cpp_files.Fixed) for code in made)
    assert losses == pytest.approx(again, rel=1e-13)
    for key, t in values.items():
        torch.testing.assert_close(others[key], t, rtol=0.0, atol=1e-12)


OVER = """program p mesh() facts(explicit, lowered, placed)
%x : f32[8, 16] batch "x"
%w : f32[16, 16] param "w"
%a = aten.mm(%x, %w) : f32[8, 16] {phase="forward"}
%b = aten.exp(%a) : f32[8, 16] {phase="forward"}
%c = aten.neg(%b) : f32[8, 16] {phase="forward"}
%d = aten.mm(%c, %w) : f32[8, 16] {phase="forward"}
return %d output "d"
"""


@COMPILER
def test_a_kernel_writes_over_what_nothing_reads_later(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(back_ends, "cache_dir", lambda: tmp_path)

    def names(text: str, counted: bool = False) -> list[str]:
        p = localize(fuse(parse(text)), {})
        return list(back_ends.made(p, "cpp", {}, counted, print).names.values())

    (name,) = names(OVER)
    assert name.endswith("_over0")
    later = OVER.replace("return %d", "%e = aten.mm(%a, %w) : f32[8, 16] {phase=\"forward\"}\nreturn %e output \"e\"\nreturn %d")
    view = OVER.replace("return %d", "%v = permute(%a, dims=[1, 0]) : f32[16, 8] {phase=\"forward\"}\n%e = aten.mm(%v, %c) : f32[16, 16] {phase=\"forward\"}\nreturn %e output \"e\"\nreturn %d")
    given = OVER.replace("aten.exp(%a)", "aten.exp(%x)")
    returned = OVER + 'return %a output "a"\n'
    half = OVER.replace("%a = aten.mm(%x, %w) : f32[8, 16]", "%f = aten.mm(%x, %w) : f32[8, 16] {phase=\"forward\"}\n%a = slice(%f, dim=0, start=0, step=1) : f32[4, 16]")
    half = half.replace("f32[8, 16] {phase=\"forward\"}\n%c", "f32[4, 16] {phase=\"forward\"}\n%c").replace("aten.neg(%b) : f32[8", "aten.neg(%b) : f32[4").replace("aten.mm(%c, %w) : f32[8", "aten.mm(%c, %w) : f32[4")
    for text in (later, view, given, returned, half):
        assert not any("_over" in name for name in names(text)), text
    assert not any("_over" in name for name in names(OVER, True))  # what an arena counts is made where it is said to be


def test_a_word_that_means_no_back_end() -> None:
    with pytest.raises(ValueError, match="fix: one of python, cpp, inductor, triton, auto"):
        trained("zero0", "indoctor")
    for word in ("cpp", "inductor"):
        with pytest.raises(back_ends.BackEndError, match=f"codegen='{word}' computes on a CPU, and the parameters are on cuda:0\n  fix: codegen='triton', or 'python'"):
            back_ends.resolve(word, torch.device("cuda:0"))


X86 = "processor\t: 0\ncpu family\t: 25\ncpu MHz\t\t: 2595.1\nflags\t\t: fpu sse2 avx2\n\n"
ARM = "processor\t: {n}\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd {more}\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x3\nCPU part\t: {part}\n\n"


@pytest.mark.parametrize(("one", "other"), [
    (X86, X86.replace("avx2", "avx512f")),
    (ARM.format(n=0, more="sve", part="0xd40"), ARM.format(n=0, more="asimddp", part="0xd40")),
    (ARM.format(n=0, more="sve", part="0xd40"), ARM.format(n=0, more="sve", part="0xd4f")),
    (ARM.format(n=0, more="", part="0xd05"), ARM.format(n=0, more="", part="0xd05") + ARM.format(n=1, more="", part="0xd41")),
    ("processor\t: 0\nisa\t: rv64imafdc\n", "processor\t: 0\nisa\t: rv64imafdcv\n"), ("cpu\t\t: POWER9\n", "cpu\t\t: POWER10\n"),
])  # fmt: skip
def test_another_processor_is_another_word(one: str, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def word(cpuinfo: str) -> str:
        monkeypatch.setattr(inductor.Path, "read_text", lambda self: cpuinfo)
        found: str = inductor.processor.__wrapped__()
        return found

    assert word(one) != word(other)
    assert word(one) == word(one + one.replace(": 0\n", ": 1\n", 1).replace("2595.1", "3100.0").replace("50.00", "48.00")), "as many cores as there are, at any speed"


def test_a_system_that_does_not_list_instructions_says_its_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: Path) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(inductor.Path, "read_text", missing)
    words = set[str]()
    for name in ("arm", "i386"):
        monkeypatch.setattr(inductor.platform, "processor", lambda name=name: name)
        words.add(inductor.processor.__wrapped__())
    assert len(words) == 2


def test_auto_means_cpp_where_there_is_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "compiler", lambda: "g++")
    assert [back_ends.resolve("auto", torch.device(d)) for d in ("cpu", "cuda")] == ["cpp", "python"]
    monkeypatch.setattr(inductor, "compiler", lambda: "")
    assert back_ends.resolve("auto", torch.device("cpu")) == "python"


def test_a_kernel_keeps_to_itself_what_it_does_not_return() -> None:
    p = parse(PROGRAM)
    assert memory(fuse(p)).peak_bytes < memory(p).peak_bytes
    (op,) = as_kernels(fuse(p)).ops
    assert op.results == ("u", "g")


def test_kernels_are_counted() -> None:
    p = parse(PROGRAM)
    found = explain_kernels(fuse(p), p)
    (k,) = found.kernels
    assert (found.launches, found.launches_ungrouped, found.alone) == (1, 7, {})
    assert (k.bytes_read, k.bytes_written, k.bytes_minimum, k.launches) == (480 + 16 + 48, 480 + 48, 544 + 528, 1)
    assert found.to_json()["kernels"][0]["name"] == k.name and k.name in str(found)
    assert deepseed.kernels is back_ends


STEP = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import launches_counted
import deepseed
from deepseed.explain_kernels import explain_kernels
from deepseed.kernels import traffic

torch.manual_seed(0)
ids = torch.randint(0, 64, (2, 12))
found = {}
for codegen in ("python", "triton"):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1))
    step = deepseed.compile(model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3), codegen=codegen, clip_grad_norm=1.0)
    losses = [float(step({"input_ids": ids, "labels": ids})) for _ in range(2)]
    found[codegen] = losses, step.state_dict()
p = step.passes[-1].program
said = sum(k.launches for k in explain_kernels(p, p, traffic("triton")).kernels)
library = {op.target for op in p.ops if not op.kernel and (op.target in ("aten.mm", "sdpa", "sdpa_backward") or op.target.startswith("optim."))}
assert library <= {"optim.adamw"}, library
assert said > 70 and launches_counted.launched == 2 * said, (launches_counted.launched, said)
(a, x), (b, y) = found.values()
assert max(abs(m - n) for m, n in zip(a, b, strict=True)) < 2e-6, (a, b)  # float32 sums in another order
assert max(float((x[k] - y[k]).abs().max()) for k in x) < 2e-6
"""


def test_a_training_step_through_emitted_kernels(tmp_path: Path) -> None:
    """Each group of a tiny Llama's step in Triton's interpreter, products and attention too: as many launches as explain says, and the numbers of the python back end."""
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).resolve().parents[:2])), "DEEPSEED_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", STEP], env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


NORMS = """
import sys
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import deepseed

torch.manual_seed(0)
ids = torch.randint(0, 64, (2, 12))
found = {}
for codegen in ("python", sys.argv[1]):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0))
    step = deepseed.compile(model, "bf16", optimizer=torch.optim.SGD(model.parameters(), lr=0.1), codegen=codegen, clip_grad_norm=1.0)
    losses = [float(step({"input_ids": ids, "labels": ids})) for _ in range(3)]
    found[codegen] = losses, step.state_dict(), [op for op in step.passes[-1].program.ops if not op.kernel]
(a, x, whole), (b, y, alone) = found.values()
assert sum(op.target == "aten.native_layer_norm_backward" for op in whole) == 5
assert not [op.target for op in alone if "layer_norm" in op.target]
assert max(abs(m - n) for m, n in zip(a, b, strict=True)) < 0.03, (a, b)
off = max(float((x[k] - y[k]).abs().max()) for k in x)
assert off < 1e-3, off
"""


@pytest.mark.parametrize("codegen", ["triton", pytest.param("cpp", marks=COMPILER)])
@pytest.mark.turn
def test_norms_in_16_bits_are_kernels_forward_and_backward(codegen: str, tmp_path: Path) -> None:
    """Of a tiny GPT-2: no norm is left to torch, and what is trained is what the python back end's is, which has torch's op for each."""
    if codegen == "triton":
        pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).resolve().parents[:2])), "DEEPSEED_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", NORMS, codegen], env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_triton_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"Triton has no compiler for a CPU\n  fix: codegen=.auto"):
        deepseed.compile(torch.nn.Linear(2, 2), codegen="triton")


@pytest.mark.parametrize("word", ["rows", "triton_rows", "cobol"])
def test_words_that_are_no_users_are_refused(word: str) -> None:
    """`rows` and `triton_rows` are how an engine has its packed step built."""
    with pytest.raises(back_ends.BackEndError, match=f"codegen='{word}': no such back end\n  fix: one of python, cpp, inductor, triton, auto$"):
        deepseed.compile(torch.nn.Linear(2, 2), "zero0", codegen=word)
