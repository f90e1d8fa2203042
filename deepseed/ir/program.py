"""An immutable list of ops on global shapes, with a mesh and a layout for every value.

    program ::= name mesh facts input* op* output*
    input   ::= name type role key
    op      ::= results target args kwargs types phase path line origin
    type    ::= dtype shape layout memory
    arg     ::= Ref | number | bool | str | None | tuple of args

A ``Ref`` names a value; ``Ref.want`` says which layout the op wants it in, when that differs from the value's own.
Frozen data throughout: a pass builds a new program (``Builder``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod

from deepseed.ir.layout import REPLICATED, Layout, local_shape
from deepseed.ir.mesh import Mesh
from deepseed.ir.schedule import Schedule

ITEMSIZE = {"f64": 8, "f32": 4, "f16": 2, "bf16": 2, "i64": 8, "i32": 4, "i16": 2, "i8": 1, "u8": 1, "bool": 1, "c64": 8, "c128": 16}
FLOATS = ("f64", "f32", "bf16", "f16")
PHASES = ("forward", "backward", "update")
INPUT_ROLES = ("param", "buffer", "state", "batch", "constant", "rng", "hyper", "tangent", "pending")
OUTPUT_ROLES = ("loss", "output", "grad", "pending", "batch_grad", "param", "buffer", "state", "norm")
GRADIENTS = ("grad", "pending", "batch_grad")  # what a program with tangents returns once it has them; pending: added up until an update takes it
PACKED = "packed"  # fact: rows are tokens of a step of any size, which no axis splits
OWN_ROWS = "own_rows"  # fact: batch, tangents and draws differ along dp, and so does what is made of them until a ``share``
SHOWN = ("output", "batch_grad")  # outputs that may be split as they are made: a model's, and gradients of the batch


class ProgramError(ValueError):
    """A program that is not well formed."""


@dataclass(frozen=True)
class Type:
    """dtype, global shape, layout; ``host``: the value lies in the memory of the rank's host, not of its device."""

    dtype: str
    shape: tuple[int, ...]
    layout: Layout = REPLICATED
    host: bool = False

    @cached_property
    def _hash(self) -> int:
        return hash((self.dtype, self.shape, self.layout, self.host))

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[object, ...]:
        return Type, (self.dtype, self.shape, self.layout, self.host)  # hashes differ from process to process

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.numel * ITEMSIZE[self.dtype]

    def local(self, mesh: Mesh) -> tuple[int, ...]:
        return local_shape(self.shape, self.layout, mesh)

    def local_bytes(self, mesh: Mesh) -> int:
        return prod(self.local(mesh)) * ITEMSIZE[self.dtype]

    def laid(self, layout: Layout) -> Type:
        return self if layout == self.layout else replace(self, layout=layout)

    def on(self, host: bool) -> Type:
        """The same in the host's memory, or in the device's."""
        return self if host == self.host else replace(self, host=host)


@dataclass(frozen=True)
class Ref:
    """A use of the value ``name``, wanted in ``want`` (None: as it is)."""

    name: str
    want: Layout | None = None


Arg = Ref | bool | int | float | str | None | tuple["Arg", ...]


@dataclass(frozen=True)
class Op:
    results: tuple[str, ...]
    target: str
    args: tuple[Arg, ...]
    types: tuple[Type, ...]
    kwargs: tuple[tuple[str, Arg], ...] = ()
    phase: str = "forward"
    path: str = ""  # module path, "model.layers.0.mlp"
    line: str = ""  # source line, "train.py:12"
    origin: str = ""  # key into Program.origins
    part: str = ""  # when it runs, once looped: see deepseed.ir.schedule
    stage: int = 0  # of the pipeline: where it runs

    @property
    def name(self) -> str:
        return self.results[0]

    @property
    def type(self) -> Type:
        """The type of a single-result op (the first result's, otherwise)."""
        return self.types[0]

    def kw(self, name: str, default: Arg = None) -> Arg:
        for key, value in self.kwargs:
            if key == name:
                return value
        return default

    @cached_property
    def refs(self) -> tuple[Ref, ...]:
        """All uses in order, keyword arguments and lists included, repeats kept."""
        return tuple(_refs(self.args)) + (tuple(_refs(tuple([v for _, v in self.kwargs]))) if self.kwargs else ())

    @cached_property
    def form(self) -> tuple[str, tuple[object, ...], tuple[tuple[str, object], ...]]:
        """Target, arguments and keyword arguments with the site left out, and ``...`` for each use."""
        return self.target, _nameless(self.args), tuple([(k, _nameless((v,))[0]) for k, v in self.kwargs if k != "site"])

    def map_refs(self, f: Callable[[Ref], Arg]) -> Op:
        """The same op with each use replaced, in the order of ``refs``; the op itself where each stays as it is."""
        new = [f(ref) for ref in self.refs]
        if new == list(self.refs):
            return self
        given = iter(new)
        op = replace(self, args=_filled(self.args, given), kwargs=tuple([(k, _filled((v,), given)[0]) for k, v in self.kwargs]))
        if all([isinstance(ref, Ref) for ref in new]):
            op.__dict__.update(refs=tuple(new), form=self.form)
        return op

    def typed(self, types: tuple[Type, ...]) -> Op:
        """The same op with results of these types."""
        op = replace(self, types=types)
        op.__dict__.update(refs=self.refs, form=self.form)
        return op


