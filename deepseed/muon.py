"""Muon for the matrices and AdamW for the rest, as one optimizer: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepseed.closures import Stepping

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
MUON: dict[str, Any] = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.0}
ADAM: dict[str, Any] = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.0}


class Muon(Stepping):
    """Groups with ``use_muon`` move along the orthogonalized momentum, the others are AdamW's; options that a group leaves out are ``MUON``'s and ``ADAM``'s."""

    def __init__(self, params: Any) -> None:
        groups = [g if isinstance(g, dict) else {"params": [g], "use_muon": g.dim() >= 2} for g in params]
        super().__init__([{**(MUON if g["use_muon"] else ADAM), **g} for g in groups], {})
        if wrong := [tuple(p.shape) for g in self.param_groups if g["use_muon"] for p in g["params"] if p.dim() < 2]:
            raise ValueError(f"Muon steps matrices, and a parameter has the shape {wrong[0]}\n  fix: use_muon = False on it")

    def update(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(self._muon(p, group) if group["use_muon"] else self._adam(p, group), alpha=-group["lr"])

    def _muon(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        state, grad = self.state[p], p.grad
        assert grad is not None
        if len(state) == 0:
            state["momentum_buffer"] = torch.zeros_like(p)
        state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
        update = grad.lerp(state["momentum_buffer"], group["momentum"])
        rows, columns = p.shape[0], p.numel() // p.shape[0]
        return orthogonalized(update.reshape(rows, columns)).to(p.dtype).reshape(p.shape) * float(max(1, rows / columns) ** 0.5)

    def _adam(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[p]
        if len(state) == 0:
            state["step"], state["exp_avg"], state["exp_avg_sq"] = 0, torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        state["exp_avg"].lerp_(p.grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
        mean, square = state["exp_avg"] / (1 - beta1 ** state["step"]), state["exp_avg_sq"] / (1 - beta2 ** state["step"])
        update: Tensor = mean / (square.sqrt() + group["eps"])
        return update


def orthogonalized(g: Tensor, steps: int = 5) -> Tensor:
    """Nearly U V' of ``g`` = U S V', by a quintic Newton-Schulz iteration in bfloat16."""
    a, b, c = COEFFICIENTS
    x: Tensor = g.bfloat16()
    if g.shape[0] > g.shape[1]:
        x = x.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    out: Tensor = x.T if g.shape[0] > g.shape[1] else x
    return out
