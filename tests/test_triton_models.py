"""Every kernel of the training programs of five architectures: its numbers in the interpreter are the reference's, and it moves what ``explain`` says."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from functools import cache
from math import isqrt
from typing import Any

import needs
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_triton import RESIZED, apart, ulps
from torch import nn
from triton_fragments import fragments, random_inputs, reference, resized, retyped
from triton_worker import Interpreter

from deepseed.asked import passed
from deepseed.capture import capture
from deepseed.codegen.triton import can_emit, launched, launches, source
from deepseed.ir.fragment import fragment, groups
from deepseed.ir.program import Program
from deepseed.ir.text import parse
from deepseed.pipeline import EACH_RANK, SHARED, run
from deepseed.plan import parse_plan

pytestmark = needs.triton
MODELS = ("llama", "gpt2", "bert", "t5", "vit")
SUMS = ("aten.mm", "sdpa", "sdpa_backward")  # many numbers make one: errors are of the largest


def side(tokens: int) -> int:
    """Of a picture whose patches are about as many."""
    return 4 * max(3, isqrt(tokens))


def model(name: str, heads: int, head: int, inner: int, words: int, tokens: int = 9) -> nn.Module:
    import transformers as hf

    width = heads * head
    common = {"vocab_size": words, "hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": 2, "intermediate_size": inner}
    with torch.device("meta"):
        match name:
            case "llama":
                return hf.LlamaForCausalLM(hf.LlamaConfig(**common, num_key_value_heads=1))
            case "gpt2":
                return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=words, n_positions=64, n_embd=width, n_layer=2, n_head=heads, n_inner=inner))
            case "bert":
                return hf.BertForMaskedLM(hf.BertConfig(**common, max_position_embeddings=64))
            case "t5":
                return hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=words, d_model=width, d_kv=head, d_ff=inner, num_layers=1, num_heads=heads, decoder_start_token_id=0))
        sizes = {k: v for k, v in common.items() if k != "vocab_size"}
        return hf.ViTForImageClassification(hf.ViTConfig(**sizes, image_size=side(tokens), patch_size=4, num_labels=7))


def batch(name: str, rows: int, tokens: int) -> dict[str, Any]:
    if name == "vit":
        return {"pixel_values": torch.empty(rows, 3, side(tokens), side(tokens), device="meta"), "labels": torch.empty(rows, dtype=torch.int64, device="meta")}
    ids = torch.empty(rows, tokens, dtype=torch.int64, device="meta")
    return {"input_ids": ids, "labels": ids}


@cache
def program_of(name: str, rows: int, tokens: int, heads: int, head: int, inner: int, words: int) -> Program:
    """The step with clipping and AdamW."""
    m = model(name, heads, head, inner, words, tokens)
    m.train()
    got = capture(m, batch(name, rows, tokens), optimizer=torch.optim.AdamW(m.parameters(), lr=1e-3), clip_grad_norm=1.0)
    plan = parse_plan("zero0")
    p = passed(got.program, plan, plan.mesh(1), 0.0, list(SHARED), check=False, kernels=True, products="joined")[-1].program
    return run(p, {"localize": {"coordinate": {}}}, EACH_RANK, check=False)[-1].program


@cache
def fragments_of(name: str, *sizes: int) -> tuple[Program, ...]:
    """Each once."""
    p = program_of(name, *sizes)
    return tuple(dict.fromkeys(fragment(p, g) for g in groups(p)))


ODD = (2, 7, 3, 10, 44, 52)
SIZES = [pytest.param(name, ODD, marks=() if name in ("llama", "gpt2") else pytest.mark.wide) for name in MODELS]


def error(p: Program, got: torch.Tensor, want: torch.Tensor) -> float:
    if any(op.target in SUMS for op in p.ops):
        return float((got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1.0))
    return apart(got, want)


def determined(p: Program, given: Program, seed: int, strided: bool, far: Callable[[torch.Tensor, torch.Tensor], float], most: float) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
    """Inputs of ``given`` of which float32 itself makes what float64 does, to ``most``, and what it makes: a norm of two that nearly agree, or a gelu of -5 and nothing else, has few of their digits. The last of a hundred draws
    where none is so: nothing is skipped."""
    exactly = retyped(p, "f64")
    for drawn in range(seed, seed + 100):
        inputs = random_inputs(given, drawn, strided)
        want, exact = (reference(q, [x.to(dtype) if x.is_floating_point() else x for x in inputs]) for q, dtype in ((p, torch.float32), (exactly, torch.float64)))
        if all(far(a, b) <= most for a, b in zip(want, exact, strict=True) if a.is_floating_point() and a.numel()):
            break
    return inputs, want


def check(interpreter: Interpreter, p: Program, seed: int = 0, strided: bool = False) -> None:
    """float32 against the python back end, to 1e-5, on numbers that float32 determines to half of that."""
    inputs, want = determined(p, p, seed, strided, lambda a, b: error(p, a, b), 5e-6)
    got, _ = interpreter.run(source(p), inputs)
    for o, a, b in zip(p.outputs, got, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (found := error(p, a, b)) <= 1e-5, f"%{o.ref.name}: {found:.1e}\n{p}\n{source(p)}"


def check_narrow(interpreter: Interpreter, p: Program, seed: int = 0, strided: bool = False) -> None:
    """bfloat16 within 2 units of the last place of what float32 makes of the same numbers, which determines them to an eighth of a unit; where numbers cancel, or a later kernel reads an output, units
    of the largest."""
    short = retyped(p, "bf16")
    least = 2.0**-10 if launches(short) == 1 and not any(op.target in SUMS for op in p.ops) else 1.0
    inputs, want = determined(p, short, seed, strided, lambda a, b: ulps(a, b, least), 0.125)
    got, _ = interpreter.run(source(short), inputs)
    for o, a, b in zip(short.outputs, got, want, strict=True):
        if a.dtype == torch.bfloat16 and a.numel():
            assert (found := ulps(a.float(), b.float(), least)) <= 2, f"%{o.ref.name}: {found}\n{short}\n{source(short)}"


@pytest.mark.parametrize(("name", "sizes"), SIZES)
def test_every_kernel_of_a_training_program(interpreter: Interpreter, name: str, sizes: tuple[int, ...]) -> None:
    found = fragments_of(name, *sizes)
    assert len(found) > 20 and {op.target for p in found for op in p.ops} >= {"aten.mm"}
    for n, p in enumerate(found):
        assert can_emit(p), p
        check(interpreter, p)
        if n % 3 == 0:
            check_narrow(interpreter, p)


@pytest.mark.parametrize(("name", "sizes"), SIZES)
def test_no_product_is_left_to_the_library(name: str, sizes: tuple[int, ...]) -> None:
    """A bias, and the activation behind it, are added by the product's kernel, or by the one that reads the row next."""
    p = program_of(name, *sizes)
    assert {op.target for op in p.ops if not op.kernel}.isdisjoint({"aten.mm", "aten.addmm"})
    biased = [op for op in p.ops if op.target == "aten.add.Tensor" and any(p.producers[r.name].target == "aten.mm" for r in op.refs if r.name in p.producers) and len(p.types[op.refs[-1].name].shape) == 1]
    assert len(biased) == {"llama": 0, "gpt2": 8, "bert": 14, "t5": 0, "vit": 13}[name]
    curved = [op for op in p.ops if op.target in ("aten.gelu", "aten.tanh") and op.phase == "forward" and op.path.count(".") > 1]
    with_product = [op for op in curved if {"aten.mm", "aten.add.Tensor"} <= {each.target for each in p.ops if each.kernel == op.kernel}]
    assert len(with_product) == {"llama": 0, "gpt2": 2, "bert": 2, "t5": 0, "vit": 2}[name]


