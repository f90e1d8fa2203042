"""One rank of two that train by FSDP2 and write what ``torch.distributed.checkpoint.state_dict`` gives, or go on from such a folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parents[1] / "data" / "deepspeed"))
import model as small

RANKS = 2


def _trained(model: Any, optimizer: torch.optim.Optimizer, batches: list[Tensor]) -> list[float]:
    losses = []
    for batch in batches:
        rows = batch.chunk(RANKS)[dist.get_rank()]
        loss = model(rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total) / RANKS)
    return losses


def _state(model: Any, optimizer: torch.optim.Optimizer, flat: bool) -> dict[str, Any]:
    weights, state = get_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=flat))
    return {"model": weights, "optim": state}


def rank(folder: str, load: str | None = None, flat: bool = False) -> list[float]:
    """Three steps, a checkpoint into ``folder``, and the losses of three more; or those of the last three after loading ``load``."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    model = small.model().double()
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in (model.up, model.down):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = small.adamw(model)
    if load is None:
        _trained(model, optimizer, small.batches()[:3])
        dcp.save({**_state(model, optimizer, flat), "scheduler": {"last_epoch": 3}, "epoch": 5}, checkpoint_id=folder)
    else:
        state = _state(model, optimizer, flat)
        dcp.load(state, checkpoint_id=load)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"], options=StateDictOptions(flatten_optimizer_state_dict=flat))
    losses = _trained(model, optimizer, small.batches()[3:])
    if "TORCHELASTIC_RUN_ID" in os.environ:
        dist.barrier()
    dist.destroy_process_group()
    return losses
