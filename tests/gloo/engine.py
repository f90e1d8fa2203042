"""``deepseed.initialize`` beside eager PyTorch on every rank's rows; in one process and on each rank of several."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import deepseed
from deepseed.build import CompileError
from deepseed.engine import Engine
from deepseed.lr_schedules import WarmupLR

ADAMW = {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1, "torch_adam": True}}
WARMUP = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 4, "warmup_type": "linear"}}
RANK, WORLD = 0, 1  # of this process
Row = tuple[Tensor, Tensor]


class Net(nn.Module):
    """A parameter that is frozen, one that no loss reaches, a buffer that each forward changes."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.norm, self.down = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)
        self.frozen, self.unused = nn.Parameter(torch.randn(16), requires_grad=False), nn.Parameter(torch.ones(3))
        self.double()

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        out = self.down(torch.tanh(self.norm(self.up(x)) + self.frozen))
        return out if y is None else (F.mse_loss(out.to(y.dtype), y), out)


def config(stage: int = 0, accumulation: int = 1, micro: int = 4, **more: Any) -> dict[str, Any]:
    base = {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": accumulation, "optimizer": ADAMW, "zero_optimization": {"stage": stage}, "gradient_clipping": 0.2}
    return {key: value for key, value in {**base, **more}.items() if value is not None}


def begin(found: dict[str, Any], model: nn.Module | None = None, **options: Any) -> Engine:
    return deepseed.initialize(model=Net() if model is None else model, config=found, **options)[0]


def rows(count: int, world: int = 0, size: int = 4, seed: int = 1) -> list[list[Row]]:
    """``count`` microbatches, each by rank."""
    g = torch.Generator().manual_seed(seed)
    return [[(torch.randn(size, 8, generator=g).double(), torch.randn(size, 4, generator=g).double()) for _ in range(world or WORLD)] for _ in range(count)]


def of(model: Any, row: Row) -> Tensor:
    loss: Tensor = F.mse_loss(model(row[0]), row[1].to(next(iter(model.parameters())).dtype))
    return loss


def passes(engine: Any, parts: list[list[Row]], rank: int | None = None) -> list[float]:
    """The user's loop; losses."""
    out = []
    for part in parts:
        loss = of(engine, part[RANK if rank is None else rank])
        engine.backward(loss)
        engine.step()
        out.append(float(loss.detach()))
    return out


class Eager:
    """What DistributedDataParallel and a loop by hand give: the rows of all ranks, one after another."""

    def __init__(self, model: nn.Module, accumulation: int = 1, clip: float = 0.2, schedule: bool = False) -> None:
        self.model, self.accumulation, self.clip = model, accumulation, clip
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
        self.schedule = WarmupLR(self.optimizer, warmup_max_lr=1e-2, warmup_num_steps=4, warmup_type="linear") if schedule else None
        self.norms: list[float] = []
        self.rates: list[float] = []

    def passes(self, parts: list[list[Row]], rank: int | None = None) -> list[float]:
        losses = []
        for n, part in enumerate(parts):
            buffers = {n: b.clone() for n, b in self.model.named_buffers()}
            for r, row in reversed(list(enumerate(part))):
                for name, b in self.model.named_buffers():  # each rank begins with the first one's, which are what stays
                    b.copy_(buffers[name])
                loss = of(self.model, row)
                (loss / self.accumulation / len(part)).backward()
                losses += [float(loss.detach())] if r == (RANK if rank is None else rank) else []
            if (n + 1) % self.accumulation == 0:
                self.norms.append(float(nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)))
                self.rates.append(self.optimizer.param_groups[0]["lr"])
                self.optimizer.step()
                self.optimizer.zero_grad()
                if self.schedule is not None:
                    self.schedule.step()
        return losses


def apart(a: Any, b: Any) -> float:
    """Of two modules' or engines' parameters the largest difference; every rank must ask."""
    x, y = ({n: t.detach() for n, t in (m.module_state_dict() if isinstance(m, Engine) else m.state_dict()).items()} for m in (a, b))
    assert x.keys() == y.keys()
    return max(float((x[n].double() - y[n].double()).abs().max()) for n in x)


