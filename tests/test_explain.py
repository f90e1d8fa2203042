"""What explain counts, on programs small enough to count by hand; liveness against PyTorch's own views; why; closed forms."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseed import closed_forms as form
from deepseed.explain import explain, gradients
from deepseed.explain_text import amount
from deepseed.ir.mesh import Mesh
from deepseed.ir.text import parse
from deepseed.memory import memory
from deepseed.rules.strides import contiguous, reshaped
from deepseed.why import UnknownName, why

HEAD = "program step mesh(dp=2, tp=2) facts(canonical, captured, explicit, lowered, placed)\n"
STEP = (
    HEAD
    + """%up : f32[64@(tp,dp), 32] param "layers.0.up.weight"
%down : f32[32@dp, 64@tp] param "layers.0.down.weight"
%norm : f32[32] param "norm.weight"
%m : f32[64@(tp,dp), 32] state "m/layers.0.up.weight"
%x : f32[8@dp, 32] batch "x"
%up.start = all_gather.start(%up, axis="dp") : f32[64@tp, 32] {phase="forward"}
%up.whole = wait(%up.start) : f32[64@tp, 32] {phase="forward"}
%up.t = permute(%up.whole, dims=[1, 0]) : f32[32, 64@tp] {phase="forward"}
%h = aten.mm(%x, %up.t) : f32[8@dp, 64@tp] {at="layers.0.up", phase="forward"}
%down.start = all_gather.start(%down, axis="dp") : f32[32, 64@tp] {phase="forward"}
%down.whole = wait(%down.start) : f32[32, 64@tp] {phase="forward"}
%down.t = permute(%down.whole, dims=[1, 0]) : f32[64@tp, 32] {phase="forward"}
%y = aten.mm(%h, %down.t) : f32[8@dp, 32] sum@tp {at="layers.0.down", phase="forward"}
%y.start = all_reduce.start(%y, axis="tp") : f32[8@dp, 32] {phase="forward"}
%y.whole = wait(%y.start) : f32[8@dp, 32] {phase="forward"}
%o = aten._no_rule(%y.whole) : f32[8@dp, 32] {at="odd", phase="forward"}
%x.t = permute(%x, dims=[1, 0]) : f32[32, 8@dp] {phase="backward"}
%g = aten.mm(%x.t, %h) : f32[32, 64@tp] sum@dp {phase="backward"}
%g.t = permute(%g, dims=[1, 0]) : f32[64@tp, 32] sum@dp {phase="backward"}
%g.start = reduce_scatter.start(%g.t, axis="dp") : f32[64@(tp,dp), 32] {phase="update"}
%g.part = wait(%g.start) : f32[64@(tp,dp), 32] {phase="update"}
%new = aten.sub.Tensor(%up, %g.part) : f32[64@(tp,dp), 32] {phase="update"}
return %new param "layers.0.up.weight"
return %o output "0"
"""
)


def test_a_step_counted_by_hand() -> None:
    e = explain(parse(STEP), seconds={"solve_placements": 1.5})
    assert [r.coordinate for r in e.ranks] == [{"dp": 0, "tp": 0}, {"dp": 0, "tp": 1}, {"dp": 1, "tp": 0}, {"dp": 1, "tp": 1}]
    for r in e.ranks:
        assert r.param_bytes == 2 * 64 * 32 * 4 // 4 + 32 * 4
        assert r.grad_bytes == r.optimizer_bytes == 64 * 32 * 4 // 4
    sent = {(c.axis, c.op): (c.count, c.bytes) for c in e.collectives}
    assert sent == {
        ("dp", "all_gather"): (2, 2 * 64 * 32 * 4 // 4),  # the own quarter of each of two, to one other rank
        ("dp", "reduce_scatter"): (1, 64 * 32 * 4 // 2 // 2),
        ("tp", "all_reduce"): (1, 2 * 4 * 32 * 4 // 2),
    }
    assert e.matmul_flops_one_device == 3 * 2 * 8 * 32 * 64 and e.matmul_flops == e.matmul_flops_one_device // 4
    assert [(u.name, u.path, u.bytes) for u in e.unruled_ops] == [("o", "odd", 512)]
    assert [(r.target, r.path, r.axis, r.bytes) for r in e.replicated_ops] == [("param", "norm.weight", "dp", 128)]
    assert [(w.key, w.use) for w in e.weights] == [("layers.*.up.weight", "tp: column"), ("layers.*.down.weight", "tp: row"), ("norm.weight", "")]
    assert e.seconds == {"solve_placements": 1.5} and e.zero == 3


def test_a_product_that_an_axis_repeats_is_named() -> None:
    p = parse(HEAD + '%w : f32[32, 64] param "w"\n%x : f32[8@dp, 32] batch "x"\n%y = aten.mm(%x, %w) : f32[8@dp, 64] {at="head", phase="forward"}\n')
    found = [(r.name, r.target, r.axis, r.flops, r.bytes) for r in explain(p).replicated_ops]
    assert found == [("y", "aten.mm", "tp", 2 * 4 * 32 * 64, 4 * 64 * 4), ("w", "param", "tp", 0, 32 * 64 * 4)]


def test_the_table_is_one_screen_and_the_json_is_json() -> None:
    e = explain(parse(STEP))
    assert len(str(e).splitlines()) < 40 and max(map(len, str(e).splitlines())) < 140
    assert "Psi/(N*t)" in str(e) and "no rule, so replicated: 1" in str(e)
    found = json.loads(json.dumps(e.to_json()))
    assert {"ranks", "collectives", "unruled_ops", "replicated_ops", "seconds", "matmul_flops"} <= set(found)
    assert set(found["ranks"][0]) >= {"param_bytes", "grad_bytes", "optimizer_bytes", "peak_bytes"}
    assert set(found["collectives"][0]) == {"axis", "op", "count", "bytes"}


def test_it_asks_for_a_lowered_program() -> None:
    with pytest.raises(ValueError, match="after lower_reshards"):
        explain(parse("program p mesh() facts(captured)\n"))


def test_gradients_are_what_crosses_into_the_update() -> None:
    assert gradients(parse(STEP)) == ("g.part",)


# memory --------------------------------------------------------------------------------------------------------------


def peak(lines: str) -> int:
    return memory(parse("program p mesh(dp=2) facts(canonical, explicit, lowered, placed)\n" + lines)).peak_bytes


def test_views_share_and_copies_do_not() -> None:
    x = '%x : f32[8, 4] batch "x"\n'
    view = '%v = permute(%x, dims=[1, 0]) : f32[4, 8] {phase="forward"}\n%s = slice(%v, dim=0, start=1, step=2) : f32[2, 8] {phase="forward"}\n'
    assert peak(x + view + "return %s output \"0\"\n") == 128
    flat = '%f = reshape(%x) : f32[32] {phase="forward"}\n'
    assert peak(x + flat + "return %f output \"0\"\n") == 128
    copied = '%v = permute(%x, dims=[1, 0]) : f32[4, 8] {phase="forward"}\n%f = reshape(%v) : f32[32] {phase="forward"}\n'
    assert peak(x + copied + "return %f output \"0\"\n") == 256


def test_a_value_is_freed_after_its_last_use() -> None:
    lines = '%x : f32[8] batch "x"\n' + "".join(f'%a{i} = aten.exp(%{f"a{i - 1}" if i else "x"}) : f32[8] {{phase="forward"}}\n' for i in range(5))
    assert peak(lines + 'return %a4 output "0"\n') == 3 * 32  # the caller holds the batch
    kept = lines + '%b = aten.add.Tensor(%a0, %a4) : f32[8] {phase="forward"}\nreturn %b output "0"\n'
    assert peak(kept) == 4 * 32


def test_parameters_stay_and_what_is_sent_stays_until_the_wait() -> None:
    gather = '%w : f32[8@dp, 4] param "w"\n%s = all_gather.start(%w, axis="dp") : f32[8, 4] {phase="forward"}\n%g = wait(%s) : f32[8, 4] {phase="forward"}\n'
    assert peak(gather + 'return %g output "0"\n') == 64 + 128
    inner = '%w : f32[4, 8@dp] param "w"\n%s = all_gather.start(%w, axis="dp") : f32[4, 8] {phase="forward"}\n%g = wait(%s) : f32[4, 8] {phase="forward"}\n'
    assert peak(inner + 'return %g output "0"\n') == 64 + 2 * 128  # joined along the last dimension: a copy


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_reshape_is_a_view_exactly_where_pytorch_says_so(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.sampled_from((1, 2, 3, 4)), max_size=4))
    t = torch.zeros(shape).permute(data.draw(st.permutations(range(len(shape)))))
    if t.dim() and data.draw(st.booleans()):
        dim = data.draw(st.integers(0, t.dim() - 1))
        t = t.narrow(dim, 0, max(1, t.shape[dim] // 2))
    t = t.expand([3 if n == 1 and data.draw(st.booleans()) else n for n in t.shape])
    left, new = t.numel(), []
    while left > 1:
        new.append(data.draw(st.sampled_from([d for d in range(2, left + 1) if left % d == 0])))
        left //= new[-1]
    new.insert(data.draw(st.integers(0, len(new))), 1)
    made = t.reshape(new)
    shares = made.untyped_storage().data_ptr() == t.untyped_storage().data_ptr()
    assert reshaped(tuple(t.shape), t.stride(), new) == (made.stride() if shares else None)
    assert torch.zeros(shape).stride() == contiguous(shape)


# why and closed forms ------------------------------------------------------------------------------------------------

MLP = """program mlp mesh() facts(canonical, captured)
%up : f32[32, 64] param "up"
%down : f32[64, 32] param "down"
%x : f32[8, 32] batch "x"
%h = aten.mm(%x, %up) : f32[8, 64] {at="up", phase="forward"}
%a = aten.relu(%h) : f32[8, 64] {at="act", phase="forward"}
%y = aten.mm(%a, %down) : f32[8, 32] {at="down", phase="forward"}
%loss = sum(%y, dims=[0, 1], keepdim=false) : f32[] {phase="forward"}
return %loss loss "loss"
"""


def test_why_gives_the_alternatives_and_their_cost() -> None:
    answer = why(parse(MLP), Mesh((("tp", 2),)), 0, "up")
    lines = answer.splitlines()
    assert lines[0] == "%up : f32[32, 64@tp] param 'up'"
    assert any(line.split() == ["chosen", "split(dim", "1)"] for line in lines)
    assert any(line.strip().startswith("+") and line.endswith("whole") for line in lines)
    assert 'rule: "m k, k n -> m n"' in why(parse(MLP), Mesh((("tp", 2),)), 0, "%y")


def test_why_on_a_name_that_is_not_there() -> None:
    with pytest.raises(UnknownName, match="did you mean %down"):
        why(parse(MLP), Mesh((("tp", 2),)), 0, "dwon")
    assert "one device" in why(parse(MLP), Mesh(()), 0, "h")


def test_closed_forms_of_the_zero_paper() -> None:
    """Rajbhandari et al. 2020, figure 1: 7.5B parameters, 64 ranks, mixed precision (2 + 2 + 12 bytes): 120, 31.4, 16.6, 1.9 GB."""
    known = {"Psi": 15.0, "G": 15.0, "Omega": 90.0, "N": 64.0, "t": 1.0}
    total = [sum(form.value(e(stage), **known) for e in (form.param_bytes, form.grad_bytes, form.optimizer_bytes)) for stage in range(4)]
    assert total[0] == 120 and total[3] == pytest.approx(1.9, abs=0.03) and total[2] == pytest.approx(16.6, abs=0.1)
    assert form.value(form.data_volume(3), **known) == pytest.approx(1.5 * form.value(form.data_volume(2), **known))
    with pytest.raises(ValueError, match="needs G"):
        form.value(form.grad_bytes(0), t=1)


def test_amounts() -> None:
    assert [amount(n) for n in (0, 1023, 1536, 3 << 30)] == ["0 B", "1023 B", "1.5 KiB", "3.0 GiB"]
