"""The front door: ``step = deepseed.compile(model, plan="zero3+tp2", optimizer=opt)``, then ``loss = step(batch)``.

A compiled model captures, solves and checks at its first batch (or at ``example_batch``), once for each batch shape, each
value that the model reads out of a tensor, and each setting that is a fact of the program (``training``, ``requires_grad``, the
optimizer's options but ``lr``). Its parameters and optimizer state belong to it, not to one program: where the first program
stored them they stay. The state that the optimizer held moves to the step: ``step.optimizer_state()`` and ``optimizer.state_dict()``
give it from then on, ``optimizer.state`` is empty. There is no global state: two compiled models live in one process.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deepseed import out_of_range
from deepseed.bucket import Bucket
from deepseed.build import looked
from deepseed.capture.batch import given, tensors
from deepseed.capture.gradients import LossScale
from deepseed.capture.options import Optimizers
from deepseed.compiled import MOST_PROGRAMS, Compiled, together
from deepseed.differentiable import Drop, Pass, Pend, apply
from deepseed.kernels import known
from deepseed.logs import say
from deepseed.nonfinite import Kept, NonFinite
from deepseed.profiles import Profile
from deepseed.programs import Found, LossFn
from deepseed.ragged import cut_back
from deepseed.runtime.clock import Clock, Moment
from deepseed.runtime.simulate import Step
from deepseed.updating import Updating


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
    check_finite: bool | None = None,
    codegen: str = "python",
    cuda_graphs: bool | str = False,
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
    check_finite: after a step or backward whose loss or gradients are not finite, raise NonFiniteError naming the first node that made such a value, and
    change nothing (default: ``$DEEPSEED_NAN``). It reads the loss of each step; a step that is fine costs nothing else.
    codegen: what computes groups of ops that need no memory in between: ``"python"`` (one torch call an op), ``"cpp"`` (C++ for a CPU, one library
    a program, compiled in seconds and kept in the cache folder), ``"inductor"`` (C++ by torch's Inductor, in minutes), ``"triton"`` (kernels for a GPU), or ``"auto"``: on a CPU with a
    compiler ``"cpp"``, else ``"python"``.
    cuda_graphs: on a CUDA device, replay a rank's step as one graph from its third call on: ``"auto"`` where that can be, True: or raise GraphError; see docs/graphs.md.

    Raises PlanError, CaptureError, CompileError, PassError, CheckError, CheckpointError, GraphError.
    """
    known(codegen)
    common: dict[str, Any] = {
        "loss_fn": loss_fn, "clip_grad_norm": clip_grad_norm, "loss_scale": loss_scale, "world_size": world_size, "backend": backend, "dtype": dtype, "batch": batch, "seed": seed,
        "max_programs": max_programs, "buckets": buckets, "weights": weights, "device_memory": device_memory,
        "check_finite": check_finite, "codegen": codegen, "cuda_graphs": cuda_graphs,
    }  # fmt: skip
    compiled = TrainStep(model, plan, optimizer=optimizer, **common) if optimizer is not None else Module(model, plan, **common)
    if example_batch is not None:
        compiled.compile(example_batch)
    return compiled


