"""DeepSpeed's ``zero.Init`` and ``zero.GatheredParameters``: where a script wants parameters that are whole.

Until its first batch a model is whole and is the user's own, so ``Init`` has nothing to do. From then on each rank stores its part, as DTensors,
and ``GatheredParameters`` shows whole tensors in their place: every torch function that is given one of these parameters is given the whole one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from deepseed.build import CompileError
from deepseed.compiled import Compiled, compiled_with
from deepseed.handover import write
from deepseed.ir.layout import REPLICATED
from deepseed.runtime.distributed import world


class Init:
    """``with zero.Init():`` builds the model as it is built without: whole on every rank, until its first batch. ``dtype`` and a config's ``bf16`` or ``fp16`` leave
    parameters as they are: the plan's word says in what they are computed. A model that no rank could hold is built in ``deepseed.meta()`` and read from files
    (``initialize(weights=..)``)."""

    def __init__(self, module: nn.Module | None = None, *_: Any, **__: Any) -> None:
        return

    def __enter__(self) -> Init:
        return self

    def __exit__(self, *_: object) -> None:
        return


class _Whole(TorchFunctionMode):
    """Whole tensors in place of parameters, by their ids."""

    def __init__(self, whole: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.whole = whole

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(lambda x: self.whole.get(id(x), x) if isinstance(x, Tensor) else x, (args, kwargs or {}))
        return func(*args, **kwargs)


class GatheredParameters:
    """``with zero.GatheredParameters(params, modifier_rank=0):`` the parameters are whole inside. What rank ``modifier_rank`` has written into them by the end is
    what all ranks have then; without one, what is written into a parameter that is stored in parts is lost. Every rank must enter, and leave.

    params: a parameter, several, or a module."""

    def __init__(self, params: Tensor | nn.Module | Iterable[Tensor], modifier_rank: int | None = None, fwd_module: Any = None, enabled: bool = True) -> None:
        given = params.parameters() if isinstance(params, nn.Module) else [params] if isinstance(params, Tensor) else params
        self.params = list(given) if enabled else []
        self.modifier_rank = modifier_rank
        if modifier_rank is not None and not 0 <= modifier_rank < (size := dist.get_world_size() if dist.is_initialized() else 1):
            raise CompileError(f"GatheredParameters(modifier_rank={modifier_rank}) of {size} ranks\n  fix: a rank from 0 to {size - 1}")

    def __enter__(self) -> GatheredParameters:
        self._parts: dict[int, tuple[Compiled, str]] = {}
        whole: dict[int, Tensor] = {}
        for p in self.params:
            found = compiled_with(p)
            if found is not None and (isinstance(p, DTensor) or found[0].states[0].types["param", found[1]].layout != REPLICATED):
                self._parts[id(p)] = found
                whole[id(p)] = nn.Parameter(found[0].whole_parameter(found[1]), requires_grad=p.requires_grad)
        self._mode = _Whole(whole)
        self._mode.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._mode.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        if kind is not None or self.modifier_rank is None:
            return
        for p in self.params:
            now = self._mode.whole.get(id(p), p).detach()
            if dist.is_initialized() and dist.get_world_size() > 1:
                now = _of_rank(self.modifier_rank, now)
            if id(p) in self._parts:
                compiled, name = self._parts[id(p)]
                write(compiled.states, ("param", name), now)
            elif now.data_ptr() != p.data_ptr():
                with torch.no_grad():
                    p.copy_(now)


def _of_rank(rank: int, t: Tensor) -> Tensor:
    """``t`` of that rank, on all."""
    here = world(t.device)
    with here.guarded():
        t = t.contiguous()
        here.run(lambda: dist.broadcast(t, rank, async_op=True), f"a parameter that rank {rank} has written into")
    return t
