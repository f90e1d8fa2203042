"""A model with what a checkpoint must bring back, and one rank of the tests of checkpoints over real processes."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import deepseed
from deepseed import checkpoint
from deepseed.api import TrainStep
from deepseed.runtime import saved
from gloo.tried import Tried

FIRST, MORE = 2, 2  # steps before the checkpoint, and after it


class Tagger(nn.Module):
    """Dropout, a tied weight, a buffer that each step changes, one that is no part of the state_dict, one that is not used."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, width)
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(0.3)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.head = nn.Linear(width, 24, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width), persistent=False)
        self.register_buffer("version", torch.tensor(3))

    def forward(self, ids: Tensor) -> Tensor:
        h = self.norm(self.embed(ids)) * self.scale
        if self.training:
            self.mean.mul_(0.9).add_(h.detach().mean((0, 1)), alpha=0.1)
        return self.head(h - self.mean + self.down(self.drop(torch.relu(self.up(h)))))


def cross_entropy(model: Any, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch["ids"]).flatten(0, 1), batch["labels"].flatten())


def batches(number: int = FIRST + MORE) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{name: torch.randint(0, 24, (8, 6), generator=generator) for name in ("ids", "labels")} for _ in range(number)]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Two groups: no decay where there is one dimension."""
    flat = [[p for p in model.parameters() if (p.dim() == 1) == one] for one in (False, True)]
    return torch.optim.AdamW([{"params": flat[0], "weight_decay": 0.1}, {"params": flat[1], "weight_decay": 0.0}], lr=1e-2)


def made(plan: str, seed: int = 0, dtype: torch.dtype = torch.float64, optimizer: Any = adamw, model: nn.Module | None = None, **options: Any) -> TrainStep:
    torch.manual_seed(seed)
    model = (Tagger() if model is None else model).to(dtype)
    step = deepseed.compile(model, plan, optimizer=optimizer(model), loss_fn=cross_entropy, clip_grad_norm=1.0, **options)
    assert isinstance(step, TrainStep)
    return step


def everything(step: TrainStep) -> dict[str, Tensor]:
    """Parameters, buffers and optimizer state, whole."""
    return {name: t.detach().clone() for name, t in {**step.state_dict(), **step.optimizer_state()}.items()}


def trained(step: TrainStep, data: list[Any]) -> tuple[list[float], dict[str, Tensor]]:
    return [float(step(batch)) for batch in data], everything(step)


def packed(values: dict[str, Tensor]) -> bytes:
    """As bytes: tensors between processes would be shared memory."""
    file = io.BytesIO()
    torch.save(values, file)
    return file.getvalue()


# ranks ------------------------------------------------------------------------------------------------------------------


def writes(plan: str, folder: str) -> dict[str, Any]:
    """Two steps, a checkpoint, two steps more; how much this rank wrote, and what it gathered for that."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    step, data = made(plan, backend="gloo"), batches()
    for batch in data[:FIRST]:
        step(batch)
    sent: list[str] = []
    run, exchange = step.host.rt.world.run, type(step.host.rt).exchange  # type: ignore[attr-defined]
    step.host.rt.world.run = lambda begin, what: (sent.append(what), run(begin, what))[1]  # type: ignore[attr-defined]
    type(step.host.rt).exchange = lambda *a, **k: sent.append("exchange") or exchange(*a, **k)  # type: ignore[attr-defined]
    step.save(folder, extra={"note": "kept"})
    step.host.rt.world.run, type(step.host.rt).exchange = run, exchange  # type: ignore[attr-defined]
    losses, values = trained(step, data[FIRST:])
    file = Path(folder) / f"__{dist.get_rank()}_0.distcp"
    return {"losses": losses, "values": packed(values), "bytes": file.stat().st_size if file.exists() else 0, "sent": sorted(set(sent))}