def everything(engine: Engine) -> dict[str, Tensor]:
    """Parameters, buffers and the optimizer's state, whole; every rank must ask."""
    return {n: t.detach().clone() for n, t in {**engine.module_state_dict(), **engine.compiled.optimizer_state()}.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [n for n in a if not torch.equal(a[n], b[n])]
    assert not different, different


def raises(text: str, do: Callable[[], Any], kind: type[Exception] = CompileError) -> None:
    try:
        do()
    except kind as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"nothing was said of {text!r}")


# on ranks ---------------------------------------------------------------------------------------------------------------


def trains_as_ddp(stage: int) -> None:
    parts = rows(6)
    model = Net()
    theirs = Eager(copy.deepcopy(model), accumulation=2, schedule=True)
    want = theirs.passes(parts)
    engine = begin(config(stage, 2, scheduler=WARMUP), model)
    assert (engine.train_batch_size(), engine.dp_world_size, engine.dp_rank, engine.global_rank, engine.world_size) == (4 * 2 * WORLD, WORLD, RANK, RANK, WORLD)
    losses, norms = [], []
    for n in range(0, 6, 2):
        with engine.no_sync():
            losses += passes(engine, parts[n : n + 1])
        losses += passes(engine, parts[n + 1 : n + 2])
        norms.append(engine.get_global_grad_norm() or 0.0)
    assert max(abs(a - b) for a, b in zip([*losses, *norms], [*want, *theirs.norms], strict=True)) <= 1e-12
    assert apart(engine, theirs.model) <= 1e-12
    assert (engine.micro_steps, engine.global_steps, engine.global_samples) == (6, 3, 3 * 8 * WORLD)


def along_other_axes(stage: int, **axes: Any) -> None:
    """Ranks of one data-parallel group give the same rows; a sequence is given whole, and cut by the plan."""
    model = Sequence()
    theirs = Eager(copy.deepcopy(model), accumulation=2)
    engine = begin(config(stage, 2, **axes), model)
    g = torch.Generator().manual_seed(1)
    parts = [[(torch.randn(4, 6, 8, generator=g).double(), torch.randn(4, 6, 8, generator=g).double()) for _ in range(engine.dp_world_size)] for _ in range(4)]
    assert engine.dp_world_size == WORLD // 2 and engine.train_batch_size() == 8 * engine.dp_world_size
    got, want = passes(engine, parts, engine.dp_rank), theirs.passes(parts, engine.dp_rank)
    assert max(abs(a - b) for a, b in zip(got, want, strict=True)) <= 1e-12 and apart(engine, theirs.model) <= 1e-12
    assert abs((engine.get_global_grad_norm() or 0.0) - theirs.norms[-1]) <= 1e-12


def tensors_are_split(stage: int) -> None:
    along_other_axes(stage, tensor_parallel={"autotp_size": 2})


def sequences_are_split(stage: int) -> None:
    along_other_axes(stage, sequence_parallel_size=2)


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.proj, self.norm = nn.Linear(8, 24), nn.Linear(8, 8), nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(F.gelu(self.up(x)))
        return out


def statistics_of_the_first_rank(stage: int) -> None:
    """As under DDP: a batch norm's in an evaluation, and in what is saved, are those of the first rank; in training each goes on with its own."""
    model, parts = Net(), rows(3)
    theirs = Eager(copy.deepcopy(model))
    engine = begin(config(stage), model)
    for n in range(3):
        engine.train()
        theirs.model.train()
        passes(engine, parts[n : n + 1])
        theirs.passes(parts[n : n + 1])
        engine.eval()
        theirs.model.eval()
        with torch.no_grad():
            assert (engine(parts[0][RANK][0]) - theirs.model(parts[0][RANK][0])).abs().max() <= 1e-12
    assert apart(engine, theirs.model) <= 1e-12
    engine.train()
    passes(engine, parts[:1])
    theirs.model.train()
    theirs.passes(parts[:1])
    assert apart(engine, theirs.model) <= 1e-12, "whole tensors are looked at"


