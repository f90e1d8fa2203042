"""Python values that a program is made for (``self.scale``, ``config.window``, a number that loss_fn closes over), and comparing them.

``Reads`` holds what a trace has read (``deepseed.capture.recorder``); ``changed`` says what is another value now. What the forward
writes is undone after a trace, which is no step, and done again by each step that runs the program.
"""

from __future__ import annotations

import array
import collections
import types
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

LARGE_ARRAY = 2**16  # bytes of a NumPy array; of a larger one only identity and shape are watched
LARGE = 1000  # entries; of a larger container (a vocabulary) only identity and length are watched
SCALARS = (bool, int, float, complex, str, bytes, type(None), Enum, torch.dtype, torch.device, slice, range)
MISSING: Any = types.new_class("missing", exec_body=lambda d: d.update(__repr__=lambda self: "(none)"))()


class _Same:
    """Equal to itself only: an object whose identity is what is compared."""

    __slots__ = ("held",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, held: Any) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.held is self.held


def frozen(value: Any) -> Any:
    """What stays comparable when ``value`` is changed in place: numbers and words by value and type, containers by their
    entries, arrays by their bytes, tensors by identity and version, other objects by identity (their attributes are noted for themselves)."""
    kind = type(value)
    if isinstance(value, SCALARS):
        return (kind, repr(value)) if value != value else (kind, value)
    if isinstance(value, Tensor):
        return (_Same(value), 0 if isinstance(value, FakeTensor) or value.is_inference() else value._version)
    if _is_array(value):
        return (_Same(value), value.shape) if value.nbytes > LARGE_ARRAY else (kind, value.dtype.str, value.shape, value.tobytes())
    if isinstance(value, bytearray | array.array):
        return (kind, bytes(value))
    if isinstance(value, collections.deque):
        return (kind, [frozen(v) for v in value]) if len(value) <= LARGE else (_Same(value), len(value))
    if isinstance(value, weakref.ref):
        return (kind,)
    if isinstance(value, types.SimpleNamespace | types.MappingProxyType):
        return (kind, frozen(dict(vars(value) if isinstance(value, types.SimpleNamespace) else value)))
    if isinstance(value, dict | list | tuple | set | frozenset):
        if len(value) > LARGE:
            return (_Same(value), len(value))
        if isinstance(value, dict):
            return (kind, [(frozen(k), frozen(v)) for k, v in value.items()])
        return (kind, [frozen(v) for v in (sorted(value, key=repr) if isinstance(value, set | frozenset) else value)])
    return _Same(value)


@dataclass(frozen=True)
class Attribute:
    """One value that a forward reads. ``holder`` has it: an object, a closure's cell, or a dict of globals."""

    holder: Any
    name: str
    path: str  # "layers.0.mlp.scale"
    line: str  # where it was read
    value: Any
    frozen: Any


@dataclass(frozen=True)
class Change:
    """A value that differs from the one that a program was made for."""

    path: str
    line: str
    then: str
    now: str


@dataclass(frozen=True)
class Write:
    """What each run of the program leaves behind on a module, as the forward does: ``holder.name`` becomes ``after``."""

    holder: Any
    name: str
    path: str
    line: str
    before: Any
    after: Any

    def apply(self) -> None:
        put(self.holder, self.name, self.after)

    def undo(self) -> None:
        put(self.holder, self.name, self.before)


class Reads:
    """The Python values that a program is made for, and those that it writes."""

    def __init__(self, attributes: Sequence[Attribute] = (), writes: Sequence[Write] = ()) -> None:
        self.attributes, self.writes = tuple(attributes), tuple(writes)
        self._fast = [(a.holder, a.name, a.value, _is_mutable(a.value)) for a in self.attributes]

    def changed(self) -> list[Change]:
        """The attributes whose value is another one now; empty where the program may serve."""
        odd = [n for n, (holder, name, value, mutable) in enumerate(self._fast) if mutable or current(holder, name) is not value]
        out = []
        for each in (self.attributes[n] for n in odd):
            now = current(each.holder, each.name)
            if frozen(now) != each.frozen:
                out.append(Change(each.path, each.line, short(each.value), short(now)))
        return out


def _is_mutable(value: Any) -> bool:
    """Whether the same object may come to mean something else."""
    return isinstance(value, dict | list | tuple | set | Tensor | bytearray | array.array | collections.deque | types.SimpleNamespace | types.MappingProxyType) or _is_array(value)


def _is_array(value: Any) -> bool:
    """A NumPy array or scalar."""
    return type(value).__module__.partition(".")[0] == "numpy" and hasattr(value, "tobytes")


def short(value: Any) -> str:
    """A value as messages show it, cut at 60 characters."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}, version {0 if isinstance(value, FakeTensor) else value._version}"
    text = f"an array {value.dtype}{list(value.shape)}" if _is_array(value) and value.size > 4 else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def current(holder: Any, name: str) -> Any:
    if type(holder) is dict:
        return holder.get(name, MISSING)
    try:
        return getattr(holder, name, MISSING)
    except ValueError:  # an empty cell
        return MISSING


def copied(value: Any) -> Any:
    """Lists, dicts and sets copied, what they hold shared."""
    if type(value) is list:
        return [copied(v) for v in value]
    if type(value) is dict:
        return {k: copied(v) for k, v in value.items()}
    return set(value) if type(value) is set else value


def put(holder: Any, name: str, value: Any) -> None:
    """Give an attribute a value, or the list, dict or set that it holds the entries of ``value``."""
    now = current(holder, name)
    if type(now) is type(value) and type(value) in (list, dict, set):
        now.clear()
        (now.extend if isinstance(now, list) else now.update)(copied(value))
    elif isinstance(holder, types.CellType):
        holder.cell_contents = value
    elif type(holder) is dict:
        holder[name] = value
    elif value is MISSING:
        with suppress(AttributeError):
            object.__delattr__(holder, name)
    else:
        object.__setattr__(holder, name, copied(value))
