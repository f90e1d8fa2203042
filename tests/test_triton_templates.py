"""Templates in the interpreter: a matrix product with what follows it, and attention with its backward, against float64."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import needs
import pytest
import torch
from far_strides import Far
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_fragments import DTYPES, reference, retyped
from triton_worker import Interpreter

from deepseed.codegen.block_sizes import Blocks, candidates
from deepseed.codegen.expressions import CodegenError
from deepseed.codegen.triton import can_emit, launched, launches, source
from deepseed.ir.program import Program
from deepseed.ir.text import parse

pytestmark = needs.triton
WITHIN = {"f64": 1e-12, "f32": 1e-5, "f16": 2.0**-10, "bf16": 2.0**-7}  # of the largest number: 16 bits are rounded once


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
    "curve": "%h = aten.add.Tensor(%i3, %i2) : {t}[{m}, {n}] {{}}\n%a = aten.tanh(%h) : {t}[{m}, {n}] {{}}\n%b = aten.tanh_backward(%p, %a) : {t}[{m}, {n}] {{}}\n%c = aten.mul.Tensor(%p, %a) : {t}[{m}, {n}] {{}}\n%d = aten.mul.Tensor(%b, %h) : {t}[{m}, {n}] {{}}\n%e = aten.add.Tensor(%d, %c) : {t}[{m}, {n}] {{}}",
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


def test_what_follows_a_product_has_registers() -> None:
    """Of gelu's backward four values are held at once, the product, what gelu was of, its curve and the first summand; of the others three at most."""
    blocks = {e: launched(product(4096, 4096, 4096, "bf16", e))[0].blocks for e in EPILOGUES}
    assert blocks.pop("curve") == Blocks(128, 64, 8, k=64, least=16)
    assert set(blocks.values()) == {Blocks(128, 128, 8, k=64, least=16)}
    assert launched(product(4096, 4096, 4096, "f32", "curve"))[0].blocks == Blocks(64, 64, 4, k=32, least=16)


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


def mask_shape(letters: str, b: int, h: int, s: int, t: int) -> tuple[int, ...]:
    return tuple([{"b": b, "h": h, "s": s, "t": t, "1": 1}[x] for x in letters])


def attention(b: int, h: int, group: int, s: int, t: int, d: int, e: int, mask: str, causal: bool, dtype: str, shape: str = "b1st") -> tuple[Program, Program]:
    """The op and its backward. ``shape``: of the mask, a letter a dimension."""
    seen = f'%m : {"bool" if mask == "bool" else dtype}{list(mask_shape(shape, b, h, s, t))} batch "m"\n' if mask != "none" else ""
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


UNIT = {"bf16": 2.0**-8, "f16": 2.0**-11, "f32": 0.0, "f64": 0.0}  # of a number that is rounded to 16 bits, relative; numbers of 32 and 64 bits are not rounded on the way
LEAST = {"bf16": 0.0, "f16": 2.0**-25, "f32": 0.0, "f64": 0.0}  # of a number that is too small for 11 bits, absolute; a bfloat16's exponent is a float32's


