"""``get_accelerator()``: what DeepSpeed's scripts ask of the device, answered by torch; without an accelerator it is the CPU."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.distributed as dist


class Accelerator:
    """The kind of device that torch has found."""

    def __init__(self) -> None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        self.kind = found.type if found is not None else "cpu"
        self._module: Any = getattr(torch, self.kind, None)

    def device_name(self, device_index: int | None = None) -> str:
        return self.kind if device_index is None or self.kind == "cpu" else f"{self.kind}:{device_index}"

    def current_device_name(self) -> str:
        return self.device_name(self.current_device())

    def device(self, device_index: int | None = None) -> torch.device:
        return torch.device(self.device_name(device_index))

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        """On the CPU the ranks of this process group: each is a device."""
        return torch.accelerator.device_count() if self.kind != "cpu" else dist.get_world_size() if dist.is_initialized() else 1

    def current_device(self) -> int:
        return torch.accelerator.current_device_index() if self.kind != "cpu" else 0

    def set_device(self, device_index: int) -> None:
        if self.kind != "cpu":
            torch.accelerator.set_device_index(device_index)

    def synchronize(self, device_index: int | None = None) -> None:
        if self.kind != "cpu":
            torch.accelerator.synchronize(device_index)

    def empty_cache(self) -> None:
        if self.kind != "cpu":
            self._module.empty_cache()

    def memory_allocated(self, device_index: int | None = None) -> int:
        return int(self._module.memory_allocated(device_index)) if self.kind != "cpu" else 0

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        return int(self._module.max_memory_allocated(device_index)) if self.kind != "cpu" else 0

    def reset_peak_memory_stats(self, device_index: int | None = None) -> None:
        if self.kind != "cpu":
            self._module.reset_peak_memory_stats(device_index)

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def is_bf16_supported(self) -> bool:
        return bool(self._module.is_bf16_supported()) if hasattr(self._module, "is_bf16_supported") else True

    def is_fp16_supported(self) -> bool:
        return True

    def communication_backend_name(self) -> str:
        return "nccl" if self.kind == "cuda" else "gloo"

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"get_accelerator() has no {name!r}\n  fix: torch.accelerator, or torch.{self.kind}")


@cache
def get_accelerator() -> Accelerator:
    return Accelerator()
