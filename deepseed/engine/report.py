"""What an engine tells of its training, as the config asks: progress lines, times, memory, messages and flops, and events for monitors.

Nothing is read from the device but where it is printed or written: at ``steps_per_print``. Events wait until then, with the samples count of their own step;
times alone (``wall_clock_breakdown``) wait for the device at each forward, backward and step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING

import torch

from deepseed.accelerator import get_accelerator
from deepseed.config import Config
from deepseed.cost import flops
from deepseed.explain import count_collectives
from deepseed.explain_text import amount
from deepseed.ir.mesh import TIME
from deepseed.ir.program import Program
from deepseed.ir.schedule import kind_of
from deepseed.logs import say
from deepseed.monitor import Event, Monitor
from deepseed.progress import Progress, memory

if TYPE_CHECKING:
    from deepseed.engine.engine import Engine

FLUSH = 10  # steps after which events are written where nothing is printed
PARTS = {"forward": "fwd", "backward": "bwd", "step": "step", "compile": "compile"}  # DeepSpeed's names of the timers


class Report:
    def __init__(self, config: Config, rank: int, samples: int) -> None:
        self.config, self.rank = config, rank
        self.monitor = Monitor(config, rank == 0)
        self.every = int(config.steps_per_print or 0)  # 0: never
        self.progress = Progress(self.every or FLUSH, samples)
        self.times = bool(config.wall_clock_breakdown)
        self._spent: dict[str, float] = {}  # milliseconds of this step
        self._sums: dict[str, float] = {}  # of the steps since the last print
        self._steps = 0
        self._losses: list[torch.Tensor] = []
        self._told: set[str] = set()  # programs whose messages were told

    @contextmanager
    def timed(self, part: str, engine: Engine) -> Iterator[None]:
        """What it takes, compiling apart."""
        if not self.times:
            yield
            return
        get_accelerator().synchronize()
        started, compiled = perf_counter(), engine.compiled.programs.seconds
        yield
        get_accelerator().synchronize()
        compiled = engine.compiled.programs.seconds - compiled
        for name, seconds in ((part, perf_counter() - started - compiled), ("compile", compiled)):
            self._spent[name] = self._spent.get(name, 0.0) + 1e3 * seconds

    def lost(self, loss: torch.Tensor) -> None:
        """The loss of a microbatch, or of the whole step."""
        self._losses.append(loss.detach())

    def stepped(self, engine: Engine, loss: torch.Tensor | None = None) -> None:
        """A step is done; every rank comes here. ``loss``: of the whole step, where it is the same on all ranks."""
        number = engine.global_steps
        due = self.progress.counted(number)
        together = self.monitor.asked or (self.monitor.enabled and engine.world_size == 1)  # a writer that one rank has added is no reason for a collective
        loss = self._mean(engine, loss) if together or (due and self.every) else None
        self._losses.clear()
        if self.times:
            self._steps += 1
            for name, spent in self._spent.items():
                self._sums[name] = self._sums.get(name, 0.0) + spent
        if self.rank == 0:
            self.monitor.add(self._events(engine, loss))
            self._programs(engine, number)
        if due and self.every:
            self.progress.tell(engine.micro_steps, engine.skipped_steps, engine.optimizer, None if loss is None else float(loss), engine.train_batch_size(), self._epoch(engine))
        if self.rank == 0 and self.times and (due or not self.every):
            self._tell_times(number)
        if due:
            self.monitor.flush()
            if self.rank == 0 and self.config.memory_breakdown:
                say("memory | " + " | ".join(f"{name}: {n / 2**30:.4f} GB" for name, n in zip(("allocated", "max_allocated"), memory(), strict=True)), step=number)
        self._spent = {}

    def _mean(self, engine: Engine, loss: torch.Tensor | None) -> torch.Tensor | None:
        if loss is not None or not self._losses:
            return loss
        total = torch.stack([each.double() if each.device.type != "mps" else each for each in self._losses]).mean()
        return engine._mean(total)

    def _events(self, engine: Engine, loss: torch.Tensor | None) -> list[Event]:
        at, out = engine.global_samples, list[Event]()
        if not self.monitor.enabled:
            return out
        out += [("Train/Samples/train_loss", loss, at)] if loss is not None else []
        out += [("Train/Samples/lr", lr, at) for lr in engine.get_lr()[:1]]
        scale = engine.compiled._shown.get(("norm", "loss_scale"))
        out += [("Train/Samples/loss_scale", scale if scale is not None else engine.cur_scale, at)] if engine.fp16_enabled() else []
        return out + [(f"Train/Samples/elapsed_time_ms_{name}", spent, at) for name, spent in self._spent.items() if name in PARTS]

    def _tell_times(self, number: int) -> None:
        def line(spent: dict[str, float], by: int) -> str:
            return " | ".join(f"{word}: {spent[name] / by:.2f}" for name, word in PARTS.items() if name in spent)

        say(f"time (ms) | {line(self._spent, 1)}", step=number, milliseconds=dict(self._spent))
        if self._steps > 1:
            say(f"time (ms), mean of {self._steps} steps | {line(self._sums, self._steps)}", step=number)
        self._sums, self._steps = {}, 0

    def _epoch(self, engine: Engine) -> int:
        return max(0, getattr(engine.training_dataloader, "epoch", 1) - 1)

    def _programs(self, engine: Engine, number: int) -> None:
        """Messages of each program, once it is there; flops at the step that the config says."""
        profile = self.config.flops_profiler.enabled and number == int(self.config.flops_profiler.profile_step)
        if not (self.config.comms_logger.enabled or profile):
            return
        for built in engine.compiled.programs.cache:
            if self.config.comms_logger.enabled and built.digest not in self._told:
                self._told.add(built.digest)
                say(messages(built.program), step=number)
            if profile:
                say(computed(built.program, int(self.config.flops_profiler.module_depth), int(self.config.flops_profiler.top_modules)), step=number)


def messages(p: Program) -> str:
    """By axis and collective, how many a run of the program has and what one rank sends by them: known before it runs.

    comms of module, what one rank sends in a run | all_gather over dp: 4, 1.5 KiB | ..
    """
    found = count_collectives(p, p.mesh.sizes.get(TIME, 1))
    return f"comms of {p.name}, what one rank sends in a run | " + (" | ".join(f"{c.op} over {c.axis}: {c.count}, {amount(c.bytes)}" for c in found) or "nothing")


def computed(p: Program, depth: int = -1, top: int = 1) -> str:
    """Flops of a run's matrix products on all ranks together, forward and backward, and of the modules at ``depth`` (-1: the innermost) that have most."""
    total: dict[str, int] = {}
    modules: dict[str, int] = {}
    for op in p.ops:
        times = p.mesh.sizes.get(TIME, 1) if op.part and kind_of(op.part) != "once" else 1
        n = times * flops(op, [p.types[r.name] for r in op.refs])
        if n:
            total[op.phase] = total.get(op.phase, 0) + n
            path = op.path.split(".") if depth < 0 else op.path.split(".")[: depth + 1]
            modules[".".join(path)] = modules.get(".".join(path), 0) + n
    most = sorted(modules.items(), key=lambda item: -item[1])[: max(top, 1)]
    parts = [f"{phase}: {n / 1e9:.4g} GFLOP" for phase, n in total.items()] + [f"{name or 'the top'}: {n / 1e9:.4g} GFLOP" for name, n in most]
    return f"flops of {p.name}'s matrix products, all ranks | " + (" | ".join(parts) or "none")
