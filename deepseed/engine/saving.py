"""``engine.save_checkpoint(dir, tag)`` and back: a folder a tag, ``latest`` names the one that was written last. Any plan loads any plan's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from deepseed.logs import warn
from deepseed.runtime.folder import CheckpointError
from deepseed.runtime.host import everywhere

if TYPE_CHECKING:
    from deepseed.engine.engine import Engine

LATEST = "latest"


def save_checkpoint(
    self: Engine, save_dir: str | os.PathLike[str], tag: str | None = None, client_state: dict[str, Any] | None = None, save_latest: bool = True,
    exclude_frozen_parameters: bool = False,
) -> bool:  # fmt: skip
    """Parameters, optimizer, schedule, counts and ``client_state`` (plain data) into ``save_dir/tag``. Every rank must call it. Raises CheckpointError."""
    tag = str(tag) if tag is not None else f"global_step{self.global_steps}"
    schedule = self.lr_scheduler.state_dict() if hasattr(self.lr_scheduler, "state_dict") else None
    counts = {"micro_steps": self.micro_steps, "global_steps": self.global_steps, "global_samples": self.global_samples}
    folder = Path(save_dir) / tag
    folder.parent.mkdir(parents=True, exist_ok=True)
    self.compiled.save(folder, extra={"client_state": client_state or {}, "lr_scheduler": schedule, **counts}, frozen=not exclude_frozen_parameters)

    def write() -> None:
        if self.compiled.host.first and save_latest:
            fresh = folder.parent / f".{LATEST}.{os.getpid()}"
            fresh.write_text(tag)
            fresh.replace(folder.parent / LATEST)

    everywhere(self.compiled.host, f"writing {folder.parent / LATEST}", write)
    return True


def load_checkpoint(
    self: Engine, load_dir: str | os.PathLike[str], tag: str | None = None, load_module_strict: bool = True, load_optimizer_states: bool = True,
    load_lr_scheduler_states: bool = True, load_module_only: bool = False, custom_load_fn: Any = None,
) -> tuple[str | None, dict[str, Any] | None]:  # fmt: skip
    """The path that was read and its ``client_state``; (None, None) where ``load_dir`` names no latest one. Raises CheckpointError."""
    if custom_load_fn is not None or not load_module_strict:
        what = "custom_load_fn" if custom_load_fn is not None else "load_module_strict=False"
        raise CheckpointError(f"load_checkpoint({what}): a checkpoint is loaded whole\n  fix: leave it out; module.load_state_dict(.., strict=False) before initialize")
    if tag is None:
        latest = Path(load_dir) / LATEST
        tag = everywhere(self.compiled.host, f"reading {latest}", lambda: latest.read_text().strip() if latest.is_file() else None)[0]
        if tag is None:
            if self.compiled.host.first:
                warn(f"{latest} does not exist: nothing is loaded")
            return None, None
    folder = Path(load_dir) / str(tag)
    extra = self.compiled.load(folder, optimizer=load_optimizer_states and not load_module_only) or {}
    if not load_module_only:
        if load_lr_scheduler_states and extra.get("lr_scheduler") is not None and hasattr(self.lr_scheduler, "load_state_dict"):
            self.lr_scheduler.load_state_dict(extra["lr_scheduler"])
        for name in ("micro_steps", "global_steps", "global_samples"):
            setattr(self, name, int(extra.get(name, 0)))
        self.micro_steps -= self.micro_steps % self.gradient_accumulation_steps()  # a step of which some gradients were there begins anew
    return str(folder), dict(extra.get("client_state", {}))


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
