"""Programs by what they are made for: Python state that a model reads, shapes of batches, and how many are kept."""

from __future__ import annotations

import gc
import re
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import BatchEncoding
from transformers.utils import ModelOutput

import deepseed
from deepseed.api import Module, TrainStep
from deepseed.build import CompileError
from deepseed.capture import CaptureError, eager_reference
from deepseed.capture.errors import BatchError
from deepseed.runtime.state import StateError
from deepseed.target import load

pytestmark = pytest.mark.filterwarnings("ignore")
torch.set_num_threads(1)


@dataclass
class Settings:
    power: int = 1
    more: dict[str, Any] = field(default_factory=lambda: {"gain": [1.0, 2.0]})


@dataclass(slots=True)
class Slotted:
    shift: float = 0.5


class Inner(nn.Module):
    factor = 1.0  # of the class

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.lin, self.act, self.settings, self.slotted = nn.Linear(8, 8), nn.Tanh(), settings, Slotted()
        self.scale, self.flag, self.word, self.sizes, self.mixed = 2.0, True, "plain", [1.0, 2.0], {"a": (1, {"b": 1.0})}
        self.function, self.simple, self.unread, self.plain = torch.tanh, SimpleNamespace(x=1.0), 0, torch.ones(8).double()

    @property
    def doubled(self) -> float:
        return 2 * self.scale

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.lin(x)) * self.doubled * self.factor * self.sizes[1] * self.mixed["a"][1]["b"] + self.slotted.shift
        h = h if self.flag else h * 3
        h = h**self.settings.power * self.settings.more["gain"][0] * self.simple.x * self.plain
        return self.function(h) if self.word == "plain" else h


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = Settings()
        self.inner, self.head = Inner(self.config), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x) + getattr(self, "later", 0))


OFFSET = 1.0  # a global that the loss reads


def mse(model: Any, batch: Any) -> Tensor:
    return (model(batch["x"]) - batch["y"] * OFFSET).square().mean()


def fresh(kind: Callable[[], nn.Module] = Outer) -> nn.Module:
    torch.manual_seed(0)
    return kind().double()


def batch(seed: int = 0, rows: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(rows, 8, generator=generator).double(), "y": torch.randn(rows, 4, generator=generator).double()}


def close(a: Any, b: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(torch.as_tensor(a, dtype=torch.float64).detach(), torch.as_tensor(b).detach(), rtol=tolerance, atol=tolerance)


def grads_of(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names = dict(model.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, list(names.values()), allow_unused=True), strict=True))


def same(compiled: Module, theirs: nn.Module, data: Any, loss_fn: Any = mse) -> None:
    """Loss and gradients of this call are eager's."""
    loss, grads = compiled.loss_and_grads(data)
    want = loss_fn(theirs, data)
    close(loss, want)
    for name, g in grads_of(theirs, want).items():
        close(grads[name], g)


# Python state -----------------------------------------------------------------------------------------------------------

CHANGES: dict[str, Callable[[Any], object]] = {
    "scale": lambda m: setattr(m.inner, "scale", 3.0),
    "flag": lambda m: setattr(m.inner, "flag", False),
    "word": lambda m: setattr(m.inner, "word", "other"),
    "an entry of a list": lambda m: m.inner.sizes.__setitem__(1, 5.0),
    "an entry deep inside": lambda m: m.inner.mixed["a"][1].update(b=4.0),
    "an attribute of the class": lambda m: setattr(m.inner, "factor", 1.5),
    "a config": lambda m: setattr(m.config, "power", 2),
    "a dict of a config": lambda m: m.config.more["gain"].__setitem__(0, 7.0),
    "a slot": lambda m: setattr(m.inner.slotted, "shift", 0.25),
    "a namespace": lambda m: setattr(m.inner.simple, "x", 9.0),
    "a function": lambda m: setattr(m.inner, "function", torch.sin),
    "a tensor that is no buffer": lambda m: m.inner.plain.mul_(2.0),
    "an attribute that was not there": lambda m: setattr(m, "later", 1.0),
    "a whole config": lambda m: setattr(m.inner, "settings", Settings(power=3)),
    "True for 1": lambda m: setattr(m.config, "power", True),
    "a submodule without parameters": lambda m: setattr(m.inner, "act", nn.ReLU()),
    "a hook": lambda m: m.inner.lin.register_forward_hook(lambda module, args, result: result * 2),
    "a pre-hook": lambda m: m.head.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    "a backward hook": lambda m: m.head.register_full_backward_hook(lambda module, into, out: (into[0] * 2,)),
}


