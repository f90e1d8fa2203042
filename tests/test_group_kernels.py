"""group_kernels: which groups become their op again, which must not, and the rules of those ops by brute force."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from test_rules import check

from deepseed.codegen.optim import calls_of, run_from
from deepseed.ir.contract import PassError
from deepseed.ir.program import Program
from deepseed.ir.text import parse
from deepseed.ir.verify import verify
from deepseed.ops import OWN, evaluate, torch_dtype
from deepseed.ops.optim import update
from deepseed.passes.group_kernels import group_kernels
from deepseed.passes.in_order import in_order
from deepseed.rules import RULES
from deepseed.rules import strategy as strategy_module
from deepseed.rules.fused import FUSED


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The table with the rows of fused ops."""
    monkeypatch.setattr(strategy_module, "_signatures", {})
    for target, rule in FUSED.items():
        monkeypatch.setitem(RULES, target, rule)
    for kind in ("adamw", "adam", "sgd"):
        monkeypatch.setitem(OWN, f"optim.{kind}", lambda xs, kw, out, dtype, kind=kind: update(kind, xs, kw))
    yield


def grouped(text: str) -> Program:
    return verify(group_kernels(verify(parse(text))))


def shown(p: Program, phase: str = "") -> list[str]:
    """Its ops; of one ``phase``, which is left out."""
    return [line.removesuffix(f' {{phase="{phase}"}}') for line in str(p).splitlines() if " = " in line]


SOFTMAX = """program p mesh(dp=2, tp=2) facts(explicit, lowered, placed)
%x : f32[8{rows}, 16{columns}] batch "x"
origin "y" %y = aten._softmax(%x, -1, false) : f32[8, 16] {{phase="forward"}}
%y.amax = amax(%x, dims=[1], keepdim=true) : f32[8{rows}, 1] {{at="m", phase="forward", origin="y"}}
%y.sub = aten.sub.Tensor(%x, %y.amax) : f32[8{rows}, 16{columns}] {{at="m", phase="forward", origin="y"}}
{between}%y.exp = aten.exp(%y.sub) : f32[8{rows}, 16{columns}] {{at="m", phase="forward", origin="y"}}
%y.sum = sum(%y.exp, dims=[1], keepdim=true) : f32[8{rows}, 1] {{at="m", phase="forward", origin="y"}}
%y = aten.div.Tensor(%y.exp, %y.sum) : f32[8{rows}, 16{columns}] {{at="m", phase="forward", origin="y"}}
{after}return %y output "y"
"""


def softmax(rows: str = "", columns: str = "", between: str = "", after: str = "") -> str:
    return SOFTMAX.format(rows=rows, columns=columns, between=between, after=after)


def test_a_whole_group_is_its_op_again() -> None:
    p = grouped(softmax(rows="@dp"))
    assert shown(p) == ['%y = aten._softmax(%x, -1, false) : f32[8@dp, 16] {at="m", phase="forward"}']
    assert not p.origins and "grouped" in p.facts


def test_an_op_of_others_in_between_does_no_harm() -> None:
    p = grouped(softmax(between='%z = aten.neg(%x) : f32[8, 16] {phase="forward"}\n'))
    assert [op.target for op in p.ops] == ["aten.neg", "aten._softmax"]


def test_an_inner_value_that_is_read_outside_keeps_the_group() -> None:
    text = softmax(after='%z = aten.neg(%y.exp) : f32[8, 16] {phase="forward"}\n')
    assert shown(grouped(text)) == shown(parse(text)) and grouped(text).origins


def test_a_result_that_is_read_before_the_last_operand_exists_keeps_the_group() -> None:
    text = """program p mesh(dp=2) facts(explicit, lowered, placed)
%a : f32[4, 4] batch "a"
origin "t" %s, %t = aten.std_mean(%a, %b) : f32[4, 4], f32[4, 4] {phase="forward"}
%s = aten.neg(%a) : f32[4, 4] {phase="forward", origin="t"}
%b = aten.exp(%s) : f32[4, 4] {phase="forward"}
%t = aten.add.Tensor(%a, %b) : f32[4, 4] {phase="forward", origin="t"}
return %t output "t"
"""
    assert shown(grouped(text)) == shown(parse(text))


