"""``deepseed explain --html``: what a plan does to a program as one page that needs nothing else, not even a network.

``view`` makes the figures, plain data, from the program and from what explain counts; ``page`` puts them into deepseed/view.html as one block
of JSON, with the style and the script beside it. Ranks that do the same are described once: a *position* is a rank of the pipeline (all ranks,
where there is none). Times are estimates (deepseed.speed), bytes are counted.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from html import escape
from importlib.resources import files
from itertools import groupby
from typing import Any

from deepseed.explain import CARRIERS, Explanation, gradients
from deepseed.ir.mesh import STAGES, Mesh
from deepseed.ir.program import Program, params_only
from deepseed.memory import curve
from deepseed.speed import Machine, Sent, course

KINDS = ("parameters", "optimizer", "weights in use", "gradients", "activations", "other")  # of memory, in the order in which they are stacked
POINTS = 600  # of a memory curve, at most
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


def view(p: Program, e: Explanation, *, ranks: Mesh | None = None, title: str = "", plan: str = "", machine: Machine | None = None) -> dict[str, Any]:
    """The figures of the page. ``p``: a lowered program, best the one that ranks run; ``e``: explain's answer about it; ``ranks``: the mesh of
    the ranks, where it has an axis that the program's mesh has not (pp)."""
    where, machine = ranks or p.mesh, machine or Machine()
    n = where.size(STAGES) if STAGES in where.names else 1
    lanes = [straight(p, machine)]
    bodies: dict[tuple[Sent, ...], int] = {}
    positions = []
    for at, (boxes, moments) in enumerate(lanes):
        peak = max(moments, key=lambda m: m.nbytes)
        positions.append({
            "ranks": [r for r in range(where.ranks) if n == 1 or where.coordinate(r)[STAGES] == at],
            "boxes": [[b.label, b.kind, b.part, b.stage, b.microbatch, b.start, b.end, b.ops, bodies.setdefault(b.sent, len(bodies))] for b in boxes],
            "memory": _columns(thinned(moments, POINTS)),
            "peak": {"bytes": peak.nbytes, "op": peak.op, "time": peak.time, "live": {kind: peak.live.get(kind, 0) for kind in KINDS}},
        })  # fmt: skip
    step = max((box[6] for position in positions for box in position["boxes"]), default=0.0)
    return {
        "title": title, "plan": plan, "zero": e.zero, "mesh": [list(axis) for axis in where.axes], "machine": asdict(machine), "kinds": KINDS,
        "ranks": [where.coordinate(r) for r in range(where.ranks)], "step": step, "positions": positions,
        "bodies": [[[s.axis, s.target, s.start, s.end, s.nbytes, s.held] for s in body] for body in bodies],
        "schedule": None, "messages": [], "transfers": [],
        "collectives": [asdict(c) for c in e.collectives], "weights": [asdict(w) for w in e.weights],
        "closed_forms": [asdict(c) for c in e.closed_forms], "left_whole": _left_whole(e),
        "flops": e.matmul_flops, "flops_one_device": e.matmul_flops_one_device,
    }  # fmt: skip


def page(figures: Mapping[str, Any]) -> str:
    """The file: the template with style, script and figures in it."""
    here = files("deepseed")
    title = " ".join(filter(None, (figures["title"], figures["plan"]))) or "a program"
    parts = {
        "title": escape(title), "style": (here / "view.css").read_text(), "script": (here / "view.js").read_text(),
        "figures": json.dumps(figures, separators=(",", ":"), default=_short).replace("<", "\\u003c"),
    }  # fmt: skip
    return re.sub(r"\{\{(\w+)\}\}", lambda m: parts[m.group(1)], (here / "view.html").read_text())


# a program without a schedule ------------------------------------------------------------------------------------------


def straight(p: Program, machine: Machine) -> tuple[list[Box], list[Moment]]:
    """Its ops in their order: a box for each stretch of one phase, and the memory while each op runs."""
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
        until = ran.spans[first + count][0] if first + count < len(ran.spans) else float("inf")
        sent = tuple(replace(s, start=s.start - start, end=s.end - start) for s in ran.sent if start <= s.start < until)
        boxes.append(Box(phase, phase, phase, 0, 0, start, end, count, sent))
        first += count
    rows = curve(p, storage_kinds(p))
    return boxes, [Moment(start, op.name, live) for (start, _), op, live in zip(ran.spans, p.ops, rows, strict=True)]


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
            found.update(ref.name for ref in op.refs if op.phase == "backward" or ref.name in p.producers)
    return found


def thinned(moments: Sequence[Moment], most: int) -> list[Moment]:
    """At most ``most`` moments: of each stretch of time the one with the most bytes, so that no peak is lost."""
    if len(moments) <= most:
        return list(moments)
    end = moments[-1].time or 1.0
    best: dict[int, Moment] = {}
    for m in moments:
        at = min(most - 1, int(m.time / end * most))
        if at not in best or m.nbytes > best[at].nbytes:
            best[at] = m
    return [best[at] for at in sorted(best)]


def _columns(moments: Sequence[Moment]) -> dict[str, Any]:
    return {"time": [m.time for m in moments], "op": [m.op for m in moments], "live": [[m.live.get(kind, 0) for m in moments] for kind in KINDS]}


# tables --------------------------------------------------------------------------------------------------------------


def _left_whole(e: Explanation) -> list[dict[str, Any]]:
    """What every rank of an axis repeats or holds, and ops without a rule: a row for each name with its indices left out."""
    rows: Counter[tuple[str, str, str]] = Counter()
    for r in e.replicated_ops:
        rows["held whole" if r.target == "param" else "computed by every rank", r.axis, _pattern(r.path if r.target == "param" else f"{r.target} at {r.path or 'top'}")] += 1
    for u in e.unruled_ops:
        rows["no rule", "", _pattern(f"{u.target} at {u.path or 'top'}")] += 1
    return [{"why": why, "axis": axis, "what": what, "count": n} for (why, axis, what), n in rows.items()]


def _pattern(path: str) -> str:
    return re.sub(r"(^|[. ])\d+(?=\.|$)", r"\1*", path)


def _short(value: object) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} in the figures of a page")
