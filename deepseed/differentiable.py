"""A compiled model as a node of the user's autograd graph: forward and backward are the two halves of one placed program.

What stands between them (losses, other models, an optimizer's step) is the user's. Each forward holds the values that its backward
reads, and each backward uses them up. Gradients come in the layout in which their parameters are stored: DTensors under a process
group, whole tensors in a simulation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from deepseed.build import RETURNED, Built, CompileError
from deepseed.ir.mesh import TIME
from deepseed.ir.program import GRADIENTS
from deepseed.nonfinite import Kept, finite
from deepseed.rules.lanes import home
from deepseed.runtime.elsewhere import Elsewhere
from deepseed.runtime.executable import Executable
from deepseed.runtime.host import Host
from deepseed.runtime.state import State, shard

Pend = Callable[[Sequence[str], Sequence[Mapping[str, Tensor]]], None]  # parameters; their gradients by hosted rank, where it has a part
EARLY = tuple(role for role in RETURNED if role not in GRADIENTS)


class Drop(nn.Module):
    """An ``nn.Module`` that has the very tables of another one: parameters, buffers and submodules, by the same names, and its mode."""

    model: nn.Module
    host: Host
    states: list[State]
    _refuses = True  # parameters() where an optimizer over them would be lost

    def _be(self, model: nn.Module) -> None:
        mode = model.training
        nn.Module.__init__(self)  # it sets ``training``, which is the model's
        model.training = mode
        self.__dict__.update({table: model.__dict__[table] for table in ("_parameters", "_buffers", "_modules")})
        self.__dict__.pop("training", None)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's. Raises CompileError where they are not yet what they will be: under a process group, before the first program."""
        if self._refuses and not self.states and self.host.backend != "simulate":
            raise CompileError(
                "parameters() before anything is compiled: each rank will hold its part of them, which is not cut yet\n"
                "  fix: compile(..., example_batch=batch), or call the module once; then make the optimizer"
            )
        return super().named_parameters(*args, **kwargs)

    @property
    def training(self) -> bool:
        return self.model.training

    @training.setter
    def training(self, mode: bool) -> None:
        if "model" in self.__dict__:
            self.model.training = mode

    def __getattr__(self, name: str) -> Any:
        """What it has not itself is the model's: ``config``, ``get_input_embeddings``."""
        if "model" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.__dict__["model"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


@dataclass
class Pass:
    """One forward, and the one backward that may follow."""

    host: Host
    states: Sequence[State]
    model: nn.Module
    built: Built
    pend: Pend | None = None  # takes the gradients that wait for an update of their own
    checks: bool = False  # whether gradients must be finite,
    overflows: bool = False  # unless a scale of the loss is being found

    def __post_init__(self) -> None:
        self.halves = [e.halves() for e in self.built.executables]
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.versions = {name: _version(p) for name, p in self.parameters.items()}
        self.done = False
        self.values = {(o.role, o.key): o.ref.name for o in self.built.program.outputs}

    def forward(self, given: Sequence[list[Tensor]]) -> dict[str, Tensor]:
        """The model's outputs by key: whole, or this rank's rows."""
        self.kept = Kept.of(self.built, self.host, given) if self.checks else None
        results = self.host.run([h.forward for h in self.halves], given)
        if self.kept is not None:
            self.kept.ran()
        return {key: t for (role, key), t in self.built.returned(self.host, results, EARLY).items() if role == "output"}

    def backward(self, tangents: Mapping[str, Tensor], towards: Sequence[str]) -> list[Tensor | None]:
        """Gradients of the parameters that require grad, then of the batch entries ``towards``. Raises RuntimeError."""
        self._check()
        with self.host.together():
            tangents = {key: t.detach() for key, t in tangents.items() if key in self.built.captured.differentiable}
            given = [self._tangents(e, state, tangents) for e, state in zip(self.built.executables, self.states, strict=True)]
            mine = [list(each) for each in given]
            results = self.host.run([h.backward for h in self.halves], given)
            if self.kept is not None and any(self.host.everyone(not finite(t for each in results for t in each))):
                try:
                    self.kept.report("backward: a gradient is not finite", self.overflows, mine)
                finally:
                    self.kept.put_back()
                    self.host.settle(self.model, self.states, [(o.role, o.key) for o in self.built.program.outputs if o.role == "buffer"])
            parts = self.built.parts(results, GRADIENTS)
            if self.pend is not None:
                waiting = [o.key for o in self.built.program.outputs if o.role == "pending"]
                self.pend(waiting, [{key: t for (role, key), t in part.items() if role == "pending"} for part in parts])
            found = [self._gradient(name, parts) if ("grad", name) in self.values else None for name in self.parameters]
            batch = self.built.returned(self.host, results, GRADIENTS, ("batch_grad",)) if towards else {}
            return [*found, *(batch.get(("batch_grad", key)) for key in towards)]

    def _check(self) -> None:
        if self.done:
            raise RuntimeError(
                "backward a second time through one forward of a compiled module: what it reads is used up, retain_graph or not\n"
                "  fix: add the losses up and call backward once, or call the module again"
            )
        for name, p in self.parameters.items():
            if _version(p) != self.versions[name]:
                raise RuntimeError(
                    f"parameter {name!r} was changed in place between a forward and its backward, which reads it\n  fix: step the optimizer after backward, or call the module again"
                )
        self.done = True

    def _tangents(self, e: Executable, state: State, tangents: Mapping[str, Tensor]) -> list[Tensor]:
        out = []
        for i in (i for i in e.inputs if i.role == "tangent"):
            type_ = i.type.laid(i.type.layout.with_(TIME, None))  # the source cuts its rows into microbatches
            out.append(shard(tangents[i.key], type_, state.mesh, state.coordinate).to(self.host.device))
        return out

    def _gradient(self, name: str, parts: Sequence[Mapping[tuple[str, str], Tensor]]) -> Tensor | None:
        """As the parameter lies; None where other ranks of the pipeline store it."""
        p, key = self.parameters[name], ("grad", name)
        type_, at = self.built.program.types[self.values[key]], home(self.built.program, self.values[key])
        stored = self.states[0].types["param", name]
        if self.host.backend == "simulate":
            return self.host.whole([r.get(key) for r in parts], type_, at).to(p.dtype)
        if (type_.layout, at) != (stored.layout, self.states[0].homes["param", name]):
            raise CompileError(f"the gradient of {name!r} lies as {type_} on pipeline rank {at}, the parameter as {stored} on {self.states[0].homes['param', name]}")
        if isinstance(p, Elsewhere):
            return None
        local = parts[0][key].to(p.dtype)
        if isinstance(p, DTensor):
            return DTensor.from_local(local, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())
        return local


def apply(run: Pass, given: Callable[[], Sequence[list[Tensor]]], settle: Callable[[], None], towards: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's outputs by key, as results of ``run``'s parameters and of the batch entries ``towards``."""
    keys: list[str] = []

    def forward() -> list[Tensor]:
        found = run.forward(given())
        settle()
        keys.extend(found)
        own = {t.untyped_storage().data_ptr() for t in (*run.model.parameters(), *run.model.buffers(), *towards.values()) if not isinstance(t, DTensor)}
        return [t.clone() if t.untyped_storage().data_ptr() in own else t for t in found.values()]

    def backward(tangents: Sequence[Tensor]) -> list[Tensor | None]:
        return run.backward(dict(zip(keys, tangents, strict=True)), list(towards))

    differentiable = frozenset(run.built.captured.differentiable)
    out = _Node.apply(forward, backward, lambda: [key in differentiable for key in keys], *run.parameters.values(), *towards.values())  # type: ignore[no-untyped-call]
    return dict(zip(keys, out, strict=True))


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, forward: Callable[[], list[Tensor]], backward: Any, which: Callable[[], list[bool]], *leaves: Tensor) -> tuple[Tensor, ...]:
        out, ctx.run = forward(), backward
        ctx.mark_non_differentiable(*[t for t, slope in zip(out, which(), strict=True) if not slope])
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *tangents: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, None, *ctx.run(tangents))


def leave(before: Mapping[str, nn.Parameter], model: nn.Module) -> None:
    """Mark the parameters that others have replaced in ``model``: an optimizer that still has them is told so at its next step."""
    now = dict(model.named_parameters())
    for name, p in before.items():
        if now[name] is not p:
            p.__dict__["_left"] = name
            _watch_optimizers()


@cache
def _watch_optimizers() -> None:
    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if (name := p.__dict__.get("_left")) is not None:
                    raise CompileError(
                        f"{type(optimizer).__name__} holds parameter {name!r} as it was before the model was compiled; the module has a DTensor in its place\n"
                        "  fix: compile(..., example_batch=batch) first, then make the optimizer over the compiled module's parameters()"
                    )

    register_optimizer_step_pre_hook(look)


def _version(p: Tensor) -> tuple[int, int]:
    return p._version, p._local_tensor._version if isinstance(p, DTensor) else 0
