"""schedule_collectives and weights_per_phase: text in, text out; and a scheduled program computes what it computed before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from placed import MLP, lowered, random_inputs, run_simulated

from deepseed.ir.program import Program
from deepseed.ir.text import parse
from deepseed.ir.verify import verify
from deepseed.passes.group_kernels import group_kernels
from deepseed.passes.schedule_collectives import schedule_collectives
from deepseed.passes.weights_per_phase import once, per_phase

GRADIENTS = """program p mesh(dp=2) facts(explicit, lowered, placed)
%x : f32[8@dp, 4] batch "x"
%a = sum(%x, dims=[0], keepdim=false) : f32[4] sum@dp {phase="backward"}
%y = aten.neg(%x) : f32[8@dp, 4] {phase="backward"}
%b = sum(%y, dims=[0], keepdim=false) : f32[4] sum@dp {phase="backward"}
%c = sum(%y, dims=[0, 1], keepdim=false) : f32[] sum@dp {phase="backward"}
%a.s = all_reduce.start(%a, axis="dp") : f32[4] {phase="update"}
%a.w = wait(%a.s) : f32[4] {phase="update"}
%a.n = aten.neg(%a.w) : f32[4] {phase="update"}
%b.s = all_reduce.start(%b, axis="dp") : f32[4] {phase="update"}
%b.w = wait(%b.s) : f32[4] {phase="update"}
%b.n = aten.neg(%b.w) : f32[4] {phase="update"}
%c.s = all_reduce.start(%c, axis="dp") : f32[] {phase="update"}
%c.w = wait(%c.s) : f32[] {phase="update"}
return %a.n output "a"
return %b.n output "b"
return %c.w output "c"
"""
WEIGHTS = """program p mesh(dp=2) facts(explicit, lowered, placed)
%u : f32[8@dp, 8] param "u"
%v : f32[8@dp, 8] param "v"
%w : f32[8@dp, 8] param "w"
%x : f32[8@dp, 8] batch "x"
%u.s = all_gather.start(%u, axis="dp") : f32[8, 8] {phase="forward"}
%u.w = wait(%u.s) : f32[8, 8] {phase="forward"}
%a = aten.mm(%x, %u.w) : f32[8@dp, 8] {phase="forward"}
%v.s = all_gather.start(%v, axis="dp") : f32[8, 8] {phase="forward"}
%v.w = wait(%v.s) : f32[8, 8] {phase="forward"}
%b = aten.mm(%a, %v.w) : f32[8@dp, 8] {phase="forward"}
%w.s = all_gather.start(%w, axis="dp") : f32[8, 8] {phase="forward"}
%w.w = wait(%w.s) : f32[8, 8] {phase="forward"}
%c = aten.mm(%b, %w.w) : f32[8@dp, 8] {phase="forward"}
%v.s.1 = all_gather.start(%v, axis="dp") : f32[8, 8] {phase="backward"}
%v.w.1 = wait(%v.s.1) : f32[8, 8] {phase="backward"}
%d = aten.mm(%c, %v.w.1) : f32[8@dp, 8] {phase="backward"}
return %d output "d"
"""


def starts(p: Program) -> list[tuple[str, ...]]:
    return [op.results for op in p.ops if op.target.endswith(".start")]


def order(p: Program) -> list[str]:
    return [op.name for op in p.ops]


def test_gradients_share_a_bucket_that_starts_when_one_is_needed(golden: Callable[[object], None]) -> None:
    golden(verify(schedule_collectives(parse(GRADIENTS))))


def test_a_full_bucket_starts_at_once() -> None:
    p = schedule_collectives(parse(GRADIENTS), bucket_bytes=16)
    assert starts(p) == [("a.s",), ("b.s",), ("c.s",)]
    assert order(p).index("a.s") == order(p).index("a") + 1  # early: during the backward
    assert order(p).index("b") < order(p).index("a.w") < order(p).index("b.s")  # late: when the next bucket starts, for what it reads is held until then
    assert order(p).index("c") < order(p).index("b.w") < order(p).index("c.s")


def test_a_large_tensor_goes_alone() -> None:
    assert starts(schedule_collectives(parse(GRADIENTS), bucket_bytes=200)) == [("a.s",), ("b.s",), ("c.s",)]
    assert starts(schedule_collectives(parse(GRADIENTS), bucket_bytes=300)) == [("a.s", "b.s", "c.s")]


def test_gathers_of_weights_run_one_bucket_ahead() -> None:
    """A bucket holds one weight here: v is on its way while u is used, w while v is used; the backward's is not started before it."""
    for limit in (256, 1 << 30):  # never more than a module
        p = schedule_collectives(parse(WEIGHTS), bucket_bytes=limit)
        assert order(p) == ["u.s", "u.w", "v.s", "a", "v.w", "w.s", "b", "w.w", "c", "v.s.1", "v.w.1", "d"]


