"""One pipeline rank's step written out, by hand; and what explain counts on it."""

from __future__ import annotations

import pytest

from deepseed.explain import explain
from deepseed.ir.text import parse
from deepseed.memory import curve, memory
from deepseed.unroll import unroll

STEP = """program step mesh(mb=2) facts(canonical, captured, explicit, looped, lowered, placed, staged)
schedule 1f1b stages=2 microbatches=2 loops=1
lane 0: F0 F1 B0 B1 once.1
lane 1: F0 B0 F1 B1 once.1
%w0 : f32[8, 8] param "w0"
%w1 : f32[8, 8] param "w1" stage 1
%x : f32[32@mb, 8] batch "x"
%h = aten.mm(%x, %w0) : f32[32@mb, 8] {phase="forward", part="forward.1"}
%h.s1 = transfer(%h, source=0) : f32[32@mb, 8] {phase="forward", part="forward.1", stage=1}
%y = aten.mm(%h.s1, %w1) : f32[32@mb, 8] {phase="forward", part="forward.1", stage=1}
%g = aten.neg(%y) : f32[32@mb, 8] {phase="backward", part="backward.1", stage=1}
%g.s0 = transfer(%g, source=1) : f32[32@mb, 8] {phase="backward", part="backward.1"}
%x.t = permute(%x, dims=[1, 0]) : f32[8, 32@mb] {phase="backward", part="backward.1"}
%d0 = aten.mm(%x.t, %g.s0) : f32[8, 8] sum@mb {phase="backward", part="backward.1"}
%d0.all = accumulate(%d0, axis="mb") : f32[8, 8] {phase="update", part="backward.1"}
%h.t = permute(%h.s1, dims=[1, 0]) : f32[8, 32@mb] {phase="backward", part="backward.1", stage=1}
%d1 = aten.mm(%h.t, %g) : f32[8, 8] sum@mb {phase="backward", part="backward.1", stage=1}
%d1.all = accumulate(%d1, axis="mb") : f32[8, 8] {phase="update", part="backward.1", stage=1}
%w0.new = aten.sub.Tensor(%w0, %d0.all) : f32[8, 8] {phase="update", part="once.1"}
%w1.new = aten.sub.Tensor(%w1, %d1.all) : f32[8, 8] {phase="update", part="once.1", stage=1}
return %w0.new param "w0"
return %w1.new param "w1"
"""
ROWS, WEIGHT = 16 * 8 * 4, 8 * 8 * 4  # bytes of a microbatch's activation, and of a weight


def said(lane: int) -> list[str]:
    return [f"{op.name} = {op.target}({', '.join(r.name for r in op.refs)})" for op in unroll(parse(STEP), lane).program.ops]


def test_the_first_rank() -> None:
    assert said(0) == [
        "x#0 = shard(x)", "h#0 = aten.mm(x#0, w0)", "x#1 = shard(x)", "h#1 = aten.mm(x#1, w0)",
        "g.s0#0 = transfer()", "x.t#0 = permute(x#0)", "d0#0 = aten.mm(x.t#0, g.s0#0)", "d0.all#0 = accumulate(d0#0)",
        "g.s0#1 = transfer()", "x.t#1 = permute(x#1)", "d0#1 = aten.mm(x.t#1, g.s0#1)", "d0.all = accumulate(d0.all#0, d0#1)",
        "w0.new = aten.sub.Tensor(w0, d0.all)",
    ]  # fmt: skip


def test_the_second_rank() -> None:
    whole = unroll(parse(STEP), 1)
    assert said(1) == [
        *[line for n in "0" for line in (f"h.s1#{n} = transfer()", f"y#{n} = aten.mm(h.s1#{n}, w1)", f"g#{n} = aten.neg(y#{n})", f"h.t#{n} = permute(h.s1#{n})")],
        "d1#0 = aten.mm(h.t#0, g#0)", "d1.all#0 = accumulate(d1#0)",
        *[line for n in "1" for line in (f"h.s1#{n} = transfer()", f"y#{n} = aten.mm(h.s1#{n}, w1)", f"g#{n} = aten.neg(y#{n})", f"h.t#{n} = permute(h.s1#{n})")],
        "d1#1 = aten.mm(h.t#1, g#1)", "d1.all = accumulate(d1.all#0, d1#1)", "w1.new = aten.sub.Tensor(w1, d1.all)",
    ]  # fmt: skip
    assert [i.name for i in whole.program.inputs] == ["w1", "x"] and [o.key for o in whole.program.outputs] == ["w1"]
    assert [n for n, _ in whole.origin] == [0] * 2 + [1] * 4 + [2] * 2 + [3] * 4 + [4]


def test_memory_along_a_lane() -> None:
    p = unroll(parse(STEP), 0).program
    live = [sum(row.values()) for row in curve(p, {})]
    base = WEIGHT + 2 * ROWS  # the weight, and the batch of both microbatches, which the caller holds
    by = dict(zip([op.name for op in p.ops], live, strict=True))
    assert by["h#0"] == by["h#1"] == base + ROWS  # sent, and gone
    assert by["g.s0#0"] == base + ROWS and by["d0#0"] == base + ROWS + WEIGHT
    assert by["d0#1"] == base + WEIGHT + ROWS + WEIGHT  # the sum so far, what came, its product
    assert by["d0.all"] == base + 2 * WEIGHT  # the sum so far, the last product
    assert memory(p).peak_bytes == max(live) and memory(p).peak_at == "d0#1"
    assert curve(p, {"w0": "weights"})[0]["weights"] == WEIGHT


def test_what_explain_counts_on_lanes() -> None:
    e = explain(parse(STEP), zero=0)
    assert e.mesh == {"pp": 2} and e.schedule is not None and e.schedule.microbatches == 2 and e.schedule.bubble_share_equal == pytest.approx(1 / 3)
    assert [r.coordinate for r in e.ranks] == [{"pp": 0}, {"pp": 1}] and [r.param_bytes for r in e.ranks] == [WEIGHT, WEIGHT]
    assert [(c.axis, c.op, c.count, c.bytes) for c in e.collectives] == [("pp", "send", 2, 2 * ROWS)]
    assert e.matmul_flops * 2 == e.matmul_flops_one_device == 4 * 2 * 32 * 8 * 8
    exact = {c.what: (c.counted, c.expected) for c in e.closed_forms if c.expected is not None}
    assert exact["parameters"] == (WEIGHT, WEIGHT) and exact["matmuls"] == (e.matmul_flops, e.matmul_flops)
    assert not e.unruled_ops and not [r for r in e.replicated_ops if r.flops]


def test_a_program_without_a_schedule() -> None:
    p = parse(STEP.replace("\nlane 1: F0 B0 F1 B1 once.1", "").replace("\nlane 0: F0 F1 B0 B1 once.1", "").replace("\nschedule 1f1b stages=2 microbatches=2 loops=1", ""))
    with pytest.raises(ValueError, match="no schedule"):
        unroll(p, 0)
