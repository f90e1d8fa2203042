"""``engine.save_checkpoint(dir, tag)`` and back: a folder a tag, ``latest`` names the one that was written last. Any plan loads any plan's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from deepseed.checkpoints import Checkpoints
from deepseed.logs import warn
from deepseed.runtime.folder import CheckpointError
from deepseed.runtime.host import everywhere
from deepseed.runtime.series import LATEST

if TYPE_CHECKING:
    from deepseed.engine.engine import Engine


def save_checkpoint(
    self: Engine, save_dir: str | os.PathLike[str], tag: str | None = None, client_state: dict[str, Any] | None = None, save_latest: bool = True,
    exclude_frozen_parameters: bool = False,
) -> bool:  # fmt: skip
    """Parameters, optimizer, schedule, counts and ``client_state`` (plain data) into ``save_dir/tag``. Every rank must call it. Raises CheckpointError."""
    schedule = self.lr_scheduler.state_dict() if hasattr(self.lr_scheduler, "state_dict") else None
    counts = {"micro_steps": self.micro_steps, "global_steps": self.global_steps, "global_samples": self.global_samples, "train_batch_size": self.train_batch_size()}
    extra = {"client_state": client_state or {}, "lr_scheduler": schedule, **counts}
    _checkpoints(self, save_dir).save(extra, str(tag) if tag is not None else f"global_step{self.global_steps}", frozen=not exclude_frozen_parameters, move_latest=save_latest)
    return True


def _checkpoints(self: Engine, dir: str | os.PathLike[str]) -> Checkpoints:
    """The engine's checkpoints in a folder."""
    where = os.path.realpath(dir)
    if where not in self._checkpoints:
        loader = {"training_dataloader": self.training_dataloader} if self.training_dataloader is not None else {}
        self._checkpoints[where] = Checkpoints(self.compiled, where, asynchronous=self.settings.asynchronous, objects=loader, strict=False)
    return self._checkpoints[where]


def load_checkpoint(
    self: Engine, load_dir: str | os.PathLike[str], tag: str | None = None, load_module_strict: bool = True, load_optimizer_states: bool = True,
    load_lr_scheduler_states: bool = True, load_module_only: bool = False, custom_load_fn: Any = None,
) -> tuple[str | None, dict[str, Any] | None]:  # fmt: skip
    """The path that was read and its ``client_state``; (None, None) where ``load_dir`` names no latest one. Raises CheckpointError."""
    if custom_load_fn is not None or not load_module_strict:
        what = "custom_load_fn" if custom_load_fn is not None else "load_module_strict=False"
        raise CheckpointError(f"load_checkpoint({what}): a checkpoint is loaded whole\n  fix: leave it out; module.load_state_dict(.., strict=False) before initialize")
    checkpoints = _checkpoints(self, load_dir)
    extra = checkpoints.load(str(tag) if tag is not None else None, optimizer=load_optimizer_states and not load_module_only, objects=not load_module_only) or {}
    if checkpoints.path is None:
        if self.compiled.host.first:
            warn(f"{Path(load_dir) / LATEST} does not exist: nothing is loaded")
        return None, None
    if not load_module_only:
        if load_lr_scheduler_states and extra.get("lr_scheduler") is not None and hasattr(self.lr_scheduler, "load_state_dict"):
            self.lr_scheduler.load_state_dict(extra["lr_scheduler"])
        for name in ("micro_steps", "global_steps", "global_samples"):
            setattr(self, name, int(extra.get(name, 0)))
        if (rows := extra.get("train_batch_size", self.train_batch_size())) != self.train_batch_size() and self.compiled.host.first:
            warn(f'{checkpoints.path}: a step had {rows} rows, now it has {self.train_batch_size()}\n  fix: "train_batch_size": {rows} in the config, whatever the number of ranks')
        self._rows = None  # of its own data, which goes on where it was
        self.micro_steps -= self.micro_steps % self.gradient_accumulation_steps()  # a step of which some gradients were there begins anew
    return str(Path(load_dir) / checkpoints.path.name), dict(extra.get("client_state", {}))


def save_16bit_model(self: Engine, save_dir: str | os.PathLike[str], save_filename: str = "pytorch_model.bin", exclude_frozen_parameters: bool = False) -> bool:
    """The weights, whole, in the dtype that the plan computes in, as one file that ``torch.load`` reads. Every rank must call it."""
    dtype = self.compiled.programs.subject.precision["compute"]
    frozen = {n for n, p in self.module.named_parameters() if not p.requires_grad} if exclude_frozen_parameters else set()
    weights = {name: t.detach().to("cpu", dtype if dtype is not None and t.is_floating_point() else t.dtype) for name, t in self.compiled.state_dict().items() if name not in frozen}

    def write() -> None:
        if self.compiled.host.first:
            Path(save_dir).mkdir(parents=True, exist_ok=True)
            torch.save(weights, Path(save_dir) / save_filename)

    everywhere(self.compiled.host, f"saving {Path(save_dir) / save_filename}", write)
    return True
