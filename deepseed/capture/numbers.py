"""Python numbers of an optimizer's step, while it is traced: they stay tensors, and branches on them are followed both ways.

``.item()`` of a step count gives the count as a float64 tensor, as the eager loop computes with Python doubles, and scalar
arguments (``alpha``, ``value``) that turned out to be tensors are multiplied in. ``min``, ``max``, ``float``, ``int`` and the
functions of ``math`` work on such numbers where the optimizer's class is defined. ``if number > 5:`` takes the way that a
``Ways`` says; tracing once a way, and choosing by the recorded conditions, gives the whole step.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_COMPARISONS = {"__eq__": "eq", "__ne__": "ne", "__lt__": "lt", "__le__": "le", "__gt__": "gt", "__ge__": "ge", **{n: n for n in ("eq", "ne", "lt", "le", "gt", "ge")}}
_FILLS = {"full": 1, "full_like": 1, "new_full": 2}  # where the number is that they make a tensor of
_ALIASES = {"fabs": "abs", "pow": "pow"}  # functions of math that torch calls otherwise, or that take two numbers


class Ways:
    """The outcome of each branch on a value, in the order in which a step meets them: as ``taken`` says, further ones true.
    ``conditions``: what was asked, a bool tensor each."""

    def __init__(self, taken: Sequence[bool] = ()) -> None:
        self.taken = list(taken)
        self.conditions: list[Tensor] = []

    def decide(self, value: Tensor) -> bool:
        self.conditions.append(value.reshape(()).to(torch.bool))
        if len(self.conditions) > len(self.taken):
            self.taken.append(True)
        return self.taken[len(self.conditions) - 1]


class Numbers(TorchFunctionMode):
    """Python numbers read from tensors stay tensors, in float64, and are numbers to the ops that meet them.

    A number beside tensors takes their dtype, a number beside numbers stays float64: as with Python's own. ``known``: numbers
    whose sign is a fact of the program, so that ``momentum != 0`` is a Python value.
    """

    def __init__(self, ways: Ways, *numbers: Tensor, known: Sequence[tuple[Tensor, float]] = ()) -> None:
        super().__init__()
        self.ways = ways
        self.numbers = {id(t): t for t in (*numbers, *(t for t, _ in known))}  # held, so that an id stays its tensor's
        self.known = {id(t): value for t, value in known}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is Tensor.item:
            return args[0] if id(args[0]) in self.numbers else self._number(args[0].to(torch.float64))
        if name == "__bool__":
            return self.ways.decide(args[0])
        if name in _COMPARISONS and len(args) == 2 and id(args[0]) in self.known and type(args[1]) in (int, float) and args[1] == 0:
            return getattr(operator, _COMPARISONS[name])(self.known[id(args[0])], 0)
        if name == "to" and id(args[0]) in self.numbers:
            return args[0]
        if name in ("tensor", "as_tensor") and id(args[0]) in self.numbers:
            return args[0].to(kwargs.get("dtype") or torch.get_default_dtype())
        if (filled := _filled(func, args, kwargs)) is not None:
            return filled
        given = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        beside = [a for a in given if id(a) not in self.numbers]
        if given and not beside:
            result = func(*args, **kwargs)
            return self._number(result) if isinstance(result, Tensor) else result
        if len(beside) < len(given) and (name.startswith("lerp") or all(a.dim() == 0 and a.is_floating_point() for a in beside)):
            args = tuple(self._cast(a, beside[0].dtype) for a in args)
            kwargs = {k: self._cast(a, beside[0].dtype) for k, a in kwargs.items()}
        for word in ("alpha", "value"):
            if isinstance(kwargs.get(word), Tensor):
                return _scaled(func, word, args, kwargs)
        return func(*args, **kwargs)

    def _number(self, t: Tensor) -> Tensor:
        self.numbers[id(t)] = t
        return t

    def _cast(self, a: Any, dtype: torch.dtype) -> Any:
        return a.to(dtype) if isinstance(a, Tensor) and id(a) in self.numbers else a


def _filled(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """``full_like(x, t)`` with a tensor ``t``, which torch would read; None for any other call."""
    at = _FILLS.get(getattr(func, "__name__", ""))
    if at is None or not isinstance(value := args[at] if len(args) > at else kwargs.get("fill_value"), Tensor):
        return None
    zeros: Tensor = func(*args[:at], 0.0, *args[at + 1 :], **{k: v for k, v in kwargs.items() if k != "fill_value"})
    return zeros + value.to(zeros.dtype)


class _Filling(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        filled = _filled(func, args, kwargs or {})
        return func(*args, **(kwargs or {})) if filled is None else filled


def _scaled(func: Any, word: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``add(x, y, alpha=t)``, ``addcdiv(x, y, z, value=t)`` with a tensor ``t``, in the order in which the kernels multiply."""
    name = getattr(func, "__name__", "")
    x, a, *more = args
    factor = kwargs[word]
    a = a.to(torch.result_type(x, a))  # the kernels multiply in the result's dtype
    plain = name.rstrip("_")
    if plain in ("add", "sub") and word == "alpha":
        new = torch.add(x, a * factor) if plain == "add" else torch.sub(x, a * factor)
    elif plain in ("addcmul", "addcdiv") and word == "value":
        new = torch.add(x, a * factor * more[0] if plain == "addcmul" else a * factor / more[0])
    else:
        return func(*args, **kwargs)
    return x.copy_(new) if name.endswith("_") else (kwargs["out"].copy_(new) if "out" in kwargs else new)


