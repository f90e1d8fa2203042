"""The engine: its counts and boundaries, each way through a loop, checkpoints, and what it refuses; alone and on ranks."""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo.engine import (
    WARMUP,
    Eager,
    Net,
    apart,
    batches_of_its_own,
    begin,
    config,
    everything,
    of,
    offloaded,
    on_ranks,
    passes,
    resumed,
    rows,
    same,
)
from gloo.launch import ranks
from torch import nn
from torch.nn import functional as F

import deepseed
from deepseed.build import CompileError
from deepseed.config import ConfigError
from deepseed.config.model import CODEGEN
from deepseed.kernels import BACK_ENDS, PYTHON
from deepseed.runtime.distributed import stop
from deepseed.runtime.folder import CheckpointError

wide = pytest.mark.wide
THIN = {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    yield
    if dist.is_initialized():
        stop()


# the loop ---------------------------------------------------------------------------------------------------------------


def test_counts_and_boundaries() -> None:
    parts, model = rows(6), Net()
    theirs = Eager(copy.deepcopy(model), accumulation=3, schedule=True)
    want = theirs.passes(parts)
    engine, optimizer, loader, scheduler = deepseed.initialize(model=model, config=config(1, 3, scheduler=WARMUP))
    assert engine.get_global_grad_norm() is None and not engine.was_step_applied() and loader is None
    assert (engine.optimizer, engine.lr_scheduler) == (optimizer, scheduler) and isinstance(optimizer, torch.optim.AdamW)
    losses, boundaries, counts = [], [], []
    for part in parts:
        loss = of(engine, part[0])
        returned = engine.backward(loss)
        assert float(returned) == pytest.approx(float(loss.detach()) / 3, abs=1e-15) and not returned.requires_grad
        boundaries.append(engine.is_gradient_accumulation_boundary())
        assert engine.get_lr() == [theirs.rates[engine.global_steps]]
        engine.step()
        losses.append(float(loss.detach()))
        counts.append((engine.micro_steps, engine.global_steps, engine.global_samples))
    assert boundaries == [False, False, True] * 2
    assert counts == [(1, 0, 0), (2, 0, 0), (3, 1, 12), (4, 1, 12), (5, 1, 12), (6, 2, 24)]
    assert max(abs(a - b) for a, b in zip(losses, want, strict=True)) <= 1e-12 and apart(engine, theirs.model) <= 1e-12
    assert abs((engine.get_global_grad_norm() or 0.0) - theirs.norms[-1]) <= 1e-12 and engine.was_step_applied() and engine.skipped_steps == 0
    assert engine.gradient_clipping() == 0.2 and engine.zero_optimization() and engine.zero_optimization_stage() == 1


def test_codegen_from_the_config() -> None:
    assert [PYTHON, *BACK_ENDS, "auto"] == list(CODEGEN)
    parts, model = rows(2), Net()
    theirs, other = begin(config(), copy.deepcopy(model)), begin(config(compile={"deepcompile": True, "backend": "inductor"}), model)
    for part in parts:
        losses = []
        for engine in (theirs, other):
            losses.append(of(engine, part[0]))
            engine.backward(losses[-1])
            engine.step()
        assert abs(float(losses[0].detach()) - float(losses[1].detach())) <= 1e-12
    mine, want = dict(other.module.named_parameters()), dict(theirs.module.named_parameters())
    distance = {name: float((mine[name] - want[name]).detach().abs().max()) for name in want}
    assert distance.pop("up.bias") <= 1e-9  # before a norm its gradient is zero: noise of 1e-16 over AdamW's eps of 1e-8, times lr
    assert max(distance.values()) <= 1e-15
    held = [b for _, b in other.compiled.programs.cache._held.values()]
    assert theirs.compiled.programs.subject.codegen == PYTHON and any("kernel_" in e.source for b in held for e in b.executables)


def test_a_boundary_that_the_user_says() -> None:
    parts, model = rows(3), Net()
    theirs = Eager(copy.deepcopy(model), accumulation=3)
    theirs.passes(parts)
    engine = begin(config(accumulation=7), model)
    for n, part in enumerate(parts):
        engine.set_gradient_accumulation_boundary(n == 2)
        engine.backward(of(engine, part[0]) / 3, scale_wrt_gas=False)
        engine.step()
    assert apart(engine, theirs.model) <= 1e-12 and engine.global_steps == 1
    engine.set_gradient_accumulation_boundary(None)
    assert not engine.is_gradient_accumulation_boundary() and engine.micro_steps == 3


def test_scale_and_a_plain_backward() -> None:
    model = Net().float()
    engines = [begin(config(accumulation=2, fp16={"enabled": True, "initial_scale_power": 6}), copy.deepcopy(model)) for _ in range(2)]
    for part in rows(4):
        for engine, plain in zip(engines, (False, True), strict=True):
            loss = of(engine, part[0])
            _ = engine.scale(loss).backward() if plain else engine.backward(loss)
            engine.step()
    same(*map(everything, engines))
    assert engines[1].global_steps == 2


def test_the_optimizers_own_step_is_refused() -> None:
    engine, optimizer, _, _ = deepseed.initialize(model=Net(), config=config())
    later = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    engine.backward(of(engine, rows(1)[0][0]))
    with pytest.raises(CompileError, match=r"AdamW.step\(\): the engine updates the parameters\n  fix: engine.step\(\)"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.step()
        later.step()
    assert engine.was_step_applied()


class Pixels(nn.Module):
    """A convolution with a norm over it."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.up, self.norm, self.down = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), norm, nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(torch.tanh(self.first(x.reshape(-1, 1, 1, 8).expand(-1, 1, 6, 8))))
        out: torch.Tensor = self.down(self.norm(h).flatten(2).repeat(1, 1, 2))
        return out.mean(1)


@pytest.mark.parametrize("frozen", [("up", "first"), ("first", "up", "norm.bias"), ("first", "up", "norm.weight"), ("first.weight", "up.weight")], ids=" ".join)
@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.RMSNorm(4), nn.GroupNorm(2, 4), nn.BatchNorm2d(4)], ids=lambda n: type(n).__name__)
def test_kernels_whose_gradients_are_not_all_asked_for(norm: nn.Module, frozen: tuple[str, ...]) -> None:
    """What is below a norm is frozen, or weights are and biases are not."""
    model = Pixels(copy.deepcopy(norm))
    if isinstance(norm, nn.BatchNorm2d | nn.LayerNorm):
        frozen += ("up.bias",)  # its gradient is zero but for rounding
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    theirs, parts = Eager(copy.deepcopy(model)), [[(x.float(), y.float()) for x, y in part] for part in rows(3, size=64)]  # small programs are checked as they are
    engine = begin(config(3), model)
    want = theirs.passes(parts)
    assert max(abs(a - b) for a, b in zip(passes(engine, parts), want, strict=True)) <= 1e-5 and apart(engine, theirs.model) <= 1e-5


def test_zero_grad_forgets_what_waits() -> None:
    parts, model = rows(2), Net()
    engine, other = begin(config(), copy.deepcopy(model)), begin(config(), model)
    engine.backward(of(engine, parts[0][0]))
    engine.zero_grad()
    with pytest.raises(CompileError, match="an update without gradients"):
        engine.step()
    of(other, parts[0][0])  # a forward alone: the norms have seen as many batches
    passes(engine, parts[1:])
    passes(other, parts[1:])
    assert max(float((p - q).detach().abs().max()) for p, q in zip(engine.module.parameters(), other.module.parameters(), strict=True)) == 0.0


def test_whole_steps_are_the_loop() -> None:
    parts, model = rows(4), Net()
    engine, other = (begin(config(accumulation=2), copy.deepcopy(model), loss_fn=of) for _ in range(2))
    losses = passes(other, parts)
    feed = iter([part[0] for part in parts])
    got = [float(engine.train_batch(feed)) for _ in range(2)]
    assert max(abs(a - (losses[n] + losses[n + 1]) / 2) for n, a in zip((0, 2), got, strict=True)) <= 1e-15
    same(everything(engine), everything(other))
    before = everything(engine)
    mean = float(engine.eval_batch(iter([part[0] for part in parts])))
    other.eval()
    with torch.no_grad():
        assert abs(mean - sum(float(of(other, part[0])) for part in parts[:2]) / 2) <= 1e-15
    same(before, everything(engine))
    assert engine.module.training, "as it was"


def test_its_own_data() -> None:
    batches_of_its_own(0)
    engine = begin(config())
    with pytest.raises(CompileError, match="had no training_data\n  fix: train_batch"):
        engine.train_batch()


def test_a_model_that_gives_no_loss() -> None:
    with pytest.raises(CompileError, match=r"Linear gave no loss\n  fix: initialize\(loss_fn="):
        begin(config(**THIN), nn.Linear(8, 4).double()).train_batch(iter([(torch.ones(4, 8).double(),)]))


def test_the_loss_alone() -> None:
    """Of a step, in the model's modes; nothing is written, and the step that follows is the one that would have followed."""
    batch = tuple(torch.randn(8, n, generator=torch.Generator().manual_seed(n)).double() for n in (8, 4))
    for plan in ("zero0", "zero3+dp2", "zero1+pp2+mb2"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)).double()
        alone = copy.deepcopy(model)
        first, second = (deepseed.compile(m, plan, optimizer=torch.optim.SGD(m.parameters(), lr=0.1), loss_fn=lambda m, b: F.mse_loss(m(b[0]), b[1]), backend="simulate") for m in (model, alone))
        for _ in range(2):
            model.eval()
            with torch.no_grad():
                want = F.mse_loss(copy.deepcopy(model)(batch[0]), batch[1])
            assert abs(float(first.loss(batch)) - float(want)) <= 1e-14, plan
            model.train()
            assert float(first.loss(batch)) == float(first(batch)) == float(second(batch)), plan
        assert max(float((a - b).abs().max()) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)) == 0.0


