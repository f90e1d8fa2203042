"""What every optimizer of ours begins its step with: the closure that torch's interface allows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import optim


class Stepping(optim.Optimizer):
    """``step(closure)`` computes the loss again where there is a closure, then ``update()`` writes the parameters."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update()
        return loss

    def update(self) -> None:
        raise NotImplementedError
