"""A compiled model in the user's own training loop: any loss, any optimizer, several models in one step; beside the eager loop."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from gloo.launch import ranks
from gloo.module import Mlp, adamw, beside, local_on_ranks, module, mse, on_ranks, pairs, sgd, train_small
from torch import Tensor, nn
from torch.nn import functional as F

from deepseed.rules.lanes import home
from deepseed.runtime.folder import CheckpointError
from deepseed.target import load

wide = pytest.mark.wide


def exact(worst: dict[str, float], loss: float = 1e-12) -> None:
    assert worst.pop("loss") <= loss and max(worst.values()) <= 1e-10, worst


PLANS = ("zero0", "zero3+dp2", "pp2+mb2", "zero1+dp2+mb2", "tp2")


@pytest.mark.parametrize(("plan", "optimizer"), [pytest.param(plan, optimizer, marks=[wide] * ((n + k) % 2)) for n, plan in enumerate(PLANS) for k, optimizer in enumerate((adamw, sgd))])
def test_any_optimizer_and_scheduler(plan: str, optimizer: Any) -> None:
    model = Mlp()
    scheduler = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    exact(beside(module(model, plan, backend="simulate"), copy.deepcopy(model), mse, pairs(3), optimizer, 0.1, scheduler))


@pytest.mark.parametrize("plan", ["zero3+dp2", pytest.param("pp2+mb2", marks=wide), pytest.param("zero2+dp2+tp2", marks=wide)])
def test_dropout_batch_norm_and_a_tied_weight(plan: str) -> None:
    exact(train_small(plan, backend="simulate"))


@dataclass
class Answer:
    logits: Tensor
    more: dict[str, Any]


class Point(NamedTuple):
    x: Tensor
    y: Tensor


class Nested(Mlp):
    def forward(self, x: Tensor, scale: float = 1.0, *, shift: Tensor | None = None) -> Answer:
        h = torch.tanh(self.up(x))
        out = self.down(h) * scale
        out = out if shift is None else out + shift
        return Answer(out, {"hidden": (h, [out.argmax(-1)]), "norm": h.square().mean().sqrt(), "point": Point(out.sum(1), out.detach() * 2), "word": "a"})


@pytest.mark.parametrize("plan", ["zero3+dp2", "zero0+dp2+mb2"])
def test_nested_outputs_come_in_the_models_own_types(plan: str) -> None:
    def loss_of(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        a = model(batch[0], 0.5, shift=batch[1][:1])
        assert type(a) is Answer and a.more["word"] == "a" and type(a.more["point"]) is Point
        assert not a.more["point"].y.requires_grad and a.more["hidden"][1][0].dtype is torch.int64
        return (a.logits - batch[1]).abs().mean() + a.more["norm"] ** 3 + a.more["hidden"][0].sin().mean() + (a.more["point"].x * a.more["point"].y.sum(1)).mean()

    model = Nested()
    exact(beside(module(model, plan, backend="simulate"), copy.deepcopy(model), loss_of, pairs(2)))


def test_gradients_add_up_over_backwards() -> None:
    model = Mlp()
    theirs, ours = copy.deepcopy(model), module(model, "zero3+dp2", backend="simulate")
    for batch in pairs(3):
        (mse(ours, batch) / 3).backward()
        (mse(theirs, batch) / 3).backward()
    one, two = pairs(2)
    (mse(ours, one) * mse(ours, two)).backward()  # two forwards, then one backward
    (mse(theirs, one) * mse(theirs, two)).backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-12)
    assert len(ours.programs.cache) == 1
    ours.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("plan", ["zero3+dp2", "tp2"])
def test_teacher_and_student(plan: str) -> None:
    teacher = module(Mlp(5).eval(), plan, backend="simulate")
    plain, model = copy.deepcopy(teacher.model), Mlp()

    def loss_of(student: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.no_grad():
            want = (teacher if student is ours else plain)(batch[0])
        assert not want.requires_grad
        return F.kl_div(student(batch[0]).log_softmax(-1), want.softmax(-1), reduction="batchmean")

    ours = module(model, "zero1+dp2", backend="simulate")
    exact(beside(ours, copy.deepcopy(model), loss_of, pairs(2)))


@pytest.mark.parametrize("plan", ["zero3+dp2", "pp2"])
def test_two_networks_against_each_other(plan: str) -> None:
    """The generator's gradient comes through the discriminator."""
    models = [Mlp(1), Mlp(2, (4, 16, 1))]
    both = [[module(copy.deepcopy(m), plan, backend="simulate") for m in models], [copy.deepcopy(m) for m in models]]
    kept = []
    for made in both:
        g, d = made
        optimizers = [adamw(m.parameters()) for m in made]
        for z, real in pairs(2):
            loss = F.softplus(d(g(z).detach())).mean() + F.softplus(-d(real)).mean()
            loss.backward()
            optimizers[1].step()
            loss = F.softplus(-d(g(z))).mean()
            d.zero_grad()
            loss.backward()
            assert all(p.grad is not None for m in made for p in m.parameters())
            optimizers[0].step()
            for o in optimizers:
                o.zero_grad()
        kept.append([loss.detach(), *(p.detach() for m in made for p in m.parameters())])
    for a, b in zip(*kept, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_gradients_of_a_later_program_lie_where_the_first_has_put_their_parameters() -> None:
    """Towards its input the last layer's backward is cut elsewhere; the optimizer's rank must have the gradient all the same."""
    ours = module(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double(), "pp2", backend="simulate", example_batch=(pairs(1)[0][1],))
    ours(pairs(1)[0][1].clone().requires_grad_()).sum().backward()
    programs = [built.program for built in ours.programs.cache]
    assert len(programs) == 2
    for p in programs:
        assert {home(p, o.ref.name) == ours.states[0].homes["param", o.key] for o in p.outputs if o.role == "grad"} == {True}


def test_a_write_through_data_is_seen() -> None:
    """As averages of weights and older optimizers write; autograd's count of writes does not move."""
    ours = module(Mlp(), "zero3+dp2", backend="simulate")
    (x, _), = pairs(1)
    ours(x)
    for p in ours.parameters():
        p.data.mul_(0.5)
    torch.testing.assert_close(ours(x), copy.deepcopy(ours.model)(x), rtol=0, atol=1e-12)


def test_evaluation_and_modes() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4)).double()
    theirs, ours = copy.deepcopy(model), module(model, "zero3+dp2", backend="simulate")
    exact(beside(ours, theirs, mse, pairs(2), sgd))  # the first bias's gradient is rounding alone: AdamW would make steps of it
    ours.eval()
    theirs.eval()
    assert not ours.training and not model[1].training and next(iter(ours.state_dict())) == "0.weight"
    with torch.no_grad():
        out = ours(pairs(1)[0][0])
    assert not out.requires_grad
    torch.testing.assert_close(out, theirs(pairs(1)[0][0]), rtol=0, atol=1e-12)
    ours.train()
    theirs.train()
    exact(beside(ours, theirs, mse, pairs(1), sgd))
    assert len(ours.programs.cache) == 2  # trained, and evaluated without grad


