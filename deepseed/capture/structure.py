"""The modules of a model and the hooks on them: a program is made for them as they are. Cheap to compare: nothing is walked anew."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from operator import is_
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as _global

from deepseed.capture.attributes import Change

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class Structure:
    """Submodules, the names of parameters and buffers, and hooks, as they were when this was made."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = list(model.modules())
        self._children = [m._modules for m in self.modules]
        self._hooks = [_table(holder, name) for holder in (_global, *self.modules) for name in _HOOKS]
        self._names = [t for m in self.modules for t in (m._parameters, m._buffers)]
        self._then = self._now()

    def _now(self) -> tuple[list[Any], ...]:
        return (_values(self._children), _values(self._hooks), _keys(self._names), _tied(self._names))

    def parameters(self) -> list[nn.Parameter]:
        """The parameters as they are now, a tied one once for each of its names."""
        return [p for m in self.modules for p in m._parameters.values() if p is not None]

    def changed(self) -> list[Change]:
        """What differs: empty where a program made for this may serve."""
        now = self._now()
        if all(len(a) == len(b) and all(map(is_, a, b)) for a, b in zip(now[:2], self._then[:2], strict=True)) and now[2:] == self._then[2:]:
            return []
        words = ("submodules", "hooks", "names of parameters and buffers", "tied parameters")
        return [
            Change(f"the {word} of the model", "", f"{len(then)} {_shown(then, current)}", f"{len(current)} {_shown(current, then)}")
            for word, then, current in zip(words, self._then, now, strict=True)
            if len(then) != len(current) or not all(a is b or a == b for a, b in zip(then, current, strict=True))
        ]


def slots(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What each place for a parameter or a buffer is given, from ``values`` by first names: a tied tensor has several places, a place one
    name, though a module may stand at several paths (torch swaps a place that it is told twice, and then puts back what it put in)."""
    first = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
    places = ((f"{path}.{name}" if path else name, t) for path, m in model.named_modules() for name, t in (*m._parameters.items(), *m._buffers.items()))
    return {name: values[first[id(t)]] for name, t in places if t is not None}


def _table(holder: Any, name: str) -> dict[Any, Any]:
    found: dict[Any, Any] = getattr(holder, f"_global{name}" if holder is _global else name)
    return found


def _values(tables: Iterable[dict[Any, Any]]) -> list[Any]:
    return [*chain.from_iterable(map(dict.values, tables))]


def _keys(tables: Iterable[dict[Any, Any]]) -> list[Any]:
    return [name if value is not None else f"no {name}" for table in tables for name, value in table.items()]


def _tied(tables: Iterable[dict[Any, Any]]) -> list[int]:
    """For each parameter the number of the first one that it is."""
    first: dict[int, int] = {}
    return [first.setdefault(id(t), n) for n, t in enumerate(_values(tables)) if t is not None]


def _shown(these: list[Any], those: list[Any]) -> str:
    """The first one that the other side lacks."""
    odd = [x for x in these if not any(x is y for y in those)]
    return f"(with {getattr(odd[0], '__qualname__', None) or (odd[0] if isinstance(odd[0], str | int) else type(odd[0]).__name__)})" if odd else ""