class TrainStep(Updating):
    """``loss = step(batch)``: forward, backward, clipping and update, as one compiled program on every rank."""

    @together
    def __call__(self, batch: Any) -> Tensor:
        """The global mean loss, a 0-d tensor on every rank. The model's parameters are updated."""
        found = self._find(batch, "step")
        given = self._given(found)
        kept = Kept.of(found.built, self.host, given) if self._checks else None
        skipped = self.skipped if kept is not None else 0
        self._shown = self._run_on(found, given)
        if kept is not None:
            self._check(kept, skipped)
        self.steps += 1
        self._stepped()
        return self._shown["loss", "loss"]

    @together
    def compile(self, example_batch: Any) -> TrainStep:
        """Compile for batches like this one, without a step."""
        self._find(example_batch, "step")
        return self

    @together
    def loss(self, batch: Any) -> Tensor:
        """The global mean loss of a batch, in the modes that the model is in; no gradient is computed. Draws are those of the next step."""
        return self._run(self._find(batch, "loss"))["loss", "loss"]

    @together
    def find_nonfinite(self, batch: Any) -> NonFinite | None:
        """Which node of the step that this batch would make has the first value that is not finite; None where all are finite. Nothing is updated."""
        found = self._find(batch, "step")
        return Kept.of(found.built, self.host, self._given(found)).find()

    @together
    def profile(self, batch: Any) -> Profile:
        """A step, as a call makes it, with the time of each node, or group that a kernel computes, on each rank: ``print(step.profile(batch))``, ``.save("trace.json")``. What it compiles
        comes before the clock; the first run of a process is slower than those after it."""
        found = self._find(batch, "step")
        steps = looked(found.built, self.host, grouped=True)
        given, clocks = self._given(found), dict[int, Clock]()
        self._shown = self._run_on(found, given, [_timed(e, n, self.host.device, clocks) for n, e in enumerate(steps)])
        self.steps += 1
        self._stepped()
        said = [each for mine in self.host.everyone([(c.rank, c.began, c.moments(), dict(found.built.kernels[n])) for n, c in sorted(clocks.items())]) for each in mine]
        said.sort(key=lambda each: each[0])
        names = {mark: name for _, _, _, mine in reversed(said) for mark, name in mine.items()}
        return Profile(found.built.program, self.mesh, [[Moment(*m) for m in moments] for _, _, moments, _ in said], [began for _, began, _, _ in said], names)

    def grads(self) -> dict[str, Tensor]:
        """The latest step's gradients before clipping, whole, by parameter (a verification's program has them)."""
        return self._gradients(self._shown)


class Module(Compiled, Drop):  # type: ignore[misc]  # state_dict and load_state_dict are of whole tensors
    """A compiled model without an optimizer: called as the model is, and ``loss.backward()`` goes through it. See docs/module.md."""

    whole = False
    _pend: Pend | None = None

    def __init__(self, model: Any, plan: str, **options: Any) -> None:
        super().__init__(model, plan, **options)
        self._be(self.model)
        if self.optimizer is None and self.plan.stage in (1, 2) and self.host.first and not self._quiet:
            say(f"zero{self.plan.stage} shares nothing without optimizer=: the update is the user's own optimizer's; zero3 shares parameters, and with them its state")

    @together
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output in its own form: whole, or with ``batch="local"`` that of this rank's rows. With grad enabled, and a parameter or an argument that requires grad, it can be differentiated."""
        found, towards = self._search(given(args, kwargs))
        captured = found.built.captured
        if captured.differentiable:
            run = Pass(self.host, self.states, self.model, found.built, self._pend, self._checks, self._scale is not None and self._scale.moves)
            with out_of_range.named(found.built, found.batch):
                shown = apply(run, lambda: self._given(found), lambda: self._settle(found.built), towards)
        else:
            shown = {key: t for (role, key), t in self._run(found).items() if role == "output"}
        self.steps += 1
        return captured.rebuild_output(cut_back(shown, found.became) if found.became else shown)

    def _search(self, batch: Any) -> tuple[Found, dict[str, Tensor]]:
        """The program of a call, and the arguments towards which it is differentiated."""
        towards = {key: t for key, t in tensors(batch).items() if t.requires_grad} if torch.is_grad_enabled() else {}
        through = bool(towards) or (torch.is_grad_enabled() and any(p.requires_grad for p in self.model.parameters()))
        return self._find(batch, "module" if through else "forward", towards), towards

    @together
    def loss_and_grads(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The global mean loss and the whole gradient of every trainable parameter."""
        shown = self._run(self._find(batch, "loss_and_grads"))
        return shown["loss", "loss"], self._gradients(shown)

    @together
    def find_nonfinite(self, batch: Any) -> NonFinite | None:
        """Which node of ``loss_and_grads`` of this batch has the first value that is not finite; None where all are finite."""
        found = self._find(batch, "loss_and_grads")
        return Kept.of(found.built, self.host, self._given(found)).find()

    @together
    def compile(self, example_batch: Any) -> Module:  # type: ignore[override]
        """Compile what a call with a batch like this one (a mapping: keywords, a tuple: arguments) runs, without running it. Under a process
        group the parameters are DTensors from then on, for an optimizer."""
        self._search(example_batch if isinstance(example_batch, Mapping | tuple | list) else (example_batch,))
        return self


def _timed(run: Step, n: int, device: torch.device, clocks: dict[int, Clock]) -> Step:
    """The n-th hosted rank's step by the clock."""

    def step(rt: Any, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        rt.looks = clocks[n] = Clock(rt.rank, device)
        try:
            return run(rt, inputs)
        finally:
            rt.looks = None

    return step
