"""One small error in a program, drawn at random: what a compiler could get wrong. Knows the IR, and no model.

``mutate(program, rng)`` gives another program with one op, layout, operand or output changed. Whether that changes a number, and
whether a check sees it, is for ``test_mutations`` to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TypeVar

from deepseed.check.typing import MOVES
from deepseed.ir.layout import Element, Layout, Partial, Split
from deepseed.ir.program import FLOATS, Arg, Op, Output, Program, Ref, Type

T = TypeVar("T")
Mutant = tuple[Program, str]  # the program, and the name of the op (or input or output) that is wrong


@dataclass(frozen=True)
class Mutation:
    kind: str
    node: str
    program: Program


OTHER_OP = {
    "aten.add.Tensor": "aten.sub.Tensor", "aten.sub.Tensor": "aten.add.Tensor", "aten.mul.Tensor": "aten.div.Tensor", "aten.div.Tensor": "aten.mul.Tensor",
    "aten.exp": "aten.expm1", "aten.log": "aten.log1p", "aten.rsqrt": "aten.sqrt", "aten.sqrt": "aten.rsqrt", "aten.neg": "aten.abs",
    "aten.sin": "aten.cos", "aten.cos": "aten.sin", "aten.tanh": "aten.sigmoid", "aten.sigmoid": "aten.tanh", "aten.relu": "aten.neg",
    "aten.silu": "aten.tanh", "aten.gelu": "aten.silu", "aten.maximum": "aten.minimum", "aten.minimum": "aten.maximum", "aten.square": "aten.abs",
    "aten.ge.Scalar": "aten.gt.Scalar", "aten.gt.Scalar": "aten.ge.Scalar", "aten.lt.Scalar": "aten.le.Scalar", "aten.le.Scalar": "aten.lt.Scalar",
    "aten.eq.Scalar": "aten.ne.Scalar", "aten.ne.Scalar": "aten.eq.Scalar", "aten.ge.Tensor": "aten.gt.Tensor", "aten.le.Tensor": "aten.lt.Tensor",
    "optim.adamw": "optim.adam", "optim.adam": "optim.adamw", "unslice": "pad", "all_reduce.start": "all_gather.start",
}  # fmt: skip
REDUCTIONS = {"sum": "amax", "amax": "sum"}
POSITIONS = ("start", "step", "pads", "index")


# moves ------------------------------------------------------------------------------------------------------------


def dropped_move(p: Program, rng: Random) -> Iterator[Mutant]:
    """A reshard, collective or local move is missing: its operand is passed on."""
    for op in _any(p.ops, rng):
        source = p.producers.get(op.refs[0].name) if op.target == "wait" else op
        if op.target in ("reshard", "wait", "shard", "summand") and source is not None:
            n = source.results.index(op.refs[0].name) if op.target == "wait" else 0
            yield _without(p, op, source.refs[n].name), op.name


def wrong_axis(p: Program, rng: Random) -> Iterator[Mutant]:
    """A collective or local move runs over another axis."""
    for op in _any(p.ops, rng):
        others = [a for a in p.mesh.names if a != op.kw("axis")]
        if op.target in MOVES and others:
            yield _swap(p, replace(op, kwargs=_kwarg(op, "axis", rng.choice(others)))), op.name


def dropped_wait(p: Program, rng: Random) -> Iterator[Mutant]:
    """A collective's result is used before it is there."""
    for op in _any(p.ops, rng):
        if op.target == "wait":
            yield _without(p, op, op.refs[0].name), op.name


# layouts ----------------------------------------------------------------------------------------------------------


def wrong_result_layout(p: Program, rng: Random) -> Iterator[Mutant]:
    """A value is declared to lie in another way than it does: other dim, other blocks, other axis, whole, partial."""
    for op in _any(p.ops, rng):
        n = rng.randrange(len(op.types))
        other = _other_layout(p, op.types[n], op.types[n].layout, rng)
        if other is not None:
            types = (*op.types[:n], op.types[n].laid(other), *op.types[n + 1 :])
            yield _swap(p, replace(op, types=types)), op.name


def wrong_input_layout(p: Program, rng: Random) -> Iterator[Mutant]:
    for i in _any(p.inputs, rng):
        other = _other_layout(p, i.type, i.type.layout, rng)
        if other is not None:
            yield replace(p, inputs=tuple(replace(x, type=x.type.laid(other)) if x is i else x for x in p.inputs)), i.name


def wrong_wish(p: Program, rng: Random) -> Iterator[Mutant]:
    """A use wants its operand in another layout, or no longer says in which."""
    for op in _any(p.ops, rng):
        for n in _any(range(len(op.refs)), rng):
            ref = op.refs[n]
            if ref.want is not None:
                want = rng.choice([None, _other_layout(p, p.types[ref.name], ref.want, rng)])
                yield _swap(p, _with_ref(op, n, Ref(ref.name, want))), op.name
                break


