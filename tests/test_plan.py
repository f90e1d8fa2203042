"""Plans: the words, the canonical form, the mesh of a world size, and what each refusal says."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseed.idle import idle_share, notes
from deepseed.ir.mesh import Mesh
from deepseed.plan import OFFLOADS, PRECISIONS, Plan, PlanError, parse_plan

sizes = st.none() | st.integers(1, 64)
hosted = st.sets(st.sampled_from(OFFLOADS)).map(lambda kinds: tuple(kind for kind in OFFLOADS if kind in kinds))
plans = st.builds(
    Plan, dp=sizes, zero=st.none() | st.integers(0, 3), sp=sizes, tp=sizes, precision=st.none() | st.sampled_from(sorted(PRECISIONS)), offload=hosted,
)  # fmt: skip


def refusal(text: str) -> str:
    with pytest.raises(PlanError) as caught:
        parse_plan(text)
    return str(caught.value)


@given(plans)
def test_the_canonical_form_parses_back_to_the_same_plan(plan: Plan) -> None:
    assert parse_plan(str(plan)) == plan
    assert str(parse_plan(str(plan))) == str(plan)


@given(plans, st.randoms())
def test_order_case_and_blanks_do_not_matter(plan: Plan, random: object) -> None:
    words = str(plan).split("+")
    random.shuffle(words)  # type: ignore[attr-defined]
    assert parse_plan(" + ".join(words).upper()) == plan


@pytest.mark.parametrize(
    ("text", "world_size", "axes"),
    [
        ("", None, ()),
        ("", 4, (("dp", 4),)),
        ("zero0", None, ()),
        ("zero1", None, (("dp", 2),)),  # nobody to share with otherwise
        ("zero3", 8, (("dp", 8),)),
        ("zero3+tp2", None, (("dp", 2), ("tp", 2))),
        ("zero3+tp2", 8, (("dp", 4), ("tp", 2))),
        ("tp4", 4, (("tp", 4),)),
        ("tp4+dp2", 8, (("dp", 2), ("tp", 4))),
        ("dp3", 3, (("dp", 3),)),
        ("dp1+tp1", 1, ()),
        ("zero2", 1, ()),
        ("sp2", None, (("sp", 2),)),
        ("zero3+sp2+tp2", None, (("dp", 2), ("sp", 2), ("tp", 2))),
        ("ep2+tp2", None, (("ep", 2), ("tp", 2))),
        ("zero1+dp2+ep4", 8, (("dp", 2), ("ep", 4))),
        ("tp2+sp4", 16, (("dp", 2), ("sp", 4), ("tp", 2))),
        ("zero3+sp4", 4, (("sp", 4),)),
    ],
)
def test_mesh(text: str, world_size: int | None, axes: tuple[tuple[str, int], ...]) -> None:
    assert parse_plan(text).mesh(world_size) == Mesh(axes)


@given(plans, st.integers(1, 64))
def test_a_mesh_has_exactly_the_ranks_of_the_world_and_every_advice_works(plan: Plan, world_size: int) -> None:
    try:
        assert plan.mesh(world_size).ranks == world_size
    except PlanError as error:
        found = re.search(r'use plan "([^"]+)", or start (\d+) ranks', str(error))
        assert found is not None and str(world_size) in str(error)
        nearest = parse_plan(found[1])
        assert nearest.mesh(world_size).ranks == world_size
        assert (nearest.stage, nearest.precision) == (plan.stage, plan.precision)
        assert plan.mesh(int(found[2])).ranks == int(found[2])


def test_a_world_that_tp_does_not_divide_is_refused_with_both_numbers() -> None:
    with pytest.raises(PlanError) as caught:
        parse_plan("zero3+tp4").mesh(6)
    assert str(caught.value) == (
        "plan zero3+tp4: tp4 splits each weight over 4 ranks, but the world size 6 is not a multiple of 4 (6 = 4 * 1 + 2)\n"
        '  fix: use plan "zero3+tp2", or start 8 ranks'
    )


def test_a_world_of_another_size_is_refused_with_both_numbers() -> None:
    with pytest.raises(PlanError) as caught:
        parse_plan("dp2+tp2").mesh(8)
    assert str(caught.value) == 'plan dp2+tp2 is for dp2 x tp2 = 4 ranks, but the world size is 8\n  fix: use plan "dp4+tp2", or start 4 ranks'
    with pytest.raises(PlanError) as caught:
        parse_plan("sp2+tp4").mesh(12)
    assert str(caught.value) == (
        "plan sp2+tp4: sp2 splits the sequence over 2 ranks and tp4 splits each weight over 4 ranks, but the world size 12 is not a multiple of 8 "
        '(12 = 8 * 1 + 4)\n  fix: use plan "tp4", or start 16 ranks'
    )
    with pytest.raises(PlanError, match="world size 0"):
        parse_plan("").mesh(0)


def test_zero_alone_says_that_it_does_nothing() -> None:
    assert parse_plan("zero2+tp2").resolve(2).notes == ("zero2 does nothing with dp1: no other data-parallel rank to share the state with",)
    assert parse_plan("zero2").resolve(2).notes == ()
    assert "dp2" in parse_plan("zero1").notes[0]
    assert parse_plan("zero0").resolve(1).notes == parse_plan("tp2").notes == ()


def test_chunked_with_and_without_a_number() -> None:
    assert parse_plan("chunked+zero3").chunked == 0 and parse_plan("chunked8").chunked == 8 and parse_plan("zero3").chunked is None
    assert [str(parse_plan(text)) for text in ("remat+chunked", "bf16+chunked8+zero1")] == ["chunked+remat", "zero1+bf16+chunked8"]
    assert "says chunked and chunked4" in refusal("chunked+chunked4")


def test_remat_is_a_word_of_its_own() -> None:
    plan = parse_plan("remat+zero3+bf16")
    assert plan.remat == "remat" and str(plan) == "zero3+bf16+remat" and parse_plan(str(plan)) == plan
    assert "says remat and remat" in refusal("remat+remat")


def test_precision() -> None:
    assert [parse_plan(word).dtype for word in ("bf16", "fp32", "fp64", "zero1")] == ["bf16", "f32", "f64", None]


@pytest.mark.parametrize("word", ["auto"])
def test_words_of_later_versions_are_refused_not_ignored(word: str) -> None:
    message = refusal(f"zero3+{word}")
    assert message.startswith(f"not yet supported by this version: {word.lower()} (") and "; use " in message


@pytest.mark.parametrize(
    ("word", "suggestion"),
    [("tpp4", "tp4"), ("zer3", "zero3"), ("bf61", "bf16"), ("bfloat16", "bf16"), ("zero", "zero3"), ("ddp", "zero0"), ("fsdp", "zero3"), ("tp", "tp2"), ("sp", "sp2"), ("spp4", "sp4")],
)
def test_an_unknown_word_names_the_nearest_and_lists_the_words(word: str, suggestion: str) -> None:
    message = refusal(f"dp2+{word}")
    assert f"unknown word {word!r}" in message and f"did you mean {suggestion}?" in message
    assert "\n  fix: use one of the words: dpN, zero0, zero1, zero2, zero3, ppN, epN, spN, tpN, mbN, gpipe, 1f1b, interleavedN, zb, bn(local), bn(exact), order(axes), bf16, fp16, fp32, fp64, grads(fp32), chunked, chunkedN, remat, offload(optimizer), budget(8GiB)" in message


def test_offload() -> None:
    assert parse_plan("offload").offload == ("optimizer",)
    assert str(parse_plan("OFFLOAD(params, Optimizer)+bf16+zero3")) == "zero3+bf16+offload(optimizer, params)"
    found = parse_plan("offload(optimizer, disk=/Data/Run 1)")
    assert found.disk == "/Data/Run 1" and parse_plan(str(found)) == found
    assert "'weights' has no such kind" in refusal("offload(weights)") and "'params' is there twice" in refusal("offload(params, params)")
    assert "disk= takes one folder" in refusal("offload(activations, disk=/a)") and "says of nothing" in refusal("offload()")


def test_other_refusals() -> None:
    assert "ZeRO has the stages 0, 1, 2 and 3" in refusal("zero4")
    assert "did you mean" not in refusal("qqqqqq")
    assert "says zero1 and zero3" in refusal("zero1+zero3")
    assert "says bf16 and fp32" in refusal("bf16+fp32")
    assert "tp0 asks for 0 ranks" in refusal("tp0")
    assert "empty word" in refusal("zero1++tp2")
    assert "unknown word 'tp-2'" in refusal("tp-2")


# pipelines -----------------------------------------------------------------------------------------------------------


def test_stages_microbatches_and_schedules() -> None:
    plan = parse_plan("zero3+tp2+pp4(cut=[model.layers.1, model.Layers.2,model.norm])+mb8+zb+order(dp,pp,tp)")
    assert (plan.stages, plan.mb, plan.kind, plan.chunks) == (4, 8, "zb", 1)
    assert plan.cut == ("model.layers.1", "model.Layers.2", "model.norm")  # a module path keeps its case
    assert parse_plan(str(plan)) == plan
    assert str(plan.mesh(16)) == "mesh(dp=2, pp=4, tp=2)"
    assert str(parse_plan("zero3+tp2+pp4").mesh(16)) == "mesh(pp=4, dp=2, tp=2)"
    assert (parse_plan("pp2").kind, parse_plan("pp2+interleaved3").kind, parse_plan("pp2+interleaved3").chunks) == ("1f1b", "interleaved", 3)


def test_a_pipeline_without_microbatches_picks_some() -> None:
    """The smallest divisor of a rank's rows that is twice the stages or more, else the largest."""
    assert [parse_plan("pp2").microbatches(rows) for rows in (1, 2, 4, 6, 8, 12, 7)] == [1, 2, 4, 6, 4, 4, 7]
    assert parse_plan("pp4").microbatches(6) == 6
    assert parse_plan("zero1").microbatches(8) == 1 and parse_plan("mb3").microbatches(8) == 3


