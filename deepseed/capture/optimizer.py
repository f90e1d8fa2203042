"""The user's own optimizers as ops: one traced graph a class of parameters (shape, dtype, options), instantiated for each.

The class's plain loop form is traced with ``lr`` as a float64 scalar input and Python's numbers as deepseed.capture.numbers has
them. A step that branches on a value is traced once a way, and the conditions choose. An optimizer that cannot be traced so is
tried again in its ``capturable`` form, without branches. Of torch's own optimizers a class of parameters is traced once a process,
and where that is pointwise not again for another shape of as many dimensions, the same of them of one element.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim import Optimizer

from deepseed.capture.alike import told
from deepseed.capture.batch import DTYPES
from deepseed.capture.convert import Emitter, convert
from deepseed.capture.elementwise import pointwise, reshaped
from deepseed.capture.errors import CaptureError
from deepseed.capture.functional import Flat, functional
from deepseed.capture.metadata import Where
from deepseed.capture.numbers import Numbers, Ways, compiling, words
from deepseed.capture.options import HIDDEN, Number, Optimizers, all_groups, has_rate, numbers_of, plain, with_numbers
from deepseed.capture.state import STARTED, Slots, StateSlot, discover, shadow
from deepseed.ir.program import Arg, Op, Ref, Type

FUSED = {torch.optim.AdamW: "optim.adamw", torch.optim.Adam: "optim.adam", torch.optim.SGD: "optim.sgd"}
MOST_WAYS = 16  # of one step, through branches on values
MOST_RULES = 64  # that are kept
_RATE = Number("lr", None)
R = TypeVar("R")


@dataclass(frozen=True)
class Way:
    """A step whose branches came out as in ``taken``. Outputs: param, slots, then the condition of each branch."""

    taken: tuple[bool, ...]
    flat: Flat


@dataclass(frozen=True)
class Rule:
    """The update of a class of parameters: (param, grad, *numbers, *slots) -> (param, *slots); ``first``: that of step one."""

    slots: Slots
    always: tuple[Way, ...]
    first: tuple[Way, ...] | None
    numbers: tuple[Number, ...] = ()  # options that are inputs, ``lr`` before all


_kept: dict[tuple[Hashable, tuple[int, ...]], Rule] = {}  # the one that was asked for longest ago first


def rule_of(optimizer: Optimizer, group: Mapping[str, Any], shape: tuple[int, ...], dtype: torch.dtype, numbers: tuple[Number, ...] = ()) -> Rule:
    """``trace_rule``, or what it gave before for the same class of parameters, or a pointwise one for another shape."""
    form = form_of(optimizer, group, dtype, numbers, tuple(min(n, 2) for n in shape))
    if form is None:
        return trace_rule(optimizer, group, shape, dtype, numbers)
    found = _kept.pop((form, shape), None)
    if found is None:
        other = next((known for known in _kept if known[0] == form), None)
        found = _for_shape(_kept[other], other[1], shape) if other is not None else None
    _kept[form, shape] = found = found or trace_rule(optimizer, group, shape, dtype, numbers)
    if len(_kept) > MOST_RULES:
        del _kept[next(iter(_kept))]
    return found


def _for_shape(rule: Rule, shape: tuple[int, ...], to: tuple[int, ...]) -> Rule | None:
    """The rule for parameters of another shape; None where that is not known without a trace."""
    ways = (*rule.always, *(rule.first or ()))
    if not all(s in (shape, ()) for s in rule.slots.shape.values()) or not all(pointwise(way.flat, shape) for way in ways):
        return None

    def of(ways: tuple[Way, ...]) -> tuple[Way, ...]:
        return tuple(Way(way.taken, reshaped(way.flat, shape, to)) for way in ways)

    slots = replace(rule.slots, shape={name: s and to for name, s in rule.slots.shape.items()})
    return Rule(slots, of(rule.always), None if rule.first is None else of(rule.first), rule.numbers)


def form_of(optimizer: Optimizer, group: Mapping[str, Any], *asked: Hashable) -> Hashable:
    """What decides the rule of an optimizer of torch's own, whose step reads the options of its group and nothing else of the object; None for another's."""
    kind = type(optimizer)
    options = {k: v for k, v in group.items() if k not in ("params", "param_names")}
    values = [each for v in options.values() for each in (v if isinstance(v, (tuple, list)) else [v])]
    if getattr(torch.optim, kind.__name__, None) is not kind or not all(v is None or isinstance(v, (bool, int, float, str)) for v in values):
        return None
    return (kind, kind.step, repr(sorted(options.items())), torch.get_default_dtype(), *asked)


def trace_rule(
    optimizer: Optimizer, group: Mapping[str, Any], shape: tuple[int, ...], dtype: torch.dtype, numbers: tuple[Number, ...] = ()
) -> Rule:
    """Trace one class of parameters. ``numbers`` are inputs where the step can be traced so, else values of the program.
    Raises CaptureError naming the optimizer and why."""
    slots = discover(optimizer, group, shape, dtype)
    errors: list[Exception] = []
    rate = (_RATE,) if has_rate(group) else ()
    ways = [((*rate, *numbers), False)] if numbers else []
    for given, capturable in [*ways, (rate, False), *([(rate, True)] if "capturable" in group else [])]:
        try:
            step = _Step(optimizer, group, shape, dtype, slots, capturable, given)
            always = step.traced(None)
            first = step.traced({}) if slots.two_formulas or step.told({}) != step.told(slots.fill) else None
        except CaptureError:
            raise
        except Exception as error:
            errors.append(error)
        else:
            return Rule(slots if first is None else slots.of_two(), always, first, given)
    reason = str(errors[0]).strip().splitlines()
    raise CaptureError(
        f"optimizer {type(optimizer).__name__} cannot be traced: {reason[0] if reason else type(errors[0]).__name__}",
        fix="its step must compute with tensor ops and numbers only: no closure, no sparse gradients, nothing whose shape depends on values",
    ) from errors[0]


class _Step:
    """The step of one class of parameters on fake tensors, once a way through its branches.

    ``begun``: what the state is at its begin, by slot: None for what comes in as inputs, nothing at the first step.
    """

    def __init__(
        self, optimizer: Optimizer, group: Mapping[str, Any], shape: tuple[int, ...], dtype: torch.dtype, slots: Slots, capturable: bool, numbers: Sequence[Number]
    ) -> None:  # fmt: skip
        self.optimizer, self.group, self.slots, self.capturable, self.numbers = optimizer, with_numbers(group, {}), slots, capturable, numbers
        self.mode, self.shape = FakeTensorMode(allow_non_fake_inputs=True), shape
        with self.mode:
            self.fakes = [torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)]
            self.fakes += [torch.empty((), dtype=torch.float64) for _ in numbers]
            self.fakes += [torch.empty(slots.shape[n], dtype=slots.dtype[n]) for n in slots.fill]

    def traced(self, begun: Mapping[str, float] | None) -> tuple[Way, ...]:
        def trace(step: Callable[..., tuple[Tensor, ...]]) -> Flat:
            return functional(make_fx(step, tracing_mode="fake")(*self.fakes), self.fakes, self.mode)

        return tuple(Way(taken, flat) for taken, flat in self._ways(begun, trace))

    def told(self, begun: Mapping[str, float]) -> list[tuple[tuple[bool, ...], list[str]]]:
        """What it does as text."""
        with self.mode:
            return self._ways(begun, lambda step: told(step, self.fakes))

    def _ways(self, begun: Mapping[str, float] | None, run: Callable[[Callable[..., tuple[Tensor, ...]]], R]) -> list[tuple[tuple[bool, ...], R]]:
        ways = Ways()
        found: list[tuple[tuple[bool, ...], R]] = []
        todo: list[list[bool]] = [[]]
        while todo:
            start = todo.pop()
            ways.taken = list(start)
            result = run(lambda *flat: self._call(ways, begun, *flat))
            taken = tuple(ways.taken)
            todo += [[*taken[:n], False] for n in range(len(start), len(taken))]
            found.append((taken, result))
            if len(found) + len(todo) > MOST_WAYS:
                raise ValueError(f"its step has more than {MOST_WAYS} ways through branches on values")
        return found

    def _call(self, ways: Ways, begun: Mapping[str, float] | None, param: Tensor, grad: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        ways.conditions.clear()
        numbers, slots = self.numbers, self.slots
        moving, states = rest[: len(numbers)], rest[len(numbers) :]
        p = param.clone()
        p.grad = grad.clone()
        state: dict[str, Any] = {}
        for name, s in zip(slots.fill, states, strict=True):
            if begun is None:
                wide = self.capturable and not slots.shape[name] and s.is_floating_point()
                state[name] = s.to(torch.float64) if wide else s.clone()
            elif name in begun:
                state[name] = slots.python[name](begun[name]) if name in slots.python else torch.full(slots.shape[name], begun[name], dtype=slots.dtype[name])
        counts = [state[n] for n in slots.python if isinstance(state.get(n), Tensor)]
        known = [(t, n.read(self.group)) for t, n in zip(moving, numbers, strict=True) if n != _RATE]
        rate = [t for t, n in zip(moving, numbers, strict=True) if n == _RATE]
        one = shadow(self.optimizer, with_numbers(self.group, dict(zip(numbers, moving, strict=True))), p, state, self.capturable)
        with torch.no_grad(), words(self.optimizer), compiling() if self.capturable else Numbers(ways, *rate, *counts, known=known):
            one.step()
        kept = one.state[p]
        self._check_kept(kept, begun)
        return p, *(_as(kept[n], slots.dtype[n]) for n in slots.fill), *ways.conditions

    def _check_kept(self, kept: Mapping[str, Any], begun: Mapping[str, float] | None) -> None:
        """Every step keeps of a parameter of any size what the first one keeps of a small one."""
        was, now = dict(self.slots.shape), {name: tuple(value.shape) if isinstance(value, Tensor) else () for name, value in kept.items()}
        if was != now:
            name = next(n for n in (*was, *now) if was.get(n) != now.get(n))
            first, here = (f"of shape {list(each[name])}" if name in each else "not there" for each in (was, now))
            raise CaptureError(
                f"state {name!r} of optimizer {type(self.optimizer).__name__} is {here} after {'a later' if begun is None else 'the first'} step on a parameter {list(self.shape)}; after the first step on a small one it is {first}",
                fix="make all of a parameter's state at its first step, the same for all sizes and of the parameter's own dimensions",
            )


@contextmanager
def _creating(dtype: torch.dtype) -> Iterator[None]:
    """New float tensors are of ``dtype``, unless they say otherwise."""
    old = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(old)


def _as(value: Any, dtype: torch.dtype) -> Tensor:
    return (value if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)).to(dtype)


@dataclass
class Updates:
    """Emits the update of each parameter; collects the state inputs and the fused op that a group of ops amounts to.

    ``moving``: names of options that change from step to step and become inputs, as lr is. ``moved``: those that did, as
    ``"betas/0"`` (option and group). ``wide``: what the optimizer creates is float64.
    """

    emit: Emitter
    optimizers: Optimizers
    hyper: dict[str, Callable[[], float]]
    states: dict[str, StateSlot]
    origins: dict[str, Op]
    moving: Collection[str] = ()
    wide: bool = False

    def __post_init__(self) -> None:
        self._groups = all_groups(self.optimizers)
        self._rules: dict[Any, Rule] = {}
        self._hyper: dict[str, Ref] = {}
        self._baked: set[str] = set()

    @property
    def moved(self) -> frozenset[str]:
        return frozenset({f"{n.option}/{key[-1]}" for key, rule in self._rules.items() for n in rule.numbers if n != _RATE} - self._baked)

    def number(self, index: int, number: Number) -> Ref:
        """An option of a group as an input."""
        key = f"{number}/{index}"
        if key not in self._hyper:
            self._hyper[key] = self.emit.input(Type("f64", ()), "hyper", key)
            options = self._groups[index][1]  # and no more of this: the traced graphs must not outlive the capture
            self.hyper[key] = lambda: number.read(options)
        return self._hyper[key]

    def update(self, name: str, parameter: nn.Parameter, group: int, param: Ref, grad: Ref, skip: Ref | None = None) -> tuple[Ref, dict[str, Ref]]:
        """The new parameter, and the new state by key; the old ones where ``skip`` is true."""
        optimizer, options = self._groups[group]
        key = (tuple(parameter.shape), parameter.dtype, group)
        rule = self._rules.get(key)
        if rule is None:
            numbers = numbers_of(options, self.moving)
            with _creating(torch.float64 if self.wide else torch.get_default_dtype()):
                rule = self._rules[key] = rule_of(optimizer, options, tuple(parameter.shape), parameter.dtype, numbers)
            self._baked |= {f"{n.option}/{group}" for n in numbers if n not in rule.numbers}
        e = self.emit
        old = self._state_inputs(name, optimizer.state.get(parameter, {}), rule.slots)
        moving = [self.number(group, n) for n in rule.numbers]
        e.where, e.phase, e.base = Where(name.rpartition(".")[0]), "update", f"{name}.update"
        fused = FUSED.get(type(optimizer)) if rule.first is None and len(rule.always) == 1 and rule.numbers == (_RATE,) else None
        e.origin = f"{fused.split('.')[1]}:{name}" if fused else ""
        slots = list(rule.slots.fill)
        given = [param, grad, *moving, *(old[s] for s in slots)]
        new = self._instances(rule.always, given)
        if rule.first is not None:
            started = e.one("aten.gt.Scalar", (old[STARTED], 0.5), Type("bool", ()))
            new = self._choose(started, new, self._instances(rule.first, given))
        begun = e.full(1.0, Type("f32", ())) if rule.first is not None else None
        if skip is not None:
            new = self._choose(skip, [param, *(old[s] for s in slots)], new)
            begun = begun and e.one("aten.where.self", (skip, old[STARTED], begun), Type("f32", ()))
        result, states = new[0], dict(zip(slots, new[1:], strict=True))
        if e.origin:
            self.origins[e.origin] = _fused(fused or "", options, param, grad, slots, old, moving[0], [result, *states.values()], e, skip)
        out = {f"{s}/{name}": states[s] for s in slots}
        if begun is not None:
            out[f"{STARTED}/{name}"] = begun
        e.where, e.phase, e.base, e.origin = Where(), "forward", "", ""
        return result, out

    def _instances(self, ways: Sequence[Way], given: Sequence[Arg]) -> list[Ref]:
        """The results of the way that the values take."""
        results = [(way.taken, self._instance(way.flat, given)) for way in ways]
        count = len(results[0][1]) - len(results[0][0])

        def chosen(some: Sequence[tuple[tuple[bool, ...], list[Ref]]], branch: int) -> list[Ref]:
            if len(some) == 1:
                return some[0][1][:count]
            yes, no = ([one for one in some if one[0][branch] is outcome] for outcome in (True, False))
            return self._choose(some[0][1][count + branch], chosen(yes, branch + 1), chosen(no, branch + 1))

        return chosen(results, 0)

    def _instance(self, flat: Flat, given: Sequence[Arg]) -> list[Ref]:
        constants = [_constant(self.emit, c) for c in flat.constants]
        out = convert(flat.graph, [*given, *constants], flat.outputs, self.emit)
        refs = [o for o in out if isinstance(o, Ref)]
        assert len(refs) == len(out), "an optimizer's results are tensors"
        return refs

    def _choose(self, flag: Ref, yes: Sequence[Ref], no: Sequence[Ref]) -> list[Ref]:
        e = self.emit
        return [y if y == n else e.one("aten.where.self", (flag, y, n), e.type(y)) for y, n in zip(yes, no, strict=True)]

    def _state_inputs(self, name: str, existing: Mapping[str, Any], slots: Slots) -> dict[str, Ref]:
        refs: dict[str, Ref] = {}
        for slot, fill in slots.fill.items():
            t = Type(DTYPES[slots.dtype[slot]], slots.shape[slot])
            held = existing.get(slot)
            held = held if isinstance(held, Tensor) or held is None else torch.tensor(float(held), dtype=slots.dtype[slot])
            self._add(refs, StateSlot(name, slot, t, fill, held, False, slots.python.get(slot)))
        if slots.two_formulas:
            there = [s for s in slots.fill if existing.get(s) is not None]
            if there and len(there) < len(slots.fill):
                lacks = next(s for s in slots.fill if s not in there)
                raise CaptureError(f"the optimizer's state of {name!r} has {len(there)} of {len(slots.fill)} entries: {there[0]!r} and no {lacks!r}, which is made at the first step only", path=name, fix="give it all of its state (load_state_dict), or none")
            begun = torch.tensor(1.0) if there else None
            self._add(refs, StateSlot(name, STARTED, Type("f32", ()), 0.0, begun, True))
        return refs

    def _add(self, refs: dict[str, Ref], slot: StateSlot) -> None:
        self.states[slot.key] = slot
        refs[slot.slot] = self.emit.input(slot.type, "state", slot.key)


def _constant(e: Emitter, c: Tensor) -> Ref:
    if c.numel() != 1:
        raise CaptureError(f"an optimizer's step makes a tensor of {c.numel()} numbers; only scalars can be compiled there")
    return e.full(c.item(), Type(DTYPES[c.dtype], tuple(c.shape)))


def _fused(
    target: str, options: Mapping[str, Any], param: Ref, grad: Ref, slots: Sequence[str], old: Mapping[str, Ref], lr: Ref,
    new: Sequence[Ref], e: Emitter, skip: Ref | None,
) -> Op:  # fmt: skip
    """The whole update as one op: args param, grad, states, lr; results param and states; kwargs the options and the slot names, and
    ``skip``: whether nothing changes."""
    kept = {k: v for k, v in options.items() if k not in HIDDEN and k not in ("lr", "decoupled_weight_decay")}
    kwargs: list[tuple[str, Arg]] = [("states", tuple(slots))]
    kwargs += [(k, plain(v)) for k, v in kept.items()]
    kwargs += [("skip", skip)] if skip is not None else []
    args = (param, grad, *(old[s] for s in slots), lr)
    return Op(tuple(r.name for r in new), target, args, tuple(e.type(r) for r in new), tuple(kwargs), "update", e.where.path)
