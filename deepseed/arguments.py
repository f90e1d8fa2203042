"""What ``deepseed.compile`` can be given: each argument is looked at before anything is made of it, and the error says what to give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from deepseed.bucket import Bucket
from deepseed.build import CompileError
from deepseed.capture.gradients import LossScale


def check_arguments(model: Any, plan: Any, optimizer: Any, clip_grad_norm: Any, loss_scale: Any, batch: Any, max_programs: Any, pads: Sequence[Any], whole: bool) -> None:
    """``whole``: a step is run as a whole. Raises CompileError."""
    if not isinstance(plan, str):
        raise CompileError(f'plan={plan!r} is a {type(plan).__name__}\n  fix: a string such as "zero3+tp2"')
    if not isinstance(model, nn.Module | torch.export.ExportedProgram):
        raise CompileError(f"model is a {type(model).__name__}\n  fix: pass an nn.Module or a torch.export.ExportedProgram")
    if not (optimizer is None or isinstance(optimizer, torch.optim.Optimizer) or _several(optimizer)):
        raise CompileError(
            f"optimizer={optimizer!r} is no optimizer\n  fix: pass an instance over the model's parameters: torch.optim.AdamW(model.parameters()); "
            "or a list of several, each over its own"
        )
    if clip_grad_norm is not None and not (isinstance(clip_grad_norm, int | float) and clip_grad_norm > 0):
        raise CompileError(f"clip_grad_norm={clip_grad_norm!r}\n  fix: a number above 0, or None to clip nothing")
    if loss_scale is not None and (optimizer is None or isinstance(loss_scale, bool) or not isinstance(loss_scale, LossScale | int | float)):
        raise CompileError(
            f"loss_scale={loss_scale!r}" + (" without an optimizer: gradients are returned as they are" if optimizer is None else "")
            + "\n  fix: a deepseed.LossScale, or a number that stays, for a step with an optimizer"
        )
    if batch not in ("global", "local"):
        raise CompileError(f'batch={batch!r}\n  fix: batch="global" (the whole batch on every rank) or batch="local" (this rank\'s rows)')
    if not isinstance(max_programs, int) or max_programs < 1:
        raise CompileError(f"max_programs={max_programs!r}\n  fix: a whole number of programs to keep, at least 1")
    if not all(isinstance(each, Bucket) for each in pads):
        raise CompileError(f"buckets={pads!r}\n  fix: a deepseed.Bucket, or several")
    if pads and batch == "local" and whole:
        raise CompileError('a step with buckets needs batch="global": ranks that pad their own rows would have to agree on lengths\n  fix: pad in the collate_fn, or batch="global"')
    if len(pads) > 1 and batch == "local":
        raise CompileError(f'{len(pads)} buckets for batch="local": ranks agree on their lengths entry by entry\n  fix: one Bucket with all fill values')


def _several(given: object) -> bool:
    return isinstance(given, Sequence) and bool(given) and all(isinstance(o, torch.optim.Optimizer) for o in given)
