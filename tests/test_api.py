"""``deepseed.compile`` as a user meets it: what it promises beside equality, on simulated ranks."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from renamed import scrambled
from torch import Tensor, nn
from torch.optim import lr_scheduler

import deepseed
from deepseed.api import Module, TrainStep
from deepseed.build import CompileError
from deepseed.capture import CaptureError, eager_reference
from deepseed.ir.program import Program, Ref
from deepseed.target import load

torch.set_num_threads(1)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.nn.functional.gelu(self.norm(self.up(x))))


def mse(model: Any, batch: Any) -> Tensor:
    x, y = batch
    return torch.nn.functional.mse_loss(model(x), y)


def mlp(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Mlp().double()


def pairs(n: int, rows: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(rows, 8, generator=generator).double(), torch.randn(rows, 4, generator=generator).double()) for _ in range(n)]


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9)


def trained(
    step: Callable[[Any], Tensor], mine: nn.Module, theirs: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Any],
    loss_fn: Any = mse, between: Callable[[int], None] = lambda n: None, first: int = 0,
) -> None:  # fmt: skip
    """Compiled and eager, step by step: equal losses and parameters."""
    for n, batch in enumerate(batches):
        loss = step(batch)
        optimizer.zero_grad()
        with eager_reference(theirs, rng=torch.tensor([0, first + n])):
            want = loss_fn(theirs, batch)
            want.backward()
        optimizer.step()
        close(loss, want)
        between(n)
    same_parameters(mine, theirs)


def same_parameters(mine: nn.Module, theirs: nn.Module) -> None:
    have = dict(mine.named_parameters())
    for name, p in theirs.named_parameters():
        close(have[name], p)


def close(a: Tensor, b: Tensor, tol: float = 1e-11) -> None:
    torch.testing.assert_close(a.detach(), b.detach(), rtol=tol, atol=tol)


# nothing by name --------------------------------------------------------------------------------------------------------


def nameless(p: Program) -> list[Any]:
    """The program with values numbered in order, without keys, paths and sites."""
    number = {name: n for n, name in enumerate([*(i.name for i in p.inputs), *(r for op in p.ops for r in op.results)])}

    def arg(a: Any) -> Any:
        return (number[a.name], a.want) if isinstance(a, Ref) else tuple(map(arg, a)) if isinstance(a, tuple) else a

    lines: list[Any] = [(i.role, i.type) for i in p.inputs]
    lines += [(op.target, arg(op.args), op.types, [(k, arg(v)) for k, v in op.kwargs if k != "site"], op.phase) for op in p.ops]
    return lines + [(number[o.ref.name], o.role) for o in p.outputs]


@pytest.mark.parametrize("target", ["hf:LlamaForCausalLM", "hf:GPT2LMHeadModel", "hf:BertForMaskedLM"])
def test_names_change_no_layout(target: str) -> None:
    found = load(target)
    programs = []
    for model in (found.model, scrambled(found.model, seed=1)):
        step = deepseed.compile(model, "zero3+tp2+dp2", optimizer=adamw(model.parameters()), example_batch=found.batch, clip_grad_norm=1.0)
        programs.append([nameless(p.program) for p in step.passes if p.name in ("solve_placements", "lower_reshards")])
        keys = [i.key for i in step.program.inputs if i.role == "param"]
    assert not any(word in key for key in keys for word in ("layer", "weight", "bias", "attn", "mlp", "proj", "embed"))
    assert len(programs[0]) == 2 and programs[0] == programs[1]


# the compiled step stands alone -----------------------------------------------------------------------------------------


def test_training_goes_on_without_the_models_forward() -> None:
    model, theirs, batches = mlp(), mlp(), pairs(4)
    step = deepseed.compile(model, "zero2+dp2", optimizer=adamw(model.parameters()), loss_fn=mse, example_batch=batches[0])

    def forward(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the model's own forward was called")

    model.forward = forward  # type: ignore[method-assign]
    trained(step, model, theirs, adamw(theirs.parameters()), batches)


def test_two_compiled_models_do_not_disturb_each_other() -> None:
    models, theirs, batches = [mlp(1), mlp(2)], [mlp(1), mlp(2)], pairs(3)
    steps = [
        deepseed.compile(models[0], "zero3+dp2", optimizer=adamw(models[0].parameters()), loss_fn=mse),
        deepseed.compile(models[1], "tp2", optimizer=sgd(models[1].parameters()), loss_fn=mse),
    ]
    optimizers = [adamw(theirs[0].parameters()), sgd(theirs[1].parameters())]
    for n, batch in enumerate(batches):
        for step, mine, their, optimizer in zip(steps, models, theirs, optimizers, strict=True):
            trained(step, mine, their, optimizer, [batch], first=n)
    assert str(steps[0].program.mesh) != str(steps[1].program.mesh)


# the optimizer ----------------------------------------------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda n: 0.5**n),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=4),
    "warmup": lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)], [2]),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=10),  # moves betas and momentum too
}


@pytest.mark.parametrize("make", [adamw, sgd])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_work_unchanged(name: str, make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model, theirs = mlp(), mlp()
    optimizers = [make(model.parameters()), make(theirs.parameters())]
    schedulers = [SCHEDULERS[name](o) for o in optimizers]
    step = deepseed.compile(model, "zero1+dp2", optimizer=optimizers[0], loss_fn=mse)

    def between(n: int) -> None:
        for scheduler in schedulers:
            scheduler.step()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(step, model, theirs, optimizers[1], pairs(6), between=between)
    assert optimizers[0].param_groups[0]["lr"] == optimizers[1].param_groups[0]["lr"]
    compiled = capsys.readouterr().err.count("compiling program")
    assert compiled == (1 if name == "one cycle" else 0)  # what moves once is an input from then on


def test_groups_with_their_own_options_frozen_and_tied_parameters() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mid, self.head = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 12, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.tanh(self.mid(self.embed(ids))))

    def loss_fn(model: Any, batch: Any) -> Tensor:
        return torch.nn.functional.cross_entropy(model(batch["ids"]).flatten(0, 1), batch["labels"].flatten())

    def make(model: Any) -> torch.optim.Optimizer:
        model.mid.bias.requires_grad_(False)
        return torch.optim.AdamW([{"params": [model.mid.weight], "lr": 0.1, "weight_decay": 0.0}, {"params": [model.embed.weight]}], lr=1e-2, weight_decay=0.3)

    torch.manual_seed(0)
    model = Tied().double()
    theirs = copy.deepcopy(model)
    batches = [{"ids": torch.randint(0, 12, (4, 6)), "labels": torch.randint(0, 12, (4, 6))} for _ in range(3)]
    frozen = model.mid.bias.clone()
    step = deepseed.compile(model, "zero3+tp2+dp2", optimizer=make(model), loss_fn=loss_fn)
    trained(step, model, theirs, make(theirs), batches, loss_fn)
    state = step.state_dict()
    assert list(state) == list(theirs.state_dict()) and model.head.weight is model.embed.weight
    for name, t in theirs.state_dict().items():
        close(state[name], t)
    assert torch.equal(model.mid.bias, frozen)
    assert {key.partition("/")[2] for key in step.optimizer_state()} == {"mid.weight", "embed.weight"}


def test_state_of_the_optimizer_is_taken_over() -> None:
    model, batches = mlp(), pairs(5)
    optimizer = adamw(model.parameters())
    for batch in batches[:2]:
        optimizer.zero_grad()
        mse(model, batch).backward()
        optimizer.step()
    theirs = copy.deepcopy(model)
    want = adamw(theirs.parameters())
    want.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step = deepseed.compile(model, "zero1+dp2", optimizer=optimizer, loss_fn=mse)
    trained(step, model, theirs, want, batches[2:])
    assert not optimizer.state  # one copy, and it is the step's
    state = step.optimizer_state()
    for name, p in theirs.named_parameters():
        for slot, value in want.state[p].items():
            close(state[f"{slot}/{name}"], value)


@pytest.mark.parametrize("make", [adamw, lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9, dampening=0.5)])
def test_the_optimizers_own_state_dict_saves_and_resumes(make: Any) -> None:
    model, theirs, batches = mlp(), mlp(), pairs(6)
    optimizer, want = make(model.parameters()), make(theirs.parameters())
    step = deepseed.compile(model, "zero3+dp2", optimizer=optimizer, loss_fn=mse)
    trained(step, model, theirs, want, batches[:2])
    saved, values = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(step.state_dict())
    expected = want.state_dict()
    assert saved["param_groups"] == expected["param_groups"] and set(saved["state"]) == set(expected["state"])
    for n, slots in expected["state"].items():
        assert set(saved["state"][n]) == set(slots)
        for slot, value in slots.items():
            close(saved["state"][n][slot], value)
    step(batches[5])  # goes astray, and is called back
    optimizer.load_state_dict(saved)
    assert not optimizer.state
    fresh = mlp(7)
    fresh.load_state_dict(values)
    resumed = make(fresh.parameters())
    again = deepseed.compile(fresh, "zero1+dp2", optimizer=resumed, loss_fn=mse, example_batch=batches[0])
    resumed.load_state_dict(saved)  # another plan, after compile
    trained(again, fresh, theirs, want, batches[2:4])
    for key, value in step.optimizer_state().items():
        slot, _, name = key.partition("/")
        if slot != "started":
            close(value, saved["state"][list(dict(model.named_parameters())).index(name)][slot])


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (adamw, {"betas": (0.5, 0.9)}), (adamw, {"weight_decay": 0.0}), (adamw, {"eps": 1e-3}), (adamw, {"maximize": True}),
        (sgd, {"momentum": 0.5}), (sgd, {"momentum": 0.0}), (sgd, {"nesterov": True}), (sgd, {"dampening": 0.5}),
    ],
)  # fmt: skip
def test_changed_options_are_noticed(make: Any, change: dict[str, Any]) -> None:
    model, theirs = mlp(), mlp()
    optimizers = [make(model.parameters()), make(theirs.parameters())]
    step = deepseed.compile(model, "zero1+dp2", optimizer=optimizers[0], loss_fn=mse)

    def between(n: int) -> None:
        if n == 1:
            for optimizer in optimizers:
                optimizer.param_groups[0].update(change)

    trained(step, model, theirs, optimizers[1], pairs(4), between=between)


def test_an_option_that_moves_every_step_is_compiled_twice() -> None:
    model, theirs = mlp(), mlp()
    optimizers = [adamw(model.parameters()), adamw(theirs.parameters())]
    step = deepseed.compile(model, "zero0+dp2", optimizer=optimizers[0], loss_fn=mse)

    def between(n: int) -> None:
        for optimizer in optimizers:
            optimizer.param_groups[0].update(weight_decay=0.1 + 0.01 * n, betas=(0.9 - 0.01 * n, 0.99 - 0.001 * n))

    trained(step, model, theirs, optimizers[1], pairs(30), between=between)
    assert isinstance(step, TrainStep) and len(step.programs.cache) == 3


def test_a_group_added_later_and_an_unfrozen_parameter_train() -> None:
    model, theirs = mlp(), mlp()
    optimizers = []
    for m in (model, theirs):
        m.down.weight.requires_grad_(False)
        optimizers.append(torch.optim.AdamW([*m.up.parameters(), *m.norm.parameters(), m.down.bias], lr=1e-2))
    step = deepseed.compile(model, "zero3+dp2", optimizer=optimizers[0], loss_fn=mse)

    def between(n: int) -> None:
        if n == 1:
            for m, optimizer in zip((model, theirs), optimizers, strict=True):
                m.down.weight.requires_grad_(True)
                optimizer.add_param_group({"params": [m.down.weight], "lr": 0.05})

    trained(step, model, theirs, optimizers[1], pairs(4), between=between)
    optimizers[0].add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    with pytest.raises(CaptureError, match=r"1 of the 7 parameters of AdamW are not among the model's 6"):
        step(pairs(1)[0])


# the module form --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["zero0+dp2", "zero3+dp2", "tp2"])
def test_module_form(plan: str) -> None:
    found = load("hf:BertForMaskedLM")
    model, theirs = found.model.double(), copy.deepcopy(found.model).double()
    compiled = deepseed.compile(model, plan, example_batch=found.batch)
    assert isinstance(compiled, Module)
    with eager_reference(theirs, rng=torch.tensor([0, 0]), widen=True), torch.no_grad():
        want = theirs(**found.batch)
    with torch.no_grad():
        out = compiled(**found.batch)
    assert type(out) is type(want) and list(out) == list(want)
    torch.testing.assert_close(out.logits, want.logits, rtol=1e-6, atol=1e-6)
    layouts = {i.key: i.type.layout for i in compiled.program.inputs if i.role == "param"}
    loss, grads = compiled.loss_and_grads(found.batch)
    with eager_reference(theirs, rng=torch.tensor([0, 1])):  # the second call draws anew
        want_loss = theirs(**found.batch).loss
        want_loss.backward()
    close(loss, want_loss)
    wanted = {name: p.grad for name, p in theirs.named_parameters()}
    assert set(grads) == set(wanted)
    for name, g in wanted.items():
        close(grads[name], g)
    both = {i.key: i.type.layout for i in compiled.program.inputs if i.role == "param"}
    assert {key: both[key] for key in layouts} == layouts


def test_eval_and_train_are_two_programs() -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.drop, self.norm = nn.Linear(8, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.drop(self.inner(x)))

    torch.manual_seed(0)
    model = Dropping().double()
    theirs = copy.deepcopy(model)
    compiled = deepseed.compile(model, "zero0+dp2", loss_fn=mse)
    assert isinstance(compiled, Module)
    batch = pairs(1)[0]
    for mode in ((True, True, True), (False, False, False), (True, False, True), (True, True, False), (True, True, True)):
        for m in (model, theirs):
            for each, training in zip(m.children(), mode, strict=True):
                each.train(training)
        with eager_reference(theirs, rng=torch.tensor([0, 0])):
            want = mse(theirs, batch)
        close(compiled.loss_and_grads(batch)[0], want)
        for name, b in theirs.named_buffers():
            close(compiled.state_dict()[name].double(), b.double())
    assert len(compiled.programs.cache) == 4


def test_an_exported_program() -> None:
    batches = pairs(3)
    exported = torch.export.export(mlp(), (batches[0][0],))
    compiled = deepseed.compile(exported, "tp2", loss_fn=mse)
    assert isinstance(compiled, Module)
    theirs = mlp()
    want = mse(theirs, batches[0])
    want.backward()
    loss, grads = compiled.loss_and_grads(batches[0])
    close(loss, want)
    for name, p in theirs.named_parameters():
        close(grads[name], p.grad)
    model = exported.module()
    step = deepseed.compile(model, "zero1+dp2", optimizer=adamw(model.parameters()), loss_fn=mse)
    theirs = mlp()
    trained(step, model, theirs, adamw(theirs.parameters()), batches)


def test_a_loss_written_with_torch_func() -> None:
    def loss_fn(model: Any, batch: Any) -> Tensor:
        """Sobolev: the error of the values and of the model's own derivative, sample by sample."""
        x, _ = batch
        slopes = torch.func.vmap(torch.func.grad(lambda row: model(row).sum()))(x)
        return mse(model, batch) + slopes.pow(2).mean()

    model, theirs = mlp(), mlp()
    step = deepseed.compile(model, "zero1+dp2", optimizer=adamw(model.parameters()), loss_fn=loss_fn)
    trained(step, model, theirs, adamw(theirs.parameters()), pairs(2), loss_fn)


