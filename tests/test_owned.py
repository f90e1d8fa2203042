"""Rows that one rank owns: which ops keep them, by brute force; that experts' weights do not move; that all is equal to eager."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

import pytest
from rule_examples import example, pointwise_examples

from deepseed.capture import capture
from deepseed.check.instances import disagreement
from deepseed.check.shrink import Instance, shrink
from deepseed.check.typing import TypingError, check_types, why_not
from deepseed.ir.layout import Layout, Owned, Partial, Split, valid, weaker
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Op, Program, Type
from deepseed.ir.text import format_type, parse
from deepseed.passes.canonicalize import canonicalize
from deepseed.passes.insert_reshards import insert_reshards
from deepseed.passes.lower_reshards import lower_reshards
from deepseed.passes.solve_placements import solve_placements
from deepseed.plan import PlanError, parse_plan
from deepseed.rules import owned, signature
from deepseed.rules.owned import ZEROS, owned_strategies
from deepseed.target import load
from deepseed.verify import verify

EXAMPLES = [
    "routed_mm(f32[24, 36], f32[12, 36, 48], i64[24]) : f32[24, 48]",
    "routed_outer(f32[24, 36], f32[24, 48], i64[24]) : f32[12, 36, 48]",
    "embedding(f32[12, 36], i64[24]) : f32[24, 36]",
    "embedding_backward(f32[24, 36], i64[24]) : f32[12, 36]",
    "slice(f32[12, 72], dim=1, start=24, step=1) : f32[12, 24]",
    "cat([f32[12, 24], f32[12, 24]], dim=1) : f32[12, 48]",
    "permute(f32[12, 24, 36], dims=[2, 0, 1]) : f32[36, 12, 24]",
    "sum(f32[12, 24, 36], dims=[1], keepdim=false) : f32[12, 36]",
    "cast(f32[12, 24]) : f64[12, 24]",
    "aten.clamp(f32[12, 24], none, 0.7) : f32[12, 24]",
    "aten.add.Tensor(f32[12, 24], f32[12, 24]) : f32[12, 24]",
    "aten.mul.Tensor(f32[12, 24], f32[12, 1]) : f32[12, 24]",
    "aten.mm(f32[12, 24], f32[24, 36]) : f32[12, 36]",
]


def placed(op: Op, operands: tuple[Type, ...], n: int) -> Iterator[Instance]:
    """Every way to own rows: of any operands, in any one dimension each."""
    sig, mesh = signature(op, operands), Mesh((("a", n),))
    assert sig is not None
    of = sig.sizes[number] if (number := owned.by_number(op, sig)) is not None else 12
    seen = set()
    for count in range(len(operands) + 1):
        for some in combinations(range(len(operands)), count):
            for dim in range(max((len(t.shape) for t in operands), default=0)):
                marked = [Owned("sum", dim, "ids", of) if k in some and dim < len(t.shape) else None for k, t in enumerate(operands)]
                for before, after in owned_strategies(op, sig, marked, "ids"):
                    if (before, after) in seen or any(isinstance(e, Split) and not valid(t.shape, Layout.of(a=e), mesh) for e, t in zip((*before, *after), (*operands, *op.types), strict=True)):
                        continue
                    seen.add((before, after))
                    laid = tuple(t.laid(Layout.of(a=e)) for t, e in zip(operands, before, strict=True))
                    yield Instance(replace(op, types=tuple(t.laid(Layout.of(a=e)) for t, e in zip(op.types, after, strict=True))), laid, mesh)


def tried(text: str) -> int:
    op, operands = example(text)
    count = 0
    for n in (2, 3):
        for i in placed(op, operands, n):
            small = shrink(i)
            assert why_not(i.op, i.operands, i.mesh) is None, i
            assert why_not(small.op, small.operands, small.mesh) is None, small
            assert disagreement(small) is None, f"{text}\n{small}"
            count += 1
    return count


@pytest.mark.parametrize("text", EXAMPLES)
def test_what_owned_rows_become(text: str) -> None:
    assert tried(text) > 0


@pytest.mark.parametrize("target", sorted(set(ZEROS) - {"cast"}))
def test_an_op_that_makes_zeros_of_zeros(target: str) -> None:
    assert sum(tried(text) for text in pointwise_examples(target)) > 0


MUTANTS = {
    "exp": ("aten.exp(f32[12, 24]) : f32[12, 24]", frozenset({0})),
    "sigmoid": ("aten.sigmoid(f32[12, 24]) : f32[12, 24]", frozenset({0})),
    "add in one operand": ("aten.add.Tensor(f32[12, 24], f32[12, 24]) : f32[12, 24]", frozenset({0})),
    "a comparison": ("aten.le.Scalar(f32[12, 24], 0.5) : bool[12, 24]", frozenset({0})),
}


@pytest.mark.parametrize(("text", "members"), MUTANTS.values(), ids=MUTANTS.keys())
def test_an_op_that_does_not_is_caught(text: str, members: frozenset[int], monkeypatch: pytest.MonkeyPatch) -> None:
    op, operands = example(text)
    assert not [i for i in placed(op, operands, 2) if owned_sets(i) == members]
    monkeypatch.setattr(owned, "ZEROS", {**ZEROS, op.target: members})
    wrong = [i for i in placed(op, operands, 2) if owned_sets(i) == members]
    assert wrong and all(disagreement(shrink(i)) is not None for i in wrong)


def owned_sets(i: Instance) -> frozenset[int]:
    return frozenset(k for k, t in enumerate(i.operands) if isinstance(t.layout.on("a"), Owned))


def test_text_and_weakening() -> None:
    mesh = Mesh((("ep", 2), ("tp", 2)))
    t = Type("f32", (8, 4), Layout.of(ep=Owned("sum", 0, "layers.0.ids", 6), tp=Split(1)))
    assert format_type(t, mesh) == "f32[8, 4@tp] owned(layers.0.ids,0,6)@ep"
    p = parse(f'program p {mesh} facts()\n%x : {format_type(t, mesh)} batch "x"\nreturn %x output "x"\n')
    assert p.types["x"] == t and parse(str(p)) == p
    assert weaker(Owned("sum", 0, "ids", 6), Partial("sum")) and not weaker(Partial("sum"), Owned("sum", 0, "ids", 6))


ROWS = """program p mesh(ep=2) facts(canonical, placed)
%x : f64[8, 4] batch "x"
%ids : i64[8] batch "ids"
%more : i64[8] batch "more"
%w : f64[6@ep, 4, 4] param "w"
%y = routed_mm(%x, %w, %ids) : f64[8, 4] owned(ids,0,6)@ep {phase="forward"}
"""


def program(*lines: str) -> Program:
    return parse(ROWS + "\n".join(line + ' {phase="forward"}' for line in lines) + '\nreturn %z output "z"\n')


def test_owned_rows_become_a_sum_without_an_op_and_split_rows_by_one_combine() -> None:
    p = program("%s = aten.silu(%y) : f64[8, 4] owned(ids,0,6)@ep", "%z = routed_mm(%s, %w, %ids) : f64[8, 4] owned(ids,0,6)@ep")
    whole = replace(p, outputs=tuple(replace(o, ref=replace(o.ref, want=Layout())) for o in p.outputs))
    split = replace(p, outputs=tuple(replace(o, ref=replace(o.ref, want=Layout.of(ep=Split(0)))) for o in p.outputs))
    for q, moves in ((p, []), (whole, ["all_reduce.start"]), (split, ["combine.start"])):
        check_types(q)
        lowered = lower_reshards(insert_reshards(q))
        check_types(lowered)
        assert [op.target for op in lowered.ops if op.target.endswith(".start")] == moves
    summed = program("%r = reshape(%y as [8, 4] sum@ep) : f64[4, 2, 4] sum@ep", "%z = sum(%r, dims=[1], keepdim=false) : f64[4, 4] sum@ep")
    check_types(summed)
    assert [op.target for op in insert_reshards(summed).ops] == ["routed_mm", "reshape", "sum"]


WRONG = {
    "not zeros of zeros": (["%z = aten.exp(%y) : f64[8, 4] owned(ids,0,6)@ep"], "operands that are owned by rows .1., aten.exp does not make such rows"),
    "a sum is not linear": (["%z = aten.silu(%y as [8, 4] sum@ep) : f64[8, 4] sum@ep"], "the op passes no partial values"),
    "rows of other ids": (
        ["%v = routed_mm(%x, %w, %more) : f64[8, 4] owned(more,0,6)@ep", "%z = aten.add.Tensor(%y, %v) : f64[8, 4] owned(ids,0,6)@ep"],
        "rows owned by different ids meet: ids of 6 and more of 6",
    ),
    "a table of other ids": (["%z = routed_mm(%y, %w, %more) : f64[8, 4] owned(ids,0,6)@ep"], "owned by %ids, the table is looked up by %more"),
    "rows that turned": (
        ["%t = permute(%y, dims=[1, 0]) : f64[4, 8] owned(ids,1,6)@ep", "%u = slice(%x, dim=0, start=0, step=1) : f64[4, 4]", "%k = cat([%t], dim=0) : f64[4, 8] owned(ids,0,6)@ep",
         "%z = aten.silu(%k) : f64[4, 8] owned(ids,0,6)@ep"], "cat does not make such rows"),
    "rows added up": (["%z = sum(%y, dims=[0], keepdim=false) : f64[4] owned(ids,0,6)@ep"], "sum does not make such rows"),
    "a whole table": (["%z = aten.mul.Tensor(%x, %x) : f64[8, 4] owned(ids,0,6)@ep"], "owned by rows .none., aten.mul.Tensor does not make such rows"),
}  # fmt: skip


@pytest.mark.parametrize(("lines", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_refused(lines: list[str], message: str) -> None:
    with pytest.raises(TypingError, match=message):
        check_types(program(*lines))


# models --------------------------------------------------------------------------------------------------------------

SMALL = "hf:MixtralForCausalLM(num_hidden_layers=1,hidden_size=32,vocab_size=64,sequence_length=8)"
PLANS = ("ep2", "ep4", "dp2+ep2", "ep2+tp2", "zero3+ep2", "zero1+dp2+ep2", "zero3+dp2+ep2")


@pytest.mark.parametrize("plan", PLANS)
def test_no_weight_of_an_expert_moves(plan: str) -> None:
    """Collectives touch what is made of an expert's weight only as a gradient, over dp (or within one expert, over tp)."""
    t = load(f"{SMALL[:-1]},num_local_experts=8)", meta=True)
    captured = canonicalize(capture(t.model, t.batch).program)
    p = lower_reshards(insert_reshards(solve_placements(captured, mesh=parse_plan(plan).mesh(), zero=parse_plan(plan).stage)))
    experts = {i.name for i in p.by_role("param") if "experts" in i.key}
    products = [op for op in p.ops if op.target in ("routed_mm", "routed_outer")]
    assert len(experts) == 2 and len(products) == 6
    tables = [op.type if op.target == "routed_outer" else p.types[op.refs[1].name] for op in products]
    assert all(isinstance(table.layout.on("ep"), Split) for table in tables)
    assert [op.target for op in p.ops if any(isinstance(t.layout.on("ep"), Owned) for t in op.types)].count("aten.silu") == 1
    matrices = {p.types[name].shape[1:] for name in experts} | {p.types[name].shape[:0:-1] for name in experts}
    moved = [op for op in p.ops if op.target.endswith(".start") and any(t.shape[0:1] == (8,) and t.shape[1:] in matrices for t in op.types)]
    assert not [op for op in moved if op.kw("axis") == "ep"]
    assert all(op.kw("axis") == "dp" for op in moved if op.phase == "backward")


