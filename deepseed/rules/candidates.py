"""Which blocks may a dimension be seen in? ``Split(dim, outer)`` needs an outer; a program suggests few of them.

A reshape [.., 2304] -> [.., 3, 768] says that 2304 is (3, 768): outer 3 is a candidate for that dimension, and for every
dimension that holds the same factor. A slice of block length b at a multiple of b, and a cat, say the same. Found by a fixpoint over the ops.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Op, Program, Type
from deepseed.rules.signature import Signature
from deepseed.rules.strategy import Strategy, factor_outers, signature, strategies

CAP = 6  # candidate outers a dimension

Candidates = Mapping[str, tuple[frozenset[int], ...]]  # value -> per dimension its outers


def candidates(p: Program, cap: int = CAP) -> Candidates:
    """The candidate outers of every dimension of every value; 1 is always one."""
    found: dict[str, list[set[int]]] = {name: [{1} for _ in t.shape] for name, t in p.types.items()}
    links: list[list[tuple[int, list[tuple[set[int], int]]]]] = []  # per op, per factor: its size, (outers of a dimension, left product)
    for op in p.ops:
        sig = signature(op, [p.types[r.name] for r in op.refs])
        if sig is None:
            continue
        names = [r.name for r in op.refs] + list(op.results)
        link = [(sig.sizes[f], [(found[names[x.slot]][x.dim], x.left) for x in sig.places[f]]) for f in sig.free]
        links.append([(size, places) for size, places in link if len(places) > 1 or places[0][1] > 1])
    changed = True
    while changed:
        changed = False
        for direction in (links, links[::-1]):
            for link in direction:
                for size, places in link:
                    if _share(size, places, cap):
                        changed = True
    return {name: tuple(frozenset(outers) for outers in dims) for name, dims in found.items()}


def _share(size: int, places: Sequence[tuple[set[int], int]], cap: int) -> bool:
    """Give every place of a factor the outers of the others; True where something was new."""
    inner = {1}
    for outers, left in places:
        if len(outers) > 1 or left > 1:
            inner.update(o // left for o in outers if o % left == 0 and size % (o // left) == 0 and o // left < size)
    changed = False
    for outers, left in places:
        for o in sorted(inner):
            if left * o not in outers and len(outers) < cap:
                outers.add(left * o)
                changed = True
    return changed


def op_strategies(op: Op, types: Mapping[str, Type], axis: str, mesh: Mesh, found: Candidates | None = None, sig: Signature | None = None) -> list[Strategy]:
    """``strategies`` of an op of a program: operand layouts are the wanted ones (``as``), outers come from ``found``."""
    operands = [types[r.name] if r.want is None else types[r.name].laid(r.want) for r in op.refs]
    sig = signature(op, operands) if sig is None else sig
    outers = None
    if sig is not None and found is not None:
        outers = factor_outers(sig, [found[name] for name in [*(r.name for r in op.refs), *op.results]])
    return strategies(sig, operands, op.types, axis, mesh, outers)
