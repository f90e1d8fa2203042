"""What a step moves between the two memories of a rank, by what it is: parameters, gradients, activations, and the optimizer's numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from deepseed.counts import moved_bytes
from deepseed.ir.collective import IN_TIME, LOCAL, MEMORIES
from deepseed.ir.messages import TRANSFER
from deepseed.ir.program import Op, Program, params_only

KINDS = ("optimizer", "params", "gradients", "activations")


def moved(p: Program) -> Mapping[str, int]:
    """Bytes by kind, in both directions, of every kind. ``p``: what one rank runs, its loops written out (deepseed.unroll)."""
    weights, new = params_only(p), _new_params(p)
    out: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
    for op in p.ops:
        if op.target in MEMORIES:
            out[_kind(p, op, weights, new)] += moved_bytes(p, op)
    return dict(out)


def _kind(p: Program, op: Op, weights: frozenset[str], new: frozenset[str]) -> str:
    source = _source(p, op.refs[0].name)
    made = p.producers.get(source)
    if op.refs[0].name in weights or source in weights or source in new:
        return "params"
    if not op.type.shape:
        return "optimizer"
    if op.phase == "update":
        return "gradients" if made is not None and made.phase != "update" else "optimizer"
    return "activations"


def _source(p: Program, value: str) -> str:
    """What a value brings: followed back through moves, sums over microbatches and scaling."""
    made = p.producers.get(value)
    if made is None or not made.refs or not (_carries(made) or (made.phase == "update" and made.target in ("cast", "aten.mul.Tensor"))):
        return value
    return _source(p, made.refs[-1 if made.target == "accumulate" else 0].name)


def _new_params(p: Program) -> frozenset[str]:
    """New parameters, and what they are put together from."""
    found: set[str] = set()
    for o in p.outputs:
        value = o.ref.name
        while o.role == "param":
            found.add(value)
            made = p.producers.get(value)
            if made is None or not made.refs or not _carries(made):
                break
            value = made.refs[0].name if len(made.refs) == 1 else made.refs[made.results.index(value)].name
    return frozenset(found)


def _carries(op: Op) -> bool:
    return op.target.endswith(".start") or op.target in ("wait", TRANSFER, *IN_TIME, *LOCAL)
