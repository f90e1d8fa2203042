"""State on pipeline stages, with stages given by hand: a step compiled without a pipeline, stored by the ranks of a mesh with one."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor

from deepseed.api import TrainStep
from deepseed.ir.mesh import Mesh
from deepseed.runtime.elsewhere import Elsewhere
from deepseed.runtime.errors import ElsewhereError
from deepseed.runtime.host import DistributedHost, Host, SimulatedHost
from gloo.checkpoint import Tagger, batches, everything, made, packed

MODULES = ("embed", "norm", "up", "down", "head")  # of Tagger, in the order in which it runs them


@dataclass(frozen=True)
class Cut:
    """A plan without a pipeline, the mesh of its ranks with one, and for each module of MODULES its stage; buffers of the top: ``rest``."""

    plan: str
    mesh: Mesh
    stages: Sequence[int]
    rest: int = 0

    def stage(self, key: str) -> int:
        module = key.rpartition("/")[2].partition(".")[0]
        return self.stages[MODULES.index(module)] if module in MODULES else self.rest


ZERO3 = Cut("zero3+dp2", Mesh((("pp", 2), ("dp", 2))), (0, 0, 0, 1, 1), 1)
LATER = Cut("zero3+dp2", Mesh((("dp", 2), ("pp", 2))), (0, 1, 1, 1, 0))  # another cut, another order of the ranks
FOUR = Cut("zero1+dp1", Mesh((("pp", 4),)), (0, 1, 2, 3, 0), 3)
LOOPS = Cut("zero1+dp2", Mesh((("pp", 2), ("dp", 2))), (0, 1, 2, 3, 0), 2)  # four stages on two ranks: interleaved
THREE_D = Cut("zero3+tp2+dp2", Mesh((("pp", 2), ("dp", 2), ("tp", 2))), (0, 0, 1, 1, 0), 1)
CUTS = {"zero3+pp2": ZERO3, "zero3+pp2, later": LATER, "zero1+pp4": FOUR, "zero1+pp2 interleaved": LOOPS, "zero3+tp2+pp2": THREE_D}


def staged(cut: Cut, distributed: bool = False, before: str | os.PathLike[str] | None = None, **options: Any) -> TrainStep:
    """A step whose state lies on the stages of ``cut``. It cannot run. ``before``: a checkpoint to load before the state is stored."""
    step = made(cut.plan, backend="simulate", world_size=cut.mesh.without("pp").ranks, **options)
    built = step.programs.find(batches(1)[0], "step").built
    entries = [replace(i, stage=cut.stage(i.key)) if i.role in ("param", "buffer", "state") else i for i in built.program.inputs]
    built.program = replace(built.program, inputs=tuple(entries))
    host: Host = DistributedHost(cut.mesh, "gloo") if distributed else SimulatedHost(cut.mesh)
    host.refine(built.program.mesh)
    step.host, step.backend = host, host.backend
    if before is not None:
        step.load(before)
    step._adopt(built)
    return step


def stored_by(step: TrainStep, cut: Cut) -> bool:
    """Whether each hosted rank stores exactly what is of its own stages."""
    p, ok = cut.mesh.size("pp"), True
    for state in step.states:
        own = {key for key in state.types if cut.stage(key[1]) % p == state.coordinate["pp"]}
        ok = ok and set(state.tensors) == own and 0 < len(own) < len(state.types)
    return ok


# one rank of a run over gloo --------------------------------------------------------------------------------------------


def rank_of(names: Sequence[str], source: str, folder: str) -> dict[str, dict[str, Any]]:
    """For each cut: what a rank stores and shows, from the checkpoint ``source``; it saves into ``folder``/NAME."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    return {name: _stages(CUTS[name], source, Path(folder) / name, late=n % 2 == 1) for n, name in enumerate(names)}


def _stages(cut: Cut, source: str, folder: Path, late: bool) -> dict[str, Any]:
    step = staged(cut, distributed=True, seed=5, before=None if late else source)
    if late:
        step.load(source)
    model, out = step.model, dict[str, Any]()
    assert isinstance(model, Tagger)
    whole = everything(step)
    out["values"], out["own"] = packed(whole), stored_by(step, cut)
    out["stored"] = sum(t.numel() for t in step.states[0].tensors.values())
    step.save(folder / "ours")
    shown = model.state_dict()
    out["elsewhere"] = sorted(name for name, t in shown.items() if isinstance(t, Elsewhere))
    out["dtensors"] = sorted(name for name, t in shown.items() if isinstance(t, DTensor) and not isinstance(t, Elsewhere))
    out["local"] = sum(t.to_local().numel() if isinstance(t, DTensor) else t.numel() for t in dict(model.named_parameters()).values())
    out["tied"] = model.head.weight is model.embed.weight
    out["parameters"] = {id(p) for p in model.parameters()} == {id(p) for g in step.optimizer.param_groups for p in g["params"]}  # type: ignore[union-attr]
    out["refused"] = _refused(model)
    out["plain"] = _by_plain_pytorch(step, whole, folder / "plain")
    out["optimizer"] = _optimizer(step)
    out["by the model"] = _load_whole(step)
    out["unseen"] = _unseen(step)
    return out


