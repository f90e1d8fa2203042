"""Any optimizer whose step traces means under every plan what it means in eager PyTorch, and its state is split as the plan says."""

from __future__ import annotations

import copy
import itertools
import math
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from matrix import Mlp, squared_error
from optimizers import FACTORIES, STEPS, Lion, PlainAdam, by_rank
from torch import Tensor, nn, optim
from torch.optim import lr_scheduler

import deepseed
from deepseed.capture import CaptureError
from deepseed.capture.options import listed
from deepseed.capture.state import discover
from deepseed.closed_forms import state_bytes
from deepseed.ir.layout import Partial
from deepseed.noise import turned, undetermined
from deepseed.target import Target, load
from deepseed.verify import verify

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

PLANS = ["zero0", "zero1", "zero2", "zero3", "tp2"]
SAMPLE = [
    ("adamw amsgrad", "zero2"), ("adamw tensor lr", "zero1"), ("adamw groups", "zero3"), ("rmsprop centered", "zero3"), ("nadam", "tp2"),
    ("asgd", "zero1"), ("rprop", "zero2"), ("adafactor", "zero3"), ("muon + adamw", "zero1"), ("lion", "tp2"), ("lamb", "zero3"),
    ("plain adam", "zero0"), ("factored rms", "zero1"),
]  # fmt: skip


@cache
def target(name: str) -> Target:
    torch.manual_seed(0)
    return load(name)


def check(optimizer: str, plan: str, model: str = "hf:LlamaForCausalLM") -> Any:
    found = target(model)
    report = verify(found.model, found.batch, plan, optimizer_factory=FACTORIES[optimizer], world_size=2, steps=STEPS.get(optimizer, 3))
    assert report.ok, str(report)
    return report


@pytest.mark.parametrize(("optimizer", "plan"), SAMPLE)
@pytest.mark.turn
def test_an_optimizer_means_what_eager_means(optimizer: str, plan: str) -> None:
    assert check(optimizer, plan).left_out == 0


@pytest.mark.wide
@pytest.mark.parametrize(("optimizer", "plan"), list(itertools.product(FACTORIES, PLANS)))
def test_every_optimizer_under_every_plan(optimizer: str, plan: str) -> None:
    assert check(optimizer, plan).left_out == 0


# state ------------------------------------------------------------------------------------------------------------------


def check_bytes(name: str, plan: str) -> None:
    """Counted on the compiled step; expected from the slots that the eager optimizer itself keeps."""
    found = target("hf:LlamaForCausalLM")
    eager = copy.deepcopy(found.model)
    made = listed(FACTORIES[name](list(eager.parameters())))
    eager(**found.batch).loss.backward()
    for optimizer in made:
        optimizer.step()
    kept = [v for o in made for state in o.state.values() for v in state.values() if v is not None]
    slots = [(v.numel(), v.element_size()) if isinstance(v, Tensor) else (1, 8) for v in kept]
    model = copy.deepcopy(found.model)
    step = deepseed.compile(model, plan, optimizer=FACTORIES[name](list(model.parameters())), example_batch=found.batch, world_size=2)
    extra = sum(4 for i in step.program.by_role("state") if i.key.startswith("started/"))  # DeepSeed's own, one f32 a parameter
    assert step.explain().ranks[0].optimizer_bytes == state_bytes(slots, 1 if plan == "zero0" else 2) + extra


@pytest.mark.parametrize(("name", "plan"), [("adafactor", "zero1"), ("factored rms", "zero3")])
def test_state_is_split_as_the_closed_form_says(name: str, plan: str) -> None:
    check_bytes(name, plan)


@pytest.mark.wide
@pytest.mark.parametrize(("name", "plan"), list(itertools.product(FACTORIES, PLANS[:4])))
def test_all_state_is_split_as_the_closed_form_says(name: str, plan: str) -> None:
    check_bytes(name, plan)


