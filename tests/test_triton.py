"""Emitted Triton kernels in the interpreter against the python back end, on fragments of real programs, and what they read and write."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import needs
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_fragments import fragments, random_inputs, reference, resized, retyped
from triton_worker import Interpreter

from deepseed.codegen import block_sizes as block_sizes_module
from deepseed.codegen import triton_files, triton_plans
from deepseed.codegen.autotune import choice, operands, tuned
from deepseed.codegen.block_sizes import HELD, block_sizes, chunk_size, longest_row
from deepseed.codegen.expressions import CodegenError
from deepseed.codegen.kernels import Kernel, function
from deepseed.codegen.triton import can_emit, launched, launches, source
from deepseed.codegen.triton_files import launch_of
from deepseed.ir.program import Program
from deepseed.ir.text import parse
from deepseed.rules.strides import contiguous

NAMES = sorted(fragments())
RESIZED = [name for name in NAMES if not name.startswith(("vit", "update_all", "t5_5"))]  # one shifts the labels: its 6 is another one
F32, F64 = 1e-5, 1e-12


def apart(got: Tensor, want: Tensor) -> float:
    """The largest difference, of numbers above 1 relative to them; what is not finite must be the same."""
    assert got.shape == want.shape
    if got.numel() == 0:
        return 0.0
    if not got.dtype.is_floating_point:
        return float(not torch.equal(got, want))
    a, b = got.double(), want.double()
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(same, 0.0, (a - b).abs() / b.abs().clamp(min=1.0)).max().item()


def check(interpreter: Interpreter, p: Program, inputs: list[Tensor], tolerance: float) -> None:
    got, _ = interpreter.run(source(p), inputs)
    want = reference(p, inputs)
    for o, a, b in zip(p.outputs, got, want, strict=True):
        assert a.dtype == b.dtype
        assert (error := apart(a, b)) <= tolerance, f"%{o.ref.name}: {error:.1e}\n{p}\n{source(p)}"


def ulps(got: Tensor, want: Tensor, least: float) -> float:
    """In units of the last place of bfloat16 at ``want``; below ``least`` of the tensor's largest number, in units there. What is beyond bfloat16 (a mask's least float32) is infinite in it."""
    want = torch.where(want.bfloat16().isinf(), want.bfloat16().to(want.dtype), want)
    largest = want.abs().where(want.isfinite(), 0.0).max().clamp(min=2.0**-100)
    size = torch.maximum(want.abs(), largest * least)
    unit = torch.exp2(torch.floor(torch.log2(size)) - 7)
    same = (got.double() == want.double()) | (got.isnan() & want.isnan())
    return torch.where(same, 0.0, (got.double() - want.double()).abs() / unit).max().item()


@needs.triton
@pytest.mark.parametrize("name", [name if n % 7 == 0 else pytest.param(name, marks=pytest.mark.wide) for n, name in enumerate(NAMES)])
def test_fragments_of_real_programs(interpreter: Interpreter, name: str) -> None:
    p = parse(fragments()[name])
    check(interpreter, p, random_inputs(p), F32)


@needs.triton
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(RESIZED), rows=st.integers(0, 4), tokens=st.integers(1, 9), head=st.sampled_from([2, 4, 6, 18]), inner=st.integers(1, 70),
    words=st.integers(2, 90), dtype=st.sampled_from(["f32", "f64", "bf16"]), strided=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
def test_any_sizes_dtypes_and_strides(
    interpreter: Interpreter, name: str, rows: int, tokens: int, head: int, inner: int, words: int, dtype: str, strided: bool, seed: int
) -> None:
    p = resized(fragments()[name], rows, tokens, head, inner, words)
    if not rows and not can_emit(p):  # sums of nothing are Python's
        assert any(op.target in ("sum", "sum_of_squares") and op.type.numel and not p.types[op.refs[0].name].numel for op in p.ops), p
        return
    if dtype != "bf16":
        p = retyped(p, dtype)
        check(interpreter, p, random_inputs(p, seed, strided), F32 if dtype == "f32" else F64)
        return
    short = retyped(p, "bf16")
    inputs = random_inputs(short, seed, strided)
    got, _ = interpreter.run(source(short), inputs)
    want = reference(p, [x.float() if x.dtype == torch.bfloat16 else x for x in inputs])
    least = 2.0**-10 if launches(short) == 1 else 1.0  # a later kernel may read an output, which is rounded then: its sums cancel to that
    for o, a, b in zip(short.outputs, got, want, strict=True):
        if a.dtype == torch.bfloat16 and a.numel():
            assert ulps(a.float(), b.float(), least) <= 2, f"%{o.ref.name}\n{short}\n{source(short)}"


@needs.triton
def test_the_interpreter_rounds_as_devices_do(interpreter: Interpreter) -> None:
    """To the nearest, ties to even, as torch: else two roundings would be more than the two units that bfloat16 may be off."""
    p = fragment("""
        %i0 : f32[5009] batch "i0"
        %a = cast(%i0) : bf16[5009]
        return %a output "a"
    """)
    x = torch.cat([torch.randint(-(2**31), 2**31 - 1, (5000,), dtype=torch.int32).view(torch.float32), torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, -0.0, 1e-40, 3.4e38, 1.00390625, 1.01171875])])
    (got,), _ = interpreter.run(source(p), [x])
    want = x.bfloat16()
    assert bool(((got == want) | (got.isnan() & want.isnan())).all()) and torch.equal(got.signbit() & ~got.isnan(), want.signbit() & ~want.isnan())


# what is read and written ---------------------------------------------------------------------------------------------


def fragment(text: str) -> Program:
    return parse("program kernel mesh() facts()\n" + "\n".join(f"{line.strip()} {{}}" if " = " in line else line.strip() for line in text.strip().splitlines()) + "\n")


def softmax(rows: int, columns: int, dtype: str = "f32") -> Program:
    """Log-softmax with the loss of each row, and its gradient."""
    return fragment(f"""
        %i0 : {dtype}[{rows}, {columns}] batch "i0"
        %i1 : i64[{rows}, 1] batch "i1"
        %m = amax(%i0, dims=[1], keepdim=true) : {dtype}[{rows}, 1]
        %a = aten.sub.Tensor(%i0, %m) : {dtype}[{rows}, {columns}]
        %e = aten.exp(%a) : {dtype}[{rows}, {columns}]
        %s = sum(%e, dims=[1], keepdim=true) : {dtype}[{rows}, 1]
        %l = aten.log(%s) : {dtype}[{rows}, 1]
        %y = aten.sub.Tensor(%a, %l) : {dtype}[{rows}, {columns}]
        %g = gather(%y, %i1, dim=1) : {dtype}[{rows}, 1]
        %n = aten.neg(%g) : {dtype}[{rows}, 1]
        return %n output "n"
        return %y output "y"
    """)


@needs.triton
def test_bytes_are_inputs_and_outputs_once(interpreter: Interpreter) -> None:
    """No program reads a number twice; a tensor of the iteration space's size is read by one program only, what is smaller by each that has a row of it.
    What is said without running it takes a tensor that is cut, or is a part of a cat, as read for every point."""
    for name in NAMES:
        p = parse(fragments()[name])
        text, inputs = source(p), random_inputs(p)
        if launches(p) > 1 or name.startswith("update"):
            continue
        _, traffic = interpreter.run(text, inputs)
        assert traffic.again == 0, f"{name}: {traffic}\n{text}"
        largest = max(p.types[v].numel for v in p.types)
        for n, (i, x) in enumerate(zip(p.inputs, inputs, strict=True)):
            if i.type.numel == largest and not any(o.target == "slice" for o in p.ops):
                assert traffic.read.get(n) == x.nbytes, f"{name} %{i.name}: {traffic}\n{text}"
        (launch,) = launched(p)
        assert (launch.bytes_written == traffic.written and launch.bytes_read == sum(x.nbytes for n, x in enumerate(inputs) if n in traffic.read)) or any(o.target in ("slice", "cat") for o in p.ops), f"{name}: {launch} {traffic}"
        assert traffic.written == sum(p.types[o.ref.name].nbytes for o in p.outputs), f"{name}: {traffic}\n{text}"


@needs.triton
def test_norms_forward_and_backward_are_one_pass(interpreter: Interpreter) -> None:
    """Backward: the sums over rows leave parts, which a second, small kernel reads; everything else is read and written once."""
    found = 0
    for name in NAMES:
        p = parse(fragments()[name])
        sums = [op for op in p.ops if op.target == "sum"]
        rows = any(op.kw("dims") == (2,) for op in sums) and any(op.kw("dims") == (0, 1) for op in sums)
        if not rows or launches(p) != 2 or any(op.kw("dims") not in ((2,), (0, 1)) for op in sums):
            continue
        found += 1
        inputs = random_inputs(p)
        _, traffic = interpreter.run(source(p), inputs)
        largest = max(i.type.numel for i in p.inputs)
        assert traffic.again == 0
        for n, (i, x) in enumerate(zip(p.inputs, inputs, strict=True)):
            assert i.type.numel != largest or traffic.read[n] == x.nbytes, f"{name} %{i.name}: {traffic}\n{source(p)}"
    assert found >= 3


@needs.triton
def test_one_kernel_updates_all_parameters(interpreter: Interpreter) -> None:
    """The gradient norm in one launch over all tensors, its clipping in one, AdamW in one."""
    p = parse(fragments()["update_all"])
    inputs = random_inputs(p)
    _, traffic = interpreter.run(source(p), inputs)
    assert launches(p) == traffic.launches == 3
    norm = {op.refs[0].name for op in p.ops if op.target == "sum_of_squares"}
    for n, (i, x) in enumerate(zip(p.inputs, inputs, strict=True)):
        if i.type.numel > 1:
            assert traffic.read[n] == x.nbytes * (1 + (i.name in norm)), f"%{i.name}"


@needs.triton
@pytest.mark.parametrize("columns", [1, 7, 1024, 5000, 40_003])
def test_rows_of_any_length(interpreter: Interpreter, columns: int) -> None:
    p = softmax(3, columns)
    inputs = [torch.randn(3, columns) * 5, torch.tensor([[0], [columns - 1], [columns // 2]])]
    check(interpreter, p, inputs, F32)
    assert ("for first in range" in source(p)) == (columns > longest_row(1))


@needs.triton
def test_what_is_not_finite_stays_so(interpreter: Interpreter) -> None:
    p = softmax(4, 33)
    x = torch.randn(4, 33)
    x[0, 3], x[1, 4], x[2, :5] = float("nan"), float("inf"), float("-inf")
    check(interpreter, p, [x, torch.zeros(4, 1, dtype=torch.int64)], F32)
    q = fragment("""
        %i0 : f32[4, 33] batch "i0"
        %a = aten.relu(%i0) : f32[4, 33]
        %m = amax(%a, dims=[1], keepdim=false) : f32[4]
        return %m output "m"
    """)
    check(interpreter, q, [x], 0.0)


@needs.triton
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 40), columns=st.integers(1, 70), p=st.floats(0, 1), seed=st.integers(-5, 1 << 40), step=st.integers(0, 1 << 20))
def test_dropout_draws_the_same_bits(interpreter: Interpreter, rows: int, columns: int, p: float, seed: int, step: int) -> None:
    index = f"[[[{rows}]], [[{2 * columns}, {columns // 2}, {columns}]]]"
    q = fragment(f"""
        %i0 : i64[2] batch "i0"
        %i1 : f32[{rows}, {columns}] batch "i1"
        %a = bernoulli(%i0, p={p!r}, site="layers.0.dropout/0") : f32[{rows}, {columns}]
        %b = bernoulli(%i0, p={p!r}, site="layers.1.dropout/0", index={index}) : f32[{rows}, {columns}]
        %c = aten.mul.Tensor(%i1, %a) : f32[{rows}, {columns}]
        %d = aten.add.Tensor(%c, %b) : f32[{rows}, {columns}]
        return %d output "d"
    """)
    check(interpreter, q, [torch.tensor([seed, step]), torch.full((rows, columns), 2.0)], 0.0)


@needs.triton
def test_integers_and_bool(interpreter: Interpreter) -> None:
    p = fragment("""
        %i0 : i64[5, 6] batch "i0"
        %i1 : bool[6] batch "i1"
        %a = aten.add.Tensor(%i0, %i1, alpha=3) : i64[5, 6]
        %b = aten.gt.Scalar(%a, 2) : bool[5, 6]
        %c = aten.logical_and(%b, %i1) : bool[5, 6]
        %d = sum(%c, dims=[1], keepdim=false) : i64[5]
        %e = amax(%i0, dims=[0], keepdim=true) : i64[1, 6]
        %f = aten.where.self(%c, %i0, %e) : i64[5, 6]
        return %a output "a"
        return %c output "c"
        return %d output "d"
        return %f output "f"
    """)
    check(interpreter, p, [torch.randint(-9, 9, (5, 6)), torch.tensor([True, False, True, True, False, True])], 0.0)


@needs.triton
def test_empty_outputs_need_no_kernel(interpreter: Interpreter) -> None:
    p = softmax(0, 5)
    check(interpreter, p, [torch.randn(0, 5), torch.zeros(0, 1, dtype=torch.int64)], 0.0)
    assert launches(p) == 0


def test_what_cannot_be_written_names_the_op() -> None:
    p = fragment("""
        %i0 : f32[2, 4, 4] batch "i0"
        %a = aten.bmm(%i0, %i0) : f32[2, 4, 4]
        return %a output "a"
    """)
    assert not can_emit(p)
    with pytest.raises(CodegenError, match=r"%a = aten.bmm on f32.*\n  fix"):
        source(p)


def test_blocks_fit_the_registers() -> None:
    for x, r, live in ((1, 64, 3), (4096, 4096, 8), (8192, 8192, 6), (100, 128_000, 4)):
        b = block_sizes(x, r, live, rows=True, reduced=True, partial=False)
        assert b.r >= r or 2 * b.r * live > HELD or b.r == 2048
        assert b.r * live <= HELD and (b.x * b.r * live <= HELD or b.x * b.r <= 1024)
        assert b.x & (b.x - 1) == b.r & (b.r - 1) == 0
    assert block_sizes(10**6, 64, 2, rows=True, reduced=True, partial=True).rows * 256 >= 10**6
    assert chunk_size(10) == 1024 and chunk_size(10**10) == 1 << 16


@pytest.mark.parametrize(("name", "dtype", "sizes", "row"), [
    ("llama_4", "f32", {"head": 2048, "tokens": 1024}, 8192),
    ("llama_4", "f32", {"head": 4096, "tokens": 1024}, 2048),  # two values across the row's sum, the weight, and the weight's gradient: four, where three fit
    ("bert_13", "f32", {"head": 2048, "tokens": 1024}, 8192),
    ("bert_13", "f64", {"head": 1024, "tokens": 1024}, 4096), ("bert_13", "f64", {"head": 2048, "tokens": 1024}, 2048),  # of twice the registers
    ("gpt2_3", "f32", {"head": 8192}, 32768), ("gpt2_3", "f32", {"head": 16384}, 2048), ("gpt2_3", "f64", {"head": 4096}, 16384), ("gpt2_3", "f64", {"head": 8192}, 2048),
    ("llama_3", "f32", {"words": 2000, "tokens": 7}, 2048), ("llama_3", "f32", {"words": 16000, "tokens": 7}, 2048), ("llama_3", "f32", {"words": 16000, "tokens": 1024}, 16384),  # seven rows that are written out
])  # fmt: skip
def test_a_row_is_held_where_it_fits(name: str, dtype: str, sizes: dict[str, int], row: int) -> None:
    """Columns of the blocks of the kernel that reduces the longest rows: the row's, or 2048 where it is read in parts."""
    p = retyped(resized(fragments()[name], rows=8 if sizes.get("tokens") == 1024 else 3, **sizes), dtype)
    assert max(each.blocks.r for each in launched(p) if each.blocks.reduced and each.bytes_read > 1 << 16) == row


