"""Experts: rows that meet a matrix of their own are raised to routed products, and no copy of a matrix a row is made."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deepseed import ops
from deepseed.capture import capture
from deepseed.ir.program import Program
from deepseed.ir.text import parse
from deepseed.ir.verify import verify as verify_program
from deepseed.ops import evaluate
from deepseed.passes.canonicalize import canonicalize
from deepseed.target import load
from deepseed.verify import verify

F64 = torch.float64
ROUTED = ("routed_mm", "routed_outer")


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(sum(shape) + seed))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


# the ops -------------------------------------------------------------------------------------------------------------

IDS = {
    "mixed": torch.tensor([2, 0, 2, 5, 1, 2, 0]),
    "one matrix has all": torch.full((7,), 3),
    "last and first": torch.tensor([5, 0, 5, 0, 5, 0, 5]),
    "none": torch.zeros(0, dtype=torch.int64),
}


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
def test_each_row_meets_its_matrix(ids: Tensor) -> None:
    x, g, w = rand(len(ids), 4), rand(len(ids), 3), rand(6, 4, 3)
    want = torch.bmm(x[:, None], w[ids])[:, 0]
    close(ops.routed_mm(x, w, ids), want)
    close(ops.routed_mm(x, w.transpose(1, 2).contiguous().transpose(1, 2), ids), want)
    close(sum(ops.routed_mm(x, w[s : s + 2], ids, s) for s in (0, 2, 4)), want)  # type: ignore[arg-type]
    total = torch.zeros(6, 4, 3, dtype=F64).index_put_((ids,), x[:, :, None] * g[:, None], accumulate=True)
    close(ops.routed_outer(x, g, ids, 6), total)
    close(torch.cat([ops.routed_outer(x, g, ids, 2, s) for s in (0, 2, 4)]), total)


def test_rows_of_another_shard_are_zero_whatever_its_matrices_are() -> None:
    w = torch.full((2, 4, 3), torch.inf, dtype=F64)
    assert torch.equal(ops.routed_mm(rand(5, 4), w, torch.tensor([2, 3, 5, 4, 2]), 0), torch.zeros(5, 3, dtype=F64))


def test_an_id_without_a_matrix_is_refused() -> None:
    with pytest.raises(IndexError, match="row ids from 0 to 6, but there are 6 matrices"):
        ops.routed_mm(rand(2, 4), rand(6, 4, 3), torch.tensor([0, 6]))
    with pytest.raises(IndexError, match="row ids from -1 to 2, but there are 3 matrices"):
        ops.routed_outer(rand(2, 4), rand(2, 4), torch.tensor([2, -1]), 3)


@pytest.mark.parametrize("start", [None, 2])
def test_the_grouped_kernel_computes_the_same(start: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path for bf16 on a GPU, run on the CPU, where torch has the kernel too."""
    ids = torch.tensor([2, 0, 2, 5, 1, 2, 0, 5])
    x, g, w = (t.bfloat16() for t in (rand(8, 16), rand(8, 24), rand(6, 16, 24)))
    w = w if start is None else w[start : start + 2]
    want = ops.routed_mm(x, w, ids, start), ops.routed_outer(x, g, ids, len(w), start)
    monkeypatch.setattr("deepseed.ops.routed._grouped", lambda *_: True)
    have = ops.routed_mm(x, w, ids, start), ops.routed_outer(x, g, ids, len(w), start)
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


# the pass ------------------------------------------------------------------------------------------------------------