def _other_layout(p: Program, t: Type, now: Layout, rng: Random) -> Layout | None:
    """``now`` with one axis's element changed, or two axes exchanged (swapped shards)."""
    if not p.mesh.names:
        return None
    if len(now.elements) > 1 and rng.random() < 0.3:
        (a, e), (b, f) = now.elements[:2]
        return now.with_(a, f).with_(b, e)
    axis = rng.choice(p.mesh.names)
    old = now.on(axis)
    choices: list[Element] = [None, Partial("sum"), Partial("max"), *(Split(d, o) for d in range(len(t.shape)) for o in (1, 2, 3))]
    choices += [Split(d, 1, n) for d, n in enumerate(t.shape) if n > 1 and n % p.mesh.size(axis)]  # uneven
    if isinstance(old, Split):
        choices += [Split(d, old.outer) for d in range(len(t.shape))] * 2
    return now.with_(axis, rng.choice([c for c in choices if c != old]))


# operands -----------------------------------------------------------------------------------------------------------


def swapped_operands(p: Program, rng: Random) -> Iterator[Mutant]:
    for op in _any(p.ops, rng):
        pairs = [(a, b) for a in range(len(op.refs)) for b in range(a) if op.refs[a] != op.refs[b]]
        same = [(a, b) for a, b in pairs if p.types[op.refs[a].name] == p.types[op.refs[b].name]]
        if pairs:
            a, b = rng.choice(same or pairs)
            yield _swap(p, _with_ref(_with_ref(op, a, op.refs[b]), b, op.refs[a])), op.name


def another_value(p: Program, rng: Random) -> Iterator[Mutant]:
    """A use reads another value of the same type."""
    at = {name: n for n, name in enumerate(p.types)}
    for op in _any(p.ops, rng):
        for n in _any(range(len(op.refs)), rng):
            ref = op.refs[n]
            others = [v for v, t in p.types.items() if t == p.types[ref.name] and v != ref.name and at[v] < at[op.name]]
            if others:
                yield _swap(p, _with_ref(op, n, Ref(rng.choice(others), ref.want))), op.name
                break


def dropped_op(p: Program, rng: Random) -> Iterator[Mutant]:
    """An op that keeps its operand's type (a scale, an activation, a residual's sum) is missing."""
    for op in _any(p.ops, rng):
        kept = [r for r in op.refs if p.types[r.name] == op.type]
        if kept and len(op.results) == 1:
            yield _without(p, op, rng.choice(kept).name), op.name


def stale_value(p: Program, rng: Random) -> Iterator[Mutant]:
    """The value before the update is returned, or read, where the new one is due."""
    olds = {(i.role, i.key): i.name for i in p.inputs}
    for o in _any(p.outputs, rng):
        old = olds.get((o.role, o.key))
        if old is not None and old != o.ref.name:
            yield _returned(p, o, old), f"output {o.role} {o.key!r}"


def another_output(p: Program, rng: Random) -> Iterator[Mutant]:
    for o in _any(p.outputs, rng):
        others = [v for v, t in p.types.items() if t == p.types[o.ref.name] and v != o.ref.name]
        if others:
            yield _returned(p, o, rng.choice(others)), f"output {o.role} {o.key!r}"


# arguments ----------------------------------------------------------------------------------------------------------


def missing_scale(p: Program, rng: Random) -> Iterator[Mutant]:
    """A multiplication by a number (or a ``full``) is missing, as is the scale of a fused update."""
    for op in _any(p.ops, rng):
        if op.kw("scale") is not None and isinstance(op.kw("scale"), Ref):
            yield _swap(p, replace(op, kwargs=tuple((k, v) for k, v in op.kwargs if k != "scale"))), op.name
        elif op.target in ("aten.mul.Tensor", "aten.div.Tensor", "aten.mul.Scalar", "aten.div.Scalar"):
            scalars = len(op.refs) == 1 or any(not p.types[r.name].shape for r in op.refs[1:])
            if scalars and p.types[op.refs[0].name] == op.type:
                yield _without(p, op, op.refs[0].name), op.name


def changed_constant(p: Program, rng: Random) -> Iterator[Mutant]:
    """A number, flag or word among the arguments is another one: scale, epsilon, dim, causal, betas, site."""
    for op in _any(p.ops, rng):
        fields: list[tuple[str, Arg]] = [("", op.args), *((k, v) for k, v in op.kwargs if k not in (*POSITIONS, "axis", "dims"))]
        for key, value in _any(fields, rng):
            new = _nudged(value, rng)
            if new != value:
                yield _swap(p, replace(op, args=new) if not key and isinstance(new, tuple) else replace(op, kwargs=_kwarg(op, key, new))), op.name
                break


def off_by_one(p: Program, rng: Random) -> Iterator[Mutant]:
    """A slice, iota, lookup or pad begins one further; a rank fills another rank's part; or the position is forgotten."""
    for op in _any(p.ops, rng):
        for key in _any([k for k, _ in op.kwargs if k in POSITIONS], rng):
            if key in ("start", "index") and "local" in p.facts and rng.random() < 0.3:
                kwargs = tuple((k, v) for k, v in op.kwargs if k != key)
            else:
                kwargs = _kwarg(op, key, _shifted(op.kw(key), rng))
            if kwargs != op.kwargs:
                yield _swap(p, replace(op, kwargs=kwargs)), op.name
                break


