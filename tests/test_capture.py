"""Captured programs against the user's own eager module, loss and optimizer: several steps, two batches, float64."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from deepseed.capture import Captured, capture, eager_reference
from deepseed.capture import optimizer as rules
from deepseed.capture.batch import DTYPES
from deepseed.capture.convert import Emitter, convert
from deepseed.capture.elementwise import pointwise
from deepseed.capture.functional import functional
from deepseed.capture.options import Number
from deepseed.ir.program import Type
from deepseed.ir.text import parse
from deepseed.ops import evaluate

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)


class Runner:
    """Feeds a captured program step after step, as a runtime does."""

    def __init__(self, c: Captured) -> None:
        assert parse(str(c.program)) == c.program
        self.c = c
        self.values: dict[tuple[str, str], Tensor] = {("param", k): p.detach().clone() for k, p in c.parameters.items()}
        self.values |= {("buffer", k): b.clone() for k, b in c.buffers.items()}
        self.values |= {("constant", k): v for k, v in c.constants.items()}
        for key, slot in c.state.items():
            dtype = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16}[slot.type.dtype]
            start = torch.full(slot.type.shape, slot.fill, dtype=dtype)
            self.values["state", key] = slot.existing.clone() if slot.existing is not None else start
        self.step = 0

    def __call__(self, batch: Any) -> dict[tuple[str, str], Tensor]:
        given = dict(self.values)
        given |= {("batch", k): t for k, t in self.c.batch.flatten(batch).items()}
        given |= {("hyper", k): torch.tensor(read(), dtype=torch.float64) for k, read in self.c.hyper.items()}
        given["rng", "rng"] = torch.tensor([self.c.seed, self.step])
        found = evaluate(self.c.program, {i.name: given[i.role, i.key].clone() for i in self.c.program.inputs})
        out = {(o.role, o.key): found[o.ref.name] for o in self.c.program.outputs}
        self.values |= {k: v for k, v in out.items() if k[0] in ("param", "buffer", "state")}
        self.step += 1
        return out


def close(a: Tensor, b: Tensor, scale: float | None = None, tol: float = 1e-12) -> None:
    assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
    if a.is_floating_point():
        size = max(scale or 0.0, float(b.abs().max()) if b.numel() else 0.0, 1e-30)
        assert float((a - b).abs().max() if b.numel() else 0.0) <= tol * size
    else:
        assert torch.equal(a, b)


def loss_of(model: nn.Module, batch: Any, loss_fn: Any) -> Tensor:
    return loss_fn(model, batch) if loss_fn is not None else model(**batch).loss


def check_gradients(model: nn.Module, batches: list[Any], loss_fn: Any = None, tol: float = 1e-12, **options: Any) -> Captured:
    """Loss, every gradient and every buffer on each batch, counter-based draws in both."""
    c = capture(model, batches[0], loss_fn=loss_fn, seed=5, **options)
    run = Runner(c)
    eager = copy.deepcopy(model)
    for n, batch in enumerate(batches):
        got = run(batch)
        eager.zero_grad(set_to_none=True)
        with eager_reference(eager, rng=torch.tensor([5, n])):
            loss = loss_of(eager, batch, loss_fn)
            loss.backward()
        close(got["loss", "loss"], loss.detach().reshape(()), tol=tol)
        wanted = {k: p.grad for k, p in eager.named_parameters() if p.grad is not None}
        largest = max(float(g.abs().max()) for g in wanted.values())
        assert {k for r, k in got if r == "grad"} == set(wanted)
        for key, g in wanted.items():
            close(got["grad", key], g, largest, tol)
        for key, b in eager.named_buffers():
            close(run.values["buffer", key], b, tol=tol)
    return c


def check_training(
    model: nn.Module, batches: list[Any], make: Callable[[Any], torch.optim.Optimizer], loss_fn: Any = None, clip: float | None = None, tol: float = 1e-12
) -> Captured:
    """Three steps of the compiled step and of the user's loop: loss, norm, parameters, optimizer state."""
    opt = make(model.parameters())
    c = capture(model, batches[0], loss_fn=loss_fn, optimizer=opt, clip_grad_norm=clip, seed=3)
    run = Runner(c)
    eager = copy.deepcopy(model)
    theirs = make(eager.parameters())
    names = {id(p): k for k, p in eager.named_parameters()}
    for n in range(3):
        batch = batches[n % len(batches)]
        for o in (opt, theirs):
            o.param_groups[0]["lr"] *= 0.9 if n else 1.0
        got = run(batch)
        theirs.zero_grad()
        with eager_reference(eager, rng=torch.tensor([3, n])):
            loss = loss_of(eager, batch, loss_fn)
            loss.backward()
        if clip is not None:
            close(got["norm", "grad_norm"], torch.nn.utils.clip_grad_norm_(eager.parameters(), clip), tol=tol)
        theirs.step()
        close(got["loss", "loss"], loss.detach().reshape(()), tol=tol)
        for key, p in eager.named_parameters():
            close(run.values["param", key], p.detach(), tol=tol)
        for p, state in theirs.state.items():
            for slot, value in state.items():
                if isinstance(value, Tensor):
                    close(run.values["state", f"{slot}/{names[id(p)]}"], value, tol=tol)
    return c


