"""Does the compiled program mean what eager PyTorch means? Lock-step, in float64, for any plan on one machine.

The reference is never our captured program: it is the user's own module, loss, clipping and optimizer, run eagerly. On that
side a dispatch mode does two things only: it draws random numbers by the counter-based generator, and promotes the model's
own float32 casts to float64, so that the tolerance can be 1e-10.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from deepseed import cost
from deepseed.api import TrainStep
from deepseed.bisect import Blame, diagnose
from deepseed.capture import Captured, capture
from deepseed.capture.batch import rebuild, tensors
from deepseed.capture.eager import eager_reference
from deepseed.explain import matmul_flops
from deepseed.ir.program import Program
from deepseed.plan import parse_plan

LOSS_TOLERANCE = 1e-12
TOLERANCE = 1e-10  # gradients and parameters, relative to the largest of the model: rounding of ~1e3 float64 additions

OptimizerFactory = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class VerifyReport:
    """Relative errors over all steps; ``worst`` names the parameter with the largest error and its two values."""

    ok: bool
    plan: str
    world_size: int
    backend: str
    steps: int
    loss_rel_error: float
    grad_max_rel_error: float
    param_max_rel_error: float
    worst: str
    instances_checked: int
    program_hash: str
    seconds: float
    repeated: float = 0.0  # of all ranks' matmul flops, the part that another rank computes too
    blame: str = ""  # where it differs: the pass, node and module path that changed the numbers (deepseed.bisect)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        verdict = "equal to eager PyTorch" if self.ok else "DIFFERS from eager PyTorch"
        return (
            f"{verdict}: {self.plan} on {self.world_size} ranks ({self.backend}), {self.steps} steps, float64, {self.seconds:.1f} s\n"
            f"  loss        {self.loss_rel_error:.1e}  (allowed {LOSS_TOLERANCE:.0e})\n"
            f"  gradients   {self.grad_max_rel_error:.1e}  (allowed {TOLERANCE:.0e}, of the largest gradient)\n"
            f"  parameters  {self.param_max_rel_error:.1e}  (allowed {TOLERANCE:.0e}, of the largest parameter)\n"
            f"  instances   {self.instances_checked} checked one by one\n"
            f"  program     sha256 {self.program_hash[:16]}" + (f"\n  worst       {self.worst}\n  {self.blame}" if not self.ok else "")
        )


@dataclass
class Shared:
    """What ``verify`` keeps for another plan of the same model, batch, optimizer and settings: the captured step, by compute
    dtype, and what eager PyTorch gave."""

    captured: dict[str | None, Captured] = field(default_factory=dict)
    eager: tuple[nn.Module, list[float], list[dict[str, Tensor]], list[dict[str, Tensor]]] | None = None


def share(
    model: nn.Module, batch: Any, *, optimizer_factory: OptimizerFactory, loss_fn: Callable[..., Tensor] | None = None, clip_grad_norm: float | None = 1.0, seed: int = 0
) -> Shared:
    """A Shared with the step captured as ``verify`` captures it, to be looked at before any plan is tried. Raises CaptureError."""
    ours = copy.deepcopy(model).double()
    optimizer = optimizer_factory(list(ours.parameters()))
    return Shared({None: capture(ours, _widen(batch), loss_fn=loss_fn, optimizer=optimizer, clip_grad_norm=clip_grad_norm, grads=True, seed=seed)})


def adamw(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def verify(
    model: nn.Module,
    batch: Any,
    plan: str,
    *,
    world_size: int | None = None,
    optimizer_factory: OptimizerFactory = adamw,
    loss_fn: Callable[..., Tensor] | None = None,
    clip_grad_norm: float | None = 1.0,
    steps: int = 3,
    backend: str | None = None,
    seed: int = 0,
    shared: Shared | None = None,
) -> VerifyReport:
    """Run ``steps`` training steps twice, eagerly and compiled under ``plan``, and compare losses, gradients and parameters.

    ``model`` and ``batch`` are copied, not changed. Each step sees the batch's rows rotated by one. With ``backend="gloo"``
    this is one rank's part: call it on every rank, under a launcher. ``shared``: give calls that differ only in the plan the
    same one, and the model is captured and run eagerly once.
    """
    started = perf_counter()
    shared = shared if shared is not None else Shared()
    ours = copy.deepcopy(model).double()
    batches = [_rotate(_widen(batch), step) for step in range(steps)]
    dtype = parse_plan(plan).dtype
    step = TrainStep(
        ours, plan, optimizer=optimizer_factory(list(ours.parameters())), loss_fn=loss_fn, clip_grad_norm=clip_grad_norm,
        world_size=world_size, backend=backend, seed=seed, widen=True, grads=True, quiet=True, captured=shared.captured.get(dtype),
    )  # fmt: skip
    shared.captured[dtype] = step.compile(batches[0]).captured
    losses: list[float] = []
    grads: list[Mapping[str, Tensor]] = []
    norms: list[Mapping[str, Tensor]] = []
    for each in batches:
        losses.append(float(step(each)))
        grads.append(step.grads())
        norms.append({"the gradient norm": step.grad_norm} if clip_grad_norm is not None else {})
    state = step.state_dict()
    if shared.eager is None:
        eager = copy.deepcopy(model).double()
        shared.eager = (eager, *_eager(eager, batches, optimizer_factory, loss_fn, clip_grad_norm, seed))
    theirs, want_losses, want_grads, want_norms = shared.eager
    loss_error = max(abs(a - b) / max(abs(b), 1e-300) for a, b in zip(losses, want_losses, strict=True))
    grad_error, worst_grad = max(_compare(g, w) for g, w in zip([*grads, *norms], [*want_grads, *want_norms], strict=True))
    params = {name: p.detach() for name, p in theirs.named_parameters()}
    written = {o.key for o in step.program.outputs if o.role == "buffer"}  # running statistics and the like
    buffers = {name: b.double() for name, b in theirs.named_buffers() if name in written and name in state}
    param_error, worst_param = max(_compare({name: state[name].double() for name in want}, want) for want in (params, buffers))
    ok = loss_error <= LOSS_TOLERANCE and grad_error <= TOLERANCE and param_error <= TOLERANCE
    return VerifyReport(
        bool(ok), str(step.plan), step.mesh.ranks, step.backend, steps, loss_error, grad_error, param_error,
        worst_grad if grad_error >= param_error else worst_param, step.instances_checked, step.program_hash, perf_counter() - started,
        _repeated(step.program), "" if ok else str(_blame(step, model, batches[-1], optimizer_factory, loss_fn, clip_grad_norm, seed)),
    )  # fmt: skip


def _repeated(p: Program) -> float:
    whole, local = sum(cost.flops(op, [p.types[r.name] for r in op.refs]) for op in p.ops), matmul_flops(p)
    return max(0.0, 1 - whole / (local * p.mesh.ranks)) if local else 0.0


def _blame(
    step: TrainStep, model: nn.Module, batch: Any, factory: OptimizerFactory, loss_fn: Callable[..., Tensor] | None, clip: float | None, seed: int
) -> Blame:
    """Which pass, or what before or after them, makes one step from the start differ."""
    built = step._current()
    eager = copy.deepcopy(model).double()
    values = {("param", name): p.detach().clone() for name, p in eager.named_parameters()}
    values |= {("buffer", name): b.clone() for name, b in eager.named_buffers()}
    values |= {("batch", key): t for key, t in built.captured.batch.flatten(batch).items()}
    losses, grads, norms = _eager(eager, [batch], factory, loss_fn, clip, seed)
    want = {("loss", "loss"): torch.tensor(losses[0], dtype=torch.float64)} | {("grad", name): g for name, g in grads[0].items()}
    want |= {("norm", "grad_norm"): next(iter(norms[0].values()))} if norms[0] else {}
    want |= {("param", name): p.detach() for name, p in eager.named_parameters()}
    return diagnose(built, values, torch.tensor([seed, 0]), want)


def _eager(
    model: nn.Module, batches: Sequence[Any], factory: OptimizerFactory, loss_fn: Callable[..., Tensor] | None, clip: float | None, seed: int
) -> tuple[list[float], list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """The user's own training loop. Losses and, per step, gradients before clipping and their norm."""
    optimizer = factory(list(model.parameters()))
    losses: list[float] = []
    grads: list[dict[str, Tensor]] = []
    norms: list[dict[str, Tensor]] = []
    for number, batch in enumerate(batches):
        optimizer.zero_grad()
        with eager_reference(model, rng=torch.tensor([seed, number]), widen=True):
            loss = _loss(model, batch, loss_fn)
            loss.backward()  # type: ignore[no-untyped-call]
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        norms.append({"the gradient norm": nn.utils.clip_grad_norm_(model.parameters(), clip)} if clip is not None else {})
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, grads, norms


