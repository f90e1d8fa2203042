"""Which nodes of a program are the same, up to depth: Weisfeiler-Lehman colours of the dataflow graph.

Nodes with the same neighbourhood (op, arguments, types, neighbours to radius 4) form one class and share one variable in the
integer program. That only narrows the choice, so it is always sound; the layers of a deep model fall into the same classes,
so the program's size does not grow with depth.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence

RADIUS = 4


class Graph:
    """Who reads whom: of every node (input, op or output) the (node, result) pairs that it reads, in order."""

    def __init__(self, operands: Sequence[Sequence[tuple[int, int]]]) -> None:
        self.operands = operands
        self.results = 1 + max((result for reads in operands for _, result in reads), default=0)
        self.places = self.results * max((len(reads) for reads in operands), default=1)
        self.uses: list[list[tuple[int, int]]] = [[] for _ in operands]  # of each node: its users, and by which operand they read which result
        for user, reads in enumerate(operands):
            for operand, (source, result) in enumerate(reads):
                self.uses[source].append((user, operand * self.results + result))


def colours(graph: Graph, labels: Sequence[Hashable], radius: int = RADIUS) -> list[int]:
    """One class number a node, in the order in which classes occur; ``labels``: of each node by itself."""
    current = _number(labels)
    for _ in range(radius):
        made, used = [c * graph.results for c in current], [c * graph.places for c in current]
        finer = _number(
            [
                (c, tuple([made[source] + result for source, result in reads]), frozenset([used[user] + place for user, place in uses]))
                for c, reads, uses in zip(current, graph.operands, graph.uses, strict=True)
            ]
        )
        if finer == current:  # and so it would stay
            break
        current = finer
    return current


def parts(graph: Graph, inside: Sequence[bool], links: Callable[[int, int], bool]) -> list[int]:
    """The part of each node, as the number of one of its nodes: those that are ``inside`` and hang together through values
    (node, result) that link, such as the update of one parameter; any other node is a part by itself."""
    parent = list(range(len(graph.operands)))

    def part(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, reads in enumerate(graph.operands):
        for source, result in reads if inside[i] else ():
            if inside[source] and links(source, result):
                parent[part(i)] = part(source)
    return [part(i) for i in range(len(parent))]


def by_part(classes: Sequence[int], of: Sequence[int], inside: Sequence[bool], heads: Iterable[int]) -> list[int]:
    """Finer classes: nodes of one class stay together only where the heads of their parts (``of``) are of the same classes.

    A long chain of equal updates would otherwise tie parameters of equal shape to one layout: its middle sees neither end."""
    found: dict[int, set[int]] = {}
    for head in heads:
        found.setdefault(of[head], set()).add(classes[head])
    same = {part: frozenset(of_heads) for part, of_heads in found.items()}
    none = frozenset[int]()
    return _number([(c, same.get(part, none) if within else None) for c, part, within in zip(classes, of, inside, strict=True)])


def _number(labels: Sequence[Hashable]) -> list[int]:
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(label, len(numbers)) for label in labels]
