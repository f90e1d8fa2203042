"""The front door: ``step = deepseed.compile(model, plan="zero3+tp2", optimizer=opt)``, then ``loss = step(batch)``.

A compiled model captures, solves and checks at its first batch (or at ``example_batch``), once for each batch shape, each
value that the model reads out of a tensor, and each setting that is a fact of the program (``training``, ``requires_grad``, the
optimizer's options but ``lr``). Its parameters and optimizer state belong to it, not to one program: where the first program
stored them they stay. The state that the optimizer held moves to the step: ``step.optimizer_state()`` and ``optimizer.state_dict()``
give it from then on, ``optimizer.state`` is empty. There is no global state: two compiled models live in one process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from deepseed import checkpoint, pretrained
from deepseed.arguments import check_arguments
from deepseed.bucket import Bucket
from deepseed.build import Built, CompileError
from deepseed.capture.batch import given, tensors
from deepseed.capture.gradients import SCALE, SKIPPED, LossScale
from deepseed.capture.options import Optimizers, listed
from deepseed.capture.state import STARTED
from deepseed.capture.step import Want
from deepseed.differentiable import Drop, Pass, apply, check_rows, leave
from deepseed.explain import Explanation, explain
from deepseed.handover import accept_whole, follow, load_whole, take_over
from deepseed.idle import notes
from deepseed.ir.mesh import TIME, Mesh
from deepseed.ir.program import Program
from deepseed.ops import torch_dtype
from deepseed.ownership import Places
from deepseed.pipeline import Passed
from deepseed.places import device_of, place
from deepseed.precision import precision
from deepseed.programs import Found, LossFn, Programs, Subject
from deepseed.runtime.arena import accounts
from deepseed.runtime.disk import disk_of
from deepseed.runtime.executable import Executable
from deepseed.runtime.state import State, check_disks, seal_disks, shard
from deepseed.weights import check_values, open_weights

MOST_PROGRAMS = 16  # compiled programs that one model keeps by default


def compile(
    model: Any,
    plan: str = "zero0",
    *,
    optimizer: Optimizers = None,
    loss_fn: LossFn | None = None,
    clip_grad_norm: float | None = None,
    loss_scale: LossScale | float | None = None,
    example_batch: Any = None,
    world_size: int | None = None,
    backend: str | None = None,
    dtype: str | torch.dtype | None = None,
    batch: str = "global",
    seed: int = 0,
    max_programs: int = MOST_PROGRAMS,
    buckets: Bucket | Sequence[Bucket] = (),
    weights: str | os.PathLike[str] | None = None,
    device_memory: str | int | None = None,
) -> TrainStep | Module:
    """Compile an unmodified model for a plan such as ``"zero3+tp2"``.

    With ``optimizer``: a ``TrainStep``; ``step(batch)`` does forward, backward, clipping and update, and returns the global
    mean loss. Without: a ``Module``, called as the model is: ``loss.backward()`` goes through it, for any torch optimizer; ``loss_and_grads(batch)`` is both.

    model: an ``nn.Module`` or a ``torch.export.ExportedProgram``. optimizer: over the model's parameters, or a list of
    several, each over its own; ``lr`` is read at every step, so schedulers work unchanged. loss_fn: ``loss_fn(model, batch)``, else the model's own ``.loss``.
    clip_grad_norm: global 2-norm. loss_scale: a ``deepseed.LossScale``, or a number that stays; ``fp16`` in the plan has the default one. example_batch: compile now instead of at the first batch. world_size, backend: number of
    ranks and ``"simulate"`` (all ranks in this process), ``"gloo"`` or ``"nccl"``; by default what the launcher started, else
    simulate. dtype: the compute dtype, as the plan's ``bf16``. batch: ``"global"`` (every process is given the whole batch) or
    ``"local"`` (each data-parallel rank its own rows). seed: of dropout and other random ops. max_programs: how many compiled
    programs are kept, one a batch shape, value read, mode and set of options; the one used longest ago is dropped for a new one. buckets:
    ``deepseed.Bucket(fill={"input_ids": 0, "attention_mask": 0, "labels": -100}, to=64)`` pads batches to few shapes for steps and
    losses; at the first padded batch loss and gradients are compared with those of the batch itself, and another number is refused. weights: a
    .safetensors file, or a folder as ``save_pretrained`` of transformers writes it, from which parameters and buffers are read, by each rank its part
    only: the model may be on the meta device (build it in ``with deepseed.meta():``).
    device_memory: without an accelerator, bytes of each rank's "device" (``"256MiB"``; ``"unlimited"``: count only; default:
    ``$DEEPSEED_DEVICE_MEMORY``): an op that asks for more fails, and ``counted_peak_bytes`` says what was needed.

    Raises PlanError, CaptureError, CompileError, PassError, CheckError, CheckpointError.
    """
    common: dict[str, Any] = {
        "loss_fn": loss_fn, "clip_grad_norm": clip_grad_norm, "loss_scale": loss_scale, "world_size": world_size, "backend": backend, "dtype": dtype, "batch": batch, "seed": seed,
        "max_programs": max_programs, "buckets": buckets, "weights": weights, "device_memory": device_memory,
    }  # fmt: skip
    compiled = TrainStep(model, plan, optimizer=optimizer, **common) if optimizer is not None else Module(model, plan, **common)
    if example_batch is not None:
        compiled.compile(example_batch)
    return compiled


Self = TypeVar("Self", bound="_Compiled")
P = ParamSpec("P")
R = TypeVar("R")


def _together(method: Callable[Concatenate[Self, P], R]) -> Callable[Concatenate[Self, P], R]:
    """Every rank makes this call; where one fails the others are told."""

    @wraps(method)
    def call(self: Self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.host.together():
            return method(self, *args, **kwargs)

    return call


class _Compiled:
    """What train step and module share: the plan on its ranks, the state, and the programs by batch."""

    def __init__(
        self,
        model: Any,
        plan: str,
        *,
        optimizer: Optimizers = None,
        loss_fn: LossFn | None = None,
        clip_grad_norm: float | None = None,
        loss_scale: LossScale | float | None = None,
        world_size: int | None = None,
        backend: str | None = None,
        dtype: str | torch.dtype | None = None,
        batch: str = "global",
        seed: int = 0,
        max_programs: int = MOST_PROGRAMS,
        buckets: Bucket | Sequence[Bucket] = (),
        weights: str | os.PathLike[str] | None = None,
        device_memory: str | int | None = None,
        widen: bool = False,
        grads: bool = False,
        quiet: bool = False,
    ) -> None:
        pads = (buckets,) if isinstance(buckets, Bucket) else tuple(buckets)
        check_arguments(model, plan, optimizer, clip_grad_norm, loss_scale, batch, max_programs, pads)
        self.model: nn.Module = model.module() if isinstance(model, torch.export.ExportedProgram) else model
        self.optimizer, self.clip_grad_norm, self.seed = optimizer, clip_grad_norm, seed
        self._widen, self._quiet = widen, quiet
        said = [
            ("batch=", batch), ("weights=", weights and str(weights)), ("clip_grad_norm", clip_grad_norm), ("loss_scale", loss_scale), ("seed", seed),
            ("optimizer", ", ".join(type(o).__name__ for o in listed(optimizer))),
        ]  # fmt: skip
        self.plan, self.host = place(plan, dtype, world_size, backend, device_of(self.model), quiet, said)
        self.backend = self.host.backend
        self.host.arenas = accounts(device_memory if device_memory is not None else self.plan.budget, self.host.device, [self.host.mesh.rank(c) for c in self.host.coordinates])
        words = precision(self.plan, loss_scale)
        self._scale = words["loss_scale"]
        if self.host.first and not quiet:
            for note in notes(self.plan):
                print(f"deepseed: {note}", file=sys.stderr)
        self.weights = None if weights is None else open_weights(weights, self.model, self.host, quiet)
        self.steps = 0
        self.states: list[State] = []
        self.programs = Programs(Subject(self.model, optimizer, loss_fn, clip_grad_norm, words, seed, self.plan, self.host, batch == "local", widen, grads, quiet, pads), max_programs)
        self._places: Places | None = None
        self._shown: Mapping[tuple[str, str], Tensor] = {}
        self._fills: dict[str, float] = {}  # what each slot of optimizer state holds before the first step
        self._resume: list[checkpoint.Resume] = []  # what is read of checkpoints once it is known which part each rank holds
        self._python: dict[str, Callable[[Any], int | float]] = {}  # state that the optimizer keeps as Python numbers: int or float

    # what it did ----------------------------------------------------------------------------------------------------

    @property
    def mesh(self) -> Mesh:
        """The ranks: the plan's axes, one of them as sub-axes where the first program needs that."""
        return self.host.mesh

    @property
    def program(self) -> Program:
        """The program of the latest batch shape, as all ranks share it (before ``localize``)."""
        return self.programs.current().program

    @property
    def passes(self) -> Sequence[Passed]:
        """The program after each pass, with seconds."""
        return self.programs.current().passes

    @property
    def program_hash(self) -> str:
        """sha256 of the program's text."""
        return self.programs.current().digest

    @property
    def instances_checked(self) -> int:
        return self.programs.current().instances

    @property
    def counted_peak_bytes(self) -> Sequence[Mapping[str, int]]:
        """Of each hosted rank the most bytes that were live in a step so far, ``{"rank", "device", "host"}``, where memory is counted."""
        return [{"rank": a.rank, "device": a.peak, "host": a.host_peak} for a in self.host.arenas]

    def explain(self) -> Explanation:
        """What lies where, what is sent, what it costs."""
        built = self.programs.current()
        return explain(built.program, zero=self.plan.stage, seconds={p.name: p.seconds for p in built.passes})

    # state ----------------------------------------------------------------------------------------------------------

    @_together
    def state_dict(self, full: bool = True) -> dict[str, Tensor]:
        """Parameters and buffers in the model's own names, tied names included: whole tensors, or (``full=False``) as they lie:
        DTensors under a process group. Every rank must call it."""
        if not full or not self.states:
            return dict(self.model.state_dict())
        self._written()
        captured = self.programs.current().captured
        own = {key: self._whole((role, key)) for role, key in self.states[0].types if role in ("param", "buffer")}
        alias = captured.aliases
        return {name: own.get(alias.get(name, name), t) for name, t in self.model.state_dict(keep_vars=True).items()}

    @_together
    def optimizer_state(self) -> dict[str, Tensor]:
        """Optimizer state by ``slot/parameter`` (``"exp_avg/model.norm.weight"``), whole: ``optimizer.state`` is empty once the
        compiled step has taken it over. Every rank must call it."""
        return {key: self._whole((role, key)) for role, key in self.states[0].types if role == "state"} if self.states else {}

    @_together
    def save(self, dir: str | os.PathLike[str], *, extra: Any = None) -> None:
        """Write a checkpoint into the folder ``dir``, or in the place of the one that is there: that one stays until this is whole.

        Parameters, buffers, optimizer state and options, step count and seed; and ``extra``, plain data of the user's own (rank 0's is
        kept). Every rank writes its own part and must call it, with one folder that all of them see. Any plan loads it. Raises
        CheckpointError on every rank where one fails; training can go on.
        """
        self._written()
        checkpoint.save(self, dir, extra)

    @_together
    def save_pretrained(self, dir: str | os.PathLike[str], *, max_shard_size: int | str = "5GB") -> None:
        """Write parameters and buffers as safetensors files that ``from_pretrained`` of transformers and ``compile(weights=dir)`` read, with its
        configuration if the model has one. max_shard_size: bytes of a file, at most, unless one tensor has more. No rank holds the model; every rank
        must call it, with one folder that all of them see. Whole or not at all, as ``save``. Raises CheckpointError on every rank.
        """
        self._written()
        pretrained.save(self, dir, max_shard_size)

    @_together
    def load(self, dir: str | os.PathLike[str], *, optimizer: bool = True, cast: bool = False) -> Any:
        """Go on from the checkpoint in ``dir``, written under any plan, before the first batch or later; returns its ``extra``.

        optimizer: False takes parameters and buffers only. cast: allow another float dtype than it was saved in. Every file is checked
        first: raises CheckpointError where one is damaged or does not fit, and nothing is changed then. Every rank must call it.
        """
        self._shown = {}
        return checkpoint.load(self, dir, optimizer, cast)

    @_together
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Write whole tensors by the model's own names, the same on every rank, into parameters and buffers, whatever the plan; their
        dtypes are cast. Raises CheckpointError naming what is missing, unexpected or of another shape."""
        load_whole(self.model, self.host, self.states, state_dict)

    def _gradients(self, shown: Mapping[tuple[str, str], Tensor]) -> dict[str, Tensor]:
        """Of what a run returned the gradients, as wide as their parameters."""
        return {key: t.to(torch_dtype(self.states[0].types["param", key].dtype)) for (role, key), t in shown.items() if role == "grad"}

    def _whole(self, key: tuple[str, str]) -> Tensor:
        return self.host.whole([s.tensors.get(key) for s in self.states], self.states[0].types[key], self.states[0].homes[key])

    def _adopt(self, built: Built) -> None:
        """The first program decides where state lies; a later one finds it there."""
        first = not self.states
        parameters = dict(self.model.named_parameters())
        values: dict[tuple[str, str], Tensor] = {("param", k): t for k, t in parameters.items()}
        values |= {("buffer", k): t for k, t in self.model.named_buffers()}
        values |= {("state", k): s.existing for k, s in built.captured.state.items() if s.existing is not None}
        new = [i for i in built.program.inputs if i.role in ("param", "buffer", "state") and (first or (i.role, i.key) not in self.states[0].types)]
        waits = {key for r in self._resume for key in r.model}
        read = [(i.role, i.key) for i in new if self.weights is not None and (i.role, i.key) in self.weights.found and (i.role, i.key) not in waits]
        come = {*read, *waits}  # what has its values from files
        check_values(self.model, {(i.role, i.key): values[i.role, i.key] for i in new if (i.role, i.key) in values and (i.role, i.key) not in come})
        values = {key: t for key, t in values.items() if key not in come}
        changed = self.host.as_on_rank_0({f"{role} {key!r}": values[role, key] for role, key in ((i.role, i.key) for i in new) if (role, key) in values})
        if changed and self.host.first and not self._quiet:
            print(f"deepseed: ranks came with different values of {len(changed)} tensors, such as {changed[0]}; all take those of rank 0", file=sys.stderr)
        states = self.states or [State(self.mesh, c, self.host.device, disk=disk_of(self.plan.disk, self.plan.offload, self.mesh.rank(c))) for c in self.host.coordinates]
        stepped = {s.param for s in built.captured.state.values() if self.steps and not first and ("state", s.key) in self.states[0].types}
        for entry in new:
            value = values.get((entry.role, entry.key))
            for state in states:
                if value is not None:
                    state.put(entry, value.double() if self._widen and entry.role == "state" and value.is_floating_point() else value)
                elif (entry.role, entry.key) in come:
                    state.reserve(entry)
                else:
                    slot = built.captured.state[entry.key]
                    state.fill(entry, 1.0 if slot.slot == STARTED and slot.param in stepped else slot.fill)
        if self.weights is not None:
            self.weights.read(self.host, states, read)
        self.states, built.adopted = states, True
        self._fills |= {key: slot.fill for key, slot in built.captured.state.items()}
        built.captured = replace(  # the values are in the states now: no second copy
            built.captured, parameters={}, buffers={}, state={k: replace(slot, existing=None) for k, slot in built.captured.state.items()}
        )
        if any(i.role != "state" for i in new):
            self.host.bind(self.model, self.states, self.optimizer is None)
            leave(parameters, self.model)
        if come:
            self.host.settle(self.model, self.states)
        self._python |= {key: slot.python for key, slot in built.captured.state.items() if slot.python}
        for optimizer in listed(self.optimizer):
            take_over(optimizer, parameters, dict(self.model.named_parameters()), [i.key for i in new if i.role == "state"])
            if first:
                follow(optimizer, self.model, self.host, self.states, self._python)
        if first and self.backend != "simulate":
            accept_whole(self.model, self.states)
        checkpoint.resume(self)

    # programs -------------------------------------------------------------------------------------------------------

    def _find(self, batch: Any, want: Want, towards: Collection[str] = ()) -> Found:
        """The program for this batch, compiled if there is none yet, with its state stored."""
        if any(map(torch.is_autocast_enabled, {"cpu", self.host.device.type})):
            raise CompileError(
                "called inside of torch.autocast, which a compiled program does not ask for\n"
                "  fix: enter it in the model's forward or in loss_fn, where it is captured, or give the plan a word of precision: zero3+bf16"
            )
        found = self.programs.find(batch, want, towards)
        if not found.built.adopted and (self.weights is not None or self._resume or not any(p.is_meta for p in self.model.parameters())):
            self._adopt(found.built)
        if found.unchecked is not None and found.built.adopted:
            self._ready()
            self.programs.check_padding(found, self.states)
        return found

    def _written(self) -> None:
        """Before state is read: what an optimizer of the user's has written into the module goes to the ranks."""
        if self.states and self.optimizer is None:
            self._ready()

    def _ready(self) -> None:
        """Before a run: what was written into the module, or put in a tensor's place, goes to the ranks."""
        if self._places is None or self._places.structure is not self.programs.structure or self._places.count != len(self.states[0].types):
            self._places = Places(self.model, self.programs.structure, self.states)
        self._places.take_over(self.model, self.host, self.states)
        self.host.begin(self.model, self.states)

    def _run(self, found: Found, local: bool = False) -> dict[tuple[str, str], Tensor]:
        """One step; the returned outputs whole, by role and key. ``local``: what is split by rows over dp stays so."""
        results = self.host.run(found.built.executables, self._given(found))
        self._settle(found.built)
        return found.built.returned(self.host, results, local=local)

    def _given(self, found: Found) -> list[list[Tensor]]:
        """What each hosted rank's executable is called with, tangents aside."""
        built = found.built
        if not built.adopted:
            self._adopt(built)
        checkpoint.resume(self)  # where it failed before
        others: dict[tuple[str, str], Tensor] = {("batch", k): t for k, t in found.batch.items()}
        others |= {("constant", k): t for k, t in built.constants.items()}
        others |= {("hyper", k): torch.tensor(read(), dtype=torch.float64) for k, read in built.captured.hyper.items()}
        others["rng", "rng"] = torch.tensor([self.seed, self.steps], dtype=torch.int64)
        self._ready()
        check_disks(self.states, self.model)
        return [self._inputs(e, state, others, found.local) for e, state in zip(built.executables, self.states, strict=True)]

    def _settle(self, built: Built) -> None:
        """After a run: what it has written is shown in the module."""
        self.host.settle(self.model, self.states, [(o.role, o.key) for o in built.program.outputs if o.role in ("param", "buffer")])
        seal_disks(self.states, self.model)
        for write in built.captured.reads.writes:
            write.apply()

    def _inputs(self, e: Executable, state: State, others: Mapping[tuple[str, str], Tensor], local: bool) -> list[Tensor]:
        out = []
        for i in (i for i in e.inputs if i.role != "tangent"):
            if (stored := state.stored(i)) is not None:
                out.append(stored)
            else:
                x = others[i.role, i.key]
                type_ = i.type.laid(i.type.layout.with_(TIME, None))  # the source cuts its rows into microbatches
                type_ = replace(type_, shape=tuple(x.shape), layout=type_.layout.with_("dp", None)) if local and i.role == "batch" else type_
                part = shard(x, type_, self.mesh, state.coordinate)  # local rows are dp's part already
                part = part.clone() if self.host.arenas and part.nbytes < part.untyped_storage().nbytes() else part  # storages are counted, whole ones
                out.append(part if i.type.host else part.to(self.host.device))
        return out


