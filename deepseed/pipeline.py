"""The compiler, read top to bottom: one visible tuple of passes, run in order, checked after each.

Flags change a pass's arguments (``arguments``), never the list. This is the only file that sees every pass.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from types import ModuleType
from typing import Any

from deepseed.check.instances import check_instances
from deepseed.check.own_rows import check_own_rows
from deepseed.check.translation import Numbering, check_localized, follow, number
from deepseed.check.typing import Typed, check_types
from deepseed.ir.contract import Pass
from deepseed.ir.layout import Layout
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Program
from deepseed.ir.verify import verify
from deepseed.passes.canonicalize import canonicalize
from deepseed.passes.chunk_rows import chunk_rows
from deepseed.passes.cut_stages import cut_stages
from deepseed.passes.group_kernels import group_kernels
from deepseed.passes.insert_reshards import insert_reshards
from deepseed.passes.localize import localize
from deepseed.passes.loop_microbatches import loop_microbatches
from deepseed.passes.lower_reshards import lower_reshards
from deepseed.passes.offload import offload
from deepseed.passes.offload_activations import offload_activations
from deepseed.passes.plan_memory import plan_memory
from deepseed.passes.schedule_collectives import schedule_collectives
from deepseed.passes.solve_placements import solve_placements
from deepseed.plan import Plan

PIPELINE: tuple[Pass, ...] = (
    canonicalize,
    solve_placements,
    insert_reshards,
    lower_reshards,
    plan_memory,
    chunk_rows,
    offload,
    loop_microbatches,
    cut_stages,
    offload_activations,
    schedule_collectives,
    group_kernels,
    localize,
)
SHARED, EACH_RANK = PIPELINE[:-1], PIPELINE[-1:]  # rank 0 runs the first part for all; the last one knows a coordinate
BY_NAME: Mapping[str, Pass] = {p.name: p for p in PIPELINE}


@dataclass(frozen=True)
class Passed:
    """A program after one pass, with how long the pass and its checks took."""

    name: str
    program: Program
    seconds: float
    check_seconds: float = 0.0
    instances: int = 0
    unproved: tuple[str, ...] = ()  # values whose new expression is too large to run beside the old one, or NaN on all operands: taken as equal


class CheckError(ValueError):
    """A check that failed after a pass: names the pass; the cause names node, module path, layouts and numbers."""


ONE_RANK = Plan()


def arguments(
    mesh: Mesh, zero: int, coordinate: Mapping[str, int], stored: Mapping[tuple[str, str], Layout] | None = None, plan: Plan = ONE_RANK,
    homes: Mapping[tuple[str, str], int] | None = None, hosted: Mapping[tuple[str, str], bool] | None = None, kernels: bool = False, products: str = "",
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """What a plan means, pass by pass. ``mesh``: the program's, with microbatches and without pipeline ranks; ``coordinate``: of a rank;
    ``plan``: for its stages and their schedule. ``stored``, ``homes`` and ``hosted``: layouts and stages of what an earlier program stores, and
    whether on the host; ``kernels``: whether a back end compiles groups of ops."""
    return {
        "solve_placements": {"mesh": mesh, "zero": zero, "stored": stored or {}},
        "lower_reshards": {"zero": zero},
        "plan_memory": {**({"saved": 0.0, "every": 1} if plan.remat else {}), **({"gathers": "once"} if zero in (1, 2) and "params" not in plan.offload else {})},
        "chunk_rows": {"chunks": plan.chunked},
        "offload": {"what": plan.offload, "stored": hosted or {}},
        "loop_microbatches": {"staged": plan.stages > 1, "confirmed": plan.bn == "exact"},
        "cut_stages": {"stages": plan.stages, "schedule": plan.kind, "chunks": plan.chunks, "pins": plan.cut, "stored": homes or {}},
        "offload_activations": {"wanted": "activations" in plan.offload},
        "group_kernels": {"kernels": kernels, "products": products},
        "localize": {"coordinate": coordinate},
    }


@contextmanager
def _no_collections() -> Iterator[None]:
    """Without Python's search for reference cycles: programs have none, and each search would visit all that the process holds, so that
    the time of a pass would grow with the square of a program's length."""
    paused = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if paused:
            gc.enable()


@_no_collections()
def run(
    p: Program,
    args: Mapping[str, Mapping[str, Any]],
    passes: Sequence[Pass] = PIPELINE,
    *,
    check: bool = True,
    on_pass: Callable[[Passed], None] | None = None,
) -> list[Passed]:
    """The program after each pass. With ``check``, every result is verified and typed, every value is the one that it was before the
    pass, and the last program, if it is lowered, is also checked instance by instance (deepseed.check): it is the one that runs. Where
    that fails, the first pass whose program fails is named."""
    done: list[Passed] = []
    began = perf_counter()
    numbering = number(p) if check and passes and "local" not in passes[0].provides else None
    first = perf_counter() - began
    typed = Typed()
    for each in passes:
        before, started = p, perf_counter()
        p = each(p, **args.get(each.name, {}))
        finished = perf_counter()
        instances, unproved = 0, tuple[str, ...]()
        if check:
            try:
                instances = check_program(p, each.name, execute=each is passes[-1], typed=typed)
            except CheckError:
                for earlier in done:
                    check_program(earlier.program, earlier.name)
                raise
            numbering = check_translation(before, p, each.name, numbering, args.get(each.name, {}))
            unproved = tuple(numbering.unproved) if numbering is not None else ()
        done.append(Passed(each.name, p, finished - started, perf_counter() - finished + first, instances, unproved))
        first = 0.0
        if on_pass is not None:
            on_pass(done[-1])
    return done


def check_translation(
    before: Program, p: Program, after: str, numbering: Numbering | None = None, args: Mapping[str, Any] | None = None
) -> Numbering | None:
    """Is every value of ``p`` what it was ``before`` the pass ``after``? The numbering of ``p``, for the check of the next pass; None once
    localized. ``numbering``: of ``before``, if it is known. ``args``: of the pass. Raises CheckError naming ``after``."""
    try:
        if "local" in p.facts and "local" not in before.facts:
            check_localized(before, p, (args or {}).get("coordinate", {}))
            return None
        return follow(numbering or number(before), p)
    except ValueError as error:
        raise CheckError(f"after pass {after}: {error}") from error


def check_program(p: Program, after: str, execute: bool = True, typed: Typed | None = None) -> int:
    """Verify, type and (when lowered, with ``execute``) run every distinct instance; the number of instances. ``typed``: what the programs
    before have shown. Raises CheckError naming ``after``."""
    try:
        verify(p)
        if "local" in p.facts:
            return 0  # arguments are one rank's now; the instances before were executed as each rank executes them
        if "placed" in p.facts:
            check_types(p, typed)
        if "lowered" in p.facts:
            check_own_rows(p)
        return check_instances(p) if execute and "lowered" in p.facts else 0
    except ValueError as error:
        raise CheckError(f"after pass {after}: {error}") from error


class _Door(ModuleType):
    """``deepseed.pipeline(model)`` is MII's call, beside this module of the same name."""

    def __call__(self, *args: Any, **said: Any) -> Any:
        from deepseed.inference.doors import pipeline

        return pipeline(*args, **said)


sys.modules[__name__].__class__ = _Door
