"""Translation validation: what a pass may write differently, and what it may not, program by program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from time import perf_counter

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import deepseed
from deepseed import pipeline
from deepseed.asked import passes_table
from deepseed.check import fragments
from deepseed.check.translation import TranslationError, check_localized, follow, number
from deepseed.ir.contract import program_pass
from deepseed.ir.program import Program
from deepseed.ir.text import parse
from deepseed.passes.canonicalize import canonicalize
from deepseed.passes.localize import localize


def program(body: str, facts: str = "captured", mesh: str = "") -> Program:
    return parse(f"program p mesh({mesh}) facts({facts})\n{body.strip()}\n")


def same(before: str, after: str, mesh: str = "", shape: str = "") -> None:
    follow(number(program(before, "captured", mesh)), program(after, "captured", mesh))


def other(before: str, after: str, mesh: str = "") -> str:
    with pytest.raises(TranslationError) as error:
        same(before, after, mesh)
    return str(error.value)


X = '%x : f32[4, 6] batch "x"\n%w : f32[4, 6] param "w"\n'


def test_moves_are_the_identity() -> None:
    before = '%x : f32[4@dp, 6] batch "x"\n%y = aten.neg(%x as [4, 6]) : f32[4, 6] {phase="forward"}\nreturn %y output "0"'
    after = """%x : f32[4@dp, 6] batch "x"
%s = all_gather.start(%x, axis="dp") : f32[4, 6] {phase="forward"}
%g = wait(%s) : f32[4, 6] {phase="forward"}
%y = aten.neg(%g) : f32[4, 6] {phase="forward"}
return %y output "0"
"""
    same(before, after, "dp=2")


def test_a_stale_gather_is_another_value() -> None:
    new = '%n = aten.sub.Tensor(%w, %x) : f32[4, 6] {at="up", phase="update"}\n%y = aten.neg(%{}) : f32[4, 6] {at="next", phase="update"}\nreturn %y output "0"'
    said = other(X + new.replace("{}", "n", 1), X + new.replace("{}", "w", 1))
    assert "%y = aten.neg(%w f32[4, 6]) : f32[4, 6]" in said and "at next, update" in said and "aten.neg(%n)" in said


def test_swapped_operands_are_named_with_both_numbers() -> None:
    y = '%y = aten.sub.Tensor(%{}, %{}) : f32[4, 6] {{at="loss", phase="forward"}}\nreturn %y output "0"'
    said = other(X + y.format("x", "w"), X + y.format("w", "x"))
    assert "element 0 of [4, 6] is " in said and "at loss, forward" in said
    same(X + y.format("x", "w"), X + y.format("x", "w"))


def test_row_numbers_of_a_factorization_are_drawn_as_such() -> None:
    given = '%lu : f64[8, 4, 4] batch "lu"\n%rows : i32[8, 4] batch "rows"\n%b : f64[1, 8, 4, 4] batch "b"\n'
    solve = '%y = aten.linalg_lu_solve(%lu, %rows, %r, left=false, adjoint=true) : f64[8, 4, 4] {phase="backward"}\nreturn %y output "0"'
    once = given + '%r = reshape(%b) : f64[8, 4, 4] {phase="backward"}\n' + solve
    twice = given + '%q = reshape(%b) : f64[32, 4] {phase="backward"}\n%s = reshape(%q) : f64[8, 4, 4] {phase="backward"}\n' + solve.replace("%r,", "%s,")
    same(twice, once)
    assert "on random operands element" in other(twice, once.replace("adjoint=true", "adjoint=false"))


SOFTMAX = X + '%y = aten._softmax(%x, 1, false) : f32[4, 6] {at="attn", phase="forward"}\nreturn %y output "0"'


def test_a_decomposition_is_run() -> None:
    p = program(SOFTMAX)
    good = canonicalize(p)
    numbering = number(p)
    follow(numbering, good)
    wrong = parse(str(good).replace("dims=[1], keepdim=true) : f32[4, 1]", "dims=[0], keepdim=true) : f32[1, 6]"))
    with pytest.raises(TranslationError, match=r"is another value than before the pass: on random operands element \d+ of \[4, 6\] is") as error:
        follow(numbering, wrong)
    assert "aten._softmax(%x, 1, false)" in str(error.value) and "aten.exp" in str(error.value) and "at attn" in str(error.value)
    follow(numbering, good)  # the numbering is as it was


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("%m = aten.mul.Tensor(%x, 1.0) : f32[4, 6] {phase=\"forward\"}\n%y = aten.neg(%m)", "%y = aten.neg(%x)"),
        ("%a = full(value=0.9) : f32[] {phase=\"forward\"}\n%b = full(value=0.7) : f32[] {phase=\"forward\"}\n%c = aten.mul.Tensor(%a, %b) : f32[] {phase=\"forward\"}\n%y = aten.mul.Tensor(%x, %c)",
         "%c = full(value=0.6299999952316284) : f32[] {phase=\"forward\"}\n%y = aten.mul.Tensor(%x, %c)"),
        ("%a = reshape(%x) : f32[24] {phase=\"forward\"}\n%b = reshape(%a) : f32[4, 6] {phase=\"forward\"}\n%y = aten.mul.Tensor(%b, %x)", "%y = aten.mul.Tensor(%x, %x)"),
        ("%a = aten.neg(%x) : f32[4, 6] {phase=\"forward\"}\n%b = aten.neg(%x) : f32[4, 6] {phase=\"forward\"}\n%y = aten.add.Tensor(%a, %b)", "%a = aten.neg(%x) : f32[4, 6] {phase=\"forward\"}\n%y = aten.add.Tensor(%a, %a)"),
    ],
    ids=["one", "constants in their own dtype", "views", "computed once"],
)  # fmt: skip
def test_simplifications_are_the_same_value(before: str, after: str) -> None:
    tail = ' : f32[4, 6] {phase="forward"}\nreturn %y output "0"'
    same(X + before + tail, X + after + tail)


def test_a_bound_that_hides_a_scalar_does_not_hide_its_loss() -> None:
    clamp = """%n = sum_of_squares(%x) : f32[] {phase="update"}