@pytest.mark.wide
@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 3), tokens=st.integers(1, 9), heads=st.integers(1, 3), head=st.sampled_from([2, 6, 10]), inner=st.integers(1, 50), words=st.integers(2, 60),
    strided=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
def test_every_kernel_at_drawn_sizes(
    interpreter: Interpreter, name: str, rows: int, tokens: int, heads: int, head: int, inner: int, words: int, strided: bool, seed: int
) -> None:
    for p in fragments_of(name, rows, tokens, heads, head, inner, words):
        check(interpreter, p, seed, strided)
        check_narrow(interpreter, p, seed, strided)


ABOVE = {  # groups that read more than inputs and outputs once, by the ops at their end
    ("aten.clamp", *["aten.mul.Tensor"] * 5): "numbers of many tensors: their addresses",
    ("slice", "slice", "aten.sub.Tensor", "aten.ne.Scalar"): "each position beside the one before it: two loads of a few numbers",
    ("aten.eq.Tensor", "aten.bitwise_and.Tensor", "full", "full", "aten.where.self"): "a row's number against a column's: two loads of a few numbers",
}


@pytest.mark.parametrize(("name", "sizes"), SIZES)
def test_a_group_moves_what_is_said(interpreter: Interpreter, name: str, sizes: tuple[int, ...]) -> None:
    """Loads and stores that the interpreter runs, each address once a load: as explain says, and inputs and outputs once but for the parts of sums and what ABOVE names."""
    for p in fragments_of(name, *sizes):
        moves_what_is_said(interpreter, p, random_inputs(p))


