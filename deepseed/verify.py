"""Does the compiled program mean what eager PyTorch means? Lock-step, in float64, for any plan on one machine.

The reference is never our captured program: it is the user's own module, loss, clipping and optimizers, run eagerly. On that
side a dispatch mode does two things only: it draws random numbers by the counter-based generator, and promotes casts of the
model and of its optimizers to float64 (Muon's bfloat16 too), so that the tolerance can be 1e-10. Entries that eager PyTorch
itself leaves to rounding are found as deepseed.noise says, counted in the report, and not compared.
"""

from __future__ import annotations

import copy
import os
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
from deepseed.capture.eager import Runs, eager_reference
from deepseed.capture.options import Optimizers, listed
from deepseed.counts import matmul_flops
from deepseed.explain_text import amount
from deepseed.ir.program import Program
from deepseed.meshes import data_ranks
from deepseed.noise import undetermined
from deepseed.rounding import growth

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
    growth: float = 0.0  # not 0: what rounding alone does to eager's own gradients, so that steps were compared one by one (deepseed.rounding)
    counted_peak_bytes: tuple[int, ...] = ()  # by rank, of its device's memory: counted while the steps ran (deepseed.runtime.arena)
    counted_host_bytes: tuple[int, ...] = ()
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
            + (f"  unproved    {self.unproved} expressions that passes wrote differently are too large to run on small operands, or NaN on all of these\n" if self.unproved else "")
            + (f"  left out    {self.left_out} entries whose gradient is rounding noise, which the optimizer amplifies\n" if self.left_out else "")
            + (f"  rounding    eager PyTorch off by a unit in the last place comes to {self.growth:.1e}: each step was compared from eager's parameters\n" if self.growth else "")
            + (f"  peak        {amount(max(self.counted_peak_bytes))} of a rank's device, counted" if self.counted_peak_bytes else "")
            + (f", {amount(max(self.counted_host_bytes))} of its host" if any(self.counted_host_bytes) else "") + ("\n" if self.counted_peak_bytes else "")
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
    codegen: str = "python",
    cuda_graphs: bool | str = False,
) -> VerifyReport:
    """Run ``steps`` training steps twice, eagerly and compiled under ``plan``, and compare losses, gradients and parameters.

    ``model`` and ``batch`` are copied, not changed. Each step sees the batch's rows rotated by one. With ``backend="gloo"``
    this is one rank's part: call it on every rank, under a launcher.
    """
    started = perf_counter()
    batches = [_rotate(_widen(batch), step) for step in range(steps)]

    runs: list[Runs | None] = [None]  # of the plan, once it is resolved

    def train(other: nn.Module, given: Sequence[Mapping[str, Tensor]]) -> None:
        _train(other, given, optimizer_factory, clip_grad_norm)

    def eager(other: nn.Module, each: Callable[[int], None] | None = None) -> _Run:
        return _eager(other, batches, optimizer_factory, loss_fn, clip_grad_norm, seed, each, runs[0])

    def trial(follow: bool) -> tuple[TrainStep, _Run, _Errors]:
        ours, theirs = _copied(model), _copied(model)
        step = TrainStep(
            ours, plan, optimizer=_made(optimizer_factory, ours), loss_fn=loss_fn, clip_grad_norm=clip_grad_norm,
            world_size=world_size, backend=backend, seed=seed, widen=True, grads=True, quiet=True,
            device_memory=os.environ.get("DEEPSEED_DEVICE_MEMORY") or "unlimited", codegen=codegen, cuda_graphs=cuda_graphs,
        )  # fmt: skip
        step.compile(batches[0])  # what cannot be captured is said before eager PyTorch stumbles over it
        runs[0] = _runs(step, batches[0])
        reached: list[Mapping[str, Tensor]] = []  # eager's parameters and buffers after each step
        want = eager(theirs, (lambda _: reached.append(_state(theirs))) if follow else None)
        _finite(want)
        have = _Run([], [], [])
        errors = _Errors()
        for n, each in enumerate(batches):
            if follow and n:
                _write(ours, reached[n - 1])
            have.losses.append(float(step(each)))
            have.grads.append(step.grads())
            have.norms.append({"the gradient norm": step.grad_norm} if clip_grad_norm is not None else {})
            if follow or n == steps - 1:
                upto = slice(0, n + 1)
                state = reached[n] if follow else _state(theirs)
                params = {name: state[name] for name, _ in theirs.named_parameters()}
                unclear = undetermined(_copied(model), params, want.grads[upto], have.grads[upto], train, TOLERANCE / 2)
                errors.left_out = sum(int(mask.sum()) for mask in unclear.values())
                errors.state(step, params, {name: b for name, b in state.items() if name not in params}, unclear)
        errors.steps(have, want)
        return step, want, errors

    step, _, errors = trial(follow=False)
    grown = 0.0
    if not errors.ok and step.backend == "simulate" and steps > 1:
        loss_growth, grad_growth = growth(_copied(model), lambda m: (lambda r: (r.losses, r.grads))(eager(m)), lambda a, b: _compare(a, b)[0])
        if loss_growth > LOSS_TOLERANCE or grad_growth > TOLERANCE:
            grown = grad_growth
            step, _, errors = trial(follow=True)
    return VerifyReport(
        errors.ok, str(step.plan), step.mesh.ranks, step.backend, steps, errors.loss, errors.grad, errors.param,
        errors.worst_grad if errors.grad >= errors.param else errors.worst_param, step.instances_checked, step.program_hash, perf_counter() - started,
        _repeated(step.program), len(step.programs.current().unproved), errors.left_out, grown,
        tuple(c["device"] for c in step.counted_peak_bytes), tuple(c["host"] for c in step.counted_peak_bytes),
        "" if errors.ok else str(_blame(step, model, batches[-1], optimizer_factory, loss_fn, clip_grad_norm, seed)),
    )  # fmt: skip


