"""The user's own optimizer as ops: one traced graph a class of parameters (shape, dtype, options), instantiated for each.

The class's plain loop form is traced with ``lr`` as a float64 scalar input. ``.item()`` of a step count gives the count as a
float64 tensor, as the eager loop computes with Python doubles, and scalar arguments (``alpha``, ``value``) that turned out to be
tensors are multiplied in. An optimizer that branches on such a value is tried again in its ``capturable`` form, without branches.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from deepseed.capture.batch import DTYPES
from deepseed.capture.convert import Emitter, convert
from deepseed.capture.errors import CaptureError
from deepseed.capture.functional import Flat, functional
from deepseed.capture.metadata import Where
from deepseed.capture.state import STARTED, Slots, StateSlot, discover, shadow
from deepseed.ir.program import Arg, Op, Ref, Type

FUSED = {torch.optim.AdamW: "optim.adamw", torch.optim.Adam: "optim.adam", torch.optim.SGD: "optim.sgd"}
_HIDDEN = ("params", "param_names", "lr", "initial_lr", "foreach", "fused", "capturable", "differentiable", "max_lr", "min_lr", "base_momentum", "max_momentum")
_COMPARISONS = {"__eq__": "eq", "__ne__": "ne", "__lt__": "lt", "__le__": "le", "__gt__": "gt", "__ge__": "ge", **{n: n for n in ("eq", "ne", "lt", "le", "gt", "ge")}}


@dataclass(frozen=True)
class Number:
    """A float of an option: ``betas[1]`` is ``("betas", 1)``, ``momentum`` is ``("momentum", None)``."""

    option: str
    at: int | None

    def read(self, group: Mapping[str, Any]) -> float:
        return float(group[self.option] if self.at is None else group[self.option][self.at])

    def __str__(self) -> str:
        return self.option if self.at is None else f"{self.option}.{self.at}"


@dataclass(frozen=True)
class Rule:
    """The update of a class of parameters: (param, grad, lr, *numbers, *slots) -> (param, *slots); ``first``: that of step one."""

    slots: Slots
    always: Flat
    first: Flat | None
    numbers: tuple[Number, ...] = ()  # options that are inputs


class _Numbers(TorchFunctionMode):
    """Python numbers read from tensors stay tensors, in float64, and are numbers to the ops that meet them.

    A number beside tensors takes their dtype, a number beside numbers stays float64: as with Python's own. ``known``: numbers
    whose sign is a fact of the program, so that ``momentum != 0`` is a Python value.
    """

    def __init__(self, *numbers: Tensor, known: Sequence[tuple[Tensor, float]] = ()) -> None:
        super().__init__()
        self.numbers = {id(t): t for t in (*numbers, *(t for t, _ in known))}  # held, so that an id stays its tensor's
        self.known = {id(t): value for t, value in known}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is Tensor.item:
            return args[0] if id(args[0]) in self.numbers else self._number(args[0].to(torch.float64))
        if name in _COMPARISONS and len(args) == 2 and id(args[0]) in self.known and type(args[1]) in (int, float) and args[1] == 0:
            return getattr(operator, _COMPARISONS[name])(self.known[id(args[0])], 0)
        if name == "to" and id(args[0]) in self.numbers:
            return args[0]
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
def _compiling() -> Iterator[None]:
    """The flag under which torch.optim skips its device checks and keeps step counts as tensors."""
    old = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = old


@contextmanager
def _extremes(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """``min`` and ``max`` where the optimizer's step is defined, for numbers that are tensors too."""
    steps = [inspect.unwrap(vars(c)["step"]) for c in type(optimizer).__mro__ if "step" in vars(c)]
    spaces: dict[int, dict[str, Any]] = {id(f.__globals__): f.__globals__ for f in steps if hasattr(f, "__globals__")}
    places = [(names, word) for names in spaces.values() for word in ("min", "max") if word not in names]
    for names, word in places:
        names[word] = _extreme(getattr(builtins, word), torch.minimum if word == "min" else torch.maximum)
    try:
        yield
    finally:
        for names, word in places:
            del names[word]


