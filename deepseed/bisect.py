"""Which part of the compiler changed the numbers? The captured program, every pass's and what the ranks ran, on the same inputs.

``verify`` asks when the compiled step differs from eager PyTorch. Each program is executed op by op on all ranks in float64
(``deepseed.check.execution``, which shares nothing with back end and runtime): the first pass whose program computes something
else than the one before it is at fault, and so is its first node with another value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseed import pipeline
from deepseed.build import Built
from deepseed.capture.state import STARTED
from deepseed.check.equivalence import TOLERANCE, Difference, difference
from deepseed.check.execution import execute
from deepseed.ir.program import Program
from deepseed.ops import torch_dtype
from deepseed.pipeline import Passed


@dataclass(frozen=True)
class Blame:
    """Who changed the numbers: ``after pass NAME``, or what comes before or after all passes; and how that shows."""

    who: str
    difference: Difference | str

    def __str__(self) -> str:
        return f"{self.who}: {self.difference}"


def diagnose(built: Built, values: Mapping[tuple[str, str], Tensor], rng: Tensor, eager: Mapping[tuple[str, str], Tensor]) -> Blame:
    """Why a compiled step differs from eager PyTorch: the first pass that changes the numbers, else capture, else what ran.

    ``values``: parameters, buffers and batch before a first step, whole and in float64, by role and key. ``eager``: outputs of
    that step (``loss``, ``grad``, ``param``) as eager PyTorch computes them."""
    captured = built.captured.program
    found = blame(captured, built.passes, inputs_of(built, values, rng))
    if found is not None:
        return found
    have = execute(captured, inputs_of(built, values, rng, first=True))
    largest = {role: max(float(x.abs().max()) for (r, _), x in eager.items() if r == role and x.numel()) or 1.0 for role, _ in eager}
    for o in captured.outputs:
        want = eager.get((o.role, o.key))
        if want is None or not want.numel():
            continue
        wrong = (have[o.ref.name][0] - want).abs().flatten()
        at = int(wrong.argmax())
        if not float(wrong[at]) <= TOLERANCE * largest[o.role]:
            op = captured.producers.get(o.ref.name)
            numbers = f"element {at} is {float(have[o.ref.name][0].flatten()[at])!r} as captured, {float(want.flatten()[at])!r} in eager PyTorch"
            made = f", %{o.ref.name}" + (f" = {op.target} at {op.path or 'the top level'}" + (f" ({op.line})" if op.line else "") if op else "")
            return Blame("capture", f"output {o.role} {o.key!r}{made}\n  {numbers}\n  no pass changes it: look at deepseed/capture and the ops in deepseed/ops")
    return Blame("execution", "capture and every pass compute what eager PyTorch does; the ranks ran something else\n  look at deepseed/codegen and deepseed/runtime")


def blame(captured: Program, passes: Sequence[Passed], inputs: Mapping[str, Tensor]) -> Blame | None:
    """The first of ``passes`` that changes what is computed from ``inputs`` (whole, by value name); None where no one does.

    Programs in float64 (``ir.widen``). What is localized is localized for every rank."""
    before, before_ranks = captured, list[Program]()
    shared = captured
    for each in passes:
        ranks: list[Program] = []
        if "local" in each.program.facts:
            if shared.schedule is not None:
                break  # each rank has ops of its own, which check_localized compared one by one
            mesh = each.program.mesh
            ranks = [pipeline.run(shared, pipeline.arguments(mesh, 0, mesh.coordinate(r)), pipeline.EACH_RANK, check=False)[-1].program for r in range(mesh.ranks)]
        found = difference(before, each.program, inputs, before_ranks=before_ranks, after_ranks=ranks)
        if found is not None:
            return Blame(f"after pass {each.name}", found)
        before, before_ranks = each.program, ranks
        shared = shared if ranks else each.program
    return None


def inputs_of(built: Built, values: Mapping[tuple[str, str], Tensor], rng: Tensor, *, first: bool = False) -> dict[str, Tensor]:
    """Whole inputs by value name: ``values`` (parameters, buffers, batch) by role and key, constants and hyper-parameters of the
    program, and optimizer state: drawn positive, so that no part of an update hides behind a zero, or (``first``) as before a first step."""
    generator = torch.Generator().manual_seed(0)
    known = {**values, ("rng", "rng"): rng}
    known |= {("constant", key): t for key, t in built.constants.items()}
    known |= {("hyper", key): torch.tensor(read(), dtype=torch.float64) for key, read in built.captured.hyper.items()}
    out: dict[str, Tensor] = {}
    for i in built.program.inputs:
        if i.role != "state":
            out[i.name] = known[i.role, i.key]
        elif first:
            out[i.name] = torch.full(i.type.shape, built.captured.state[i.key].fill, dtype=torch_dtype(i.type.dtype))
        elif i.key.startswith(f"{STARTED}/") or not i.type.shape:
            out[i.name] = torch.full(i.type.shape, 1.0, dtype=torch_dtype(i.type.dtype))
        else:
            out[i.name] = torch.rand(i.type.shape, generator=generator, dtype=torch.float64) * 0.01 + 1e-4
    return out
