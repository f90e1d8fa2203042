"""What a step moves between the two memories of a rank, by what it is: parameters, gradients, activations, and the optimizer's numbers; and how
much of the time that this takes is hidden behind the computation (estimated, deepseed.speed)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from deepseed.counts import moved_bytes
from deepseed.ir.collective import IN_TIME, LOCAL, MEMORIES
from deepseed.ir.messages import TRANSFER
from deepseed.ir.program import Op, Program, params_only
from deepseed.speed import Machine, Sent, course
from deepseed.timing import by_place, run_schedule
from deepseed.unroll import original

KINDS = ("optimizer", "params", "gradients", "activations")


def moved(p: Program) -> Mapping[str, int]:
    """Bytes by kind, in both directions, of every kind. ``p``: what one rank runs, its loops written out (deepseed.unroll)."""
    out: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
    for op, kind in _moves(p):
        out[kind] += moved_bytes(p, op)
    return dict(out)


def hidden(p: Program, steps: list[Program], machine: Machine) -> list[Mapping[str, float]]:
    """Of each pipeline rank, by kind that is moved: the part of the moves' time, from 0 to 1, in which the rank does not stand still for them. ``p``:
    the lowered program; ``steps``: what each rank runs of it, its loops written out."""
    out: list[Mapping[str, float]] = []
    kinds = [{original(op.name): kind for op, kind in _moves(step)} for step in steps]
    for lane, sent in enumerate(_sent(p, machine) if any(kinds) else [[] for _ in steps]):
        took: Counter[str] = Counter()
        held: Counter[str] = Counter()
        for op, s in sent:
            if op.target in MEMORIES:
                took[kinds[lane][op.name]] += s.end - s.start  # type: ignore[assignment]
                held[kinds[lane][op.name]] += s.held  # type: ignore[assignment]
        out.append({kind: max(0.0, 1 - held[kind] / took[kind]) for kind in KINDS if took[kind]})
    return out


def _sent(p: Program, machine: Machine) -> list[list[tuple[Op, Sent]]]:
    """What each pipeline rank starts in a step, and its course."""
    if p.schedule is None:
        return [[(p.ops[n], s) for n, s in course(p, p.ops, machine).sent_by]]
    ops, run = by_place(p, p.schedule), run_schedule(p, machine)
    out: list[list[tuple[Op, Sent]]] = [[] for _ in p.schedule.lanes]
    for e in run.timeline.events:
        place = e.instruction.part, e.instruction.stage
        if place in run.ran:
            out[e.lane] += [(ops[place][n], s) for n, s in run.ran[place].sent_by]
    return out


def _moves(p: Program) -> Iterator[tuple[Op, str]]:
    """The moves between the memories, each with its kind."""
    weights, new = params_only(p), _new_params(p)
    return ((op, _kind(p, op, weights, new)) for op in p.ops if op.target in MEMORIES)


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
