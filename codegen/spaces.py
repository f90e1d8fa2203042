"""The iteration space of a kernel: which point of it makes which element of each value.

A space is the shape of the largest value, its dimensions in parts where other shapes need them. From there the index of every value in the variables of the
space follows through the ops, forward and backward: pointwise ops keep it, a permute permutes it, a sum loses some of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from deepseed.codegen.index_maps import Index, Refine, Var, flat, of, reshaped
from deepseed.ir.program import Op, Program

Indices = tuple[Index, ...]
REDUCTIONS = ("sum", "amax", "sum_of_squares")
VIEWS = ("reshape", "permute")  # one to one
LEAVES = ("full", "iota", "bernoulli", "uniform")
_ELSEWHERE = (*VIEWS, *REDUCTIONS, *LEAVES, "expand", "slice", "unslice", "pad", "cat", "gather", "scatter_add", "embedding")


@dataclass
class Space:
    """``vars``: in the order of the root's elements. ``index``: of each value that is tied to the root."""

    vars: tuple[Var, ...]
    index: dict[str, Indices] = field(default_factory=dict)

    def reduced(self, p: Program, op: Op) -> frozenset[Var] | None:
        """The variables that a reduction adds up over; None where its operand is not tied to the space, or not one to one, or the result is tied to other points."""
        x = op.refs[0].name
        if x not in self.index:
            return None
        dims = reduced_dims(p, op)
        kept, made = tuple(i for d, i in enumerate(self.index[x]) if d not in dims), self.index.get(op.name, ())
        if len(made) == len(self.index[x]):
            made = tuple(i for d, i in enumerate(made) if d not in dims)
        if made and made != kept:  # read along another dimension than it is made along
            return None
        inside: set[Var] = set().union(*(self.index[x][d].vars for d in dims)) if dims else set()
        outside: set[Var] = set().union(*(i.vars for d, i in enumerate(self.index[x]) if d not in dims))
        size = 1
        for v in inside:
            size *= v.size
        n = 1
        for d in dims:
            n *= p.types[x].shape[d]
        return frozenset(inside) if size == n and not inside & outside else None


def reduced_dims(p: Program, op: Op) -> tuple[int, ...]:
    if op.target == "sum_of_squares":
        return tuple(range(len(p.types[op.refs[0].name].shape)))
    dims = op.kw("dims", ())
    assert isinstance(dims, tuple)
    return tuple(int(d) for d in dims if isinstance(d, int))