@pytest.fixture(scope="module")
def compiled() -> tuple[Module, nn.Module]:
    model = fresh()
    made = deepseed.compile(model, "zero0+dp2", loss_fn=mse, max_programs=100)
    assert isinstance(made, Module)
    same(made, fresh(), batch())
    return made, model


@pytest.mark.parametrize("what", CHANGES)
def test_python_state_that_changes_finds_its_own_program(what: str) -> None:
    model, theirs = fresh(), fresh()
    made = deepseed.compile(model, "zero0", loss_fn=mse)
    assert isinstance(made, Module)
    same(made, theirs, batch())
    same(made, theirs, batch(1))
    assert len(made.programs.cache) == 1
    for each in (model, theirs):
        CHANGES[what](each)
    same(made, theirs, batch(2))
    assert len(made.programs.cache) == 2


def test_a_value_that_returns_finds_its_program_and_what_is_not_read_counts_for_nothing() -> None:
    model, theirs = fresh(), fresh()
    made = deepseed.compile(model, "zero0", loss_fn=mse)
    assert isinstance(made, Module)
    for n, scale in enumerate((1.0, 2.0, 1.0, 2.0)):
        for each in (model, theirs):
            each.inner.scale, each.inner.unread, each.nobody = scale, n, n  # type: ignore[union-attr, assignment]
        same(made, theirs, batch(n))
    assert len(made.programs.cache) == 2


def test_numbers_that_the_loss_closes_over_and_its_globals(monkeypatch: pytest.MonkeyPatch) -> None:
    model, theirs = fresh(), fresh()
    weight, options = 1.0, SimpleNamespace(power=2)

    def loss_fn(m: Any, b: Any) -> Tensor:
        return weight * mse(m, b) ** options.power

    made = deepseed.compile(model, "zero0", loss_fn=loss_fn)
    assert isinstance(made, Module)
    same(made, theirs, batch(), loss_fn)
    weight = 3.0
    same(made, theirs, batch(), loss_fn)
    options.power = 1
    same(made, theirs, batch(), loss_fn)
    monkeypatch.setitem(globals(), "OFFSET", 2.0)
    same(made, theirs, batch(), loss_fn)
    assert len(made.programs.cache) == 4


def test_a_model_beside_this_one_is_watched() -> None:
    """A teacher that is averaged between steps is a constant of each program."""
    model, theirs, teacher = fresh(), fresh(), fresh()

    def loss_fn(m: Any, b: Any) -> Tensor:
        with torch.no_grad():
            target = teacher(b["x"])
        return (m(b["x"]) - target).square().mean() + mse(m, b)

    made = deepseed.compile(model, "zero0", loss_fn=loss_fn)
    assert isinstance(made, Module)
    for n in range(3):
        same(made, theirs, batch(n), loss_fn)
        with torch.no_grad():
            for p in teacher.parameters():
                p.mul_(0.9)


def test_a_value_that_is_read_and_does_not_matter_costs_no_passes(capsys: pytest.CaptureFixture[str]) -> None:
    class Talking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.name = nn.Linear(8, 4), "a"

        def forward(self, x: Tensor) -> Tensor:
            assert self.name
            return self.lin(x)

    model = fresh(Talking)
    step = deepseed.compile(model, "zero1+dp2", optimizer=torch.optim.AdamW(model.parameters()), loss_fn=mse)
    assert isinstance(step, TrainStep)
    for n, name in enumerate("abab"):
        model.name = name  # type: ignore[assignment]
        step(batch(n))
    one, two = step.programs.cache
    assert one.executables is two.executables and one.captured is not two.captured
    assert "it is the same as an earlier one" in capsys.readouterr().err