def test_batch_entries_that_are_no_tensors() -> None:
    def loss_fn(model: Any, batch: Any) -> Tensor:
        error = (model(batch["x"]) - batch["more"][0]).abs()
        return error.pow(batch["power"]).mean() if batch["kind"] == "power" else error.mean()

    model, theirs = mlp(), mlp()
    batches = [{"x": x, "more": [y, None], "power": 2 + n % 2, "kind": "power" if n < 3 else "plain"} for n, (x, y) in enumerate(pairs(4))]
    step = deepseed.compile(model, "zero1+dp2", optimizer=adamw(model.parameters()), loss_fn=loss_fn)
    trained(step, model, theirs, adamw(theirs.parameters()), batches, loss_fn)
    assert isinstance(step, TrainStep) and len(step.programs.cache) == 3


def test_a_value_read_from_batch_and_constants_together() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 4)
            self.weights = torch.arange(8.0).double()  # neither parameter nor buffer

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) if bool((x[0] * self.weights).sum() > 0) else self.inner(-2 * x)

    torch.manual_seed(0)
    model = Branching().double()
    theirs = copy.deepcopy(model)
    step = deepseed.compile(model, "zero1+dp2", optimizer=adamw(model.parameters()), loss_fn=mse)
    batches = [(x.abs() * sign, y) for (x, y), sign in zip(pairs(4), (1, -1, -1, 1), strict=True)]
    trained(step, model, theirs, adamw(theirs.parameters()), batches)
    assert isinstance(step, TrainStep) and len(step.programs.cache) == 2


