"""DeepSpeed's learning-rate schedules, with its values step by step, as schedulers of torch.

DeepSpeed counts from the iteration -1, with which its schedulers begin, to 0 after the first ``step()``; torch from 0. So ``last_epoch`` is its
iteration and one more. A warm-up is ``log`` (log(i + 1) / log(n)) or ``linear`` (i / n) in iteration i of n.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

WARMUPS = ("log", "linear")
Rate = float | Sequence[float]


class WarmupLR(LRScheduler):
    """From ``warmup_min_lr`` to ``warmup_max_lr`` (a number, or one a parameter group) in ``warmup_num_steps`` steps, and constant from there.
    ``warmup_max_lr``: left out, the first group's own rate. Raises ValueError where the warm-up has no steps or is of no known kind."""

    def __init__(
        self, optimizer: Optimizer, warmup_min_lr: Rate = 0.0, warmup_max_lr: Rate | None = None, warmup_num_steps: int = 1000,
        warmup_type: str = "log", last_batch_iteration: int = -1,
    ) -> None:  # fmt: skip
        self.warmup_num_steps, self.warmup_type = _warmup(warmup_num_steps, warmup_type)
        most = optimizer.param_groups[0]["lr"] if warmup_max_lr is None else warmup_max_lr
        self.min_lrs, self.max_lrs = _each(optimizer, warmup_min_lr, "warmup_min_lr"), _each(optimizer, most, "warmup_max_lr")
        super().__init__(_begun(optimizer, last_batch_iteration), last_batch_iteration)

    def get_lr(self) -> list[float | Any]:
        i = self.last_epoch - 1
        gamma = 0.0 if i < 0 else self._gamma(i)
        return [least + (most - least) * gamma for least, most in zip(self.min_lrs, self.max_lrs, strict=True)]

    def _gamma(self, i: int) -> float:
        """The part of the way from the least rate to the most, in iteration ``i``."""
        return _warm(i, self.warmup_num_steps, self.warmup_type) if i < self.warmup_num_steps else 1.0


class WarmupDecayLR(WarmupLR):
    """As WarmupLR, and then down to ``warmup_min_lr`` in a straight line, until ``total_num_steps``."""

    def __init__(
        self, optimizer: Optimizer, total_num_steps: int, warmup_min_lr: Rate = 0.0, warmup_max_lr: Rate | None = 0.001, warmup_num_steps: int = 1000,
        warmup_type: str = "log", last_batch_iteration: int = -1,
    ) -> None:  # fmt: skip
        self.total_num_steps = total_num_steps
        super().__init__(optimizer, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type, last_batch_iteration)

    def _gamma(self, i: int) -> float:
        if i < self.warmup_num_steps:
            return super()._gamma(i)
        return max(0.0, (self.total_num_steps - i) / max(1.0, self.total_num_steps - self.warmup_num_steps))


class WarmupCosineLR(LRScheduler):
    """From ``warmup_min_ratio`` of each group's own rate to all of it, then along a cosine to ``cos_min_ratio`` of it at ``total_num_steps``."""

    def __init__(
        self, optimizer: Optimizer, total_num_steps: int, warmup_min_ratio: float = 0.0, warmup_num_steps: int = 1000, cos_min_ratio: float = 0.0001,
        warmup_type: str = "log", last_batch_iteration: int = -1,
    ) -> None:  # fmt: skip
        self.warmup_num_steps, self.warmup_type = _warmup(warmup_num_steps, warmup_type)
        self.total_num_steps, self.warmup_min_ratio, self.cos_min_ratio = total_num_steps, warmup_min_ratio, cos_min_ratio
        super().__init__(_begun(optimizer, last_batch_iteration), last_batch_iteration)

    def get_lr(self) -> list[float | Any]:
        ratio = self._ratio(self.last_epoch - 1)
        return [lr * ratio for lr in self.base_lrs]

    def _ratio(self, i: int) -> float:
        if i < 0:
            return 0.0
        if i < self.warmup_num_steps:
            return self.warmup_min_ratio + _warm(i, self.warmup_num_steps, self.warmup_type) * (1.0 - self.warmup_min_ratio)
        progress = min(1.0, (i - self.warmup_num_steps + 1) / max(1, self.total_num_steps - self.warmup_num_steps))
        return max(0.0, self.cos_min_ratio + (1.0 - self.cos_min_ratio) * (1 + math.cos(math.pi * progress)) / 2)


class LRRangeTest(LRScheduler):
    """From ``lr_range_test_min_lr`` upwards without end: by ``lr_range_test_step_rate`` of it in ``lr_range_test_step_size`` steps, at once (staircase) or evenly."""

    def __init__(
        self, optimizer: Optimizer, lr_range_test_min_lr: Rate = 1e-3, lr_range_test_step_size: int = 2000, lr_range_test_step_rate: float = 1.0,
        lr_range_test_staircase: bool = False, last_batch_iteration: int = -1,
    ) -> None:  # fmt: skip
        if not isinstance(lr_range_test_step_size, int) or lr_range_test_step_size <= 0:
            raise ValueError(f"lr_range_test_step_size must be a positive integer, got {lr_range_test_step_size}")
        self.min_lrs = _each(optimizer, lr_range_test_min_lr, "lr_range_test_min_lr")
        self.step_size, self.step_rate, self.staircase = lr_range_test_step_size, lr_range_test_step_rate, lr_range_test_staircase
        super().__init__(_begun(optimizer, last_batch_iteration), last_batch_iteration)

    def get_lr(self) -> list[float | Any]:
        intervals = self.last_epoch // self.step_size if self.staircase else self.last_epoch / self.step_size
        return [least * (1 + self.step_rate * intervals) for least in self.min_lrs]


SCHEDULERS: Mapping[str, type[LRScheduler]] = {c.__name__: c for c in (WarmupLR, WarmupDecayLR, WarmupCosineLR, LRRangeTest)}


def _warm(i: int, steps: int, kind: str) -> float:
    return math.log(i + 1) / math.log(steps) if kind == "log" else i / steps


def _warmup(steps: int, kind: str) -> tuple[int, str]:
    if not isinstance(steps, int) or steps <= 0:
        raise ValueError(f"warmup_num_steps must be a positive integer, got {steps}")
    if kind not in WARMUPS:
        raise ValueError(f"warmup_type {kind!r} is unknown: one of {', '.join(WARMUPS)}")
    return max(2, steps), kind


def _each(optimizer: Optimizer, rate: Rate, what: str) -> list[float]:
    groups = len(optimizer.param_groups)
    if isinstance(rate, Sequence):
        if len(rate) != groups:
            raise ValueError(f"{what} has {len(rate)} values, the optimizer has {groups} parameter groups")
        return list(rate)
    return [rate] * groups


def _begun(optimizer: Optimizer, last: int) -> Optimizer:
    """torch asks for ``initial_lr`` where a schedule goes on."""
    if last >= 0:
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
    return optimizer