def space_of(p: Program, root: str, closure: Collection[str], targets: Sequence[str], split: Mapping[tuple[str, int], bool]) -> Space:
    """The space of ``root`` with what ``split`` says of its variables: (name, minor size) -> whether the major part is unrolled. What is to be made, or
    reduced, and not tied to the root has its points in row-major order too where it has as many elements. Raises Refine."""
    names: list[Var] = []
    index: list[Index] = []
    for d, size in enumerate(p.types[root].shape):
        parts = _parts(Var("abcdefghklm"[d % 11] * (d // 11 + 1), size), split)
        index.append(_joined(parts))
        names += [v for v in parts if v.size > 1]
    space = Space(tuple(names))
    _spread(p, root, tuple(index), closure, targets, space)
    return space


def _parts(var: Var, split: Mapping[tuple[str, int], bool]) -> list[Var]:
    for (name, minor), unrolled in split.items():
        if name == var.name and minor < var.size:
            return _parts(Var(f"{name}0", var.size // minor, unrolled or var.unrolled), split) + _parts(Var(f"{name}1", minor, var.unrolled), split)
    return [var]


def _joined(parts: Sequence[Var]) -> Index:
    return flat([of(v) for v in parts], [v.size for v in parts])


def closure_of(p: Program, memory: Collection[str], targets: Collection[str]) -> set[str]:
    """What is evaluated to make ``targets``, up to what lies in ``memory``."""
    found, todo = set[str](), list(targets)
    while todo:
        value = todo.pop()
        if value not in found:
            found.add(value)
            if value not in memory:
                todo += [r.name for r in p.producers[value].refs]
    return found


def parts_of(value: str) -> str:
    """The name of what programs leave of a sum: a value in memory of its own, with a dimension in front."""
    return f"{value}_parts"


def adds_parts(op: Op) -> bool:
    """Whether an op adds up what programs left: fragments are numbered, so that no other name ends so."""
    return op.refs[0].name.endswith(parts_of(""))


def depths(p: Program, reductions: Collection[str], beside: Mapping[str, str] | None = None) -> dict[str, int]:
    """How many of ``reductions`` each value waits for, one after another, itself among them. ``beside``: reductions that are made with another one, which they wait for."""
    beside = beside or {}
    depth: dict[str, int] = {}
    for op in p.ops:
        at = max([depth.get(r.name, 0) for r in op.refs], default=0)
        depth.update(dict.fromkeys(op.results, depth[beside[op.name]] if op.name in beside else at + (op.name in reductions)))
    return depth


def read_along(space: Space, name: str, over: frozenset[Var], ops: Sequence[Op]) -> bool:
    """Whether a reduction's result is used at each point of what it reduces."""
    after = {name}
    for op in ops:
        if any(r.name in after for r in op.refs):
            after.update(op.results)
            if any(i.vars & over for i in space.index.get(op.name, ())):
                return True
    return False


def ops_of(p: Program, closure: Collection[str]) -> list[Op]:
    return [op for op in p.ops if any(r in closure for r in op.results)]


def _spread(p: Program, root: str, index: Indices, closure: Collection[str], targets: Sequence[str], space: Space) -> None:
    known: dict[str, list[Index | None]] = {}
    for name in closure:
        known[name] = [Index() if n == 1 else None for n in p.types[name].shape]
    known[root] = list(index)
    ops = [op for op in ops_of(p, closure) if all(r.name in closure for r in op.refs)]
    reduced = [op.refs[0].name for op in ops if op.target in REDUCTIONS]
    shape = p.types[root].shape
    for free in ("", *reduced, *targets):
        if free:
            if None not in known[free] or p.types[free].numel != prod(shape):
                continue
            known[free] = list(reshaped(index, shape, p.types[free].shape))
        while any([_tie(p, op, known) for op in (*ops, *reversed(ops))]):
            pass
    space.index = {name: tuple([e for e in i if e is not None]) for name, i in known.items() if None not in i}


def _tie(p: Program, op: Op, known: dict[str, list[Index | None]]) -> bool:
    """What an op says about the indices of its values; whether something new came out."""
    y = known[op.name]
    before = [list(known[name]) for name in (op.name, *(r.name for r in op.refs))]
    shape = p.types[op.name].shape
    if op.target in VIEWS:
        x = known[op.refs[0].name]
        old = p.types[op.refs[0].name].shape
        if op.target == "permute":
            dims = op.kw("dims")
            assert isinstance(dims, tuple)
            for d, source in enumerate(dims):
                assert isinstance(source, int)
                _same(y, d, x, source)
        elif None not in x and None in y:
            y[:] = reshaped(x, old, shape)  # type: ignore[arg-type]
        elif None not in y and None in x:
            x[:] = reshaped(y, shape, old)  # type: ignore[arg-type]
    elif op.target in REDUCTIONS:
        x = known[op.refs[0].name]
        dims = reduced_dims(p, op)
        kept = [d for d in range(len(x)) if d not in dims]
        for d, source in enumerate(range(len(x)) if len(y) == len(x) else kept):
            if source in kept:
                _same(y, d, x, source)
    elif op.target in ("slice", "unslice", "pad", "cat", "gather", "scatter_add"):
        along = op.kw("dim", 0)
        for n, ref in enumerate(op.refs):
            x = known[ref.name]
            whole = {"gather": n == 1, "scatter_add": n == 0}.get(op.target, False)
            for d in range(len(shape)):
                if p.types[ref.name].shape[d] == shape[d] and (whole or (d != along if op.target != "pad" else True)):
                    _same(y, d, x, d)
    elif op.target == "embedding":
        ids = known[op.refs[1].name]
        for d in range(len(ids)):
            _same(y, d, ids, d)
    elif op.target not in _ELSEWHERE or op.target == "expand":
        for ref in op.refs:
            x, size = known[ref.name], p.types[ref.name].shape
            for d in range(1, len(x) + 1):
                if size[-d] == shape[-d]:
                    _same(y, -d, x, -d)
    return before != [known[name] for name in (op.name, *(r.name for r in op.refs))]


def _same(a: list[Index | None], i: int, b: list[Index | None], j: int) -> None:
    if a[i] is None:
        a[i] = b[j]
    elif b[j] is None:
        b[j] = a[i]


def add(split: dict[tuple[str, int], bool], asked: Refine) -> None:
    key = (asked.var.name, asked.minor)
    assert key not in split, f"{asked} asked twice"
    split[key] = asked.unrolled