class TrainStep(_Compiled):
    """``loss = step(batch)``: forward, backward, clipping and update, as one compiled program on every rank."""

    @_together
    def __call__(self, batch: Any) -> Tensor:
        """The global mean loss, a 0-d tensor on every rank. The model's parameters are updated."""
        self._shown = self._run(self._find(batch, "step"))
        self.steps += 1
        for optimizer in listed(self.optimizer):
            optimizer._opt_called = True  # type: ignore[attr-defined]  # LR schedulers look whether the optimizer stepped
        return self._shown["loss", "loss"]

    @_together
    def compile(self, example_batch: Any) -> TrainStep:
        """Compile for batches like this one, without a step."""
        self._find(example_batch, "step")
        return self

    @property
    def grad_norm(self) -> Tensor:
        """The global gradient norm of the latest step, before clipping; needs ``clip_grad_norm``."""
        if ("norm", "grad_norm") not in self._shown:
            raise CompileError("the gradient norm is computed only where it is needed\n  fix: compile(..., clip_grad_norm=...); float('inf') clips nothing")
        return self._shown["norm", "grad_norm"]

    def grads(self) -> dict[str, Tensor]:
        """The latest step's gradients before clipping, whole, by parameter (a verification's program has them)."""
        return self._gradients(self._shown)

    @property
    def loss_scale(self) -> float:
        """By what the next step multiplies the loss: 1.0 without loss scaling."""
        return self._scaling(SCALE, 1.0 if self._scale is None else self._scale.initial)

    @property
    def skipped(self) -> int:
        """How many steps changed nothing so far, because a gradient was not finite."""
        return int(self._scaling(SKIPPED, 0.0))

    def _scaling(self, key: str, start: float) -> float:
        """What the latest step left; before a first step what is stored, and then every rank must ask."""
        if ("norm", key) in self._shown:
            return float(self._shown["norm", key])
        stored = self.states and ("state", key) in self.states[0].types
        return float(self._whole(("state", key))) if stored else start