def goes_on(plan: str, folder: str) -> dict[str, Any]:
    """From a model of other values: load, then two steps; and again, by the same step; the largest tensor that was read into."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    out: dict[str, Any] = {}
    data, largest = batches(), [0]
    read = checkpoint.read

    def watched(folder: Path, wants: Sequence[saved.Want], *rest: Any, **more: Any) -> Any:
        largest.append(max((w.into.numel() for w in wants if w.name.startswith("optimizer.")), default=0))
        return read(folder, wants, *rest, **more)

    checkpoint.read = watched
    step = made(plan, seed=5, backend="gloo")
    out["extra"] = step.load(folder)
    out["loaded"] = packed(dict(step.state_dict()))
    out["losses"], values = trained(step, data[FIRST:])
    out["values"] = packed(values)
    step.load(folder)  # now that it is compiled
    out["again"], values = trained(step, data[FIRST:])
    out["values again"], out["largest"] = packed(values), max(largest)
    checkpoint.read = read
    return out


def troubles(folder: str) -> dict[str, Any]:
    """What goes wrong on one rank of two: every rank says it, none hangs, training goes on, and the former checkpoint stays."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rank, data = dist.get_rank() if dist.is_initialized() else int(os.environ["RANK"]), batches(6)
    step = made("zero3", backend="gloo")
    step(data[0])
    step.save(folder)
    kept = everything(step)
    out = tried = Tried()

    step(data[1])
    write = saved.write_boxes
    if rank == 1:
        def full(*_: Any) -> Any:
            raise OSError(28, "No space left on device")

        saved.write_boxes = full
    tried("disk full", lambda: step.save(folder))
    saved.write_boxes = write
    tried("other folders", lambda: step.save(f"{folder}-{rank}"))
    tried("one has nothing", lambda: step.load(folder if rank == 0 else f"{folder}x"))
    before = everything(step)
    tried("other model", lambda: step.load_state_dict({"up.weight": torch.zeros(2, 2)}))
    whole = {name: torch.full(t.shape, 0.5 + rank, dtype=t.dtype) for name, t in step.state_dict().items()}
    tried("other values", lambda: step.load_state_dict(whole))
    tried("assign", lambda: step.model.load_state_dict({n: t * 0 for n, t in whole.items()}, assign=True))
    tried("shape", lambda: step.model.load_state_dict({**step.state_dict(), "up.weight": torch.zeros(3, 3)}))
    out["unchanged"] = all(torch.equal(t, before[n]) for n, t in everything(step).items())
    step.load(folder)
    out["former"] = all(torch.equal(t, kept[n]) for n, t in everything(step).items())
    fill = saved.Reading.fill
    if rank == 1:
        def fails(_: saved.Reading) -> None:
            raise OSError(5, "Input/output error")

        saved.Reading.fill = fails  # type: ignore[method-assign]
    tried("half loaded", lambda: step.load(folder))
    saved.Reading.fill = fill  # type: ignore[method-assign]
    tried("half run", lambda: step(data[1]))
    tried("half saved", lambda: step.save(f"{folder}x"))
    step.load(folder)
    out["goes on"] = [float(step(batch)) for batch in data[1:3]]
    other = made("zero1", seed=9, backend="simulate", world_size=1)
    values = {name: t.detach().clone() for name, t in other.model.state_dict().items()}
    step.load_state_dict(values)
    out["by the step"] = all(torch.equal(t, values[n]) for n, t in step.state_dict().items())
    doubled = {n: t * 2 for n, t in values.items()}
    step.model.load_state_dict(doubled)
    out["by the model"] = all(torch.equal(t, doubled[n]) for n, t in step.state_dict().items()) and isinstance(step.model.up.weight, DTensor)
    step.model.up.load_state_dict({n: values[f"up.{n}"] for n in ("weight", "bias")})
    out["by a part of it"] = torch.equal(step.state_dict()["up.weight"], values["up.weight"])
    return out


def dies(folder: str, environment: dict[str, str]) -> None:
    """A forked process: the last rank is killed while it writes its file."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    descriptor = os.open(f"{folder}.{environment['RANK']}.err", os.O_CREAT | os.O_WRONLY)
    os.dup2(descriptor, 2)
    step = made("zero3", backend="gloo")
    step(batches()[0])
    step.save(folder)
    step(batches()[1])
    if environment["RANK"] == "1":
        saved.write_boxes = lambda *_: os._exit(9)
    step.save(folder)