def test_a_collective_inside_keeps_the_group() -> None:
    text = """program p mesh(tp=2) facts(explicit, lowered, placed)
%x : f32[8, 16@tp] batch "x"
origin "y" %y = aten._softmax(%x, -1, false) : f32[8, 16] {phase="forward"}
%y.amax = amax(%x, dims=[1], keepdim=true) : f32[8, 1] max@tp {phase="forward", origin="y"}
%y.amax.w.start = all_reduce.start(%y.amax, axis="tp") : f32[8, 1] {phase="forward"}
%y.amax.w = wait(%y.amax.w.start) : f32[8, 1] {phase="forward"}
%y.sub = aten.sub.Tensor(%x, %y.amax.w) : f32[8, 16@tp] {phase="forward", origin="y"}
%y.exp = aten.exp(%y.sub) : f32[8, 16@tp] {phase="forward", origin="y"}
%y.sum = sum(%y.exp, dims=[1], keepdim=true) : f32[8, 1] sum@tp {phase="forward", origin="y"}
%y.sum.w.start = all_reduce.start(%y.sum, axis="tp") : f32[8, 1] {phase="forward"}
%y.sum.w = wait(%y.sum.w.start) : f32[8, 1] {phase="forward"}
%y = aten.div.Tensor(%y.exp, %y.sum.w) : f32[8, 16@tp] {phase="forward", origin="y"}
return %y output "y"
"""
    assert shown(grouped(text)) == shown(parse(text))


def test_a_size_in_the_formula_keeps_the_group_where_that_dimension_is_split() -> None:
    """Elementwise and split, yet the whole op would divide by the local number of elements."""
    text = """program p mesh(dp=2) facts(explicit, lowered, placed)
%g : f32[] batch "g"
%x : f32[8@dp] batch "x"
%t : f32[8@dp] batch "t"
origin "d" %d = aten.mse_loss_backward(%g, %x, %t, 1) : f32[8] {phase="backward"}
%d.sub = aten.sub.Tensor(%x, %t) : f32[8@dp] {phase="backward", origin="d"}
%d.mul = aten.mul.Tensor(%d.sub, 2) : f32[8@dp] {phase="backward", origin="d"}
%d.div = aten.div.Tensor(%g, 8) : f32[] {phase="backward", origin="d"}
%d = aten.mul.Tensor(%d.mul, %d.div) : f32[8@dp] {phase="backward", origin="d"}
return %d output "d"
"""
    assert shown(grouped(text)) == shown(parse(text))
    whole = grouped(text.replace("@dp", ""))
    assert [op.target for op in whole.ops] == ["aten.mse_loss_backward"]


def test_operands_are_read_as_they_arrive_and_a_missing_result_gets_a_layout() -> None:
    text = """program p mesh(dp=2) facts(explicit, lowered, placed)
%x : f32[8@dp, 16] batch "x"
%w : f32[16@dp] param "w"
origin "y" %y, %mean, %rstd = aten.native_layer_norm(%x, [16], %w, none, 1e-05) : f32[8, 16], f32[8, 1], f32[8, 1] {phase="forward"}
%mean.s = sum(%x, dims=[1], keepdim=true) : f32[8@dp, 1] {phase="forward", origin="y"}
%mean = aten.div.Tensor(%mean.s, 16) : f32[8@dp, 1] {phase="forward", origin="y"}
%w.whole.start = all_gather.start(%w, axis="dp") : f32[16] {phase="forward"}
%w.whole = wait(%w.whole.start) : f32[16] {phase="forward"}
%c = aten.sub.Tensor(%x, %mean) : f32[8@dp, 16] {phase="forward", origin="y"}
%y = aten.mul.Tensor(%c, %w.whole) : f32[8@dp, 16] {phase="forward", origin="y"}
return %y output "y"
return %mean output "mean"
"""
    assert shown(grouped(text))[-1] == (
        "%y, %mean, %rstd = aten.native_layer_norm(%x, [16], %w.whole, none, 1e-05) : f32[8@dp, 16], f32[8@dp, 1], f32[8@dp, 1] {phase=\"forward\"}"
    )