%r = aten.reciprocal(%n) : f32[] {phase="update"}
%c = aten.clamp(%r, none, 1.0) : f32[] {phase="update"}
%m = aten.mul.Tensor(%w, %c) : f32[4, 6] {phase="update"}
%y = aten.neg(%{}) : f32[4, 6] {phase="update"}
return %y output "0"
return %c output "1"
"""
    assert "%y" in other(X + clamp.replace("{}", "m"), X + clamp.replace("{}", "w"))


def test_what_does_nothing_to_an_input_is_dropped() -> None:
    p = program(X + '%a = permute(%x, dims=[1, 0]) : f32[6, 4] {phase="forward"}\n%y = permute(%a, dims=[1, 0]) : f32[4, 6] {phase="forward"}\nreturn %y output "0"')
    good = canonicalize(p)
    assert not good.ops
    follow(number(p), good)
    with pytest.raises(TranslationError, match="output output '0'"):
        follow(number(p), parse(str(good).replace("return %x", "return %w")))


@pytest.mark.parametrize(("far", "says"), [(10.0, True), (1000.0, False)])
def test_no_number_is_no_evidence(far: float, says: bool) -> None:
    """A root of what is negative on most operands: others are drawn, and where there is no number on these either, it is said to be unproved."""
    text = '%x : f32[4, 6] batch "x"\n%{a} = aten.sub.Tensor(%x, {c}) : f32[4, 6] {{phase="forward"}}\n%y = aten.sqrt(%{a}) : f32[4, 6] {{phase="forward"}}\nreturn %y output "0"\n'
    numbering, other = number(program(text.format(a="a", c=far))), program(text.format(a="b", c=far + 1))
    if says:
        with pytest.raises(TranslationError, match="on random operands element 0"):
            follow(numbering, other)
    else:
        assert follow(numbering, other).unproved == ["y"]


@pytest.mark.parametrize(("most", "found"), [(400, "refused"), (2, "unproved")])
def test_expressions_that_are_cut_off_are_not_compared(most: int, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands where they were cut is another value on each side: numbers of it would say nothing."""
    monkeypatch.setattr(fragments, "MOST_OPS", most)
    begin, end = '%x : f32[4, 6] batch "x"\n', 'return %y output "0"\n'
    chain = "".join(f'%{{side}}{n + 1} = aten.{{op}}(%{{side}}{n}) : f32[4, 6] {{{{phase="forward"}}}}\n' for n in range(8))
    sides = [f"{begin}%{side}0 = aten.neg(%x) : f32[4, 6] {{phase=\"forward\"}}\n{chain.format(side=side, op=op)}%y = aten.abs(%{side}8) : f32[4, 6] {{phase=\"forward\"}}\n{end}" for side, op in (("a", "sin"), ("b", "cos"))]
    numbering = number(program(sides[0]))
    if found == "refused":
        with pytest.raises(TranslationError, match="on random operands element 0"):
            follow(numbering, program(sides[1]))
    else:
        assert follow(numbering, program(sides[1])).unproved == ["y"]