# models -----------------------------------------------------------------------------------------------------------


def ids(vocab: int, n: int = 2, shape: tuple[int, int] = (2, 12)) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    out = []
    for _ in range(n):
        x = torch.randint(0, vocab, shape, generator=generator)
        out.append({"input_ids": x, "labels": x.clone()})
    return out


def padded(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    for n, batch in enumerate(batches):
        mask = torch.ones_like(batch["input_ids"])
        if n:
            mask[0, 8:] = 0
            batch["labels"][0, 8:] = -100
        batch["attention_mask"] = mask
    return batches


def llama(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{**dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32), **options}
    )
    return transformers.LlamaForCausalLM(config).double()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0)).double()


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, max_position_embeddings=32)
    return transformers.BertForMaskedLM(config).double()


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 10), nn.LayerNorm(10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.nn.functional.gelu(self.norm(self.up(x))))


def mse(model: Any, batch: Any) -> Tensor:
    x, y = batch
    return torch.nn.functional.mse_loss(model(x), y)


def pairs(n: int = 2) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [(torch.randn(5, 6, generator=generator, dtype=torch.float64), torch.randn(5, 4, generator=generator, dtype=torch.float64)) for _ in range(n)]


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return MLP().double()


@pytest.mark.parametrize(
    ("make", "mask", "tol"),
    [(llama, False, 1e-6), (llama, True, 1e-6), (lambda: llama(tie_word_embeddings=True), False, 1e-6), (gpt2, False, 1e-6), (gpt2, True, 1e-6), (bert, True, 1e-12)],
    ids=["llama", "llama-padded", "llama-tied", "gpt2-dropout", "gpt2-dropout-padded", "bert-dropout"],
)  # HF causal losses cast logits to float32
def test_transformers_gradients(make: Any, mask: bool, tol: float) -> None:
    batches = ids(40)
    check_gradients(make(), padded(batches) if mask else batches, tol=tol)