def moves_what_is_said(interpreter: Interpreter, p: Program, inputs: list[torch.Tensor], loops: int = 1) -> None:
    """``loops``: how many times rows are read at most."""
    _, traffic = interpreter.run(source(p), inputs)
    read, written = sum(each.bytes_read for each in launched(p)), sum(each.bytes_written for each in launched(p))
    assert (sum(traffic.once.values()), traffic.written) == (read, written), f"{traffic}\n{p}\n{source(p)}"
    targets = tuple(op.target for op in p.ops)
    if any(targets[-len(end) :] == end for end in ABOVE):
        return
    least = sum(p.types[v].nbytes for v in {i.name for i in p.inputs}), sum(p.types[v].nbytes for v in {o.ref.name for o in p.outputs})
    parts = traffic.once.get(-1, 0) if launches(p) > 1 else 0  # what the first kernel leaves for the next
    assert read <= loops * least[0] + parts and written <= least[1] + parts, f"read {read}, least {least[0]}; written {written}, least {least[1]}\n{p}\n{source(p)}"
    if loops == 1 and not any(op.target in SUMS for op in p.ops):
        assert traffic.again == 0, f"a program reads {traffic.again} bytes twice\n{p}\n{source(p)}"


@pytest.mark.parametrize("name", ["gpt2_6", "bert_13"])
def test_sums_of_a_row_that_wait_for_none_stand_together(name: str) -> None:
    """Nothing of a row that waits for the first is made before the second: registers of one more row spilled for three gradients in front of a norm's backward."""
    found = 0
    for kernel in source(resized(fragments()[name], rows=1, tokens=3, head=64, inner=64, words=320)).split("@triton.jit")[1:]:
        lines = [line.strip() for line in kernel.splitlines()]
        sums = [n for n, line in enumerate(lines) if re.fullmatch(r"\w+ = tl\.sum\(.*, 1, keep_dims=True\)", line)]
        for first, second in itertools.pairwise(sums):
            waiting = {lines[first].partition(" ")[0]}
            for line in lines[first + 1 : second]:
                made, _, made_of = line.partition(" = ")
                if waiting & set(re.findall(r"\w+", made_of)):
                    waiting.add(made)
            if not waiting & set(re.findall(r"\w+", lines[second].partition(" = ")[2])):
                found += 1
                assert waiting == {lines[first].partition(" ")[0]}, kernel
    assert found


APART = {"llama_7": "cos and sin, by a kernel of q's heads and one of k's: two groups in a program", "gpt2_0": "a row's number against a column's, as in ABOVE"}
NORMS = ("llama_4", "gpt2_6", "bert_13")  # backward, with the sums over rows: what holds most
LOGITS = ("llama_3", "bert_7", "t5_15")  # of a cross entropy and its gradient, as ops that no pass has made simpler


def of_a_real_model(interpreter: Interpreter, p: Program, loops: int = 1) -> None:
    inputs = random_inputs(p)
    moves_what_is_said(interpreter, p, inputs, loops)
    got, _ = interpreter.run(source(p), inputs)
    assert all(apart(a, b) <= 1e-5 for a, b in zip(got, reference(p, inputs), strict=True)), source(p)