def _refused(model: Tagger) -> list[str]:
    """What computing with a parameter of other stages says."""
    found = [p for p in model.parameters() if isinstance(p, Elsewhere)]
    out = []
    for do in (lambda p: p.detach().full_tensor(), lambda p: p.sum(), lambda p: torch.ones(p.shape[-1]) * p, lambda p: torch.zeros(p.shape).copy_(p)):
        try:
            do(found[0])
            out.append("no error")
        except ElsewhereError as error:
            out.append(str(error))
    return out


def _by_plain_pytorch(step: TrainStep, whole: dict[str, Tensor], folder: Path) -> bool:
    """torch.distributed.checkpoint saves the module's own state_dict, one process reads it, and the ranks do."""
    names = list(step.model.state_dict())
    dcp.save({"model": step.model.state_dict()}, checkpoint_id=folder)
    read = {"model": {name: torch.zeros_like(whole[name]) for name in names}}
    if dist.get_rank() == 0:
        dcp.load(read, checkpoint_id=folder, no_dist=True)
    fine = dist.get_rank() > 0 or all(torch.equal(read["model"][name], whole[name]) for name in names)
    with torch.no_grad():
        for t in step.model.state_dict().values():
            t.zero_()
    fine = fine and not any(t.any() for (role, _), t in step.states[0].tensors.items() if role == "param")
    dcp.load({"model": step.model.state_dict()}, checkpoint_id=folder)
    now = step.state_dict()
    return fine and all(torch.equal(now[name], whole[name]) for name in names)


def _optimizer(step: TrainStep) -> bool:
    """optimizer.state_dict() is whole on every rank, and load_state_dict() brings it back."""
    assert isinstance(step.optimizer, torch.optim.Optimizer)
    before, kept = step.optimizer_state(), step.optimizer.state_dict()
    names = [name for name, _ in step.model.named_parameters()]
    order = [names.index(n) for g in step.optimizer.param_groups for n in (_name(step, p) for p in g["params"])]
    fine = all(torch.equal(t, before[f"{slot}/{names[order[i]]}"]) for i, slots in kept["state"].items() for slot, t in slots.items())
    for (role, _), t in step.states[0].tensors.items():
        if role == "state":
            t.zero_()
    step.optimizer.load_state_dict(kept)
    after = step.optimizer_state()
    return fine and len(kept["state"]) == len(names) and all(torch.equal(t, after[name]) for name, t in before.items())


def _name(step: TrainStep, parameter: Tensor) -> str:
    return next(name for name, p in step.model.named_parameters() if p is parameter)


def _load_whole(step: TrainStep) -> bool:
    """Whole tensors by step.load_state_dict() and by model.load_state_dict(); sharded ones as well."""
    values = {name: t.clone() for name, t in step.state_dict().items()}
    doubled = {name: t * 2 for name, t in values.items()}
    step.model.load_state_dict(doubled)
    fine = all(torch.equal(t, doubled[name]) for name, t in step.state_dict().items())
    step.load_state_dict(values)
    fine = fine and all(torch.equal(t, values[name]) for name, t in step.state_dict().items())
    lying = {name: t.detach().clone() for name, t in step.state_dict(full=False).items()}
    step.load_state_dict(doubled)
    step.model.load_state_dict(lying)
    return fine and all(torch.equal(t, values[name]) for name, t in step.state_dict().items())


def _unseen(step: TrainStep) -> str:
    """Another tensor in the place of one of another stage's."""
    name = next(n for n, p in step.model.named_parameters() if isinstance(p, Elsewhere))
    owner, kept = step.model.get_submodule(name.rpartition(".")[0]), step.model.get_parameter(name)
    step._ready()
    setattr(owner, name.rpartition(".")[2], torch.nn.Parameter(torch.zeros(kept.shape, dtype=kept.dtype)))
    try:
        step._ready()
        return "no error"
    except ValueError as error:
        return str(error)
    finally:
        setattr(owner, name.rpartition(".")[2], kept)
