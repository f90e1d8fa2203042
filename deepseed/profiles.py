"""Where the time of a step went: each node of the program, on each rank, with its module and its line; as a table, and as a trace that Perfetto and Chrome open.
Nodes that one kernel computes are one event, under the last one's name and module, which lists all of both.

A profiled step is a step of training. Its source is the one that runs otherwise, with the clock read after each value (some 0.2 us an op on a CPU, an event on a GPU): what is
overlapped stays overlapped. The trace is Chrome's format ("Trace Event Format", Google 2016): a process a rank, ops as complete events, collectives as asynchronous ones from their
start to the end of their wait.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Op, Program
from deepseed.runtime.clock import Moment

ROWS = 12  # of a table


@dataclass(frozen=True)
class Profile:
    """``moments``: of each rank, when each value was there; ``began``: when that rank began, in seconds of the wall clock. ``kernels``: the function of each group of ops, by its mark."""

    program: Program
    mesh: Mesh
    moments: Sequence[Sequence[Moment]]
    began: Sequence[float]
    kernels: Mapping[str, str] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Of the slowest rank's step."""
        return max((each[-1].end for each in self.moments if each), default=0.0)

    @cached_property
    def _groups(self) -> Mapping[str, Sequence[Op]]:
        found: dict[str, list[Op]] = {}
        for op in self.program.ops:
            if op.kernel in self.kernels:
                found.setdefault(op.kernel, []).append(op)
        return found

    def _runs(self, moments: Sequence[Moment]) -> Iterator[tuple[Op, Moment]]:
        """What ran, with its time: an op, or the last one of a group. Inputs are none."""
        made = self.program.producers
        for _, run in groupby((m for m in moments if m.name in made), lambda m: (made[m.name].kernel if made[m.name].kernel in self.kernels else m.name, m.mb)):
            each = list(run)
            op = made[each[0].name]
            yield (self._groups[op.kernel][-1], Moment(op.kernel, each[0].mb, each[0].begin, each[-1].end)) if op.kernel in self.kernels else (op, each[0])

    def _what(self, op: Op) -> str:
        return self.kernels.get(op.kernel, op.target)

    def spent(self, by: str) -> list[tuple[str, float, int]]:
        """(what, seconds, times) in the mean of the ranks, the longest first. ``by``: ``"module"`` (its path; ``wait``: for collectives), ``"op"``, ``"node"`` or ``"phase"``."""
        found: dict[str, tuple[float, int]] = {}
        for each in self.moments:
            for op, m in self._runs(each):
                key = {"module": op.path or "(top)", "op": self._what(op), "node": m.name, "phase": op.phase}[by] if op.target != "wait" or by != "module" else "wait"
                seconds, times = found.get(key, (0.0, 0))
                found[key] = seconds + m.end - m.begin, times + 1
        n = max(1, len(self.moments))
        return sorted(((key, seconds / n, times // n) for key, (seconds, times) in found.items()), key=lambda row: -row[1])

    def __str__(self) -> str:
        lines = [f"a step of {self.seconds * 1e3:.1f} ms on {self.mesh.ranks} rank{'s' if self.mesh.ranks > 1 else ''}, {len(self.moments[0]) if self.moments else 0} values on the first"]
        for by in ("phase", "op", "module"):
            rows = self.spent(by)
            whole = sum(seconds for _, seconds, _ in rows) or 1.0
            lines += ["", f"{by:48}{'ms':>10}{'share':>8}{'times':>8}"]
            lines += [f"{key[-47:]:48}{seconds * 1e3:10.2f}{seconds / whole:8.1%}{times:8}" for key, seconds, times in rows[:ROWS]]
            if len(rows) > ROWS:
                lines.append(f"{f'({len(rows) - ROWS} more)':48}{sum(s for _, s, _ in rows[ROWS:]) * 1e3:10.2f}{sum(s for _, s, _ in rows[ROWS:]) / whole:8.1%}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Seconds in the mean of the ranks, by phase, op, module and node."""
        rows = {by: [{"name": key, "seconds": seconds, "times": times} for key, seconds, times in self.spent(by)] for by in ("phase", "op", "module", "node")}
        return {"seconds": self.seconds, "ranks": self.mesh.ranks, **rows}

    def trace(self) -> dict[str, Any]:
        """The trace as plain data."""
        return {"displayTimeUnit": "ms", "traceEvents": list(self._events())}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trace for https://ui.perfetto.dev or chrome://tracing."""
        Path(path).write_text(json.dumps(self.trace()))

    def _events(self) -> Iterator[dict[str, Any]]:
        first = min(self.began, default=0.0)
        for rank, (moments, began) in enumerate(zip(self.moments, self.began, strict=True)):
            where = ", ".join(f"{axis}={i}" for axis, i in self.mesh.coordinate(rank).items())
            yield {"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}" + (f" ({where})" if where else "")}}
            yield {"name": "process_sort_index", "ph": "M", "pid": rank, "args": {"sort_index": rank}}
            started: dict[tuple[str, int], Moment] = {}
            for op, m in self._runs(moments):
                at = (began - first + m.begin) * 1e6
                args: dict[str, Any] = {"op": self._what(op), "module": op.path, "line": op.line, "phase": op.phase} | ({"microbatch": m.mb} if op.part and not op.part.startswith("once") else {})
                if group := self._groups.get(op.kernel):
                    args |= {"nodes": [each.name for each in group], "ops": [each.target for each in group], "modules": sorted({each.path for each in group})}
                kind = "wait" if op.target == "wait" else "collective" if op.target.endswith(".start") else op.phase
                yield {"name": m.name, "cat": kind, "ph": "X", "ts": at, "dur": (m.end - m.begin) * 1e6, "pid": rank, "tid": 0, "args": args}
                if op.target.endswith(".start"):
                    started[m.name, m.mb] = m
                elif op.target == "wait" and (source := started.pop((op.refs[0].name, m.mb), None)) is not None:
                    name, key = f"{self.program.producers[source.name].target.removesuffix('.start')} {self.program.producers[source.name].kw('axis') or ''}".strip(), f"{rank}.{source.name}.{m.mb}"
                    both = {"name": name, "cat": "collective", "pid": rank, "tid": 0, "id": key, "args": {"value": source.name}}
                    yield {**both, "ph": "b", "ts": (began - first + source.begin) * 1e6}
                    yield {**both, "ph": "e", "ts": (began - first + m.end) * 1e6}


def of_target(target: str, plan: str, world_size: int | None, backend: str, steps: int, optimizer: str | None, clip: float | None, codegen: str = "python") -> Profile:
    """The last of some steps of a TARGET, on every rank's process or with simulated ranks."""
    import deepseed
    from deepseed.asked import factory_of, fitting
    from deepseed.target import TargetError, load

    found = load(target)
    factory = factory_of(found, optimizer)
    if factory is None:
        raise TargetError("--optimizer none: a step without an update is not profiled\n  fix: leave it out")
    with fitting(found):
        step: Any = deepseed.compile(
            found.model, plan, optimizer=factory(list(found.model.parameters())), loss_fn=found.loss_fn, clip_grad_norm=clip,
            world_size=world_size if backend == "simulate" else None, backend=backend, codegen=codegen,
        )  # fmt: skip
        for _ in range(steps - 1):
            step.profile(found.batch)
        last: Profile = step.profile(found.batch)
    return last
