"""What a strategy of a node costs by itself, and moves that are free or dear: the prices of ``solve_placements``."""

from __future__ import annotations

from deepseed import cost
from deepseed.ir.layout import Element, Split
from deepseed.ir.program import Input, Op, Type
from deepseed.passes.placement import Assignment, Move
from deepseed.rules import Strategy


def use(at: Assignment, i: int, s: Strategy) -> float:
    """``work``, and the price of a weight left whole: that is data parallelism by another name."""
    item, price = at.items[i], work(at, i, s)
    if isinstance(item, Op) and cost.reads_weights(item, [at.p.types[r.name] for r in at.refs[i]]):
        price += sum(
            cost.WHOLE_WEIGHT * at.p.types[r.name].nbytes for r, e in zip(at.refs[i], s.operands, strict=True) if r.name in at.weights and e is None
        )
    return price


def work(at: Assignment, i: int, s: Strategy) -> float:
    """Undivided compute, in bytes that could have been sent instead: matmuls by their flops, others a little."""
    item = at.items[i]
    if not isinstance(item, Op):
        return 0.0
    divided = any(isinstance(e, Split) for e in (*s.operands, *s.results))
    if divided:
        return 0.0
    flop = cost.UPDATE_FLOP if item.phase == "update" else cost.FLOP
    return 1e-3 * sum(t.nbytes for t in item.types) + flop * cost.flops(item, [at.p.types[r.name] for r in at.refs[i]])


def upkeep(at: Assignment, i: int, s: Strategy) -> float:
    """An update that every rank repeats, a little; and the copy that a shard of an inner dimension, or of blocks, takes."""
    item = at.items[i]
    types = item.types if isinstance(item, Op) else (item.type,) if isinstance(item, Input) else ()
    price = sum(cost.LOCAL * t.nbytes * (e.dim + 0.5 * (e.outer > 1) + _unevenness(e, t)) for e, t in zip(s.results, types, strict=False) if isinstance(e, Split))
    if isinstance(item, Op) and item.phase == "update" and not any(isinstance(e, Split) for e in s.results):
        price += 1e-3 * sum(t.nbytes for t in item.types)
        price += cost.UPDATE_FLOP * cost.flops(item, [at.p.types[r.name] for r in at.refs[i]])
    return price


def _unevenness(e: Split, t: Type) -> float:
    """Parts of one size are better than others, and a cut of the whole dimension than one between its blocks."""
    return 0.0 if not e.of else 0.25 if e.of == t.shape[e.dim] else 0.75


def free(produced: Element, wanted: Element) -> float:
    return 0.0


def dear(move: Move, size: int, n: int) -> Move:
    """Where ``move`` forbids, a price that is only paid when there is no other way."""

    def priced(p: Element, w: Element) -> float | None:
        found = move(p, w)
        return found if found is not None else 1000.0 * (cost.reshard(p, w, size, n) or 0.0) + 1e6 if w is None else None

    return priced
