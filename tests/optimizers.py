"""Optimizers for the equality matrix: torch's own with their options, and classes as users write them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn, optim

from deepseed.lion import Lion

Made = optim.Optimizer | list[optim.Optimizer]
Factory = Callable[[Sequence[nn.Parameter]], Made]


class SignSGD(optim.Optimizer):
    """No state at all."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(torch.sign(p.grad), alpha=-group["lr"])


class Lamb(optim.Optimizer):
    """Adam's direction scaled by each parameter's trust ratio; a Python int counts the steps."""

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
                state["step"] += 1
                m, v = state["exp_avg"], state["exp_avg_sq"]
                m.mul_(beta1).add_(p.grad, alpha=1 - beta1)
                v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                c1, c2 = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
                update = (m / c1) / ((v / c2).sqrt() + group["eps"]) + group["weight_decay"] * p
                size, length = p.norm(), update.norm()
                ratio = torch.where((size > 0) & (length > 0), size / length, torch.ones_like(size))
                p.add_(-group["lr"] * ratio * update)


class PlainAdam(optim.Optimizer):
    """Adam as in a tutorial: Python numbers, the bias correction folded into the step size by ``math.sqrt``."""

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                grad, state = p.grad.data, self.state[p]
                if len(state) == 0:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(p.data)
                    state["exp_avg_sq"] = torch.zeros_like(p.data)
                beta1, beta2 = group["betas"]
                state["step"] += 1
                state["exp_avg"].mul_(beta1).add_(grad, alpha=1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                denom = state["exp_avg_sq"].sqrt().add_(group["eps"])
                size = group["lr"] * math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
                p.data.addcdiv_(state["exp_avg"], denom, value=-size)
        return loss


class FactoredRms(optim.Optimizer):
    """Adafactor by hand: a matrix keeps the second moments of its rows and of its columns, a vector its own; clipped by its rms."""

    def __init__(self, params: Any, lr: float = 1e-2, eps: tuple[float, float] = (1e-30, 1e-3), decay: float = -0.8, clip: float = 1.0) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "decay": decay, "clip": clip})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            eps1, eps2 = group["eps"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    if p.dim() >= 2:
                        state["rows"] = torch.zeros(p.shape[:-1], dtype=p.dtype)
                        state["columns"] = torch.zeros(p.shape[:-2] + p.shape[-1:], dtype=p.dtype)
                    else:
                        state["squares"] = torch.zeros_like(p)
                state["step"] += 1
                kept = 1.0 - state["step"] ** group["decay"]
                squared = p.grad**2 + eps1
                if p.dim() >= 2:
                    rows, columns = state["rows"], state["columns"]
                    rows.mul_(kept).add_(squared.mean(dim=-1) * (1.0 - kept))
                    columns.mul_(kept).add_(squared.mean(dim=-2) * (1.0 - kept))
                    row = (rows / rows.mean(dim=-1, keepdim=True)).rsqrt_().unsqueeze(-1)
                    update = row * columns.rsqrt().unsqueeze(-2) * p.grad
                else:
                    state["squares"].mul_(kept).add_(squared * (1.0 - kept))
                    update = state["squares"].rsqrt() * p.grad
                rms = update.norm(2) / update.numel() ** 0.5
                update.div_((rms / group["clip"]).clamp(min=1.0))
                size = group["lr"] * (p.norm(2) / p.numel() ** 0.5).clamp(min=eps2)
                p.sub_(update * size)


def by_rank(matrices: Callable[[list[nn.Parameter]], optim.Optimizer], others: Callable[[list[nn.Parameter]], optim.Optimizer]) -> Factory:
    """Two optimizers: one of the matrices, one of the rest."""
    return lambda ps: [matrices([p for p in ps if p.dim() == 2]), others([p for p in ps if p.dim() != 2])]


def _grouped(parameters: Iterable[nn.Parameter]) -> optim.Optimizer:
    """No decay on vectors, and betas of their own."""
    ps = list(parameters)
    groups = [{"params": [p for p in ps if p.dim() >= 2], "weight_decay": 0.1}, {"params": [p for p in ps if p.dim() < 2], "weight_decay": 0.0, "lr": 3e-3, "betas": (0.8, 0.95)}]
    return optim.AdamW(groups, lr=1e-3)


def _adamw(ps: list[nn.Parameter]) -> optim.Optimizer:
    return optim.AdamW(ps, lr=1e-3)


STEPS = {"radam": 8}  # its other formula begins at the sixth step

FACTORIES: dict[str, Factory] = {
    "adamw": lambda ps: optim.AdamW(ps, lr=1e-3),
    "adamw amsgrad": lambda ps: optim.AdamW(ps, lr=1e-3, amsgrad=True),
    "adamw maximize": lambda ps: optim.AdamW(ps, lr=1e-3, maximize=True, weight_decay=0.3),
    "adamw foreach": lambda ps: optim.AdamW(ps, lr=1e-3, foreach=True),
    "adamw fused": lambda ps: optim.AdamW(ps, lr=1e-3, fused=True),
    "adamw tensor lr": lambda ps: optim.AdamW(ps, lr=torch.tensor(1e-3)),
    "adamw groups": _grouped,
    "adam": lambda ps: optim.Adam(ps, lr=1e-3),
    "adam options": lambda ps: optim.Adam(ps, lr=1e-3, amsgrad=True, weight_decay=0.1, maximize=True),
    "sgd": lambda ps: optim.SGD(ps, lr=1e-2),
    "sgd momentum": lambda ps: optim.SGD(ps, lr=1e-2, momentum=0.9, dampening=0.3, weight_decay=0.1),
    "sgd nesterov": lambda ps: optim.SGD(ps, lr=1e-2, momentum=0.9, nesterov=True, maximize=True),
    "adagrad": lambda ps: optim.Adagrad(ps, lr=1e-2, lr_decay=0.1, weight_decay=0.1, initial_accumulator_value=0.1),
    "rmsprop": lambda ps: optim.RMSprop(ps, lr=1e-3),
    "rmsprop centered": lambda ps: optim.RMSprop(ps, lr=1e-3, centered=True, momentum=0.9, weight_decay=0.1),
    "nadam": lambda ps: optim.NAdam(ps, lr=1e-3),
    "nadam decoupled": lambda ps: optim.NAdam(ps, lr=1e-3, weight_decay=0.1, decoupled_weight_decay=True),
    "radam": lambda ps: optim.RAdam(ps, lr=1e-3, betas=(0.9, 0.9)),
    "adadelta": lambda ps: optim.Adadelta(ps, lr=1.0, weight_decay=0.1),
    "adamax": lambda ps: optim.Adamax(ps, lr=1e-3, weight_decay=0.1),
    "asgd": lambda ps: optim.ASGD(ps, lr=1e-2, t0=1.0, weight_decay=0.1),
    "rprop": lambda ps: optim.Rprop(ps, lr=1e-3),
    "adafactor": lambda ps: optim.Adafactor(ps, lr=1e-2, weight_decay=0.1),
    "muon + adamw": by_rank(lambda ps: optim.Muon(ps, lr=1e-2), _adamw),
    "muon rms + sgd": by_rank(lambda ps: optim.Muon(ps, lr=1e-3, nesterov=False, adjust_lr_fn="match_rms_adamw"), lambda ps: optim.SGD(ps, lr=1e-2, momentum=0.9)),
    "lion": Lion,
    "sign sgd": SignSGD,
    "lamb": Lamb,
    "plain adam": PlainAdam,
    "factored rms": FactoredRms,
}
