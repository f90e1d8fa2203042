"""Each error that a compiler writer makes is caught: by the checks of every compile, or by ``verify`` against eager PyTorch.

Edits of programs are in ``hand_mutants``; here, too, are errors in rules, ops, the runtime, the back end and the step itself. A table
says which check caught how many (pytest -s).
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hand_mutants import EDITS, Edit
from small import small
from torch import Tensor

import deepseed.build
import deepseed.check.translation
import deepseed.passes.group_kernels as group_kernels
import deepseed.passes.localize
import deepseed.runtime.simulate
from deepseed import api, ops, pipeline
from deepseed.api import TrainStep
from deepseed.check import instances
from deepseed.check.translation import follow, number
from deepseed.codegen.optim import Update
from deepseed.ir.contract import Pass
from deepseed.ir.program import Op, Program
from deepseed.ir.text import ParseError, parse
from deepseed.rules import RULES, Rule, strategy
from deepseed.verify import VerifyReport, adamw, verify

PLAN = "zero3+tp2+dp2"
CHECKS = {"ProgramError": "verify", "ParseError": "verify", "TypingError": "typing", "RuleError": "typing", "InstanceError": "instances", "TranslationError": "translation"}
TABLE: Counter[str] = Counter()


@pytest.fixture(autouse=True, scope="module")
def remembered_apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPSEED_CACHE_DIR", str(tmp_path_factory.mktemp("instances")))
        yield
    print("\ncaught by:", ", ".join(f"{check} {n}" for check, n in sorted(TABLE.items())))


@pytest.fixture
def forget(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of what was checked with the right rules is remembered, and nothing of this test is afterwards."""
    monkeypatch.setenv("DEEPSEED_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(instances, "_passed", set())
    monkeypatch.setattr(instances, "_hashes", {})
    monkeypatch.setattr(strategy, "_signatures", {})


@cache
def compiled(plan: str) -> TrainStep:
    module, batch, loss_fn = small()
    ours = copy.deepcopy(module).double()
    step = TrainStep(ours, plan, optimizer=adamw(list(ours.parameters())), loss_fn=loss_fn, clip_grad_norm=1.0, widen=True, grads=True, quiet=True)
    step.compile(batch)
    return step


def edited(p: Program, edit: Edit) -> Program:
    text, n = re.subn(edit.old, edit.new, str(p), count=1)
    assert n == 1, f"{edit.what}: no place for {edit.old} after {edit.after}"
    assert text != str(p), edit.what
    return parse(text)


def caught_at_compile(edit: Edit) -> str:
    """Which check of a compile sees the edit, made by its pass; "" where none does."""
    done = compiled(edit.plan).programs.current()
    names = [each.name for each in done.passes]
    at = names.index(edit.after)
    programs = [done.captured.program, *(each.program for each in done.passes)]
    before = programs[at]
    try:
        if edit.after == "localize":
            ranks = [(before.mesh.coordinate(r), pipeline.BY_NAME["localize"](before, before.mesh.coordinate(r))) for r in range(before.mesh.ranks)]
            places = [r for r, (_, p) in enumerate(ranks) if re.search(edit.old, str(p))]
            assert places if edit.rank is None else edit.rank in places, f"{edit.what}: no place for {edit.old}"
            for rank, (where, right) in enumerate(ranks):
                wrong = edited(right, edit) if rank in places and edit.rank in (None, rank) else right
                pipeline.check_program(wrong, edit.after)
                pipeline.check_translation(before, wrong, edit.after, None, {"coordinate": where})
            return ""
        numbering = number(programs[0])
        for p in programs[1 : at + 1]:
            numbering = follow(numbering, p)
        wrong = edited(programs[at + 1], edit)
        pipeline.check_program(wrong, edit.after)
        pipeline.check_translation(before, wrong, edit.after, numbering, {})
    except pipeline.CheckError as error:
        assert f"after pass {edit.after}: " in str(error)
        return CHECKS[type(error.__cause__).__name__]
    except ParseError:
        return "verify"
    return ""


def caught_by_verify(monkeypatch: pytest.MonkeyPatch, plan: str = PLAN) -> str:
    module, batch, loss_fn = small()
    try:
        report = verify(module, batch, plan, loss_fn=loss_fn, steps=2)
    except pipeline.CheckError as error:
        return CHECKS[type(error.__cause__).__name__]
    return "" if report.ok else "eager"


def expect(what: str, by: str) -> None:
    TABLE[by or "nothing"] += 1
    assert by, f"{what} is caught by nothing"


def passes_with(edit: Edit) -> Callable[[Pass], Pass]:
    def wrong(each: Pass) -> Pass:
        return replace(each, run=lambda p, **kw: edited(each.run(p, **kw), edit)) if each.name == edit.after else each

    return wrong


SOME = EDITS[::6]


def caught(edit: Edit, monkeypatch: pytest.MonkeyPatch) -> None:
    by = caught_at_compile(edit)
    if not by and edit.after != "localize":
        monkeypatch.setattr(pipeline, "SHARED", tuple(map(passes_with(edit), pipeline.SHARED)))
        by = caught_by_verify(monkeypatch, edit.plan)
    expect(edit.what, by)


@pytest.mark.parametrize("edit", SOME, ids=lambda e: e.what)
def test_an_error_is_caught(edit: Edit, monkeypatch: pytest.MonkeyPatch) -> None:
    caught(edit, monkeypatch)


@pytest.mark.wide
@pytest.mark.parametrize("edit", [e for e in EDITS if e not in SOME], ids=lambda e: e.what)
def test_an_error_is_caught_wide(edit: Edit, monkeypatch: pytest.MonkeyPatch) -> None:
    caught(edit, monkeypatch)


# errors outside of programs -----------------------------------------------------------------------------------------


def wrong_rule(target: str, form: Any, *more: Any) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setitem(RULES, target, Rule(form, *more))


def local_op(change: Callable[[Op], Op]) -> Callable[[pytest.MonkeyPatch], None]:
    """``localize_op`` itself is wrong, for the pass and the checks alike."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        right = deepseed.rules.local.localize_op
        for module in (deepseed.rules.local, instances):
            patch.setattr(module, "localize_op", lambda op, *args: change(right(op, *args)))

    return apply


def generated(old: str, new: str) -> Callable[[pytest.MonkeyPatch], None]:
    def apply(patch: pytest.MonkeyPatch) -> None:
        right = deepseed.build.generate

        def wrong(p: Program, lane: int) -> str:
            text, n = re.subn(old, new, right(p, lane))
            assert n, old
            return text

        patch.setattr(deepseed.build, "generate", wrong)

    return apply


def exchanged(change: Callable[[str, list[Tensor]], list[Tensor]]) -> Callable[[pytest.MonkeyPatch], None]:
    def apply(patch: pytest.MonkeyPatch) -> None:
        right = deepseed.runtime.simulate._compute
        patch.setattr(deepseed.runtime.simulate, "_compute", lambda kind, parts, reduce: change(kind, right(kind, parts, reduce)))

    return apply


def own_op(target: str, change: Callable[[Any], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """An op of DeepSeed's own computes something else, in the checks and on the ranks."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        right = ops.OWN[target]
        patch.setitem(ops.OWN, target, lambda *args: change(right(*args)))

    return apply


def same_masks(patch: pytest.MonkeyPatch) -> None:
    right = api.torch.tensor

    def wrong(value: Any, **kw: Any) -> Tensor:
        return right([value[0], 0] if kw.get("dtype") == torch.int64 and isinstance(value, list) and len(value) == 2 else value, **kw)

    class Torch:
        tensor = staticmethod(wrong)

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    patch.setattr(api, "torch", Torch())


OUTSIDE: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a rule that takes a maximum for a sum": wrong_rule("aten.mm", "m k, k n -> m n", "0|1", "", "max"),
    "a rule that names the wrong factor": wrong_rule("aten.mm", "m k, n k -> m n", "0|1"),
    "a rule that lets sums through a square": wrong_rule("sum_of_squares", "*d -> .", "0"),
    "localize forgets where a slice begins": local_op(lambda op: replace(op, kwargs=tuple((k, 0 if k == "start" else v) for k, v in op.kwargs)) if op.target == "slice" else op),
    "localize forgets which part of a mask": local_op(lambda op: replace(op, kwargs=tuple(kv for kv in op.kwargs if kv[0] != "index"))),
    "back end: an epsilon": generated(r"eps=1e-08", "eps=1e-07"),
    "back end: no decay": generated(r"weight_decay=0\.01", "weight_decay=0.0"),
    "back end: scale forgotten": generated(r"torch\._foreach_mul_\(grads, \w+\)", "pass"),
    "runtime: blocks of a gather in another order": exchanged(lambda kind, out: [x.flip(0) for x in out] if kind == "all_gather" else out),
    "runtime: a mean for a sum": exchanged(lambda kind, out: [x / 2 for x in out] if kind == "all_reduce" else out),
    "runtime: another rank's part of a reduction": exchanged(lambda kind, out: out[::-1] if kind == "reduce_scatter" else out),
    "the masks of all steps are equal": same_masks,
}  # fmt: skip


