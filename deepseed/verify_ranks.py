"""``verify`` on real ranks: processes started by torchrun's own launcher, each of which checks its part against eager PyTorch."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from deepseed.plan import parse_plan
from deepseed.runtime.errors import RankError
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
    tell: Callable[[int, VerifyReport], None] | None = None,
) -> VerifyReport:
    """``verify`` of a TARGET (``path/to/file.py:name`` or ``hf:ClassName``) with one process a rank on this machine.

    optimizer: of torch.optim, such as ``"sgd(momentum=0.9)"``; by default one like the target's, else AdamW. ``tell(rank, report)`` is called for each rank. Returns the report
    of the first rank that differs from eager PyTorch, else rank 0's. Call it from a script's ``if __name__ == "__main__":``.

    Raises PlanError, and RankError with what the first failing rank said.
    """
    ranks = parse_plan(plan).mesh(world_size).ranks
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=ranks, run_id=f"verify-{os.getpid()}", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0,
        start_method="spawn",
    )  # fmt: skip
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks share this machine
    try:
        got: dict[int, Any] = elastic_launch(config, _rank)(target, plan, backend, optimizer, clip_grad_norm, steps, seed, codegen)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise RankError(rank, f"rank {rank} of {ranks} failed: {failure.message}") from None
    finally:
        if threads is None:
            os.environ.pop("OMP_NUM_THREADS", None)
    reports: list[VerifyReport] = []
    for rank in range(ranks):
        if isinstance(got[rank], str):
            raise RankError(rank, f"rank {rank} of {ranks}: {got[rank]}")
        reports.append(got[rank])
        if tell is not None:
            tell(rank, got[rank])
    found = next((report for report in reports if not report.ok), reports[0])
    return replace(
        found, counted_peak_bytes=tuple(n for report in reports for n in report.counted_peak_bytes),
        counted_host_bytes=tuple(n for report in reports for n in report.counted_host_bytes),
    )  # fmt: skip


def _rank(target: str, plan: str, backend: str, optimizer: str | None, clip: float | None, steps: int, seed: int, codegen: str) -> VerifyReport | str:
    """One rank's report, or what it cannot do. All ranks of one mistake say the same, so that no launcher's log is in the way."""
    from deepseed.runtime.distributed import stop
    from deepseed.target import like, load, optimizer_factory

    try:
        found = load(target)
        said = optimizer_factory(optimizer or "adamw")
        factory: Any = like(found.optimizer, found.model) if optimizer is None and found.optimizer is not None else said
        return verify(
            found.model, found.batch, plan, optimizer_factory=factory, loss_fn=found.loss_fn, clip_grad_norm=clip, steps=steps, backend=backend, seed=seed, codegen=codegen
        )
    except (ValueError, RuntimeError) as error:
        if type(error).__module__.split(".")[0] != "deepseed":
            raise
        return f"{type(error).__name__}: {error}"
    finally:
        stop()
