"""CUDA graphs without a device: what ``torch.cuda.graph`` does, on the CPU's memory.

A capture writes down every op with the memory that it reads and writes, and leaves no trace: what it wrote is put back, its results are not numbers until a
replay makes them. A replay runs the ops that were written down on that memory, whatever Python would do now. To read a number while capturing is an
error, as on a device. What is no op of torch's (C++ of our own) is not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

READS = {"_local_scalar_dense", "lift_fresh", "nonzero", "equal", "masked_select", "unique_dim", "_unique2", "bincount"}  # reads a number, or copies one from the host


class Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[tuple[int, Tensor]]]] = []
        self._own: set[int] = set()  # storages that were made while capturing
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func._overloadpacket.__name__ in READS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        args, kwargs = tree_map_only(Tensor, lambda t: t.detach(), (tuple(args), dict(kwargs or {})))
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        for t in _written(func, args, kwargs):
            storage = t.untyped_storage()
            if storage._cdata not in self._own and storage._cdata not in self._before:
                self._before[storage._cdata] = storage, storage.clone()
        out = func(*args, **kwargs)
        fresh = [(n, t) for n, t in enumerate(_tensors(out)) if t.untyped_storage()._cdata not in given]
        self._own.update(t.untyped_storage()._cdata for _, t in fresh)
        self.calls.append((func, args, kwargs, fresh))
        return out

    def rewind(self) -> None:
        """Nothing was computed."""
        for storage, before in self._before.values():
            storage.copy_(before)
        for *_, fresh in self.calls:
            for _, t in fresh:
                if t.is_floating_point():
                    t.fill_(float("nan"))

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, fresh in self.calls:
                made = _tensors(func(*args, **kwargs))
                for n, t in fresh:
                    t.copy_(made[n])


class TapeRecorder:
    """Stands for ``CudaRecorder``. ``fails``: what the device says to a capture."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.warmed, self.captured, self.replayed = device, 0, 0, 0
        self.fails = ""

    def warm(self, run: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        self.warmed += 1
        return run()

    def capture(self, run: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
        if self.fails:
            raise RuntimeError(self.fails)
        tape = Tape()
        try:
            with not_listed(), tape:
                out = run()
        finally:
            tape.rewind()
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            tape.replay()

        return out, replay


@contextmanager
def not_listed() -> Iterator[None]:
    """``tolist`` of a CPU's tensor passes by the dispatcher."""

    def refuse(self: Tensor) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing: tolist")

    own = Tensor.tolist
    Tensor.tolist = refuse  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tensor.tolist = own  # type: ignore[method-assign]


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in tree_flatten(value)[0] if isinstance(t, Tensor)]


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    named = func._schema.arguments
    marked = {a.name for a in named if a.alias_info is not None and a.alias_info.is_write}
    given = {**{a.name: x for a, x in zip(named, args, strict=False)}, **kwargs}
    return _tensors([x for name, x in given.items() if name in marked])
