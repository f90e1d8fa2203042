"""Parameters and buffers belong to the compiled step: what is put in their place in the module is taken over, or refused by name.

Writing into a parameter (``copy_``, ``load_state_dict``) is always seen. Another tensor in its place is seen here: one process takes
its values; under a process group, where ranks hold parts, it is an error, as another shape or dtype is everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from deepseed.capture.batch import DTYPES
from deepseed.capture.structure import Structure
from deepseed.ir.program import Input
from deepseed.runtime.elsewhere import Elsewhere
from deepseed.runtime.host import Host
from deepseed.runtime.state import State, StateError, shown

_WORDS = {"param": "parameter", "buffer": "buffer"}


class Places:
    """Where a module holds the parameters and buffers of ``states``: found once for a structure of the module."""

    def __init__(self, model: nn.Module, structure: Structure, states: Sequence[State]) -> None:
        self.structure, self.count = structure, len(states[0].types)
        self._tables: list[tuple[tuple[str, str], dict[str, Any], str]] = []
        for role, key in states[0].types:
            if role in _WORDS:
                path, _, name = key.rpartition(".")
                try:
                    owner = model.get_submodule(path)
                except AttributeError:
                    raise StateError(f"{_WORDS[role]} {key!r} of the compiled step is gone from the model\n  fix: compile the changed model anew") from None
                self._tables.append(((role, key), owner._buffers if role == "buffer" else owner._parameters, name))

    def take_over(self, model: nn.Module, host: Host, states: Sequence[State]) -> None:
        """See that the module's tensors are those of ``states``. Raises StateError."""
        own = host.backend != "simulate" or host.mesh.ranks == 1  # several simulated ranks hold copies, and look for themselves
        taken = False
        for (role, key), table, name in self._tables:
            now, kept = table.get(name), states[0].tensors.get((role, key))  # None: other ranks of the pipeline store it
            type_ = states[0].types[role, key]
            part = kept is not None and host.backend != "simulate" and not shown(type_, host.mesh)  # such a module holds its part
            shape = tuple(kept.shape) if kept is not None and part else type_.shape
            if now is None or tuple(now.shape) != shape or DTYPES.get(now.dtype) != type_.dtype:
                is_ = "gone" if now is None else f"{DTYPES.get(now.dtype, now.dtype)}{list(now.shape)}"
                raise StateError(
                    f"{_WORDS[role]} {key!r} is {is_} now, {type_.dtype}{list(type_.shape)} in the compiled step\n"
                    "  fix: convert the model before it is compiled (a compute dtype is a word of the plan: bf16), or compile it anew"
                )
            if own and (not isinstance(now, Elsewhere) if kept is None else _local(now).data_ptr() != kept.data_ptr()):
                if host.backend != "simulate":
                    raise StateError(
                        f"{_WORDS[role]} {key!r} was replaced by another tensor: each rank's part of the step is in the former one\n"
                        "  fix: write into it (with torch.no_grad(): p.copy_(new)), or load_state_dict without assign=True"
                    )
                states[0].put(Input("", type_, role, key), now.detach().clone())
                taken = True
        if taken:
            host.bind(model, states)


def _local(t: Tensor) -> Tensor:
    with torch.no_grad():
        return t._local_tensor if isinstance(t, DTensor) else t