@needs.triton
@pytest.mark.parametrize(("inputs", "ops", "made"), [
    ("f32[300, 100]", "%a = sum(%i0, dims=[0], keepdim=true) : f32[1, 100]\n%b = sum(%a, dims=[1], keepdim=true) : f32[1, 1]", "b"),
    ("f32[300, 100]", "%a = sum(%i0, dims=[0], keepdim=true) : f32[1, 100]\n%b = amax(%a, dims=[0, 1], keepdim=false) : f32[]", "ab"),  # parts of parts
    ("f32[33, 33]", "%a = sum(%i0, dims=[1], keepdim=false) : f32[33]\n%b = aten.add.Tensor(%a, %i0) : f32[33, 33]", "b"),  # a row's sum along the columns
    ("f64[5, 5]", "%a = amax(%i0, dims=[0], keepdim=true) : f64[1, 5]\n%c = reshape(%a) : f64[5, 1]\n%b = aten.add.Tensor(%c, %i0) : f64[5, 5]", "b"),
])  # fmt: skip
def test_what_a_sum_is_read_along_is_not_what_it_is_made_along(interpreter: Interpreter, inputs: str, ops: str, made: str) -> None:
    p = fragment(f'%i0 : {inputs} batch "i0"\n{ops}\n' + "".join(f'return %{o} output "{o}"\n' for o in made))
    check(interpreter, p, random_inputs(p), F32 if "f32" in inputs else F64)


