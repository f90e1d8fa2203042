"""Where a forward may be cut: between two ops at which the fewest bytes are live.

A pipeline is cut there (``cut_stages``), and what is recomputed begins there (``plan_memory``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from deepseed.ir.program import Op, Program

Floats = NDArray[np.float64]


def live_bytes(p: Program, ops: Sequence[Op], at: Sequence[int]) -> Floats:
    """[ops] Bytes on one rank that are live before each op: what was made before it and is used from it on. ``at``: the place of each op."""
    made: dict[str, tuple[int, int]] = {}
    last: dict[str, int] = {}
    for op, n in zip(ops, at, strict=True):
        made.update((r, (n, t.local_bytes(p.mesh))) for r, t in zip(op.results, op.types, strict=True))
        for ref in op.refs:
            if ref.name in made:
                last[ref.name] = max(last.get(ref.name, 0), n)
    change = np.zeros(len(ops) + 2)
    for value, end in last.items():
        begin, nbytes = made[value]
        if end > begin:
            change[begin + 1] += nbytes
            change[end + 1] -= nbytes
    live: Floats = np.cumsum(change)[: len(ops)]
    return live


def places(ops: Sequence[Op], glued: Mapping[str, str]) -> list[int]:
    """The place of each op in the order: its own, but a wait's is that of its start. ``glued``: wait -> start, by the ops' names."""
    place = {op.name: n for n, op in enumerate(ops)}
    return [place.get(glued.get(op.name, ""), n) for n, op in enumerate(ops)]


def open_places(ops: Sequence[Op], at: Sequence[int], live: Floats) -> list[int]:
    """Where something is live, and no group that was one op has members on both sides."""
    ends: dict[str, tuple[int, int]] = {}
    for op, n in zip(ops, at, strict=True):
        if op.origin:
            first, last = ends.get(op.origin, (n, n))
            ends[op.origin] = (min(first, n), max(last, n))
    inside = {i for first, last in ends.values() for i in range(first + 1, last + 1)}
    return [i for i in range(1, len(live)) if live[i] > 0 and i not in inside]


def cut_points(ops: Sequence[Op], at: Sequence[int], live: Floats) -> list[int]:
    """Valleys of ``live``: in each run of places with equal bytes that has more on both sides, the one that leaves the outermost module."""
    open_ = open_places(ops, at, live)
    points: list[int] = []
    for n, i in enumerate(open_):
        if n and live[open_[n - 1]] <= live[i]:
            continue
        run = [i]
        for j in open_[n + 1 :]:
            if live[j] != live[i]:
                if live[j] > live[i]:
                    points.append(min(run, key=lambda c: (shared_modules(ops, c), c)))
                break
            run.append(j)
        else:
            points.append(min(run, key=lambda c: (shared_modules(ops, c), c)))
    return points


def shared_modules(ops: Sequence[Op], place: int) -> int:
    """How many modules, one in another, the ops before and after a place share."""
    n = 0
    for a, b in zip(ops[place - 1].path.split("."), ops[place].path.split("."), strict=False):
        if a != b:
            break
        n += 1
    return n
