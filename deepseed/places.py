"""Where a plan runs: the ranks of this process (simulated), or its own among those that a launcher started."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from deepseed.build import CompileError
from deepseed.logs import say
from deepseed.plan import Plan, parse_plan, with_dtype
from deepseed.runtime.host import BACKENDS, DistributedHost, Host, SimulatedHost, join, launched


def place(
    plan: str, dtype: str | torch.dtype | None, ranks: int | None, backend: str | None, device: torch.device, quiet: bool,
    said: Sequence[tuple[str, object]],
) -> tuple[Plan, Host]:  # fmt: skip
    """The parsed plan and the ranks that it runs on. ``said``: what else every rank must say alike."""
    if backend not in (None, *BACKENDS):
        raise CompileError(f"unknown backend {backend!r}\n  fix: one of {', '.join(BACKENDS)}, or none: what the launcher started, else simulate")
    implied = backend is None and not launched()
    if implied or backend == "simulate":
        parsed = _parse(plan, dtype)
        if implied and not quiet and parsed.mesh(ranks).ranks > 1:
            say(f"no launcher, no process group: simulating {parsed.mesh(ranks)} in this process")
        return parsed.resolve(ranks), SimulatedHost(parsed.mesh(ranks), device)
    if not launched():
        raise CompileError(f"backend={backend!r} needs one process a rank\n  fix: start the script by `deepseed run script.py` or torchrun, or use backend=\"simulate\"")
    started = join(backend, [("plan", plan), ("dtype", str(dtype)), ("world_size", ranks), *said])
    if ranks is not None and ranks != started:
        raise CompileError(f"world_size={ranks}, but {started} processes were started\n  fix: leave world_size out, or start {ranks}")
    parsed = _parse(plan, dtype)
    return parsed.resolve(started), DistributedHost(parsed.mesh(started), backend)


def device_of(model: nn.Module) -> torch.device:
    """Where simulated ranks run: on the device of the model's parameters; the CPU where these have no values."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def _parse(plan: str, dtype: str | torch.dtype | None) -> Plan:
    parsed = parse_plan(plan)
    return parsed if dtype is None else with_dtype(parsed, str(dtype).removeprefix("torch."))
