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
from deepseed.check.equivalence import Difference, difference
from deepseed.ir.program import Program
from deepseed.pipeline import Passed


@dataclass(frozen=True)
class Blame:
    """The pass (``capture`` and ``execution`` count as such) whose program is the first to compute other numbers."""

    name: str
    difference: Difference | None

    def __str__(self) -> str:
        return f"after pass {self.name}: {self.difference}" if self.difference is not None else _NO_PASS[self.name]


_NO_PASS = {
    "capture": "no pass: each computes what the captured program does, which differs from the model itself\n  fix: deepseed/capture, or an op of deepseed/ops",
    "execution": "no pass: each computes what the model does, but the ranks computed something else\n  fix: deepseed/codegen or deepseed/runtime",
}


def blame(captured: Program, passes: Sequence[Passed], inputs: Mapping[str, Tensor]) -> Blame | None:
    """The first of ``passes`` that changes what is computed from ``inputs`` (whole, by value name); None where no one does.

    Programs in float64 (``ir.widen``). What is localized is localized for every rank."""
    before, before_ranks = captured, list[Program]()
    shared = captured
    for each in passes:
        ranks: list[Program] = []
        if "local" in each.program.facts:
            mesh = each.program.mesh
            ranks = [pipeline.run(shared, pipeline.arguments(mesh, 0, mesh.coordinate(r)), pipeline.EACH_RANK, check=False)[-1].program for r in range(mesh.ranks)]
        found = difference(before, each.program, inputs, before_ranks=before_ranks, after_ranks=ranks)
        if found is not None:
            return Blame(each.name, found)
        before, before_ranks = each.program, ranks
        shared = shared if ranks else each.program
    return None


def inputs_of(built: Built, values: Mapping[tuple[str, str], Tensor], rng: Tensor) -> dict[str, Tensor]:
    """Whole inputs by value name: ``values`` (parameters, buffers, batch) by role and key, constants and hyper-parameters of the
    program, and optimizer state drawn positive, so that no part of an update hides behind a zero."""
    generator = torch.Generator().manual_seed(0)
    known = {**values, ("rng", "rng"): rng}
    known |= {("constant", key): t for key, t in built.constants.items()}
    known |= {("hyper", key): torch.tensor(read(), dtype=torch.float64) for key, read in built.captured.hyper.items()}
    out: dict[str, Tensor] = {}
    for i in built.program.inputs:
        if i.role != "state":
            out[i.name] = known[i.role, i.key]
        elif i.key.startswith(f"{STARTED}/") or not i.type.shape:
            out[i.name] = torch.full(i.type.shape, 1.0, dtype=torch.float64)
        else:
            out[i.name] = torch.rand(i.type.shape, generator=generator, dtype=torch.float64) * 0.01 + 1e-4
    return out