def data(n: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 32, generator=generator).double(), torch.randn(8, 16, generator=generator).double()) for _ in range(n)]


def mlp() -> Mlp:
    torch.manual_seed(0)
    return Mlp().double()


def trained(make: Callable[[list[nn.Parameter]], Any], plan: str = "zero1", between: Callable[[Any, int], None] = lambda o, n: None, steps: int = 4) -> Any:
    """Compiled and eager side by side: equal losses and parameters. ``between(optimizers, n)`` after each step, on both sides."""
    mine, theirs = mlp(), mlp()
    given, eager = make(list(mine.parameters())), listed(make(list(theirs.parameters())))
    step = deepseed.compile(mine, plan, optimizer=given, loss_fn=squared_error, world_size=2)
    for n, batch in enumerate(data(steps)):
        loss = step(batch)
        theirs.zero_grad()
        want = squared_error(theirs, batch)
        want.backward()
        for optimizer in eager:
            optimizer.step()
        torch.testing.assert_close(loss, want.detach(), rtol=1e-12, atol=0)
        between(listed(given), n)
        between(eager, n)
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(step.state_dict()[name], p.detach(), rtol=1e-10, atol=1e-12)
    return step, listed(given), eager


def test_each_optimizers_state_dict_is_its_own_and_python_numbers_stay() -> None:
    step, given, eager = trained(by_rank(lambda ps: optim.SGD(ps, lr=1e-2, momentum=0.9), lambda ps: PlainAdam(ps)), "zero3")
    assert {key.partition("/")[0] for key in step.optimizer_state()} == {"momentum_buffer", "step", "exp_avg", "exp_avg_sq"}
    for one, other in zip(given, eager, strict=True):
        have, want = one.state_dict(), other.state_dict()
        assert have["param_groups"] == want["param_groups"] and have["state"].keys() == want["state"].keys()
        for index, slots in want["state"].items():
            assert have["state"][index].keys() == slots.keys()
            for slot, value in slots.items():
                got = have["state"][index][slot]
                assert type(got) is type(value)
                torch.testing.assert_close(got, value, rtol=1e-12, atol=1e-12)
        one.load_state_dict(copy.deepcopy(have))  # and back
    assert given[1].state_dict()["state"][0]["step"] == 4


def test_what_is_done_to_the_state_of_an_optimizer_is_done_to_the_steps(capsys: pytest.CaptureFixture[str]) -> None:
    """``clear``, another dict, entries of one's own; two formulas start with the first again."""

    def between(optimizers: Any, n: int) -> None:
        for o in optimizers:
            if n == 1:
                o.state.clear()
            elif n == 3:
                o.state = defaultdict(dict)
            elif n == 5:
                p = o.param_groups[0]["params"][0]
                have = o.state_dict()["state"][0]
                o.state[p] = {slot: torch.full_like(value, 2.0) for slot, value in have.items()}
            elif n == 6:
                o.load_state_dict(copy.deepcopy(o.state_dict()))

    for make in (lambda ps: optim.AdamW(ps, lr=1e-2), lambda ps: optim.SGD(ps, lr=1e-2, momentum=0.9, dampening=0.3)):
        _, given, eager = trained(make, "zero1", between, steps=8)
        copy.deepcopy(given[0].state)
        for index, slots in eager[0].state_dict()["state"].items():
            for slot, value in slots.items():
                torch.testing.assert_close(given[0].state_dict()["state"][index][slot], value, rtol=1e-12, atol=1e-12)
        assert "optimizer.state is empty" not in capsys.readouterr().err
        list(given[0].state.values())
        assert "optimizer.state is empty: the compiled step has the state" in capsys.readouterr().err


