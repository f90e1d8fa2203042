"""What stands between the backward's gradients and the update: the dtype in which they are reduced, the loss scale, clipping.

A gradient crosses into the update in the dtype in which it is reduced over ranks and added up over microbatches, and only there becomes
as wide as its parameter: what is sent and held is the narrow one. A cast before that border is a cast before the reduction, so the
border is the whole of the word ``grads(..)``. Unscaling and clipping are one factor of the update, and the sum of squares that clipping
needs also says whether any gradient overflowed: it is finite if and only if they all are (in 16 bits no square overflows float32).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deepseed.capture.convert import Emitter
from deepseed.capture.errors import CaptureError
from deepseed.capture.state import StateSlot
from deepseed.ir.program import FLOATS, ITEMSIZE, Output, Ref, Type

SCALE, GOOD, SKIPPED, PATIENCE = "loss_scale", "good_steps", "skipped_steps", "patience"  # keys of state
_F32, _BOOL = Type("f32", ()), Type("bool", ())


@dataclass(frozen=True)
class LossScale:
    """By what the loss is multiplied before the backward, so that small gradients are not zeros in 16 bits.

    After a step with a gradient that is not finite, parameters, buffers and optimizer state stay as they were and the scale is divided by
    ``factor``, but not below ``minimum``; after ``window`` good steps in a row it is multiplied by ``factor``. ``hysteresis``: how many
    such steps there must be since the scale last grew before it falls. ``window=0``: the scale never changes, steps are skipped all the same.
    Names and defaults are DeepSpeed's, but for ``hysteresis`` (2 there; 1 is what ``torch.amp.GradScaler`` does)."""

    initial: float = 2.0**16
    window: int = 1000
    factor: float = 2.0
    minimum: float = 1.0
    hysteresis: int = 1

    def __post_init__(self) -> None:
        wrong = (
            f"initial={self.initial!r}: a number above 0" if not 0 < self.initial < float("inf")
            else f"window={self.window!r}: a number of steps, or 0 for a scale that never changes" if self.window < 0 or self.window != int(self.window)
            else f"factor={self.factor!r}: a number above 1" if not 1 < self.factor < float("inf")
            else f"minimum={self.minimum!r}: a number above 0, at most initial={self.initial!r}" if self.window and not 0 < self.minimum <= self.initial
            else f"hysteresis={self.hysteresis!r}: 1 or more" if self.hysteresis < 1
            else ""
        )  # fmt: skip
        if wrong:
            raise ValueError(f"LossScale: {wrong}")

    @property
    def moves(self) -> bool:
        return self.window > 0

    def slots(self) -> list[StateSlot]:
        """The state that a step with this scale keeps."""
        fills = {SCALE: self.initial, GOOD: 0.0} if self.moves else {}
        fills |= {PATIENCE: float(self.hysteresis)} if self.moves and self.hysteresis > 1 else {}
        return [StateSlot("", key, _F32, fill, None, True) for key, fill in (fills | {SKIPPED: 0.0}).items()]


@dataclass(frozen=True)
class Ready:
    """Gradients as the backward leaves them, and what the update multiplies each with. ``overflow``: whether the update must be skipped."""

    narrow: Mapping[str, Ref]
    factor: Ref | None
    inverse: Ref | None  # of the loss scale
    overflow: Ref | None

    def of(self, e: Emitter, name: str, dtype: str) -> Ref:
        """The gradient of a parameter of ``dtype``, in its update."""
        e.phase, e.base = "update", f"{name}.grad"
        g = e.cast(self.narrow[name], dtype)
        out = g if self.factor is None else e.one("aten.mul.Tensor", (g, e.cast(self.factor, dtype)), e.type(g))
        e.base = ""
        return out

    def unless_skipped(self, e: Emitter, new: Ref, old: Ref, name: str) -> Ref:
        """What forward has written into, where the step is not one that changes nothing."""
        if self.overflow is None:
            return new
        e.phase, e.base = "update", f"{name}.kept"
        out = e.one("aten.where.self", (self.overflow, old, new), e.type(new))
        e.base = ""
        return out

    def unscaled(self, e: Emitter, name: str) -> Ref:
        """The gradient to be shown: not clipped; without a loss scale as narrow as it is."""
        if self.inverse is None:
            return self.narrow[name]
        e.phase, e.base = "update", f"{name}.grad"
        g = e.cast(self.narrow[name], e.type(self.inverse).dtype)
        return e.one("aten.mul.Tensor", (g, self.inverse), e.type(g))