def test_mlp_gradients() -> None:
    check_gradients(mlp(), pairs(), mse)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1),
    "adamw-amsgrad-maximize": lambda ps: torch.optim.AdamW(ps, lr=1e-2, amsgrad=True, maximize=True),
    "adam": lambda ps: torch.optim.Adam(ps, lr=1e-2, weight_decay=0.1),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=1e-2),
    "sgd-momentum": lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "sgd-nesterov": lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9, nesterov=True),
    "sgd-dampening": lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9, dampening=0.5),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=1e-2, momentum=0.5, centered=True),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=1e-2, initial_accumulator_value=0.1),
    "adadelta": lambda ps: torch.optim.Adadelta(ps),
    "adamax": lambda ps: torch.optim.Adamax(ps),
    "nadam": lambda ps: torch.optim.NAdam(ps),
    "radam": lambda ps: torch.optim.RAdam(ps),
    "rprop": lambda ps: torch.optim.Rprop(ps),
    "asgd": lambda ps: torch.optim.ASGD(ps),
    "adafactor": lambda ps: torch.optim.Adafactor(ps),
    "sgd-tensor-lr": lambda ps: torch.optim.SGD(ps, lr=torch.tensor(0.1, dtype=torch.float64)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_over_three_steps(name: str) -> None:
    check_training(mlp(), pairs(), OPTIMIZERS[name], mse, clip=0.1)


class Own(torch.optim.SGD):
    """Whose step may read what a group does not say."""


def test_a_rule_of_torchs_own_optimizers_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second program is the first one; whatever decides the rule, or may do so unseen, has it traced again; no optimizer is kept."""
    asked, trace = [], rules.trace_rule
    monkeypatch.setattr(rules, "_kept", {})
    monkeypatch.setattr(rules, "trace_rule", lambda *given: (asked.append(given[2]), trace(*given))[1])

    def programs(kind: Any = torch.optim.SGD, dtype: torch.dtype = torch.float64, width: int = 4, **options: Any) -> tuple[int, list[str]]:
        before, said = len(asked), []
        for _ in range(2):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, width)).to(dtype)
            optimizer = kind(model.parameters(), **{k: v for k, v in {"lr": 0.1, "momentum": 0.9, **options}.items() if v is not None})
            said.append(str(capture(model, pairs()[0][0].to(dtype), loss_fn=lambda m, x: m(x).square().mean(), optimizer=optimizer).program))
            kept = weakref.ref(optimizer)
            del optimizer, model
        gc.collect()
        assert kept() is None
        return len(asked) - before, said

    traced, (first, second) = programs()
    assert traced == 2 and first == second, "of two weights and two biases, which differ in their shapes alone"
    for options in ({"momentum": 0.8}, {"nesterov": True}, {"dtype": torch.float32}, {"weight_decay": 1}, {"maximize": True}):
        assert programs(**options)[0] == 2, options
    assert programs(width=7)[0] == 0 and programs(width=1)[0] == 2, "one output, and one bias: dimensions of one element are another matter"
    assert programs(kind=torch.optim.Adafactor, momentum=None)[0] == 4, "means over all elements: a trace a shape"
    for options in ({"kind": Own}, {"lr": torch.tensor(0.1, dtype=torch.float64)}):
        assert programs(**options)[0] == 8, options
    monkeypatch.setattr(rules, "_kept", {})
    monkeypatch.setattr(rules, "MOST_RULES", 1)
    assert programs()[0] == 8 and len(rules._kept) == 1, "the one that was asked for longest ago goes first"


def _all_of_torchs() -> list[str]:
    found = [name for name, kind in vars(torch.optim).items() if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer]
    return sorted(set(found) - {"LBFGS", "SparseAdam", "Muon"})  # a closure; sparse gradients; matrices only, and products of them


@pytest.mark.parametrize("name", _all_of_torchs())
@pytest.mark.turn
def test_a_pointwise_rule_says_the_same_of_another_shape(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of torch's optimizers: what is taken from another shape is what a trace of this one gives, to the letter."""
    optimizer = getattr(torch.optim, name)([nn.Parameter(torch.zeros(2, 3))])
    (group,) = optimizer.param_groups
    taken = 0
    for dtype, numbers in ((torch.float32, ()), (torch.bfloat16, (Number("weight_decay", None),))):
        for shapes in (((5,), (128,)), ((5, 6), (300, 4), (6, 5)), ((5, 1), (7, 1)), ((2, 3, 4), (9, 8, 7))):
            monkeypatch.setattr(rules, "_kept", {})
            for shape in shapes:
                with monkeypatch.context() as patch:
                    traced = list[tuple[int, ...]]()
                    patch.setattr(rules, "trace_rule", lambda *given, traced=traced, trace=rules.trace_rule: (traced.append(given[2]), trace(*given))[1])
                    rule = rules.rule_of(optimizer, group, shape, dtype, numbers)
                taken += not traced
                again = rules.trace_rule(optimizer, group, shape, dtype, numbers)
                assert (rule.slots, rule.numbers) == (again.slots, again.numbers)
                assert _said(rule, shape, dtype) == _said(again, shape, dtype)
    assert (taken == 0) == (name in ("ASGD", "Adafactor", "RAdam", "Rprop"))  # means, views and masks


@pytest.mark.parametrize(("step", "fine"), [(lambda p, g, row: p - g * g.abs(), True), (lambda p, g, row: p - row * g, False), (lambda p, g, row: p - g.sum(), False), (lambda p, g, row: p - g * g.shape[0], True),
                                            (lambda p, g, row: p - g.sum(0).abs().new_zeros(()), False), (lambda p, g, row: (p - g).half(), True)])  # fmt: skip
def test_what_is_pointwise(step: Any, fine: bool) -> None:
    """Nothing that has a third shape or comes of all elements. A number that was made of the shape is not seen: the optimizers that are taken so are torch's own, all of them tested above."""
    with FakeTensorMode() as mode:
        fakes = [torch.empty(3, 5), torch.empty(3, 5), torch.empty(1, 5)]
    flat = functional(make_fx(lambda *given: (step(*given),), tracing_mode="fake")(*fakes), fakes, mode)
    assert pointwise(flat, (3, 5)) is fine


def _said(rule: Any, shape: tuple[int, ...], dtype: torch.dtype) -> list[tuple[str, ...]]:
    """The ops of each way, as text."""
    said = []
    for way in (*rule.always, *(rule.first or ())):
        e = Emitter()
        types = [Type(DTYPES[dtype], shape)] * 2 + [Type("f64", ())] * len(rule.numbers) + [Type(DTYPES[rule.slots.dtype[s]], rule.slots.shape[s]) for s in rule.slots.fill]
        given = [e.input(t, "state", str(n)) for n, t in enumerate(types)] + [e.full(c.item(), Type(DTYPES[c.dtype], ())) for c in way.flat.constants]
        out = convert(way.flat.graph, given, way.flat.outputs, e)
        said.append((str(way.taken), str(out), *(str((op.name, op.target, op.args, op.types, op.kwargs)) for op in e.ops)))
    return said


def test_muon() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10, bias=False), nn.ReLU(), nn.Linear(10, 4, bias=False)).double()
    check_training(model, pairs(), lambda ps: torch.optim.Muon(ps, lr=1e-2), mse)


