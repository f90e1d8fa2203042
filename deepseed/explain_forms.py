"""What explain counted, held against the closed forms of deepseed.closed_forms, row by row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from deepseed import closed_forms as form
from deepseed.ir.mesh import STAGES, Mesh, whole_axis

EXPERT_AXIS = "ep"
DATA_AXIS, SEQUENCE_AXIS = "dp", "sp"
BATCH_AXES = (DATA_AXIS, SEQUENCE_AXIS)  # they split the batch and share the state; weights are used whole on them


@dataclass(frozen=True)
class ClosedForm:
    what: str
    formula: str
    expected: float | None  # None: the formula has a symbol that a program does not tell
    counted: float
    unit: str


@dataclass(frozen=True)
class Sums:
    """Bytes and flops of a step: of one device (``whole_``), and of the mean rank. ``ranks``: their mesh; ``sent``: bytes by axis, ``sent_for_state`` those
    for weights, gradients and the update."""

    ranks: Mesh
    microbatches: int
    stages: int
    whole_params: int
    whole_grads: int
    whole_state: int
    used_params: int  # bytes of all parameters as forward and backward use them
    cast_params: tuple[int, int]  # bytes of the parameters that are used as a shorter cast only, and of the casts
    whole_flops: int
    params: float
    gathered: float
    grads: float
    state: float
    flops: float
    sent: Mapping[str, float]
    sent_for_state: Mapping[str, float]


def closed(s: Sums, zero: int) -> Iterable[ClosedForm]:
    """The rows of the table for ZeRO stage ``zero``."""
    axes = list(dict.fromkeys(map(whole_axis, s.ranks.names)))
    shared = [axis for axis in axes if axis in BATCH_AXES and s.ranks.size(axis) > 1]
    n = prod(s.ranks.size(axis) for axis in shared)
    known = {"Psi": s.whole_params, "G": s.whole_grads, "Omega": s.whole_state, "U": s.used_params, "N": n, "t": s.ranks.ranks // n, "F": s.whole_flops, "m": s.microbatches}
    one = s.whole_params == s.used_params == s.whole_grads
    cast, casts = s.cast_params
    known |= {"C": cast, "V": casts}
    once = bool(s.gathered) or not casts
    volume = form.data_volume(zero, s.microbatches > 1) if one else form.mixed_volume(zero, s.microbatches > 1, once)
    param_bytes = form.param_bytes(zero, form.Psi if cast == s.whole_params else form.C if cast else 0)
    gathered = form.gathered_bytes(zero) if casts and once else 0
    rows: list[tuple[str, Any, float, str]] = [
        ("parameters", param_bytes, s.params, "bytes"),
        *([("gathered once", gathered, s.gathered, "bytes")] if gathered else []),
        ("gradients", form.grad_bytes(zero), s.grads, "bytes"),
        ("optimizer", form.optimizer_bytes(zero), s.state, "bytes"),
        ("stored", param_bytes + gathered + form.grad_bytes(zero) + form.optimizer_bytes(zero), s.params + s.gathered + s.grads + s.state, "bytes"),
        ("matmuls", form.matmul_flops(), s.flops, "flops"),
    ]
    if SEQUENCE_AXIS in shared:
        rows.append((f"state, {', '.join(shared)}", volume, sum(s.sent_for_state.get(axis, 0) for axis in shared), "bytes"))
    elif shared:
        rows.append((f"sent over {DATA_AXIS}", volume, s.sent.get(DATA_AXIS, 0), "bytes"))
    for what, expression, counted, unit in rows:
        yield ClosedForm(what, str(expression), form.value(expression, **known), counted, unit)
    if SEQUENCE_AXIS in shared:
        activations = s.sent.get(SEQUENCE_AXIS, 0) - s.sent_for_state.get(SEQUENCE_AXIS, 0)
        yield ClosedForm(f"activations, {SEQUENCE_AXIS}", f"{form.sequence_volume()} elements", None, activations, "bytes")
    for axis in axes:
        if axis not in (*BATCH_AXES, EXPERT_AXIS):
            elements = form.stage_volume() if axis == STAGES else form.tensor_volume()
            yield ClosedForm(f"sent over {axis}", f"{elements} elements", None, s.sent.get(axis, 0), "bytes")
