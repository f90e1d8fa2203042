"""Two expressions at smaller sizes: dimensions that only run along, batch and width, become 2 or 3 in both.

The factors of the rules say which dimensions go together. One keeps its size where arguments determine it, where it stands beside
another in one dimension, and where it is contracted or must be whole beside a number that could have been taken from its size (a
mean's n). What is equal for a batch of 3 is equal for a batch of 3000.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod

from deepseed.ir.program import Arg, Op, Type
from deepseed.rules import signature

Node = tuple[int, int]  # number of a value, dimension
Shapes = Mapping[int, tuple[int, ...]]
SMALL = 2**12  # elements of an expression that are few enough as they are
MOST = 2**25  # elements that are too many to run


@dataclass
class _Classes:
    """Dimensions that are one factor, and those that keep their size."""

    parent: dict[Node, Node] = field(default_factory=dict)
    kept: set[Node] = field(default_factory=set)

    def find(self, n: Node) -> Node:
        while self.parent.setdefault(n, n) != n:
            self.parent[n] = self.parent[self.parent[n]]
            n = self.parent[n]
        return n

    def join(self, nodes: list[Node]) -> None:
        for n in nodes[1:]:
            self.parent[self.find(n)] = self.find(nodes[0])


def sizes(
    ops: Iterable[tuple[Op, tuple[int, ...], tuple[int, ...]]], shapes: Shapes, dtypes: Mapping[int, str], roots: tuple[int, int]
) -> dict[int, tuple[int, ...]]:
    """The shapes at which to run the expressions of ``ops`` (op, numbers of its operands, of its results), whose ``roots`` keep equal
    shapes: ``shapes`` themselves where these are small."""
    ops = list(ops)
    if sum(prod(s) for s in shapes.values()) <= SMALL:
        return dict(shapes)
    classes = _Classes()
    counts = any(x > 3 or 0 < x < 1 / 3 for op, _, _ in ops for x in _numbers((op.args, tuple(v for _, v in op.kwargs))))
    for op, operands, results in ops:
        _collect(classes, op, operands, results, shapes, dtypes, counts)
    for d in range(len(shapes[roots[0]])):
        classes.join([(roots[0], d), (roots[1], d)])
    kept = {classes.find(n) for n in classes.kept}
    chosen: dict[Node, int] = {}
    out: dict[int, tuple[int, ...]] = {}
    for number, shape in shapes.items():
        new = []
        for d, size in enumerate(shape):
            root = classes.find((number, d))
            small = size if root in kept or size <= 3 else chosen.setdefault(root, 2 + len(chosen) % 2)
            new.append(small)
        out[number] = tuple(new)
    return out


def _collect(
    classes: _Classes, op: Op, operands: tuple[int, ...], results: tuple[int, ...], shapes: Shapes, dtypes: Mapping[int, str], counts: bool
) -> None:
    slots = (*operands, *results)
    types = tuple(Type(dtypes[n], shapes[n]) for n in operands)
    sig = signature(op, types)
    if not operands and op.target != "full":
        classes.kept.update((n, d) for n in slots for d in range(len(shapes[n])))
    if sig is None:
        _alike(classes, op, slots, shapes)
        return  # what else it asks for is seen by whether it runs
    dims = sig.operands + sig.results
    for name, places in sig.places.items():
        nodes = [(slots[p.slot], p.dim) for p in places]
        classes.join(nodes)
        reached = {p.slot for p in places}
        contracted = any(k not in reached for k in range(len(sig.operands), len(dims)))
        beside = any(len(dims[p.slot][p.dim]) > 1 for p in places)
        if beside or name in sig.fixed | sig.contiguous or (counts and (contracted or name in sig.whole)):
            classes.kept.update((slots[p.slot], p.dim) for p in places)
    for slot, tensor in enumerate(dims):
        classes.kept.update((slots[slot], d) for d, names in enumerate(tensor) if len(names) != 1)


def _alike(classes: _Classes, op: Op, slots: tuple[int, ...], shapes: Shapes) -> None:
    """An op without a rule: dimensions of one size stay of one size, and a size that stands among its arguments stays. A kernel that
    does not compare the sizes of its operands (a native batch norm) would read and write past their ends."""
    said = set(_numbers((op.args, tuple(v for _, v in op.kwargs))))
    by_size: dict[int, list[Node]] = {}
    for n in slots:
        for d, size in enumerate(shapes[n]):
            by_size.setdefault(size, []).append((n, d))
    for size, nodes in by_size.items():
        classes.join(nodes)
        if size in said:
            classes.kept.update(nodes)


def _numbers(arg: Arg) -> Iterator[float]:
    if isinstance(arg, tuple):
        for a in arg:
            yield from _numbers(a)
    elif isinstance(arg, int | float) and not isinstance(arg, bool):
        yield arg
