"""Does the compiled program mean what eager PyTorch means? Lock-step, in float64, for any plan on one machine.

The reference is never our captured program: it is the user's own module, loss, clipping and optimizers, run eagerly. On that
side a dispatch mode does two things only: it draws random numbers by the counter-based generator, and promotes casts of the
model and of its optimizers to float64 (Muon's bfloat16 too), so that the tolerance can be 1e-10. Entries that eager PyTorch
itself leaves to rounding are found as deepseed.noise says, counted in the report, and not compared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from deepseed import cost
from deepseed.api import TrainStep
from deepseed.bisect import Blame, diagnose
from deepseed.build import CompileError
from deepseed.capture.batch import rebuild, tensors
from deepseed.capture.eager import eager_reference
from deepseed.capture.options import Optimizers, listed
from deepseed.explain import matmul_flops
from deepseed.ir.program import Program
from deepseed.noise import undetermined

LOSS_TOLERANCE = 1e-12
TOLERANCE = 1e-10  # gradients and parameters, relative to the largest of the model: rounding of ~1e3 float64 additions

OptimizerFactory = Callable[[Sequence[nn.Parameter]], Optimizers]  # one, or a list of several


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
    unproved: int = 0  # expressions that the checks of the compile took as equal: too large to run, and not to be made smaller
    left_out: int = 0  # entries of parameters that the user's optimizer makes of rounding noise alone (deepseed.noise)
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
            + (f"  unproved    {self.unproved} expressions that passes wrote differently are too large to run on small operands\n" if self.unproved else "")
            + (f"  left out    {self.left_out} entries whose gradient is rounding noise, which the optimizer amplifies\n" if self.left_out else "")
            + f"  program     sha256 {self.program_hash[:16]}" + (f"\n  worst       {self.worst}\n  {self.blame}" if not self.ok else "")
        )


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
) -> VerifyReport:
    """Run ``steps`` training steps twice, eagerly and compiled under ``plan``, and compare losses, gradients and parameters.

    ``model`` and ``batch`` are copied, not changed. Each step sees the batch's rows rotated by one. With ``backend="gloo"``
    this is one rank's part: call it on every rank, under a launcher.
    """
    started = perf_counter()
    ours, theirs = _copied(model), _copied(model)
    batches = [_rotate(_widen(batch), step) for step in range(steps)]
    step = TrainStep(
        ours, plan, optimizer=_made(optimizer_factory, ours), loss_fn=loss_fn, clip_grad_norm=clip_grad_norm,
        world_size=world_size, backend=backend, seed=seed, widen=True, grads=True, quiet=True,
    )  # fmt: skip
    losses: list[float] = []
    grads: list[Mapping[str, Tensor]] = []
    norms: list[Mapping[str, Tensor]] = []
    for each in batches:
        losses.append(float(step(each)))
        grads.append(step.grads())
        norms.append({"the gradient norm": step.grad_norm} if clip_grad_norm is not None else {})
    state = step.state_dict()
    want_losses, want_grads, want_norms = _eager(theirs, batches, optimizer_factory, loss_fn, clip_grad_norm, seed)
    loss_error = max(abs(a - b) / max(abs(b), 1e-300) for a, b in zip(losses, want_losses, strict=True))
    grad_error, worst_grad = max(_compare(g, w) for g, w in zip([*grads, *norms], [*want_grads, *want_norms], strict=True))
    params = {name: p.detach() for name, p in theirs.named_parameters()}

    def train(other: nn.Module, given: Sequence[Mapping[str, Tensor]]) -> None:
        _train(other, given, optimizer_factory, clip_grad_norm)

    unclear = undetermined(_copied(model), params, want_grads, grads, train, TOLERANCE / 2)
    written = {o.key for o in step.program.outputs if o.role == "buffer"}  # running statistics and the like
    buffers = {name: b.double() for name, b in theirs.named_buffers() if name in written and name in state}
    have = {name: state[name].double() for name in (*params, *buffers)}
    have |= {name: torch.where(mask, params[name], have[name].to(mask.device)) for name, mask in unclear.items()}
    param_error, worst_param = max(_compare({name: have[name] for name in want}, want) for want in (params, buffers))
    ok = loss_error <= LOSS_TOLERANCE and grad_error <= TOLERANCE and param_error <= TOLERANCE
    return VerifyReport(
        bool(ok), str(step.plan), step.mesh.ranks, step.backend, steps, loss_error, grad_error, param_error,
        worst_grad if grad_error >= param_error else worst_param, step.instances_checked, step.program_hash, perf_counter() - started,
        _repeated(step.program), len(step.programs.current().unproved), sum(int(mask.sum()) for mask in unclear.values()), "" if ok else str(_blame(step, model, batches[-1], optimizer_factory, loss_fn, clip_grad_norm, seed)),
    )  # fmt: skip


def _copied(model: nn.Module) -> nn.Module:
    """A copy in float64; of a tensor that forward computed and left on a module (a weight under a norm) the value alone. Raises
    CompileError where the model cannot be copied."""
    computed = {id(t): t.detach().clone() for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor) and t.grad_fn is not None}
    try:
        return copy.deepcopy(model, computed).double()
    except RuntimeError as error:
        raise CompileError(
            f"{type(model).__name__} cannot be copied, and verify trains copies: {error}\n"
            "  fix: keep no computed tensor in a list or an object on a module"
        ) from error


def _repeated(p: Program) -> float:
    whole = sum(cost.flops(op, [p.types[r.name] for r in op.refs]) for op in p.ops)
    done = sum(matmul_flops(replace(p, mesh=p.mesh.seen_from(p.mesh.coordinate(rank)))) for rank in range(p.mesh.ranks))
    return max(0.0, 1 - whole / done) if done else 0.0


def _blame(
    step: TrainStep, model: nn.Module, batch: Any, factory: OptimizerFactory, loss_fn: Callable[..., Tensor] | None, clip: float | None, seed: int
) -> Blame:
    """Which pass, or what before or after them, makes one step from the start differ."""
    built = step.programs.current()
    eager = _copied(model)
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
    optimizers = _made(factory, model)
    losses: list[float] = []
    grads: list[dict[str, Tensor]] = []
    norms: list[dict[str, Tensor]] = []
    for number, batch in enumerate(batches):
        model.zero_grad()
        with eager_reference(model, rng=torch.tensor([seed, number]), widen=True):
            loss = _loss(model, batch, loss_fn)
            loss.backward()  # type: ignore[no-untyped-call]
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        norms.append({"the gradient norm": nn.utils.clip_grad_norm_(model.parameters(), clip)} if clip is not None else {})
        _update(model, optimizers)
        losses.append(float(loss.detach()))
    return losses, grads, norms


def _train(model: nn.Module, grads: Sequence[Mapping[str, Tensor]], factory: OptimizerFactory, clip: float | None) -> None:
    """The user's clipping and optimizers over given gradients."""
    optimizers = _made(factory, model)
    for given in grads:
        for name, p in model.named_parameters():
            p.grad = given[name].clone() if name in given else None
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        _update(model, optimizers)


def _made(factory: OptimizerFactory, model: nn.Module) -> Sequence[torch.optim.Optimizer]:
    """The optimizers of one side; what they make, and options that are tensors (a learning rate), in float64."""
    with eager_reference(model, widen=True):
        made = listed(factory(list(model.parameters())))
    for group in (group for optimizer in made for group in optimizer.param_groups):
        group.update({k: v.double() for k, v in group.items() if isinstance(v, Tensor) and v.is_floating_point()})
    return made


def _update(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    for optimizer in optimizers:
        with eager_reference(model, widen=True):
            optimizer.step()


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