def test_a_scheduler_on_each_of_several_optimizers() -> None:
    schedulers: dict[int, Any] = {}

    def between(optimizers: Any, n: int) -> None:
        for o, make in zip(optimizers, (lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=9), lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0)), strict=True):
            scheduler = schedulers.setdefault(id(o), None) or schedulers.update({id(o): make(o)}) or schedulers[id(o)]
            scheduler.step(1.0) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else scheduler.step()
        optimizers[1].param_groups[0]["weight_decay"] = 0.01 * n

    _, given, eager = trained(by_rank(lambda ps: optim.SGD(ps, lr=1e-2, momentum=0.9), lambda ps: optim.AdamW(ps, lr=1e-2)), between=between, steps=6)
    assert [o.param_groups[0]["lr"] for o in given] == [o.param_groups[0]["lr"] for o in eager]
    assert eager[1].param_groups[0]["lr"] < 1e-2 and eager[0].param_groups[0]["momentum"] != 0.9


# steps that branch --------------------------------------------------------------------------------------------------------


class Switching(optim.Optimizer):
    """Another formula from the third step on, a trust ratio where norms allow one, Python's own functions of numbers."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                count = state.setdefault("count", 0)
                m = state.setdefault("m", torch.zeros_like(p))
                state["count"] = count = count + 1
                m.lerp_(p.grad, 0.1)
                if count > 2:
                    size, length = p.norm().item(), m.norm().item()
                    ratio = size / length if size > 0 and length > 0 else 1.0
                    p.add_(m, alpha=-group["lr"] * min(ratio, 10.0) / math.sqrt(count))
                else:
                    p.add_(m.sign() * float(count), alpha=-group["lr"])


@pytest.mark.parametrize("plan", ["zero0", "zero3"])
def test_branches_on_step_counts_and_norms(plan: str) -> None:
    trained(Switching, plan, steps=5)


def refused(make: Callable[[list[nn.Parameter]], Any], *parts: str) -> None:
    model = mlp()
    with pytest.raises(CaptureError) as caught:
        deepseed.compile(model, "zero1", optimizer=make(list(model.parameters())), loss_fn=squared_error, world_size=2, example_batch=data(1)[0])
    assert all(part in str(caught.value) for part in (*parts, "fix:")), caught.value


# what state starts as -------------------------------------------------------------------------------------------------------


class Own(optim.Optimizer):
    """A user's: ``begin(p, group)`` is its state before the first step, ``body(p, state, group)`` a step."""

    def __init__(self, params: Any, begin: Callable[[Tensor, Any], Any], body: Callable[[Tensor, Any, Any], object], **options: Any) -> None:
        super().__init__(params, {"lr": 0.05, **options})
        self.begin, self.body = begin, body

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                if (state := self.state[p]) == {}:
                    state["s"] = self.begin(p, group)
                self.body(p, state, group)


def pulled(p: Tensor, state: Any, group: Any) -> None:
    p.sub_(group["lr"] * (p.grad + 0.3 * (p - state["s"])))


def scaled(p: Tensor, state: Any, group: Any) -> None:
    p.sub_(group["lr"] * p.grad * state["s"])


def averaged(p: Tensor, state: Any, group: Any) -> None:
    p.sub_(group["lr"] * state["s"].lerp_(p.grad, 0.1))


def largest(p: Tensor, state: Any, group: Any) -> None:
    state["s"] = max(state["s"], float(p.grad.abs().max()))
    p.sub_(group["lr"] * p.grad / state["s"])


def counted(p: Tensor, state: Any, group: Any) -> None:
    p.sub_(group["lr"] * p.grad / state["s"])
    state["s"] += 1


STARTS: dict[str, tuple[Callable[[Tensor, Any], Any], Callable[[Tensor, Any, Any], object]]] = {
    "the parameter": (lambda p, g: p.clone(), pulled),
    "the gradient": (lambda p, g: p.grad.clone(), averaged),
    "a norm": (lambda p, g: p.norm(), scaled),
    "a Python float of the parameter": (lambda p, g: p.norm().item(), scaled),
    "a Python float of the gradient": (lambda p, g: -1e9, largest),
    "the size": (lambda p, g: p.numel() ** -0.5, scaled),
    "the shape": (lambda p, g: torch.tensor(p.shape[-1] / p.shape[0] if p.dim() > 1 else 1.0, dtype=torch.float64), scaled),
    "an option": (lambda p, g: torch.full_like(p, g["lr"]), averaged),
    "large or small": (lambda p, g: torch.zeros_like(p) if p.numel() < 20 else torch.ones_like(p), averaged),
    "zeros": (lambda p, g: torch.zeros_like(p), averaged),
    "a count": (lambda p, g: 1, counted),
}