def test_refusals() -> None:
    t = load(SMALL, meta=True)
    p = canonicalize(capture(t.model, t.batch).program)
    with pytest.raises(ValueError, match=r"ep=8 cannot share 4 experts evenly \(4 = 8 \* 0 \+ 4\)"):
        solve_placements(p, mesh=Mesh((("ep", 8),)))
    with pytest.raises(ValueError, match=r"dp=3 x ep=2 cannot share 8 rows evenly \(8 = 6 \* 1 \+ 2\)"):
        solve_placements(p, mesh=Mesh((("dp", 3), ("ep", 2))))
    t = load("hf:LlamaForCausalLM(num_hidden_layers=1)", meta=True)
    with pytest.raises(ValueError, match="ep=2 splits experts, and this model has none"):
        solve_placements(canonicalize(capture(t.model, t.batch).program), mesh=Mesh((("ep", 2),)))
    with pytest.raises(PlanError, match="ep4 splits the experts, and the rows over 4 ranks"):
        parse_plan("ep4").resolve(6)


@pytest.mark.parametrize("plan", ["zero3+ep2", "dp2+ep2+tp2"])
def test_equal_to_eager(plan: str) -> None:
    t = load(SMALL)
    report = verify(t.model, t.batch, plan, steps=2)
    assert report.ok, str(report)


@pytest.mark.wide
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "GptOss", "DeepseekV3"])
def test_models_are_equal_to_eager(name: str, plan: str) -> None:
    t = load(f"hf:{name}ForCausalLM")
    report = verify(t.model, t.batch, plan, steps=2)
    assert report.ok, str(report)