@pytest.mark.parametrize("name", [n if n in (*NORMS, "llama_3") else pytest.param(n, marks=pytest.mark.wide) for n in RESIZED if n not in APART])
@pytest.mark.parametrize("width", [pytest.param(4096, marks=pytest.mark.wide), 8192])
def test_rows_of_real_models_are_read_once(interpreter: Interpreter, name: str, width: int) -> None:
    """Hidden sizes of 4096 and 8192: a row is held in registers, and so are the sums over rows of a norm's backward. Logits that wait for a second long value are read twice."""
    p = resized(fragments()[name], rows=1, tokens=3, head=width // 4, inner=14336, words=32000 if name in LOGITS else 320)
    of_a_real_model(interpreter, p, loops=1 + (name in LOGITS))


@pytest.mark.parametrize(("words", "loops"), [(32000, 1), (50257, 2)])
def test_logits_and_their_gradient_are_one_kernel(interpreter: Interpreter, words: int, loops: int) -> None:
    """A chunk's loss and gradient, as the pipeline leaves them: rows of 32000 logits are held; longer ones are read for the maximum and the sum, with the label's, and for the gradient."""
    p = parse(f"""
        program kernel mesh() facts()
        %i0 : f32[3, {words}] batch "i0"
        %i1 : i64[3, 1] batch "i1"
        %i2 : f32[3, 1] batch "i2"
        %v0 = amax(%i0, dims=[1], keepdim=true) : f32[3, 1] {{}}
        %v1 = aten.sub.Tensor(%i0, %v0) : f32[3, {words}] {{}}
        %v2 = aten.exp(%v1) : f32[3, {words}] {{}}
        %v3 = sum(%v2, dims=[1], keepdim=true) : f32[3, 1] {{}}
        %v4 = aten.log(%v3) : f32[3, 1] {{}}
        %v5 = aten.sub.Tensor(%v1, %v4) : f32[3, {words}] {{}}
        %v6 = gather(%v5, %i1, dim=1) : f32[3, 1] {{}}
        %v7 = full(value=0.0) : f32[3, {words}] {{}}
        %v8 = scatter_add(%v7, %i1, %i2, dim=1) : f32[3, {words}] {{}}
        %v9 = aten.exp(%v5) : f32[3, {words}] {{}}
        %v10 = aten.mul.Tensor(%v9, %i2) : f32[3, {words}] {{}}
        %v11 = aten.sub.Tensor(%v8, %v10) : f32[3, {words}] {{}}
        return %v6 output "v6"
        return %v11 output "v11"
    """.replace("        ", ""))
    assert launches(p) == 1
    of_a_real_model(interpreter, p, loops)
    assert launched(p)[0].bytes_read == 3 * (loops * 4 * words + 8 + 4)


def test_the_loss_of_long_rows_reads_logits_once(interpreter: Interpreter) -> None:
    """Maximum, sum and the label's logit in one loop: what is looked up in a log-softmax waits for neither."""
    p = parse("""program kernel mesh() facts()
%i0 : f32[3, 50257] batch "i0"
%i1 : i64[3, 1] batch "i1"
%v0 = amax(%i0, dims=[1], keepdim=true) : f32[3, 1] {}
%v1 = aten.sub.Tensor(%i0, %v0) : f32[3, 50257] {}
%v2 = aten.exp(%v1) : f32[3, 50257] {}
%v3 = sum(%v2, dims=[1], keepdim=true) : f32[3, 1] {}
%v4 = aten.log(%v3) : f32[3, 1] {}
%v5 = aten.sub.Tensor(%v1, %v4) : f32[3, 50257] {}
%v6 = gather(%v5, %i1, dim=1) : f32[3, 1] {}
return %v6 output "v6"
""")
    assert "for first in range" in source(p) and launches(p) == 1
    of_a_real_model(interpreter, p)


LONG = {  # results that wait for no sum of their row, and sums that wait for none: one loop has them all
    "a result beside its maximum": '%v0 = aten.silu(%i0) : f32[2, 40000]\n%v1 = amax(%v0, dims=[1], keepdim=true) : f32[2, 1]\nreturn %v0 output "v0"\nreturn %v1 output "v1"',
    "a sum and its squares": '%v0 = aten.add.Tensor(%i0, %i1) : f32[2, 40000]\n%v1 = aten.mul.Tensor(%v0, %v0) : f32[2, 40000]\n%v2 = sum(%v1, dims=[1], keepdim=true) : f32[2, 1]\nreturn %v0 output "v0"\nreturn %v2 output "v2"',
}


@pytest.mark.parametrize("case", LONG)
def test_what_waits_for_no_sum_is_stored_where_the_row_is_read(interpreter: Interpreter, case: str) -> None:
    inputs = "".join(f'%{i} : f32[2, 40000] batch "{i}"\n' for i in ("i0", "i1") if f"%{i}" in LONG[case])
    lines = [f"{line} {{}}" if " = " in line else line for line in LONG[case].splitlines()]
    p = parse("program kernel mesh() facts()\n" + inputs + "\n".join(lines) + "\n")
    assert "for first in range" in source(p) and launches(p) == 1
    of_a_real_model(interpreter, p)
