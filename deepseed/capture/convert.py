"""A functional aten graph becomes ops of the own IR: one function an aten op in ``deepseed.capture.lowering``, ``rearrange`` and
``indexing``, aten as it is for the rest.

``Emitter`` holds the growing program: types of values, and names made of module path and op, numbered within a module call.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from deepseed.capture.batch import DTYPES, type_of
from deepseed.capture.errors import CaptureError
from deepseed.capture.metadata import Where
from deepseed.ir.program import FLOATS, Arg, Input, Op, Output, Ref, Type

DROPPED = ("device", "layout", "pin_memory", "memory_format", "generator", "non_blocking")


@dataclass
class Emitter:
    """Ops in the making. ``where`` and ``phase`` stand on each op that is emitted now."""

    inputs: list[Input] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    types: dict[str, Type] = field(default_factory=dict)
    where: Where = field(default_factory=Where)
    phase: str = "forward"
    origin: str = ""
    node: fx.Node | None = None  # what is being lowered
    base: str = ""  # names begin with it, where it is not empty, in place of the module path
    _taken: dict[str, int] = field(default_factory=dict)

    def name(self, op: str) -> str:
        """``<module path>.<op>``, ``<module path>.bwd.<op>`` or ``<base>.<op>``; ``.1``, ``.2`` behind it for further ones."""
        head = self.base or self.where.path
        head = _clean(head) if head else ""
        stem = (head + "." if head else "") + ("bwd." if self.phase == "backward" else "") + op
        while True:
            n = self._taken[stem] = self._taken.get(stem, -1) + 1
            name = f"{stem}.{n}" if n else stem
            if name not in self.types:
                return name

    def input(self, type_: Type, role: str, key: str) -> Ref:
        name = _clean(key if role in ("param", "buffer", "batch") else f"{role}.{key}" if key != role else key)
        n = 0
        while (f"{name}.{n}" if n else name) in self.types:
            n += 1
        name = f"{name}.{n}" if n else name
        self.inputs.append(Input(name, type_, role, key))
        self.types[name] = type_
        return Ref(name)

    def op(self, target: str, args: Sequence[Arg], types: Type | Sequence[Type], **kwargs: Arg) -> tuple[Ref, ...]:
        """Emit one op; its results."""
        types = (types,) if isinstance(types, Type) else tuple(types)
        short = target.split(".")[1] if target.startswith("aten.") else target.split(".")[-1]
        stem = short.strip("_")
        results: tuple[str, ...] = (self.name(stem),)
        for i, t in enumerate(types):
            if i == 0:
                self.types[results[0]] = t
            else:
                results += (self.name(f"{stem}.r{i}"),)
                self.types[results[-1]] = t
        self.ops.append(
            Op(results, target, tuple(args), types, tuple(kwargs.items()), self.phase, self.where.path, self.where.line, self.origin)
        )
        return tuple(Ref(r) for r in results)

    def one(self, target: str, args: Sequence[Arg], type_: Type, **kwargs: Arg) -> Ref:
        return self.op(target, args, type_, **kwargs)[0]

    def type(self, value: Arg) -> Type:
        if not isinstance(value, Ref):
            raise CaptureError(f"{value!r} where a tensor is expected", path=self.where.path, line=self.where.line)
        return self.types[value.name]

    # the few ops that are emitted everywhere, or not at all where they change nothing -----------------------------

    def reshape(self, x: Ref, shape: Sequence[int]) -> Ref:
        t = self.type(x)
        return x if t.shape == tuple(shape) else self.one("reshape", (x,), Type(t.dtype, tuple(shape)))

    def cast(self, x: Ref, dtype: str) -> Ref:
        t = self.type(x)
        return x if t.dtype == dtype else self.one("cast", (x,), Type(dtype, t.shape))

    def expand(self, x: Ref, shape: Sequence[int]) -> Ref:
        t = self.type(x)
        return x if t.shape == tuple(shape) else self.one("expand", (x,), Type(t.dtype, tuple(shape)))

    def slice(self, x: Ref, dim: int, start: int, length: int, step: int = 1) -> Ref:
        t = self.type(x)
        if length == t.shape[dim] and start == 0 and step == 1:
            return x
        shape = (*t.shape[:dim], length, *t.shape[dim + 1 :])
        return self.one("slice", (x,), Type(t.dtype, shape), dim=dim, start=start, step=step)

    def full(self, value: bool | int | float, type_: Type) -> Ref:
        value = bool(value) if type_.dtype == "bool" else float(value) if type_.dtype in FLOATS else int(value)
        return self.one("full", (), type_, value=value)


def convert(graph: fx.Graph, inputs: Sequence[Arg], outputs: Sequence[Any], emit: Emitter, phases: Mapping[fx.Node, str] | None = None) -> list[Arg]:
    """Emit the nodes that ``outputs`` need; the values of ``outputs``.

    ``inputs``: one value a placeholder. ``phases``: the phase of each node (default: the emitter's own).
    """
    table = lowerings()
    needed = reachable(outputs)
    env: dict[fx.Node, Arg] = dict(zip((n for n in graph.nodes if n.op == "placeholder"), inputs, strict=True))
    own = emit.where
    for n in graph.nodes:
        if n.op != "call_function" or n not in needed:
            continue
        if phases is not None:
            emit.where, emit.phase = n.meta.get("where", own), phases[n]
        args: Any = fx.node.map_arg(n.args, lambda a: env[a])  # type: ignore[arg-type, return-value]
        kwargs: Any = fx.node.map_arg(n.kwargs, lambda a: env[a])  # type: ignore[arg-type, return-value]
        if n.target is operator.getitem:
            env[n] = args[0][args[1]]
            continue
        if not isinstance(n.target, OpOverload):
            raise CaptureError(f"{n.target} in the traced graph is no tensor op", path=emit.where.path, line=emit.where.line)
        emit.node = n
        lowering = table.get(n.target) or table.get(n.target.overloadpacket)
        given = _by_schema(n.target, args, kwargs)
        env[n] = lowering(emit, n.meta.get("val"), **given) if lowering else as_aten(emit, n.target, n.meta.get("val"), given)
    emit.where = own
    return [env[o] if isinstance(o, fx.Node) else o for o in outputs]


@cache
def lowerings() -> Mapping[Any, Callable[..., Arg]]:
    """Aten op or packet -> the function that lowers it."""
    from deepseed.capture.indexing import INDEXING
    from deepseed.capture.lowering import LOWERINGS
    from deepseed.capture.rearrange import REARRANGED

    return {**LOWERINGS, **INDEXING, **REARRANGED}


def reachable(outputs: Iterable[Any]) -> set[fx.Node]:
    """The nodes that compute ``outputs``."""
    seen: set[fx.Node] = set()
    todo = [o for o in outputs if isinstance(o, fx.Node)]
    while todo:
        n = todo.pop()
        if n not in seen:
            seen.add(n)
            todo += n.all_input_nodes
    return seen


def as_aten(emit: Emitter, target: OpOverload, val: Any, given: Mapping[str, Any]) -> Arg:
    """``aten.<packet>.<overload>`` with the arguments where the schema has them; devices and memory formats dropped. What is created
    without a dtype has the one that it was traced with: it would else follow torch's default, whatever the types say.

    Results that are no tensors (a gradient that was not asked for) are left out; the rest keep their order.
    """
    args: list[Arg] = []
    kwargs: dict[str, Arg] = {}
    pending: list[Arg] = []
    names = {a.name for a in target._schema.arguments}
    for a in target._schema.arguments:
        if a.name in DROPPED:
            continue
        default = _plain(a.default_value) if a.has_default_value() else None
        value = given.get(a.name)
        if isinstance(value, complex):
            value = _complex(emit, value, val)
        value = _plain(value, emit) if a.name in given else default
        if a.kwarg_only:
            if a.name == "dtype" and value is None and "layout" in names:
                value = type_of(val).dtype
            if value != default:
                kwargs["from_" if a.name == "from" else a.name] = value
        else:
            pending.append(value)
            if a.name in given and (not a.has_default_value() or value != default):
                args += pending
                pending = []
    args += [p for p in pending if isinstance(p, Ref)]
    packet = target.overloadpacket.__name__
    name = f"{target.namespace}.{packet}" + ("" if target._overloadname == "default" else f".{target._overloadname}")
    values = list(val) if isinstance(val, (tuple, list)) else [val]
    mask = given.get("output_mask")  # shape functions give some gradients that were not asked for; kernels never do
    if isinstance(mask, (tuple, list)) and len(mask) == len(values):
        values = [v if wanted else None for v, wanted in zip(values, mask, strict=True)]
    if not any(isinstance(v, Tensor) for v in values):
        raise CaptureError(f"{target} gives no tensor", path=emit.where.path, line=emit.where.line)
    types = [type_of(v) for v in values if isinstance(v, Tensor)]
    if target.namespace == "aten" and "dtype" not in names and all(t.dtype in FLOATS for t in types):
        args = _promoted(emit, args, types[0].dtype)
    results = iter(emit.op(name, args, types, **kwargs))
    out = tuple(next(results) if isinstance(v, Tensor) else None for v in values)
    return out if isinstance(val, (tuple, list)) else out[0]


def _promoted(emit: Emitter, args: list[Arg], dtype: str) -> list[Arg]:
    """Integers of which an op makes floats, as floats: which float that is would else be torch's default, whatever the types say."""
    refs = [a for a in args if isinstance(a, Ref)]
    if not refs or any(emit.type(r).dtype in (*FLOATS, "c64", "c128") for r in refs):
        return args
    return [emit.cast(a, dtype) if isinstance(a, Ref) else a for a in args]


def _complex(emit: Emitter, value: complex, val: Any) -> Ref:
    """A complex number as a tensor without dimensions."""
    dtype = "c128" if isinstance(val, Tensor) and val.dtype == torch.complex128 else "c64"
    half = Type("f64" if dtype == "c128" else "f32", ())
    return emit.one("aten.complex", (emit.full(value.real, half), emit.full(value.imag, half)), Type(dtype, ()))


def _by_schema(target: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    names = [a.name for a in target._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _plain(value: Any, emit: Emitter | None = None) -> Arg:
    if isinstance(value, (list, tuple)):
        return tuple(_plain(v, emit) for v in value)
    if isinstance(value, torch.dtype):
        return DTYPES[value]
    if value is None or isinstance(value, (Ref, bool, int, float, str)):
        return value
    raise CaptureError(f"an argument of type {type(value).__name__} ({value!r}) has no place in a program",
                       path=emit.where.path if emit else "", line=emit.where.line if emit else "")  # fmt: skip


def _clean(name: str) -> str:
    """As the text of a program can have it: a module may be called anything."""
    return re.sub(r'[\s,()\[\]={}:%"]', "_", name) or "_"


def live(ops: Sequence[Op], outputs: Iterable[Ref]) -> tuple[Op, ...]:
    """The ops whose results are used, in order."""
    needed = {o.name for o in outputs}
    kept: list[Op] = []
    for op in reversed(ops):
        if any(r in needed for r in op.results):
            kept.append(op)
            needed.update(ref.name for ref in op.refs)
    return tuple(reversed(kept))


def kept_inputs(inputs: Iterable[Input], ops: Iterable[Op], outputs: Sequence[Output], always: Collection[str]) -> tuple[Input, ...]:
    """Those that are read or returned, those of the roles ``always``, and state that is written: it has its place, though nobody may read it."""
    used = {ref.name for op in ops for ref in op.refs} | {o.ref.name for o in outputs}
    stored = {o.key for o in outputs if o.role == "state"}
    return tuple(i for i in inputs if i.role in always or i.name in used or (i.role == "state" and i.key in stored))