@pytest.mark.parametrize("what", ["a rule that takes a maximum for a sum", "localize forgets which part of a mask"])
def test_an_error_outside_of_programs_is_caught(what: str, monkeypatch: pytest.MonkeyPatch, forget: None) -> None:
    OUTSIDE[what](monkeypatch)
    expect(what, caught_by_verify(monkeypatch))


@pytest.mark.wide
@pytest.mark.parametrize("what", OUTSIDE)
def test_an_error_outside_of_programs_is_caught_wide(what: str, monkeypatch: pytest.MonkeyPatch, forget: None) -> None:
    OUTSIDE[what](monkeypatch)
    expect(what, caught_by_verify(monkeypatch))


def test_a_gradient_scaled_in_place_that_is_read_once_more_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that folds the clipping factor into every update is no error, since the back end copies a gradient that is read once more; a
    back end that does not is one: ``verify`` shows the gradients too, and they come out clipped."""
    module, batch, loss_fn = small()

    def report() -> VerifyReport:
        return verify(module, batch, "zero0", loss_fn=loss_fn, steps=1, clip_grad_norm=0.1)

    monkeypatch.setattr(group_kernels, "_last_read_by", lambda *args: True)
    assert report().ok

    entries = Update._entries

    def never(self: Update, *args: Any) -> list[str]:
        return [entry.partition(".clone(")[0] for entry in entries(self, *args)]

    monkeypatch.setattr(Update, "_entries", never)
    found = report()
    assert not found.ok and found.blame.startswith("execution: "), found
    expect("a gradient scaled in place that is read once more", "eager")


def test_there_are_sixty() -> None:
    assert len(EDITS) + len(OUTSIDE) >= 60 and len({e.what for e in EDITS}) == len(EDITS)
