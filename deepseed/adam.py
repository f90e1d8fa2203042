"""Adam whose averages are read as they are, without the correction for having begun at zero: DeepSpeed's ``"bias_correction": false``."""

from __future__ import annotations

from typing import Any

import torch

from deepseed.closures import Stepping


class UncorrectedAdam(Stepping):
    """``decoupled``: decay as AdamW's, else as a part of the gradient. State: ``exp_avg`` and ``exp_avg_sq``, no count of steps."""

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0, decoupled: bool = True) -> None:
        if lr < 0 or weight_decay < 0 or not all(0 <= b < 1 for b in betas):
            raise ValueError(f"lr={lr}, betas={betas}, weight_decay={weight_decay}: lr and weight_decay are 0 or more, betas from 0 to below 1")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "decoupled": decoupled})

    def update(self) -> None:
        for group in self.param_groups:
            (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if len(state) == 0:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                grad = p.grad if group["decoupled"] else p.grad.add(p, alpha=decay)
                state["exp_avg"].mul_(beta1).add_(grad, alpha=1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                if group["decoupled"]:
                    p.mul_(1 - lr * decay)
                p.add_(state["exp_avg"] / (state["exp_avg_sq"].sqrt() + group["eps"]), alpha=-lr)