def test_more_rows_a_step() -> None:
    engine = begin(config(accumulation=2))
    engine.set_train_batch_size(12)
    assert (engine.gradient_accumulation_steps(), engine.train_batch_size(), engine.train_micro_batch_size_per_gpu()) == (3, 12, 4)
    for wrong in (0, 10):
        with pytest.raises(CompileError, match=f"train_batch_size={wrong} is no multiple of 4 rows x 1 ranks = 4\n  fix: "):
            engine.set_train_batch_size(wrong)
    model = Net()
    theirs = Eager(copy.deepcopy(model), accumulation=2)
    changed = begin(config(), model)
    changed.set_train_batch_size(8)
    passes(changed, rows(2))
    theirs.passes(rows(2))
    assert apart(changed, theirs.model) <= 1e-12


def test_modes_and_the_module() -> None:
    model = Net()
    engine = begin(config(), model)
    assert engine.module is model and engine.up is model.up and engine.training
    assert [n for n, _ in engine.named_parameters()] == [n for n, _ in model.named_parameters()]
    with pytest.raises(AttributeError, match="nothing"):
        _ = engine.nothing
    x = rows(1)[0][0][0]
    assert engine.eval() is engine and not engine.module.training
    with torch.no_grad():
        assert (engine(x) - copy.deepcopy(model)(x)).abs().max() <= 1e-14
    assert engine.train().training
    passes(engine, rows(2))
    assert engine.module.norm.num_batches_tracked == 2
    engine.compile()
    engine.destroy()


