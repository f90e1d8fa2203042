"""From logits to tokens: what a request may ask for, and how a step's rows are drawn together.

A token is drawn with one number of (seed, position), so a request draws the same tokens whatever shares its steps, after a preemption as before. The
order of filters is the field's: penalties, temperature, top-k, top-p, min-p. Log-probabilities are those of the raw logits.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepseed.inference.errors import InferenceError

_WORD = (1 << 64) - 1


class Follower(Protocol):
    """One output's way through a form."""

    def allowed(self, output: Sequence[int]) -> NDArray[np.bool_]:
        """Which tokens of the vocabulary may come after ``output``, which mostly is what it was before and some more. InferenceError where that cannot be said: the output ends by it."""


class Form(Protocol):
    """What outputs must look like: a grammar, say. ``ends``: tokens that say all is said."""

    def follow(self, tokenizer: Any, ends: frozenset[int], vocabulary: int) -> Follower: ...


@dataclass(frozen=True)
class SamplingParams:
    """``temperature`` 0 is greedy. ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 leave all tokens; ``logprobs``: of how many most likely tokens, beside the chosen one;
    ``prompt_logprobs``: the same of the prompt's tokens after the first. ``form``: which tokens may come."""

    max_tokens: int = 16
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    n: int = 1
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] = field(default_factory=dict)
    form: Form | None = None

    def __post_init__(self) -> None:
        bounds = (
            ("max_tokens", self.max_tokens >= 1, "at least 1"), ("temperature", self.temperature >= 0, "at least 0"), ("top_k", self.top_k >= 0, "at least 0 (0: all)"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"), ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"), ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("n", self.n >= 1, "at least 1"), ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, f"from 0 to max_tokens = {self.max_tokens}"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "from -2 to 2"), ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "from -2 to 2"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, "at least 0"), ("prompt_logprobs", self.prompt_logprobs is None or self.prompt_logprobs >= 0, "at least 0"),
        )  # fmt: skip
        for name, fine, range_ in bounds:
            if not fine:
                raise InferenceError(f"{name}={getattr(self, name)} is out of range\n  fix: {range_}")
        if any(not s for s in self.stops):
            raise InferenceError("an empty stop string ends every text at once\n  fix: leave it out")

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


def asked_for(asked: Mapping[str, Any]) -> SamplingParams:
    """Of fields by name. Raises InferenceError where one is unknown."""
    known = SamplingParams.__dataclass_fields__
    unknown = sorted(set(asked) - set(known))
    if unknown:
        raise InferenceError(f"generate does not know {', '.join(unknown)}\n  fix: one of {', '.join(known)}")
    return SamplingParams(**asked)


@dataclass
class Row:
    """One sequence's part in a draw: how it wants its token, and what came before."""

    params: SamplingParams
    seed: int
    prompt: Sequence[int]
    output: Sequence[int]
    forbidden: Sequence[int] = ()  # tokens that may not come yet
    allowed: NDArray[np.bool_] | None = None  # [vocabulary]: those that may; None: all


@dataclass(frozen=True)
class Drawn:
    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # (token, log-probability), the most likely first


def fresh_seed() -> int:
    return int.from_bytes(os.urandom(8), "little")


def sample(logits: Tensor, rows: Sequence[Row]) -> list[Drawn]:
    """A token for each row of ``logits`` [rows, vocabulary]."""
    raw = logits
    logits = adjusted(logits, rows)
    tokens = logits.argmax(-1)
    drawn = [n for n, row in enumerate(rows) if row.params.temperature > 0]
    if drawn:
        chance = probabilities(logits[drawn].float() if len(drawn) < len(rows) else logits.float(), [rows[n].params for n in drawn])
        numbers = torch.tensor([number(rows[n].seed, len(rows[n].output)) for n in drawn], dtype=torch.float64, device=logits.device)
        tokens[drawn] = _pick(chance, numbers)
    chosen = tokens.tolist()
    return scored(raw, chosen, [row.params.logprobs for row in rows])


