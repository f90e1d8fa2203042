"""Which nodes of a program are the same, up to depth: Weisfeiler-Lehman colours of the dataflow graph.

Nodes with the same neighbourhood (op, arguments, types, neighbours to radius 3) form one class and share one variable in the
integer program. That only narrows the choice, so it is always sound; the layers of a deep model fall into the same classes,
so the program's size does not grow with depth.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

RADIUS = 3


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


def _number(labels: Sequence[Hashable]) -> list[int]:
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(label, len(numbers)) for label in labels]