def test_a_model_in_evaluation_stays_so() -> None:
    model = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 4)).double().eval()
    ours = module(model, "tp2", backend="simulate")
    assert not any(m.training for m in model.modules()) and not ours.training
    x = pairs(1)[0][0]
    torch.testing.assert_close(ours(x), copy.deepcopy(model)(x), rtol=0, atol=1e-12)
    assert not any(m.training for m in model.modules())


def test_frozen_parameters() -> None:
    model = Mlp()
    model.up.requires_grad_(False)
    exact(beside(module(model, "zero3+dp2", backend="simulate"), copy.deepcopy(model), mse, pairs(2), sgd))
    assert model.up.weight.grad is None


@pytest.mark.parametrize(
    ("name", "plan", "own"), [("LlamaForCausalLM", "zero3+dp2", False), ("LlamaForCausalLM", "zero3+dp2", True), pytest.param("GPT2LMHeadModel", "zero1+dp2+tp2", False, marks=wide)]
)
def test_the_models_own_loss_and_another(name: str, plan: str, own: bool) -> None:
    """Under tp Llama's norms and any model's own loss would differ by float32's rounding: they are made in float32 whatever the model's dtype."""
    found = load(f"hf:{name}")

    def loss_of(model: Any, batch: Any) -> Tensor:
        out = model(**batch)
        return out.loss if own else F.cross_entropy(out.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), label_smoothing=0.1)

    model = found.model.double()
    worst = beside(module(model, plan, backend="simulate"), copy.deepcopy(model), loss_of, [found.batch] * 2, clip=1.0)
    exact(worst, 1e-6 if own else 1e-12)  # the model makes its own loss in float32, whose additions come in another order


# what is refused --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_done_is_said() -> None:
    ours = module(Mlp(), "zero3+dp2", backend="simulate")
    (x, _), = pairs(1)
    loss = ours(x).square().mean()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"backward a second time through one forward(.|\n)*fix: add the losses up"):
        loss.backward()
    loss = ours(x).square().mean()
    with torch.no_grad():
        ours.down.bias.add_(1)
    with pytest.raises(RuntimeError, match=r"parameter 'down.bias' was changed in place between a forward and its backward(.|\n)*fix: step the optimizer"):
        loss.backward()
    z = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(ours(z).square().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


def test_an_output_that_depends_on_no_parameter() -> None:
    class Constant(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return self.up(x).detach()

    out = module(Constant(), "zero0")(pairs(1)[0][0])
    assert not out.requires_grad


# processes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count, plans", [(2, ("zero3", "zero1")), pytest.param(4, ("zero3+tp2", "pp2+mb2"), marks=wide)])
def test_on_ranks(count: int, plans: tuple[str, ...]) -> None:
    for each in ranks(count, on_ranks, plans):
        for worst in each.values():
            exact(worst)


def test_own_rows_mean_what_ddp_means() -> None:
    for each in ranks(2, local_on_ranks, ("zero3", "zero0")):
        for worst in each.values():
            exact(worst)


def test_state_dicts_as_modules_give_and_take_them() -> None:
    ours, head = module(Mlp(), "zero3+dp2", backend="simulate", example_batch=(torch.zeros(8, 8).double(),)), nn.Linear(4, 2)
    whole = nn.Sequential(ours, head).state_dict()
    assert list(whole) == ["0.up.weight", "0.up.bias", "0.down.weight", "0.down.bias", "1.weight", "1.bias"] and not whole["0.up.weight"].requires_grad
    given = {name: t + 1 for name, t in ours.state_dict().items() if name.startswith("up")}
    with pytest.raises(CheckpointError, match="2 tensors of the model are not in the state_dict"):
        ours.load_state_dict(given)
    missing, unexpected = ours.load_state_dict({**given, "other": torch.zeros(1)}, strict=False)
    assert (missing, unexpected) == (["down.weight", "down.bias"], ["other"])
    now = ours.state_dict()
    assert torch.equal(now["up.weight"], given["up.weight"]) and torch.equal(now["down.weight"], whole["0.down.weight"])
