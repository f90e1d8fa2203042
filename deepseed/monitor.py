"""Where numbers of training are written as it goes: the monitors of a ds_config.json, ``tensorboard``, ``wandb`` and ``csv_monitor``, by rank 0 alone.

An event is (name, value, samples), with DeepSpeed's names: ``Train/Samples/train_loss``, ``.../lr``, ``.../loss_scale``. A value may be a tensor on the device:
it is read when events are written, not when they are made, so no step waits for one.
"""

from __future__ import annotations

import atexit
import csv
import importlib
import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from deepseed.config import Config, ConfigError

PROBE = ".deepseed"
Event = tuple[str, Any, int]


class Writer(Protocol):
    """What a monitor of your own has: ``engine.monitor.writers.append(it)``."""

    def write_events(self, events: Sequence[tuple[str, float, int]]) -> None: ...


class Monitor:
    """All that the config enables, as one; on the other ranks nothing."""

    def __init__(self, config: Config, first: bool) -> None:
        self.writers: list[Writer] = []
        self.asked = any(section.enabled for section in (config.tensorboard, config.wandb, config.csv_monitor))
        self._first, self._waiting = first, list[Event]()
        if first and config.tensorboard.enabled:
            self.writers.append(TensorBoard(folder_of(config.tensorboard)))
        if first and config.wandb.enabled:
            self.writers.append(Wandb(config.wandb.project, config.wandb.group, config.wandb.team))
        if first and config.csv_monitor.enabled:
            self.writers.append(Csv(folder_of(config.csv_monitor)))
        weakref.finalize(self, _write, self.writers, self._waiting).atexit = False
        atexit.register(_write, self.writers, self._waiting)  # registered behind the writers' own, so it comes before them

    @property
    def enabled(self) -> bool:
        """Whether events are made, the same on every rank where writers are the config's."""
        return self.asked or bool(self.writers)

    def write_events(self, events: Sequence[Event]) -> None:
        """Write now: what waits, and these."""
        self.add(events)
        self.flush()

    def add(self, events: Sequence[Event]) -> None:
        if self._first and self.writers:
            self._waiting += events

    def flush(self) -> None:
        _write(self.writers, self._waiting)


def _write(writers: Sequence[Writer], waiting: list[Event]) -> None:
    events = [(name, float(value) if isinstance(value, Tensor) else value, samples) for name, value, samples in waiting]
    waiting.clear()
    for writer in writers if events else ():
        writer.write_events(events)


@contextmanager
def _writing(path: Path, key: str) -> Iterator[None]:
    """Raises ConfigError where the system refuses a file of a monitor."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f'"{key}": {path} cannot be written: {error.strerror or error}\n  fix: "output_path": a folder that this process may write, or "enabled": false') from error


def folder_of(section: Any) -> Path:
    """Raises ConfigError for a name that leads out of ``output_path``."""
    if ".." in Path(str(section.job_name)).parts or Path(str(section.job_name)).is_absolute():
        raise ConfigError(f'"job_name" is "{section.job_name}", which is not within "output_path", "{section.output_path}"\n  fix: a name, and the folder in "output_path"')
    return Path(str(section.output_path), str(section.job_name))


class Csv:
    """A file a name, ``Train_Samples_lr.csv``, of the columns ``step,lr``; ``step`` is the number of samples."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._begun = folder, set[str]()
        with _writing(folder, "csv_monitor"):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / PROBE).touch()
            (folder / PROBE).unlink()

    def write_events(self, events: Sequence[tuple[str, float, int]]) -> None:
        for name, value, samples in events:
            path = self.folder / (name.replace("/", "_").replace(" ", "_") + ".csv")
            with _writing(path, "csv_monitor"), path.open("a", newline="") as file:
                rows = csv.writer(file)
                if path.name not in self._begun and not file.tell():
                    rows.writerow(["step", name.rpartition("/")[2]])
                self._begun.add(path.name)
                rows.writerow([samples, value])


class TensorBoard:
    def __init__(self, folder: Path) -> None:
        required("tensorboard", "tensorboard")
        with _writing(folder, "tensorboard"):
            self._writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(log_dir=os.fspath(folder))

    def write_events(self, events: Sequence[tuple[str, float, int]]) -> None:
        for name, value, samples in events:
            self._writer.add_scalar(name, value, samples)
        self._writer.flush()


class Wandb:
    """``WANDB_MODE=offline`` and the like are wandb's own."""

    def __init__(self, project: str, group: str | None, team: str | None) -> None:
        self._run = required("wandb", "wandb").init(project=project, group=group, entity=team)

    def write_events(self, events: Sequence[tuple[str, float, int]]) -> None:
        at: dict[int, dict[str, float]] = {}
        for name, value, samples in events:
            at.setdefault(samples, {})[name] = value
        for samples, values in at.items():
            self._run.log(values, step=samples)


def required(module: str, key: str) -> Any:
    """The library of a monitor. Raises ConfigError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f'"{key}" is enabled in the config, and {module} cannot be imported ({error})\n  fix: pip install "deepseed[{key}]", or "{key}": {{"enabled": false}}') from None
