"""``verify`` on real ranks: processes started by torchrun's own launcher, each of which checks its part against eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from deepseed.asked import factory_of, fitting
from deepseed.on_ranks import on_ranks
from deepseed.plan import parse_plan
from deepseed.target import load
from deepseed.verify import VerifyReport, verify


def verify_ranks(
    target: str,
    plan: str,
    *,
    world_size: int | None = None,
    backend: str = "gloo",
    optimizer: str | None = None,
    clip_grad_norm: float | None = 1.0,
    steps: int = 3,
    seed: int = 0,
    codegen: str = "python",
    cuda_graphs: bool = False,
    tell: Callable[[int, VerifyReport], None] | None = None,
) -> VerifyReport:
    """``verify`` of a TARGET (``path/to/file.py:name`` or ``hf:ClassName``) with one process a rank on this machine.

    optimizer: of torch.optim, such as ``"sgd(momentum=0.9)"``; by default one like the target's, else AdamW. ``tell(rank, report)`` is called for each rank. Returns the report
    of the first rank that differs from eager PyTorch, else rank 0's. Call it from a script's ``if __name__ == "__main__":``.

    Raises PlanError, and RankError with what the first failing rank said.
    """
    reports: list[VerifyReport] = on_ranks(_rank, parse_plan(plan).mesh(world_size).ranks, target, plan, backend, optimizer, clip_grad_norm, steps, seed, codegen, cuda_graphs)
    for rank, report in enumerate(reports):
        if tell is not None:
            tell(rank, report)
    found = next((report for report in reports if not report.ok), reports[0])
    return replace(
        found, counted_peak_bytes=tuple(n for report in reports for n in report.counted_peak_bytes),
        counted_host_bytes=tuple(n for report in reports for n in report.counted_host_bytes),
    )  # fmt: skip


def _rank(target: str, plan: str, backend: str, optimizer: str | None, clip: float | None, steps: int, seed: int, codegen: str, cuda_graphs: bool) -> VerifyReport:
    found = load(target)
    with fitting(found):
        return verify(found.model, found.batch, plan, optimizer_factory=factory_of(found, optimizer), loss_fn=found.loss_fn, clip_grad_norm=clip, steps=steps, backend=backend, seed=seed, codegen=codegen, cuda_graphs=cuda_graphs)