def _extreme(plain: Callable[..., Any], op: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    def extreme(*args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) < 2 or not any(isinstance(a, Tensor) for a in args):
            return plain(*args, **kwargs)
        like = next(a for a in args if isinstance(a, Tensor))
        return functools.reduce(op, (a if isinstance(a, Tensor) else torch.full_like(like, a) for a in args))

    return extreme


def groups(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, int]:
    """Parameter name -> index of its group. Raises CaptureError for parameters that are not the model's."""
    names = {id(p): name for name, p in parameters.items()}
    found: dict[str, int] = {}
    strange = 0
    for index, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            if id(p) in names:
                found[names[id(p)]] = index
            else:
                strange += 1
    if strange:
        total = sum(len(g["params"]) for g in optimizer.param_groups)
        raise CaptureError(
            f"{strange} of the {total} parameters of {type(optimizer).__name__} are not among the model's {len(parameters)}",
            fix="build the optimizer from model.parameters() of this very model, after the last change of its parameters",
        )
    hooks = sum(len(getattr(optimizer, name, ())) for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"))
    if hooks:
        raise CaptureError(f"{type(optimizer).__name__} has {hooks} step hooks, which a compiled step cannot call", fix="remove them, or call them around step(batch)")
    return found


def trace_rule(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], shape: tuple[int, ...], dtype: torch.dtype, numbers: tuple[Number, ...] = ()
) -> Rule:
    """Trace one class of parameters. ``numbers`` are inputs where the step can be traced so, else values of the program.
    Raises CaptureError naming the optimizer and why."""
    slots = discover(optimizer, group, shape, dtype)
    errors: list[Exception] = []
    ways = [(numbers, False)] if numbers else []
    for given, capturable in [*ways, ((), False), *([((), True)] if "capturable" in group else [])]:
        try:
            always = _trace(optimizer, group, shape, dtype, slots, list(slots.fill), capturable, given)
            first = _trace(optimizer, group, shape, dtype, slots, [], capturable, given) if slots.two_formulas else None
        except Exception as error:
            errors.append(error)
        else:
            return Rule(slots, always, first, given)
    reason = str(errors[0]).strip().splitlines()
    raise CaptureError(
        f"optimizer {type(optimizer).__name__} cannot be traced: {reason[0] if reason else type(errors[0]).__name__}",
        fix="its step must compute with tensor ops only: no branch on values, no closure, no sparse gradients",
    ) from errors[0]


def _trace(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], shape: tuple[int, ...], dtype: torch.dtype, slots: Slots,
    given: Sequence[str], capturable: bool, numbers: Sequence[Number],
) -> Flat:  # fmt: skip
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    names = list(slots.fill)
    with mode:
        fakes = [torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)]
        fakes += [torch.empty((), dtype=torch.float64) for _ in ("lr", *numbers)]
        fakes += [torch.empty(slots.shape[n], dtype=slots.dtype[n]) for n in names]

    def step(param: Tensor, grad: Tensor, lr: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        moving, states = rest[: len(numbers)], rest[len(numbers) :]
        p = param.clone()
        p.grad = grad.clone()
        state: dict[str, Any] = {}
        for name, s in zip(names, states, strict=True):
            if name in given:
                wide = capturable and not slots.shape[name] and s.is_floating_point()
                state[name] = s.to(torch.float64) if wide else s.clone()
        known = [(t, n.read(group)) for t, n in zip(moving, numbers, strict=True)]
        one = shadow(optimizer, {**_with(group, dict(zip(numbers, moving, strict=True))), "lr": lr}, p, state, capturable)
        with torch.no_grad(), _extremes(optimizer), _compiling() if capturable else _Numbers(lr, known=known):
            one.step()
        kept = one.state[p]
        return p, *(_as(kept[n], slots.dtype[n]) for n in names)

    module = make_fx(step, tracing_mode="fake")(*fakes)
    return functional(module, fakes, mode)


def _as(value: Any, dtype: torch.dtype) -> Tensor:
    return (value if isinstance(value, Tensor) else torch.tensor(float(value))).to(dtype)


def _with(group: Mapping[str, Any], values: Mapping[Number, Any]) -> dict[str, Any]:
    """The group's options with some numbers replaced."""
    out = dict(group)
    for number, value in values.items():
        old = out[number.option]
        out[number.option] = value if number.at is None else tuple(value if i == number.at else o for i, o in enumerate(old))
    return out


def _numbers(group: Mapping[str, Any], options: Collection[str]) -> tuple[Number, ...]:
    """The floats of these options."""
    out: list[Number] = []
    for option in sorted(options):
        value = group.get(option)
        if isinstance(value, (tuple, list)):
            out += [Number(option, i) for i, v in enumerate(value) if _is_number(v)]
        elif _is_number(value):
            out.append(Number(option, None))
    return tuple(out)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass
class Updates:
    """Emits the update of each parameter; collects the state inputs and the fused op that a group of ops amounts to.

    ``moving``: names of options that change from step to step and become inputs, as lr is. ``moved``: those that did, as
    ``"betas/0"`` (option and group).
    """

    emit: Emitter
    optimizer: torch.optim.Optimizer
    hyper: dict[str, Callable[[], float]]
    states: dict[str, StateSlot]
    origins: dict[str, Op]
    moving: Collection[str] = ()

    def __post_init__(self) -> None:
        self._rules: dict[Any, Rule] = {}
        self._hyper: dict[str, Ref] = {}
        self._baked: set[str] = set()

    @property
    def moved(self) -> frozenset[str]:
        return frozenset({f"{n.option}/{key[-1]}" for key, rule in self._rules.items() for n in rule.numbers} - self._baked)

    def number(self, index: int, number: Number) -> Ref:
        """An option of a group as an input."""
        key = f"{number}/{index}"
        if key not in self._hyper:
            self._hyper[key] = self.emit.input(Type("f64", ()), "hyper", key)
            optimizer = self.optimizer  # and no more of this: the traced graphs must not outlive the capture
            self.hyper[key] = lambda: number.read(optimizer.param_groups[index])
        return self._hyper[key]

    def update(self, name: str, parameter: nn.Parameter, group: int, param: Ref, grad: Ref) -> tuple[Ref, dict[str, Ref]]:
        """The new parameter, and the new state by key."""
        options = self.optimizer.param_groups[group]
        key = (tuple(parameter.shape), parameter.dtype, group)
        rule = self._rules.get(key)
        if rule is None:
            numbers = _numbers(options, self.moving)
            rule = self._rules[key] = trace_rule(self.optimizer, options, tuple(parameter.shape), parameter.dtype, numbers)
            self._baked |= {f"{n.option}/{group}" for n in numbers if n not in rule.numbers}
        e = self.emit
        old = self._state_inputs(name, parameter, rule.slots)
        lr = self.number(group, Number("lr", None))
        moving = [self.number(group, n) for n in rule.numbers]
        e.where, e.phase, e.base = Where(name.rpartition(".")[0]), "update", f"{name}.update"
        fused = FUSED.get(type(self.optimizer))
        e.origin = f"{fused.split('.')[1]}:{name}" if fused and rule.first is None and not moving else ""
        slots = list(rule.slots.fill)
        given = [param, grad, lr, *moving, *(old[s] for s in slots)]
        new = self._instance(rule.always, given)
        if rule.first is not None:
            new = self._choose(name, old[STARTED], self._instance(rule.first, given), new)
        result, states = new[0], dict(zip(slots, new[1:], strict=True))
        if e.origin:
            self.origins[e.origin] = _fused(fused or "", options, param, grad, slots, old, lr, [result, *states.values()], e)
        out = {f"{s}/{name}": states[s] for s in slots}
        if rule.first is not None:
            out[f"{STARTED}/{name}"] = e.full(1.0, Type("f32", ()))
        e.where, e.phase, e.base, e.origin = Where(), "forward", "", ""
        return result, out

    def _instance(self, flat: Flat, given: Sequence[Arg]) -> list[Ref]:
        constants = [_constant(self.emit, c) for c in flat.constants]
        out = convert(flat.graph, [*given, *constants], flat.outputs, self.emit)
        refs = [o for o in out if isinstance(o, Ref)]
        assert len(refs) == len(out), "an optimizer's results are tensors"
        return refs

    def _choose(self, name: str, started: Ref, first: Sequence[Ref], always: Sequence[Ref]) -> list[Ref]:
        e = self.emit
        flag = e.one("aten.gt.Scalar", (started, 0.5), Type("bool", ()))
        return [e.one("aten.where.self", (flag, a, f), e.type(a)) for f, a in zip(first, always, strict=True)]

    def _state_inputs(self, name: str, parameter: nn.Parameter, slots: Slots) -> dict[str, Ref]:
        existing = self.optimizer.state.get(parameter, {})
        refs: dict[str, Ref] = {}
        for slot, fill in slots.fill.items():
            t = Type(DTYPES[slots.dtype[slot]], slots.shape[slot])
            held = existing.get(slot)
            held = held if isinstance(held, Tensor) or held is None else torch.tensor(float(held), dtype=slots.dtype[slot])
            self._add(refs, StateSlot(name, slot, t, fill, held, False))
        if slots.two_formulas:
            begun = torch.tensor(1.0) if any(s in existing and existing[s] is not None for s in slots.fill) else None
            self._add(refs, StateSlot(name, STARTED, Type("f32", ()), 0.0, begun, True))
        return refs

    def _add(self, refs: dict[str, Ref], slot: StateSlot) -> None:
        self.states[slot.key] = slot
        refs[slot.slot] = self.emit.input(slot.type, "state", slot.key)


def _constant(e: Emitter, c: Tensor) -> Ref:
    if c.numel() != 1:
        raise CaptureError(f"an optimizer's step makes a tensor of {c.numel()} numbers; only scalars can be compiled there")
    return e.full(c.item(), Type(DTYPES[c.dtype], tuple(c.shape)))


def fixed_options(optimizer: torch.optim.Optimizer, moved: Collection[str] = ()) -> dict[str, Any]:
    """What the program has of the optimizer's options: ``"weight_decay/0"`` -> its value; of one that is an input (``moved``) the
    signs of its numbers; ``"params/0"`` -> how many parameters the group has. If anything changes, capture again."""
    out: dict[str, Any] = {}
    for i, group in enumerate(optimizer.param_groups):
        out[f"params/{i}"] = len(group["params"])
        for option, value in group.items():
            if option not in _HIDDEN:
                key = f"{option}/{i}"
                out[key] = [(n.read(group) > 0) - (n.read(group) < 0) for n in _numbers(group, (option,))] if key in moved else _number(value)
    return out


def changed_options(optimizer: torch.optim.Optimizer, before: Mapping[str, Any]) -> set[str]:
    """Names of the options whose numbers differ from ``fixed_options`` of before: worth being inputs from now on."""
    now = fixed_options(optimizer)
    return {key.rpartition("/")[0] for key, value in now.items() if not key.startswith("params/") and before.get(key, value) != value}


def _fused(
    target: str, options: Mapping[str, Any], param: Ref, grad: Ref, slots: Sequence[str], old: Mapping[str, Ref], lr: Ref,
    new: Sequence[Ref], e: Emitter,
) -> Op:  # fmt: skip
    """The whole update as one op: args param, grad, states, lr; results param and states; kwargs the options and the slot names."""
    kept = {k: v for k, v in options.items() if k not in _HIDDEN and k != "decoupled_weight_decay"}
    kwargs: list[tuple[str, Arg]] = [("states", tuple(slots))]
    kwargs += [(k, _number(v)) for k, v in kept.items()]
    args = (param, grad, *(old[s] for s in slots), lr)
    return Op(tuple(r.name for r in new), target, args, tuple(e.type(r) for r in new), tuple(kwargs), "update", e.where.path)


def _number(value: Any) -> Arg:
    if isinstance(value, (tuple, list)):
        return tuple(_number(v) for v in value)
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    return value if isinstance(value, (bool, int, float, str)) or value is None else repr(value)