@contextmanager
def words(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Python's own functions of numbers, where the optimizer's step is defined, for numbers that are tensors too."""
    steps = [inspect.unwrap(vars(c)["step"]) for c in type(optimizer).__mro__ if "step" in vars(c)]
    spaces: dict[int, dict[str, Any]] = {id(f.__globals__): f.__globals__ for f in steps if hasattr(f, "__globals__")}
    own = {"min": _extreme(min, torch.minimum), "max": _extreme(max, torch.maximum), "float": _Float, "int": _Int}
    saved: list[tuple[dict[str, Any], str, Any]] = []
    for names in spaces.values():
        new: dict[str, Any] = {word: f for word, f in own.items() if word not in names}
        for word, value in names.items():
            if value is math:
                new[word] = _Math()
            elif inspect.isbuiltin(value) and value.__module__ == "math":
                new[word] = getattr(_Math(), value.__name__)
        saved += [(names, word, names.get(word, _ABSENT)) for word in new]
        names.update(new)
    try:
        yield
    finally:
        for names, word, old in saved:
            if old is _ABSENT:
                del names[word]
            else:
                names[word] = old


_ABSENT = object()


class _Number(type):
    """``float`` and ``int`` that leave a traced number as it is; ``isinstance`` asks for the plain type."""

    plain: type

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.convert(args[0]) if args and isinstance(args[0], Tensor) else cls.plain(*args, **kwargs)  # type: ignore[attr-defined]

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, cls.plain)

    def __eq__(cls, other: object) -> bool:
        return other is cls.plain or other is cls

    def __hash__(cls) -> int:
        return hash(cls.plain)


class _Float(metaclass=_Number):
    plain = float
    convert = staticmethod(lambda t: t.item())  # as Numbers reads it


class _Int(metaclass=_Number):
    plain = int
    convert = staticmethod(lambda t: torch.trunc(t.item()))


class _Math:
    """The module ``math`` whose functions take traced numbers too."""

    def __getattr__(self, name: str) -> Any:
        plain = getattr(math, name)
        op = getattr(torch, _ALIASES.get(name, name), None)
        if not callable(plain):
            return plain

        @functools.wraps(plain)
        def function(*args: Any) -> Any:
            if not any(isinstance(a, Tensor) for a in args):
                return plain(*args)
            if op is None or len(args) > (2 if name in ("pow", "atan2", "fmod", "hypot") else 1):
                raise TypeError(f"math.{name} of a number that changes from step to step")
            return op(*args)

        return function


def _extreme(plain: Callable[..., Any], op: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    def extreme(*args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) < 2 or not any(isinstance(a, Tensor) for a in args):
            return plain(*args, **kwargs)
        like = next(a for a in args if isinstance(a, Tensor))
        return functools.reduce(op, (a if isinstance(a, Tensor) else torch.full_like(like, a) for a in args))

    return extreme


@contextmanager
def compiling() -> Iterator[None]:
    """The flag under which torch.optim skips its device checks and keeps step counts as tensors."""
    old = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        with _Filling():
            yield
    finally:
        torch.compiler._is_compiling_flag = old
