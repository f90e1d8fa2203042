"""insert_reshards and lower_reshards: text in, text out; and any reshard against direct slicing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from placed import MLP, lowered, random_inputs, random_reshard, run_parts, run_simulated

from deepseed import ops
from deepseed.cost import sent_bytes
from deepseed.ir.contract import PassError
from deepseed.ir.layout import Layout, LayoutError, Partial, Split
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Type
from deepseed.ir.text import parse
from deepseed.passes.insert_reshards import insert_reshards
from deepseed.passes.lower_reshards import lower_reshards, steps
from deepseed.runtime.state import gather, shard

MESH = Mesh((("dp", 2), ("tp", 4)))
PARAM = """program p mesh(dp=2, tp=4) facts(placed)
%w : f32[16@dp, 8] param "w"
%x : f32[8, 16] batch "x"
%a = aten.mm(%x, %w as [16, 8]) : f32[8, 8] {at="a", phase="forward", line="m.py:3"}
%b = aten.mm(%x, %w as [16, 8]) : f32[8, 8] {at="b", phase="forward"}
%c = aten.mm(%x, %w as [16, 8]) : f32[8, 8] {at="b", phase="backward"}
return %a as [8@tp, 8] output "a"
return %b output "b"
return %c output "c"
"""
PARAM_EXPLICIT = """program p mesh(dp=2, tp=4) facts(explicit, placed)
%w : f32[16@dp, 8] param "w"
%x : f32[8, 16] batch "x"
%w.whole_dp = reshard(%w) : f32[16, 8] {at="a", phase="forward", line="m.py:3"}
%a = aten.mm(%x, %w.whole_dp) : f32[8, 8] {at="a", phase="forward", line="m.py:3"}
%a.tp0 = reshard(%a) : f32[8@tp, 8] {at="a", phase="forward", line="m.py:3"}
%b = aten.mm(%x, %w.whole_dp) : f32[8, 8] {at="b", phase="forward"}
%w.whole_dp.1 = reshard(%w) : f32[16, 8] {at="b", phase="backward"}
%c = aten.mm(%x, %w.whole_dp.1) : f32[8, 8] {at="b", phase="backward"}
return %a.tp0 output "a"
return %b output "b"
return %c output "c"
"""


def test_one_reshard_for_each_phase_and_one_for_an_output() -> None:
    assert str(insert_reshards(parse(PARAM))) == PARAM_EXPLICIT


def test_a_collective_is_a_pair_and_a_shard_is_local() -> None:
    assert str(lower_reshards(parse(PARAM_EXPLICIT))) == (
        PARAM_EXPLICIT.replace("facts(explicit, placed)", "facts(explicit, lowered, placed)")
        .replace(
            '%w.whole_dp = reshard(%w) : f32[16, 8] {at="a"',
            '%w.whole_dp.start = all_gather.start(%w, axis="dp") : f32[16, 8] {at="a", phase="forward", line="m.py:3"}\n'
            '%w.whole_dp = wait(%w.whole_dp.start) : f32[16, 8] {at="a"',
        )
        .replace('%a.tp0 = reshard(%a) : f32[8@tp, 8] {at="a", phase="forward", line="m.py:3"}\n', "")
        .replace(
            "%w.whole_dp.1 = reshard(%w) : f32[16, 8]",
            '%w.whole_dp.1.start = all_gather.start(%w, axis="dp") : f32[16, 8] {at="b", phase="backward"}\n%w.whole_dp.1 = wait(%w.whole_dp.1.start) : f32[16, 8]',
        )
        .replace("return %a.tp0", '%a.tp0 = shard(%a, axis="tp") : f32[8@tp, 8] {at="a", phase="forward", line="m.py:3"}\nreturn %a.tp0')
    )


def test_two_operands_start_before_either_is_waited_for() -> None:
    text = """program p mesh(dp=2) facts(explicit, placed)