@needs.triton
@pytest.mark.parametrize(("programs", "short"), [(256, 1 << 14), (1, 8)])
@pytest.mark.parametrize("dtype", ["f32", "i64"])
def test_the_largest_of_all(interpreter: Interpreter, dtype: str, programs: int, short: int) -> None:
    """By many programs, and by one; a number that no float is, where numbers are whole."""
    p = fragment(f"""
        %i0 : {dtype}[200, 100] batch "i0"
        %m = amax(%i0, dims=[0, 1], keepdim=false) : {dtype}[]
        return %m output "m"
    """)
    x = torch.randn(200, 100) if dtype == "f32" else torch.randint(-(2**62), 2**62, (200, 100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_sizes_module, "PROGRAMS", programs)
        patch.setattr(triton_plans, "SHORT", short)
        patch.setattr(triton_plans, "ALONE", short)
        for known in (source, launched):
            known.cache_clear()
        (got,), _ = interpreter.run(source(p), [x])
    for known in (source, launched):
        known.cache_clear()
    assert torch.equal(got, x.max())


@needs.triton
@pytest.mark.parametrize("rows", [1, 2])
def test_a_lookup_in_a_sum_of_two_tensors(interpreter: Interpreter, rows: int) -> None:
    """In each of them; of one long row both are sums of parts."""
    p = fragment(f"""
        %i0 : f32[{rows}, 32000] batch "i0"
        %i1 : f32[1, 32000] batch "i1"
        %i2 : i64[{rows}, 1] batch "i2"
        %y = aten.add.Tensor(%i0, %i1) : f32[{rows}, 32000]
        %g = gather(%y, %i2, dim=1) : f32[{rows}, 1]
        return %g output "g"
    """)
    check(interpreter, p, [torch.randn(rows, 32000), torch.randn(1, 32000), torch.full((rows, 1), 31999)], 0.0)


@pytest.mark.parametrize(("name", "kernels"), [("update_one", 1), ("t5_8", 1), ("llama_3", 2), ("vit_3", 2)])
def test_what_is_small_comes_with_what_is_large(name: str, kernels: int) -> None:
    """Though it stands first: a count of steps beside an update, labels beside their mask. Behind a loss's kernel is one that divides its sum."""
    assert launches(parse(fragments()[name])) == kernels


@needs.triton
def test_what_lies_between_kernels_of_many_tensors_is_float32(interpreter: Interpreter) -> None:
    """Each of three tensors in 16 bits is scaled by its own sum, a number of 32 bits that another kernel made."""
    p = fragment("".join(f'%i{n} : bf16[40000] batch "i{n}"\n' for n in range(3)) + "".join(f"""
        %s{n} = sum(%i{n}, dims=[0], keepdim=false) : bf16[]
        %n{n} = aten.neg(%s{n}) : bf16[]
        %y{n} = aten.mul.Tensor(%i{n}, %n{n}) : bf16[40000]""" for n in range(3)) + "\n" + "".join(f'return %y{n} output "y{n}"\n' for n in range(3)))
    assert launches(p) < 6 and "table" in source(p)
    inputs = random_inputs(p)
    got, _ = interpreter.run(source(p), inputs)
    for x, y in zip(inputs, got, strict=True):  # rounded once, where it is stored
        assert ulps(y.float(), (x.double() * -x.double().sum()).float(), 2.0**-10) <= 1


def test_every_rank_writes_the_same_source() -> None:
    """Whatever order a process's sets have: compiled kernels are found by their text. Several numbers of complete sums wait to be made here."""
    sums = "\n".join(f"%s{n} = {('sum', 'amax')[n % 2]}(%i{n}, dims=[0], keepdim=false) : f32[] {{}}\n%n{n} = aten.neg(%s{n}) : f32[] {{}}" for n in range(6))
    made = "\n".join(f'%y{n} = aten.mul.Tensor(%i{n}, %n{(n + 1) % 6}) : f32[40000] {{}}' for n in range(6))
    text = "program kernel mesh() facts()\n" + "\n".join(f'%i{n} : f32[40000] batch "i{n}"' for n in range(6)) + f"\n{sums}\n{made}\n" + "".join(f'return %y{n} output "y{n}"\n' for n in range(6))
    code = f"from deepseed.codegen.triton import source\nfrom deepseed.ir.text import parse\nprint(source(parse({text!r})))"
    said = {subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": seed}).stdout for seed in "123"}
    assert len(said) == 1 and "@triton.jit" in said.pop()


@needs.triton
def test_blocks_are_tuned_by_trial(interpreter: Interpreter) -> None:
    """A clock that likes narrow blocks and one warp: what it chooses computes the same."""
    p = parse(fragments()["gpt2_3"])
    tried: list[str] = []

    def seconds(text: str) -> float:
        tried.append(text)
        (x,), (warps,) = re.findall(r"kernel_0\[.*XB=(\d+),", text), re.findall(r"kernel_0\[.*num_warps=(\d+)", text)
        return float(x) + float(warps)

    chosen = tuned(p, seconds)
    (model,) = launched(p)
    assert dict(chosen)[model.kernel].x < model.blocks.x and len(set(tried)) == len(tried)
    inputs = random_inputs(p)
    got, _ = interpreter.run(source(p, chosen), inputs)
    assert all(apart(a, b) <= F32 for a, b in zip(got, reference(p, inputs), strict=True))


@needs.triton
def test_what_was_tuned_is_kept(tmp_path: Path) -> None:
    """By fragment and device: a later call times nothing. Where the ops themselves are faster, that is what is kept."""
    p = parse(fragments()["gpt2_3"])
    k = Kernel("k", p, tuple([contiguous(i.type.shape) for i in p.inputs]), function(p, "k"))
    timed: list[str] = []

    def seconds(text: str) -> float:
        timed.append(text)
        return float(re.findall(r"kernel_0\[.*num_warps=(\d+)", text)[0])

    first = choice(k, tmp_path, "card", seconds, lambda: 100.0, lambda text: "")
    assert first.blocks and not first.library and len(timed) > 1
    assert choice(k, tmp_path, "card", lambda text: pytest.fail("it was timed before"), lambda: pytest.fail("it was timed before"), lambda text: pytest.fail("it was compared before")) == first
    assert choice(k, tmp_path, "another card", seconds, lambda: 1e-3, lambda text: pytest.fail("it does not run")).library
    kept, others = [path for path in tmp_path.iterdir() if path.suffix != ".lock"], len(timed)
    assert len(kept) == 2 and all(path.name.endswith(".blocks.json") for path in kept)
    for torn in ("", '{"blocks": [["kernel_0"', '{"blocks": []}', '[]', '{"blocks": [["kernel_0", {"rows": 4}]], "library": false, "wrong": ""}'):  # a disk that was full
        for path in kept:
            path.write_text(torn)
        assert choice(k, tmp_path, "card", seconds, lambda: 100.0, lambda text: "") == first and len(timed) > others, torn
        others = len(timed)
    assert choice(k, tmp_path, "card", lambda text: pytest.fail("it was timed before"), lambda: 0.0, lambda text: "") == first
    for x, i in zip(operands(k, torch.device("cpu")), p.inputs, strict=True):
        assert x.shape == i.type.shape and x.is_contiguous()


@needs.triton
def test_a_fragment_alone_is_a_function(tmp_path: Path) -> None:
    code = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from triton_fragments import fragments, parse, random_inputs, reference
from deepseed.codegen.triton_files import of_fragment
p = parse(fragments()["gpt2_3"])
given = random_inputs(p)
for a, b in zip(of_fragment(p, Path({str(tmp_path)!r}))(*given), reference(p, given), strict=True):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(tmp_path.glob("*.triton.py"))


@needs.triton
def test_names_of_values_are_free(interpreter: Interpreter) -> None:
    """What a kernel calls its axes and counters may be what a program calls its values."""
    p = fragment("""
        %x : f32[9, 33] batch "x"
        %pid : f32[33] batch "pid"
        %r.in = aten.exp(%x) : f32[9, 33]
        %r = sum(%r.in, dims=[1], keepdim=true) : f32[9, 1]
        %start = aten.div.Tensor(%r.in, %r) : f32[9, 33]
        %tl = aten.mul.Tensor(%start, %pid) : f32[9, 33]
        %n = sum(%tl, dims=[0], keepdim=false) : f32[33]
        return %tl output "tl"
        return %n output "n"
    """)
    check(interpreter, p, random_inputs(p), F32)


@needs.triton
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.sampled_from([1, 2, 5, 37, 300]), columns=st.integers(17, 60), dtype=st.sampled_from(["f32", "f64"]), strided=st.booleans(), seed=st.integers(0, 9),
    outputs=st.lists(st.sampled_from(["w", "t", "u", "z", "q", "y", "v", "k", "l"]), min_size=1, max_size=4, unique=True),
)  # fmt: skip
@example(rows=300, columns=17, dtype="f64", strided=False, seed=0, outputs=["w", "z"])
def test_sums_over_rows_that_are_too_long_for_a_block(
    interpreter: Interpreter, rows: int, columns: int, dtype: str, strided: bool, seed: int, outputs: list[str]
) -> None:
    """Blocks are made short here, so that short rows are too long: softmax of a row and what is summed, or the most, over rows, along columns, and of all."""
    p = softmax_and_sums(rows, columns, outputs, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_sizes_module, "HELD", 31)
        patch.setattr(block_sizes_module, "PROGRAMS", 2)  # of several blocks each
        for known in (source, launched):
            known.cache_clear()
        text = source(p)
        assert outputs == ["q"] or "for first in range" in text
        inputs = random_inputs(p, seed, strided)
        got, traffic = interpreter.run(text, inputs)
        assert traffic.launches == launches(p) <= 3
    for known in (source, launched):
        known.cache_clear()
    assert all(apart(a, b) <= (F32 if dtype == "f32" else F64) for a, b in zip(got, reference(p, inputs), strict=True)), text


def softmax_and_sums(rows: int, columns: int, outputs: list[str], dtype: str) -> Program:
    whole, row, column = f"{dtype}[{rows}, {columns}]", f"{dtype}[{rows}, 1]", f"{dtype}[{columns}]"
    return fragment(f"""
        %i0 : {whole} batch "i0"
        %i1 : {whole} batch "i1"
        %m = amax(%i0, dims=[1], keepdim=true) : {row}
        %a = aten.sub.Tensor(%i0, %m) : {whole}
        %e = aten.exp(%a) : {whole}
        %s = sum(%e, dims=[1], keepdim=true) : {row}
        %y = aten.div.Tensor(%e, %s) : {whole}
        %z = aten.mul.Tensor(%y, %i1) : {whole}
        %w = sum(%z, dims=[0], keepdim=false) : {column}
        %q = sum(%i0, dims=[0], keepdim=false) : {column}
        %l = aten.log(%s) : {row}
        %t = sum(%l, dims=[0, 1], keepdim=false) : {dtype}[]
        %u = sum(%z, dims=[0, 1], keepdim=false) : {dtype}[]
        %v = amax(%z, dims=[0], keepdim=true) : {dtype}[1, {columns}]
        %k = aten.sub.Tensor(%z, %v) : {whole}
        """ + "\n".join(f'return %{o} output "{o}"' for o in outputs))


@needs.triton
def test_the_statistics_of_a_long_row_are_read_in_one_pass(interpreter: Interpreter) -> None:
    """Maximum and sum of a row together; what is not finite is what two passes make it."""
    columns = longest_row(1) + 5
    p = fragment(f"""
        %i0 : f32[4, {columns}] batch "i0"
        %m = amax(%i0, dims=[1], keepdim=true) : f32[4, 1]
        %a = aten.sub.Tensor(%i0, %m) : f32[4, {columns}]
        %e = aten.exp(%a) : f32[4, {columns}]
        %s = sum(%e, dims=[1], keepdim=true) : f32[4, 1]
        return %s output "s"
        return %m output "m"
    """)
    x = torch.randn(4, columns) * 9
    x[1, 7:], x[2], x[3, 11], x[3, 9] = float("-inf"), float("-inf"), float("inf"), float("-inf")
    got, traffic = interpreter.run(source(p), [x])
    assert traffic.read == {0: x.nbytes} and traffic.launches == 1
    assert all(apart(a, b) <= F32 for a, b in zip(got, reference(p, [x]), strict=True))


@needs.triton
def test_a_kernel_runs_on_the_device_of_its_operands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With several devices a launch is guarded; with one it is the launch itself."""
    inside: list[object] = []

    class Device:
        def __init__(self, device: object) -> None:
            self.device = device

        def __enter__(self) -> None:
            inside.append(self.device)

        def __exit__(self, *error: object) -> None:
            inside.append(None)

    monkeypatch.setattr(torch.cuda, "device", Device)
    text = "def launch(x):\n    return (x + 1,)\n"
    x = torch.ones(2)
    for devices, want in ((1, []), (2, [x.device, None])):
        monkeypatch.setattr(torch.cuda, "device_count", lambda devices=devices: devices)
        (y,) = launch_of("one", text, tmp_path)(x)
        assert torch.equal(y, x + 1) and inside == want


@needs.triton
def test_kernels_without_a_choice_are_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel over all parameters has no blocks to try, and its operands would be a second model; where memory ends, the model's blocks are taken."""
    casts = fragment("""
        %i0 : f32[5, 6] batch "i0"
        %i1 : f32[7] batch "i1"
        %a = cast(%i0) : bf16[5, 6]
        %b = cast(%i1) : bf16[7]
        return %a output "a"
        return %b output "b"
    """)
    many, one = (Kernel("k", p, tuple([contiguous(i.type.shape) for i in p.inputs]), function(p, "k")) for p in (casts, parse(fragments()["gpt2_3"])))

    def none(*_: object) -> list[Tensor]:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(triton_files, "operands", none)
    said: list[str] = []
    triton_files.compiled([many], tmp_path, said.append)
    assert not said and launches(casts) == 1
    triton_files.compiled([one], tmp_path, said.append)
    assert len(said) == 1 and "no memory" in said[0]
