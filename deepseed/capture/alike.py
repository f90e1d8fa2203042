"""What a function of tensors does, op by op, as text: two functions of one text compute the same, whatever the values are that go in.

A new tensor of one number is named by that number, however it was made (``zeros_like(p)``, ``full(shape, 0.0)``, ``torch.tensor(0.0)``),
and by its turn: which of them an op changes in place is told apart. Zeros to which ``x`` is added are a copy of ``x``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_aten = torch.ops.aten
_ZERO = (_aten.zeros.default, _aten.zeros_like.default, _aten.new_zeros.default)
_ONE = (_aten.ones.default, _aten.ones_like.default, _aten.new_ones.default)
_GIVEN = {_aten.full.default: 1, _aten.full_like.default: 1, _aten.new_full.default: 2, _aten.scalar_tensor.default: 0}
_ITSELF = (_aten.detach.default, _aten.alias.default, _aten.lift_fresh.default)
_COPY = (_aten.clone.default, _aten._to_copy.default, _aten.lift_fresh_copy.default)


def told(function: Callable[..., Sequence[Any]], inputs: Sequence[Tensor]) -> list[str]:
    """A line for each op that ``function(*inputs)`` calls, and one for what it returns. The inputs are fake, so nothing is computed."""
    teller = _Teller()
    for n, t in enumerate(inputs):
        teller.names[id(t)] = f"input{n}"
    with teller:
        results = function(*inputs)
    return [*teller.lines, teller.of(list(results))]


@dataclass
class _Fill:
    """A new tensor all of whose elements are one number, until an op takes it: then it has a name."""

    value: float
    dtype: torch.dtype
    shape: tuple[int, ...]
    name: str = ""


class _Teller(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lines: list[str] = []
        self.names: dict[int, str] = {}
        self.fills: dict[int, _Fill] = {}
        self.held: list[Any] = []  # so that an id stays its tensor's
        self.used = 0

    def of(self, value: Any) -> str:
        return repr(tree_map(lambda x: _Name(self._name(x)) if isinstance(x, Tensor) else x, value))

    def _name(self, t: Tensor) -> str:
        fill = self.fills.get(id(t))
        if fill is None:
            return self.names.setdefault(id(t), f"strange{id(t)}")
        if not fill.name:
            self.used += 1
            fill.name = f"fill{self.used}[{fill.value!r} {fill.dtype} {list(fill.shape)}]"
        return fill.name

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.held += [args, kwargs, out]
        fill, changed = self._fill(func, args, out), self._virgin(args)
        if fill is not None:
            self.fills[id(out)] = fill
        elif func is _aten.mul_.Tensor and changed is not None and changed.value == 0 and isinstance(args[1], (int, float)) and isfinite(args[1]):
            pass  # 0 it stays
        elif func is _aten.add_.Tensor and changed is not None and changed.value == 0 and kwargs.get("alpha", 1) == 1 and _like(changed, args[1]):
            self.lines.append(f"copy {self._name(args[1])}")  # 0 + x
            changed.name = f"value{len(self.lines)}.0"
        elif func in _COPY[:1]:
            self.lines.append(f"copy {self._name(args[0])}")
            self.names[id(out)] = f"value{len(self.lines)}.0"
        elif func in _ITSELF and id(args[0]) in self.names:
            self.names[id(out)] = self.names[id(args[0])]
        elif func.namespace not in ("profiler", "prim"):
            self.lines.append(f"{func} {self.of((args, dict(sorted(kwargs.items()))))}")
            for n, t in enumerate(tree_leaves(out)):
                if isinstance(t, Tensor) and id(t) not in self.fills:
                    self.names.setdefault(id(t), f"value{len(self.lines)}.{n}")
        return out

    def _virgin(self, args: tuple[Any, ...]) -> _Fill | None:
        """The first argument, where it is a new tensor that no op has taken yet."""
        fill = self.fills.get(id(args[0])) if args else None
        return fill if fill is not None and not fill.name else None

    def _fill(self, func: OpOverload, args: tuple[Any, ...], out: Any) -> _Fill | None:
        if not isinstance(out, Tensor):
            return None
        value: Any = 0.0 if func in _ZERO else 1.0 if func in _ONE else args[_GIVEN[func]] if func in _GIVEN else None
        if func in (*_ITSELF, *_COPY) and isinstance(args[0], Tensor):
            old = self.fills.get(id(args[0]))
            if old is not None and func in _ITSELF:
                return old
            constant = old is None and id(args[0]) not in self.names and args[0].numel() == 1 and func not in (_aten.clone.default, _aten.detach.default)
            value = old.value if old is not None and not old.name else _read(args[0]) if constant else None
        if value is None or isinstance(value, Tensor):
            return None
        return _Fill(_rounded(value, out.dtype), out.dtype, tuple(out.shape))


class _Name(str):
    def __repr__(self) -> str:
        return str(self)


def _like(fill: _Fill, t: Any) -> bool:
    return isinstance(t, Tensor) and (t.dtype, tuple(t.shape)) == (fill.dtype, fill.shape)


def _read(t: Tensor) -> float | None:
    """The number of a real tensor; None of a fake one."""
    if type(t) is not Tensor:
        return None
    with torch._C._DisableTorchDispatch():
        return float(t.item())


def _rounded(value: float, dtype: torch.dtype) -> float:
    with torch._C._DisableTorchDispatch():
        return float(torch.tensor(value, dtype=torch.float64).to(dtype).item())
