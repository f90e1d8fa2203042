"""How much of the communication of a step hides behind its computation: what of it a schedule hides, and what any could hide.

The best that any schedule could do keeps the order of the computation, the bytes and the time of each collective, and is more than a real one can: each value travels by itself
as soon as it is there, and the link takes up the one that is used first, leaving another half sent (earliest due date with preemption, Horn 1974, which keeps the lateness least).
Gathered weights are bounded: one starts where what is whole of them, from its start to its last use, stays within a number of bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

import torch

from deepseed.counts import is_collective
from deepseed.ir.program import Op, Program, params_only
from deepseed.memory import calls
from deepseed.speed import VIEWS


@dataclass(frozen=True)
class Overlap:
    """In seconds of a step of one rank. ``compute``: of its ops; ``sending``: of its collectives, added up; ``still``: it stands still for them."""

    compute: float
    sending: float
    still: float

    @property
    def hidden(self) -> float:
        return self.sending - self.still


@dataclass
class _Value:
    """A value that travels: ``left`` seconds of its axis; ``due``: the op that uses it first, and the last one that does."""

    axis: str
    left: float
    due: int
    last: int
    nbytes: int
    gathered: bool
    there: bool = False
    begun: bool = False


def folded(p: Program, seconds: Mapping[str, float]) -> dict[str, float]:
    """The time of ops that compute, with that of packing what is sent at the op before it, and that of laying out what arrived at the op behind."""
    out: dict[str, float] = {}
    before, waiting = "", 0.0
    for op in p.ops:
        took = seconds.get(op.name, 0.0)
        if op.target.endswith(".start"):
            if before:
                out[before] += took
            else:
                waiting += took
        elif op.target == "wait":
            waiting += took
        else:
            out[op.name], before, waiting = took + waiting, op.name, 0.0
    if before:
        out[before] += waiting
    return out


def best(p: Program, seconds: Mapping[str, float], sending: Mapping[str, float], whole: int | None = None) -> Overlap:
    """Of a lowered program in a straight line. ``seconds``: by op; ``sending``: by the op that starts a collective; ``whole``: bytes of gathered weights (None: no bound)."""
    ops, values, sends, needs = _values(p, sending)
    seconds = folded(p, seconds)
    order = sorted(values, key=lambda name: values[name].due)
    done = set[str]()
    at, left, now, still = 0, seconds.get(ops[0].name, 0.0) if ops else 0.0, 0.0, 0.0
    held, begun = 0, 0
    for name in sends.get(-1, ()):
        values[name].there = True
    gathers = [name for name in order if values[name].gathered]
    while at < len(ops) or len(done) < len(values):
        running = at < len(ops) and all(name in done for name in needs[at])
        taken: dict[str, str] = {}
        for name in gathers[begun:]:
            v = values[name]
            if v.there and (whole is None or held + v.nbytes <= whole or v.due <= at):
                v.begun, held, begun = True, held + v.nbytes, begun + 1
            else:
                break
        for name in order:
            v = values[name]
            if name not in done and v.there and (v.begun or not v.gathered):
                taken.setdefault(v.axis, name)
        if not running and not taken:
            raise ValueError(f"nothing can go on at %{ops[at].name if at < len(ops) else 'the end'}")
        step = min([values[name].left for name in taken.values()] + ([left] if running else []))
        now += step
        still += 0.0 if running else step
        for name in taken.values():
            values[name].left -= step
            if values[name].left <= 1e-12:
                done.add(name)
                for other in sends.get(name, ()):
                    values[other].there = True
        if running:
            left -= step
            if left <= 1e-12:
                held -= sum(v.nbytes for v in values.values() if v.gathered and v.last == at)
                for name in sends.get(at, ()):
                    values[name].there = True
                at += 1
                left = seconds.get(ops[at].name, 0.0) if at < len(ops) else 0.0
    return Overlap(sum(seconds.get(op.name, 0.0) for op in ops), sum(sending.values()), still)


def free_order(p: Program, seconds: Mapping[str, float], sending: Mapping[str, float]) -> Overlap:
    """The same bound for any order of the computation and any memory. Nothing starts before its head: the computation that it depends on, one after another; and the head of each
    collective that it depends on, that one's time, and the computation between; likewise the tail behind it. A step is no shorter than any set of ops, or of collectives of an axis:
    their least head, their sum, their least tail (Jackson 1955; Carlier 1982)."""
    far, seconds = [n for n, op in enumerate(p.ops) if is_collective(op)], folded(p, seconds)
    takes = torch.tensor([sending[op.name] if is_collective(op) else seconds.get(op.name, 0.0) for op in p.ops], dtype=torch.float64)
    compute = takes.clone()
    compute[far] = 0.0
    number = {op.name: n for n, op in enumerate(p.ops)}
    together: dict[int, list[int]] = {}  # of updates that one call does, each gives what all have done
    found = calls(p)
    for n, last in found.items():
        together.setdefault(last, []).append(n)
    together = {n: each for each in together.values() for n in each}
    reach = torch.zeros(len(p.ops), len(p.ops), dtype=torch.bool)  # [n, m]: n depends on m
    for n, op in enumerate(p.ops):
        made = {number[p.producers[r.name].name] for r in op.refs if r.name in p.producers}
        for m in made | {k for each in made for k in together.get(each, ())}:
            reach[n] |= reach[m]
            reach[n, m] = True
    heads, tails = _heads(reach, far, takes, compute), _heads(reach.T, far[::-1], takes, compute)
    machines: dict[str, list[int]] = {}
    for n, op in enumerate(p.ops):
        if takes[n] > 0:
            machines.setdefault(str(op.kw("axis")) if is_collective(op) else "", []).append(n)
    whole = float(compute.sum())
    shortest = max([whole, *(_shortest([(float(heads[n]), float(takes[n]), float(tails[n])) for n in each]) for each in machines.values())])
    return Overlap(whole, sum(sending.values()), shortest - whole)


def _heads(reach: torch.Tensor, far: Sequence[int], takes: torch.Tensor, compute: torch.Tensor) -> torch.Tensor:
    """``reach``: [n, m], n comes after m; ``far``: the collectives, each after those that it comes after."""
    below = reach.double()
    heads = below @ compute
    for m in far:
        heads = torch.maximum(heads, torch.where(reach[:, m], heads[m] + takes[m] + below @ (compute * reach[:, m]), 0.0))
    return heads


def _shortest(jobs: Sequence[tuple[float, float, float]]) -> float:
    """The end of Jackson's preemptive schedule of (head, time, tail) on one machine: of what is there, that with the longest tail first."""
    waiting = sorted(jobs)
    ready: list[tuple[float, float]] = []  # (-tail, left)
    now = end = 0.0
    at = 0
    while at < len(waiting) or ready:
        if not ready:
            now = max(now, waiting[at][0])
        while at < len(waiting) and waiting[at][0] <= now + 1e-15:
            heappush(ready, (-waiting[at][2], waiting[at][1]))
            at += 1
        tail, left = heappop(ready)
        until = waiting[at][0] if at < len(waiting) else float("inf")
        if now + left <= until:
            now += left
            end = max(end, now - tail)
        else:
            heappush(ready, (tail, left - (until - now)))
            now = until
    return end