def test_rows_that_are_split_leave_partial_gradients() -> None:
    text = """program p mesh(dp=2) facts(explicit, lowered, placed)
%g : f32[8@dp, 16] batch "g"
%x : f32[8@dp, 16] batch "x"
%m : f32[8@dp, 1] batch "m"
%r : f32[8@dp, 1] batch "r"
%w : f32[16] param "w"
%b : f32[16] param "b"
origin "y" %dx, %dw, %db = aten.native_layer_norm_backward(%g, %x, [16], %m, %r, %w, %b, [true, true, true]) : f32[8, 16], f32[16], f32[16] {phase="backward"}
%c = aten.sub.Tensor(%x, %m) : f32[8@dp, 16] {phase="backward", origin="y"}
%h = aten.mul.Tensor(%c, %r) : f32[8@dp, 16] {phase="backward", origin="y"}
%gh = aten.mul.Tensor(%g, %h) : f32[8@dp, 16] {phase="backward", origin="y"}
%dw = sum(%gh, dims=[0], keepdim=false) : f32[16] sum@dp {phase="backward", origin="y"}
%db = sum(%g, dims=[0], keepdim=false) : f32[16] sum@dp {phase="backward", origin="y"}
%dx = aten.mul.Tensor(%h, %w) : f32[8@dp, 16] {phase="backward", origin="y"}
return %dx output "dx"
return %dw output "dw"
return %db output "db"
"""
    (op,) = grouped(text).ops
    assert op.target == "aten.native_layer_norm_backward" and [bool(t.layout.partials) for t in op.types] == [False, True, True]


UPDATES = """program p mesh(dp=2) facts(explicit, lowered, placed)
%lr : f64[] hyper "lr"
%a : f32[4] param "a"
%b : f32[6@dp] param "b"
%a.g : f32[4@dp] batch "a.g"
%a.step : f32[] state "step/a"
%b.step : f32[] state "step/b"
%a.m : f32[4@dp] state "m/a"
%b.m : f32[6@dp] state "m/b"
origin "a" %a.new, %a.step.new, %a.m.new = optim.adamw(%a, %a.g, %a.step, %a.m, %lr, states=["step", "m"]) : f32[4], f32[], f32[4] {phase="update"}
origin "b" %b.new, %b.step.new, %b.m.new = optim.adamw(%b, %b.g, %b.step, %b.m, %lr, states=["step", "m"]) : f32[6], f32[], f32[6] {phase="update"}
%a.dp0 = shard(%a, axis="dp") : f32[4@dp] {phase="update"}
%a.step.new = aten.add.Tensor(%a.step, 1) : f32[] {at="m", phase="update", origin="a"}
%a.m.new = aten.lerp.Scalar(%a.m, %a.g, 0.1) : f32[4@dp] {at="m", phase="update", origin="a"}
%a.scale = aten.mul.Tensor(%lr, %a.step.new) : f64[] {at="m", phase="update", origin="a"}
%a.move = aten.mul.Tensor(%a.m.new, %a.scale) : f32[4@dp] {at="m", phase="update", origin="a"}
%a.new = aten.sub.Tensor(%a.dp0, %a.move) : f32[4@dp] {at="m", phase="update", origin="a"}
%a.out.start = all_gather.start(%a.new, axis="dp") : f32[4] {phase="update"}
%b.g = aten.neg(%b) : f32[6@dp] {phase="backward"}
%b.step.new = aten.add.Tensor(%b.step, 1) : f32[] {phase="update", origin="b"}
%b.m.new = aten.lerp.Scalar(%b.m, %b.g, 0.1) : f32[6@dp] {phase="update", origin="b"}
%b.scale = aten.mul.Tensor(%lr, %b.step.new) : f64[] {phase="update", origin="b"}
%b.move = aten.mul.Tensor(%b.m.new, %b.scale) : f32[6@dp] {phase="update", origin="b"}
%b.new = aten.sub.Tensor(%b, %b.move) : f32[6@dp] {phase="update", origin="b"}
%a.out = wait(%a.out.start) : f32[4] {phase="update"}
return %a.out param "a"
return %b.new param "b"
return %a.step.new state "step/a"
return %b.step.new state "step/b"
return %a.m.new state "m/a"
return %b.m.new state "m/b"
"""


