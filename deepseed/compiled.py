"""What a compiled train step and a compiled module share: the plan on its ranks, the state, the programs by batch, and how one is run.

State belongs to the compiled model and not to a program: the first program decides where it lies, later ones find it there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn

from deepseed import checkpoint, graphs, out_of_range, pretrained
from deepseed.arguments import check_arguments
from deepseed.bucket import Bucket
from deepseed.build import Built, CompileError
from deepseed.capture.gradients import LossScale
from deepseed.capture.options import Optimizers, listed, read_options
from deepseed.capture.state import STARTED
from deepseed.differentiable import leave
from deepseed.explain import Explanation, explain
from deepseed.handover import accept_whole, follow, load_whole, take_over
from deepseed.idle import notes
from deepseed.ir.mesh import TIME, Mesh
from deepseed.ir.program import OWN_ROWS, Program
from deepseed.kernels import PYTHON, resolve
from deepseed.logs import at_step, say, warn
from deepseed.nonfinite import wanted
from deepseed.ops import torch_dtype
from deepseed.own_buffers import looked_at, written
from deepseed.own_rows import AXIS
from deepseed.ownership import Places
from deepseed.pipeline import Passed
from deepseed.places import device_of, place
from deepseed.precision import precision
from deepseed.programs import Found, LossFn, Programs, Subject, Wanted
from deepseed.runtime.arena import accounts
from deepseed.runtime.disk import disk_of
from deepseed.runtime.executable import Executable
from deepseed.runtime.simulate import Step
from deepseed.runtime.state import State, check_disks, seal_disks, shard
from deepseed.weights import check_values, open_weights

APART = 0x9E3779B1  # between the seeds of data-parallel ranks that have rows of their own
ALIVE: WeakSet[Compiled] = WeakSet()  # looked through by ``compiled_with``, and by nothing else
MOST_PROGRAMS = 16  # compiled programs that one model keeps by default
Self = TypeVar("Self", bound="Compiled")
P = ParamSpec("P")
R = TypeVar("R")


class Incompatible(NamedTuple):
    """As ``nn.Module.load_state_dict`` returns it."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def together(method: Callable[Concatenate[Self, P], R]) -> Callable[Concatenate[Self, P], R]:
    """Every rank makes this call; where one fails the others are told."""

    @wraps(method)
    def call(self: Self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with at_step(self.steps), self.host.together():
            return method(self, *args, **kwargs)

    return call


class Compiled:
    """What train step and module share: the plan on its ranks, the state, and the programs by batch."""

    whole = True  # a step is run as a whole, not called in halves by the user

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
        check_finite: bool | None = None,
        codegen: str = PYTHON,
        cuda_graphs: bool | str = False,
        widen: bool = False,
        grads: bool = False,
        quiet: bool = False,
    ) -> None:
        pads = (buckets,) if isinstance(buckets, Bucket) else tuple(buckets)
        check_arguments(model, plan, optimizer, clip_grad_norm, loss_scale, batch, max_programs, pads, self.whole)
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
        self._checks = wanted(check_finite)
        if self._checks and optimizer is not None and words["loss_scale"] is None:
            words = precision(self.plan, 1.0)  # a step whose gradients are not finite changes nothing: it can be run once more
        self._scale = words["loss_scale"]
        if self.host.first and not quiet:
            for note in notes(self.plan):
                say(note)
        self.weights = None if weights is None else open_weights(weights, self.model, self.host, quiet)
        self.steps = 0
        self.states: list[State] = []
        self.programs = Programs(Subject(self.model, optimizer, loss_fn, clip_grad_norm, words, seed, self.plan, self.host, batch == "local", widen, grads, quiet, pads, resolve(codegen, self.host.device), graphs.resolve(cuda_graphs, self.host)), max_programs)
        self._places: Places | None = None
        self._shown: Mapping[tuple[str, str], Tensor] = {}
        self._fills: dict[str, float] = {}  # what each slot of optimizer state holds before the first step
        self._resume: list[checkpoint.Resume] = []  # what is read of checkpoints once it is known which part each rank holds
        self._half: checkpoint.Half | None = None  # a load that failed while it overwrote values
        self._python: dict[str, Callable[[Any], int | float]] = {}  # state that the optimizer keeps as Python numbers: int or float
        self._settles: list[Callable[[], None]] = []  # each takes over what was done to the state of an optimizer
        self._apart: frozenset[str] = frozenset()  # buffers that each data-parallel rank has its own values of
        self._looked: dict[str, frozenset[str]] = {}  # by a program's digest, the buffers that must be alike before it runs
        ALIVE.add(self)

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
        return explain(built.program, zero=self.plan.stage, seconds=built.took, graphs=None if built.uncaptured is None else graphs.told(built.executables, built.uncaptured))

    # state ----------------------------------------------------------------------------------------------------------

    @together
    def state_dict(self, full: bool = True, *, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False) -> dict[str, Any]:
        """Parameters and buffers in the model's own names, tied names included: whole tensors, or (``full=False``) as they lie:
        DTensors under a process group. ``destination`` and ``prefix`` as a module around this one gives them. Every rank must call it."""
        found = dict(self.model.state_dict(keep_vars=True))
        if full and self.states:
            self._written()
            own = {key: self._whole((role, key)) for role, key in self.states[0].types if role in ("param", "buffer")}
            alias = self.programs.current().captured.aliases
            found = {name: own.get(alias.get(name, name), t) for name, t in found.items()}
        out = destination if destination is not None else {}
        out.update({prefix + name: t.detach() if isinstance(t, Tensor) and not keep_vars else t for name, t in found.items()})
        return out

    @together
    def optimizer_state(self) -> dict[str, Tensor]:
        """Optimizer state by ``slot/parameter`` (``"exp_avg/model.norm.weight"``), whole: ``optimizer.state`` is empty once the
        compiled step has taken it over. Every rank must call it."""
        checkpoint.check_whole(self)
        self._take_state()
        return {key: self._whole((role, key)) for role, key in self.states[0].types if role == "state"} if self.states else {}

    @together
    def whole_parameter(self, name: str) -> Tensor:
        """A stored parameter, whole. Every rank must call it."""
        self._written()
        return self._whole(("param", name))

    @together
    def whole_state(self, slot: str, name: str) -> Tensor | None:
        """A parameter's optimizer state, whole; None where none is stored. Every rank must call it."""
        checkpoint.check_whole(self)
        key = ("state", f"{slot}/{name}")
        return self._whole(key) if self.states and key in self.states[0].types else None

    @together
    def save(self, dir: str | os.PathLike[str], *, extra: Any = None, frozen: bool = True) -> None:
        """Write a checkpoint into the folder ``dir``, or in the place of the one that is there: that one stays until this is whole.

        Parameters, buffers, optimizer state and options, step count and seed; and ``extra``, plain data of the user's own (rank 0's is
        kept). frozen: False leaves out parameters that are not trained, which a model that is loaded into then has already. Every rank writes its own part
        and must call it, with one folder that all of them see. Any plan loads it. Raises CheckpointError on every rank where one fails; training can go on.
        """
        self._written()
        checkpoint.save(self, dir, extra, frozen)

    @together
    def save_pretrained(self, dir: str | os.PathLike[str], *, max_shard_size: int | str = "5GB") -> None:
        """Write parameters and buffers as safetensors files that ``from_pretrained`` of transformers and ``compile(weights=dir)`` read, with its
        configuration if the model has one. max_shard_size: bytes of a file, at most, unless one tensor has more. No rank holds the model; every rank
        must call it, with one folder that all of them see. Whole or not at all, as ``save``. Raises CheckpointError on every rank.
        """
        self._written()
        pretrained.save(self, dir, max_shard_size)

    @together
    def load(self, dir: str | os.PathLike[str], *, optimizer: bool = True, cast: bool = False) -> Any:
        """Go on from the checkpoint in ``dir``, written under any plan, before the first batch or later; returns its ``extra``.

        optimizer: False takes parameters and buffers only. cast: allow another float dtype than it was saved in. Every file is checked
        first: raises CheckpointError where one is damaged or does not fit, and nothing is changed then. Every rank must call it.
        """
        return checkpoint.extra_of(self._restore(dir, optimizer, cast))

    def _restore(self, dir: str | os.PathLike[str], optimizer: bool = True, cast: bool = False, check: Callable[[Mapping[str, bytes]], None] = lambda _: None) -> dict[str, bytes]:
        """As ``load``; the texts of the checkpoint by name. ``check`` raises CheckpointError where these do not fit."""
        self._shown = {}
        return checkpoint.load(self, dir, optimizer, cast, check)

    @together
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Incompatible:
        """Write whole tensors by the model's own names, the same on every rank, into parameters and buffers, whatever the plan; their
        dtypes are cast. Raises CheckpointError naming what is missing or unexpected, unless ``strict=False`` returns it, or of another shape."""
        return Incompatible(*load_whole(self.model, self.host, self.states, state_dict, strict))

    def waits_for_state(self) -> bool:
        """Whether the program that has the optimizer's state is still to be compiled."""
        return False

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
            warn(f"ranks came with different values of {len(changed)} tensors, such as {changed[0]}; all take those of rank 0")
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
        if not self.steps:
            self._restart(built)
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
                self._settles.append(follow(optimizer, self.model, self.host, self.states, self._python, self._fills))
        if first and self.backend != "simulate":
            accept_whole(self.model, self.states)
        checkpoint.resume(self)

    def _restart(self, built: Built) -> None:
        """Before the first step: state that another option of the optimizer starts otherwise than the program that stored it."""
        for key, slot in built.captured.state.items():
            for state in (s for s in self.states if ("state", key) in s.tensors and self._fills.get(key, slot.fill) != slot.fill):
                stored = state.tensors["state", key]
                if bool((stored == self._fills[key]).all()):  # else it came with values of its own
                    stored.fill_(slot.fill)

    # programs -------------------------------------------------------------------------------------------------------

    def _find(self, batch: Any, want: Wanted, towards: Collection[str] = ()) -> Found:
        """The program for this batch, compiled if there is none yet, with its state stored."""
        if any(map(torch.is_autocast_enabled, {"cpu", self.host.device.type})):
            raise CompileError(
                "called inside of torch.autocast, which a compiled program does not ask for\n"
                "  fix: enter it in the model's forward or in loss_fn, where it is captured, or give the plan a word of precision: zero3+bf16"
            )
        checkpoint.check_whole(self)
        found = self.programs.find(batch, want, towards)
        if not found.built.adopted and (self.weights is not None or self._resume or not any(p.is_meta for p in self.model.parameters())):
            self._adopt(found.built)
        if found.unchecked is not None and found.built.adopted:
            self._ready()
            self.programs.check_padding(found, self.states)
        return found

    def _written(self) -> None:
        """Before state is read: it is of one checkpoint, what lies in files is whole, and what an optimizer of the user's has written into the module goes to the ranks."""
        checkpoint.check_whole(self)
        check_disks(self.states, self.model)
        self._take_state()
        if self.states and self.optimizer is None:
            self._ready()
        self._firsts(self._apart)

    def _take_state(self) -> None:
        for settle in self._settles:
            settle()

    def _firsts(self, looked: Collection[str]) -> None:
        """Buffers that somebody looks at become those of the first data-parallel rank."""
        if self._apart.intersection(looked):
            self.host.of_first(self.states, [("buffer", key) for key in sorted(self._apart)], AXIS)
            self._apart = frozenset()

    def _ready(self) -> None:
        """Before a run: what was written into the module, or put in a tensor's place, goes to the ranks."""
        if self._places is None or self._places.structure is not self.programs.structure or self._places.count != len(self.states[0].types):
            self._places = Places(self.model, self.programs.structure, self.states)
        self._places.take_over(self.model, self.host, self.states)
        self.host.begin(self.model, self.states)

    def _run(self, found: Found) -> dict[tuple[str, str], Tensor]:
        """One step; the returned outputs whole, by role and key."""
        return self._run_on(found, self._given(found))

    def _run_on(self, found: Found, given: list[list[Tensor]], steps: Sequence[Step] = ()) -> dict[tuple[str, str], Tensor]:
        """``steps``: what runs in the place of the executables."""
        with out_of_range.named(found.built, found.batch):
            results = self.host.run(steps or found.built.executables, given)
        self._settle(found.built)
        return found.built.returned(self.host, results)

    def _given(self, found: Found, pending: Sequence[Mapping[str, Tensor]] = ()) -> list[list[Tensor]]:
        """What each hosted rank's executable is called with, tangents aside. ``pending``: each rank's part of the gradients that an update takes."""
        built = found.built
        if not built.adopted:
            self._adopt(built)
        self._take_state()
        checkpoint.resume(self)  # where it failed before
        if self._apart:
            if built.digest not in self._looked:
                self._looked[built.digest] = looked_at(built.captured.program, OWN_ROWS in built.program.facts)
            self._firsts(self._looked[built.digest])
        others: dict[tuple[str, str], Tensor] = {("batch", k): t for k, t in found.batch.items()}
        others |= {("constant", k): t for k, t in built.constants.items()}
        others |= {("hyper", k): torch.tensor(value, dtype=torch.float64) for k, value in read_options(built.captured.hyper).items()}
        part = self.host.coordinates[0].get("dp", 0) if OWN_ROWS in built.program.facts else 0  # whose draws are its own, as its rows are
        others["rng", "rng"] = torch.tensor([self.seed + part * APART, self.steps], dtype=torch.int64)
        self._ready()
        check_disks(self.states, self.model)
        each = [{("pending", k): t for k, t in mine.items()} for mine in pending] or [{} for _ in self.states]
        return [self._inputs(e, state, others, mine, found.local) for e, state, mine in zip(built.executables, self.states, each, strict=True)]

    def _settle(self, built: Built) -> None:
        """After a run: what it has written is shown in the module."""
        self._apart |= written(built.program)
        self.host.settle(self.model, self.states, [(o.role, o.key) for o in built.program.outputs if o.role in ("param", "buffer")])
        seal_disks(self.states, self.model)
        for write in built.captured.reads.writes:
            write.apply()

    def _inputs(self, e: Executable, state: State, others: Mapping[tuple[str, str], Tensor], mine: Mapping[tuple[str, str], Tensor], local: bool) -> list[Tensor]:
        out = []
        for i in (i for i in e.inputs if i.role != "tangent"):
            if (stored := state.stored(i)) is not None:
                out.append(stored)
            elif (i.role, i.key) in mine:
                out.append(mine[i.role, i.key])
            else:
                x = others[i.role, i.key]
                type_ = i.type.laid(i.type.layout.with_(TIME, None))  # the source cuts its rows into microbatches
                type_ = replace(type_, shape=tuple(x.shape), layout=type_.layout.with_("dp", None)) if local and i.role == "batch" else type_
                part = shard(x, type_, self.mesh, state.coordinate)  # local rows are dp's part already
                part = part.clone() if self.host.arenas and part.nbytes < part.untyped_storage().nbytes() else part  # storages are counted, whole ones
                out.append(part if i.type.host else part.to(self.host.device))
        return out


def compiled_with(parameter: Tensor) -> tuple[Compiled, str] | None:
    """The compiled model whose ranks store this parameter, and its name there; None before the first batch."""
    for each in list(ALIVE):
        for name, p in each.model.named_parameters():
            if p is parameter and each.states and ("param", name) in each.states[0].types:
                return each, name
    return None
