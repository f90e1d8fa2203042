"""``capture_update``: the second half of a step that the user's own loop makes, gradients being there already.

Its inputs of role ``pending`` are gradients as the backward of a module leaves them: added up over as many backwards as the user
likes, and each rank's summand or its part of the sum, as that program's outputs of this role lie.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from deepseed.capture.attributes import Reads
from deepseed.capture.batch import DTYPES, BatchSpec
from deepseed.capture.convert import Emitter, kept_inputs, live
from deepseed.capture.gradients import LossScale, ready
from deepseed.capture.metadata import Where
from deepseed.capture.options import Optimizers
from deepseed.capture.step import Captured, aliases
from deepseed.capture.structure import Structure
from deepseed.capture.update import update
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Program, Type
from deepseed.ir.verify import verify


def capture_update(
    model: nn.Module,
    optimizer: Optimizers,
    pending: Mapping[str, torch.dtype],
    *,
    clip_grad_norm: float | None = None,
    loss_scale: LossScale | None = None,
    moving: Collection[str] = (),
    wide: bool = False,
    seed: int = 0,
) -> Captured:
    """Clipping and update as a Program. ``pending``: the parameters that have a gradient, and its dtype; the others are as in ``capture``. Raises CaptureError."""
    parameters = dict(model.named_parameters())
    e = Emitter(where=Where())
    start = {name: e.input(Type(DTYPES[parameters[name].dtype], tuple(parameters[name].shape)), "param", name) for name in pending}
    gradients = {name: e.input(Type(DTYPES[dtype], tuple(parameters[name].shape)), "pending", name) for name, dtype in pending.items()}
    slots = {slot.key: slot for slot in loss_scale.slots()} if loss_scale is not None else {}
    known = {key: e.input(slot.type, "state", key) for key, slot in slots.items()}
    final, outputs = ready(e, gradients, None if clip_grad_norm is None else float(clip_grad_norm), loss_scale, known)
    done = update(e, optimizer, parameters, start, final, moving, wide)
    outputs += done.outputs
    ops = live(e.ops, [o.ref for o in outputs])
    kept = {op.origin for op in ops}
    inputs = kept_inputs(e.inputs, ops, outputs, ("param", "pending"))
    program = Program("update", Mesh(()), inputs, ops, tuple(outputs), frozenset({"captured"}), tuple((k, o) for k, o in done.origins.items() if k in kept))
    return Captured(
        verify(program), {}, (), Reads(), Structure(model), BatchSpec({}, {}), parameters, aliases(model), {}, slots | done.state,
        done.hyper, done.options, done.moved, (), seed,
    )  # fmt: skip
