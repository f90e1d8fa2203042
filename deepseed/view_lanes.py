"""What each pipeline rank does in a step, as boxes in time, and what it holds meanwhile: the figures behind the page of deepseed.view.

A program without a schedule is one lane: its ops in their order, a box for each stretch of one phase. A scheduled one has a lane for each pipeline
rank, a box for each instruction; deepseed.timeline says when each begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from deepseed.counts import local_flops
from deepseed.explain import CARRIERS, gradients
from deepseed.ir.messages import Message, Place, needs, runs_once, sends
from deepseed.ir.program import Program, params_only
from deepseed.ir.schedule import format_instruction
from deepseed.memory import curve
from deepseed.speed import Course, Machine, Sent, course
from deepseed.timeline import Timeline
from deepseed.timing import by_place, run_schedule
from deepseed.unroll import original, unroll

KINDS = ("parameters", "optimizer", "weights in use", "gradients", "activations", "other")  # of memory, in the order in which they are stacked
CARRIED = (*CARRIERS, "accumulate", "collect", "transfer")


@dataclass(frozen=True)
class Box:
    """One box of a lane: what a rank runs from ``start`` to ``end`` (seconds). ``sent``: its collectives, in seconds from ``start``."""

    label: str
    kind: str  # forward, backward, weights, update, once
    part: str
    stage: int
    microbatch: int
    start: float
    end: float
    ops: int
    sent: tuple[Sent, ...] = ()


@dataclass(frozen=True)
class Moment:
    """Bytes live at ``time`` (seconds) by kind, while ``op`` runs."""

    time: float
    op: str
    live: Mapping[str, int]

    @property
    def nbytes(self) -> int:
        return sum(self.live.values())


@dataclass(frozen=True)
class Lane:
    """``flops``: of a rank's matmuls in a step."""

    boxes: list[Box]
    moments: list[Moment]
    flops: int


@dataclass(frozen=True)
class Crossing:
    """What crosses between pipeline ranks. ``messages``: (from rank, to rank, sent at, arrives at, bytes, value, sender's box, receiver's box);
    ``table``: a row for each pair of stages and part."""

    messages: list[tuple[int, int, float, float, int, str, int, int]] = field(default_factory=list)
    table: list[dict[str, Any]] = field(default_factory=list)


def straight(p: Program, machine: Machine) -> Lane:
    """A program without a schedule."""
    ran = course(p, p.ops, machine)
    runs: list[tuple[str, int]] = []  # phase, ops: what takes no time belongs to what went before
    first = 0
    for phase, group in groupby(p.ops, key=lambda op: op.phase):
        count = sum(1 for _ in group)
        took = ran.spans[first + count - 1][1] - ran.spans[first][0]
        first += count
        if runs and (took == 0 or runs[-1][0] == phase):
            phase, before = runs.pop()
            count += before
        runs.append((phase, count))
    boxes: list[Box] = []
    first = 0
    for phase, count in runs:
        start, end = ran.spans[first][0], ran.spans[first + count - 1][1]
        sent = [s for n, s in ran.sent_by if first <= n < first + count]
        boxes.append(Box(phase, phase, phase, 0, 0, start, end, count, tuple(replace(s, start=s.start - start, end=s.end - start) for s in sent)))
        first += count
    rows = curve(p, storage_kinds(p))
    moments = [Moment(start, op.name, live) for (start, _), op, live in zip(ran.spans, p.ops, rows, strict=True)]
    return Lane(boxes, moments, sum(local_flops(p, op) for op in p.ops))


# scheduled -----------------------------------------------------------------------------------------------------------