def test_an_output_that_is_used_together_with_the_models_own_loss() -> None:
    model = Net()
    theirs, engine = copy.deepcopy(model), begin(config(), model)
    (x, y) = rows(1)[0][0]
    for m in (engine, theirs):
        loss, out = m(x, y=y)
        total = loss + 0.1 * out.square().mean()
        _ = m.backward(total) if m is engine else total.backward()
    for name, p in theirs.named_parameters():
        got = engine.compiled.gradient(name)
        assert (got is None) == (p.grad is None) and (got is None or (got - p.grad).abs().max() <= 1e-14), name
    assert "unused" not in engine.compiled.pending and "frozen" not in engine.compiled.pending
    before = engine.module.unused.detach().clone()
    engine.step()
    assert torch.equal(engine.module.unused, before)


def test_two_engines_against_each_other() -> None:
    """A generator, and a discriminator through which its gradient goes; a teacher without an optimizer."""
    made = [nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, n)).double() for n in (3, 1)]
    twins = copy.deepcopy(made)
    g, d = (begin(config(**THIN, gradient_clipping=None), m) for m in made)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in twins]
    for seed in range(3):
        z, real = (torch.randn(4, 3, generator=torch.Generator().manual_seed(10 * seed + n)).double() for n in range(2))
        for one, two, mine in ((g, d, True), (*twins, False)):
            fake = one(z)
            loss = F.softplus(-two(real)).mean() + F.softplus(two(fake.detach())).mean()
            if mine:
                d.backward(loss)
                d.step()
            else:
                loss.backward()
                nn.utils.clip_grad_norm_(two.parameters(), 1.0)
                optimizers[1].step()
                optimizers[1].zero_grad()
            loss = F.softplus(-two(fake)).mean()
            if mine:
                g.backward(loss)
                g.step()
                d.zero_grad()
            else:
                loss.backward()
                nn.utils.clip_grad_norm_(one.parameters(), 1.0)
                optimizers[0].step()
                for o in optimizers:
                    o.zero_grad()
    for engine, twin in zip((g, d), twins, strict=True):
        assert max(float((engine.module_state_dict()[n] - t).abs().max()) for n, t in twin.state_dict().items()) <= 1e-12