ROUTER = """program p mesh() facts(captured)
%s : f64[6, 3] batch "s"
%w : f64[3, 4, 5] param "w"
%c : f64[6, 5, 1] batch "c"
%r : f64[6, 1, 4] batch "r"
%v, %ids = aten.topk(%s, 1, -1) : f64[6, 1], i64[6, 1] {phase="forward"}
%flat = reshape(%ids) : i64[6] {phase="forward"}
"""
INDEX = "%m = aten.index.Tensor(%w, [%flat]) : f64[6, 4, 5]"
CASES = {
    "columns": [INDEX, "%y = aten.bmm(%m, %c) : f64[6, 4, 1]"],
    "rows": [INDEX, "%y = aten.bmm(%r, %m) : f64[6, 1, 5]"],
    "columns, turned": [INDEX, "%t = permute(%m, dims=[0, 2, 1]) : f64[6, 5, 4]", "%q = reshape(%r) : f64[6, 4, 1]", "%y = aten.bmm(%t, %q) : f64[6, 5, 1]"],
    "rows, turned": [INDEX, "%t = permute(%m, dims=[0, 2, 1]) : f64[6, 5, 4]", "%q = reshape(%c) : f64[6, 1, 5]", "%y = aten.bmm(%q, %t) : f64[6, 1, 4]"],
    "index_select": ["%m = aten.index_select(%w, 0, %flat) : f64[6, 4, 5]", "%y = aten.bmm(%m, %c) : f64[6, 4, 1]"],
    "ids of two dimensions": [
        "%two = reshape(%ids) : i64[2, 3]", "%m = aten.index.Tensor(%w, [%two]) : f64[2, 3, 4, 5]", "%b = reshape(%m) : f64[6, 4, 5]", "%y = aten.bmm(%b, %c) : f64[6, 4, 1]",
    ],
    "ids below zero": ["%back = aten.sub.Tensor(%flat, 3) : i64[6]", "%m = aten.index.Tensor(%w, [%back]) : f64[6, 4, 5]", "%y = aten.bmm(%m, %c) : f64[6, 4, 1]"],
    "through a cast": [INDEX, "%h = cast(%m) : f32[6, 4, 5]", "%ch = cast(%c) : f32[6, 5, 1]", "%yh = aten.bmm(%h, %ch) : f32[6, 4, 1]", "%y = cast(%yh) : f64[6, 4, 1]"],
    "gradient": [
        "%rt = permute(%r, dims=[0, 2, 1]) : f64[6, 4, 1]", "%ct = permute(%c, dims=[0, 2, 1]) : f64[6, 1, 5]", "%o = aten.bmm(%rt, %ct) : f64[6, 4, 5]",
        "%z = full(value=0.0) : f64[3, 4, 5]", "%y = aten.index_put(%z, [%flat], %o, true) : f64[3, 4, 5]",
    ],
    "gradient, turned": [
        "%o = aten.bmm(%c, %r) : f64[6, 5, 4]", "%ot = permute(%o, dims=[0, 2, 1]) : f64[6, 4, 5]",
        "%y = aten.index_put(%w, [%flat], %ot, true) : f64[3, 4, 5]",
    ],
    "bias": [
        INDEX, "%p = aten.bmm(%m, %c) : f64[6, 4, 1]", "%pr = reshape(%p) : f64[6, 4]", "%bias = slice(%w, dim=2, start=0, step=1) : f64[3, 4, 1]",
        "%b = reshape(%bias) : f64[3, 4]", "%rows = aten.index.Tensor(%b, [%flat]) : f64[6, 4]", "%y = aten.add.Tensor(%pr, %rows) : f64[6, 4]",
    ],
    "gradient of a bias": [
        INDEX, "%p = aten.bmm(%m, %c) : f64[6, 4, 1]", "%pr = reshape(%p) : f64[6, 4]", "%z = full(value=0.0) : f64[3, 4]", "%y = aten.index_put(%z, [%flat], %pr, true) : f64[3, 4]",
    ],
}  # fmt: skip
KEPT = {
    "more than one column": ["%cc = expand(%c) : f64[6, 5, 2]", INDEX, "%y = aten.bmm(%m, %cc) : f64[6, 4, 2]"],
    "another dimension": ["%f = slice(%flat, dim=0, start=0, step=1) : i64[3]", "%m = aten.index.Tensor(%w, [none, %f]) : f64[3, 3, 5]", "%k = slice(%c, dim=0, start=0, step=1) : f64[3, 5, 1]", "%y = aten.bmm(%m, %k) : f64[3, 3, 1]"],
    "not added up": ["%o = aten.bmm(%c, %r) : f64[6, 5, 4]", "%ot = permute(%o, dims=[0, 2, 1]) : f64[6, 4, 5]", "%y = aten.index_put(%w, [%flat], %ot, false) : f64[3, 4, 5]"],
    "a table without a product": ["%b = reshape(%w) : f64[3, 20]", "%y = aten.index.Tensor(%b, [%flat]) : f64[6, 20]"],
}  # fmt: skip