def test_a_bucket_of_gathers_keeps_to_its_phase_and_within_the_second_largest_module() -> None:
    """u, v and a copy of one of them take as much as w does; t, which is as large, goes by itself."""
    large = WEIGHTS.replace("%w : f32[8@dp, 8]", "%w : f32[8@dp, 24]").replace("wait(%w.s) : f32[8, 8]", "wait(%w.s) : f32[8, 24]").replace(
        "all_gather.start(%w, axis=\"dp\") : f32[8, 8]", "all_gather.start(%w, axis=\"dp\") : f32[8, 24]"
    ).replace("%c = aten.mm(%b, %w.w) : f32[8@dp, 8]", "%c = aten.mm(%b, %w.w) : f32[8@dp, 24]")  # fmt: skip
    third = """%t : f32[8@dp, 24] param "t"
%x :"""
    used = """%t.s = all_gather.start(%t, axis="dp") : f32[8, 24] {phase="forward"}
%t.w = wait(%t.s) : f32[8, 24] {phase="forward"}
%e = aten.mm(%b, %t.w) : f32[8@dp, 24] {phase="forward"}
%v.s.1 ="""
    text = large.replace("%x :", third).replace("%v.s.1 =", used)
    assert starts(schedule_collectives(parse(text), bucket_bytes=1 << 30)) == [("u.s", "v.s"), ("w.s",), ("t.s",), ("v.s.1",)]
    smaller = text.replace("24]", "16]")
    assert starts(schedule_collectives(parse(smaller), bucket_bytes=1 << 30)) == [("u.s",), ("v.s",), ("w.s",), ("t.s",), ("v.s.1",)]


def test_two_steps_of_one_reshard_stay_in_order() -> None:
    text = """program p mesh(dp=2, tp=2) facts(explicit, lowered, placed)
%x : f32[8@dp, 4@tp] batch "x"
%s = sum(%x, dims=[0, 1], keepdim=false) : f32[] sum@dp sum@tp {phase="forward"}
%d.s = all_reduce.start(%s, axis="dp") : f32[] sum@tp {phase="forward"}
%d = wait(%d.s) : f32[] sum@tp {phase="forward"}
%t.s = all_reduce.start(%d, axis="tp") : f32[] {phase="forward"}
%t = wait(%t.s) : f32[] {phase="forward"}
%y = aten.neg(%t) : f32[] {phase="forward"}
return %y output "y"
"""
    assert order(schedule_collectives(parse(text))) == ["s", "d.s", "d", "t.s", "t", "y"]


@pytest.mark.parametrize("bucket_bytes", [1, 200, 1 << 30])
def test_a_scheduled_step_computes_the_same(bucket_bytes: int) -> None:
    before = lowered(MLP)
    inputs = random_inputs(before)
    want = run_simulated(before, inputs)
    have = run_simulated(schedule_collectives(before, bucket_bytes=bucket_bytes), inputs)
    for a, b in ((want.returned, have.returned), (want.stored, have.stored)):
        assert a.keys() == b.keys() and a
        for key, value in a.items():
            assert float((value - b[key]).abs().max()) <= 1e-12, key  # type: ignore[index]


CAST = """program p mesh(dp=2) facts(captured)
%w : f32[8, 8] param "w"
%x : bf16[8, 8] batch "x"
%c = cast(%w) : bf16[8, 8] {phase="forward"}
%t = permute(%c, dims=[1, 0]) : bf16[8, 8] {phase="forward"}
%y = aten.mm(%x, %t) : bf16[8, 8] {phase="forward"}
%d = aten.mm(%y, %c) : bf16[8, 8] {phase="backward"}
%e = aten.mm(%y, %t) : bf16[8, 8] {phase="backward"}
return %d output "d"
return %e output "e"
"""


def test_the_backward_casts_for_itself() -> None:
    p = per_phase(parse(CAST))
    assert order(p) == ["c", "t", "y", "c.again", "d", "t.again", "e"]
    assert [op.phase for op in p.ops] == ["forward"] * 3 + ["backward"] * 4


def test_where_nothing_came_between_it_is_one_cast_again() -> None:
    assert order(once(per_phase(parse(CAST)))) == ["c", "t", "y", "d", "e"]


def test_the_clipping_factor_is_the_updates_own_when_nothing_else_reads_the_gradient() -> None:
    text = """program p mesh() facts(canonical, explicit, lowered, placed)
%w : f32[8, 4] param "w"
%m : f32[8, 4] state "momentum_buffer/w"
%lr : f64[] hyper "lr/0"
%x : f32[4, 8] batch "x"
%y : f32[4, 4] batch "y"
%factor : f32[] batch "factor"
%t = permute(%x, dims=[1, 0]) : f32[8, 4] {phase="backward"}
%g = aten.mm(%t, %y) : f32[8, 4] {phase="backward"}
%n = sum_of_squares(%g) : f32[] {phase="update"}
%c = aten.mul.Tensor(%g, %factor) : f32[8, 4] {phase="update"}
%w.new, %m.new = optim.sgd(%w, %c, %m, %lr, states=["momentum_buffer"], momentum=0.9) : f32[8, 4], f32[8, 4] {phase="update"}
return %w.new param "w"
return %m.new state "momentum_buffer/w"
return %n norm "n"
"""
    p = group_kernels(parse(text))
    assert order(p) == ["t", "g", "n", "w.new"]
    assert p.ops[-1].kw("scale") is not None
    kept = group_kernels(parse(text + 'return %g grad "w"\n'))
    assert order(kept) == ["t", "g", "n", "c", "w.new"]  # a gradient that is shown must keep its value
