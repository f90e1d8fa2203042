"""What a plan costs, in closed form: bytes a rank and bytes sent a step, as sympy expressions.

The counts of ``explain`` come from the program itself; these formulas come from the literature and share no code with them,
so that each can be held against the other. All are of one optimizer step without accumulation. Sources: ZeRO (Rajbhandari et
al. 2020, sections 5 and 7), ring collectives (Thakur et al. 2005), Megatron-LM (Shoeybi et al. 2019, section 3).

| symbol | meaning |
|---|---|
| Psi | bytes of all parameters on one device |
| G | bytes of all gradients on one device |
| Omega | bytes of the optimizer state on one device |
| U | bytes of all parameters as they are used: Psi, or half of it where they are computed in 16 bits |
| C, V | bytes of the parameters that forward and backward read as a shorter cast only; of these casts |
| N | data-parallel ranks, times those that split the sequence |
| t | tensor-parallel ranks, times those of a pipeline |
| F | matmul flops of the step on one device |
| T | tokens that one tensor-parallel group works on (of the sequence axis: all of its ranks) |
| h, k | width of the hidden state; of the keys |
| s | ranks that split the sequence |
| L | layers |
| m | microbatches |
| S, p | stages; ranks of a pipeline |
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import sympy

Psi, G, Omega, U, C, V, N, t, F, T, h, k, s, L, m, S, p = sympy.symbols("Psi G Omega U C V N t F T h k s L m S p", positive=True)
Expression = Any  # sympy carries no types


def param_bytes(stage: int, cast: Expression = 0) -> Expression:
    """Stored parameters: whole on each data-parallel rank below stage 3, but for those that are used as a shorter ``cast``."""
    if stage == 3 or (stage and cast == Psi):
        return Psi / (t * N)
    return (Psi - cast) / t + cast / (t * N) if stage else Psi / t


def gathered_bytes(stage: int) -> Expression:
    """Shorter casts of parameters that a step gathers once, and has to its end: stages 1 and 2."""
    return V / t if stage in (1, 2) else sympy.Integer(0)


def grad_bytes(stage: int) -> Expression:
    """Gradients when they are clipped: from stage 1 on each rank has only the part that it updates."""
    return G / (t * N) if stage else G / t


def optimizer_bytes(stage: int) -> Expression:
    return Omega / (t * N) if stage else Omega / t


def state_bytes(slots: Iterable[tuple[int, int]], parts: int) -> int:
    """Optimizer state of one rank, from the elements and bytes an element of each slot of each parameter: a slot is split over
    ``parts`` ranks, a step count (one element) is on each. Adafactor's rows and columns are slots like any other."""
    return sum(elements * size if elements == 1 else elements * size // parts for elements, size in slots)


def data_volume(stage: int, microbatches: bool = False) -> Expression:
    """Bytes that a rank sends over the data axis: all_reduce = reduce_scatter + all_gather; stage 3 gathers twice (at most). With
    ``microbatches``, m of them, stage 2 reduces the gradients of each, and stage 3 gathers the parameters for each, too."""
    each = m if microbatches else 1
    return (3 * each if stage == 3 else each + 1 if stage == 2 else 2) * Psi / t * (N - 1) / N


def mixed_volume(stage: int, microbatches: bool = False, once: bool = True) -> Expression:
    """``data_volume`` where parameters are used, or gradients reduced, in another dtype than parameters are stored in: gradients are
    reduced as they are, what is gathered is what is used; stages 1 and 2 do so ``once``, where it may stay."""
    each = m if microbatches else 1
    used = U if once else Psi - C + 2 * each * V
    sent = {0: 2 * G, 1: G + used, 2: each * G + used, 3: each * (2 * U + G)}[stage]
    return sent / t * (N - 1) / N


def zero_bytes(stage: int) -> Expression:
    """Parameters, gradients and Adam's state of one parameter in mixed precision, by the ZeRO paper (section 3.1): 2 + 2 + 12 bytes, of
    which the stage divides the optimizer's (with the float32 copy), the gradients, the parameters."""
    return {0: sympy.Integer(16), 1: 4 + 12 / N, 2: 2 + 14 / N, 3: 16 / N}[stage]


def stage_volume() -> Expression:
    """*Elements* that a rank of a pipeline sends to others, in the mean: an activation and its gradient at each of S - 1 boundaries
    (Huang et al. 2019), where T tokens go through a rank in a step."""
    return 2 * T * h * (S - 1) / p


def tensor_volume() -> Expression:
    """*Elements* that a rank sends over the tensor axis for the hidden states of L layers: forward and backward each have two
    all_reduces a layer (or as many pairs of all_gather and reduce_scatter), each of 2 T h (t-1)/t."""
    return L * 8 * T * h * (t - 1) / t


def sequence_volume() -> Expression:
    """*Elements* that a rank sends over the sequence axis for the attention of L layers (Jacobs et al. 2023, section 3): an all_to_all
    of queries, keys, values and the result, forward and backward, each of its T/s local tokens' part for the other ranks."""
    return L * 4 * T * (h + k) * (s - 1) / s**2


def matmul_flops() -> Expression:
    return F / (N * t)


def value(form: Expression, **symbols: float) -> float:
    """The expression with numbers for its symbols, by name. Raises ValueError naming a symbol that has none."""
    out = form.subs({s: symbols[s.name] for s in form.free_symbols if s.name in symbols})
    if out.free_symbols:
        raise ValueError(f"{form} needs {', '.join(sorted(s.name for s in out.free_symbols))}")
    return float(out)