def test_updates_become_the_optimizer_and_stand_side_by_side() -> None:
    p = grouped(UPDATES)
    assert [re.sub(r" = (\S+?)\(.*", r" \1", line) for line in shown(p)] == [
        "%a.dp0 shard",
        "%a.step.new aten.add.Tensor",
        "%b.g aten.neg",
        "%b.step.new aten.add.Tensor",
        "%a.new, %a.m.new optim.adamw",
        "%b.new, %b.m.new optim.adamw",
        "%a.out.start all_gather.start",
        "%a.out wait",
    ]
    assert "%a.new, %a.m.new = optim.adamw(%a.dp0, %a.g, %a.step.new, %a.m, %lr" in str(p) and not p.origins


CLIPPED = """program p mesh(dp=2) facts(explicit, lowered, placed)
%lr : f64[] hyper "lr"
%s : f32[] batch "s"
%a : f32[4@dp] param "a"
%b : f32[6] param "b"
%a.g : bf16[4@dp] batch "a.g"
%b.g : bf16[6] batch "b.g"
%a.wide = cast(%a.g) : f32[4@dp] {phase="update"}
%a.c = aten.mul.Tensor(%a.wide, %s) : f32[4@dp] {phase="update"}
%b.wide = cast(%b.g) : f32[6] {phase="update"}
%b.c = aten.mul.Tensor(%b.wide, %s) : f32[6] {phase="update"}
%a.new = optim.sgd(%a, %a.c, %lr, states=[]) : f32[4@dp] {phase="update"}
%b.new = optim.sgd(%b, %b.c, %lr, states=[]) : f32[6] {phase="update"}
return %a.new param "a"
return %b.new param "b"
"""


def test_a_kernel_of_ours_scales_and_widens_gradients() -> None:
    p = group_kernels(parse(CLIPPED), kernels=True)
    assert shown(p, "update") == [
        "%a.new = optim.sgd(%a, %a.g, %lr, states=[], scale=%s) : f32[4@dp]",
        "%b.new = optim.sgd(%b, %b.g, %lr, states=[], scale=%s) : f32[6]",
    ]
    before, inputs = parse(CLIPPED), {i.name: torch.randn(i.type.shape).to(torch_dtype(i.type.dtype)) for i in p.inputs}
    want, got = evaluate(before, inputs), evaluate(p, inputs)
    assert all(torch.equal(want[name], got[name]) for name in ("a.new", "b.new"))


def test_torchs_kernel_has_wide_gradients() -> None:
    """It scales them in place, copies that are its own."""
    p = grouped(CLIPPED)
    assert shown(p, "update") == [
        "%a.wide = cast(%a.g) : f32[4@dp]",
        "%b.wide = cast(%b.g) : f32[6]",
        "%a.new = optim.sgd(%a, %a.wide, %lr, states=[], scale=%s) : f32[4@dp]",
        "%b.new = optim.sgd(%b, %b.wide, %lr, states=[], scale=%s) : f32[6]",
    ]


def test_a_gradient_that_something_else_reads_stays() -> None:
    """Scaled, or widened: the kernel of ours reads the narrow one all the same, and what is scaled for two is scaled once."""
    seen = CLIPPED.replace("return %a.new", 'return %a.c output "a.c"\nreturn %b.wide output "b.wide"\nreturn %a.new')
    p = group_kernels(parse(seen), kernels=True)
    assert [line.split(" = ")[1].split(" :")[0] for line in shown(p, "update")] == [
        "cast(%a.g)", "aten.mul.Tensor(%a.wide, %s)", "cast(%b.g)", "optim.sgd(%a, %a.c, %lr, states=[])", "optim.sgd(%b, %b.g, %lr, states=[], scale=%s)",
    ]  # fmt: skip