class Scaled(nn.Module):
    """With parameters of one element."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.scale = nn.Linear(6, 4), nn.Linear(4, 1), nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x))) * self.scale


def two_models(make: Callable[[Any], Any], plan: str, codegen: str = "python", example: bool = False) -> tuple[Any, Any, nn.Module, Any]:
    """A compiled step and the optimizer it has, a model and an optimizer of its own."""
    torch.manual_seed(0)
    mine = Scaled().double()
    theirs = copy.deepcopy(mine)
    given = make(mine.parameters())
    step = deepseed.compile(mine, plan, optimizer=given, loss_fn=centred, world_size=2 if plan != "zero0" else 1, codegen=codegen, example_batch=rows(0) if example else None)
    return step, given, theirs, make(theirs.parameters())


def centred(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - 1.0).square().mean()


def rows(n: int) -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(n), dtype=torch.float64)


def same_steps(step: Any, theirs: nn.Module, eager: Any, numbers: Any = range(4)) -> None:
    for n in numbers:
        eager.zero_grad()
        want = centred(theirs, rows(n))
        want.backward()
        eager.step()
        torch.testing.assert_close(step(rows(n)), want.detach(), rtol=1e-12, atol=1e-14)
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(step.state_dict()[name], p.detach(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", STARTS)
@pytest.mark.parametrize("plan", ["zero0", "zero3"])
def test_state_starts_as_it_does_in_eager(plan: str, kind: str) -> None:
    step, given, theirs, eager = two_models(lambda ps: Own(ps, *STARTS[kind]), plan)
    same_steps(step, theirs, eager)
    have, want = given.state_dict()["state"], eager.state_dict()["state"]
    for index in want:
        assert type(have[index]["s"]) is type(want[index]["s"])
        torch.testing.assert_close(have[index]["s"], want[index]["s"], rtol=1e-10, atol=1e-12)
    constant = kind in ("zeros", "a count", "a Python float of the gradient")
    assert any(key.startswith("started/") for key in step.optimizer_state()) is not constant


def test_state_starts_with_the_options_of_the_first_step() -> None:
    """They may change after the program was compiled for an example."""
    kinds: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
        "rprop": (lambda ps: optim.Rprop(ps, lr=0.01), {"lr": 0.05}),
        "asgd": (lambda ps: optim.ASGD(ps, lr=0.01), {"lr": 0.05}),
        "a number": (lambda ps: Own(ps, lambda p, g: torch.full_like(p, g["first"]), averaged, first=0.5), {"first": 0.25}),
        "a switch": (lambda ps: Own(ps, lambda p, g: torch.ones_like(p) if g["ones"] else torch.zeros_like(p), averaged, ones=True), {"ones": False}),
    }
    for make, options in kinds.values():
        step, given, theirs, eager = two_models(make, "zero1", example=True)
        for each in (given, eager):
            each.param_groups[0].update(options)
        same_steps(step, theirs, eager)


def test_state_of_only_some_steps_or_sizes_is_refused() -> None:
    def later(p: Tensor, state: Any, group: Any) -> None:
        if state["s"] == 1:
            state["more"] = torch.zeros_like(p)
        state["s"] += 1

    def large(p: Tensor, state: Any, group: Any) -> None:
        if p.numel() > 30:
            state["rows"] = torch.zeros(p.shape[:1])

    refused(lambda ps: Own(ps, lambda p, g: 0, later), "state 'more' of optimizer Own is of shape", "after a later step on a parameter", "it is not there")
    refused(lambda ps: Own(ps, lambda p, g: 0.0, large), "state 'rows' of optimizer Own is of shape [", "step on a parameter [", "it is not there")


def test_a_state_dict_with_a_part_of_the_state_is_refused() -> None:
    def halves(p: Tensor, state: Any, group: Any) -> None:
        state.setdefault("t", p.clone())
        pulled(p, state, group)

    model = mlp()
    optimizer = Own(model.parameters(), lambda p, g: p.clone(), halves)
    optimizer.state[model.up.weight]["t"] = torch.zeros_like(model.up.weight)
    with pytest.raises(CaptureError, match=r"state of 'up\.weight' has 1 of 2 entries: 't' and no 's'"):
        deepseed.compile(model, "zero0", optimizer=optimizer, loss_fn=squared_error, example_batch=data(1)[0])


# state that nobody reads ----------------------------------------------------------------------------------------------------


def noted(p: Tensor, state: Any, group: Any) -> None:
    """The norm of the gradient, the gradient and the old parameter, for people to look at."""
    state["norm"], state["grad"], state["previous"] = p.grad.norm(), p.grad.clone(), p.clone()
    p.sub_(group["lr"] * p.grad)


@pytest.mark.parametrize(("plan", "codegen"), [("zero0", "python"), ("zero0", "auto"), ("zero1", "auto"), ("zero2", "python"), ("zero3", "auto")])
def test_state_that_is_written_and_never_read(plan: str, codegen: str, tmp_path: Any) -> None:
    make = lambda ps: Own(ps, lambda p, g: 0.0, noted)  # noqa: E731
    step, given, theirs, eager = two_models(make, plan, codegen)
    same_steps(step, theirs, eager)
    step.save(tmp_path)
    again, other, _, _ = two_models(make, "zero1" if plan == "zero0" else "zero0", codegen)
    again.load(tmp_path)
    same_steps(again, theirs, eager, [4])
    step(rows(4))
    want = eager.state_dict()["state"]
    for have in (given.state_dict()["state"], other.state_dict()["state"]):
        for index, slots in want.items():
            assert have[index].keys() == slots.keys()
            for slot, value in slots.items():
                torch.testing.assert_close(have[index][slot], value, rtol=1e-10, atol=1e-12)


# what is refused --------------------------------------------------------------------------------------------------------------


class Counting(Switching):
    """Counts where only the whole optimizer sees it: in its group, or on itself."""

    def __init__(self, params: Any, where: str = "group") -> None:
        super().__init__(params)
        self.where, self.total = where, [0]
        self.param_groups[0]["total"] = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if self.where == "group":
            self.param_groups[0]["total"] += 1
        else:
            self.total[0] += 1
        super().step()


class Named(optim.SGD):
    """Keeps a state by a name of its own."""

    def __init__(self, params: Any, name: Any) -> None:
        super().__init__(params)
        self.name = name

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p].setdefault(self.name, torch.zeros_like(p)).add_(p.grad)
        super().step()


class Together(optim.Optimizer):
    """Reads other parameters than the one that it changes: a norm over all, a neighbour's state, how many came before."""

    def __init__(self, params: Any, what: str) -> None:
        super().__init__(params, {"lr": 0.0})
        self.what = what

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        for p in params:
            self.state[p].setdefault("m", torch.zeros_like(p)).mul_(0.9).add_(p.grad)
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        for n, p in enumerate(params):
            beside = {"a norm": norm, "a neighbour": self.state[params[n - 1]]["m"].norm(), "its place": 1.0 + n, "the last": params[-1].grad.norm(), "noise": 1.0}[self.what]
            p.add_(-self.param_groups[0]["lr"] * (self.state[p]["m"] + (torch.rand_like(p) if self.what == "noise" else 0.0)) / beside)