@dataclass
class _Run:
    """Losses, gradients before clipping and their norms, step by step."""

    losses: list[float]
    grads: list[Mapping[str, Tensor]]
    norms: list[Mapping[str, Tensor]]


@dataclass
class _Errors:
    """The largest relative errors so far, and where."""

    loss: float = 0.0
    grad: float = 0.0
    param: float = 0.0
    worst_grad: str = "no difference"
    worst_param: str = "no difference"
    left_out: int = 0

    @property
    def ok(self) -> bool:
        return bool(self.loss <= LOSS_TOLERANCE and self.grad <= TOLERANCE and self.param <= TOLERANCE)

    def steps(self, have: _Run, want: _Run) -> None:
        far = [abs(a - b) / max(abs(b), 1e-300) for a, b in zip(have.losses, want.losses, strict=True)]
        self.loss = max(x if x == x else float("inf") for x in far)
        self.grad, self.worst_grad = max(_compare(g, w) for g, w in zip([*have.grads, *have.norms], [*want.grads, *want.norms], strict=True))

    def state(self, step: TrainStep, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], unclear: Mapping[str, Tensor]) -> None:
        """What is stored after a step. Of the buffers, those that a step writes: running statistics and the like."""
        now = step.state_dict()
        written = {o.key for o in step.program.outputs if o.role == "buffer"}
        buffers = {name: b.double() for name, b in buffers.items() if name in written and name in now}
        have = {name: now[name].double() for name in (*params, *buffers)}
        have |= {name: torch.where(mask, params[name], have[name].to(mask.device)) for name, mask in unclear.items()}
        found = max(_compare({name: have[name] for name in want}, want) for want in (params, buffers))
        self.param, self.worst_param = max((self.param, self.worst_param), found)


def _finite(run: _Run) -> None:
    """Raises CompileError where eager PyTorch's own numbers are not finite: nothing can be equal to them."""
    for n, (loss, grads) in enumerate(zip(run.losses, run.grads, strict=True)):
        for what, x in (("loss", torch.tensor(loss)), *((f"gradient of {name}", g) for name, g in grads.items())):
            wrong = ~torch.isfinite(x.flatten())
            if bool(wrong.any()):
                at = int(wrong.to(torch.uint8).argmax())
                raise CompileError(
                    f"eager PyTorch's own {what} is not finite in step {n}: {int(wrong.sum())} of {x.numel()} elements, {float(x.flatten()[at])!r} at {at}. There is nothing to compare\n"
                    "  fix: another batch, or the model; compile(.., check_finite=True) or DEEPSEED_NAN=1 names the op that makes it"
                )


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in (*model.named_parameters(), *model.named_buffers())}


def _write(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give parameters and buffers these values, in place."""
    with torch.no_grad():
        for name, t in (*model.named_parameters(), *model.named_buffers()):
            t.copy_(state[name])


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


def _runs(step: TrainStep, batch: Any) -> Runs | None:
    """How ranks and microbatches share the rows, where the plan's batch norms depend on it."""
    if step.plan.bn != "local":
        return None
    counts = [len(t) for t in tensors(batch).values() if t.dim()]
    ranks = data_ranks(step.mesh)
    return Runs(ranks, step.plan.microbatches(max(1, max(set(counts), key=counts.count) // ranks)))


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
    run = _eager(eager, [batch], factory, loss_fn, clip, seed, runs=_runs(step, batch))
    want = {("loss", "loss"): torch.tensor(run.losses[0], dtype=torch.float64)} | {("grad", name): g for name, g in run.grads[0].items()}
    want |= {("norm", "grad_norm"): next(iter(run.norms[0].values()))} if run.norms[0] else {}
    want |= {("param", name): p.detach() for name, p in eager.named_parameters()}
    return diagnose(built, values, torch.tensor([seed, 0]), want)


def _eager(
    model: nn.Module, batches: Sequence[Any], factory: OptimizerFactory, loss_fn: Callable[..., Tensor] | None, clip: float | None, seed: int,
    each: Callable[[int], None] | None = None, runs: Runs | None = None,
) -> _Run:  # fmt: skip
    """The user's own training loop; ``each`` is called after each step."""
    optimizers = _made(factory, model)
    run = _Run([], [], [])
    for number, batch in enumerate(batches):
        model.zero_grad()
        with eager_reference(model, rng=torch.tensor([seed, number]), widen=True, runs=runs):
            loss = _loss(model, batch, loss_fn)
            loss.backward()  # type: ignore[no-untyped-call]
        run.grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        run.norms.append({"the gradient norm": nn.utils.clip_grad_norm_(model.parameters(), clip)} if clip is not None else {})
        _update(model, optimizers)
        run.losses.append(float(loss.detach()))
        if each is not None:
            each(number)
    return run


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