def test_a_gradient_that_is_a_state_too_is_not_scaled_away() -> None:
    """By which the state would lose its factor."""
    both = CLIPPED.replace("%a.new = optim.sgd(%a, %a.c, %lr, states=[])", '%a.new, %m.new = optim.sgd(%a, %a.c, %a.c, %lr, states=["momentum_buffer"], momentum=0.9)').replace(": f32[4@dp] {phase=\"update\"}\n%b.new", ": f32[4@dp], f32[4@dp] {phase=\"update\"}\n%b.new")
    lines = shown(group_kernels(parse(both), kernels=True), "update")
    assert lines[-2].startswith("%a.new, %m.new = optim.sgd(%a, %a.c, %a.c, %lr") and "scale" not in lines[-2] and "%a.c = aten.mul.Tensor(%a.wide, %s)" in "\n".join(lines)


@pytest.mark.parametrize("where", ['part="once.1"', "stage=1"])
def test_updates_of_another_place_are_another_call(where: str) -> None:
    apart = CLIPPED.replace('%b.new = optim.sgd(%b, %b.c, %lr, states=[]) : f32[6] {phase="update"}', f'%b.new = optim.sgd(%b, %b.c, %lr, states=[]) : f32[6] {{phase="update", {where}}}')
    p = group_kernels(parse(apart), kernels=True)
    assert [len(c.runs) for c in calls_of(p)] == [1, 1] and [len(c.runs) for c in calls_of(group_kernels(parse(CLIPPED), kernels=True))] == [1]


def test_parameter_groups_are_one_call_of_several_formulas() -> None:
    """Those with the same options side by side."""
    three = CLIPPED.replace("%b.new = optim.sgd(%b, %b.c, %lr, states=[])", "%b.new = optim.sgd(%b, %b.c, %lr, states=[], weight_decay=0.1)").replace("return %a.new", "%e.new = optim.sgd(%e, %e.g, %lr, states=[]) : f32[4@dp] {phase=\"update\"}\nreturn %e.new param \"e\"\nreturn %a.new")
    three = three.replace("%a.g : bf16", '%e : f32[4@dp] param "e"\n%e.g : bf16[4@dp] batch "e.g"\n%a.g : bf16').replace("%e.new = optim.sgd(%e, %e.g,", '%e.wide = cast(%e.g) : f32[4@dp] {phase="update"}\n%e.c = aten.mul.Tensor(%e.wide, %s) : f32[4@dp] {phase="update"}\n%e.new = optim.sgd(%e, %e.c,')
    (call,) = calls_of(group_kernels(parse(three), kernels=True))
    assert [[op.name for op in run] for run in call.runs] == [["a.new", "e.new"], ["b.new"]] and len(call.formulas) == 2


def test_what_was_moved_follows_what_it_reads() -> None:
    """In order; what waits for itself is refused."""
    text = """program p mesh() facts()
%x : f32[2] batch "x"
%a = aten.neg(%x) : f32[2] {phase="forward"}
%b = aten.exp(%a) : f32[2] {phase="forward"}
%c = aten.exp(%b) : f32[2] {phase="forward"}
%d = aten.neg(%a) : f32[2] {phase="forward"}
return %c output "c"
return %d output "d"
"""
    p = parse(text)
    a, b, c, d = p.ops
    assert [op.name for op in in_order(p, [[d], [c], [b], [a]])] == ["a", "d", "b", "c"] and [op.name for op in in_order(p, [[c], [a, b], [d]])] == ["a", "b", "c", "d"]
    with pytest.raises(PassError, match=r"%b = aten.exp waits for %a, which waits for it\n  fix: "):
        list(in_order(p, [[b], [c], [d]]))


