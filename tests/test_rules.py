"""Every rule, by brute force: all strategies of all examples, each rank run for real and put together."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rule_examples import EXAMPLES, example, pointwise_examples

from deepseed.check.instances import InstanceError, disagreement
from deepseed.check.shrink import Instance, shrink
from deepseed.check.typing import why_not
from deepseed.ir.layout import Layout, Partial, Split, valid
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Op, Type
from deepseed.ir.text import parse
from deepseed.rules import RULES, Rule, RuleError, candidates, op_strategies, signature, strategies
from deepseed.rules import strategy as strategy_module
from deepseed.rules.__main__ import page as rules_page
from deepseed.rules.linalg import WHOLE
from deepseed.rules.pointwise import LINEAR, MONOTONE, POINTWISE
from deepseed.rules.pointwise import form as pointwise_form

torch.set_num_threads(1)
WHOLE_ONLY = set(WHOLE.split())  # rules that split nothing
EXTRA = (2, 3)  # further inner outers that are tried for every factor


def placed(op: Op, operands: tuple[Type, ...], axes: list[tuple[str, int]], pick: random.Random | None = None) -> Iterator[Instance]:
    """Every combination of strategies over the axes (one drawn by ``pick`` on all but the last axis)."""
    mesh = Mesh(tuple(axes))

    def on(k: int, op: Op, operands: tuple[Type, ...]) -> Iterator[Instance]:
        if k == len(axes):
            yield Instance(op, operands, mesh)
            return
        axis = axes[k][0]
        sig = signature(op, operands)
        outers = {name: EXTRA for name in sig.free} if sig else None
        found = strategies(sig, operands, op.types, axis, mesh, outers)
        if pick is not None and k + 1 < len(axes):
            found = [pick.choice(found)]
        for s in found:
            laid = tuple(t.laid(t.layout.with_(axis, e)) for t, e in zip(operands, s.operands, strict=True))
            results = tuple(t.laid(t.layout.with_(axis, e)) for t, e in zip(op.types, s.results, strict=True))
            yield from on(k + 1, replace(op, types=results), laid)

    return on(0, op, operands)


def double(op: Op, operands: tuple[Type, ...]) -> tuple[Op, tuple[Type, ...]]:
    """The example in float64, at its own sizes."""

    def f64(t: Type) -> Type:
        return replace(t, dtype="f64") if t.dtype in ("f32", "bf16") else t

    args = tuple("f64" if a == "f32" else a for a in op.args)
    kwargs = tuple((k, "f64" if v == "f32" else v) for k, v in op.kwargs)
    return replace(op, args=args, kwargs=kwargs, types=tuple(map(f64, op.types))), tuple(map(f64, operands))


def is_split(i: Instance) -> bool:
    return any(isinstance(e, Split) for t in (*i.operands, *i.op.types) for _, e in t.layout.elements)


def wrong(i: Instance) -> str | None:
    return why_not(i.op, i.operands, i.mesh) or disagreement(i)


def check(text: str, *, small_only: bool = False) -> int:
    """All strategies of one example; returns how many split something."""
    op, operands = example(text)
    splits = 0
    for n in (2, 3, 4):
        for i in placed(op, operands, [("a", n)]):
            splits += is_split(i)
            small = shrink(i)
            assert wrong(small) is None, f"{text}\n{small}"
            assert all(t.numel <= 20000 for t in small.operands)
            if not small_only:
                full, types = double(i.op, i.operands)
                assert wrong(Instance(full, types, i.mesh)) is None, f"{text}\n{i}"
    return splits


@pytest.mark.parametrize("text", EXAMPLES)
def test_every_strategy_gives_the_whole_op(text: str) -> None:
    assert (check(text) > 0) != (text.partition("(")[0] in WHOLE_ONLY)


@pytest.mark.parametrize("text", EXAMPLES)
def test_two_axes_together(text: str) -> None:
    op, operands = example(text)
    pick = random.Random(text)
    for sizes in ((2, 2), (3, 2)):
        for _ in range(3):
            found = list(placed(op, operands, [("a", sizes[0]), ("b", sizes[1])], pick))
            for i in pick.sample(found, min(4, len(found))):
                small = shrink(i)
                assert wrong(small) is None, f"{text}\n{i}"


def test_every_pointwise_op() -> None:
    splits = 0
    for target in sorted(POINTWISE):
        texts = pointwise_examples(target)
        assert texts, f"no example of {target} could be made from its schema"
        splits += sum(check(text, small_only=True) for text in texts)
    assert splits > 3000


def test_every_rule_has_an_example() -> None:
    assert set(RULES) - {"share"} == {text.partition("(")[0] for text in EXAMPLES}  # a share is a move on its own axis: tests/test_own_rows.py
    assert set(LINEAR) | set(MONOTONE) <= POINTWISE


def test_every_linear_set_occurs_in_an_example() -> None:
    for target, spec in LINEAR.items():
        sets = {s for text in pointwise_examples(target) for s in signature(*example(text)).linear}  # type: ignore[union-attr]
        assert sets or "+2" in spec or target.endswith("Scalar") or target.startswith("aten.where"), target


def test_pointwise_names_are_torch_s() -> None:
    """PyTorch's own tag, less what is documented in the module."""
    tagged = set()
    for name in torch._C._dispatch_get_all_op_names():
        base, _, which = name.removeprefix("aten::").partition(".")
        if not name.startswith("aten::") or base.startswith("special_") or (base.endswith("_") and not base.endswith("__")):
            continue
        op = getattr(getattr(torch.ops.aten, base, None), which or "default", None)
        if op is not None and torch.Tag.pointwise in op.tags and not op._schema.is_mutable:
            tagged.add(f"aten.{base}" + (f".{which}" if which else ""))
    assert tagged - POINTWISE == {"aten.equal", "aten.rrelu"}


