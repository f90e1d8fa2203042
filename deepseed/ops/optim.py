"""Fused optimizer updates as functions: torch's own kernels, on copies for the reference interpreter, in place where no kernel of ours can be compiled.

``optim.adamw(param, grad, state, .., lr, states=[..], options)``: results are the new parameter and each new state but ``step``,
which comes in counted up already. ``skip=``: nothing changes where it is true. ``scale=``: the gradient is multiplied by it first. These come behind
``lr`` among the operands, in that order. Options have the names of torch.optim's. A gradient may have fewer bits than its parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from deepseed.ir.updates import program_of
from deepseed.ir.widen import widen


def update(kind: str, operands: Sequence[Tensor], kw: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """``operands``: param, grad, states, lr. ``kind``: "adamw", "adam" or "sgd"."""
    more = [name for name in ("skip", "scale") if kw.get(name) is not None]
    each, (lr, *rest) = operands[: len(operands) - len(more) - 1], operands[len(operands) - len(more) - 1 :]
    states = tuple(kw.get("states", ()))
    param, grad, *old = (t.clone(memory_format=torch.contiguous_format) for t in each)
    in_place(kind, ("param", "grad", *states), ("lr", *more), kw)([param], [grad], *([s] for s in old), lr, *rest)
    return param, *(s for name, s in zip(states, old, strict=True) if name != "step")


def in_place(kind: str, each: Sequence[str], shared: Sequence[str], kw: Mapping[str, Any]) -> Callable[..., None]:
    """A function of a list for each of ``each`` ("param", "grad" and states), then of ``shared`` ("lr", "skip", "scale"): one tensor after another, so that one gradient is widened at a time."""
    one = _pointwise if kind == "pointwise" else partial(_one, kind)

    def call(*given: Any) -> None:
        numbers = dict(zip(shared, given[len(each) :], strict=True))
        for row in zip(*given[: len(each)], strict=True):
            one(dict(zip(each, row, strict=True)), numbers, kw)

    return call


def pointwise(operands: Sequence[Tensor], kw: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """The new values of an ``optim.pointwise`` (deepseed.ir.updates)."""
    from deepseed.ops import dtype_name, evaluate  # which know this op too

    dtypes = [dtype_name(x.dtype) for x in operands]
    p = program_of(kw, dtypes, tuple(operands[0].shape))
    p = p if p.types[p.outputs[0].ref.name].dtype == dtypes[0] else widen(p)  # checks compute in float64
    values = evaluate(p, dict(zip(kw["operands"], operands, strict=True)))
    return tuple([values[o.ref.name] for o in p.outputs])


def _pointwise(each: Mapping[str, Tensor], numbers: Mapping[str, Tensor], kw: Mapping[str, Any]) -> None:
    values = {**each, **numbers}
    for name, new in zip(kw["operands"], pointwise([values[name] for name in kw["operands"]], kw), strict=False):
        each[name].copy_(new)


def _one(kind: str, each: Mapping[str, Tensor], numbers: Mapping[str, Tensor], kw: Mapping[str, Any]) -> None:
    param, grad, lr = each["param"], each["grad"].to(each["param"].dtype), numbers["lr"]
    lr = lr.float() if lr.is_cuda else lr  # as its kernels read it
    if "scale" in numbers:
        grad = grad * numbers["scale"]
    found = {"found_inf": numbers["skip"].float()} if "skip" in numbers else {}
    states = {name: [s] for name, s in each.items() if name not in ("param", "grad")}
    decay, maximize = float(kw.get("weight_decay", 0)), bool(kw.get("maximize", False))
    if kind == "sgd":
        torch._fused_sgd_(
            [param], [grad], states.get("momentum_buffer", []), lr=lr, weight_decay=decay, momentum=float(kw.get("momentum", 0)),
            dampening=float(kw.get("dampening", 0)), nesterov=bool(kw.get("nesterov", False)), maximize=maximize, is_first_step=False, **found,
        )  # fmt: skip
    else:
        fused = torch._fused_adamw_ if kind == "adamw" else torch._fused_adam_
        beta1, beta2 = kw["betas"]
        fused(
            [param], [grad], states["exp_avg"], states["exp_avg_sq"], states.get("max_exp_avg_sq", []), [s.float() for s in states["step"]],
            lr=lr, beta1=float(beta1), beta2=float(beta2), weight_decay=decay, eps=float(kw["eps"]), amsgrad=bool(kw.get("amsgrad", False)),
            maximize=maximize, **found,
        )  # fmt: skip