def an_overflow_on_one_rank(stage: int) -> None:
    """Step 2 is not finite on the last rank: nobody updates, the scale halves, the schedule waits."""
    engine = begin(config(stage, scheduler=WARMUP, fp16={"enabled": True, "initial_scale_power": 8, "hysteresis": 1, "loss_scale_window": 100}), Net().float())
    assert engine.fp16_enabled() and engine.cur_scale == 256
    seen = []
    for n, part in enumerate(rows(4)):
        loss = of(engine, part[RANK]) * (float("inf") if n == 1 and RANK == WORLD - 1 else 1.0)
        engine.backward(loss)
        before, rates = everything(engine), engine.get_lr()
        engine.step()
        if n == 1:
            same(before, everything(engine) | {k: t for k, t in before.items() if "/" not in k and k in ("loss_scale", "skipped_steps", "good_steps")})
            assert engine.get_lr() == rates
        seen.append((engine.was_step_applied(), engine.cur_scale, engine.skipped_steps, engine.global_steps, engine.get_lr()[0]))
    assert seen == [(True, 256, 0, 1, 0.0), (False, 128, 1, 2, 0.0), (True, 128, 1, 3, 0.0025), (True, 128, 1, 4, 0.005)], seen


def in_bf16(stage: int) -> None:
    """Eight bits of a number are kept: outputs are 2**-8 apart of an eager model in float32, which parameters stay in."""
    model = Net().float()
    engine = begin(config(stage, bf16={"enabled": True}, gradient_clipping=0), model)
    theirs = copy.deepcopy(model)
    x, y = rows(1)[0][RANK]
    out = engine(x.float())
    want = theirs(x.float())
    assert engine.bfloat16_enabled() and out.dtype == torch.bfloat16 and (out.float() - want).abs().max() <= 2**-6 * want.abs().max()
    engine.backward(F.mse_loss(out.float(), y.float()))
    engine.step()
    assert all(t.dtype == torch.float32 for n, t in engine.module_state_dict().items() if "tracked" not in n)


def offloaded(stage: int) -> None:
    parts = rows(3)
    plain, away = begin(config(stage)), begin(config(stage, zero_optimization={"stage": stage, "offload_optimizer": {"device": "cpu"}}))
    assert "offload(optimizer)" in str(away.compiled.plan), away.compiled.plan
    assert passes(plain, parts) == passes(away, parts)
    hosted = [key for (role, key), t in away.compiled.states[0].types.items() if role == "state" and t.host]
    assert {"exp_avg/up.weight", "exp_avg_sq/up.weight"} <= set(hosted), hosted
    assert apart(plain, away) <= 1e-12  # up.bias lies before a batch norm: its gradient is rounding, 1e-17, which Adam divides by its eps of 1e-8


def resumed(stage: int, folder: Path) -> None:
    """Before the first batch, from a checkpoint after an overflow in fp16: what follows is bit for bit what follows without a break."""
    found = config(stage, 2, scheduler=WARMUP, fp16={"enabled": True, "initial_scale_power": 8, "hysteresis": 2, "loss_scale_window": 3})
    parts = rows(12)
    engine = begin(found, Net().float())

    def go(engine: Engine, first: int, last: int) -> list[float]:
        out = []
        for n in range(first, last):
            loss = of(engine, parts[n][RANK]) * (float("inf") if n in (1, 3) and RANK == 0 else 1.0)
            engine.backward(loss)
            engine.step()
            out.append(float(loss.detach()))
        return out

    go(engine, 0, 6)
    assert (engine.skipped_steps, engine.cur_scale, engine.get_lr()) == (2, 128, [0.0]), "the schedule has stepped once, to its first rate"
    engine.save_checkpoint(folder, client_state={"epoch": 3})
    after = go(engine, 6, 12)
    fresh = begin(found, Net(1).float())
    assert fresh.load_checkpoint(folder) == (str(folder / "global_step3"), {"epoch": 3})
    assert (fresh.global_steps, fresh.micro_steps, fresh.skipped_steps, fresh.cur_scale) == (3, 6, 2, 128), (fresh.skipped_steps, fresh.cur_scale)
    assert go(fresh, 6, 12) == after
    same(everything(engine), everything(fresh))
    assert fresh.get_lr() == engine.get_lr() and fresh.skipped_steps == engine.skipped_steps and fresh.cur_scale == engine.cur_scale
    go(engine, 0, 1)  # a gradient waits
    engine.load_checkpoint(folder)  # into one that has run
    assert go(engine, 6, 12) == after
    same(everything(engine), everything(fresh))