def scored(logits: Tensor, tokens: Sequence[int], tops: Sequence[int | None]) -> list[Drawn]:
    """``tokens``, one a row, with their log-probabilities and those of the ``tops`` most likely ones where that is not None."""
    asked = {n: k for n, k in enumerate(tops) if k is not None}
    out = [Drawn(t) for t in tokens]
    if not asked:
        return out
    picked = list(asked)
    logs = torch.log_softmax(logits[picked].float() if len(picked) < len(tokens) else logits.float(), -1)
    own = logs.gather(1, torch.tensor([[tokens[n]] for n in picked], device=logs.device))[:, 0].tolist()
    most = min(max(asked.values()), logs.shape[1])
    best, where = (x.tolist() for x in logs.topk(most, -1)) if most else ([[]] * len(picked), [[]] * len(picked))
    for i, n in enumerate(picked):
        out[n] = Drawn(tokens[n], own[i], tuple(zip(where[i][: asked[n]], best[i][: asked[n]], strict=True)))
    return out


def adjusted(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Penalties, biases and what may not come yet, on the rows that have some; ``logits`` stays as it is."""
    copied, biases = False, dict[int, tuple[Tensor, Tensor]]()  # by the request's parameters
    for n, row in enumerate(rows):
        p = row.params
        penal = p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty
        if not penal and not p.logit_bias and not row.forbidden and row.allowed is None:
            continue
        if not copied:
            logits, copied = logits.clone(), True
        if p.repetition_penalty != 1:
            seen = torch.tensor(sorted({*row.prompt, *row.output}), device=logits.device)
            old = logits[n, seen]
            logits[n, seen] = torch.where(old < 0, old * p.repetition_penalty, old / p.repetition_penalty)
        if row.output and (p.presence_penalty or p.frequency_penalty):
            counts = Counter(row.output)
            said = torch.tensor(list(counts), device=logits.device)
            times = torch.tensor(list(counts.values()), dtype=logits.dtype, device=logits.device)
            logits[n, said] -= p.frequency_penalty * times + p.presence_penalty
        if p.logit_bias:
            if id(p) not in biases:
                biases[id(p)] = (torch.tensor(list(p.logit_bias), device=logits.device), torch.tensor(list(p.logit_bias.values()), dtype=logits.dtype, device=logits.device))
            where, bias = biases[id(p)]
            logits[n, where] += bias
        if row.forbidden:
            logits[n, torch.tensor(list(row.forbidden), device=logits.device)] = -torch.inf
        if row.allowed is not None:
            logits[n].masked_fill_(torch.from_numpy(~row.allowed).to(logits.device), -torch.inf)
    return logits


def probabilities(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """[rows, vocabulary] after temperature, top-k, top-p and min-p; each row sums to one."""
    def column(field: str) -> Tensor:
        return torch.tensor([getattr(p, field) for p in params], dtype=logits.dtype, device=logits.device)[:, None]

    logits = (logits - logits.amax(-1, keepdim=True)) / column("temperature").clamp_min(torch.finfo(logits.dtype).tiny)  # the likeliest stays 0, however cold
    if any(p.top_k for p in params):
        width = logits.shape[1]
        ks = [min(p.top_k, width) or width for p in params]
        most = max(k for k in ks if k < width) if any(k < width for k in ks) else width
        if most < width:
            values = logits.topk(most, -1).values
            floor = values.gather(1, torch.tensor([min(k, most) - 1 for k in ks], device=logits.device)[:, None])
            free = torch.tensor([k == width for k in ks], device=logits.device)[:, None]
            logits = logits.masked_fill((logits < floor) & ~free, -torch.inf)
    if any(p.top_p < 1 for p in params):
        ordered, where = logits.sort(-1, descending=True)
        chance = torch.softmax(ordered, -1)
        gone = chance.cumsum(-1) - chance >= column("top_p")
        gone[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(gone).scatter_(1, where, gone), -torch.inf)
    chance = torch.softmax(logits, -1)
    if any(p.min_p for p in params):
        floor = column("min_p") * chance.amax(-1, keepdim=True)
        chance = chance.masked_fill(chance < floor, 0.0)
        chance = chance / chance.sum(-1, keepdim=True)
    return chance


def number(seed: int, position: int) -> float:
    """Uniform in [0, 1): splitmix64 of seed and position."""
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & _WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
    return ((z ^ (z >> 31)) >> 11) / (1 << 53)


def _pick(chance: Tensor, numbers: Tensor) -> Tensor:
    """The token under whose share each number falls; never one without a chance."""
    upto = chance.double().cumsum(-1)
    at = torch.searchsorted(upto, (numbers * upto[:, -1])[:, None], right=True)
    last = torch.where(chance > 0, torch.arange(chance.shape[1], device=chance.device), 0).amax(-1, keepdim=True)
    return torch.minimum(at, last).squeeze(1)
