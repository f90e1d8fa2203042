"""The first node with a value that is not finite: exactly the one that made it, under every kind of plan, forward, backward and update."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from gloo.launch import ranks
from gloo.nonfinite import CASES, Log, Net, Root, all_cases, case, loss, zeros_from

import deepseed
from deepseed.api import Module, TrainStep
from deepseed.capture.errors import CaptureError
from deepseed.nonfinite import NonFinite, NonFiniteError

PLANS = [("zero0", 1), ("zero3", 2), ("tp2", 2), ("zero2+mb2", 2), ("pp2+mb2", 2)]
pytestmark = pytest.mark.filterwarnings("ignore")


def sure(found: NonFinite | None) -> NonFinite:
    assert found is not None
    return found


@pytest.mark.parametrize(("plan", "n"), PLANS)
def test_the_node_that_made_it_is_named(plan: str, n: int) -> None:
    assert case(Log, plan, world_size=n) is None
    found = sure(case(Log, plan, zeros=5, world_size=n))
    assert (found.op, found.path, found.phase, found.value, found.operands) == ("aten.log", "middle", "forward", -math.inf, ())
    assert found.line.startswith("nonfinite.py:") and "made here: its operands are finite" in found.text
    if "mb2" in plan:
        assert found.microbatch == (0 if plan.startswith("zero2") else 1), "two data-parallel ranks have rows 0-3 and 4-7; a pipeline's second microbatch has them"
    if plan == "zero3":
        assert found.ranks == (1,) and found.index[0] == 1 and found.shape == (4, 8), "row 5 is the second of the second rank"
    found = sure(case(Root, plan, zeros=5, world_size=n))
    assert (found.path, found.phase, found.op, found.value, found.operands) == ("middle", "backward", "aten.div.Tensor", math.inf, ())


@pytest.mark.parametrize(("plan", "n"), PLANS)
def test_an_input_that_came_so_is_named(plan: str, n: int) -> None:
    found = sure(case(Log, plan, weight=math.nan, world_size=n))
    assert found.op is None and "parameter 'down.weight' was not finite before the step" in found.text
    if plan in ("zero0", "pp2+mb2"):
        assert "batch entry 'x' is not finite as it was given" in sure(case(Log, plan, entry=math.nan, world_size=n)).text
    found = sure(case(Log, plan, entry=math.inf, world_size=n))
    assert found.op is None and "batch entry 'x' is not finite as it was given" in found.text and found.value == math.inf


class Masked(torch.nn.Module):
    """Attention with a causal mask of -inf; ``log`` is of what attention gives."""

    def __init__(self, blind: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.log, self.blind = torch.nn.Linear(4, 4), Log(), blind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.ones(len(x), len(x), dtype=torch.bool).triu(0 if self.blind else 1)
        weights = (self.q(x) @ x.t()).masked_fill(hidden, -math.inf).softmax(-1)
        out: torch.Tensor = weights @ x
        return out if self.blind else self.log(out)


def trained(model: torch.nn.Module, plan: str = "zero0", lr: float = 0.1, **options: Any) -> TrainStep:
    step = deepseed.compile(model, plan, optimizer=torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9), loss_fn=loss, **options)
    assert isinstance(step, TrainStep)
    return step


def test_a_mask_is_no_cause_unless_an_op_cannot_take_it() -> None:
    x = zeros_from(8)
    assert trained(Masked().double()).find_nonfinite({"x": x}) is None
    x[0] = 0
    found = sure(trained(Masked().double()).find_nonfinite({"x": x}))
    assert (found.op, found.path) == ("aten.log", "log"), "the -inf of the mask is before it, and finite again behind softmax"
    found = sure(trained(Masked(blind=True).double()).find_nonfinite({"x": zeros_from(8)}))
    assert found.op == "aten._softmax" and math.isnan(found.value) and found.operands and "made here of what is infinite" in found.text
    assert found.index[0] == 0, "the row that sees nothing"


class Two(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.one, self.two = torch.nn.Linear(4, 4, bias=False), Log(), Log()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x)
        out: torch.Tensor = self.one(y + 1.0 * y) + self.two(y)
        return out


def test_of_several_the_first_in_the_program_is_named() -> None:
    found = sure(trained(Two().double()).find_nonfinite({"x": zeros_from(5)}))
    assert (found.op, found.path, found.index) == ("aten.log", "one", (5, 0))


def test_half_precision_overflows_in_the_product_and_a_moving_scale_only_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    model = Net(torch.nn.Identity)
    with torch.no_grad():
        model.down.weight.fill_(3e4)
    x = {"x": zeros_from(8).float() * 100}
    step = trained(model, "fp16", check_finite=True)
    found = sure(step.find_nonfinite(x))
    assert (found.path, found.phase) == ("down", "forward") and found.op in ("aten.mm", "aten.addmm") and math.isinf(found.value)
    with pytest.raises(NonFiniteError, match="the loss is"):
        step(x)
    assert step.skipped == 1
    model = Net(torch.nn.Identity)
    step = trained(model, "fp16", check_finite=True, loss_scale=deepseed.LossScale(2.0**24))
    assert math.isfinite(step({"x": zeros_from(8).float()})) and step.skipped == 1
    said = capsys.readouterr().err
    assert "deepseed: step 0: a gradient is not finite; the scale of the loss falls\n%" in said and ", backward, mesh()" in said


def test_an_update_that_overflows_and_a_step_that_goes_on() -> None:
    model = Net(torch.nn.Identity)
    step = trained(model, lr=1e38)
    found = sure(step.find_nonfinite({"x": zeros_from(8).float() * 1e3}))
    assert found.phase == "update" and found.shows[0].startswith("param ")
    step = trained(Net(Log).double(), check_finite=True)
    good, bad = {"x": zeros_from(8)}, {"x": zeros_from(8) * math.nan}
    step.model.up.bias.data.zero_()  # type: ignore[union-attr]
    other = trained(Net(Log).double())
    other.model.up.bias.data.zero_()  # type: ignore[union-attr]
    want = [float(other(good)) for _ in range(2)]
    first = float(step(good))
    with pytest.raises(NonFiniteError, match="step 1: the loss is nan"):
        step(bad)
    assert [first, float(step(good))] == want, "checking changes no number, and the step that was refused none either"


def test_of_several_inputs_the_one_that_is_used_first() -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(4))).double()
    for layer in model[1:]:
        layer.weight.data[0, 0] = math.nan
    assert sure(trained(model).find_nonfinite({"x": torch.ones(8, 4, dtype=torch.float64)})).node == "1.weight"


def test_an_infinity_in_the_data_is_no_mask() -> None:
    x = torch.ones(8, 4, dtype=torch.float64)
    x[1, 1] = -math.inf
    found = sure(trained(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()).find_nonfinite({"x": x}))
    assert (found.node, found.op, found.index) == ("x", None, (1, 1)) and "look at the data" in found.text


@pytest.mark.parametrize("plan", ["zero0", "zero3"])
def test_what_the_forward_made_comes_before_the_gradient_that_a_loss_makes_of_it(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEED_NAN", "1")
    model = Net(Log).double()
    model.up.bias.data.zero_()
    module = deepseed.compile(model, plan, world_size=2 if plan == "zero3" else 1, loss_fn=loss)
    with pytest.raises(NonFiniteError) as raised:
        module(zeros_from(5)).square().mean().backward()
    assert (sure(raised.value.found).path, sure(raised.value.found).op) == ("middle", "aten.log")


def test_a_modules_backward_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEED_NAN", "1")
    for plan, n in (("zero0", 1), ("zero3", 2)):
        model = Net(Root).double()
        model.up.bias.data.zero_()
        module = deepseed.compile(model, plan, world_size=n, loss_fn=loss)
        assert isinstance(module, Module)
        out = module(zeros_from(5))
        with pytest.raises(NonFiniteError) as raised:
            out.square().mean().backward()
        found = sure(raised.value.found)
        assert (found.path, found.phase) == ("middle", "backward")
        out = module(zeros_from(8))
        with pytest.raises(NonFiniteError, match=r"which backward was given, is not finite: it was made outside"):
            (out.sum() * math.inf).backward()
        assert sure(module.find_nonfinite({"x": zeros_from(5)})).path == "middle"


def test_real_ranks_say_the_same_as_the_simulation() -> None:
    plans = ["zero3", "pp2+mb2"]
    first, second = ranks(2, all_cases, plans)
    assert first == second
    simulated = [
        (None,) if (found := case(Log, plan, world_size=2, **given)) is None else (found.node, found.text, found.ranks)
        for plan in plans for given in CASES
    ]  # fmt: skip
    assert simulated == first and all(len(each) == 3 for each in first)


# what a step that is refused leaves ----------------------------------------------------------------------------------------


def normed(plan: str, **options: Any) -> Any:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Tanh(), torch.nn.Linear(8, 2), torch.nn.BatchNorm1d(2)).double()
    optimizer = {} if options.pop("module", False) else {"optimizer": torch.optim.AdamW(model.parameters(), lr=0.01)}
    return deepseed.compile(model, plan, loss_fn=lambda m, x: m(x).square().mean(), backend="simulate", **optimizer, **options)


def held(step: Any) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in {**step.state_dict(), **step.optimizer_state()}.items() if name not in ("loss_scale", "good_steps", "skipped_steps")}


@pytest.mark.parametrize("plan", ["zero3+dp2", "zero2+dp2+mb2", *(pytest.param(plan, marks=pytest.mark.wide) for plan in ("zero0", "zero1+tp2", "pp2+mb2"))])
@pytest.mark.parametrize("options", [{"check_finite": True}, {"loss_scale": deepseed.LossScale(4.0)}, pytest.param({"loss_scale": 4.0}, marks=pytest.mark.wide)], ids=["checked", "scaled", "by a number"])
def test_running_statistics_of_a_step_that_is_refused_are_as_before(plan: str, options: dict[str, Any]) -> None:
    """And the next step is what it would have been without it, its number aside."""
    good = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    bad = good.clone()
    bad[3, 2] = math.inf
    step, other = normed(plan, **options), normed(plan, **options)
    step(good), other(good)
    before = held(step)
    assert any("running_mean" in name and t.any() for name, t in before.items())
    refused: Any = pytest.raises(NonFiniteError) if "check_finite" in options else nullcontext()
    with refused:
        step(bad)
    assert step.skipped == 1 and not [name for name, t in held(step).items() if not torch.equal(t, before[name])]
    step(good), other(good)
    after, want = held(step), held(other)
    assert not [name for name in want if not torch.equal(after[name], want[name])] and any(not torch.equal(after[name], before[name]) for name in after if "running_var" in name)


@pytest.mark.parametrize("plan", ["zero0", "zero3+dp2"])
def test_so_are_those_of_a_backward_that_is_refused(plan: str) -> None:
    module = normed(plan, module=True, check_finite=True)
    good = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    module(good).sum().backward()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    with pytest.raises(NonFiniteError):
        (module(good * 2).sum() * math.inf).backward()
    now = module.state_dict()
    assert not [name for name, t in before.items() if not torch.equal(now[name], t)]
    lost = module(good * 2).sum() * math.inf
    module(good * 3)  # a later forward has written them: they are its own
    now = {name: t.clone() for name, t in module.state_dict().items()}
    with pytest.raises(NonFiniteError):
        lost.backward()
    assert not [name for name, t in module.state_dict().items() if not torch.equal(now[name], t)]


def test_a_rate_that_is_no_number_is_refused_before_the_step() -> None:
    step = normed("zero3+dp2")
    x = torch.ones(8, 6, dtype=torch.float64)
    step(x)
    before = held(step)
    for wrong in (math.nan, math.inf):
        step.optimizer.param_groups[0]["lr"] = wrong
        with pytest.raises(CaptureError, match=rf"lr of the optimizer's group 0 is {wrong}: nothing was computed with it(.|\n)*fix: a number; look at what sets it"):
            step(x)
    assert not [name for name, t in held(step).items() if not torch.equal(t, before[name])] and step.steps == 1
    step.optimizer.param_groups[0]["lr"] = 0.01
    step(x)