def reduced(e: Emitter, gradients: Mapping[str, Ref], dtype: str | None) -> dict[str, Ref]:
    """Gradients in the dtype in which they are reduced. Raises CaptureError where that is narrower than one of them: a sum is rounded
    once, not its summands."""
    if dtype is None:
        return dict(gradients)
    e.phase = "backward"
    out = {}
    for name, g in gradients.items():
        own = e.type(g).dtype
        if own != dtype and ITEMSIZE[own] >= ITEMSIZE[dtype]:
            raise CaptureError(
                f"the gradient of {name!r} is made in {own}, and is to be reduced in {dtype}",
                fix="compute in that dtype too (a word of the plan such as bf16), or leave the word grads(..) out",
            )
        out[name] = e.cast(g, dtype) if own in FLOATS else g
    return out


def ready(
    e: Emitter, gradients: Mapping[str, Ref], clip: float | None, scale: LossScale | None, given: Mapping[str, Ref]
) -> tuple[Ready, list[Output]]:
    """The factor of the update, and what a step shows and keeps of norm and scale. ``given``: the inputs of state by key."""
    e.phase, e.base = "update", "clip"
    if (clip is None and scale is None) or not gradients:
        return Ready(gradients, None, None, None), []
    total = _sum_of_squares(e, list(gradients.values()))
    scalar, outputs = e.type(total), list[Output]()
    overflow: Ref | None = None
    inverse: Ref | None = None
    if scale is not None:
        overflow = e.one("aten.logical_not", (e.one("aten.isfinite", (total,), _BOOL),), _BOOL)
        now = given[SCALE] if scale.moves else e.full(scale.initial, _F32)
        inverse = e.cast(e.one("aten.reciprocal", (now,), _F32), scalar.dtype)
        outputs += _next_scale(e, scale, given, overflow)
    if clip is not None:
        norm = e.one("aten.sqrt", (total,), scalar)
        norm = norm if inverse is None else e.one("aten.mul.Tensor", (norm, inverse), scalar)
        share = e.one("aten.reciprocal", (e.one("aten.add.Tensor", (norm, 1e-6), scalar),), scalar)
        clipped = e.one("aten.clamp", (e.one("aten.mul.Tensor", (share, clip), scalar), None, 1.0), scalar)
        outputs.append(Output(norm, "norm", "grad_norm"))
        factor = clipped if inverse is None else e.one("aten.mul.Tensor", (clipped, inverse), scalar)
        return Ready(gradients, factor, inverse, overflow), outputs
    return Ready(gradients, inverse, inverse, overflow), outputs


def _sum_of_squares(e: Emitter, gradients: Sequence[Ref]) -> Ref:
    """Of all gradients: one scalar."""
    scalar = Type("f64" if any(e.type(g).dtype == "f64" for g in gradients) else "f32", ())
    total, *rest = [e.one("sum_of_squares", (g,), scalar) for g in gradients]
    for part in rest:
        total = e.one("aten.add.Tensor", (total, part), scalar)
    return total


def _next_scale(e: Emitter, s: LossScale, given: Mapping[str, Ref], overflow: Ref) -> list[Output]:
    """The state after the step: as DeepSpeed's DynamicLossScaler and torch's GradScaler have it."""
    new = {SKIPPED: e.one("aten.add.Tensor", (given[SKIPPED], e.cast(overflow, "f32")), _F32)}
    if s.moves:
        scale, zero = given[SCALE], e.full(0.0, _F32)
        good = e.one("aten.add.Tensor", (given[GOOD], 1.0), _F32)
        full = e.one("aten.ge.Scalar", (good, float(s.window)), _BOOL)
        larger = e.one("aten.mul.Tensor", (scale, s.factor), _F32)
        grows = e.one("aten.logical_and", (full, e.one("aten.isfinite", (larger,), _BOOL)), _BOOL)
        kept = e.one("aten.where.self", (grows, larger, scale), _F32)
        smaller = e.one("aten.clamp", (e.one("aten.mul.Tensor", (scale, 1.0 / s.factor), _F32), s.minimum, None), _F32)
        if PATIENCE in given:
            left = given[PATIENCE]
            smaller = e.one("aten.where.self", (e.one("aten.le.Scalar", (left, 1.0), _BOOL), smaller, scale), _F32)
            less = e.one("aten.clamp", (e.one("aten.sub.Tensor", (left, 1.0), _F32), 1.0, None), _F32)
            more = e.one("aten.where.self", (full, e.full(float(s.hysteresis), _F32), left), _F32)
            new[PATIENCE] = e.one("aten.where.self", (overflow, less, more), _F32)
        new[SCALE] = e.one("aten.where.self", (overflow, smaller, kept), _F32)
        new[GOOD] = e.one("aten.where.self", (e.one("aten.logical_or", (overflow, full), _BOOL), zero, good), _F32)
    shown = [Output(new[key], "norm", key) for key in (SCALE, SKIPPED) if key in new]
    return [*(Output(ref, "state", key) for key, ref in new.items()), *shown]
