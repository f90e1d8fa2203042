"""Which backward op runs on which stage: one minimum cut a boundary, so that the fewest bytes cross it.

Along backward edges the stage falls; no op runs before the stage of a forward value that it reads. Of what this leaves open, boundary k
cuts the ops of stages above k from the others: a backward value costs its bytes where it crosses, once however many read it; a forward
value or a weight costs its bytes where it is read on a side that does not have it; a gradient costs its bytes where it is not at home.
``scipy.sparse.csgraph.maximum_flow`` (Dinic) and a search of the residual give, of equal cuts, the one with the most ops above it: a
backward op then runs where the forward op ran that read the same values.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from deepseed.ir.program import Op
from deepseed.passes.cut_kinds import Kinds

_LATE, _EARLY = 0, 1  # the source: stages above the boundary; the sink: the others


@dataclass(frozen=True)
class Known:
    """What has its stage already: values, the stages on which each is read, the stages that use each stored input, and the home of
    each gradient that leaves the backward."""

    stage_of: Mapping[str, int]
    read_on: Mapping[str, set[int]]
    used_on: Mapping[str, set[int]]
    home: Mapping[str, int]
    once: Collection[str] = ()  # values of a part that runs once: these may go to any stage


@dataclass
class _Graph:
    """A flow network; ``unit``: bytes of one unit of capacity."""

    unit: int
    heads: list[int] = field(default_factory=list)
    tails: list[int] = field(default_factory=list)
    room: list[int] = field(default_factory=list)
    size: int = 2
    most: int = 2**30

    def node(self) -> int:
        self.size += 1
        return self.size - 1

    def edge(self, a: int, b: int, nbytes: int | None = None) -> None:
        """``nbytes`` None: never cut."""
        if a != b:
            self.heads.append(a)
            self.tails.append(b)
            self.room.append(self.most if nbytes is None else max(1, nbytes // self.unit))

    def late(self) -> set[int]:
        """The nodes on the source's side of the minimum cut, as many as can be: all from which the sink is out of reach."""
        graph = csr_array((np.array(self.room, dtype=np.int64), (self.heads, self.tails)), shape=(self.size, self.size))
        graph.data = np.minimum(graph.data, self.most).astype(np.int32)  # parallel edges were added up
        flow = maximum_flow(graph, _LATE, _EARLY).flow
        rest = csr_array(graph - flow)
        rest.data[rest.data < 0] = 0
        rest.eliminate_zeros()
        return set(range(self.size)).difference(breadth_first_order(rest.T.tocsr(), _EARLY, return_predecessors=False).tolist())


def backward_stages(k: Kinds, ops: Sequence[Op], stages: int, known: Known) -> dict[str, int]:
    """The stage of each op of ``ops``, a backward part without its linear tails, by name."""
    made = {r: op for op in ops for r in op.results}
    readers: dict[str, list[Op]] = {}
    for op in ops:
        for name in dict.fromkeys(r.name for r in op.refs):
            if name in made:
                readers.setdefault(name, []).append(op)
    least: dict[str, int] = {}
    for op in reversed(ops):
        here = [known.stage_of[r.name] for r in op.refs if r.name in known.stage_of and r.name not in known.once]
        least[op.name] = max([0, *here, *(least[user.name] for r in op.results for user in readers.get(r, ()))])
    for op in ops:  # a started collective is waited for where it was started
        if op.name in k.glued and k.glued[op.name] in least:
            least[op.name] = least[k.glued[op.name]]
    out: dict[str, int] = {}
    for boundary in range(stages - 1):
        open_ops = [op for op in ops if op.name not in out and least[op.name] <= boundary]
        late = _cut(k, open_ops, boundary, made, readers, least, out, known) if open_ops else set()
        out.update((op.name, boundary) for op in open_ops if op.name not in late)
    return {op.name: out.get(op.name, stages - 1) for op in ops}


def _cut(
    k: Kinds, ops: Sequence[Op], boundary: int, made: Mapping[str, Op], readers: Mapping[str, Sequence[Op]],
    least: Mapping[str, int], out: Mapping[str, int], known: Known,
) -> set[str]:  # fmt: skip
    """The ops of ``ops`` that belong above ``boundary``."""
    mesh, types = k.program.mesh, k.program.types
    sizes = {r: t.local_bytes(mesh) for op in ops for r, t in zip(op.results, op.types, strict=True)}
    for op in ops:
        sizes.update((r.name, types[r.name].local_bytes(mesh)) for r in op.refs)
        sizes.update((w, types[w].local_bytes(mesh)) for w in _stored(k, op))
    graph = _Graph(max(1, sum(sizes.values()) >> 28))
    node = {op.name: graph.node() for op in ops}

    def of(op: Op) -> int:
        return node.get(op.name, _EARLY if op.name in out else _LATE)

    for value in dict.fromkeys(r for op in ops for r in (*op.results, *(ref.name for ref in op.refs if ref.name in made))):
        maker, users = made[value], readers.get(value, ())
        home = known.home.get(value)
        glued = maker.target.endswith(".start")
        here = of(maker)
        crossing = here if glued else graph.node()
        if not glued:
            graph.edge(here, crossing, sizes[value])
        for user in users:
            graph.edge(crossing, of(user))
            graph.edge(of(user), here)
        if home is not None and home <= boundary:
            graph.edge(crossing, _EARLY)
        elif home is not None and here != _LATE:
            graph.edge(_LATE, here, sizes[value])
    outside: dict[tuple[str, bool], int] = {}
    for op in ops:
        for value, above in _missing(k, op, boundary, made, known):
            there = outside.get((value, above))
            if there is None:
                there = outside[value, above] = graph.node()
                graph.edge(*((_LATE, there) if above else (there, _EARLY)), sizes[value])
            graph.edge(*((there, node[op.name]) if above else (node[op.name], there)))
    late = graph.late()
    return {name for name, n in node.items() if n in late}


def _missing(k: Kinds, op: Op, boundary: int, made: Mapping[str, Op], known: Known) -> Iterator[tuple[str, bool]]:
    """What the op reads from outside that only one side has, and whether that is the side above the boundary."""
    for ref in op.refs:
        if ref.name in known.stage_of and ref.name not in made:
            on = known.read_on.get(ref.name, set()) | {known.stage_of[ref.name]}
            if max(on) <= boundary or min(on) > boundary:
                yield ref.name, min(on) > boundary
    for weight in _stored(k, op):
        on = known.used_on.get(weight, set())
        if on and (max(on) <= boundary or min(on) > boundary):
            yield weight, min(on) > boundary


def _stored(k: Kinds, op: Op) -> set[str]:
    return {w for r in op.refs for w in k.stored.get(r.name, ())}
