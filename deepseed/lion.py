"""Lion, which torch does not have: Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2."""

from __future__ import annotations

from typing import Any

import torch

from deepseed.closures import Stepping


class Lion(Stepping):
    """Moves each entry by ``lr``, in the direction of the sign of an interpolation between momentum and gradient; decay is decoupled.

    lr: of a sign, so a third to a tenth of AdamW's. betas: of that interpolation, and of the momentum that is kept. One state, ``exp_avg``.
    """

    def __init__(self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0) -> None:
        if lr < 0 or weight_decay < 0 or not all(0 <= b < 1 for b in betas):
            raise ValueError(f"lr={lr}, betas={betas}, weight_decay={weight_decay}: lr and weight_decay are 0 or more, betas from 0 to below 1")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def update(self) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if len(state) == 0:
                    state["exp_avg"] = torch.zeros_like(p)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(state["exp_avg"].mul(beta1).add(p.grad, alpha=1 - beta1).sign_(), alpha=-group["lr"])
                state["exp_avg"].mul_(beta2).add_(p.grad, alpha=1 - beta2)