MUTANTS: list[tuple[str, str, Rule]] = [
    ("relu is linear", "aten.relu(f32[12, 24]) : f32[12, 24]", Rule(pointwise_form, "0")),
    ("exp is linear", "aten.exp(f32[12, 24]) : f32[12, 24]", Rule(pointwise_form, "0")),
    ("neg passes max", "aten.neg(f32[12, 24]) : f32[12, 24]", Rule(pointwise_form, "0", "0")),
    ("add is linear in one operand", "aten.add.Tensor(f32[12, 24], f32[12, 24]) : f32[12, 24]", Rule(pointwise_form, "0")),
    ("mul is linear in both together", "aten.mul.Tensor(f32[12, 24], f32[12, 24]) : f32[12, 24]", Rule(pointwise_form, "0+1")),
    ("div is linear in the denominator", "aten.div.Tensor(f32[12, 24], f32[12, 24]) : f32[12, 24]", Rule(pointwise_form, "1")),
    ("adding an epsilon is linear", "aten.add.Tensor(f32[12, 24], 1e-12) : f32[12, 24]", Rule(pointwise_form, "0")),
    ("clamp is linear", "aten.clamp_min(f32[12, 24], 1e-12) : f32[12, 24]", Rule(pointwise_form, "0")),
    ("where is linear in one branch", "aten.where.self(bool[12, 24], f32[12, 24], f32[12, 24]) : f32[12, 24]", Rule(pointwise_form, "1")),
    ("silu_backward is linear in x", "aten.silu_backward(f32[12, 24], f32[12, 24]) : f32[12, 24]", Rule(pointwise_form, "1")),
    ("full of 2 born partial", "full(value=2.0) : f32[12, 24]", Rule(RULES["full"].form, "born")),
    ("random born partial", 'bernoulli(i64[2], p=0.4, site="a") : f32[12, 24]', Rule(RULES["bernoulli"].form, "born")),
    ("sum leaves max", "sum(f32[12, 24], dims=[1], keepdim=false) : f32[12]", Rule(RULES["sum"].form, "", reduce="max")),
    ("amax leaves sum", "amax(f32[12, 24], dims=[1], keepdim=false) : f32[12]", Rule(RULES["amax"].form)),
    ("amax is linear", "amax(f32[12, 24], dims=[1], keepdim=false) : f32[12]", Rule(RULES["amax"].form, "0", reduce="max")),
    ("sum passes max", "sum(f32[12, 24], dims=[1], keepdim=false) : f32[12]", Rule(RULES["sum"].form, "0", "0")),
    ("mm leaves max", "aten.mm(f32[12, 24], f32[24, 36]) : f32[12, 36]", Rule("m k, k n -> m n", reduce="max")),
    ("mm with dimensions swapped", "aten.mm(f32[24, 24], f32[24, 24]) : f32[24, 24]", Rule("m k, k n -> n m")),
    ("mm with the left operand transposed", "aten.mm(f32[24, 24], f32[24, 24]) : f32[24, 24]", Rule("k m, k n -> m n")),
    ("mm linear in both together", "aten.mm(f32[24, 24], f32[24, 24]) : f32[24, 24]", Rule("m k, k n -> m n", "0+1")),
    ("mm not contracted", "aten.mm(f32[24, 24], f32[24, 24]) : f32[24, 24]", Rule("m j, k n -> m n")),
    ("bmm with the batch of one side", "aten.bmm(f32[24, 24, 24], f32[24, 24, 24]) : f32[24, 24, 24]", Rule("b m k, m k n -> b m n")),
    ("permute is the identity", "permute(f32[24, 24], dims=[1, 0]) : f32[24, 24]", Rule("a b -> a b")),
    ("reshape keeps the minor factor", "reshape(f32[12, 12]) : f32[144]", Rule("a b -> (b a)")),
    ("reshape keeps dimensions", "reshape(f32[24, 24, 12]) : f32[24, 12, 24]", Rule("a (b=2 c=12) d -> a c (b d)")),
    ("slice splits across the window", "slice(f32[24, 48], dim=1, start=24, step=1) : f32[24, 24]", Rule("a (n p=2) -> a n")),
    ("shifted slice is free", "slice(f32[24, 36], dim=1, start=1, step=1) : f32[24, 24]", Rule("a (p n=12) -> a (q n=12)")),
    ("cat splits across parts", "cat([f32[24, 12], f32[24, 12]], dim=1) : f32[24, 24]", Rule("a n, a n -> a (n p)")),
    ("pad by one is linear", "pad(f32[12, 24], pads=[0, 0, 0, 1], value=1.0) : f32[12, 25]", Rule(RULES["pad"].form, "0")),
    ("cumsum along a split dimension", "aten.cumsum(f32[12, 24], 1) : f32[12, 24]", Rule("a b -> a b")),
    ("softmax over a split dimension", "aten._softmax(f32[12, 24], -1, false) : f32[12, 24]", Rule("a b -> a b")),
    ("argmax over a split dimension", "aten.argmax(f32[12, 24], 1) : i64[12]", Rule("a b -> a", reduce="max")),
    ("topk over a split dimension", "aten.topk(f32[12, 24], 12, -1) : f32[12, 12], i64[12, 12]", Rule("a (b k) -> a k, a k", reduce="max")),
    ("sort along a split dimension", "aten.sort(f32[12, 24], 1) : f32[12, 24], i64[12, 24]", Rule("a b -> a b, a b")),
    ("flip of a split dimension", "aten.flip(f32[12, 24], [1]) : f32[12, 24]", Rule("a b -> a b")),
    ("tril of a split matrix", "aten.tril(f32[24, 24], 0) : f32[24, 24]", Rule("a b -> a b")),
    ("embedding by blocks", "embedding(f32[24, 36], i64[12, 24]) : f32[12, 24, 36]", Rule("v d, *b -> *b d", "0")),
    ("embedding leaves max", "embedding(f32[24, 36], i64[12, 24]) : f32[12, 24, 36]", Rule("v~ d, *b -> *b d", "0", reduce="max")),
    ("embedding_backward of ids swapped", "embedding_backward(f32[24, 24, 36], i64[24, 24]) : f32[24, 36]", Rule("a b d, b a -> v~ d")),
    ("scatter_add of a split index", "scatter_add(f32[12, 24], i64[12, 12], f32[12, 12], dim=1) : f32[12, 24]", Rule("a v!, a i, a i -> a v!")),
    ("index_put of a split index", "aten.index_put(f32[24, 36], [i64[12]], f32[12, 36], true) : f32[24, 36]", Rule("v! d, i, i d -> v! d")),
    ("scatter_add linear in src alone", "scatter_add(f32[12, 24], i64[12, 12], f32[12, 12], dim=1) : f32[12, 24]", Rule("a v!, a i!, a i! -> a v!", "2")),
    ("gather splits a longer source", "gather(f32[24, 24], i64[12, 12], dim=1) : f32[12, 12]", Rule("(a p=2!) v!, a i -> a i")),
    ("index of a split dimension", "aten.index.Tensor(f32[12, 24], [none, i64[24]]) : f32[12, 24]", Rule("a v, v -> a v")),
    ("attention over split keys", EXAMPLES[-6], Rule("b h s! d!, b h t d!, b h t e! -> b h s! e!, b h s!")),
    ("causal attention over split queries", EXAMPLES[-5], Rule("b (h g) s d!, b h t! d!, b h t! e! -> b (h g) s e!, b (h g) s")),
    ("group before kv head", EXAMPLES[-5], Rule("b (g h) s! d!, b h t! d!, b h t! e! -> b (g h) s! e!, b (g h) s!")),
    ("attention is linear in q", EXAMPLES[-5], Rule(RULES["sdpa"].form, "0")),
    ("attention backward is linear in v", EXAMPLES[-3], Rule(RULES["sdpa_backward"].form, "3")),
    ("attention backward leaves max", EXAMPLES[-2], Rule(RULES["sdpa_backward"].form, reduce="max")),
    ("convolution adds the bias once a rank", "aten.convolution(f32[12, 24, 9], f32[36, 24, 3], f32[36], [1], [0], [1], false, [0], 1) : f32[12, 36, 7]", Rule("b c s!, k c w!, k -> b k t!")),
]