@pytest.mark.parametrize("what", ["a norm", "a neighbour", "its place", "the last"])
def test_a_step_that_reads_other_parameters_is_refused(what: str) -> None:
    """At a rate of 0 too, where a schedule may begin."""
    refused(lambda ps: Together(ps, what), "optimizer Together does something else to a parameter where there is another one", "after two steps element", "alone", "clip_grad_norm")


class Many(optim.Optimizer):
    """Two parameters do not show what it does."""

    def __init__(self, params: Any, what: str) -> None:
        super().__init__(params, {"lr": 0.1})
        self.what = what

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            given = [p for p in group["params"] if p.grad is not None]
            norm = torch.stack([p.grad.norm() for p in given]).norm() if self.what == "a norm over three" and len(given) > 2 else 1.0
            for n, p in enumerate(group["params"]):
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad / norm * (0.5 if self.what == "the fourth" and n > 2 else 1.0) * (torch.rand_like(p) if self.what == "noise" else 1.0))
                elif self.what == "without gradient":
                    p.mul_(0.9)


class Unused(Mlp):
    """With a parameter that no loss reads and one that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.frozen = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3), requires_grad=False)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("a norm over three", "does something else to parameter 'up.weight' where its other 5 are: element"),
        ("the fourth", "does something else to parameter 'down.bias' where its other 5 are: element"),
        ("without gradient", "changes parameter 'unused', which has no gradient: element 0 of a small one, [3], is"),
        ("nothing", ""), ("noise", ""),
    ],
)  # fmt: skip
def test_all_parameters_are_stepped_as_each_alone(what: str, said: str) -> None:
    model = Unused().double()
    names = ["up.weight", "up.bias", "down.weight", "down.bias", "unused", "frozen"]
    optimizer = Many([dict(model.named_parameters())[name] for name in names], what)
    compiled = lambda: deepseed.compile(model, "zero0", optimizer=optimizer, loss_fn=squared_error, example_batch=data(1)[0])  # noqa: E731
    if not said:
        compiled()
        return
    with pytest.raises(CaptureError) as caught:
        compiled()
    assert f"the step of optimizer Many {said}" in str(caught.value) and "after two steps and" in str(caught.value) and "fix:" in str(caught.value)


def test_noise_is_no_other_parameter() -> None:
    before = torch.get_rng_state()
    discover((made := Together([nn.Parameter(torch.ones(3, 4))], "noise")), made.param_groups[0], (3, 4), torch.float32)
    made.what = "a norm"
    with pytest.raises(CaptureError, match="another one"):
        discover(made, made.param_groups[0], (3, 4), torch.bfloat16)
    torch.set_rng_state(before)


def test_what_cannot_be_compiled_is_refused() -> None:
    refused(Counting, "Counting", "keeps what changes from step to step in param_groups[0]['total']")
    refused(lambda ps: Counting(ps, "self"), "in self.total")
    refused(lambda ps: Named(ps, "m/v"), "Named names a state 'm/v'", "without a '/'")
    refused(lambda ps: Named(ps, 3), "Named names a state 3")
    refused(optim.LBFGS, "LBFGS cannot be traced", "closure")
    refused(lambda ps: [optim.SGD(ps, lr=0.1), optim.Adam(ps[:1])], "parameter 'up.weight' is in two optimizers, SGD and Adam")


def test_parameters_without_an_optimizer_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    step, _, _ = trained(lambda ps: [optim.SGD(ps[:1], lr=0.1), optim.AdamW(ps[2:3])])
    assert "2 of the 4 trainable parameters are in no optimizer and stay as they are: up.bias, down.bias" in capsys.readouterr().err
    assert torch.equal(step.state_dict()["up.bias"], mlp().up.bias)


# noise --------------------------------------------------------------------------------------------------------------------


def test_noise_is_what_is_tiny_and_not_zero() -> None:
    eager, ours = {"a": torch.tensor([1.0, 1e-13, 0.0, 0.0])}, {"a": torch.tensor([1.0, -2e-13, 0.0, 1e-11])}
    got, count = turned(eager, ours)
    assert count == 1 and got["a"].tolist() == torch.tensor([1.0, -2e-13, 0.0, 0.0]).tolist()


@pytest.mark.parametrize(("make", "expected"), [(Lion, [False, True, False]), (lambda ps: optim.SGD(ps, lr=0.1), None)])
def test_only_what_the_optimizer_amplifies_is_left_out(make: Any, expected: list[bool] | None) -> None:
    start = nn.Module()
    start.w = nn.Parameter(torch.ones(3, dtype=torch.float64))
    grads = [{"w": torch.tensor([0.5, 1e-17, 0.0], dtype=torch.float64)} for _ in range(3)]

    def train(model: nn.Module, given: Any) -> None:
        optimizer = make(list(model.parameters()))
        for each in given:
            model.w.grad = each["w"].clone()
            optimizer.step()

    reached = copy.deepcopy(start)
    train(reached, grads)
    masks = undetermined(start, {"w": reached.w.detach()}, grads, grads, train, 5e-11)
    assert {k: m.tolist() for k, m in masks.items()} == ({} if expected is None else {"w": expected})


def test_the_key_biases_of_gpt2_are_left_out_under_lion_only() -> None:
    """A key's bias has a gradient of noise: 64 of them a layer. All else is compared."""
    layers = target("hf:GPT2LMHeadModel").model.config.n_layer
    width = target("hf:GPT2LMHeadModel").model.config.n_embd
    assert 0 < check("lion", "zero1", "hf:GPT2LMHeadModel").left_out <= layers * width
    assert check("adamw", "zero1", "hf:GPT2LMHeadModel").left_out == 0