def staged(p: Program, machine: Machine) -> tuple[list[Lane], Crossing]:
    """A scheduled program: the lane of each pipeline rank, and what crosses."""
    assert p.schedule is not None
    schedule = p.schedule
    ops, run = by_place(p, schedule), run_schedule(p, machine)
    ran, messages, sizes, timeline = run.ran, run.messages, run.sizes, run.timeline
    lanes = []
    for lane in range(len(schedule.lanes)):
        boxes, flops = [], 0
        for e in timeline.events:
            if e.lane != lane:
                continue
            i, place = e.instruction, (e.instruction.part, e.instruction.stage)
            label = format_instruction(i, lane, schedule.loops).partition("@")[0]
            boxes.append(Box(label, i.kind, i.part, i.stage, i.microbatch, e.start, e.end, len(ops.get(place, ())), ran[place].sent if place in ran else ()))
            flops += sum(local_flops(p, op) for op in ops.get(place, ()))
        lanes.append(Lane(boxes, _memory(p, lane, boxes, ran), flops))
    return lanes, Crossing(_messages(timeline, messages, sizes), _table(timeline, messages, sizes))


def _messages(timeline: Timeline, messages: Mapping[str, Message], sizes: Mapping[str, int]) -> list[tuple[int, int, float, float, int, str, int, int]]:
    s = timeline.schedule
    made = {item: n for lane in range(len(s.lanes)) for n, items in enumerate(sends(s, lane, messages)) for item in items}
    used = {item: n for lane in range(len(s.lanes)) for n, items in enumerate(needs(s, lane, messages)) for item in items}
    out = []
    for t in timeline.transfers:
        item = t.name, t.microbatch
        out.append((t.source, t.target, t.start, t.end, sizes[t.name], t.name, made.get(item, -1), used.get(item, -1)))
    return out


def _table(timeline: Timeline, messages: Mapping[str, Message], sizes: Mapping[str, int]) -> list[dict[str, Any]]:
    rows: dict[tuple[str, int, int], dict[str, Any]] = {}
    for name, ((part, source), (to, stage)) in messages.items():
        times = 1 if runs_once(part) or runs_once(to) else timeline.schedule.microbatches
        row = rows.setdefault((part, source, stage), {"part": part, "source": source, "stage": stage, "values": 0, "times": times, "bytes": 0})
        row["values"] += 1
        row["bytes"] += times * sizes[name]
    return [rows[key] for key in sorted(rows, key=lambda k: (k[1], k[2], k[0]))]


# memory --------------------------------------------------------------------------------------------------------------


def storage_kinds(p: Program) -> dict[str, str]:
    """What the storage that each value makes is counted as."""
    role = {"param": "parameters", "state": "optimizer"}
    out = {i.name: role.get(i.role, "other") for i in p.inputs}
    weights = params_only(p)
    for op in p.ops:
        kind = "weights in use" if op.results[0] in weights else "other" if op.phase == "update" else "activations"
        out.update(dict.fromkeys(op.results, kind))
    out.update(dict.fromkeys(_gradient_values(p), "gradients"))
    return out


def _gradient_values(p: Program) -> Iterable[str]:
    """The gradients that the update reads, and what became them by moving, turning or being accumulated."""
    found = set(gradients(p))
    for op in reversed(p.ops):
        if op.phase != "forward" and (op.target in CARRIED or op.target.endswith(".start")) and any(r in found for r in op.results):
            found.update(ref.name for ref in op.refs if ref.name in p.producers)
    return found


def _memory(p: Program, lane: int, boxes: Sequence[Box], ran: Mapping[Place, Course]) -> list[Moment]:
    """While each op of each box runs, in the order of the lane."""
    whole = unroll(p, lane)
    kinds = storage_kinds(p)
    flat = {i.name: kinds[i.name] for i in whole.program.inputs} | {r: kinds[original(r)] for op in whole.program.ops for r in op.results}
    out = []
    for op, (n, k), live in zip(whole.program.ops, whole.origin, curve(whole.program, flat), strict=True):
        box = boxes[n]
        out.append(Moment(box.start + ran[box.part, box.stage].spans[k][0], op.name, live))
    return out
