"""What a command line asks for, as programs: a TARGET captured with its optimizer, and the passes over it under a plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from deepseed.batches import unfit
from deepseed.build import CompileError, prepared, run_passes, say_microbatches
from deepseed.capture import CaptureError, capture
from deepseed.explain import count_collectives
from deepseed.explain_text import amount
from deepseed.idle import notes
from deepseed.ir.contract import Pass
from deepseed.ir.mesh import TIME, Mesh
from deepseed.ir.program import Program
from deepseed.logs import say
from deepseed.machines import measured
from deepseed.pipeline import Passed
from deepseed.plan import Plan, parse_plan
from deepseed.precision import precision
from deepseed.speed import Machine
from deepseed.target import OptimizerFactory, Target, load, optimizer_factory, own_factory


def captured(target: str, plan: str, world_size: int | None, optimizer: str | None, clip: float | None) -> tuple[Program, Plan, Mesh, float]:
    """The captured step, the plan, the mesh of its ranks, and the seconds that it took."""
    parsed = parse_plan(plan)
    mesh = parsed.mesh(world_size)
    tell_notes(parsed, world_size)
    found = load(target, meta=True)
    factory = factory_of(found, optimizer)
    started = perf_counter()
    made = factory(list(found.model.parameters())) if factory else None
    with fitting(found, Exception):
        got = capture(found.model, found.batch, loss_fn=found.loss_fn, optimizer=made, clip_grad_norm=clip_of(found, clip) if factory else None, **precision(parsed))
    return got.program, parsed, mesh, perf_counter() - started


@contextmanager
def fitting(found: Target, kind: type[Exception] = IndexError) -> Iterator[None]:
    """Raises CompileError, with the batch, for errors of a kind: what the model or the loss raises where it is traced, or where it runs an index that is out of range."""
    try:
        yield
    except CaptureError:
        raise
    except kind as error:
        raise CompileError(unfit(type(found.model).__name__, found.batch, (), error)) from error


def passed(p: Program, plan: Plan, ranks: Mesh, seconds: float, passes: Sequence[Pass], check: bool, machine: Machine | None = None, kernels: bool = False, products: str = "") -> list[Passed]:
    """The program as captured (in ``seconds``) and after each pass, of rank 0 where one knows its rank."""
    say_microbatches(p, plan, ranks)
    p = prepared(p, plan, ranks)
    at = ranks.coordinate(0) if ranks.axes else {}
    return [Passed("capture", p, seconds), *run_passes(p, plan, ranks, at, check=check, passes=passes, machine=machine or measured(plan.mesh().ranks), tell=tell, kernels=kernels, products=products)]


def tell(line: str) -> None:
    say(line)


def tell_notes(plan: Plan, world_size: int | None) -> None:
    """What is legal but perhaps not what was meant."""
    for note in notes(plan.resolve(world_size)):
        tell(note)


def factory_of(found: Target, said: str | None) -> Any:
    """What --optimizer says, else one like the target's, else AdamW. None: no optimizer."""
    if said is None and found.optimizer is not None:
        return own_factory(found)
    factory: OptimizerFactory | None = optimizer_factory(said or "adamw")
    return factory


def clip_of(found: Target, said: float | None) -> float | None:
    value = said if said is not None else found.clip_grad_norm if found.clip_grad_norm is not None else 1.0
    return value or None


def passes_table(done: Sequence[Passed]) -> list[str]:
    """What each pass did to the number of ops, to collectives and to what they move; and how long it took."""
    lines = [f"{'pass':18}{'ops':>14}{'collectives':>14}{'moved/step':>17}{'time':>9}"]
    before = len(done[0].program.ops)
    for each in done:
        ops = len(each.program.ops)
        found = count_collectives(each.program, each.program.mesh.sizes.get(TIME, 1))
        moved = f"{amount(sum(c.bytes for c in found))}/rank" if found else "-"
        lines.append(f"{each.name:18}{f'{before} -> {ops}':>14}{sum(c.count for c in found):>14}{moved:>17}{each.seconds:>7.2f} s")
        before = ops
    left = [name for each in done for name in each.unproved]
    if left:
        lines.append(f"unproved: {len(left)} values that a pass wrote differently, too large to run on small operands or NaN on all of these, such as %{left[0]}")
    return lines