FACTORED = """%x : f32[6, 6] batch "x"
%n, %m, %r = aten.native_layer_norm(%x, [6], none, none, 1e-05) : f32[6, 6], f32[6, 1], f32[6, 1] {phase="forward"}
%g, %i = aten.linalg_cholesky_ex(%n, check_errors=true) : f32[6, 6], i32[] {phase="backward"}
%h = aten.native_layer_norm_backward(%g, %x, [6], %m, %r, none, none, [true, false, false]) : f32[6, 6] {phase="backward"}
return %h output "0"
"""


def test_statistics_are_opened_and_no_more() -> None:
    """Mean and rstd are drawn with the values that they are of; what else the backward reads stays as it was drawn. Its gradient here
    does not run on random operands."""
    p = program(FACTORED)
    good = canonicalize(p)
    numbering = number(p)
    follow(numbering, good)
    wrong = str(good).replace("%h.sub.2 = aten.sub.Tensor(", "%h.sub.2 = aten.add.Tensor(")
    with pytest.raises(TranslationError, match=r"on random operands element 0 of .*; with what their operands are made of, .* does not run .*cholesky"):
        follow(numbering, parse(wrong))


NORM = """%x : f32[8, 4] batch "x"
%w : f32[4] param "w"
%b : f32[4] param "b"
%mean : f32[4] buffer "mean"
%var : f32[4] buffer "var"
%y, %s, %r = aten.native_batch_norm(%x, %w, %b, %mean, %var, true, 0.1, 1e-05) : f32[8, 4], f32[4], f32[4] {at="bn", phase="forward"}
return %y output "0"
"""


def test_what_an_op_writes_is_an_output() -> None:
    p = program(NORM)
    good = canonicalize(p)
    assert {o.key for o in good.outputs if o.role == "buffer"} == {"mean", "var"}
    follow(number(p), good)
    with pytest.raises(TranslationError, match="output buffer 'mean'"):
        follow(number(p), parse(str(good).replace('running_mean buffer "mean"', 'running_var buffer "mean"')))
    with pytest.raises(TranslationError, match="output buffer 'var' is returned before the pass only"):
        follow(number(p), parse("\n".join(line for line in str(good).splitlines() if not line.endswith('buffer "var"') or not line.startswith("return"))))


@pytest.mark.parametrize("target", ["aten.native_batch_norm", "aten._native_batch_norm_legit_functional"])
def test_a_kernel_that_compares_no_sizes_is_run_on_sizes_that_fit_together(target: str) -> None:
    text = NORM.replace("[8, 4]", "[1024, 24]").replace("[4]", "[24]").replace("aten.native_batch_norm", target)
    if target.endswith("functional"):
        text = text.replace("%y, %s, %r", "%y, %s, %r, %m, %v").replace("f32[24], f32[24] {", "f32[24], f32[24], f32[24], f32[24] {")
    p = program(text)
    good = canonicalize(p)
    follow(number(p), good)
    with pytest.raises(TranslationError, match="is another value"):
        follow(number(p), parse("\n".join(line if line.startswith("origin") else line.replace("1e-05)", "1e-04)") for line in str(good).splitlines())))


LOSS = """%x : f32[{n}, {v}] batch "x"
%t : i64[{n}] batch "t"
%l = aten._log_softmax(%x, 1, false) : f32[{n}, {v}] {{at="loss", phase="forward"}}
%y, %count = aten.nll_loss_forward(%l, %t, none, 1, -100) : f32[], f32[] {{at="loss", phase="forward"}}
return %y loss "loss"
"""


@pytest.mark.parametrize(("n", "v"), [(6, 5), (65536, 50257)])
def test_a_large_loss_is_run_small(n: int, v: int) -> None:
    p = program(LOSS.format(n=n, v=v))
    good = canonicalize(p)
    started = perf_counter()
    follow(number(p), good)
    assert perf_counter() - started < 10
    for old, new in (("-100", "-99"), ("aten.neg(", "aten.abs("), (f"sum(%l.exp, dims=[1], keepdim=true) : f32[{n}, 1]", f"amax(%l.exp, dims=[1], keepdim=true) : f32[{n}, 1]")):
        text = "\n".join(line.replace(old, new) if not line.startswith("origin") else line for line in str(good).splitlines())
        assert text != str(good).rstrip("\n"), old
        with pytest.raises(TranslationError, match="is another value"):
            follow(number(p), parse(text))


