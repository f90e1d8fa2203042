"""diff: what it says about each kind of change, and that it always ends on one screen."""

from __future__ import annotations

from hypothesis import given, settings
from strategies import programs

from deepseed.ir.diff import diff
from deepseed.ir.program import Program
from deepseed.ir.text import parse


def step(body: str, facts: str = "placed", head: str = '%w : f32[64@(tp,dp), 32] param "w"\n%x : f32[8@dp, 32] batch "x"\n') -> Program:
    return parse(f"program step mesh(dp=2, tp=2) facts({facts})\n{head}{body}")


BEFORE = step(
    '%t = permute(%w as [64@tp, 32], dims=[1, 0]) : f32[32, 64@tp] {phase="forward"}\n'
    '%y = aten.mm(%x, %t) : f32[8@dp, 64@tp] {phase="forward"}\n'
    'return %y output "0"\n'
)
EXPLICIT = step(
    '%w.1 = reshard(%w) : f32[64@tp, 32] {phase="forward"}\n'
    '%t = permute(%w.1, dims=[1, 0]) : f32[32, 64@tp] {phase="forward"}\n'
    '%y = aten.mm(%x, %t) : f32[8@dp, 64@tp] {phase="forward"}\n'
    'return %y output "0"\n',
    "placed, explicit",
)
LOWERED = step(
    '%w.s = all_gather.start(%w, axis="dp") : f32[64@tp, 32] {phase="forward"}\n'
    '%w.1 = wait(%w.s) : f32[64@tp, 32] {phase="forward"}\n'
    '%t = permute(%w.1, dims=[1, 0]) : f32[32, 64@tp] {phase="forward"}\n'
    '%y = aten.mm(%x, %t) : f32[8@dp, 64@tp] {phase="forward"}\n'
    'return %y output "0"\n',
    "placed, explicit, lowered",
)


def test_reshards_that_became_explicit() -> None:
    assert diff(BEFORE, EXPLICIT) == (
        "step mesh(dp=2, tp=2): 2 -> 3 ops, 4 -> 5 values, facts +explicit\n"
        "ops\n"
        "  +    1  reshard   (0 -> 1)\n"
        "uses that want another layout than the value has: 1 -> 0\n"
    )


def test_collectives_by_kind_and_axis() -> None:
    assert diff(EXPLICIT, LOWERED) == (
        "step mesh(dp=2, tp=2): 3 -> 4 ops, 5 -> 6 values, facts +lowered\n"
        "ops\n"
        "  +    1  all_gather.start   (0 -> 1)\n"
        "  -    1  reshard   (1 -> 0)\n"
        "  +    1  wait   (0 -> 1)\n"
        "collectives\n"
        "  +    1  all_gather over dp   (0 -> 1)\n"
    )


def test_layouts_that_changed_are_grouped() -> None:
    whole = parse(str(BEFORE).replace("8@dp, 64@tp", "8, 64").replace("%w : f32[64@(tp,dp), 32]", "%w : f32[64, 32]").replace("32, 64@tp", "32, 64"))
    text = diff(whole, BEFORE)
    assert "values that changed\n" in text
    assert "  f32[64, 32] -> f32[64@(tp,dp), 32]   1 value: %w\n" in text
    assert "  f32[8, 64] -> f32[8@dp, 64@tp]   1 value: %y\n" in text


def test_inputs_and_outputs_that_came_went_or_moved() -> None:
    other = parse(str(BEFORE).replace('return %y output "0"', 'return %t output "0"\nreturn %y loss "mean"').replace('batch "x"', 'batch "ids"'))
    assert diff(BEFORE, other) == (
        "step mesh(dp=2, tp=2): 2 -> 2 ops, 4 -> 4 values\n"
        "inputs\n  - batch 'x' %x\n  + batch 'ids' %x\n"
        "outputs\n  + loss 'mean' %y\n  output '0': %y -> %t\n"
    )


def test_arguments_and_order() -> None:
    text = diff(BEFORE, parse(str(BEFORE).replace("aten.mm(%x, %t)", "aten.mm(%x, %w)")))
    assert "the same ops on other operands" in text and "- %y = aten.mm(%x, %t)" in text and "+ %y = aten.mm(%x, %w)" in text
    first, second = '%a = aten.neg(%x) : f32[8, 32] {phase="forward"}\n', '%b = aten.neg(%x) : f32[8, 32] {phase="forward"}\n'
    assert "moved: 2 ops" in diff(step(first + second), step(second + first))
    assert diff(BEFORE, BEFORE) == "step: no change (2 ops)\n"


def test_a_long_section_says_how_much_it_leaves_out() -> None:
    many = step("".join(f'%v{i} = aten.f{i}(%x) : f32[8] {{phase="forward"}}\n' for i in range(40)))
    assert "  … 28 more\n" in diff(step(""), many)
    assert "more" not in diff(step(""), many, limit=None) and diff(step(""), many, limit=None).count("aten.f") == 40


@settings(max_examples=60, deadline=None)
@given(programs(), programs())
def test_any_two_programs_compare_on_one_screen(a: Program, b: Program) -> None:
    text = diff(a, b)
    assert (a == b) == ("no change" in text)
    assert text.count("\n") <= 7 * 14 + 2