class Module(_Compiled, Drop):  # type: ignore[misc]  # state_dict and load_state_dict are of whole tensors
    """A compiled model without an optimizer: called as the model is, and ``loss.backward()`` goes through it. See docs/module.md."""

    def __init__(self, model: Any, plan: str, **options: Any) -> None:
        super().__init__(model, plan, **options)
        self._be(self.model)
        if self.plan.stage in (1, 2) and self.host.first and not self._quiet:
            print(f"deepseed: zero{self.plan.stage} shares nothing without optimizer=: the update is the user's own optimizer's; zero3 shares parameters, and with them its state", file=sys.stderr)

    @_together
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output in its own form: whole, or with ``batch="local"`` this rank's rows. With grad enabled, and a parameter or an argument that requires grad, it can be differentiated."""
        found, towards = self._search(batch := given(args, kwargs))
        captured, local = found.built.captured, self.programs.subject.local and self.mesh.sizes.get("dp", 1) > 1
        if local:
            check_rows(batch, found, self.mesh.sizes["dp"])
        if captured.differentiable:
            shown = apply(Pass(self.host, self.states, self.model, found.built, local), lambda: self._given(found), lambda: self._settle(found.built), towards)
        else:
            shown = {key: t for (role, key), t in self._run(found, local).items() if role == "output"}
        self.steps += 1
        return captured.rebuild_output(shown)

    def _search(self, batch: Any) -> tuple[Found, dict[str, Tensor]]:
        """The program of a call, and the arguments towards which it is differentiated."""
        towards = {key: t for key, t in tensors(batch).items() if t.requires_grad} if torch.is_grad_enabled() else {}
        through = bool(towards) or (torch.is_grad_enabled() and any(p.requires_grad for p in self.model.parameters()))
        return self._find(batch, "module" if through else "forward", towards), towards

    @_together
    def loss_and_grads(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The global mean loss and the whole gradient of every trainable parameter."""
        shown = self._run(self._find(batch, "loss_and_grads"))
        return shown["loss", "loss"], self._gradients(shown)

    @_together
    def compile(self, example_batch: Any) -> Module:  # type: ignore[override]
        """Compile what a call with a batch like this one (a mapping: keywords, a tuple: arguments) runs, without running it. Under a process
        group the parameters are DTensors from then on, for an optimizer."""
        self._search(example_batch if isinstance(example_batch, Mapping | tuple | list) else (example_batch,))
        return self