%a : f32[4@dp, 4] batch "a"
%b : f32[4@dp, 4] batch "b"
%a.w = reshard(%a) : f32[4, 4] {phase="forward"}
%b.w = reshard(%b) : f32[4, 4] {phase="forward"}
%c = aten.mm(%a.w, %b.w) : f32[4, 4] {phase="forward"}
return %c output "c"
"""
    assert [op.target for op in lower_reshards(parse(text)).ops] == ["all_gather.start", "all_gather.start", "wait", "wait", "aten.mm"]


@pytest.mark.parametrize(
    ("before", "after", "kinds"),
    [
        (Layout.of(tp=Partial()), Layout(), ["all_reduce tp"]),
        (Layout.of(tp=Partial()), Layout.of(tp=Split(1)), ["reduce_scatter tp"]),
        (Layout.of(tp=Split(0)), Layout.of(tp=Split(1)), ["all_to_all tp"]),
        (Layout.of(tp=Split(0)), Layout.of(tp=Split(0, 4)), ["all_to_all tp"]),
        (Layout.of(tp=Split(0)), Layout.of(tp=Split(0, 2)), ["all_gather tp", "shard tp"]),  # blocks of unequal size
        (Layout.of(dp=Split(0)), Layout.of(tp=Split(1)), ["shard tp", "all_gather dp"]),
        (Layout.of(dp=Partial(), tp=Split(0)), Layout.of(dp=Split(1)), ["reduce_scatter dp", "all_gather tp"]),
        (Layout(), Layout.of(dp=Partial()), ["summand dp"]),
        (Layout.of(dp=Split(0), tp=Split(0, 2)), Layout.of(tp=Split(0)), ["all_gather dp", "all_gather tp", "shard tp"]),
    ],
)
def test_cheapest_steps(before: Layout, after: Layout, kinds: list[str]) -> None:
    found = steps(Type("f32", (16, 8), before), after, MESH)
    assert [f"{kind} {axis}" for kind, axis, _ in found] == kinds
    assert not found or found[-1][2].layout == after


def test_only_an_amax_makes_candidates_of_a_maximum() -> None:
    with pytest.raises(LayoutError, match="only an amax makes"):
        steps(Type("f32", (16, 8)), Layout.of(tp=Partial("max")), MESH)
    text = """program p mesh(dp=2) facts(explicit, placed)
%a : f32[4, 4] batch "a"
%b = reshard(%a) : f32[4, 4] max@dp {at="blocks.0", phase="forward"}
return %b output "b"
"""
    with pytest.raises(PassError, match=r"%b = reshard\(%a\) at blocks.0"):
        lower_reshards(parse(text))


def test_bytes_sent() -> None:
    t = Type("f32", (16, 8), Layout.of(dp=Split(0)))
    assert sent_bytes("all_gather", t, t.laid(Layout()), "dp", MESH) == 8 * 8 * 4
    assert sent_bytes("all_to_all", t, t.laid(Layout.of(dp=Split(1))), "dp", MESH) == 8 * 8 * 4 // 2
    p = Type("f32", (16, 8), Layout.of(tp=Partial()))
    assert sent_bytes("all_reduce", p, p.laid(Layout()), "tp", MESH) == 2 * 16 * 8 * 4 * 3 // 4
    assert sent_bytes("reduce_scatter", p, p.laid(Layout.of(tp=Split(0))), "tp", MESH) == 16 * 8 * 4 * 3 // 4
    assert sent_bytes("shard", p, p, "tp", MESH) == 0
    with pytest.raises(ValueError, match="unknown step"):
        sent_bytes("broadcast", p, p, "tp", MESH)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from((2, 4, 6, 8)))
def test_any_reshard_is_the_slicing_that_its_layouts_say(seed: int, ranks: int) -> None:
    text, whole, parts = random_reshard(seed, ranks)
    p = parse(text)
    before, after = p.types["x"], p.types["y"]
    assert torch.equal(gather(parts, before, p.mesh), whole)
    results = run_parts(text, parts)
    assert torch.equal(gather(results, after, p.mesh), 2 * whole)
    if not after.layout.partials:
        for rank, result in enumerate(results):
            assert torch.equal(result, 2 * shard(whole, after, p.mesh, p.mesh.coordinate(rank)))


def test_mlp_step_on_four_ranks_is_the_single_device_step() -> None:
    p = lowered(MLP)
    full = random_inputs(p)
    reference = ops.evaluate(parse(MLP), full)
    out = run_simulated(p, full)
    torch.testing.assert_close(out.returned["loss"], reference["loss"], rtol=1e-13, atol=0)
    torch.testing.assert_close(out.returned["0"], reference["y"], rtol=1e-13, atol=1e-13)
    for key in ("w1", "w2"):
        torch.testing.assert_close(out.stored["param", key], reference[f"{key}.new"], rtol=1e-13, atol=1e-14)
