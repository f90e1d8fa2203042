"""Notes which Python values a forward reads while it is traced, without a wrapper around the model.

The classes of its modules, and of the objects reached through them, note each attribute that is read before the trace writes it;
of functions (the forward's, loss_fn) the closed-over values and the plain globals that they name. Code is not watched: a method
that is replaced on its class, or on an instance whose class has one, changes no program.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import getattr_static
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from deepseed.capture.attributes import LARGE, MISSING, SCALARS, Attribute, Reads, Write, copied, current, frozen, put
from deepseed.capture.errors import CaptureError
from deepseed.capture.metadata import source_line

FEW = 32  # entries of a container among the globals of a file; larger ones are tables
_INTERNAL = frozenset(vars(nn.Module())) | {"_compiled_call_impl"}  # hooks and submodules: deepseed.capture.structure; training: the settings of a program
_CODE = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType, type)


@dataclass(frozen=True)
class _First:
    holder: Any
    name: str
    path: str
    line: str
    frozen: Any
    copy: Any


class Recorder:
    """``with recorder.on():`` around a trace; then ``recorder.reads()``."""

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Any] | None) -> None:
        self._paths: dict[int, str] = {}
        self._before: dict[int, dict[str, Any]] = {}
        self._kept: list[Any] = []  # keeps the ids
        self._own = {id(m) for m in model.modules()}
        self._parameters = {id(p): name for name, p in model.named_parameters()}
        self._first: dict[tuple[int, str], _First | None] = {}  # None: written by the trace before it was read
        self._lines: dict[tuple[int, str], str] = {}
        self._start: dict[tuple[int, str], Any] = {}  # what an attribute held when the trace first wrote it
        self._hooked: dict[type, list[tuple[str, Any]]] = {}
        self._on = self._noting = False
        self._seen: set[int] = set()
        self.writes: list[Write] = []
        for name, module in model.named_modules():
            self._enter(module, name)
        if loss_fn is not None:
            self._function(loss_fn, "loss_fn")

    @contextmanager
    def on(self) -> Iterator[None]:
        self._on = True
        classes: set[type] = {type(o) for o in self._kept if not isinstance(o, nn.Module)}
        try:
            for cls in (nn.Module, *classes):
                self._hook(cls)
            yield
        finally:
            self._on = False
            for cls, plain in self._hooked.items():
                for name, old in plain:
                    type.__setattr__(cls, name, old) if old is not None else type.__delattr__(cls, name)
            self._hooked.clear()
            self._undo()

    def reads(self) -> Reads:
        """After the trace, with every switch of it undone: the values are the user's."""
        found = []
        for first in self._first.values():
            if first is not None:
                now = current(first.holder, first.name)
                found.append(Attribute(first.holder, first.name, first.path, first.line, now, frozen(now)))
        return Reads(found, self.writes)

    def give_back(self, holder: Any, name: str) -> bool:
        """Put back what ``holder.name`` was before the trace, if each forward writes it before it reads it: steps do not depend
        on one another through it. False, and nothing done, where the trace read it first or not at all (then somebody else does)."""
        key = (id(holder), name)
        if key not in self._start or self._first.get(key, MISSING) is not None:
            return False
        put(holder, name, self._start[key])
        return True

    def _undo(self) -> None:
        """Find what the forward has changed of what it read, and put it back."""
        for key, first in self._first.items():
            if first is None:
                continue
            now = current(first.holder, first.name)
            held = now.values() if isinstance(now, dict) else now if isinstance(now, list | tuple) else [now]
            if frozen(now) != first.frozen and not any(isinstance(v, Tensor) for v in held):  # fake tensors are refused by others
                self.writes.append(Write(first.holder, first.name, first.path, self._lines.get(key, first.line), first.copy, copied(now)))
                put(first.holder, first.name, first.copy)

    # what is watched ------------------------------------------------------------------------------------------------

    def _enter(self, holder: Any, path: str) -> None:
        """Watch an object's attributes."""
        if id(holder) in self._paths:
            return
        if isinstance(holder, nn.Module) and id(holder) not in self._own:
            for name, module in holder.named_modules():
                if id(module) not in self._paths:
                    self._watch(module, f"{path}.{name}" if name else path)
            return
        self._watch(holder, path)

    def _watch(self, holder: Any, path: str) -> None:
        self._paths[id(holder)] = path
        self._kept.append(holder)
        self._before[id(holder)] = {n: frozen(v) for n, v in _state(holder).items() if n not in _INTERNAL}
        if self._on and not isinstance(holder, nn.Module):
            self._hook(type(holder))

    def _hook(self, cls: type) -> None:
        if cls in self._hooked:
            return
        get: Any = cls.__getattribute__
        put: Any = cls.__setattr__
        own = [(name, vars(cls).get(name)) for name in ("__getattribute__", "__setattr__")]

        def reading(holder: Any, name: str) -> Any:
            try:
                value = get(holder, name)
            except AttributeError:
                self._read(holder, name, MISSING)
                raise
            self._read(holder, name, value)
            return value

        def writing(holder: Any, name: str, value: Any) -> None:
            key = (id(holder), name)
            if self._first.get(key) is not None and key not in self._lines:
                self._lines[key] = source_line()
            if key not in self._first and key not in self._start and id(holder) in self._paths:
                self._start[key] = _state(holder).get(name, MISSING)
            put(holder, name, value)

        try:
            type.__setattr__(cls, "__getattribute__", reading)
            self._hooked[cls] = own[:1]
            type.__setattr__(cls, "__setattr__", writing)
            self._hooked[cls] = own
        except TypeError:  # a class of C
            return

    def _read(self, holder: Any, name: str, value: Any) -> None:
        """The trace reads ``holder.name``."""
        if not self._on or self._noting or (id(holder), name) in self._first or name in _INTERNAL or name.startswith("__"):
            return
        path = self._paths.get(id(holder))
        if path is None:
            return
        self._noting = True  # and reads, itself
        try:
            self._note(holder, name, f"{path}.{name}" if path else name, value)
        finally:
            self._noting = False

    def _note(self, holder: Any, name: str, path: str, value: Any) -> None:
        if value is MISSING and isinstance(holder, nn.Module):
            own = next((t[name] for t in (holder._parameters, holder._buffers, holder._modules) if name in t), MISSING)
            if isinstance(own, Tensor) and id(holder) not in self._own:
                value = own  # of a model beside this one: a constant of the program
            elif own is not MISSING:
                return
        before, now = self._before[id(holder)], frozen(value)
        if name in _state(holder):
            if (id(holder), name) in self._start or before.get(name, MISSING) != now:  # written already, be it the same value again
                self._first[id(holder), name] = None
                return
        elif value is not MISSING and not isinstance(value, Tensor):
            static = getattr_static(type(holder), name, MISSING)
            if static is not MISSING and hasattr(static, "__get__") and not isinstance(static, types.MemberDescriptorType):
                self._first[id(holder), name] = None  # code; what it reads is noted for itself
                self._function(static, type(holder).__name__)
                return
        self._take(holder, name, path, value, source_line())

    def _take(self, holder: Any, name: str, path: str, value: Any, line: str) -> None:
        held = [value, *(value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) and len(value) <= LARGE else ())]
        parameter = next((self._parameters[id(v)] for v in held if id(v) in self._parameters), "")
        if parameter and type(holder) is not dict:  # what is among the globals may be another's
            by = "loss_fn" if isinstance(holder, types.CellType) else "the forward"
            raise CaptureError(
                f"{by} reads parameter {parameter!r} through {path.rpartition(', ')[2]}, where it would be a constant without a gradient",
                path=self._paths.get(id(holder), ""), line=line or source_line(), fix="read it as the module has it: its own attribute, nn.ParameterList, or named_parameters() of the model that loss_fn is given",
            )  # fmt: skip
        if parameter or any(isinstance(v, FakeTensor) for v in held):
            self._first[id(holder), name] = None  # the trace's own
            return
        if not isinstance(value, nn.Module):
            self._first[id(holder), name] = _First(holder, name, path, line, frozen(value), copied(value))
            self._kept.append(holder)
        self._reach(value, path)

    def _reach(self, value: Any, path: str) -> None:
        """Watch the objects that a value is or holds."""
        if isinstance(value, dict | list | tuple) and len(value) <= LARGE:
            for key, each in value.items() if isinstance(value, dict) else enumerate(value):
                if not isinstance(each, SCALARS):
                    self._reach(each, f"{path}[{key!r}]")
        elif isinstance(value, nn.Module) or (not isinstance(value, (*SCALARS, *_CODE, Tensor)) and _is_users(type(value))):
            self._enter(value, path)

    def _function(self, function: Any, path: str) -> None:
        """The values that a function closes over, and those of its globals that it may read."""
        while not isinstance(function, types.FunctionType):
            if isinstance(function, types.MethodType):
                self._reach(function.__self__, path)
                function = function.__func__
            elif isinstance(function, staticmethod | classmethod):
                function = function.__func__
            elif isinstance(function, property) and function.fget is not None:
                function = function.fget
            elif hasattr(function, "func") and hasattr(function, "keywords"):  # functools.partial
                self._reach([*function.args, *function.keywords.values()], path)
                function = function.func
            else:
                self._reach(function, path)
                return
        if id(function) in self._seen or not _is_users(function):
            return
        self._seen.add(id(function))
        self._kept.append(function)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self._outside(cell, "cell_contents", name, path, function)
        for name in _names(function.__code__):
            if name in function.__globals__ and not name.startswith("__"):
                self._outside(function.__globals__, name, name, path, function)
        if hasattr(function, "__wrapped__"):
            self._function(function.__wrapped__, path)

    def _outside(self, holder: Any, name: str, shown: str, path: str, by: types.FunctionType) -> None:
        value = current(holder, name)
        if value is MISSING or isinstance(value, types.ModuleType | type) or (id(holder), name) in self._first:
            return
        if isinstance(value, _CODE) or hasattr(value, "__wrapped__"):
            if getattr(value, "__globals__", None) is by.__globals__:  # of the same file
                self._function(value, path)
        elif isinstance(value, (*SCALARS, Tensor, types.SimpleNamespace)) or (type(value) in (dict, list, tuple, set) and len(value) <= FEW) or _is_users(type(value)):
            self._take(holder, name, f"{path}, {shown}", value, f"{by.__code__.co_filename.rpartition('/')[2]}:{by.__code__.co_firstlineno}")


def _state(holder: Any) -> dict[str, Any]:
    """The attributes of an instance itself."""
    try:
        return dict(object.__getattribute__(holder, "__dict__"))
    except AttributeError:
        slots = [name for c in type(holder).__mro__ for name, member in vars(c).items() if isinstance(member, types.MemberDescriptorType)]
        return {name: value for name in slots if (value := current(holder, name)) is not MISSING}


def _is_users(code: Any) -> bool:
    """Whether a class or function is neither torch's, nor Python's, nor DeepSeed's own."""
    top = str(code.__module__ or "").partition(".")[0]
    return top == "__main__" or (top not in ("torch", "deepseed", "builtins", "numpy") and top not in sys.stdlib_module_names)


def _names(code: types.CodeType) -> set[str]:
    """The names that a function looks up, functions inside it included."""
    return set(code.co_names).union(*(_names(c) for c in code.co_consts if isinstance(c, types.CodeType)))