def test_a_teacher_without_an_optimizer() -> None:
    model, teacher = Net(), Net(3)
    theirs = Eager(copy.deepcopy(model))
    engine, fixed = begin(config(), model), begin(config(optimizer=None), teacher)
    x = rows(1)[0][0][0]
    with torch.no_grad():
        y = fixed.eval()(x)
        assert (y - copy.deepcopy(teacher)(x)).abs().max() <= 1e-14
    passes(engine, [[(x, y)]])
    theirs.passes([[(x, y)]])
    assert apart(engine, theirs.model) <= 1e-12 and fixed.get_lr() == [] and fixed.skipped_steps == 0
    with pytest.raises(CompileError, match="without an optimizer\n  fix: "):
        fixed.step()


# what it is begun with --------------------------------------------------------------------------------------------------


def test_ways_to_give_a_config_and_an_optimizer(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(config()))
    args = deepseed.add_config_arguments(argparse.ArgumentParser()).parse_args(["--deepspeed", "--deepspeed_config", str(file)])
    assert args.deepspeed
    by_args = deepseed.initialize(args=args, model=Net())[0]
    by_both = deepseed.initialize(args=args, model=Net(), config=str(file))[0]
    by_params = deepseed.initialize(model=Net(), config_params=config())[0]
    for engine in (by_args, by_both, by_params):
        passes(engine, rows(1))
    same(everything(by_args), everything(by_params))
    assert by_args.config["train_micro_batch_size_per_gpu"] == 4
    model = Net()
    of_some = deepseed.initialize(model=model, model_parameters=model.up.parameters(), config=config())[0]
    before = {n: t.clone() for n, t in model.state_dict().items()}
    passes(of_some, rows(1))
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"up.weight", "up.bias"}
    made = deepseed.initialize(model=model, optimizer=lambda p: torch.optim.SGD(p, lr=0.5), lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.1), config=config(optimizer=None))
    assert isinstance(made[1], torch.optim.SGD) and made[0].get_lr() == [0.5]
    passes(made[0], rows(1))
    assert made[0].get_lr() == [0.05]


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"config": None}, ConfigError, "initialize without a config\n  fix: config=, or --deepspeed_config"),
        ({"model": 3}, ConfigError, r"initialize\(model=int\)\n  fix: an nn.Module"),
        ({"model": nn.DataParallel(Net())}, ConfigError, r"initialize\(model=DataParallel\): (.|\n)*fix: the model inside of it"),
        ({"mpu": object()}, ConfigError, "autotp_size"),
        ({"args": SimpleNamespace(deepspeed_config="other.json")}, ConfigError, "two configs: (.|\n)*other.json\n  fix: one of"),
        ({"optimizer": 3}, ConfigError, r"initialize\(optimizer=int\)\n  fix: "),
        ({"config": config(train_batch_size=7)}, ConfigError, r"train_batch_size is not equal to micro_batch_per_gpu \* gradient_acc_step \* world_size 7 != 4 \* 1 \* 1"),
        ({"config": config(tensor_parallel={"autotp_size": 2})}, ConfigError, "tp2 = 2 does not divide 1 ranks\n  fix: start a multiple of 2 ranks"),
        ({"config": config(sequence_parallel_size=3, tensor_parallel={"autotp_size": 2})}, ConfigError, "sp3 x tp2 = 6 does not divide 1 ranks"),
    ],
)
def test_what_it_refuses_to_begin_with(options: dict[str, Any], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        deepseed.initialize(**{"model": Net(), "config": config(), **options})


def test_a_placeholder_for_the_configs_optimizer() -> None:
    """As Accelerate's DummyOptim."""
    model = Net()
    engine = begin(config(), model, optimizer=SimpleNamespace(params=model.up.parameters(), lr=3.0, weight_decay=0.0))
    assert isinstance(engine.optimizer, torch.optim.AdamW) and engine.get_lr() == [0.01] and len(engine.optimizer.param_groups[0]["params"]) == 2
    with pytest.raises(ConfigError, match="placeholder, and the config has no optimizer\n  fix: "):
        begin(config(optimizer=None), model, optimizer=SimpleNamespace(params=[]))


def test_losses_that_have_no_gradient() -> None:
    engine = begin(config())
    x, y = rows(1)[0][0]
    with torch.no_grad():
        loss = F.mse_loss(engine(x), y)
    for wrong, said in ((loss, r"\[\], which requires no grad"), (engine(x), r"the loss is \[4, 4\]"), (3.0, "the loss is a float")):
        with pytest.raises(CompileError, match=said + r"\n  fix: one float"):
            engine.backward(wrong)


# checkpoints ------------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    resumed(0, tmp_path)


def test_a_step_that_was_begun_when_it_was_saved_begins_anew(tmp_path: Path) -> None:
    engine, other = begin(config(accumulation=2)), begin(config(accumulation=2))
    passes(engine, rows(3))
    engine.save_checkpoint(tmp_path)
    fresh = begin(config(accumulation=2), Net(1))
    fresh.load_checkpoint(tmp_path)
    assert fresh.micro_steps == 2 and fresh.global_steps == 1
    for each in (fresh, other):
        passes(each, rows(2) * (each is other) + rows(2, seed=9))
    assert max(float((p - q).detach().abs().max()) for p, q in zip(fresh.module.parameters(), other.module.parameters(), strict=True)) == 0.0


def test_tags_and_the_latest_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = begin(config())
    assert engine.load_checkpoint(tmp_path) == (None, None)
    assert f"{tmp_path / 'latest'} does not exist" in capsys.readouterr().err
    passes(engine, rows(1))
    first = everything(engine)
    assert engine.save_checkpoint(tmp_path, client_state={"n": 1})
    passes(engine, rows(1, seed=2))
    engine.save_checkpoint(tmp_path, tag="mine")
    passes(engine, rows(1, seed=3))
    engine.save_checkpoint(tmp_path, tag="hidden", save_latest=False)
    assert (tmp_path / "latest").read_text() == "mine" and sorted(f.name for f in tmp_path.iterdir()) == [".lock", "global_step1", "hidden", "latest", "mine"]
    other = begin(config(), Net(1))
    assert other.load_checkpoint(tmp_path, tag="global_step1") == (str(tmp_path / "global_step1"), {"n": 1}) and other.global_steps == 1
    passes(other, rows(1, seed=2))
    assert other.load_checkpoint(tmp_path)[0] == str(tmp_path / "mine") and other.global_steps == 2
    same(everything(other), everything(other))
    weights = begin(config(scheduler=WARMUP), Net(1))
    assert weights.load_checkpoint(tmp_path, tag="global_step1", load_module_only=True)[0] and weights.global_steps == 0
    assert all(torch.equal(t, first[n]) for n, t in weights.module_state_dict().items())
    passes(weights, rows(1))
    assert weights.compiled.optimizer_state()["step/up.weight"] == 1
    with pytest.raises(CheckpointError, match="nowhere"):
        engine.load_checkpoint(tmp_path, tag="nowhere")
    for wrong in ({"load_module_strict": False}, {"custom_load_fn": print}):
        with pytest.raises(CheckpointError, match="a checkpoint is loaded whole\n  fix: "):
            engine.load_checkpoint(tmp_path, **wrong)
    with pytest.raises(CheckpointError, match=r"extra=dict cannot be saved(.|\n)*fix: "):
        engine.save_checkpoint(tmp_path, tag="code", client_state={"f": print})
    assert (tmp_path / "latest").read_text() == "mine"


def test_what_is_frozen_and_tied_may_stay_out(tmp_path: Path) -> None:
    """As of an adapter over a model whose output reads its embedding."""

    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.head = nn.Linear(4, 4, bias=False).double().requires_grad_(False), nn.Linear(4, 4, bias=False)
            self.head.weight = self.base.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            out: torch.Tensor = self.head(torch.tanh(self.base(super().forward(x))))
            return out

    engine, other = begin(config(), Tied()), begin(config(), Tied())
    passes(engine, rows(2))
    engine.save_checkpoint(tmp_path, exclude_frozen_parameters=True)
    other.load_checkpoint(tmp_path)
    assert passes(other, rows(2, seed=2)) == passes(engine, rows(2, seed=2)) and apart(engine, other) == 0.0


def test_what_is_frozen_may_stay_out(tmp_path: Path) -> None:
    engine = begin(config())
    passes(engine, rows(1))
    engine.save_checkpoint(tmp_path, exclude_frozen_parameters=True)
    tensors = json.loads((tmp_path / "global_step1" / "manifest.json").read_text())["tensors"]
    assert "model.up.weight" in tensors and "model.frozen" not in tensors
    other = begin(config(), Net(1))
    frozen = other.module.frozen.detach().clone()
    other.load_checkpoint(tmp_path)
    assert torch.equal(other.module_state_dict()["frozen"], frozen) and torch.equal(other.module_state_dict()["up.weight"], engine.module_state_dict()["up.weight"])
    engine.save_16bit_model(tmp_path / "plain", exclude_frozen_parameters=True)
    assert "frozen" not in torch.load(tmp_path / "plain" / "pytorch_model.bin")


def test_sixteen_bits(tmp_path: Path) -> None:
    engine = begin(config(bf16={"enabled": True}), Net().float())
    passes(engine, rows(1))
    assert engine.save_16bit_model(tmp_path, "weights.bin")
    found = torch.load(tmp_path / "weights.bin")
    assert all(torch.equal(found[n], t.bfloat16() if t.is_floating_point() else t) for n, t in engine.module_state_dict().items()) and found["up.weight"].dtype == torch.bfloat16


# ranks ------------------------------------------------------------------------------------------------------------------


@pytest.mark.turn
def test_on_two_ranks(tmp_path: Path) -> None:
    cases: list[tuple[str, tuple[Any, ...]]] = [
        ("trains_as_ddp", (2,)), ("trains_as_ddp", (3,)), ("statistics_of_the_first_rank", (2,)), ("an_overflow_on_one_rank", (1,)), ("in_bf16", (3,)), ("offloaded", (2,)),
        ("resumed", (3, tmp_path / "resumed")), ("batches_of_its_own", (1,)), ("same_rows", (3,)), ("whole_steps", ({"pipeline": {"stages": 2}},)),
        ("tensors_are_split", (1,)), ("sequences_are_split", (3,)), ("saved_for", (tmp_path / "three",)),
    ]  # fmt: skip
    after = [found[-1] for found in ranks(2, on_ranks, cases)]
    alone = begin(config(1, micro=8), Net(1))
    assert alone.load_checkpoint(tmp_path / "three")[0] == str(tmp_path / "three" / "two")
    losses = []
    for part in rows(2, world=2, seed=7):
        out = [alone(x) for x, _ in part]
        each = [F.mse_loss(o, y) for o, (_, y) in zip(out, part, strict=True)]
        alone.backward(torch.stack(each).mean())
        alone.step()
        losses.append([float(e.detach()) for e in each])
    assert max(abs(losses[n][r] - after[r][n]) for n in range(2) for r in range(2)) <= 1e-12
    found = torch.load(tmp_path / "three" / "plain" / "pytorch_model.bin")
    Net().load_state_dict(found)


@wide
def test_on_ranks_of_two_axes(tmp_path: Path) -> None:
    ranks(4, on_ranks, [("whole_steps", ({"pipeline": {"stages": 2}, "tensor_parallel": {"autotp_size": 2}},)), ("tensors_are_split", (2,)), ("sequences_are_split", (3,))])
    ranks(2, on_ranks, [(name, (stage,)) for name in ("trains_as_ddp", "statistics_of_the_first_rank", "an_overflow_on_one_rank", "batches_of_its_own") for stage in range(4)] + [("offloaded", (stage,)) for stage in (1, 3)])


def test_offloaded_alone() -> None:
    offloaded(1)