def test_pipeline_notes() -> None:
    assert "60% of the ranks' time is idle (mb8: 27%)" in notes(parse_plan("pp4+mb2"))[0]
    assert notes(parse_plan("pp4+mb4")) == ()
    assert "45% of the ranks' time is idle" in notes(parse_plan("pp4+mb2+zb"))[0]
    assert "does nothing without ppN" in parse_plan("zb+mb4").notes[0]


def test_pipeline_refusals() -> None:
    assert "pins the beginnings of 3 stages (a, b), and has 2" in refusal("pp2(cut=[a, b])")
    assert "cannot read 'pp2(layers)'" in refusal("pp2(layers)")
    assert "interleaved1 gives each rank 1 stage" in refusal("pp2+interleaved1")
    assert "mb0 asks for 0 microbatches" in refusal("mb0")
    for text, ranks, says in (("pp3", 8, "pp3 splits the layers over 3 ranks, but the world size 8 is not a multiple of 3"), ("tp2+pp2+order(pp)", 4, "leaves out tp")):
        with pytest.raises(PlanError, match=says):
            parse_plan(text).mesh(ranks)
    assert "'dp' twice" in refusal("order(dp,dp)") and "'mb' in it, which is no axis of ranks" in refusal("order(mb)")


def test_idle_time_is_the_schedules() -> None:
    """Where a closed form holds, it; elsewhere what the schedule does."""
    for p, m in ((2, 4), (4, 8), (8, 8)):
        assert idle_share("1f1b", p, m) == pytest.approx(idle_share("gpipe", p, m)) == pytest.approx((p - 1) / (m + p - 1))
        assert idle_share("interleaved", p, m, 2) == pytest.approx((p - 1) / (2 * m + p - 1))
        assert idle_share("zb", p, m) == pytest.approx((p - 1) / (3 * m + p - 1))
    assert idle_share("interleaved", 4, 5, 2) > 3 / (2 * 5 + 3)