@dataclass(frozen=True)
class Input:
    name: str
    type: Type
    role: str
    key: str
    stage: int = 0  # of the pipeline: where a parameter, buffer or state is stored; all others are on every stage


@dataclass(frozen=True)
class Output:
    ref: Ref
    role: str
    key: str


@dataclass(frozen=True)
class Program:
    name: str
    mesh: Mesh
    inputs: tuple[Input, ...]
    ops: tuple[Op, ...]
    outputs: tuple[Output, ...]
    facts: frozenset[str] = frozenset()
    origins: tuple[tuple[str, Op], ...] = ()  # the op that a group was decomposed from; its types are the whole op's
    schedule: Schedule | None = None  # once staged: what each pipeline rank runs, in order

    @cached_property
    def types(self) -> Mapping[str, Type]:
        """The type of every value."""
        out = {i.name: i.type for i in self.inputs}
        for op in self.ops:
            out.update(zip(op.results, op.types, strict=True))
        return out

    @cached_property
    def producers(self) -> Mapping[str, Op]:
        return {result: op for op in self.ops for result in op.results}

    @cached_property
    def uses(self) -> Mapping[str, tuple[Op | Output, ...]]:
        """Who uses each value, in order, a user once for each use."""
        out: dict[str, list[Op | Output]] = {name: [] for name in self.types}
        for op in self.ops:
            for ref in op.refs:
                out[ref.name].append(op)
        for o in self.outputs:
            out[o.ref.name].append(o)
        return {name: tuple(users) for name, users in out.items()}

    def by_role(self, role: str) -> tuple[Input, ...]:
        return tuple(i for i in self.inputs if i.role == role)

    def want(self, ref: Ref) -> Layout:
        """The layout in which a use reads its value."""
        return self.types[ref.name].layout if ref.want is None else ref.want

    def __str__(self) -> str:
        from deepseed.ir.text import format_program

        return format_program(self)


@dataclass
class Builder:
    """Collects the ops of a new program; ``emit`` names, ``program`` closes.

    before = Program(...); out = Builder(before); out.emit(op) ...; after = out.program(add={"explicit"})
    """

    base: Program
    ops: list[Op] = field(default_factory=list)
    inputs: list[Input] = field(default_factory=list)
    types: dict[str, Type] = field(default_factory=dict)
    origins: dict[str, Op] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.inputs = list(self.base.inputs)
        self.types = {i.name: i.type for i in self.inputs}
        self.origins = dict(self.base.origins)
        self._taken = set(self.base.types)

    def fresh(self, name: str) -> str:
        """``name`` if no value has it, else ``name.1``, ``name.2`` …"""
        new, n = name, 0
        while new in self._taken:
            n += 1
            new = f"{name}.{n}"
        self._taken.add(new)
        return new

    def emit(self, op: Op) -> Op:
        for result, type_ in zip(op.results, op.types, strict=True):
            self.types[result] = type_
            self._taken.add(result)
        self.ops.append(op)
        return op

    def program(self, *, outputs: Iterable[Output] | None = None, add: Iterable[str] = ()) -> Program:
        return replace(
            self.base,
            inputs=tuple(self.inputs),
            ops=tuple(self.ops),
            outputs=self.base.outputs if outputs is None else tuple(outputs),
            facts=self.base.facts | frozenset(add),
            origins=tuple(self.origins.items()),
        )


def after_tangents(p: Program) -> set[str]:
    """The ops that depend on tangents: they run when the caller has seen the outputs."""
    values, ops = {i.name for i in p.by_role("tangent")}, set[str]()
    for op in p.ops:
        if not values.isdisjoint([ref.name for ref in op.refs]):
            values.update(op.results)
            ops.add(op.name)
    return ops


def params_only(p: Program) -> frozenset[str]:
    """Parameters, and values of the forward and backward that depend on parameters alone (casts, transposes)."""
    found = {i.name for i in p.inputs if i.role == "param"}
    for op in p.ops:
        if op.phase != "update" and op.refs and all(r.name in found for r in op.refs):
            found.update(op.results)
    return frozenset(found)


def shortens(op: Op, p: Program) -> bool:
    """Whether it is a cast to fewer bytes an element."""
    return op.target == "cast" and ITEMSIZE[op.type.dtype] < ITEMSIZE[p.types[op.refs[0].name].dtype]


def kept(p: Program) -> frozenset[str]:
    """Values that are gathered or brought to the device once a step and stay there, whatever reads them in which loop: what says so, and its wait."""
    found = {r for op in p.ops if op.kw("kept") for r in op.results}
    return frozenset(found.union(*(op.results for op in p.ops if op.target == "wait" and op.refs[0].name in found)))


def _refs(args: tuple[Arg, ...]) -> Iterator[Ref]:
    for a in args:
        if isinstance(a, Ref):
            yield a
        elif isinstance(a, tuple):
            yield from _refs(a)


def _nameless(args: tuple[Arg, ...]) -> tuple[object, ...]:
    return tuple([... if isinstance(a, Ref) else _nameless(a) if isinstance(a, tuple) else a for a in args])


def _filled(args: tuple[Arg, ...], given: Iterator[Arg]) -> tuple[Arg, ...]:
    return tuple([next(given) if isinstance(a, Ref) else _filled(a, given) if isinstance(a, tuple) else a for a in args])