# what it says -----------------------------------------------------------------------------------------------------------


def test_what_a_compiled_model_shows() -> None:
    model, batch = mlp(), pairs(1)[0]
    step = deepseed.compile(model, "zero3+dp2", optimizer=adamw(model.parameters()), loss_fn=mse)
    for ask in (lambda: step.program, lambda: step.passes, lambda: step.explain()):
        with pytest.raises(CompileError, match="nothing is compiled yet"):
            ask()
    before = {name: p.clone() for name, p in model.named_parameters()}
    step.compile(batch)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters()), "compiling is no step"
    assert [p.name for p in step.passes][:2] == ["canonicalize", "solve_placements"] and "lowered" in step.program.facts
    said = step.explain()
    assert {c.op for c in said.collectives} >= {"all_gather", "reduce_scatter"} and len(said.ranks) == 2
    assert "all_gather" in str(said) and step.program_hash and step.instances_checked > 5


def test_the_meta_device_serves_all_but_running() -> None:
    with torch.device("meta"):
        model = Mlp()
        batch = (torch.empty(8, 8), torch.empty(8, 4))
    step = deepseed.compile(model, "zero3+dp2", optimizer=adamw(model.parameters()), loss_fn=mse, example_batch=batch)
    assert isinstance(step, TrainStep) and "placed" in step.program.facts
    numel = sum(p.numel() for p in model.parameters())
    assert [r.param_bytes for r in step.explain().ranks] == [numel * 4 // 2] * 2
    with pytest.raises(CompileError, match=r"parameter 'up\.weight' of Mlp is on the meta device(.|\n)*fix: compile\(\.\.\., weights=PATH\)(.|\n)*model\.to_empty"):
        step(batch)
    compiled = deepseed.compile(model, "zero3+dp2", loss_fn=mse, example_batch=batch[:1])
    assert isinstance(compiled, Module)
    model.to_empty(device="cpu")
    values = {name: t.float() for name, t in mlp().state_dict().items()}
    model.load_state_dict(values)
    x = torch.randn(8, 8)
    torch.testing.assert_close(compiled(x), model(x))


def test_bf16_computes_in_bf16_and_keeps_float32() -> None:
    found = load("hf:LlamaForCausalLM")
    losses, moved = {}, {}
    for plan in ("zero3+dp2", "zero3+dp2+bf16"):
        model = copy.deepcopy(found.model)
        step = deepseed.compile(model, plan, optimizer=adamw(model.parameters()), example_batch=found.batch)
        losses[plan] = [float(step(found.batch)) for _ in range(3)]
        moved[plan] = {c.op: c.bytes for c in step.explain().collectives}
        assert all(p.dtype is torch.float32 for p in model.parameters())
        assert isinstance(step, TrainStep) and all(t.dtype is torch.float32 for t in step.optimizer_state().values())
    for a, b in zip(losses["zero3+dp2"], losses["zero3+dp2+bf16"], strict=True):
        assert abs(a - b) <= 2e-2 * abs(a) and a != b
    whole, half = (moved[p]["all_gather"] for p in ("zero3+dp2", "zero3+dp2+bf16"))
    assert abs(half / whole - 0.5) < 0.02
