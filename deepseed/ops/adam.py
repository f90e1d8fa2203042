"""DeepSpeed's Adams by their names: torch's, with DeepSpeed's arguments and defaults.

There is no other kernel behind a name: the compiled update is fused, and runs on the host where the plan has the state there (``offload(optimizer)``)."""

from __future__ import annotations

from typing import Any

from torch.optim import Adam, AdamW, Optimizer

from deepseed.adam import UncorrectedAdam


def FusedAdam(
    params: Any, lr: float = 1e-3, bias_correction: bool = True, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, adam_w_mode: bool = True,
    weight_decay: float = 0.0, amsgrad: bool = False, set_grad_none: bool = True,
) -> Optimizer:  # fmt: skip
    """AdamW, or with ``adam_w_mode=False`` Adam, whose decay is a part of the gradient."""
    if bias_correction:
        return (AdamW if adam_w_mode else Adam)(params, lr=lr, betas=(betas[0], betas[1]), eps=eps, weight_decay=weight_decay, amsgrad=amsgrad)
    if amsgrad:
        raise ValueError("amsgrad with bias_correction=False: there is no such optimizer\n  fix: leave one of them out")
    return UncorrectedAdam(params, lr=lr, betas=(betas[0], betas[1]), eps=eps, weight_decay=weight_decay, decoupled=adam_w_mode)


def DeepSpeedCPUAdam(
    model_params: Any, lr: float = 1e-3, bias_correction: bool = True, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
    amsgrad: bool = False, adamw_mode: bool = True, fp32_optimizer_states: bool = True,
) -> Optimizer:  # fmt: skip
    """The same; where it runs is the plan's to say. ``fp32_optimizer_states=False`` is refused: state is as wide as its parameter."""
    if not fp32_optimizer_states:
        raise ValueError("fp32_optimizer_states=False: optimizer state is as wide as its parameter\n  fix: leave it out")
    return FusedAdam(model_params, lr, bias_correction, betas, eps, adamw_mode, weight_decay, amsgrad)
