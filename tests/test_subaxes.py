"""Sub-axes: fewer kv heads than tp. One sub-axis takes the kv heads, the next the group, and together they are one axis."""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseed import pipeline
from deepseed.check.instances import check_instances
from deepseed.check.typing import check_types
from deepseed.explain import Explanation, explain
from deepseed.ir.layout import REPLICATED, Layout, Partial, Split, local_indices
from deepseed.ir.mesh import Mesh, MeshError
from deepseed.ir.program import Program, Type
from deepseed.ir.subaxes import joint, on_axes_of
from deepseed.ir.text import parse
from deepseed.passes.lower_reshards import steps
from deepseed.passes.placement_subaxes import with_sub_axes
from deepseed.target import load
from deepseed.verify import verify

WHOLE = Mesh((("dp", 2), ("tp", 4)))
PARTS = WHOLE.refined("tp", (2, 2))


def test_the_same_ranks_in_the_same_order() -> None:
    assert str(PARTS) == "mesh(dp=2, tp_0=2, tp_1=2)" and PARTS.ranks == WHOLE.ranks
    assert PARTS.together("tp") == WHOLE and PARTS.together("dp") == PARTS
    assert (PARTS.size("tp"), PARTS.parts("tp"), PARTS.parts("tp_1")) == (4, ("tp_0", "tp_1"), ("tp_1",))
    for rank in range(8):
        assert PARTS.group("tp", rank) == WHOLE.group("tp", rank)
        assert on_axes_of(WHOLE.coordinate(rank), PARTS) == PARTS.coordinate(rank) == on_axes_of(PARTS.coordinate(rank), PARTS)
    with pytest.raises(MeshError, match="tp=4 is not 2 x 3"):
        WHOLE.refined("tp", (2, 3))
    with pytest.raises(MeshError, match="no axis 'sp'"):
        PARTS.size("sp")


@given(st.sampled_from([(2, 2), (2, 3), (3, 2), (2, 2, 2), (4, 2)]), st.sampled_from([1, 2, 5]), st.integers(1, 3))
def test_split_side_by_side_is_split_over_the_axis(sizes: tuple[int, ...], outer: int, rest: int) -> None:
    n = Mesh((("tp", 1),)).size("tp")
    for k in sizes:
        n *= k
    whole = Mesh((("tp", n),))
    mesh = whole.refined("tp", sizes)
    layout, at = REPLICATED, outer
    for part in mesh.names:
        layout, at = layout.with_(part, Split(0, at)), at * mesh.size(part)
    found = joint(layout, "tp", mesh)
    assert found == Layout.of(tp=Split(0, outer))
    size = outer * n * rest
    for rank in range(n):
        assert local_indices(size, 0, layout, mesh, mesh.coordinate(rank)) == local_indices(size, 0, found, whole, whole.coordinate(rank))


@pytest.mark.parametrize(
    ("elements", "found"),
    [
        ({"tp_0": Partial(), "tp_1": Partial()}, {"tp": Partial()}),
        ({"dp": Split(0)}, {"dp": Split(0)}),
        ({"tp_0": Partial(), "tp_1": Partial("max")}, None),
        ({"tp_0": Partial()}, None),
        ({"tp_0": Split(0)}, None),
        ({"tp_0": Split(0), "tp_1": Split(1)}, None),
        ({"tp_0": Split(0), "tp_1": Split(0, 4)}, None),
        ({"tp_1": Split(0), "tp_0": Split(0, 2)}, None),  # the wrong order: blocks would change places
    ],
)
def test_what_is_joint(elements: dict[str, Split | Partial], found: dict[str, Split | Partial] | None) -> None:
    assert joint(Layout.of(**elements), "tp", PARTS) == (None if found is None else Layout.of(**found))


PAIR = {"tp_0": Split(0), "tp_1": Split(0, 2)}
SUM = {"tp_0": Partial(), "tp_1": Partial()}


@pytest.mark.parametrize(
    ("before", "after", "kinds"),
    [
        (PAIR, {}, [("all_gather", "tp")]),
        (SUM, {}, [("all_reduce", "tp")]),
        (SUM, PAIR, [("reduce_scatter", "tp")]),
        (PAIR, {"tp_0": Split(1), "tp_1": Split(1, 2)}, [("all_to_all", "tp")]),
        ({}, PAIR, [("shard", "tp_0"), ("shard", "tp_1")]),  # local: nothing to join
        (PAIR, {"tp_0": Split(0)}, [("all_gather", "tp_1")]),
        ({"tp_1": Split(0), "tp_0": Split(0, 2)}, {}, [("all_gather", "tp_0"), ("all_gather", "tp_1")]),
    ],
)
def test_steps_over_sub_axes_are_one_collective(before: dict[str, Split], after: dict[str, Split], kinds: list[tuple[str, str]]) -> None:
    path = steps(Type("f64", (16, 16), Layout.of(**before)), Layout.of(**after), PARTS)
    assert sorted((kind, axis) for kind, axis, _ in path) == kinds


