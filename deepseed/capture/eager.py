"""The reference side of ``verify``: the user's own eager module, with DeepSeed's random draws and, on request, in float64.

    with eager_reference(model, rng=torch.tensor([seed, step])):
        loss = model(**batch).loss
        loss.backward()

One ``with`` a step: draws are named by module call, counted from the start of the step. No other op is touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from deepseed.capture.metadata import Tracker
from deepseed.capture.random import Draw, draw
from deepseed.capture.switches import switched
from deepseed.capture.trace import wide_default, widened


@dataclass(frozen=True)
class Runs:
    """Rows as data-parallel ranks and microbatches have them: microbatch i is the i-th of ``m`` parts of the rows of each of ``ranks``."""

    ranks: int
    m: int

    def batch_norm(self, func: Any, args: tuple[Any, ...]) -> Any:
        """A batch norm of training, or its backward, one microbatch after another; NotImplemented for another op."""
        if func is torch.ops.aten.native_batch_norm.default and args[5]:
            done = [func(args[0][rows], *args[1:]) for rows in self._rows(args[0])]
            return self._joined([d[0] for d in done]), torch.stack([d[1] for d in done]), torch.stack([d[2] for d in done])
        if func is torch.ops.aten.native_batch_norm_backward.default and args[7]:
            grad, x, *middle, mean, rstd = args[:7]
            done = [func(grad[rows], x[rows], *middle, mean[i], rstd[i], *args[7:]) for i, rows in enumerate(self._rows(x))]
            weights = [torch.stack([d[k] for d in done]).sum(0) if done[0][k] is not None else None for k in (1, 2)]
            return self._joined([d[0] for d in done]), *weights
        return NotImplemented

    def _rows(self, x: Tensor) -> list[Tensor]:
        rows = torch.arange(len(x), device=x.device).view(self.ranks, self.m, -1)
        return [rows[:, i].reshape(-1) for i in range(self.m)]

    def _joined(self, parts: list[Tensor]) -> Tensor | None:
        if parts[0] is None:
            return None
        whole = torch.cat(parts)
        return torch.empty_like(whole).index_copy_(0, torch.cat(self._rows(whole)), whole)


class _Eager(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, tracker: Tracker, draws: Draw | None, widen: bool, runs: Runs | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tracker, self.draws, self.widen, self.runs = tracker, draws, widen, runs

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        self.tracker.here()  # records which module call an autograd node belongs to
        if self.widen:
            args, kwargs = widened(args, kwargs)
        if self.draws is not None:
            drawn = draw(func, self.draws, args, kwargs)
            if drawn is not NotImplemented:
                return drawn
        if self.runs is not None and (normed := self.runs.batch_norm(func, args)) is not NotImplemented:
            return normed
        return func(*args, **kwargs)


@contextmanager
def eager_reference(model: nn.Module, *, rng: Tensor | None = None, widen: bool = False, runs: Runs | None = None) -> Iterator[None]:
    """Run ``model`` eagerly inside.

    ``rng`` i64[2] (seed, step): every draw is the one that the captured program makes; None: draws stay torch's own.
    ``widen``: where the model or its optimizer asks for a narrower float (a cast, a created tensor) it gets float64; parameters and batch
    are the caller's to widen. ``runs``: batch norms take the statistics of each microbatch, as a plan with ``bn(local)`` does.
    """
    tracker = Tracker(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    draws = None if rng is None else Draw(rng.to(device), tracker)
    with switched(model), tracker.on(), _Eager(tracker, draws, widen, runs), wide_default(widen):
        yield
