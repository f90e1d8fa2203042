"""Fused optimizer updates as functions: torch's own kernels on copies, so that the reference interpreter can run them.

``optim.adamw(param, grad, state, .., lr, states=[..], options)``: results are the new parameter and each new state but ``step``,
which comes in counted up already. ``skip=``: nothing changes where it is true. ``scale=``: the gradient is multiplied by it first. These come behind
``lr`` among the operands, in that order. Options have the names of torch.optim's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def update(kind: str, operands: Sequence[Tensor], kw: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """``operands``: param, grad, states, lr. ``kind``: "adamw", "adam" or "sgd"."""
    more = [name for name in ("skip", "scale") if kw.get(name) is not None]
    behind = dict(zip(more, operands[len(operands) - len(more) :], strict=True))
    operands, scale, skip = operands[: len(operands) - len(more)], behind.get("scale"), behind.get("skip")
    param, grad, *old = (t.clone(memory_format=torch.contiguous_format) for t in operands[:-1])
    if scale is not None:
        grad.mul_(scale)
    found = {} if skip is None else {"found_inf": skip.float()}
    lr, states = operands[-1], {name: [t] for name, t in zip(kw.get("states", ()), old, strict=True)}
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
    return param, *(s for name, (s,) in states.items() if name != "step")
