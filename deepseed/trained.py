"""A module that is trained in the user's own loop, with the update compiled too: what ``deepseed.initialize`` gives an engine.

``loss.backward()`` leaves the gradients where the plan has them, added up over as many backwards as the user likes: below zero2 each
rank's own summand, whole; from there on its part of the sum over ranks. ``update()`` is a program of its own over these, the parameters and
the optimizer's state: it reduces what was not, clips, and updates. Both programs are of one plan and share what is stored.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from deepseed.api import Module
from deepseed.build import CompileError
from deepseed.compiled import together
from deepseed.updating import Updating


class Trained(Updating, Module):  # type: ignore[misc]  # state_dict is of whole tensors
    """A compiled module with its optimizer: forward and backward are the user's to call, ``update()`` clips and updates."""

    _refuses = False  # its optimizer is given, and pointed at what takes the parameters' place

    def __init__(self, model: Any, plan: str, **options: Any) -> None:
        super().__init__(model, plan, **options)
        if self.plan.stages > 1:
            raise CompileError(
                f"pp{self.plan.stages}: a pipeline runs a step as a whole, and a loop that calls forward, backward and update itself leaves it none\n"
                "  fix: deepseed.compile(model, plan, optimizer=...) and step(batch), which train_batch of an engine calls too; or a plan without pp"
            )
        self._waiting: dict[str, None] = {}  # parameters, of all stages of a pipeline
        self._pending: list[dict[str, Tensor]] = [{} for _ in self.host.coordinates]

    def _pend(self, waiting: Sequence[str], parts: Sequence[Mapping[str, Tensor]]) -> None:
        """Add a backward's gradients to those that wait."""
        self._waiting |= dict.fromkeys(waiting)
        for mine, part in zip(self._pending, parts, strict=True):
            seen = {t.untyped_storage().data_ptr() for t in mine.values()}
            for name, t in part.items():
                if name in mine:
                    mine[name].add_(t)
                    continue
                whole, memory = t.untyped_storage().nbytes() == t.nbytes, t.untyped_storage().data_ptr()
                mine[name] = t if whole and memory not in seen else t.clone()  # one that is written into: nobody else's
                seen.add(mine[name].untyped_storage().data_ptr())

    @property
    def pending(self) -> tuple[str, ...]:
        """The parameters whose gradients wait for an update."""
        return tuple(self._waiting)

    def drop(self) -> None:
        """Forget the gradients that wait."""
        self._waiting.clear()
        for mine in self._pending:
            mine.clear()

    @together
    def update(self) -> None:
        """Clip and update with the gradients that wait, and forget them. Raises CompileError where none do."""
        if not self._waiting:
            raise CompileError("an update without gradients\n  fix: call backward on a loss of the module's outputs first")
        found = self._find({}, "update", self.pending)
        results = self.host.run(found.built.executables, self._given(found, self._pending))
        self._settle(found.built)
        self._shown = found.built.returned(self.host, results)
        self.drop()
        self._stepped()

    def _restore(self, dir: str | os.PathLike[str], *args: Any) -> dict[str, bytes]:
        """As ever; gradients that wait were of the former parameters, and are forgotten."""
        texts = super()._restore(dir, *args)
        self.drop()
        return texts

    def waits_for_state(self) -> bool:
        return not self.programs.updates

    @contextmanager
    def gathered(self) -> Iterator[nn.Module]:
        """The eager model with whole parameters and buffers in it, such as for ``generate``; what is written into them is lost. Every rank must enter."""
        whole = self.state_dict() if self.states else {}
        swapped: list[tuple[dict[str, Any], str, Any]] = []
        try:
            for path, module in self.model.named_modules():
                for table in (module._parameters, module._buffers):
                    for name, held in table.items():
                        full = whole.get(f"{path}.{name}" if path else name)
                        if full is not None and full is not held:
                            swapped.append((table, name, held))
                            table[name] = nn.Parameter(full, held.requires_grad) if table is module._parameters else full
            yield self.model
        finally:
            for table, name, held in swapped:
                table[name] = held

    @together
    def gradient(self, name: str) -> Tensor | None:
        """The mean gradient of a parameter that waits, whole and unscaled, before clipping; None where it has none. Every rank must ask."""
        if name not in self._waiting:
            return None
        type_ = self.programs.pending[name]
        g = self.host.whole([mine.get(name) for mine in self._pending], type_, self.programs.homes["pending", name])
        return g / self.loss_scale
