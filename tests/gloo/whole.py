"""Parameters that are whole where a script wants them so, on each rank of several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import deepseed
from deepseed.utils import safe_get_full_fp32_param, safe_get_full_grad, safe_get_full_optimizer_state
from gloo import engine as shared
from gloo.engine import Eager, Net, apart, begin, config, of, passes, rows


def gathered(stage: int) -> None:
    """Before the first batch and after it: held by a name, through the module, read and written, by one rank or by none."""
    rank, world = shared.RANK, shared.WORLD
    model = Net()
    theirs = Eager(nn.Module.to(Net(), torch.float64))
    engine = begin(config(stage), model)
    with deepseed.zero.GatheredParameters(model.up.weight, modifier_rank=world - 1):
        if rank == world - 1:
            nn.init.constant_(model.up.weight, 0.25)
    with torch.no_grad():
        theirs.model.up.weight.fill_(0.25)
    assert torch.equal(model.up.weight, theirs.model.up.weight)
    parts = rows(4)
    passes(engine, parts[:2])
    theirs.passes(parts[:2])
    held = list(model.parameters())
    assert stage < 3 or world == 1 or any(isinstance(p, DTensor) for p in held)
    with deepseed.zero.GatheredParameters(held):
        for p, q in zip(held, theirs.model.parameters(), strict=True):
            assert type(p.data) is Tensor and type(p.detach().cpu()) is Tensor and p.data.shape == q.shape
            assert (p.data - q.data).abs().max() <= 1e-12 and abs(float(p.sum()) - float(q.sum())) <= 1e-12
        seen = model.state_dict()
        assert all(type(t) is Tensor for t in seen.values()) and (seen["down.weight"] - theirs.model.down.weight).abs().max() <= 1e-12
    with deepseed.zero.GatheredParameters(model, modifier_rank=0):
        if rank == 0:
            with torch.no_grad():
                model.down.weight.mul_(2.0)
                held[0].data.copy_(torch.ones_like(held[0]))
                model.up.bias[3] = 7.0
    with torch.no_grad():
        theirs.model.down.weight.mul_(2.0)
        next(theirs.model.parameters()).data.fill_(1.0)
        theirs.model.up.bias[3] = 7.0
    assert apart(engine, theirs.model) <= 1e-12
    assert passes(engine, parts[2:])[0] - theirs.passes(parts[2:])[0] <= 1e-12 and apart(engine, theirs.model) <= 1e-12
    shared.raises(f"modifier_rank=9) of {world} ranks", lambda: deepseed.zero.GatheredParameters(held, modifier_rank=9))


def asked(stage: int) -> None:
    model = Net()
    theirs = Eager(nn.Module.to(Net(), torch.float64), clip=float("inf"))
    engine = begin(config(stage, gradient_clipping=0), model)
    parts = rows(2)
    assert torch.equal(safe_get_full_fp32_param(model.up.weight), model.up.weight) and safe_get_full_grad(model.up.weight) is None
    assert safe_get_full_optimizer_state(model.up.weight, "exp_avg") is None
    passes(engine, parts[:1])
    theirs.passes(parts[:1])
    engine.backward(of(engine, parts[1][shared.RANK]))
    for row in parts[1]:
        (of(theirs.model, row) / len(parts[1])).backward()
    for (name, p), q in zip(model.named_parameters(), theirs.model.parameters(), strict=True):
        whole, grad, average = safe_get_full_fp32_param(p), safe_get_full_grad(p), safe_get_full_optimizer_state(p, "exp_avg")
        assert type(whole) is Tensor and (whole - q).abs().max() <= 1e-12, name
        assert (grad is None) == (q.grad is None) and (grad is None or (grad - q.grad).abs().max() <= 1e-14), name
        kept = theirs.optimizer.state[q].get("exp_avg") if q in theirs.optimizer.state else None
        assert (average is None) == (kept is None) and (average is None or (average - kept).abs().max() <= 1e-14), name
        assert safe_get_full_optimizer_state(p, "momentum") is None


def spoken() -> Any:
    """torch.distributed by its other name."""
    comm = deepseed.comm
    x = torch.tensor([float(comm.get_rank())])
    comm.all_reduce(x)
    comm.barrier()
    return float(x), comm.get_world_size(), deepseed.get_accelerator().device_count()


def from_a_file(folder: Path) -> None:
    """A model that no rank holds, begun from files."""
    with deepseed.meta():
        model = Net()
    engine = begin(config(3), model, weights=folder)
    theirs = Eager(nn.Module.to(Net(), torch.float64))
    passes(engine, rows(2))
    theirs.passes(rows(2))
    assert apart(engine, theirs.model) <= 1e-12


def on_ranks(cases: list[tuple[str, tuple[Any, ...]]]) -> list[Any]:
    shared.on_ranks([])
    deepseed.init_distributed()
    return [globals()[name](*arguments) for name, arguments in cases]
