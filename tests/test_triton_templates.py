"""Templates in the interpreter: a matrix product with what follows it, and attention with its backward, against float64."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_fragments import DTYPES, reference, retyped
from triton_worker import Interpreter

from deepseed.codegen.block_sizes import candidates
from deepseed.codegen.expressions import CodegenError
from deepseed.codegen.triton import can_emit, launched, launches, source
from deepseed.ir.program import Program
from deepseed.ir.text import parse

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install 'deepseed[triton]'")
WITHIN = {"f64": 1e-12, "f32": 1e-5, "f16": 2.0**-10, "bf16": 2.0**-7}  # of the largest number: 16 bits are rounded once


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    process = Interpreter()
    yield process
    process.close()


def drawn(shape: tuple[int, ...], dtype: str, g: torch.Generator, strided: bool = False) -> Tensor:
    x = torch.randn((*shape[:-1], shape[-1] * (1 + strided)), generator=g, dtype=torch.float64).to(DTYPES[dtype])
    return x[..., ::2] if strided else x


def apart(got: Tensor, want: Tensor) -> float:
    """Of the largest number."""
    assert got.shape == want.shape
    return float((got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-30))


EPILOGUES = {
    "none": "",
    "bias": "%e = aten.add.Tensor(%p, %i2) : {t}[{m}, {n}] {{}}",
    "gelu": "%a = aten.add.Tensor(%p, %i2) : {t}[{m}, {n}] {{}}\n%e = aten.gelu(%a) : {t}[{m}, {n}] {{}}",
    "swiglu": "%a = aten.silu(%p) : {t}[{m}, {n}] {{}}\n%e = aten.mul.Tensor(%a, %i3) : {t}[{m}, {n}] {{}}",
    "residual": "%a = reshape(%p) : {t}[1, {m}, {n}] {{}}\n%b = reshape(%i3) : {t}[1, {m}, {n}] {{}}\n%e = aten.add.Tensor(%a, %b) : {t}[1, {m}, {n}] {{}}",
    "rows": "%e = aten.mul.Tensor(%p, %i4) : {t}[{m}, {n}] {{}}",
    "dropout": '%a = bernoulli(%i5, p=0.5, site="a") : {t}[{m}, {n}] {{}}\n%e = aten.mul.Tensor(%p, %a) : {t}[{m}, {n}] {{}}',
    "cast": "%e = cast(%p) : f64[{m}, {n}] {{}}",
}


def product(m: int, k: int, n: int, dtype: str, epilogue: str) -> Program:
    lines = EPILOGUES[epilogue].format(t=dtype, m=m, n=n)
    inputs = [f"{dtype}[{m}, {k}]", f"{dtype}[{k}, {n}]", f"{dtype}[{n}]", f"{dtype}[{m}, {n}]", f"{dtype}[{m}, 1]", "i64[2]"]
    text = "".join(f'%i{i} : {t} batch "i{i}"\n' for i, t in enumerate(inputs))
    return parse(f"program kernel mesh() facts()\n{text}%p = aten.mm(%i0, %i1) : {dtype}[{m}, {n}] {{}}\n{lines}\nreturn %{'e' if lines else 'p'} output \"e\"\n")


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.integers(1, 70), k=st.integers(1, 70), n=st.integers(1, 70), dtype=st.sampled_from(sorted(WITHIN)), epilogue=st.sampled_from(sorted(EPILOGUES)),
    strided=st.booleans(), turned=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
@example(m=300, k=33, n=70, dtype="f64", epilogue="residual", strided=False, turned=True, seed=0)  # more blocks than one group of programs
def test_a_product_and_what_follows_it(
    interpreter: Interpreter, m: int, k: int, n: int, dtype: str, epilogue: str, strided: bool, turned: bool, seed: int
) -> None:
    p = product(m, k, n, dtype, epilogue)
    g = torch.Generator().manual_seed(seed)
    inputs = [torch.tensor([seed, 3]) if i.type.dtype == "i64" else drawn(i.type.shape, dtype, g, strided) for i in p.inputs]
    if turned:
        inputs[1] = inputs[1].t().contiguous().t()
    (got,), traffic = interpreter.run(source(p), inputs)
    (want,) = reference(retyped(p, "f64") if dtype == "f32" else parse(str(p).replace(dtype, "f64")), [x if x.dtype == torch.int64 else x.double() for x in inputs])
    assert got.dtype == DTYPES["f64" if epilogue == "cast" else dtype]
    assert apart(got, want) <= WITHIN["f32" if epilogue == "cast" and dtype != "f64" else dtype], source(p)
    (launch,) = launched(p)
    assert traffic.launches == 1 and traffic.again == 0
    assert launch.bytes_written == traffic.written == got.nbytes and launch.bytes_read == sum(traffic.once.values())


def test_products_that_no_kernel_makes_are_refused() -> None:
    two = parse('program kernel mesh() facts()\n%i0 : f32[4, 4] batch "i0"\n%a = aten.mm(%i0, %i0) : f32[4, 4] {}\n%b = aten.mm(%a, %i0) : f32[4, 4] {}\nreturn %b output "b"\n')
    rows = parse('program kernel mesh() facts()\n%i0 : f32[4, 4] batch "i0"\n%a = aten.mm(%i0, %i0) : f32[4, 4] {}\n%b = sum(%a, dims=[1], keepdim=true) : f32[4, 1] {}\nreturn %b output "b"\n')
    mixed = parse('program kernel mesh() facts()\n%i0 : f32[4, 4] batch "i0"\n%i1 : i64[4, 4] batch "i1"\n%a = aten.mm(%i1, %i1) : i64[4, 4] {}\nreturn %a output "a"\n')
    for p in (two, rows, mixed):
        assert not can_emit(p)
        with pytest.raises(CodegenError, match=r"%\w+ = aten.mm.*\n  fix"):
            source(p)


def test_more_heads_than_a_grid_has_are_refused() -> None:
    """Of its second axis; they run as Python."""
    for p in attention(2049, 32, 1, 16, 16, 16, 16, "none", True, "bf16"):
        with pytest.raises(CodegenError, match=r"65535 heads(.|\n)*fix"):
            source(p)


# attention ------------------------------------------------------------------------------------------------------------


def attention(b: int, h: int, group: int, s: int, t: int, d: int, e: int, mask: str, causal: bool, dtype: str) -> tuple[Program, Program]:
    """The op and its backward."""
    seen = f'%m : {"bool" if mask == "bool" else dtype}[{b}, 1, {s}, {t}] batch "m"\n' if mask != "none" else ""
    q, k, v, out = (f"{dtype}[{b}, {heads}, {n}, {f}]" for heads, n, f in ((h, s, d), (h // group, t, d), (h // group, t, e), (h, s, e)))
    lse = f"{'f64' if dtype == 'f64' else 'f32'}[{b}, {h}, {s}]"
    given = f'%q : {q} batch "q"\n%k : {k} batch "k"\n%v : {v} batch "v"\n{seen}'
    said = f"{'%m' if seen else 'none'}, causal={str(causal).lower()}, scale=0.4"
    forward = f"program kernel mesh() facts()\n{given}%out, %lse = sdpa(%q, %k, %v, {said}) : {out}, {lse} {{}}\nreturn %out output \"out\"\nreturn %lse output \"lse\"\n"
    ask = f"{'%m' if seen else 'none'}, %out, %lse, causal={str(causal).lower()}, scale=0.4"
    backward = (
        f'program kernel mesh() facts()\n%g : {out} batch "g"\n{given}%out : {out} batch "out"\n%lse : {lse} batch "lse"\n'
        f"%dq, %dk, %dv = sdpa_backward(%g, %q, %k, %v, {ask}) : {q}, {k}, {v} {{}}\n" + "".join(f'return %{x} output "{x}"\n' for x in ("dq", "dk", "dv"))
    )
    return parse(forward), parse(backward)


@pytest.mark.parametrize("rows", [1, 16, 40])
def test_blocks_that_are_tried_are_a_matrix_units(rows: int) -> None:
    """Sixteen rows and columns at least: the compiler refuses fewer in 16 bits, which only a device would show."""
    for p in (*attention(1, 2, 1, rows, rows, 64, 64, "none", True, "bf16"), product(rows, 64, rows, "bf16", "none")):
        for each in launched(p):
            tried = candidates(each.blocks)
            assert len(tried) > 1 and all(min(blocks.x, blocks.r) >= 16 for blocks in tried)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    b=st.integers(1, 2), heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]), s=st.integers(1, 40), t=st.integers(1, 40), d=st.sampled_from([1, 8, 16, 20]),
    e=st.sampled_from([8, 16]), mask=st.sampled_from(["none", "bool", "bias"]), causal=st.booleans(), dtype=st.sampled_from(sorted(WITHIN)), seed=st.integers(0, 9),
)  # fmt: skip
@example(b=1, heads=(2, 2), s=140, t=140, d=16, e=16, mask="none", causal=True, dtype="f64", seed=0)  # several blocks each way
@example(b=1, heads=(1, 1), s=40, t=1, d=8, e=16, mask="bool", causal=False, dtype="f32", seed=0)  # rows without a key
def test_attention_forward_and_backward(
    interpreter: Interpreter, b: int, heads: tuple[int, int], s: int, t: int, d: int, e: int, mask: str, causal: bool, dtype: str, seed: int
) -> None:
    """Against autograd in float64; a row that sees no key gives zeros, and none of its own."""
    forward, backward = attention(b, heads[0], heads[1], s, t, d, e, mask, causal, dtype)
    g = torch.Generator().manual_seed(seed)
    q, k, v = (drawn(forward.types[x].shape, dtype, g).transpose(1, 2).contiguous().transpose(1, 2) for x in "qkv")
    grad = drawn(forward.types["out"].shape, dtype, g)
    masks = []
    if mask == "bool":
        masks = [torch.rand(b, 1, s, t, generator=g) > 0.3]
    if mask == "bias":
        masks = [drawn((b, 1, s, t), dtype, g)]
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    scores = wide[0] @ wide[1].repeat_interleave(heads[1], 1).mT * 0.4
    if masks:
        scores = scores.masked_fill(~masks[0], float("-inf")) if mask == "bool" else scores + masks[0].double()
    if causal:
        scores = scores.masked_fill(~torch.ones(s, t, dtype=torch.bool).tril(), float("-inf"))
    none = (scores == float("-inf")).all(-1, keepdim=True)
    probabilities = torch.softmax(scores.masked_fill(none, 0.0), -1).masked_fill(none, 0.0)
    want = probabilities @ wide[2].repeat_interleave(heads[1], 1)
    grads = torch.autograd.grad(want, wide, grad.double())
    (out, lse), traffic = interpreter.run(source(forward), [q, k, v, *masks])
    assert traffic.launches == launches(forward) == 1
    within = WITHIN[dtype] * (4 if dtype in ("f16", "bf16") else 1)  # probabilities are rounded too
    assert apart(out, want.detach()) <= within
    assert apart(lse, torch.logsumexp(scores.detach(), -1).masked_fill(none[..., 0], 0.0)) <= WITHIN["f64" if dtype == "f64" else "f32"]
    got, traffic = interpreter.run(source(backward), [grad, q, k, v, *masks, out, lse])
    assert traffic.launches == launches(backward) == 2
    most = max(float(x.abs().max()) for x in grads)
    for name, mine, theirs in zip(("dq", "dk", "dv"), got, grads, strict=True):
        assert mine.dtype == DTYPES[dtype] and mine.shape == theirs.shape
        assert float((mine.double() - theirs).abs().max()) <= 2 * within * most, f"{name}\n{source(backward)}"
    again, _ = interpreter.run(source(backward), [grad, q, k, v, *masks, out, lse])
    assert all(torch.equal(x, y) for x, y in zip(got, again, strict=True))
