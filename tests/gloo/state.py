"""One rank of the tests of what a compiled step stores, and of training as an application does it."""

from __future__ import annotations

import copy
import gc
import io
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

import deepseed
from deepseed.api import TrainStep


class Wide(nn.Module):
    """Large enough that small tensors do not count; two names for one weight, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(128, 512, bias=False), nn.Linear(512, 128)
        self.embed = nn.Embedding(64, 128)
        self.head = nn.Linear(128, 64, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(128))

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids) * self.scale
        return self.head(h + self.down(torch.relu(self.up(h))))


def cross_entropy(model: Any, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch["ids"]).flatten(0, 1), batch["labels"].flatten())


def batches(number: int, seed: int = 1) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{name: torch.randint(0, 64, (8, 6), generator=generator) for name in ("ids", "labels")} for _ in range(number)]


def live() -> int:
    """Bytes of the storages of all tensors that this process holds."""
    gc.collect()
    warnings.simplefilter("ignore")
    found = [t for t in gc.get_objects() if isinstance(t, Tensor) and not isinstance(t, DTensor | FakeTensor) and t.device.type == "cpu"]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}.values())


def stored(plan: str) -> dict[str, Any]:
    """What lives on this rank after compiling, and after training without the model's forward."""
    torch.set_num_threads(1)
    data = batches(4)
    before = live()
    torch.manual_seed(0)
    model = Wide().double()
    numel = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    step = deepseed.compile(model, plan, optimizer=optimizer, loss_fn=cross_entropy, clip_grad_norm=1.0, backend="gloo", example_batch=data[0])
    assert isinstance(step, TrainStep)
    out: dict[str, Any] = {"numel": numel, "compiled": live() - before}
    out["same objects"] = {id(p) for p in model.parameters()} == {id(p) for g in optimizer.param_groups for p in g["params"]} and step.model is model
    out["tied"] = model.head.weight is model.embed.weight

    def forward(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the model's own forward was called")

    kept = model.forward
    model.forward = forward  # type: ignore[method-assign]
    losses = []
    for batch in data:
        losses.append(float(step(batch)))
        scheduler.step()
    model.forward = kept  # type: ignore[method-assign]
    out["losses"], out["lr"] = losses, optimizer.param_groups[0]["lr"]
    out["trained"] = live() - before
    sharded, whole = step.state_dict(full=False), step.state_dict()
    out["dtensors"] = sorted(name for name, t in sharded.items() if isinstance(t, DTensor))
    out["placements"] = {name: [str(p) for p in t.placements] for name, t in sharded.items() if isinstance(t, DTensor)}
    out["equal"] = all(torch.equal(t.full_tensor() if isinstance(t, DTensor) else t, whole[name]) for name, t in sharded.items())
    file = io.BytesIO()
    torch.save(whole, file)
    out["whole"] = file.getvalue()  # as bytes: tensors between processes would be shared memory
    out["optimizer"] = sorted(step.optimizer_state())
    return out


def reference() -> tuple[list[float], dict[str, Tensor]]:
    """The same training by PyTorch alone."""
    torch.manual_seed(0)
    model = Wide().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    losses = []
    for batch in batches(4):
        optimizer.zero_grad()
        loss = cross_entropy(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(float(loss))
    return losses, {name: t.detach() for name, t in model.state_dict().items()}


def one_rank() -> None:
    """``step.model`` is the user's module, usable after training on one rank."""
    torch.manual_seed(0)
    model = Wide().double()
    start = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step = deepseed.compile(model, "zero3+dp1", optimizer=optimizer, loss_fn=cross_entropy, clip_grad_norm=1.0)
    assert isinstance(step, TrainStep)
    pointers = [p.data_ptr() for p in model.parameters()]
    for batch in batches(2):
        step(batch)
    assert step.model is model and [p.data_ptr() for p in model.parameters()] == pointers
    assert not torch.equal(model.up.weight, start.up.weight)
    with torch.no_grad():
        assert torch.isfinite(model(batches(1)[0]["ids"])).all()
