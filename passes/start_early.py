"""Start gathers of weights as early as the link needs it: where a wait would stand still, its gather moves up, before computation and before reductions that nobody waits for yet.

How long each would stand still is its course in simulated time (deepseed.speed); what comes before it on a link that is never idle moves as well. Gathers keep their order among each other, stay in
their phase, and move only over ops beside which what they hold leaves the program's peak as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from deepseed.counts import is_collective
from deepseed.ir.program import Op, Program, params_only
from deepseed.speed import Course, Known, Machine, course

ROUNDS = 6
LEAST = 1e-3  # of a step's time: a round that gains less is the last


def start_early(p: Program, machine: Machine, live: Callable[[Program], Sequence[int]]) -> Program:
    """``p``, a straight line or looped, with gathers moved up; its peak is no higher, its estimated time shorter. Stages of a pipeline stay as they are."""
    weights = params_only(p)
    gathers = {op.name for op in p.ops if op.target == "all_gather.start" and all(r.name in weights for r in op.refs)}
    if p.schedule is not None or not gathers:
        return p
    known = Known.of(machine, p)
    now, ran = p, course(p, p.ops, known)
    best, shortest, peak = p, ran.seconds, 0
    for _ in range(ROUNDS):
        if not any(s.held and now.ops[n].name in gathers for n, s in ran.sent_by):
            break
        held = list(live(now))
        if now is p:
            peak = max(held)
        elif max(held) > peak:
            break
        elif ran.seconds < shortest:
            best, shortest = now, ran.seconds
        moved = _moved(now, ran, known, gathers, weights, held, peak)
        if moved is None:
            break
        now, before, ran = moved, ran.seconds, course(moved, moved.ops, known)
        if ran.seconds > before * (1 - LEAST):
            break
    return now if ran.seconds < shortest and max(live(now)) <= peak else best


def _moved(p: Program, ran: Course, machine: Machine, gathers: set[str], weights: frozenset[str], live: list[int], peak: int) -> Program | None:
    """One round; None where nothing can move."""
    place = {op.name: n for n, op in enumerate(p.ops)}
    target: dict[int, float] = {}  # of ops that move: the place before which they go
    lead = 0.0
    behind: dict[str, float] = {}  # axis -> when the collective behind starts
    for n, sent in reversed(ran.sent_by):
        op = p.ops[n]
        if not is_collective(op):
            continue
        lead = lead if sent.end >= behind.get(sent.axis, float("inf")) - 1e-9 else 0.0  # a link without a pause between
        behind[sent.axis] = sent.start
        if op.name not in gathers:
            continue
        lead = max(lead, sent.held)
        if lead <= 0:
            continue
        at = _up(p, n, lead, machine, gathers, weights, live, peak, place)
        for m in (*_with(p, n, at, weights, place), n):
            if at < m:
                target[m] = at - 0.5
        if at < n:
            nbytes = sum(t.local_bytes(p.mesh) for t in op.types)
            for k in range(at, n):
                live[k] += nbytes
    if not target:
        return None
    order = sorted(range(len(p.ops)), key=lambda n: (target.get(n, n), n))
    return replace(p, ops=tuple(p.ops[n] for n in order))


def _up(p: Program, n: int, lead: float, machine: Machine, gathers: set[str], weights: frozenset[str], live: Sequence[int], peak: int, place: dict[str, int]) -> int:
    """Where the start at ``n`` goes, so that it is ``lead`` seconds of computation earlier, if that can be."""
    op, at, gone = p.ops[n], n, 0.0
    nbytes = sum(t.local_bytes(p.mesh) for t in op.types)
    brought = set(_with(p, n, 0, weights, place))
    nbytes += sum(t.local_bytes(p.mesh) for m in brought for t in p.ops[m].types)
    needed = {r.name for m in (*brought, n) for r in p.ops[m].refs} - {r for m in brought for r in p.ops[m].results}
    while at > 0 and gone < lead:
        other = p.ops[at - 1]
        if at - 1 not in brought:
            same = (other.part, other.stage) == (op.part, op.stage) and (other.phase == op.phase or other.target.endswith(".start") or other.target in ("wait", "accumulate"))
            if not same or other.name in gathers or not needed.isdisjoint(other.results) or live[at - 1] + nbytes > peak:
                break
            gone += machine.seconds(p, other)
        at -= 1
    while at < n and (p.ops[at].phase != op.phase or at in brought):  # a start of another phase is passed, not joined
        at += 1
    return at


def _with(p: Program, n: int, at: int, weights: frozenset[str], place: dict[str, int]) -> list[int]:
    """What makes the operands of the gather at ``n`` of weights, behind ``at``: it goes along."""
    out: set[int] = set()
    front: list[Op] = [p.ops[n]]
    while front:
        for r in front.pop().refs:
            made = p.producers.get(r.name)
            if made is not None and made.name in weights and made.target != "wait" and place[made.name] >= at and place[made.name] not in out:
                out.add(place[made.name])
                front.append(made)
    return sorted(out)