def program(lines: list[str]) -> Program:
    body = "\n".join(line + ' {phase="forward"}' for line in lines)
    return verify_program(parse(f'{ROUTER}{body}\nreturn %y output "y"\n'))


def inputs(p: Program) -> dict[str, Tensor]:
    return {i.name: rand(*i.type.shape, seed=n) for n, i in enumerate(p.inputs)}


def result(p: Program, values: dict[str, Tensor]) -> Tensor:
    return evaluate(p, values)[p.outputs[0].ref.name]


@pytest.mark.parametrize("lines", CASES.values(), ids=CASES.keys())
def test_raised_and_equal(lines: list[str]) -> None:
    p = program(lines)
    q = verify_program(canonicalize(p))
    values = inputs(p)
    tolerance = 1e-6 if "f32" in str(p) else 1e-13
    torch.testing.assert_close(result(q, values), result(p, values), rtol=tolerance, atol=tolerance)
    assert any(op.target in ROUTED for op in q.ops)
    assert not any(op.target in ("aten.bmm", "aten.index.Tensor", "aten.index_select", "aten.index_put") for op in q.ops), str(q)
    assert not any(t.shape in ((6, 4, 5), (6, 5, 4), (2, 3, 4, 5)) for t in q.types.values())


@pytest.mark.parametrize("lines", KEPT.values(), ids=KEPT.keys())
def test_left_as_it_is(lines: list[str]) -> None:
    p = program(lines)
    q = canonicalize(p)
    values = inputs(p)
    close(result(q, values), result(p, values))
    assert not any(op.target in (*ROUTED, "embedding") for op in q.ops)


def test_text_before_and_after() -> None:
    q = canonicalize(program(CASES["columns"]))
    assert [line.partition(" {")[0] for line in str(q).splitlines() if line.startswith("%")][3:] == [
        "%r : f64[6, 1, 4] batch \"r\"",
        "%v, %ids = aten.topk(%s, 1, -1) : f64[6, 1], i64[6, 1]",
        "%flat = reshape(%ids) : i64[6]",
        "%y.reshape = reshape(%c) : f64[6, 5]",
        "%y.permute = permute(%w, dims=[0, 2, 1]) : f64[3, 5, 4]",
        "%y.routed_mm = routed_mm(%y.reshape, %y.permute, %flat) : f64[6, 4]",
        "%y = reshape(%y.routed_mm) : f64[6, 4, 1]",
    ]  # fmt: skip


# models --------------------------------------------------------------------------------------------------------------

MODELS = ["Mixtral", "Qwen3Moe", "DeepseekV3", "GptOss", "Olmoe", "Qwen2Moe", "GraniteMoe", "Phimoe", "Jamba"]
PLANS = ("zero1", "zero3", "tp2", "zero3+tp2")


@pytest.mark.parametrize("name", MODELS)
def test_no_matrix_a_row(name: str) -> None:
    """Two products forward, two for the inputs' gradients, two for the weights' in each layer with experts; nothing looks matrices up."""
    t = load(f"hf:{name}ForCausalLM(num_hidden_layers=2)", meta=True)
    p = canonicalize(capture(t.model, t.batch).program)
    tables = {i.name for i in p.by_role("param") if len(i.type.shape) == 3 and "expert" in i.key}
    matrices = {shape for name in tables for shape in (p.types[name].shape[1:], p.types[name].shape[:0:-1])}
    assert tables and all(len(t.shape) != 3 or t.shape[1:] not in matrices or t.shape[0] == 4 for t in p.types.values())
    count = [sum(op.target == target for op in p.ops) for target in ROUTED]
    assert count == [2 * len(tables), len(tables)]
    assert not any(op.target in ("aten.index.Tensor", "aten.index_put") and "experts" in op.path for op in p.ops)


def test_the_smallest_case_is_equal_to_eager() -> None:
    t = load("hf:MixtralForCausalLM(num_hidden_layers=1,hidden_size=32,vocab_size=64,sequence_length=8)")
    report = verify(t.model, t.batch, "zero3+tp2", steps=2)
    assert report.ok, str(report)


@pytest.mark.wide
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", [*MODELS, "Llama4"])
def test_equal_to_eager(name: str, plan: str) -> None:
    t = load(f"hf:{name}ForCausalLM")
    report = verify(t.model, t.batch, plan, steps=2)
    assert report.ok, str(report)