class Attended:
    """Attention in float64, and of each number of a result how far rounding may take it: sums of n numbers in float32 (float64) are off by n units of the sum of their sizes;
    probabilities and gradients of scores that a matrix unit multiplies are rounded to 16 bits once, and so is the result."""

    def __init__(self, p: Program, given: dict[str, Tensor]) -> None:
        op = p.ops[0]
        self.dtype = p.types["q"].dtype
        self.unit, self.least, self.wide = UNIT[self.dtype], LEAST[self.dtype], 2.0 ** -(53 if self.dtype == "f64" else 24)
        self.q, k, v = (given[x].double() for x in "qkv")
        self.group, self.scale = self.q.shape[1] // k.shape[1], float(op.kw("scale"))
        self.k, self.v = k.repeat_interleave(self.group, 1), v.repeat_interleave(self.group, 1)
        self.scores = self.q @ self.k.mT * self.scale
        size = (self.q.shape[-1] + 4) * self.q.abs() @ self.k.abs().mT * self.scale
        self.seen = torch.ones(self.scores.shape, dtype=torch.bool)
        if (mask := given.get("m")) is not None:
            if mask.dtype == torch.bool:
                self.seen = self.seen & mask
            else:
                self.scores, size = self.scores + mask.double(), size + mask.double().abs()
        if op.kw("causal"):
            self.seen = self.seen.tril()
        self.scores = self.scores.masked_fill(~self.seen, float("-inf"))
        none = ~self.seen.any(-1)
        self.lse = torch.logsumexp(self.scores.masked_fill(none[..., None], 0.0), -1).masked_fill(none, 0.0)
        self.p = torch.exp(self.scores - self.lse[..., None])
        self.out = self.p @ self.v
        size = size.masked_fill(~self.seen, 0.0)
        self.error = self.wide * (size + self.lse.abs()[..., None] + 16)  # of a probability, relative
        self.sum = self.wide * (3 * k.shape[2] + 16)  # of a row's sum that is rescaled once a block

    def rounded(self, want: Tensor, off: Tensor) -> Tensor:
        """How far a result may be off: rounded once more where it has 16 bits, and to float32 otherwise."""
        unit = self.unit or self.wide
        return off + unit * (want.abs() + off) + self.least

    def forward(self) -> tuple[Tensor, Tensor]:
        """Bounds of out and lse."""
        each = self.p * (self.unit + 2 * self.error.amax(-1, keepdim=True) + self.sum) + self.least * self.seen
        return self.rounded(self.out, each @ self.v.abs()), self.error.amax(-1) + self.sum + self.wide * self.lse.abs()

    def backward(self, g: Tensor, out: Tensor, lse: Tensor) -> list[tuple[Tensor, Tensor]]:
        """dq, dk, dv with their bounds, for the out and lse that are given."""
        g, out, lse = g.double(), out.double(), lse.double()
        p = torch.exp(self.scores - lse[..., None])
        inner, dp = (out * g).sum(-1, keepdim=True), g @ self.v.mT
        ds = p * (dp - inner) * self.scale
        size = g.abs() @ self.v.abs().mT + (out * g).abs().sum(-1, keepdim=True)
        narrow = self.least * self.seen
        p_off = p * (self.unit + self.error) + narrow
        ds_off = ds.abs() * (self.unit + self.error + 4 * self.wide) + p * size * self.scale * (g.shape[-1] + 4) * self.wide * (1 + self.unit) + narrow
        rows, keys = self.sums(self.q.shape[2] * self.group), self.sums(self.k.shape[2])

        def few(x: Tensor) -> Tensor:
            return x.unflatten(1, (-1, self.group)).sum(2)

        results = (ds @ self.k, (ds_off + keys * ds.abs()) @ self.k.abs()), (few(ds.mT @ self.q), few((ds_off + rows * ds.abs()).mT @ self.q.abs())), (few(p.mT @ g), few((p_off + rows * p).mT @ g.abs()))
        return [(want, self.rounded(want, off)) for want, off in results]

    def sums(self, n: int) -> float:
        return self.wide * (n + 4)


def operands(p: Program, seed: int, strided: bool = False, alike: bool = False) -> dict[str, Tensor]:
    """q, k, v and, where the program has them, a mask and the gradient. ``alike``: values that differ little, so that gradients of scores are small differences of large sums."""
    g = torch.Generator().manual_seed(seed)
    given = {}
    for i in p.inputs:
        if i.name == "m":
            given["m"] = drawn(i.type.shape, i.type.dtype, g, strided) if i.type.dtype != "bool" else torch.rand((*i.type.shape, 2), generator=g)[..., 0] > 0.3
        elif i.name != "lse" and i.name != "out":
            given[i.name] = drawn(i.type.shape, i.type.dtype, g).transpose(1, 2).contiguous().transpose(1, 2)
    if alike:
        given["v"] = (given["v"].double() / 32 + 3).to(given["v"].dtype)
    return given


def one_block(p: Program) -> bool:
    """Whether a program of the backward has all keys of a head that some query sees: of heads of up to 32 features 128 in 16 bits, 32 in 32 and 16 in 64."""
    op, q, k = p.ops[0], p.types["q"], p.types["k"]
    most = {"f32": 32, "f64": 16}.get(q.dtype, 128)
    return (min(q.shape[2], k.shape[2]) if op.kw("causal") else k.shape[2]) <= most and q.shape[2] * q.shape[1] // k.shape[1] <= 512


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    b=st.integers(1, 2), heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]), s=st.integers(1, 40), t=st.integers(1, 40), d=st.sampled_from([1, 8, 16, 20]),
    e=st.sampled_from([8, 16]), mask=st.sampled_from(["none", "bool", "bias"]), shape=st.sampled_from(["b1st", "bhst", "1hst", "st", "b11t", "s1", "t", "1"]),
    causal=st.booleans(), dtype=st.sampled_from(sorted(WITHIN)), strided=st.booleans(), alike=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
