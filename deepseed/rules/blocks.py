"""Which blocks may a dimension be seen in? ``Split(dim, outer)`` needs an outer; a program suggests few of them.

A reshape [.., 2304] -> [.., 3, 768] says that 2304 is (3, 768): outer 3 is a candidate for that dimension, and for every
dimension that holds the same factor. A slice of block length b at a multiple of b, and a cat, say the same. Found by a fixpoint over the ops.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Op, Program, Type
from deepseed.rules.signature import Signature
from deepseed.rules.strategy import Strategy, factor_outers, signature, strategies

CAP = 6  # candidate outers a dimension

Link = tuple[int, list[tuple[set[int], int]]]  # a factor of an op: its size; the outers of each dimension it is in, and its left product
Candidates = Mapping[str, tuple[frozenset[int], ...]]  # value -> per dimension its outers


def candidates(p: Program, cap: int = CAP, known: Mapping[tuple[str, int], int] | None = None) -> Candidates:
    """The candidate outers of every dimension of every value; 1 is always one, and what is ``known`` of a dimension."""
    found: dict[str, list[set[int]]] = {name: [{1} for _ in t.shape] for name, t in p.types.items()}
    for (name, dim), outer in (known or {}).items():
        found[name][dim].add(outer)
    links: list[Link] = []
    of: dict[int, list[int]] = {}  # id of a dimension's outers -> the links that read it
    for op in p.ops:
        sig = signature(op, [p.types[r.name] for r in op.refs])
        if sig is None:
            continue
        names = [r.name for r in op.refs] + list(op.results)
        for factor in sig.free:
            places = [(found[names[x.slot]][x.dim], x.left) for x in sig.places[factor]]
            if len(places) > 1 or places[0][1] > 1:
                for outers, _ in places:
                    of.setdefault(id(outers), []).append(len(links))
                links.append((sig.sizes[factor], places))
    queue = deque(range(len(links)))
    waiting = set(queue)
    while queue:
        n = queue.popleft()
        waiting.discard(n)
        for outers in _share(*links[n], cap):
            for reader in of[id(outers)]:
                if reader != n and reader not in waiting:
                    waiting.add(reader)
                    queue.append(reader)
    return {name: tuple(frozenset(outers) for outers in dims) for name, dims in found.items()}


def _share(size: int, places: Sequence[tuple[set[int], int]], cap: int) -> list[set[int]]:
    """Give every place of a factor the outers of the others; the places for which something was new."""
    inner = {1}
    for outers, left in places:
        if len(outers) > 1:
            inner.update(o // left for o in outers if o % left == 0 and o // left < size and size % (o // left) == 0)
    changed: list[set[int]] = []
    for outers, left in places:
        new = [left * o for o in sorted(inner) if left * o not in outers][: cap - len(outers)]
        if new:
            outers.update(new)
            changed.append(outers)
    return changed


def op_strategies(op: Op, types: Mapping[str, Type], axis: str, mesh: Mesh, found: Candidates | None = None, sig: Signature | None = None) -> list[Strategy]:
    """``strategies`` of an op of a program: operand layouts are the wanted ones (``as``), outers come from ``found``."""
    operands = [types[r.name] if r.want is None else types[r.name].laid(r.want) for r in op.refs]
    sig = signature(op, operands) if sig is None else sig
    outers = None
    if sig is not None and found is not None:
        outers = factor_outers(sig, [found[name] for name in [*(r.name for r in op.refs), *op.results]])
    return strategies(sig, operands, op.types, axis, mesh, outers)