def test_gradients_of_several_dtypes_are_a_call_each() -> None:
    """Those that stand side by side in one dtype."""
    mixed = CLIPPED.replace('%b.g : bf16[6] batch "b.g"', '%b.g : f32[6] batch "b.g"').replace("%b.wide = cast(%b.g) : f32[6]", "%b.wide = aten.neg(%b.g) : f32[6]")
    p = group_kernels(parse(mixed), kernels=True)
    at = [n for n, op in enumerate(p.ops) if op.target == "optim.sgd"]
    assert [len(run_from(n, p)) for n in at] == [1, 1]
    q = group_kernels(parse(CLIPPED), kernels=True)
    assert len(run_from(0, q)) == 2


def test_an_optimizer_without_a_rule_stays_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepseed.rules.table.RULES", {target: rule for target, rule in RULES.items() if target != "optim.adamw"})
    assert shown(grouped(UPDATES)) == shown(parse(UPDATES))


def test_mixed_dtypes_stay_apart() -> None:
    mixed = UPDATES.replace("%a.g : f32[4@dp]", "%a.g : f64[4@dp]")
    assert str(grouped(mixed)).count("= optim.adamw") == 1 + 1  # b, and a's origin


def test_an_op_that_some_devices_lack_stays_apart() -> None:
    text = """program p mesh() facts(explicit, lowered, placed)
%x : f32[8, 16] batch "x"
origin "y" %y, %r = aten._fused_rms_norm(%x, [16], none, 1e-05) : f32[8, 16], f32[8, 1] {phase="forward"}
%y.m = aten.mul.Tensor(%x, %x) : f32[8, 16] {phase="forward", origin="y"}
%r = sum(%y.m, dims=[1], keepdim=true) : f32[8, 1] {phase="forward", origin="y"}
%y = aten.div.Tensor(%x, %r) : f32[8, 16] {phase="forward", origin="y"}
return %y output "y"
"""
    assert shown(grouped(text)) == shown(parse(text))


FUSED_EXAMPLES = """
aten.addmm(f32[12], f32[24, 12], f32[12, 12]) : f32[24, 12]
aten.addmm(f32[24, 36], f32[24, 12], f32[12, 36]) : f32[24, 36]
aten.addmm(f32[1, 36], f32[24, 12], f32[12, 36]) : f32[24, 36]
aten._safe_softmax(f32[12, 24], -1) : f32[12, 24]
aten.mean.dim(f32[12, 24, 12], [1], false) : f32[12, 12]
aten.mean.dim(f32[12, 24, 12], [-1, 0], true) : f32[1, 24, 1]
aten.native_layer_norm(f32[12, 24, 36], [36], f32[36], f32[36], 1e-05) : f32[12, 24, 36], f32[12, 24, 1], f32[12, 24, 1]
aten.native_layer_norm(f32[12, 24, 12], [24, 12], none, none, 1e-05) : f32[12, 24, 12], f32[12, 1, 1], f32[12, 1, 1]
aten.native_layer_norm_backward(f32[12, 24, 36], f32[12, 24, 36], [36], f32[12, 24, 1], f32[12, 24, 1], f32[36], f32[36], [true, true, true]) : f32[12, 24, 36], f32[36], f32[36]
aten.nll_loss_forward(f32[12, 6], i64[12], none, 2, -100) : f32[], f32[]
aten.nll_loss_backward(f32[], f32[12, 6], i64[12], none, 1, -100, f32[]) : f32[12, 6]
optim.adamw(f32[12, 24], f32[12, 24], f32[], f32[12, 24], f32[12, 24], f64[], states=["step", "exp_avg", "exp_avg_sq"], betas=[0.9, 0.99], eps=0.01) : f32[12, 24], f32[12, 24], f32[12, 24]
optim.adam(f32[12], f32[12], f32[], f32[12], f32[12], f32[12], f64[], states=["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"], betas=[0.9, 0.99], eps=0.01, amsgrad=true) : f32[12], f32[12], f32[12], f32[12]
optim.sgd(f32[12, 24], f32[12, 24], f32[12, 24], f64[], states=["momentum_buffer"], momentum=0.9) : f32[12, 24], f32[12, 24]
""".strip().splitlines()


@pytest.mark.parametrize("text", FUSED_EXAMPLES)
def test_rules_of_fused_ops_by_brute_force(text: str) -> None:
    assert check(text) > 0