@example(b=1, heads=(2, 2), s=140, t=140, d=16, e=16, mask="none", shape="b1st", causal=True, dtype="f64", strided=False, alike=False, seed=0)  # several blocks each way
@example(b=1, heads=(4, 2), s=70, t=128, d=8, e=16, mask="bias", shape="bhst", causal=False, dtype="bf16", strided=False, alike=False, seed=0)  # as many keys as a program holds
@example(b=1, heads=(4, 2), s=30, t=130, d=8, e=16, mask="bool", shape="b1st", causal=False, dtype="bf16", strided=False, alike=False, seed=0)  # more
@example(b=1, heads=(4, 1), s=130, t=5, d=8, e=8, mask="none", shape="b1st", causal=False, dtype="f16", strided=False, alike=False, seed=0)  # queries for programs of their own
@example(b=1, heads=(2, 1), s=64, t=64, d=16, e=8, mask="bool", shape="b1st", causal=True, dtype="f16", strided=False, alike=False, seed=0)
@example(b=1, heads=(1, 1), s=40, t=1, d=8, e=16, mask="bool", shape="b1st", causal=False, dtype="f32", strided=False, alike=False, seed=0)  # rows without a key
@example(b=2, heads=(4, 2), s=20, t=37, d=20, e=16, mask="bias", shape="b1st", causal=True, dtype="bf16", strided=True, alike=True, seed=0)  # keys without a row
@example(b=1, heads=(2, 1), s=37, t=20, d=8, e=8, mask="bool", shape="1hst", causal=True, dtype="f16", strided=False, alike=True, seed=0)
@example(b=2, heads=(2, 1), s=17, t=33, d=8, e=16, mask="bias", shape="t", causal=True, dtype="f32", strided=True, alike=False, seed=0)  # a mask without rows
def test_attention_forward_and_backward(
    interpreter: Interpreter, b: int, heads: tuple[int, int], s: int, t: int, d: int, e: int, mask: str, shape: str, causal: bool, dtype: str, strided: bool, alike: bool, seed: int
) -> None:
    """Each number within what rounding allows; a row that sees no key gives zeros, and none of its own. What is loaded and stored is what is said, each address once a launch."""
    forward, backward = attention(b, heads[0], heads[1], s, t, d, e, mask, causal, dtype, shape)
    given = operands(backward, seed, strided, alike)
    want = Attended(forward, given)
    (out, lse), traffic = interpreter.run(source(forward), [given[i.name] for i in forward.inputs])
    assert traffic.launches == launches(forward) == 1
    assert [(sum(traffic.once.values()), traffic.written)] == [(each.bytes_read, each.bytes_written) for each in launched(forward)], source(forward)
    usual = WITHIN[dtype] if dtype in ("f32", "f64") and not alike else float("inf")  # of the largest number: errors of long sums are less than they may be
    for mine, theirs, off in zip((out, lse), (want.out, want.lse), want.forward(), strict=True):
        assert mine.shape == theirs.shape and bool(((mine.double() - theirs).abs() <= off.clamp(max=usual * float(theirs.abs().max().clamp(min=1e-30)))).all()), source(forward)
    given |= {"out": out, "lse": torch.stack([lse, lse + 1], -1)[..., 0]}  # lse lies strided
    got, traffic = interpreter.run(source(backward), [given[i.name] for i in backward.inputs])
    assert traffic.launches == launches(backward) == (1 if one_block(backward) else 2)
    if one_block(backward):
        once = {n: i.type.nbytes for n, i in enumerate(backward.inputs) if i.name in ("g", "q", "out") or (i.name in "kv" and not (causal and s < t))}
        assert once == {n: traffic.read[n] for n in once}, f"by all programs together\n{source(backward)}"
    assert (sum(traffic.once.values()), traffic.written) == tuple(map(sum, zip(*[(each.bytes_read, each.bytes_written) for each in launched(backward)], strict=True))), source(backward)
    grads = want.backward(given["g"], out, lse)
    most = max(1e-30, *(float(theirs.abs().max()) for theirs, _ in grads))
    for name, mine, (theirs, off) in zip(("dq", "dk", "dv"), got, grads, strict=True):
        assert mine.dtype == DTYPES[dtype] and mine.shape == theirs.shape
        assert bool(((mine.double() - theirs).abs() <= off.clamp(max=2 * usual * most)).all()), f"{name}\n{source(backward)}"
    again, _ = interpreter.run(source(backward), [given[i.name] for i in backward.inputs])
    assert all(torch.equal(x, y) for x, y in zip(got, again, strict=True))