class Recurrent(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.core = getattr(nn, kind)(6, 5, 2, batch_first=True, dropout=0.2, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.core(x)[0]


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_recurrent_layers_unroll(kind: str) -> None:
    torch.manual_seed(0)
    model = Recurrent(kind).double()
    batches = [{"x": torch.randn(3, 4, 6, dtype=torch.float64)} for _ in range(2)]
    check_gradients(model, batches, lambda model, batch: model(batch["x"]).pow(2).mean())
    assert all(type(w) is nn.Parameter for w in model.core._flat_weights)


def test_autocast_to_bfloat16() -> None:
    def loss(model: Any, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return mse(model, batch)

    check_gradients(mlp().float(), [tuple(t.float() for t in b) for b in pairs()], loss, tol=1e-2)


def test_llama_adamw_clipped() -> None:
    c = check_training(llama(), padded(ids(40)), OPTIMIZERS["adamw"], clip=0.5, tol=1e-6)
    assert {"forward", "backward", "update"} == {op.phase for op in c.program.ops}
    assert len(c.program.origins) == len(c.parameters)
    assert all(op.path and op.line for op in c.program.ops if op.phase == "forward" and op.path.startswith("model"))


def test_float32_loss_is_bitwise_eager() -> None:
    for model, batches, fn in ((mlp().float(), [tuple(t.float() for t in b) for b in pairs()], mse), (llama().float(), padded(ids(40)), None)):
        run = Runner(capture(model, batches[0], loss_fn=fn))
        for batch in batches:
            got = run(batch)
            model.zero_grad()
            loss = loss_of(model, batch, fn)
            loss.backward()
            assert torch.equal(got["loss", "loss"], loss.detach())
            for key, p in model.named_parameters():
                close(got["grad", key], p.grad, tol=1e-5)  # type: ignore[arg-type]


def test_resumed_optimizer_state_is_the_start() -> None:
    for make in (OPTIMIZERS["adamw"], OPTIMIZERS["sgd-momentum"], OPTIMIZERS["sgd-dampening"]):
        model = mlp()
        opt = make(model.parameters())
        for batch in pairs():
            opt.zero_grad()
            mse(model, batch).backward()
            opt.step()
        run = Runner(capture(model, pairs()[0], loss_fn=mse, optimizer=opt))
        run(pairs()[1])
        opt.zero_grad()
        mse(model, pairs()[1]).backward()
        opt.step()
        for key, p in model.named_parameters():
            close(run.values["param", key], p.detach())


def test_parameter_groups_schedulers_and_unused_parameters() -> None:
    model = mlp()
    model.spare = nn.Linear(2, 2).double()  # type: ignore[assignment]
    model.down.bias.requires_grad_(False)  # type: ignore[union-attr]
    eager = copy.deepcopy(model)

    def make(m: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
        named = [(n, p) for n, p in m.named_parameters() if p.requires_grad]
        groups = [{"params": [p for n, p in named if "weight" in n], "weight_decay": 0.2}, {"params": [p for n, p in named if "bias" in n], "weight_decay": 0.0, "lr": 3e-2}]
        o = torch.optim.AdamW(groups, lr=1e-2)
        return o, torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3)

    (opt, schedule), (theirs, its) = make(model), make(eager)
    c = capture(model, pairs()[0], loss_fn=mse, optimizer=opt, grads=True)
    assert c.unused == ("spare.weight", "spare.bias") and set(c.hyper) == {"lr/0", "lr/1"} and c.options["weight_decay/0"] == 0.2
    run = Runner(c)
    for batch in pairs(3):
        got = run(batch)
        mse(eager, batch).backward()
        close(got["grad", "up.weight"], eager.up.weight.grad)  # type: ignore[union-attr, arg-type]
        theirs.step()
        theirs.zero_grad()
        opt._opt_called = True
        schedule.step()
        its.step()
    for key, p in eager.named_parameters():
        close(run.values["param", key], p.detach())


class Norms(nn.Module):
    """Batch norm's running statistics, convolution, embedding with padding, a frozen weight, a module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6, padding_idx=0)
        self.conv, self.bn = nn.Conv1d(6, 5, 3, padding=1), nn.BatchNorm1d(5)
        self.twice, self.drop = nn.Linear(5, 5), nn.Dropout(0.3)
        self.twice.bias.requires_grad_(False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.bn(self.conv(self.embed(x).transpose(1, 2))).transpose(1, 2)
        h = self.drop(self.twice(self.drop(torch.relu(self.twice(h)))))
        h[:, 0] = h[:, 1] * 2
        h = torch.cat([torch.stack(h.chunk(2, dim=1)[0].unbind(1), 1), h[..., 1:].roll(1, 1).repeat(1, 1, 2)[..., :5]], 1)
        return h.flatten(1).logsumexp(-1).mean()


def test_buffers_shared_calls_views_and_mutation() -> None:
    torch.manual_seed(0)
    batches = [{"x": torch.randint(0, 7, (3, 8), generator=torch.Generator().manual_seed(i))} for i in range(2)]
    c = check_gradients(Norms().double(), batches, lambda model, batch: model(batch["x"]))
    sites = [op.kw("site") for op in c.program.ops if op.target == "bernoulli"]
    assert sites == ["drop/0", "drop#2/0"]
    assert {"twice", "twice#2"} <= {op.path for op in c.program.ops}


class AtTwoPaths(nn.Module):
    """One module, with a parameter and a buffer that it writes as told, inside of two others."""

    def __init__(self, write: str) -> None:
        super().__init__()
        self.write, self.scale = write, nn.Parameter(torch.linspace(0.5, 1.5, 5))
        self.register_buffer("shift", torch.linspace(-1, 1, 5))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh((x + self.shift) * self.scale)
        if self.write == "in place":
            self.shift.mul_(0.9)
        elif self.write:
            self.shift = self.shift * 0.9
        return y


@pytest.mark.parametrize("write", ["", "in place", "another tensor"])
def test_a_module_at_two_paths(write: str) -> None:
    torch.manual_seed(0)
    both = AtTwoPaths(write)
    model = nn.Sequential(nn.Sequential(nn.Linear(5, 5), both), nn.Sequential(nn.Linear(5, 5), both)).double()
    batches = [{"x": torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(i))} for i in range(2)]
    loss = lambda model, batch: model(batch["x"]).pow(2).mean()  # noqa: E731
    c = check_gradients(model, batches, loss)
    assert {o.key for o in c.program.outputs if o.role == "buffer"} == ({"0.1.shift"} if write else set())
    assert type(both.shift) is Tensor and type(both.scale) is nn.Parameter, "a tensor of the trace was left on the model"


def test_a_module_at_two_paths_computed_in_another_dtype() -> None:
    both = nn.Linear(5, 5)
    model = nn.Sequential(nn.Sequential(both), nn.Tanh(), nn.Sequential(both))
    capture(model, {"input": torch.ones(3, 5)}, loss_fn=lambda model, batch: model(batch["input"]).pow(2).mean(), compute=torch.bfloat16)
    assert all(type(p) is nn.Parameter and p.dtype is torch.float32 for p in both.parameters())


def test_batch_norm_statistics_and_nothing_else_in_place() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.ReLU(inplace=True)).double()
    batches = [{"x": torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(i))} for i in range(2)]
    loss = lambda model, batch: model(batch["x"]).pow(2).mean()  # noqa: E731
    c = check_gradients(model, batches, loss)
    assert {o.key for o in c.program.outputs if o.role == "buffer"} == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    c = check_gradients(model.eval(), batches, loss)
    assert not any(o.role == "buffer" for o in c.program.outputs)


class Windows(nn.Module):
    """Overlapping windows, permuted and scattered strides."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 1, 24))

    def forward(self, x: Tensor) -> Tensor:
        h = (x * self.w).reshape(4, 6)
        windows = h.as_strided((3, 12), (6, 1)).tanh()
        turned = h.t().as_strided((3, 4, 2), (1, 6, 3)).exp()
        patch = torch.as_strided_scatter(h, x[:6].reshape(2, 3) * self.w[0], (2, 3), (12, 2), 1).cos()
        return windows.sum() + turned.pow(2).mean() + patch.pow(3).sum()


def test_strides_become_positions() -> None:
    batches = [{"x": torch.randn(24, dtype=torch.float64, generator=torch.Generator().manual_seed(i))} for i in range(2)]
    c = check_gradients(Windows().double(), batches, lambda model, batch: model(batch["x"]))
    assert not any("strided" in op.target for op in c.program.ops)


@pytest.mark.parametrize("make", [gpt2, llama], ids=["gpt2", "llama"])
def test_checkpointed_draws_repeat(make: Any) -> None:
    model = make()
    model.gradient_checkpointing_enable()
    model.train()
    c = check_gradients(model, ids(40), tol=1e-6)
    sites = [op.kw("site") for op in c.program.ops if op.target == "bernoulli"]
    assert len(set(sites)) < len(sites) if sites else make is llama


def test_functional_transforms_in_the_loss() -> None:
    def loss(model: Any, batch: Any) -> Tensor:
        x, _ = batch
        slope = torch.func.vmap(torch.func.grad(lambda row: model(row[None]).sum()))(x)  # type: ignore[attr-defined]
        return mse(model, batch) + 0.1 * slope.pow(2).mean()

    check_gradients(mlp(), pairs(), loss)


def test_exported_program_as_a_model() -> None:
    model = mlp()
    exported = torch.export.export(model, (pairs()[0][0],))
    module = exported.module()
    run = Runner(capture(module, pairs()[0], loss_fn=mse))
    assert set(run.c.parameters) == {n for n, _ in model.named_parameters()}
    got = run(pairs()[1])
    loss = mse(model, pairs()[1])
    loss.backward()
    close(got["loss", "loss"], loss.detach())
    for key, p in model.named_parameters():
        close(got["grad", key], p.grad)  # type: ignore[arg-type]


def test_forward_gives_the_output_in_its_own_form() -> None:
    model = llama().eval()
    batch = {"input_ids": ids(40)[0]["input_ids"], "output_hidden_states": True}
    run = Runner(capture(model, batch, want="forward"))
    out = run.c.rebuild_output({key: t for (role, key), t in run(batch).items() if role == "output"})
    with torch.no_grad():
        want = model(**batch, use_cache=False)
    assert type(out) is type(want) and len(out.hidden_states) == 3
    close(out.logits, want.logits)
    assert model.config.use_cache is True


def test_meta_device_gives_the_same_program() -> None:
    real, batch = llama(), ids(40)[0]
    with torch.device("meta"):
        meta = type(real)(real.config).double()
    make = OPTIMIZERS["adamw"]
    there = capture(meta, {k: v.to("meta") for k, v in batch.items()}, optimizer=make(meta.parameters()), clip_grad_norm=1.0)
    here = capture(real, batch, optimizer=make(real.parameters()), clip_grad_norm=1.0)
    assert str(there.program) == str(here.program)


def test_widened_reference_is_float64_throughout() -> None:
    model, batch = llama(), ids(40)[0]
    with eager_reference(model, widen=True):
        loss = model(**batch).loss
    assert loss.dtype is torch.float64
    assert abs(float(loss - model(**batch).loss)) < 1e-6
    assert torch.get_default_dtype() is torch.float32
