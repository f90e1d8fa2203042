"""The front door: ``step = deepseed.compile(model, plan="zero3+tp2", optimizer=opt)``, then ``loss = step(batch)``.

A compiled model captures, solves and checks at its first batch (or at ``example_batch``), once for each batch shape, each
value that the model reads out of a tensor, and each setting that is a fact of the program (``training``, ``requires_grad``, the
optimizer's options but ``lr``). Its parameters and optimizer state belong to it, not to one program: where the first program
stored them they stay. The state that the optimizer held moves to the step: ``step.optimizer_state()`` and ``optimizer.state_dict()``
give it from then on, ``optimizer.state`` is empty. There is no global state: two compiled models live in one process.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from deepseed import ops
from deepseed.batches import check_mix_up, joined, said, times, unfit
from deepseed.build import Built, CompileError, build
from deepseed.capture import BatchSpec, Captured, CaptureError, capture
from deepseed.capture.batch import tensors
from deepseed.capture.guards import Guard
from deepseed.capture.optimizer import changed_options, fixed_options
from deepseed.capture.state import STARTED
from deepseed.capture.step import Want
from deepseed.explain import Explanation, explain
from deepseed.handover import follow, take_over
from deepseed.ir.layout import Layout
from deepseed.ir.program import Program
from deepseed.ir.widen import widen
from deepseed.pipeline import Passed
from deepseed.plan import Plan, parse_plan, with_dtype
from deepseed.runtime.host import BACKENDS, DistributedHost, Host, SimulatedHost, join, launched
from deepseed.runtime.state import State, shard

LossFn = Callable[[nn.Module, Any], Tensor]
MOST_PROGRAMS = 16  # batch shapes and guard values that one compiled model keeps programs for


def compile(
    model: Any,
    plan: str = "zero0",
    *,
    optimizer: torch.optim.Optimizer | None = None,
    loss_fn: LossFn | None = None,
    clip_grad_norm: float | None = None,
    example_batch: Any = None,
    world_size: int | None = None,
    backend: str | None = None,
    dtype: str | torch.dtype | None = None,
    batch: str = "global",
    seed: int = 0,
) -> TrainStep | Module:
    """Compile an unmodified model for a plan such as ``"zero3+tp2"``.

    With ``optimizer``: a ``TrainStep``; ``step(batch)`` does forward, backward, clipping and update, and returns the global
    mean loss. Without: a ``Module``; ``compiled(batch)`` runs the forward, ``compiled.loss_and_grads(batch)`` both.

    model: an ``nn.Module`` or a ``torch.export.ExportedProgram``. optimizer: over the model's parameters; its ``lr`` is read at
    every step, so schedulers work unchanged. loss_fn: ``loss_fn(model, batch)``, else the model's own ``.loss``.
    clip_grad_norm: global 2-norm. example_batch: compile now instead of at the first batch. world_size, backend: number of
    ranks and ``"simulate"`` (all ranks in this process), ``"gloo"`` or ``"nccl"``; by default what the launcher started, else
    simulate. dtype: the compute dtype, as the plan's ``bf16``. batch: ``"global"`` (every process is given the whole batch) or
    ``"local"`` (each data-parallel rank its own rows). seed: of dropout and other random ops.

    Raises PlanError, CaptureError, CompileError, PassError, CheckError.
    """
    common: dict[str, Any] = {
        "loss_fn": loss_fn, "clip_grad_norm": clip_grad_norm, "world_size": world_size, "backend": backend, "dtype": dtype, "batch": batch, "seed": seed
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
        optimizer: torch.optim.Optimizer | None = None,
        loss_fn: LossFn | None = None,
        clip_grad_norm: float | None = None,
        world_size: int | None = None,
        backend: str | None = None,
        dtype: str | torch.dtype | None = None,
        batch: str = "global",
        seed: int = 0,
        widen: bool = False,
        grads: bool = False,
        quiet: bool = False,
        captured: Captured | None = None,
    ) -> None:
        if not isinstance(plan, str):
            raise CompileError(f'plan={plan!r} is a {type(plan).__name__}\n  fix: a string such as "zero3+tp2"')
        if not isinstance(model, nn.Module | torch.export.ExportedProgram):
            raise CompileError(f"model is a {type(model).__name__}\n  fix: pass an nn.Module or a torch.export.ExportedProgram")
        if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
            raise CompileError(f"optimizer={optimizer!r} is no optimizer\n  fix: pass an instance over the model's parameters: torch.optim.AdamW(model.parameters())")
        if clip_grad_norm is not None and not (isinstance(clip_grad_norm, int | float) and clip_grad_norm > 0):
            raise CompileError(f"clip_grad_norm={clip_grad_norm!r}\n  fix: a number above 0, or None to clip nothing")
        if batch not in ("global", "local"):
            raise CompileError(f'batch={batch!r}\n  fix: batch="global" (the whole batch on every rank) or batch="local" (this rank\'s rows)')
        self.model: nn.Module = model.module() if isinstance(model, torch.export.ExportedProgram) else model
        self.optimizer, self.loss_fn, self.clip_grad_norm, self.seed = optimizer, loss_fn, clip_grad_norm, seed
        self.local, self._widen, self._grads, self._quiet = batch == "local", widen, grads, quiet
        self._given = captured if optimizer is None or not optimizer.state else None  # a copy of the model, as captured with the same settings before
        said = [("batch=", batch), ("clip_grad_norm", clip_grad_norm), ("seed", seed), ("optimizer", type(optimizer).__name__)]
        self.plan, self.host = _place(plan, dtype, world_size, backend, _device(self.model), quiet, said)
        self.mesh, self.backend = self.host.mesh, self.host.backend
        self.steps = 0
        self.states: list[State] = []
        self._built: dict[str, list[Built]] = {}
        self._latest: Built | None = None
        self._seen = 0
        self._moving: set[str] = set()  # optimizer options that have changed once: inputs of the programs compiled since
        self._stored: dict[tuple[str, str], Layout] = {}  # where parameters and state lie: as the first program with them had it
        self._shown: Mapping[tuple[str, str], Tensor] = {}

    # what it did ----------------------------------------------------------------------------------------------------

    @property
    def program(self) -> Program:
        """The program of the latest batch shape, as all ranks share it (before ``localize``)."""
        return self._current().program

    @property
    def passes(self) -> Sequence[Passed]:
        """The program after each pass, with seconds."""
        return self._current().passes

    @property
    def program_hash(self) -> str:
        """sha256 of the program's text."""
        return self._current().digest

    @property
    def instances_checked(self) -> int:
        return self._current().instances

    @property
    def captured(self) -> Captured:
        """What capture gave for the latest batch shape, less the values that the ranks have taken over."""
        return self._current().captured

    def explain(self) -> Explanation:
        """What lies where, what is sent, what it costs."""
        built = self._current()
        return explain(built.program, zero=self.plan.stage, seconds={p.name: p.seconds for p in built.passes})

    def _current(self) -> Built:
        if self._latest is None:
            raise CompileError("nothing is compiled yet\n  fix: call it with a batch first, or pass example_batch=")
        return self._latest

    # state ----------------------------------------------------------------------------------------------------------

    @_together
    def state_dict(self, full: bool = True) -> dict[str, Tensor]:
        """Parameters and buffers in the model's own names, tied names included: whole tensors, or (``full=False``) as they lie:
        DTensors under a process group. Every rank must call it."""
        if not full or not self.states:
            return dict(self.model.state_dict())
        captured = self._current().captured
        own = {key: self._whole((role, key)) for role, key in self.states[0].tensors if role in ("param", "buffer")}
        alias = captured.aliases
        return {name: own.get(alias.get(name, name), t) for name, t in self.model.state_dict(keep_vars=True).items()}

    @_together
    def optimizer_state(self) -> dict[str, Tensor]:
        """Optimizer state by ``slot/parameter`` (``"exp_avg/model.norm.weight"``), whole: ``optimizer.state`` is empty once the
        compiled step has taken it over. Every rank must call it."""
        return {key: self._whole((role, key)) for role, key in self.states[0].tensors if role == "state"} if self.states else {}

    def _whole(self, key: tuple[str, str]) -> Tensor:
        return self.host.whole([s.tensors[key] for s in self.states], self.states[0].types[key])

    def _adopt(self, built: Built) -> None:
        """The first program decides where state lies; a later one finds it there."""
        first = not self.states
        parameters = dict(self.model.named_parameters())
        values: dict[tuple[str, str], Tensor] = {("param", k): t for k, t in parameters.items()}
        values |= {("buffer", k): t for k, t in self.model.named_buffers()}
        values |= {("state", k): s.existing for k, s in built.captured.state.items() if s.existing is not None}
        new = [i for i in built.program.inputs if i.role in ("param", "buffer", "state") and (first or (i.role, i.key) not in self.states[0].tensors)]
        for role, key in ((i.role, i.key) for i in new):
            if (role, key) in values and values[role, key].is_meta:
                raise CompileError(
                    f"{ {'param': 'parameter', 'state': 'optimizer state'}.get(role, role)} {key!r} of {type(self.model).__name__} is on the meta device: "
                    "it has a shape and no values, so that nothing can be run\n"
                    "  fix: model.to_empty(device=...) and load or initialise its values, before the optimizer is made; explain() needs no values"
                )
        changed = self.host.as_on_rank_0({f"{role} {key!r}": values[role, key] for role, key in ((i.role, i.key) for i in new) if (role, key) in values})
        if changed and self.host.first and not self._quiet:
            print(f"deepseed: ranks came with different values of {len(changed)} tensors, such as {changed[0]}; all take those of rank 0", file=sys.stderr)
        states = self.states or [State(self.mesh, c, self.host.device) for c in self.host.coordinates]
        stepped = {s.param for s in built.captured.state.values() if self.steps and not first and ("state", s.key) in self.states[0].tensors}
        for entry in new:
            value = values.get((entry.role, entry.key))
            for state in states:
                if value is not None:
                    state.put(entry, _as(value, self._widen and entry.role == "state"))
                else:
                    slot = built.captured.state[entry.key]
                    state.fill(entry, 1.0 if slot.slot == STARTED and slot.param in stepped else slot.fill)
        self.states, built.adopted = states, True
        built.captured = replace(  # the values are in the states now: no second copy
            built.captured, parameters={}, buffers={}, state={k: replace(slot, existing=None) for k, slot in built.captured.state.items()}
        )
        if any(i.role != "state" for i in new):
            self.host.bind(self.model, self.states)
        if self.optimizer is not None:
            take_over(self.optimizer, parameters, dict(self.model.named_parameters()), [i.key for i in new if i.role == "state"])
            if first:
                follow(self.optimizer, self.model, self.host, self.states)

    # programs -------------------------------------------------------------------------------------------------------

    def _find(self, batch: Any, want: Want) -> tuple[Built, dict[str, Tensor], bool]:
        """The program for this batch, compiled if there is none yet; the batch by key; whether it is this rank's part only."""
        if not self._seen:
            check_mix_up(self.host, batch, self.local)
        self._seen += 1
        spec, settings = BatchSpec.of(batch), self._settings(want)
        if self.local and self._parts > 1:
            known = self._known(times(spec, self._parts), settings)
            if self.host.same(f"{spec} {settings}") and known and not known[0].captured.guards and self._fits(known[0]):
                self._latest = known[0]
                return known[0], spec.flatten(batch), True
            batch = joined(self.host, batch)
            spec = BatchSpec.of(batch)
        known = self._known(spec, settings)
        built: Built | None = None
        read: list[tuple[str, object]] = []
        for each in known:
            if self._fits(each):
                values = self._read(each, batch)
                read += [(f"the value that the model reads from the batch at {g.path or 'its top'}, {g.line}", v) for g, v in values]
                if all(v == g.value for g, v in values):
                    built = each
                    break
        modes, _, options = settings.partition(" optimizer=")
        self.host.agree([("batch", said(spec)), ("modes and trained parameters of the model", modes), ("the optimizer's options", options), *read])
        if built is None:
            built = self._compile(batch, want)
            known.append(built)
        self._latest = built
        return built, spec.flatten(batch), False

    def _settings(self, want: Want) -> str:
        """What beside the batch a program is made for: modes, what is trained, the optimizer's options."""
        modes = [m.training for m in self.model.modules()]
        trained = [p.requires_grad for p in self.model.parameters()] if want != "forward" else []
        digest = hashlib.sha256(bytes(modes) + b"/" + bytes(trained)).hexdigest()[:16]
        return f"{want} modes={digest}" + (f" optimizer={self._options(())}" if want == "step" else "")

    def _known(self, spec: BatchSpec, settings: str) -> list[Built]:
        return self._built.setdefault(f"{spec} {settings.partition(' optimizer=')[0]}", [])

    def _options(self, moved: Collection[str]) -> dict[str, Any]:
        return fixed_options(self.optimizer, moved) if self.optimizer is not None else {}

    def _fits(self, built: Built) -> bool:
        """Whether the optimizer's options are still those of the program."""
        return not built.captured.options or built.captured.options == self._options(built.captured.moved)

    @property
    def _parts(self) -> int:
        return self.mesh.sizes.get("dp", 1)

    def _read(self, built: Built, batch: Any) -> list[tuple[Guard, object]]:
        """What the program's guards give on this batch."""
        out: list[tuple[Guard, object]] = []
        given = {("batch", key): t for key, t in tensors(batch).items()} | {("constant", key): t for key, t in built.constants.items()}
        for guard in built.captured.guards:
            program = widen(guard.program) if self._widen else guard.program
            (value,) = ops.evaluate(program, {i.name: given[i.role, i.key].cpu() for i in program.inputs}).values()
            out.append((guard, value.item()))
        return out

    def _compile(self, batch: Any, want: Want) -> Built:
        count = sum(map(len, self._built.values()))
        if count >= MOST_PROGRAMS:
            raise CompileError(
                f"{count} programs are compiled for this model, which is the bound: one a batch shape, value read from a batch, mode and set of optimizer options\n"
                "  fix: pad batches to few shapes; change options of the optimizer other than lr seldom"
            )
        if want == "step" and self.optimizer is not None and self._latest is not None:
            self._moving |= changed_options(self.optimizer, self._latest.captured.options)
        if count and not self._quiet and self.host.first:
            print(f"deepseed: compiling program {count + 1}, for another batch shape, value, mode or optimizer option", file=sys.stderr)
        try:
            captured = self._given if self._given is not None and self._given.batch == BatchSpec.of(batch) and not count else capture(
                self.model, batch, loss_fn=self.loss_fn, optimizer=self.optimizer if want == "step" else None, clip_grad_norm=self.clip_grad_norm if want == "step" else None,
                want=want, grads=self._grads, seed=self.seed, compute=None if self.plan.dtype is None else ops.torch_dtype(self.plan.dtype),
                moving=self._moving,
            )  # fmt: skip
        except CaptureError:
            raise
        except Exception as error:  # the user's model or loss raised
            raise CompileError(unfit(type(self.model).__name__, batch, [each for built in self._built.values() for each in built], error)) from error
        built = build(captured, self.plan, self.host, stored=self._stored, wide=self._widen, quiet=self._quiet or not self.host.first)
        for i in built.program.inputs:
            if i.role in ("param", "buffer", "state"):
                self._stored.setdefault((i.role, i.key), i.type.layout)
        if not any(p.is_meta for p in self.model.parameters()):
            self._adopt(built)
        return built

    def _run(self, built: Built, batch: Mapping[str, Tensor], local: bool) -> dict[tuple[str, str], Tensor]:
        """One step; the returned outputs whole, by role and key. ``local``: the batch is this rank's part already."""
        if not built.adopted:
            self._adopt(built)
        others: dict[tuple[str, str], Tensor] = {("batch", k): t for k, t in batch.items()}
        others |= {("constant", k): t for k, t in built.constants.items()}
        others |= {("hyper", k): torch.tensor(read(), dtype=torch.float64) for k, read in built.captured.hyper.items()}
        others["rng", "rng"] = torch.tensor([self.seed, self.steps], dtype=torch.int64)
        self.host.begin(self.model, self.states)
        results = self.host.run(built.executables, [self._inputs(built.program, state, others, local) for state in self.states])
        self.host.settle(self.model, self.states)
        shown = [o for o in built.program.outputs if o.role not in ("param", "buffer", "state")]
        types = built.program.types
        return {(o.role, o.key): self.host.whole([r[n] for r in results], types[o.ref.name]) for n, o in enumerate(shown)}

    def _inputs(self, p: Program, state: State, others: Mapping[tuple[str, str], Tensor], local: bool) -> list[Tensor]:
        out = []
        for i in p.inputs:
            key = (i.role, i.key)
            if key in state.tensors:
                out.append(state.tensors[key])
            else:
                x = others[key].to(self.host.device)
                out.append(x if local and i.role == "batch" else shard(x, i.type, self.mesh, state.coordinate))
        return out


