"""What a compiled model with an optimizer shows of its latest update: the norm of the gradients, the loss scale, the steps that were skipped."""

from __future__ import annotations

from torch import Tensor

from deepseed.build import CompileError
from deepseed.capture.gradients import SCALE, SKIPPED
from deepseed.capture.options import listed
from deepseed.compiled import Compiled
from deepseed.nonfinite import Kept, finite


class Updating(Compiled):
    """A compiled model whose program updates its parameters."""

    @property
    def grad_norm(self) -> Tensor:
        """The global gradient norm of the latest step, before clipping; needs ``clip_grad_norm``."""
        if ("norm", "grad_norm") not in self._shown:
            raise CompileError("the gradient norm is computed only where it is needed\n  fix: compile(..., clip_grad_norm=...); float('inf') clips nothing")
        return self._shown["norm", "grad_norm"]

    @property
    def loss_scale(self) -> float:
        """By what the next step multiplies the loss: 1.0 without loss scaling."""
        return self._scaling(SCALE, 1.0 if self._scale is None else self._scale.initial)

    @property
    def skipped(self) -> int:
        """How many steps changed nothing so far, because a gradient was not finite."""
        return int(self._scaling(SKIPPED, 0.0))

    def _check(self, kept: Kept, skipped: int) -> None:
        """After a step that is checked. ``skipped``: how many steps were before it. Raises NonFiniteError."""
        loss = self._shown["loss", "loss"]
        fine = finite(iter([loss]))
        if not fine or self.skipped > skipped:
            expected = fine and self._scale is not None and self._scale.moves
            kept.report(f"step {self.steps}: " + ("a gradient is not finite" if fine else f"the loss is {float(loss)}") + ("; the scale of the loss falls" if expected else ""), expected)

    def _scaling(self, key: str, start: float) -> float:
        """What the latest step left; before a first step what is stored, and then every rank must ask."""
        if ("norm", key) in self._shown:
            return float(self._shown["norm", key])
        stored = self.states and ("state", key) in self.states[0].types
        return float(self._whole(("state", key))) if stored else start

    def _stepped(self) -> None:
        """LR schedulers look whether the optimizer stepped."""
        for optimizer in listed(self.optimizer):
            optimizer._opt_called = True  # type: ignore[attr-defined]
