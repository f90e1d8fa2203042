"""The reference side of ``verify``: the user's own eager module, with DeepSeed's random draws and, on request, in float64.

    with eager_reference(model, rng=torch.tensor([seed, step])):
        loss = model(**batch).loss
        loss.backward()

One ``with`` a step: draws are named by module call, counted from the start of the step. No other op is touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from deepseed.capture.metadata import Tracker
from deepseed.capture.random import Draw, draw
from deepseed.capture.switches import switched
from deepseed.capture.trace import wide_default, widened


class _Eager(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, tracker: Tracker, draws: Draw | None, widen: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tracker, self.draws, self.widen = tracker, draws, widen

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        self.tracker.here()  # records which module call an autograd node belongs to
        if self.widen:
            args, kwargs = widened(args, kwargs)
        if self.draws is not None:
            drawn = draw(func, self.draws, args, kwargs)
            if drawn is not NotImplemented:
                return drawn
        return func(*args, **kwargs)


@contextmanager
def eager_reference(model: nn.Module, *, rng: Tensor | None = None, widen: bool = False) -> Iterator[None]:
    """Run ``model`` eagerly inside.

    ``rng`` i64[2] (seed, step): every draw is the one that the captured program makes; None: draws stay torch's own.
    ``widen``: where the model or its optimizer asks for a narrower float (a cast, a created tensor) it gets float64; parameters and batch
    are the caller's to widen.
    """
    tracker = Tracker(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    draws = None if rng is None else Draw(rng.to(device), tracker)
    with switched(model), tracker.on(), _Eager(tracker, draws, widen), wide_default(widen):
        yield