# Muon ---------------------------------------------------------------------------------------------------------------------


def muon_update(width: int, plan: str) -> Any:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(width, 2 * width, bias=False), nn.ReLU(), nn.Linear(2 * width, width, bias=False))
    optimizer = optim.Muon(model.parameters())
    loss: Any = lambda m, x: m(x).square().mean()  # noqa: E731
    step = deepseed.compile(model, plan, optimizer=optimizer, loss_fn=loss, example_batch=torch.empty(8, width, device="meta"), world_size=2)
    p = step.program
    for op in p.ops:
        if op.phase == "update" and "mm" in op.target:
            assert not any(isinstance(e, Partial) for t in op.types for _, e in t.layout.elements), f"{op.name}: a bfloat16 contraction is split"
    return [p.types[op.results[0]].layout.elements for op in p.ops if op.phase == "update" and op.target == "aten.mm"]


def test_muons_matrix_is_gathered_where_it_is_small_and_split_where_it_is_large() -> None:
    assert not any(muon_update(64, "zero1"))
    assert all(muon_update(2048, "zero1"))


@pytest.mark.parametrize("plan", ["zero0", "zero1", "zero3", "tp2"])
def test_muon_in_bfloat16_is_eager_muon(plan: str) -> None:
    """Plain float32 training, bit for bit: gradients of whole numbers are exact in any order, and the bfloat16 matrix is not split."""
    torch.manual_seed(0)
    model = nn.Linear(64, 32, bias=False)
    theirs = copy.deepcopy(model)
    optimizer, eager = optim.Muon(model.parameters(), lr=0.1), optim.Muon(theirs.parameters(), lr=0.1)
    loss: Any = lambda m, b: (m(b[0]) * b[1]).sum()  # noqa: E731
    step = deepseed.compile(model, plan, optimizer=optimizer, loss_fn=loss, world_size=2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        batch = tuple(torch.randint(-4, 5, (8, n), generator=generator).float() for n in (64, 32))
        step(batch)
        theirs.zero_grad()
        loss(theirs, batch).backward()
        eager.step()
    have, want = step.state_dict()["weight"], theirs.weight.detach()
    assert float((have - want).abs().max()) <= 1e-6 * float(want.abs().max())