def wrong_dims(p: Program, rng: Random) -> Iterator[Mutant]:
    """A reduction or permutation over other dimensions; a concatenation or lookup along another one."""
    for op in _any(p.ops, rng):
        dims, rank = op.kw("dims"), len(p.types[op.refs[0].name].shape) if op.refs else 0
        if isinstance(dims, tuple) and op.target == "permute" and rank > 1:
            a, b = rng.sample(range(rank), 2)
            new = list(dims)
            new[a], new[b] = new[b], new[a]
            yield _swap(p, replace(op, kwargs=_kwarg(op, "dims", tuple(new)))), op.name
        elif isinstance(dims, tuple) and dims and rank > len(dims):
            left = [d for d in range(rank) if d not in dims]
            new = [*dims]
            new[rng.randrange(len(dims))] = rng.choice(left)
            yield _swap(p, replace(op, kwargs=_kwarg(op, "dims", tuple(sorted(new))))), op.name  # type: ignore[type-var]
        elif isinstance(op.kw("dim"), int) and rank > 1:
            yield _swap(p, replace(op, kwargs=_kwarg(op, "dim", rng.choice([d for d in range(rank) if d != op.kw("dim")])))), op.name


def wrong_reduction(p: Program, rng: Random) -> Iterator[Mutant]:
    for op in _any(p.ops, rng):
        if op.target in REDUCTIONS:
            yield _swap(p, replace(op, target=REDUCTIONS[op.target])), op.name


def other_op(p: Program, rng: Random) -> Iterator[Mutant]:
    for op in _any(p.ops, rng):
        if op.target in OTHER_OP:
            yield _swap(p, replace(op, target=OTHER_OP[op.target])), op.name


def too_late(p: Program, rng: Random) -> Iterator[Mutant]:
    """An op stands after its first user."""
    for op in _any(p.ops, rng):
        users = [u for r in op.results for u in p.uses[r] if isinstance(u, Op)]
        if users:
            rest = [o for o in p.ops if o is not op]
            at = rest.index(users[0]) + 1
            yield replace(p, ops=(*rest[:at], op, *rest[at:])), op.name


def _nudged(value: Arg, rng: Random) -> Arg:
    """``value`` with one number, flag or word in it changed."""
    if isinstance(value, tuple):
        for n in _any(range(len(value)), rng):
            new = _nudged(value[n], rng)
            if new != value[n]:
                return (*value[:n], new, *value[n + 1 :])
        return value
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + rng.choice((-1, 1))
    if isinstance(value, float):
        return value * rng.choice((0.5, 1.25, -1.0)) if value else 0.5
    if isinstance(value, str) and value not in FLOATS:
        return value + "'"
    return value


def _shifted(value: Arg, rng: Random) -> Arg:
    if isinstance(value, int) and not isinstance(value, bool):
        return value + rng.choice((-1, 1)) if value else 1
    return _nudged(value, rng)


MUTATORS: tuple[Callable[[Program, Random], Iterator[Mutant]], ...] = (
    dropped_move, wrong_axis, dropped_wait, wrong_result_layout, wrong_input_layout, wrong_wish, swapped_operands, another_value, dropped_op,
    stale_value, another_output, missing_scale, changed_constant, off_by_one, wrong_dims, wrong_reduction, other_op, too_late,
)  # fmt: skip


def mutate(p: Program, rng: Random) -> Mutation:
    """One mutation: a kind that ``p`` has a place for, at a place of it, both drawn from ``rng``."""
    for mutator in _any(MUTATORS, rng):
        found = next(mutator(p, rng), None)
        if found is not None:
            return Mutation(mutator.__name__, found[1], found[0])
    raise AssertionError("a program without an op")


# small parts --------------------------------------------------------------------------------------------------------


def _any(items: Sequence[T], rng: Random) -> Iterator[T]:
    """The items in random order."""
    yield from rng.sample(list(items), len(items))


def _swap(p: Program, new: Op) -> Program:
    """``p`` with the op that defines the same value replaced."""
    return replace(p, ops=tuple(new if op.results == new.results else op for op in p.ops))


def _without(p: Program, gone: Op, instead: str) -> Program:
    """``p`` without ``gone``; who read its result reads ``instead``. A start that no one waits for is left out, too."""

    def other(ref: Ref) -> Ref:
        return Ref(instead, ref.want) if ref.name == gone.name else ref

    ops = tuple(op.map_refs(other) for op in p.ops if op is not gone)
    return replace(p, ops=ops, outputs=tuple(replace(o, ref=other(o.ref)) for o in p.outputs))


def _returned(p: Program, output: Output, name: str) -> Program:
    return replace(p, outputs=tuple(replace(o, ref=Ref(name, o.ref.want)) if o is output else o for o in p.outputs))


def _with_ref(op: Op, n: int, ref: Ref) -> Op:
    count = iter(range(len(op.refs)))
    return op.map_refs(lambda old: ref if next(count) == n else old)


def _kwarg(op: Op, key: str, value: Arg) -> tuple[tuple[str, Arg], ...]:
    return tuple((k, value if k == key else v) for k, v in op.kwargs)
