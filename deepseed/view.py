"""``deepseed explain --html``: what a plan does to a program as one page that needs nothing else, not even a network.

``view`` makes the figures, plain data, from the program and from what explain counts; ``page`` puts them into deepseed/view.html as one block
of JSON, with the style and the script beside it. Ranks that do the same are described once: a *position* is a rank of the pipeline (all ranks,
where there is none). Times are estimates (deepseed.speed), bytes are counted.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from importlib.resources import files
from typing import Any

from deepseed.explain import Explanation
from deepseed.ir.collective import MEMORIES
from deepseed.ir.mesh import STAGES, Mesh
from deepseed.ir.program import Program
from deepseed.meshes import ranks_of
from deepseed.speed import Machine, Sent
from deepseed.view_lanes import KINDS, Box, Crossing, Moment, staged, straight

POINTS = 600  # of a memory curve, at most
SCRIPTS = ("view_numbers.js", "view_timeline.js", "view.js")
DIGITS = 7  # of a time


def view(p: Program, e: Explanation, *, ranks: Mesh | None = None, title: str = "", plan: str = "", machine: Machine | None = None, budget: int | None = None) -> dict[str, Any]:
    """The figures of the page. ``p``: a lowered program, best the one that ranks run; ``e``: explain's answer about it; ``ranks``: the mesh of
    the ranks, where it has an axis that the program's mesh has not (pp); ``budget``: bytes of a device, where the plan says so."""
    machine = machine or Machine()
    lanes, crossing = staged(p, machine) if p.schedule is not None else ([straight(p, machine)], Crossing())
    where = ranks or ranks_of(p)
    bodies: dict[tuple[Sent, ...], int] = {}
    positions = []
    for at, lane in enumerate(lanes):
        peak = max(lane.moments, key=lambda m: m.nbytes, default=Moment(0.0, "", {}))
        here = [r for r in range(where.ranks) if where.coordinate(r).get(STAGES, 0) == at]
        positions.append({
            "ranks": here,
            "boxes": [[b.label, b.kind, b.part, b.stage, b.microbatch, _r(b.start), _r(b.end), b.ops, bodies.setdefault(b.sent, len(bodies))] for b in lane.boxes],
            "memory": _columns(thinned(lane.moments, POINTS)), "collectives": _collectives(lane.boxes), "flops": lane.flops,
            "host": e.ranks[here[0]].host_bytes, "moved": [[kind, n, round(e.ranks[here[0]].moved_hidden[kind], 4)] for kind, n in e.ranks[here[0]].moved_bytes.items() if n],
            "peak": {"bytes": peak.nbytes, "op": peak.op, "time": _r(peak.time), "live": {kind: peak.live.get(kind, 0) for kind in KINDS}},
        })  # fmt: skip
    s = p.schedule
    return {
        "title": title, "plan": plan, "zero": e.zero, "mesh": [list(axis) for axis in where.axes], "machine": asdict(machine), "kinds": KINDS, "budget": budget,
        "ranks": [where.coordinate(r) for r in range(where.ranks)], "positions": positions,
        "step": _r(max((box.end for lane in lanes for box in lane.boxes), default=0.0)),
        "bodies": [[[s.axis, s.target, _r(s.start), _r(s.end), s.nbytes, _r(s.held)] for s in body] for body in bodies],
        "schedule": {"name": s.name, "stages": s.stages, "microbatches": s.microbatches, "lanes": len(s.lanes)} if s is not None else None,
        "messages": crossing.messages, "transfers": crossing.table,
        "weights": [asdict(w) for w in e.weights], "closed_forms": [asdict(c) for c in e.closed_forms], "left_whole": _left_whole(e),
        "flops_one_device": e.matmul_flops_one_device,
    }  # fmt: skip


def page(figures: Mapping[str, Any]) -> str:
    """The file: the template with style, script and figures in it."""
    here = files("deepseed")
    title = " ".join(filter(None, (figures["title"], figures["plan"]))) or "a program"
    parts = {
        "title": escape(title), "style": (here / "view.css").read_text(), "script": "\n".join((here / name).read_text() for name in SCRIPTS),
        "figures": json.dumps(figures, separators=(",", ":"), default=_short).replace("<", "\\u003c"),
    }  # fmt: skip
    return re.sub(r"\{\{(\w+)\}\}", lambda m: parts[m.group(1)], (here / "view.html").read_text())


# memory --------------------------------------------------------------------------------------------------------------


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


def _collectives(boxes: Sequence[Box]) -> list[dict[str, Any]]:
    """Count and bytes of a rank's step, by axis and kind."""
    count: Counter[tuple[str, str]] = Counter()
    nbytes: Counter[tuple[str, str]] = Counter()
    for s in (s for b in boxes for s in b.sent if f"{s.target}.start" not in MEMORIES):
        count[s.axis, s.target] += 1
        nbytes[s.axis, s.target] += s.nbytes
    return [{"axis": axis, "op": op, "count": n, "bytes": nbytes[axis, op]} for (axis, op), n in sorted(count.items())]


def _r(seconds: float) -> float:
    return float(f"{seconds:.{DIGITS}g}")


def _columns(moments: Sequence[Moment]) -> dict[str, Any]:
    return {"time": [_r(m.time) for m in moments], "op": [m.op for m in moments], "live": [[m.live.get(kind, 0) for m in moments] for kind in KINDS]}


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