def _loss(model: nn.Module, batch: Any, loss_fn: Callable[..., Tensor] | None) -> Tensor:
    if loss_fn is not None:
        return loss_fn(model, batch)
    out = model(**batch) if isinstance(batch, Mapping) else model(*batch) if isinstance(batch, tuple | list) else model(batch)
    loss: Tensor = out.loss if hasattr(out, "loss") else out["loss"] if isinstance(out, Mapping) else out
    return loss


def _compare(have: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest difference, relative to the largest value of the model, and where: some gradients are mathematically zero."""
    if set(have) != set(want):
        odd = sorted(set(have) ^ set(want))[0]
        return float("inf"), f"{odd}: only {'the compiled program' if odd in have else 'eager PyTorch'} has it"
    largest = max((float(w.abs().max()) for w in want.values() if w.numel()), default=0.0) or 1.0
    worst, where = 0.0, "no difference"
    for name, w in want.items():
        if not w.numel():
            continue
        if have[name].shape != w.shape:
            return float("inf"), f"{name}: shape {list(have[name].shape)}, eager {list(w.shape)}"
        difference = (have[name].cpu() - w.cpu()).abs().flatten()
        at = int(difference.argmax())
        error = float(difference[at]) / largest
        if not error <= worst:
            worst, where = error if error == error else float("inf"), f"{name}[{at}]: {float(have[name].flatten()[at])!r}, eager {float(w.flatten()[at])!r}"
    return worst, where


def _rotate(batch: Any, by: int) -> Any:
    return rebuild(batch, {key: t.roll(by, 0) if t.dim() else t for key, t in tensors(batch).items()})


def _widen(batch: Any) -> Any:
    return rebuild(batch, {key: t.double() for key, t in tensors(batch).items() if t.is_floating_point()})