@pytest.mark.parametrize(("mask", "causal"), [("none", True), ("bias", False), ("bool", True)])
def test_what_attention_is_compared_with_is_autograds(mask: str, causal: bool) -> None:
    forward, backward = attention(2, 4, 2, 9, 7, 8, 16, mask, causal, "f64")
    given = operands(backward, 3)
    q, k, v = (given[x].requires_grad_() for x in "qkv")
    seen = given.get("m")
    scores = (q @ k.repeat_interleave(2, 1).mT) * 0.4 + (0.0 if seen is None or mask == "bool" else seen)
    unseen = torch.zeros(9, 7, dtype=torch.bool) if not causal else ~torch.ones(9, 7, dtype=torch.bool).tril()
    unseen = unseen | ~seen if seen is not None and mask == "bool" else unseen.expand(2, 1, 9, 7)
    p = torch.softmax(scores.masked_fill(unseen, -1e300), -1).masked_fill(unseen, 0.0)
    out = p @ v.repeat_interleave(2, 1)
    grads = torch.autograd.grad(out, (q, k, v), given["g"])
    with torch.no_grad():
        want = Attended(forward, given)
        assert apart(want.out, out) <= 1e-14
        for (mine, _), theirs in zip(want.backward(given["g"], want.out, want.lse), grads, strict=True):
            assert apart(mine, theirs) <= 1e-13


@pytest.mark.parametrize(("s", "t", "causal", "blocks"), [(50, 50, True, (16, 32)), (50, 50, True, (32, 16)), (40, 90, True, (32, 16)), (40, 90, True, (16, 32)), (90, 40, True, (16, 16)), (40, 70, False, (32, 32))])
def test_blocks_that_nobody_sees_are_not_read(interpreter: Interpreter, s: int, t: int, causal: bool, blocks: tuple[int, int]) -> None:
    """Of keys by programs that have queries, and of queries by those that have keys: bytes of all programs together."""
    forward, backward = attention(1, 2, 2, s, t, 8, 16, "none", causal, "f32")
    given = operands(backward, 0)
    given |= {"out": torch.zeros(1, 2, s, 16), "lse": torch.zeros(1, 2, s)}
    seen = torch.ones(s, t, dtype=torch.bool)
    seen = seen.tril() if causal else seen
    columns = int(seen.any(0).sum())
    keys = sum(min(blocks[1], columns - j) for i in range(0, s, blocks[0]) for j in range(0, t, blocks[1]) if seen[i : i + blocks[0], j : j + blocks[1]].any())
    queries = sum(int(seen[:, j : j + blocks[1]].any(1).sum()) for j in range(0, t, blocks[1]))  # of one head, by all programs
    chosen = tuple([(each.kernel, Blocks(*blocks, 4)) for p in (forward, backward) for each in launched(p)])
    _, traffic = interpreter.run(source(forward, chosen[:1]), [given[i.name] for i in forward.inputs])
    assert {i.name: traffic.read[n] for n, i in enumerate(forward.inputs)} == {"q": 4 * 2 * s * 8, "k": 4 * 2 * keys * 8, "v": 4 * 2 * keys * 16}
    _, traffic = interpreter.run(source(backward, chosen[1:]), [given[i.name] for i in backward.inputs])
    assert {i.name: traffic.read[n] for n, i in enumerate(backward.inputs)} == {
        "g": 4 * 2 * (s + queries) * 16, "q": 4 * 2 * (s + queries) * 8, "k": 4 * (2 * keys + columns) * 8, "v": 4 * (2 * keys + columns) * 16,
        "out": 4 * 2 * s * 16, "lse": 4 * 2 * (s + queries),
    }  # fmt: skip


def test_a_tensor_that_is_several_operands_is_loaded_for_each(interpreter: Interpreter) -> None:
    p = parse('program kernel mesh() facts()\n%x : f32[1, 2, 20, 8] batch "x"\n%out, %lse = sdpa(%x, %x, %x, none, causal=true, scale=0.4) : f32[1, 2, 20, 8], f32[1, 2, 20] {}\nreturn %out output "out"\n')
    x = drawn((1, 2, 20, 8), "f32", torch.Generator().manual_seed(0))
    _, traffic = interpreter.run(source(p), [x])
    assert [(sum(traffic.once.values()), traffic.written)] == [(3 * x.nbytes, x.nbytes + 160)] == [(each.bytes_read, each.bytes_written) for each in launched(p)]