JOINT = """program p mesh(tp_0=2, tp_1=3) facts(canonical, explicit, lowered, placed)
%x : f64[12@(tp_0,tp_1), 6] batch "x"
%s : f64[12, 6] sum@tp_0 sum@tp_1 batch "s"
%a = all_gather.start(%x, axis="tp") : f64[12, 6] {phase="forward"}
%b = all_to_all.start(%x, axis="tp") : f64[12, 6@(tp_0,tp_1)] {phase="forward"}
%c = all_reduce.start(%s, axis="tp") : f64[12, 6] {phase="forward"}
%d = reduce_scatter.start(%s, axis="tp") : f64[2*6@(tp_0,tp_1), 6] {phase="forward"}
return %a output "a"
"""


def test_joint_collectives_are_typed_and_checked_by_number() -> None:
    p = parse(JOINT)
    assert str(p) == JOINT
    check_types(p)
    check_instances(p)
    with pytest.raises(ValueError, match="do not split side by side"):
        check_types(parse(JOINT.replace("%x : f64[12@(tp_0,tp_1), 6]", "%x : f64[12@(tp_1,tp_0), 6]")))


# models -----------------------------------------------------------------------------------------------------------------

TOKENS, HIDDEN = 8 * 256, 512


@cache
def lowered(kv: int, layers: int, tp: int) -> tuple[Program, Explanation]:
    from deepseed.capture import capture

    target = f"hf:LlamaForCausalLM(num_hidden_layers={layers}, vocab_size=32000, hidden_size={HIDDEN}, batch_size=8, sequence_length=256, num_attention_heads=8, num_key_value_heads={kv})"
    found = load(target, meta=True)
    captured = capture(found.model, found.batch, optimizer=torch.optim.AdamW(found.model.parameters()), clip_grad_norm=1.0)
    done = pipeline.run(captured.program, pipeline.arguments(Mesh((("tp", tp),)), 0, {}), pipeline.SHARED[:4], check=False)
    return done[-1].program, explain(done[-1].program)


@pytest.mark.parametrize(("kv", "mesh"), [(4, "mesh(tp=4)"), (2, "mesh(tp_0=2, tp_1=2)"), (1, "mesh(tp=4)")])
def test_no_product_is_repeated(kv: int, mesh: str) -> None:
    p, e = lowered(kv, 2, 4)
    assert str(p.mesh) == mesh
    assert not [r for r in e.replicated_ops if r.flops] and e.matmul_flops * 4 == e.matmul_flops_one_device


def layer(kv: int) -> Counter[str]:
    """Collectives of the hidden state, [tokens, hidden] on the whole axis, that one layer adds; and all others."""
    count = Counter[str]()
    for layers, sign in ((3, 1), (2, -1)):
        for op in lowered(kv, layers, 4)[0].ops:
            if op.target.endswith(".start") and op.phase != "update":
                wide = op.type.numel == TOKENS * HIDDEN and op.kw("axis") == "tp"
                count["hidden state" if wide else f"{op.target} over {op.kw('axis')}"] += sign
    return +count


def test_two_kv_heads_over_four_ranks_send_what_four_send_and_keys_and_values_between_pairs() -> None:
    assert layer(4) == {"hidden state": 4}
    assert layer(2) == {"hidden state": 4, "all_gather.start over tp_1": 2, "reduce_scatter.start over tp_1": 2}


GROUPED = """program p mesh() facts(canonical)
%q : f64[2, {heads}, 8, 4] batch "q"
%k : f64[2, {kv}, 8, 4] batch "k"
%v : f64[2, {kv}, 8, 4] batch "v"
%o, %l = sdpa(%q, %k, %v, causal=true, scale=0.5) : f64[2, {heads}, 8, 4], f64[2, {heads}, 8] {{phase="forward"}}
return %o output "o"
"""


@pytest.mark.parametrize(
    ("heads", "kv", "n", "found"),
    [(8, 2, 4, (2, 2)), (8, 4, 4, None), (8, 1, 4, None), (8, 2, 2, None), (12, 2, 6, (2, 3)), (12, 3, 6, (3, 2)), (16, 4, 8, (4, 2)), (6, 2, 4, None), (12, 4, 3, None)],
)
def test_when_an_axis_is_refined(heads: int, kv: int, n: int, found: tuple[int, ...] | None) -> None:
    mesh = Mesh((("tp", n),))
    assert with_sub_axes(parse(GROUPED.format(heads=heads, kv=kv)), mesh, ["tp"]) == (mesh if found is None else mesh.refined("tp", found))


@pytest.mark.parametrize(("kv", "plan"), [(2, "tp4"), (1, "tp4"), (2, "sp4")])
def test_few_kv_heads_mean_what_eager_means(kv: int, plan: str) -> None:
    found = load(f"hf:LlamaForCausalLM(num_key_value_heads={kv})")
    report = verify(found.model, found.batch, plan, steps=2)
    assert report.ok, str(report)


@pytest.mark.wide
@pytest.mark.parametrize(("kv", "plan"), [(2, "zero3+tp4"), (2, "sp2+tp4"), (1, "tp2"), (1, "zero3+tp4"), (2, "zero3+dp2+sp4")])
def test_few_kv_heads_in_more_plans(kv: int, plan: str) -> None:
    test_few_kv_heads_mean_what_eager_means(kv, plan)