@pytest.mark.parametrize("rule,text", [m[1:][::-1] for m in MUTANTS], ids=[m[0] for m in MUTANTS])
def test_a_wrong_rule_is_caught(rule: Rule, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op, operands = example(text)
    monkeypatch.setattr(strategy_module, "rule_of", lambda target: rule)
    monkeypatch.setattr(strategy_module, "_signatures", {})
    caught = tried = 0
    for n in (2, 3):
        for i in placed(op, operands, [("a", n)]):
            tried += bool(i.mesh.axes)
            caught += fails(i) or fails(shrink(i))
    assert tried > 1
    assert caught > 0


def fails(i: Instance) -> bool:
    try:
        return disagreement(Instance(*double(i.op, i.operands), i.mesh)) is not None
    except InstanceError:  # the small shapes that the wrong rule made are none of the op
        return True


def test_form_that_does_not_fit_says_both_sizes() -> None:
    op, operands = example("aten.mm(f32[12, 24], f32[24, 36]) : f32[12, 36]")
    with pytest.raises(RuleError, match=r"aten\.mm: dimension of 25, the rule 'm k, k n -> m n' makes it 24"):
        signature(op, (operands[0], replace(operands[1], shape=(25, 36))))
    with pytest.raises(RuleError, match="has 3 dimensions"):
        signature(op, (operands[0], replace(operands[1], shape=(24, 36, 1))))


def test_signatures_read_as_one_line() -> None:
    lines = {text: str(signature(*example(text))) for text in EXAMPLES}
    assert lines["reshape(f32[12, 1, 36]) : f32[12, 3, 12]"] == "f0=12 1 (f1=3 f2=12) -> f0=12 f1=3 f2=12"
    assert lines["reshape(f32[30, 12]) : f32[12, 30]"] == "(f0=6 f1=5!) f4=12! -> (f0=6 f2=2!) f3=30!"
    assert lines["slice(f32[12, 72], dim=1, start=24, step=1) : f32[12, 24]"] == "d0=12 (p=3! i=24) -> d0=12 i=24"
    assert lines["embedding(f32[24, 36], i64[12, 24]) : f32[12, 24, 36]"] == "v=24~ d=36, b0=12 b1=24 -> b0=12 b1=24 d=36"


def test_the_first_strategy_replicates_and_no_rule_is_only_that() -> None:
    op, operands = example("aten.mm(f32[12, 24], f32[24, 36]) : f32[12, 36]")
    mesh = Mesh((("tp", 2),))
    found = strategies(op, operands, op.types, "tp", mesh)
    assert found[0].operands == (None, None) and found[0].results == (None,)
    assert [(s.operands, s.results) for s in found[1:]] == [
        ((Split(0), None), (Split(0),)),
        ((Split(1), Split(0)), (Partial(),)),
        ((None, Split(1)), (Split(1),)),
        ((Partial(), None), (Partial(),)),
        ((None, Partial()), (Partial(),)),
    ]
    unknown = replace(op, target="aten.native_layer_norm")
    assert len(strategies(unknown, operands, op.types, "tp", mesh)) == 1


def test_a_second_axis_goes_beside_the_first() -> None:
    op, operands = example("aten.mm(f32[12, 24], f32[24, 36]) : f32[12, 36]")
    mesh = Mesh((("dp", 2), ("tp", 2)))
    laid = (operands[0].laid(Layout.of(dp=Split(0))), operands[1])
    found = strategies(op, laid, (op.type.laid(Layout.of(dp=Split(0))),), "tp", mesh)
    assert [s.operands[0] for s in found if isinstance(s.results[0], Split) and s.results[0].dim == 0] == [Split(0, 2)]


FUSED_QKV = """
program fused mesh(tp=2) facts()
%w : f32[2304, 32] param "w"
%x : f32[128, 32] batch "x"
%wt = permute(%w, dims=[1, 0]) : f32[32, 2304] {phase="forward"}
%y = aten.mm(%x, %wt) : f32[128, 2304] {phase="forward"}
%q = slice(%y, dim=1, start=0, step=1) : f32[128, 768] {phase="forward"}
%k = slice(%y, dim=1, start=768, step=1) : f32[128, 768] {phase="forward"}
%z = aten.mul.Tensor(%q, %k) : f32[128, 768] {phase="forward"}
%gq = unslice(%z, dim=1, start=768, step=1) : f32[128, 2304] {phase="backward"}
%gc = cat([%q, %k, %z], dim=1) : f32[128, 2304] {phase="backward"}
return %gc output "0"
"""


def test_the_blocks_of_a_fused_weight_are_found() -> None:
    p = parse(FUSED_QKV.strip())
    found = candidates(p)
    assert found["w"] == (frozenset({1, 3}), frozenset({1}))
    assert found["gc"][1] >= {3} and found["gq"][1] >= {3} and found["x"] == (frozenset({1}), frozenset({1}))
    for op in p.ops:
        if op.target in ("slice", "cat", "unslice"):
            wide = "operands" if op.target == "slice" else "results"
            assert Split(1, 3) in [getattr(s, wide)[0] for s in op_strategies(op, p.types, "tp", p.mesh, found)]


def test_candidates_are_capped() -> None:
    assert all(len(outers) <= 2 for dims in candidates(parse(FUSED_QKV.strip()), cap=2).values() for outers in dims)


def test_what_a_contraction_is_added_to_is_partial() -> None:
    op, operands = example("aten.index_put(f32[12, 24, 36], [none, i64[12]], f32[12, 12, 36], true) : f32[12, 24, 36]")
    found = strategies(op, operands, op.types, "tp", Mesh((("tp", 2),)))
    assert ((Partial(), Split(0), Split(1)), (Partial(),)) in [(s.operands, s.results) for s in found]


@pytest.mark.parametrize("text", EXAMPLES)
def test_whatever_passes_typing_is_right(text: str) -> None:
    """Layouts one or two elements away from a strategy: typing refuses them or they compute the same."""
    op, operands = example(text)
    pick = random.Random(text)
    found = list(placed(op, operands, [("a", 2)]))
    mesh = Mesh((("a", 2), ("b", 3)))
    passed = 0
    for _ in range(60):
        i = pick.choice(found)
        types = [*i.operands, *i.op.types]
        for _ in range(pick.choice((1, 2))):
            k = pick.randrange(len(types))
            elements = [None, Partial(), Partial("max"), *(Split(d, o) for d in range(len(types[k].shape)) for o in (1, 2, 3, 12))]
            types[k] = types[k].laid(types[k].layout.with_(pick.choice("ab"), pick.choice(elements)))
        if not all(valid(t.shape, t.layout, mesh) for t in types):
            continue
        changed = Instance(replace(i.op, types=tuple(types[len(operands) :])), tuple(types[: len(operands)]), mesh)
        if why_not(changed.op, changed.operands, mesh) is None:
            passed += 1
            assert wrong(shrink(changed)) is None, changed
            full, double_types = double(changed.op, changed.operands)
            assert wrong(Instance(full, double_types, mesh)) is None, changed
    assert passed < 60


def test_the_page_of_rules_is_up_to_date() -> None:
    page = Path(__file__).parent.parent / "docs" / "rules.md"
    assert page.read_text() == rules_page(), "python -m deepseed.rules > docs/rules.md"