def whole_steps(plan: dict[str, Any]) -> None:
    """A pipeline's road, ``train_batch``: the mean over all rows, since every microbatch has as many."""
    parts = rows(4, world=1)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    theirs = Eager(copy.deepcopy(model), accumulation=2)
    want = theirs.passes(parts, 0)
    engine = begin(config(1, 2, **plan), model, loss_fn=lambda m, batch: F.mse_loss(m(batch[0]), batch[1]))
    feed = iter([part[0] for part in parts])
    got = [float(engine.train_batch(feed)) for _ in range(2)]
    assert max(abs(a - b) for a, b in zip(got, [(want[0] + want[1]) / 2, (want[2] + want[3]) / 2], strict=True)) <= 1e-12
    assert abs((engine.get_global_grad_norm() or 0.0) - theirs.norms[-1]) <= 1e-12 and apart(engine, theirs.model) <= 1e-12
    assert (engine.micro_steps, engine.global_steps) == (4, 2)
    raises("engine.train_batch(data_iter)", lambda: engine(parts[0][0][0]))
    fresh = rows(2, world=1, seed=5)
    with torch.no_grad():
        mean = sum(float(of(theirs.model, part[0])) for part in fresh) / 2
    before = everything(engine)
    assert abs(float(engine.eval_batch(iter([part[0] for part in fresh]))) - mean) <= 1e-12
    same(before, everything(engine))


def batches_of_its_own(stage: int) -> None:
    """``training_data``: each data-parallel rank its own rows, the next epoch shuffled anew; ``train_batch`` gives the mean over the ranks."""
    dataset = [(torch.full((8,), float(n)).double(), torch.zeros(4).double()) for n in range(16 * WORLD)]
    seen: list[list[float]] = []
    engine, _, loader, _ = deepseed.initialize(model=Net(), config=config(stage), training_data=dataset, loss_fn=lambda m, b: F.mse_loss(m(b[0]), b[1]))
    assert len(loader) == 4 and engine.training_dataloader is loader
    for _ in range(2):
        seen.append([float(x) for batch in loader for x in batch[0][:, 0]])
    everyone = engine.compiled.host.everyone(seen)
    for epoch in range(2):
        assert sorted(x for mine in everyone for x in mine[epoch]) == list(range(16 * WORLD))
    assert seen[0] != seen[1]
    first = [float(engine.train_batch()) for _ in range(5)]  # over the end of an epoch
    assert all(x == first for x in engine.compiled.host.everyone(first)) and engine.global_steps == 5


def same_rows(stage: int) -> None:
    """All ranks begin with the same rows: legal, and their mean is each one's own."""
    model = Net()
    engine, alone = begin(config(stage), copy.deepcopy(model)), Eager(model)
    part = rows(1)
    passes(engine, [[part[0][0]] * WORLD])
    alone.passes([[part[0][0]]])
    assert apart(engine, alone.model) <= 1e-12


def saved_for(folder: Path) -> list[float]:
    """A checkpoint of zero3, and what follows it."""
    engine = begin(config(3))
    passes(engine, rows(2))
    engine.save_checkpoint(folder, tag="two")
    engine.save_checkpoint(folder, tag="other", save_latest=False)
    engine.save_16bit_model(folder / "plain")
    return passes(engine, rows(2, seed=7))


def on_ranks(names: list[tuple[str, tuple[Any, ...]]]) -> list[Any]:
    global RANK, WORLD
    RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    return [globals()[name](*arguments) for name, arguments in names]