class Said:
    """A kernel that is not run: it holds the arguments against the types that the file says for its compilation ahead of time."""

    def __init__(self, types: dict[str, Any]) -> None:
        self.types, self.calls = types, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.call

    def call(self, *given: Any, num_warps: int, **sizes: int) -> None:
        from deepseed.codegen.triton_writer import POINTERS

        pointers = {DTYPES[short]: f"*{word}" for short, word in POINTERS.items() if short in DTYPES}
        said = {name: pointers[x.dtype] if isinstance(x, Tensor) else x for name, x in zip(self.types, given, strict=False)} | sizes
        assert said == self.types
        self.calls += 1


@pytest.mark.parametrize("shape", ["b1st", "bhst", "1hst", "st", "b11t", "s1"])
@pytest.mark.parametrize(("d", "e"), [(8, 16), (16, 8), (20, 20)])
def test_what_is_compiled_ahead_of_time_is_what_is_launched(tmp_path: Path, d: int, e: int, shape: str) -> None:
    """Types and strides of a kernel's operands, where these lie as a program's own: heads inside rows."""
    backward = attention(2, 4, 2, 17, 133, d, e, "bias", False, "bf16", shape)[1]  # more keys than one block
    for n, p in enumerate((*attention(2, 4, 2, 17, 33, d, e, "bias", False, "bf16", shape), backward)):
        path = tmp_path / f"kernels_{n}.py"
        path.write_text(source(p))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        kernels = {name: Said(types) for name, (types, _) in module.KERNELS.items()}
        for name, kernel in kernels.items():
            setattr(module, name, kernel)
        g = torch.Generator().manual_seed(0)
        lying = [drawn(i.type.shape, i.type.dtype, g) for i in p.inputs]
        module.launch(*[x if i.name in ("m", "lse") else x.transpose(1, 2).contiguous().transpose(1, 2) for i, x in zip(p.inputs, lying, strict=True)])
        assert [kernel.calls for kernel in kernels.values()] == [1] * launches(p)


def test_operands_may_reach_over_more_than_32_bits_count() -> None:
    """Of batch, heads, rows or features: an index times a stride that both fit in 32 bits does not. The same numbers as of operands that lie close."""
    process = Interpreter()  # an address that is wrong ends it
    try:
        for dim in range(4):
            b, h = (3, 1) if dim == 0 else (1, 3) if dim == 1 else (1, 1)
            for p in (*attention(b, h, 1, 3, 3, 8, 8, "bias", False, "bf16", "bhst"), attention(b, h, 1, 3, 17, 8, 8, "bias", False, "f64", "bhst")[1]):  # the last: two kernels
                dtype = p.types["q"].dtype
                given = operands(p, 0) | {"out": drawn((b, h, 3, 8), dtype, torch.Generator().manual_seed(1)), "lse": torch.zeros(b, h, 3, dtype=DTYPES[p.types["lse"].dtype])}
                want, _ = process.run(source(p), [given[i.name] for i in p.inputs])
                got, _ = process.run(source(p), [given[i.name] if i.name == "lse" else Far(given[i.name], dim) for i in p.inputs])
                assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True)), dim
    finally:
        process.close()


def test_all_places_are_counted_in_64_bits() -> None:
    """Of what is stored too: results are too many for an interpreter where that matters."""
    longer, shorter = attention(1, 4, 2, 150, 190, 16, 32, "bias", True, "bf16"), attention(1, 4, 2, 50, 70, 16, 32, "bias", True, "bf16")
    for p, places in zip((*longer, shorter[1]), (5, 14, 9), strict=True):
        found = re.findall(r"tl\.(?:load|store)\((?!lse|inner_|o_lse)(.*?), (?:mask=|acc|dq|dk|dv|product)", source(p))
        assert len(found) == places and all(place.count(".to(tl.int64) * ") == 3 and "(batch * " in place for place in found), found
        assert set(re.findall(r"batch = .*", source(p))) <= {"batch = (tl.program_id(1) // 4).to(tl.int64)", "batch = (tl.program_id(1) // 2).to(tl.int64)"}
