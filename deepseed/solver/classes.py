"""Which nodes of a program are the same, up to depth: Weisfeiler-Lehman colours of the dataflow graph.

Nodes with the same neighbourhood (op, arguments, types, neighbours to radius 4) form one class and share one variable in the
integer program. That only narrows the choice, so it is always sound; the layers of a deep model fall into the same classes,
so the program's size does not grow with depth.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

RADIUS = 4


@dataclass
class Node:
    """One input, op or output: its own label, the (node, result) pairs that it reads, and how many results it has."""

    label: Hashable
    operands: tuple[tuple[int, int], ...]
    results: int


def colours(nodes: Sequence[Node], radius: int = RADIUS) -> list[int]:
    """One class number a node."""
    uses: list[list[tuple[int, int, int]]] = [[] for _ in nodes]  # (result, user, operand)
    for user, node in enumerate(nodes):
        for operand, (source, result) in enumerate(node.operands):
            uses[source].append((result, user, operand))
    current = _number([node.label for node in nodes])
    for _ in range(radius):
        current = _number(
            [
                (
                    current[i],
                    tuple((current[source], result) for source, result in node.operands),
                    tuple(sorted({(result, current[user], operand) for result, user, operand in uses[i]})),
                )
                for i, node in enumerate(nodes)
            ]
        )
    return current


def by_part(
    classes: Sequence[int], nodes: Sequence[Node], inside: Sequence[bool], heads: Iterable[int], links: Callable[[int, int], bool]
) -> list[int]:
    """Finer classes. Nodes that are ``inside`` and hang together through values (node, result) that link are one part, such as
    the update of one parameter; nodes of one class stay together only where the heads of their parts are of the same classes.

    A long chain of equal updates would otherwise tie parameters of equal shape to one layout: its middle sees neither end."""
    parent = list(range(len(nodes)))

    def part(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, node in enumerate(nodes):
        for source, result in node.operands:
            if inside[i] and inside[source] and links(source, result):
                parent[part(i)] = part(source)
    found: dict[int, set[int]] = {}
    for head in heads:
        found.setdefault(part(head), set()).add(classes[head])
    return _number([(c, frozenset(found.get(part(i), ())) if inside[i] else None) for i, c in enumerate(classes)])


def _number(labels: Sequence[Hashable]) -> list[int]:
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(label, len(numbers)) for label in labels]