def test_what_is_too_large_to_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    head = '%x : f32[67108864] batch "x"\n%r = reshape(%x) : f32[8192, 8192] {phase="forward"}\n'
    before = program(head + '%s = aten.mul.Tensor(%r, 1.0) : f32[8192, 8192] {phase="forward"}\n%y = reshape(%s) : f32[67108864] {phase="forward"}\nreturn %y output "0"')
    after = program(head + '%y = reshape(%r) : f32[67108864] {phase="forward"}\nreturn %y output "0"')
    assert follow(number(before), after).unproved == ["y"]
    one = program_pass(requires=set(), provides={"canonical"})(lambda p: replace(after, facts=p.facts))
    (done,) = pipeline.run(before, {}, (one,))
    assert done.unproved == ("y",)
    assert "unproved: 1 values" in "\n".join(passes_table([pipeline.Passed("capture", before, 0.0), done]))
    small = program(str(after).split("\n", 1)[1].replace("67108864", "64").replace("8192", "8"))
    assert follow(number(small), small).unproved == []


def test_outputs_and_inputs_stay() -> None:
    y = '%y = aten.neg(%x) : f32[4, 6] {phase="forward"}\n'
    assert "output output '1' is returned before the pass only" in other(X + y + 'return %y output "0"\nreturn %x output "1"', X + y + 'return %y output "0"')
    assert "input param 'w'" in other(X + y + 'return %y output "0"', '%x : f32[4, 6] batch "x"\n' + y + 'return %y output "0"')
    assert "output output '0'" in other(X + y + 'return %y output "0"', X + y + 'return %w output "0"')


RANKS = """%x : f32[8@dp, 4] batch "x"
%a = aten.neg(%x) : f32[8@dp, 4] {at="up", phase="forward"}
%i = iota(start=0, step=1) : i64[8@dp] {at="up", phase="forward"}
%s = all_gather.start(%a, axis="dp") : f32[8, 4] {at="up", phase="forward"}
%t = all_gather.start(%i, axis="dp") : i64[8] {at="up", phase="forward"}
%g = wait(%s) : f32[8, 4] {phase="forward"}
%j = wait(%t) : i64[8] {phase="forward"}
return %g output "0"
return %j output "1"
"""


def test_each_rank_runs_the_shared_program() -> None:
    shared = program(RANKS, "lowered", "dp=2")
    for rank in (0, 1):
        where = shared.mesh.coordinate(rank)
        mine = localize(shared, where)
        check_localized(shared, mine, where)
        lines = str(mine).splitlines()
        turned = next(n for n, line in enumerate(lines) if line.startswith("%s ="))
        lines[turned], lines[turned + 1] = lines[turned + 1], lines[turned]
        with pytest.raises(TranslationError, match=r"op 2 of the rank at \{'dp': \d\}"):
            check_localized(shared, parse("\n".join(lines)), where)
    other = localize(shared, {"dp": 1})
    with pytest.raises(TranslationError, match=r"another mesh on the rank at \{'dp': 0\}, mesh\(dp=2\) at\(dp=1\)"):
        check_localized(shared, other, {"dp": 0})
    with pytest.raises(TranslationError, match=r"%i = iota.*\n.*\n.*\n  due at up: .*index=\[\[\[2, 0, 1\]"):
        check_localized(shared, replace(other, mesh=shared.mesh.seen_from({"dp": 0})), {"dp": 0})


def test_the_pipeline_names_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    p = program(SOFTMAX)
    good = canonicalize(p)
    pipeline.check_translation(p, good, "canonicalize")
    with pytest.raises(pipeline.CheckError, match="after pass canonicalize: "):
        pipeline.check_translation(p, parse(str(good).replace("aten.exp(", "aten.expm1(")), "canonicalize")


@pytest.mark.parametrize(
    "loss", [F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.soft_margin_loss, F.binary_cross_entropy_with_logits, lambda o, y: F.binary_cross_entropy(o.sigmoid(), y)]
)  # fmt: skip
def test_a_mean_in_float32_over_thirty_elements(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """No float32 is 1/30: what makes the gradient of the loss, a constant, smaller by that may not round it."""
    model, batch = nn.Linear(4, 5), (torch.randn(6, 4), torch.rand(6, 5))
    step = deepseed.compile(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), loss_fn=lambda m, b: 0.7 * loss(m(b[0]), b[1]))
    want = 0.7 * loss(model(batch[0]), batch[1])
    assert float(step(batch)) == pytest.approx(float(want), rel=1e-6)


def test_what_was_proved_is_known_when_it_is_computed_again() -> None:
    """canonicalize takes a layer norm apart, plan_memory computes its statistics again, group_kernels puts both together: one value, one number."""
    from deepseed.target import load
    from deepseed.verify import verify

    found = load("hf:GPT2LMHeadModel(num_hidden_layers=2)")
    report = verify(found.model, found.batch, "tp2+remat", steps=1, backend="simulate")
    assert report.ok, str(report)