class Cached(nn.Module):
    """Makes a number once, as models do with tables; counts what nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.cache, self.table, self.last = nn.Linear(8, 4), None, {}, 0  # type: ignore[var-annotated]

    def forward(self, x: Tensor) -> Tensor:
        if self.cache is None:
            self.cache = 3.0
            self.table[len(self.table)] = 2.0
            return self.lin(x)
        self.last = x.shape[0]
        return self.lin(x) * self.cache


def test_a_value_that_the_first_step_makes_is_there_for_the_second() -> None:
    model, theirs = fresh(Cached), fresh(Cached)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, theirs)]
    step = deepseed.compile(model, "zero0+dp2", optimizer=optimizers[0], loss_fn=mse, example_batch=batch())
    assert model.cache is None  # compiling is no step
    for n in range(4):
        optimizers[1].zero_grad()
        want = mse(theirs, batch(n))
        want.backward()
        optimizers[1].step()
        close(step(batch(n)), want)
        assert model.cache == 3.0 and model.table == {0: 2.0}
    assert isinstance(step, TrainStep) and len(step.programs.cache) == 2


def test_a_counter_in_the_forward_is_refused_by_name_and_line() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.calls = nn.Linear(8, 4), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.lin(x) * (2 if self.calls > 10 else 1)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Counting()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    model = fresh(Model)
    with pytest.raises(CaptureError, match=r"reads 'calls' of Counting and changes it each time: 0, 1, 2(.|\n)*at body, test_shapes.py:\d+(.|\n)*register_buffer"):
        deepseed.compile(model, "zero0", loss_fn=mse, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), example_batch=batch())
    assert model.body.calls == 0 and nn.Module.__getattribute__ is object.__getattribute__


def test_a_hook_on_a_gradient_is_refused() -> None:
    model = fresh()
    model.head.weight.register_hook(lambda g: 2 * g)  # type: ignore[union-attr, operator]
    made = deepseed.compile(model, "zero0", loss_fn=mse)
    assert isinstance(made, Module)
    with pytest.raises(CaptureError, match=r"'head.weight' has a hook on its gradient(.|\n)*fix:"):
        made.loss_and_grads(batch())


def test_a_parameter_in_a_plain_list_is_refused() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(8, 4)
            self.weights = [self.lin.weight]

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x) @ self.weights[0]

    with pytest.raises(CaptureError, match=r"reads parameter 'lin.weight' through weights(.|\n)*test_shapes.py:(.|\n)*ParameterList"):
        deepseed.compile(fresh(Listed), "zero0").compile(batch()["x"])  # type: ignore[union-attr]
    model = fresh()
    parameters = list(model.parameters())
    with pytest.raises(CaptureError, match=r"loss_fn reads parameter 'inner.lin.weight' through parameters(.|\n)*named_parameters"):
        deepseed.compile(model, "zero0", loss_fn=lambda m, b: mse(m, b) + sum(p.square().sum() for p in parameters)).loss_and_grads(batch())  # type: ignore[union-attr]
    assert nn.Module.__getattribute__ is object.__getattribute__


# the cache --------------------------------------------------------------------------------------------------------------


def test_what_is_said_when_a_program_is_compiled_and_when_one_goes(capsys: pytest.CaptureFixture[str]) -> None:
    def said() -> list[str]:
        return [line for line in capsys.readouterr().err.splitlines() if "compiled in" not in line]  # which a slow machine adds

    model = fresh()
    made = deepseed.compile(model, "zero0", loss_fn=mse, max_programs=2)
    assert isinstance(made, Module)
    made.loss_and_grads(batch())
    assert said() == []
    made.loss_and_grads(batch(rows=6))
    model.inner.scale = 4.0  # type: ignore[union-attr, assignment]
    made.loss_and_grads(batch(rows=6))
    lines = said()
    assert lines[0] == 'deepseed: compiling program 2: batch entry "x" f64[4, 8] -> f64[6, 8]; batch entry "y" f64[4, 4] -> f64[6, 4]'
    assert "compiling program 3: inner.scale (test_shapes.py:" in lines[1] and lines[1].endswith("2.0 -> 4.0")
    assert "dropping the program of batch x f64[4, 8], y f64[4, 4]: 2 are kept (max_programs)" in "".join(lines[2:])


def test_an_entry_that_changes_each_step_is_named_with_its_cure(capsys: pytest.CaptureFixture[str]) -> None:
    def loss_fn(model: Any, b: Any) -> Tensor:
        return mse(model, b) * b["weight"]

    made = deepseed.compile(fresh(), "zero0", loss_fn=loss_fn)
    assert isinstance(made, Module)
    for n in range(4):
        made.loss_and_grads({**batch(n), "weight": float(n)})
    said = capsys.readouterr().err
    assert said.count("warning") == 1
    assert 'batch entry "weight" is the cause of 3 compilations in a row, now is a Python number that changed 2.0 -> 3.0\n  fix: make it a tensor: torch.tensor(3.0)' in said


def test_only_what_changed_is_a_cause(capsys: pytest.CaptureFixture[str]) -> None:
    """A loss has no trained parameters, which is no change of them; modes are said as how many of how many."""
    model = fresh()
    step = deepseed.compile(model, "zero0", optimizer=torch.optim.SGD(model.parameters()), loss_fn=mse)
    assert isinstance(step, TrainStep)
    for _ in range(2):
        step(batch(0))
        step.loss(batch(0))
    assert "trained" not in (said := capsys.readouterr().err) and "the function 'step' -> 'loss'" in said
    model.eval()
    next(model.parameters()).requires_grad_(False)
    step(batch(0))
    assert re.search(r"the function 'loss' -> 'step'; the modules in training mode, '(\d+) of \1 \(\w+\)' -> '0 of \1 \(\w+\)'\n", capsys.readouterr().err)
    next(model.parameters()).requires_grad_(True)
    step(batch(0))
    assert re.search(r"the trained parameters, '(\d+) of (\d+) \(\w+\)' -> '\2 of \2 \(\w+\)'", capsys.readouterr().err)


def test_a_program_that_is_dropped_is_freed_and_none_holds_a_graph() -> None:
    model = fresh()
    step = deepseed.compile(model, "zero1+dp2", optimizer=torch.optim.AdamW(model.parameters()), loss_fn=mse, max_programs=1, clip_grad_norm=1.0)
    assert isinstance(step, TrainStep)
    step(batch())
    built = step.programs.current()
    held = [weakref.ref(each) for each in (built, built.program, built.executables[0], built.executables[0]._loaded, built.captured)]
    del built
    step(batch(rows=8))
    gc.collect()
    assert [each() for each in held] == [None] * 5
    globals_of = {id(m.__dict__): None for m in list(sys.modules.values()) if hasattr(m, "__dict__")}
    for reached in (_reached(step, globals_of, 1_000_000), _reached(step, {}, 200_000)):  # all that is its own, and some of what functions see
        assert any(each is step.program for each in reached) or len(reached) == 200_000
        assert not [each for each in reached if isinstance(each, torch.fx.Graph | torch.fx.GraphModule)]


def _reached(start: object, besides: dict[int, None], limit: int) -> list[object]:
    """What an object refers to, and what that refers to, ``limit`` objects at most; classes and modules aside."""
    seen: dict[int, object] = dict(besides)
    todo = [start]
    while todo and len(seen) < limit:
        each = todo.pop()
        if id(each) not in seen and not isinstance(each, type | type(gc)):
            seen[id(each)] = each
            todo += gc.get_referents(each)
    return list(seen.values())


# batches ----------------------------------------------------------------------------------------------------------------


def test_torchs_own_log_is_silent_before_our_error(capfd: pytest.CaptureFixture[str]) -> None:
    made = deepseed.compile(fresh(), "zero0", loss_fn=mse)
    assert isinstance(made, Module)
    with pytest.raises(ValueError, match="cannot run on this batch"):
        made.loss_and_grads({"x": torch.zeros(4, 6), "y": torch.zeros(4, 4)})
    out = capfd.readouterr()
    assert "Traceback" not in out.err + out.out and "fake" not in out.err


def test_a_numpy_entry_is_named_without_its_values() -> None:
    made = deepseed.compile(fresh(), "zero0", loss_fn=mse)
    assert isinstance(made, Module)
    with pytest.raises(BatchError, match=r"batch entry 'y' is a numpy.ndarray float64\[4, 4\], not a tensor\n  fix: torch.as_tensor"):
        made.loss_and_grads({**batch(), "y": batch()["y"].numpy()})


@dataclass
class Pair:
    x: Tensor
    y: Tensor
    note: str = "a constant"


class Triple(NamedTuple):
    x: Tensor
    y: Tensor
    more: tuple[Tensor, ...] = ()


class Shown(ModelOutput):  # type: ignore[misc]
    x: Tensor | None = None
    y: Tensor | None = None


def form(kind: str, b: dict[str, Tensor]) -> tuple[Any, Callable[[Any], tuple[Tensor, Tensor]]]:
    """A batch of a kind, and how a loss reads it."""
    x, y = b["x"], b["y"]
    attributes, entries = lambda d: (d.x, d.y), lambda d: (d["x"], d["y"])
    return {
        "mapping": (MappingProxyType({"x": x, "y": y}), entries),
        "dataclass": (Pair(x, y), attributes),
        "namedtuple": (Triple(x, y, (x[:1],)), attributes),
        "model output": (dataclass(Shown)(x=x, y=y), attributes),
        "batch encoding": (BatchEncoding({"x": x, "y": y}), entries),
        "nested": ({"in": [x, {"deep": (None, 3)}], "out": {"y": y}}, lambda d: (d["in"][0], d["out"]["y"])),
        "not contiguous": ({"x": x.t().contiguous().t(), "y": torch.stack([y, y], -1)[..., 0]}, entries),
        "expanded": ({"x": x[:1].expand(4, 8), "y": y[:, :1].expand(4, 4)}, entries),
        "flipped and offset": ({"x": torch.cat([x, x])[4:], "y": torch.zeros(9, 4).double()[1::2].copy_(y)}, entries),
        "small integers": ({"x": x, "y": (y * 4).to(torch.int8)}, entries),
        "booleans": ({"x": x, "y": y > 0}, lambda d: (d["x"], d["y"].double())),
        "half": ({"x": x.to(torch.bfloat16), "y": y.half()}, lambda d: (d["x"].double(), d["y"].double())),
        "wants gradients": ({"x": x.clone().requires_grad_(), "y": y}, entries),
        "inference": ({"x": _inference(x), "y": y}, entries),
    }[kind]


def _inference(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


KINDS = (
    "mapping", "dataclass", "namedtuple", "model output", "batch encoding", "nested", "not contiguous", "expanded", "flipped and offset", "small integers",
    "booleans", "half", "wants gradients", "inference",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_any_form(kind: str) -> None:
    model, theirs = fresh(), fresh()
    made: Any = None
    for n in range(2):
        data, read = form(kind, batch(n))

        def loss_fn(m: Any, b: Any, read: Any = read) -> Tensor:
            x, y = read(b)
            return ((m(x) - y).square().mean() + 0 * m.head.bias.sum()).reshape(1, 1) if kind == "nested" else (m(x) - y).square().mean()  # one number of any shape

        made = made or deepseed.compile(model, "zero3+dp2", loss_fn=loss_fn)
        plain = {k: t.detach().clone() for k, t in zip(("x", "y"), read(data), strict=True)}
        loss, grads = made.loss_and_grads(data)
        want = (theirs(plain["x"]) - plain["y"]).square().mean()
        close(loss, want)
        assert loss.shape == () and not loss.requires_grad
        for name, g in grads_of(theirs, want).items():
            close(grads[name], g)
    assert len(made.programs.cache) == 1


def test_a_forward_without_loss_fn_says_what_it_takes() -> None:
    made = deepseed.compile(fresh(), "zero0", loss_fn=mse)
    assert isinstance(made, Module)
    close(made(x=batch()["x"]), fresh()(batch()["x"]))
    close(made(batch()["x"]), fresh()(batch()["x"]))
    with pytest.raises(CompileError, match=r"unexpected keyword argument 'y'(.|\n)*compiled\(\.\.\.\) calls the model itself(.|\n)*loss_and_grads\(batch\) calls loss_fn"):
        made(**batch())


# the module's own tensors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["zero0", "zero3+dp2"])
def test_a_tensor_in_a_parameters_place_is_taken_over(plan: str) -> None:
    model, theirs = fresh(), fresh()
    made = deepseed.compile(model, plan, loss_fn=mse)
    assert isinstance(made, Module)
    same(made, theirs, batch())
    other = {name: t * 2 for name, t in fresh().state_dict().items()}
    for each in (model, theirs):
        each.load_state_dict({name: t.clone() for name, t in other.items()}, assign=True)
    same(made, theirs, batch(1))
    for each in (model, theirs):
        each.head = nn.Linear(8, 4).double()
        each.head.load_state_dict({"weight": torch.ones(4, 8), "bias": torch.ones(4)})
    same(made, theirs, batch(2))
    model.float()
    with pytest.raises(StateError, match=r"'inner.lin.weight' is f32\[8, 8\] now, f64\[8, 8\] in the compiled step"):
        made.loss_and_grads(batch())


def test_a_weight_that_is_untied_is_noticed() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.b(self.a(x)))

    model, theirs = fresh(Tied), fresh(Tied)
    made = deepseed.compile(model, "zero0", loss_fn=mse)
    assert isinstance(made, Module)
    close(made(batch()["x"]), theirs(batch()["x"]))
    for each in (model, theirs):
        each.b.weight = nn.Parameter(torch.eye(8).double())  # type: ignore[union-attr]
    close(made(batch()["x"]), theirs(batch()["x"]))


# buckets ----------------------------------------------------------------------------------------------------------------

TEXT = deepseed.Bucket(fill={"input_ids": 0, "attention_mask": 0, "labels": -100}, to=8)
ROWS = deepseed.Bucket(fill={"input_ids": 0, "attention_mask": 1, "labels": -100}, dim=0, to=[4])


def text(seed: int, rows: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 100, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask.bool(), -100)}


@pytest.mark.parametrize(("target", "plan", "buckets"), [("hf:LlamaForCausalLM", "zero1+dp2", [TEXT]), ("hf:LlamaForCausalLM", "tp2", [TEXT, ROWS]), ("hf:BertForMaskedLM", "zero0", [TEXT, ROWS])])
@pytest.mark.turn
def test_padded_batches_train_as_the_batches_themselves(target: str, plan: str, buckets: list[deepseed.Bucket], capsys: pytest.CaptureFixture[str]) -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(load(target).model.double().eval())  # no dropout: which bits are drawn depends on the padded length
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in models]
    step = TrainStep(models[0], plan, optimizer=optimizers[0], buckets=buckets, clip_grad_norm=1.0, widen=True)
    rows = (4, 4, 3) if len(buckets) == 2 else (4, 4, 4)
    for n, (r, length) in enumerate(zip((*rows, 4), (8, 7, 5, 13), strict=True)):
        data = text(n, r, length)
        optimizers[1].zero_grad()
        with eager_reference(models[1], rng=torch.tensor([0, n]), widen=True):
            want = models[1](**data).loss
            want.backward()
        torch.nn.utils.clip_grad_norm_(models[1].parameters(), 1.0)
        optimizers[1].step()
        close(step(data), want, 1e-12)
    state = step.state_dict()
    for name, p in models[1].named_parameters():
        close(state[name], p, 1e-10)
    assert sorted(built.captured.batch.types["input_ids"].shape for built in step.programs.cache) == [(4, 8), (4, 16)]
    assert capsys.readouterr().err.count("padding is exact: loss and gradients of") == len(buckets)


def test_padding_that_changes_the_numbers_is_refused_with_both() -> None:
    """A mean over all positions, a recurrence without a mask, and batch statistics: nothing is trusted."""
    made = deepseed.compile(fresh(), "zero0+dp2", loss_fn=mse, buckets=deepseed.Bucket(fill={"x": 0, "y": 0}, dim=0, to=8))
    assert isinstance(made, Module)
    with pytest.raises(CompileError, match=r"the loss is (\S+) without padding and (\S+) with it(.|\n)*x \[4, 8\](.|\n)*x \[8, 8\](.|\n)*fix:") as error:
        made.loss_and_grads(batch())
    found = re.search(r"loss is (\S+) without padding and (\S+) with", str(error.value))
    assert found is not None
    close(float(found[1]), mse(fresh(), batch()), 1e-14)
    close(float(found[2]), mse(fresh(), {k: torch.cat([t, torch.zeros_like(t)]) for k, t in batch().items()}), 1e-14)
    with pytest.raises(CompileError, match="padding changes"):  # and again: it was not remembered as exact
        made.loss_and_grads(batch())

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.drop, self.lin = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(self.drop(self.norm(self.first(x))))

    def masked(model: Any, b: Any) -> Tensor:
        return ((model(b["x"]) - b["y"]).square().mean(1) * b["w"]).sum() / b["w"].sum()

    model = fresh(Normed)
    step = deepseed.compile(model, "zero0", loss_fn=masked, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), buckets=deepseed.Bucket(fill={"x": 0, "y": 0, "w": 0}, dim=0, to=8))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(CompileError, match="padding changes"):
        step({**batch(), "w": torch.ones(4).double()})
    for name, t in model.state_dict().items():  # neither a step nor its check has written anything
        assert torch.equal(t, before[name])


def test_dropout_does_not_hide_or_feign_a_difference() -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.drop, self.out = nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.drop(self.lin(x)))

    def masked(model: Any, b: Any) -> Tensor:
        return ((model(b["x"]) - b["y"]).square().mean(1) * b["w"]).sum() / b["w"].sum()

    model = fresh(Dropping)
    step = deepseed.compile(model, "zero0", loss_fn=masked, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), buckets=deepseed.Bucket(fill={"x": 0, "y": 0, "w": 0}, dim=0, to=8))
    assert torch.isfinite(step({**batch(), "w": torch.ones(4).double()}))


def test_buckets_that_do_not_fit_the_batch() -> None:
    def refused(match: str, data: dict[str, Tensor], **options: Any) -> None:
        made = deepseed.compile(fresh(), "zero0", loss_fn=mse, buckets=deepseed.Bucket(**options))
        assert isinstance(made, Module)
        with pytest.raises(CompileError, match=match):
            made.loss_and_grads(data)

    refused(r"'y' \[4, 4\] has the length 4 in dimension 0, as 'x' has, and no fill value", batch(), fill={"x": 0}, dim=0, to=8)
    refused("none of the entries z", batch(), fill={"z": 0})
    refused("differ in length: x 8, y 4", batch(), fill={"x": 0, "y": 0})
    refused("a batch of length 4 in dimension 0, but the longest bucket is 3", batch(), fill={"x": 0, "y": 0}, dim=0, to=[2, 3])
    refused("has 2 dimensions, none of number 2", batch(), fill={"x": 0, "y": 0}, dim=2)
    for wrong in ({"fill": {}}, {"fill": {"x": 0}, "to": 0}, {"fill": {"x": 0}, "to": []}):
        with pytest.raises(CompileError, match="name the entries"):
            deepseed.Bucket(**wrong)  # type: ignore[arg-type]
    with pytest.raises(CompileError, match=r"a deepseed\.Bucket, or several"):
        deepseed.compile(fresh(), "zero0", buckets=[64])  # type: ignore[list-item]
    with pytest.raises(CompileError, match='buckets needs batch="global"'):
        deepseed.compile(model := fresh(), "zero0", optimizer=torch.optim.SGD(model.parameters()), buckets=TEXT, batch="local")
    with pytest.raises(CompileError, match='2 buckets for batch="local"'):
        deepseed.compile(fresh(), "zero0", buckets=[TEXT, TEXT], batch="local")