class TrainStep(_Compiled):
    """``loss = step(batch)``: forward, backward, clipping and update, as one compiled program on every rank."""

    @_together
    def __call__(self, batch: Any) -> Tensor:
        """The global mean loss, a 0-d tensor on every rank. The model's parameters are updated."""
        self._shown = self._run(*self._find(batch, "step"))
        self.steps += 1
        self.optimizer._opt_called = True  # type: ignore[union-attr]  # LR schedulers look whether the optimizer stepped
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
        return {key: t for (role, key), t in self._shown.items() if role == "grad"}


class Module(_Compiled):
    """A compiled model without an optimizer."""

    @_together
    def __call__(self, batch: Any) -> Any:
        """The model's output in its own form, whole, without gradients."""
        built, flat, local = self._find(batch, "forward")
        shown = self._run(built, flat, local)
        return built.captured.rebuild_output({key: t for (role, key), t in shown.items() if role == "output"})

    @_together
    def loss_and_grads(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The global mean loss and the whole gradient of every trainable parameter."""
        shown = self._run(*self._find(batch, "loss_and_grads"))
        return shown["loss", "loss"], {key: t for (role, key), t in shown.items() if role == "grad"}

    @_together
    def compile(self, example_batch: Any) -> Module:
        """Compile the forward for batches like this one, without running it."""
        self._find(example_batch, "forward")
        return self


def _place(
    plan: str, dtype: str | torch.dtype | None, ranks: int | None, backend: str | None, device: torch.device, quiet: bool,
    said: Sequence[tuple[str, object]],
) -> tuple[Plan, Host]:  # fmt: skip
    """The parsed plan and the ranks that it runs on. ``said``: what else every rank must say alike."""
    if backend not in (None, *BACKENDS):
        raise CompileError(f"unknown backend {backend!r}\n  fix: one of {', '.join(BACKENDS)}, or none: what the launcher started, else simulate")
    implied = backend is None and not launched()
    if implied or backend == "simulate":
        parsed = _parse(plan, dtype)
        if implied and not quiet and parsed.mesh(ranks).ranks > 1:
            print(f"deepseed: no launcher, no process group: simulating {parsed.mesh(ranks)} in this process", file=sys.stderr)
        return parsed.resolve(ranks), SimulatedHost(parsed.mesh(ranks), device)
    if not launched():
        raise CompileError(f"backend={backend!r} needs one process a rank\n  fix: start the script by `deepseed run script.py` or torchrun, or use backend=\"simulate\"")
    started = join(backend, [("plan", plan), ("dtype", str(dtype)), ("world_size", ranks), *said])
    if ranks is not None and ranks != started:
        raise CompileError(f"world_size={ranks}, but {started} processes were started\n  fix: leave world_size out, or start {ranks}")
    parsed = _parse(plan, dtype)
    return parsed.resolve(started), DistributedHost(parsed.mesh(started), backend)


def _parse(plan: str, dtype: str | torch.dtype | None) -> Plan:
    parsed = parse_plan(plan)
    return parsed if dtype is None else with_dtype(parsed, str(dtype).removeprefix("torch."))


def _device(model: nn.Module) -> torch.device:
    """Where simulated ranks run: on the device of the model's parameters; the CPU where these have no values."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def _as(t: Tensor, wide: bool) -> Tensor:
    return t.double() if wide and t.is_floating_point() else t
