"""The lines that tell how training goes, with DeepSpeed's words, for an engine and for a loop of one's own.

    progress = deepseed.Progress(every=10, samples=32)
    for batch in loader:
        loss = step(batch)
        progress(step, loss)          # at every tenth step: two lines from rank 0; a loss is read then, and not before
"""

from __future__ import annotations

import resource
import sys
from time import perf_counter
from typing import Any

import torch

from deepseed.accelerator import get_accelerator
from deepseed.capture.options import listed
from deepseed.config import ConfigError
from deepseed.logs import rank, say


class Progress:
    """``every``: steps between two prints. ``samples``: of one step, over all ranks. The running mean leaves out the steps before the first print, in which things are compiled."""

    def __init__(self, every: int, samples: int) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ConfigError(f"Progress(every={every!r})\n  fix: a number of steps, 1 or more")
        self.every, self.samples, self.steps = every, samples, 0
        self._at, self._since, self._seconds, self._counted = perf_counter(), 0, 0.0, 0
        self._first = True

    def __call__(self, step: Any, loss: torch.Tensor | None = None) -> None:
        """A step of ``step`` is done, whose loss this was: by the step's own count, so that one that was loaded goes on in it; a module's are counted here."""
        if self.counted(step.steps if step.whole else self.steps + 1):
            self.tell(self.steps, getattr(step, "skipped", 0), step.optimizer, None if loss is None else float(loss))

    def counted(self, number: int) -> bool:
        """Step ``number`` is done: whether it is one to print at."""
        self.steps = number
        self._since += 1
        return number % self.every == 0

    def tell(self, micro: int, skipped: int, optimizer: Any, loss: float | None, samples: int | None = None, epoch: int = 0) -> None:
        """Two lines from rank 0. ``micro``: forwards so far."""
        get_accelerator().synchronize()
        now, steps = perf_counter(), self._since
        seconds, self._at, self._since = max(now - self._at, 1e-9), now, 0
        current = (samples or self.samples) * steps / seconds
        if not self._first:
            self._seconds, self._counted = self._seconds + seconds, self._counted + (samples or self.samples) * steps
        self._first = False
        mean = self._counted / self._seconds if self._counted else current
        if rank() == 0:
            allocated, most = (f"{n / 2**30:.2f}GB" for n in memory())
            say(headline(self.steps, skipped, optimizer, loss), step=self.steps, loss=loss)
            say(
                f"epoch={epoch}/micro_step={micro}/global_step={self.steps}, RunningAvgSamplesPerSec={mean:.4f}, CurrSamplesPerSec={current:.4f}, "
                f"MemAllocated={allocated}, MaxMemAllocated={most}", step=self.steps, samples_per_second=current,
            )  # fmt: skip


def headline(number: int, skipped: int, optimizer: Any, loss: float | None) -> str:
    """``step=10, skipped=0, lr=[0.001], mom=[(0.9, 0.999)], loss=0.25``."""
    groups = [group for each in listed(optimizer) for group in each.param_groups]
    momenta = [group.get("betas", group.get("momentum", 0.0)) for group in groups]
    return f"step={number}, skipped={skipped}, lr={[float(group['lr']) for group in groups]}, mom={momenta}" + ("" if loss is None else f", loss={loss:.6g}")


def memory() -> tuple[int, int]:
    """Bytes in use and the most so far: of the device, or of this process where the CPU is the device."""
    device = get_accelerator()
    if device.kind != "cpu":
        return device.memory_allocated(), device.max_memory_allocated()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize(), most
    except OSError:
        return most, most