def whole_weights(p: Program) -> int:
    """The most bytes of gathered weights that are whole at once, from the start of their collective to the last use."""
    ends: dict[int, int] = {}
    place = {op.name: n for n, op in enumerate(p.ops)}
    most = held = 0
    weights = params_only(p)
    for n, op in enumerate(p.ops):
        if op.target == "all_gather.start":
            for r, t in zip(op.results, op.types, strict=True):
                wait = next(u for u in p.uses[r] if isinstance(u, Op))
                if op.refs[op.results.index(r)].name in weights:
                    held += t.local_bytes(p.mesh)
                    last = _last(p, wait.name, place)
                    ends[last] = ends.get(last, 0) + t.local_bytes(p.mesh)
        most = max(most, held)
        held -= ends.get(n, 0)
    return most


def _last(p: Program, name: str, place: Mapping[str, int]) -> int:
    """Where a value, or a view of it, is read last."""
    found = place.get(name, 0)
    for u in p.uses[name]:
        if isinstance(u, Op):
            found = max(found, place[u.name], *(_last(p, r, place) for r in u.results) if u.target in VIEWS else ())
    return found


def _values(p: Program, sending: Mapping[str, float]) -> tuple[list[Op], dict[str, _Value], dict[int | str, list[str]], Sequence[list[str]]]:
    """The ops that compute; the values that travel, by their wait; what each op (by its place, -1: the inputs) or each arrival makes ready to be sent; what each op waits for."""
    ops = [op for op in p.ops if op.target != "wait" and not op.target.endswith(".start")]
    place = {r: n for n, op in enumerate(ops) for r in op.results}
    ends = {r: place[p.ops[last].name] for n, last in calls(p).items() for r in p.ops[n].results}  # of updates that one call does, there with the last
    last_place = {op.name: n for n, op in enumerate(ops)}
    weights = params_only(p)
    values: dict[str, _Value] = {}
    sends: dict[int | str, list[str]] = {}
    needs: list[list[str]] = [[] for _ in ops]
    for op in (op for op in p.ops if is_collective(op)):
        sizes = [t.local_bytes(p.mesh) for t in op.types]
        for r, ref, nbytes in zip(op.results, op.refs, sizes, strict=False):
            wait = next(u for u in p.uses[r] if isinstance(u, Op))
            users = [place[u.name] for u in p.uses[wait.name] if isinstance(u, Op) and u.name in place]
            gathered = op.target == "all_gather.start" and ref.name in weights
            values[wait.name] = _Value(str(op.kw("axis")), sending[op.name] * nbytes / max(1, sum(sizes)), min(users, default=len(ops)), _last_of(p, wait.name, last_place), nbytes, gathered)
            made = p.producers.get(ref.name)
            sends.setdefault(-1 if made is None else ends.get(ref.name, place.get(ref.name, -1)) if made.target != "wait" else ref.name, []).append(wait.name)
            for n in users:
                needs[n].append(wait.name)
    return ops, values, sends, needs


def _last_of(p: Program, name: str, place: Mapping[str, int]) -> int:
    found = -1
    for u in p.uses[name]:
        if isinstance(u, Op):
            found = max(found, place.get(u.name, -1), *(_last_of(p, r, place) for r in u.results) if u.target in VIEWS else ())
    return found
