"""What to keep from forward to backward and what to compute again: the least time with the kept bytes under a bound.

Variables, 0 or 1: s[v], the storage v is kept; r[u], the unit u runs again. The backward's needs: s[v] + r[u] >= 1 for each v of u that it
reads. Running again needs operands: r[u] <= s[w] + r[unit of w] for each w that u reads. The sum of bytes of what is kept is bounded; the
seconds of what runs again are least. Units of one neighbourhood (deepseed.solver.classes) share their variables, so that the program does
not grow with depth. Kept bytes are not the peak: without ``every`` a long chain may come alive at once in the backward.
Solved by HiGHS (scipy.optimize.milp).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import isqrt
from time import perf_counter

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from deepseed.ir.mesh import TIME
from deepseed.ir.program import Program
from deepseed.solver.between import BLOCK, Between
from deepseed.solver.classes import Graph, colours
from deepseed.solver.rows import Rows
from deepseed.speed import Machine

GATHERS = ("again", "kept", "solve")  # of parameters: once more in the backward, once for both phases, or as the integer program says
STEPS = 100_000  # in which bytes are counted: what the backward reads is so many
MICRO = 1e6  # the unit of time in the objective
GAP = 1e-3  # of the time: proving the rest can take a thousand times as long, and seconds are estimates
NODES = 300  # of the search: then the best that was found; a limit in seconds would give other programs on other days
TIE = 1e-3  # microseconds for all the bytes that could be kept: of equal times the one that keeps less


@dataclass(frozen=True)
class Choice:
    """``kept``: the storages that live from forward to backward; ``seconds``: what runs again takes; ``nbytes``: of what is kept, all that
    lives anyway aside; ``solve_seconds``: what finding it took."""

    kept: frozenset[str]
    seconds: float
    nbytes: int
    solve_seconds: float = 0.0


def choose(b: Between, saved: float, every: int, gathers: str = "again") -> Choice:
    """``saved``: of the bytes that the backward reads, those of every ``every``-th layer's input aside, the part that may be kept.
    ``every``: 0 for none. ``gathers``: one of GATHERS."""
    started = perf_counter()
    found = _Problem(b, every, gathers).solve(saved)
    return Choice(found.kept, found.seconds, found.nbytes, perf_counter() - started)


def levels(p: Program, machine: Machine | None = None, gathers: str = "again", steps: int = 8) -> list[tuple[float, int]]:
    """Arguments (``saved``, ``every``) of plan_memory in the order of rising predicted time, each keeping other values. The first keeps all."""
    b = Between(p, machine)
    found: dict[frozenset[str], tuple[float, int, float, int]] = {}
    widest = isqrt(len(b.layers)) or 1  # beyond it a run between holds more than is saved
    for every in (0, *(2**i for i in range(widest.bit_length()))):
        problem = _Problem(b, every, gathers)
        for i in range(steps, -1, -1):
            choice = problem.solve(i / steps)
            found.setdefault(choice.kept, (choice.seconds, choice.nbytes, i / steps, every))
    return [(saved, every) for _, _, saved, every in sorted(found.values(), key=lambda f: f[:2])]


class _Problem:
    """The integer program of one program, ``every`` and ``gathers``; ``solve`` takes the bound."""

    def __init__(self, b: Between, every: int, gathers: str) -> None:
        self.b = b
        self.units = [u for u in b.units if u.makes]
        self.owner = {s: n for n, u in enumerate(self.units) for s in u.makes}
        self.wanted = b.needed & self.owner.keys()
        gathered = {s for u in self.units if u.weight and any(op.target.endswith(".start") for op in u.ops) for s in u.makes if s in b.again}
        if TIME in b.p.mesh.sizes:  # loop_microbatches gathers beside each use
            gathered = set()
        if gathers != "again":
            self.wanted |= gathered
        self.cuts = b.keys.union(*b.layers[::every] if every else ()) & self.owner.keys()  # must be kept
        little = {s for s in self.wanted if b.nbytes([s]) <= BLOCK and s not in b.weights}
        self.free = (b.lasting & self.owner.keys()) | little | (gathered if gathers == "kept" else set())
        self.never = {s for u in self.units if u.weight for s in u.makes} - (gathered if gathers != "again" else set()) - self.free
        self.most = b.nbytes((self.wanted | self.cuts) - self.free - self.never)
        self.seconds = [0.0 if u.weight and all(s in b.again and s not in self.wanted for s in u.makes) else u.seconds for u in self.units]
        self.classes = self._classes()
        self._assemble()

    def _classes(self) -> list[int]:
        labels = [
            (
                tuple((op.form, op.types) for op in u.ops), n == 0.0,
                tuple((s in self.wanted, s in self.cuts, s in self.free, s in self.never) for s in u.makes),
            )
            for u, n in zip(self.units, self.seconds, strict=True)
        ]  # fmt: skip
        at = {s: i for u in self.units for i, s in enumerate(u.makes)}
        return colours(Graph([[(self.owner[s], at[s]) for s in u.operands if s in self.owner] for u in self.units]), labels)

    def _assemble(self) -> None:
        """Variables: r by class, then s by class and place in ``makes``."""
        count = Counter(self.classes)
        self.r = {c: i for i, c in enumerate(count)}
        self.s: dict[tuple[int, int], int] = {}
        for c, u in zip(self.classes, self.units, strict=True):
            for i in range(len(u.makes)):
                self.s.setdefault((c, i), len(self.r) + len(self.s))
        self.var = {s: self.s[c, i] for c, u in zip(self.classes, self.units, strict=True) for i, s in enumerate(u.makes)}
        n = len(self.r) + len(self.s)
        self.bytes, self.low, self.high, self.time = np.zeros(n), np.zeros(n), np.ones(n), np.zeros(n)
        self.forced, self.wished = np.zeros(n), np.zeros(n)  # 1: must be kept; may be
        rows = Rows()
        said: set[tuple[int, ...]] = set()
        for c, u, seconds in zip(self.classes, self.units, self.seconds, strict=True):
            self.time[self.r[c]] += seconds * MICRO
            for s in u.makes:
                self.bytes[self.var[s]] += self.b.nbytes([s]) if s not in self.free else 0
                self.low[self.var[s]] = self.forced[self.var[s]] = s in self.cuts or s in self.free
                self.wished[self.var[s]] = (s in self.wanted or s in self.cuts) and s not in self.never
                self.high[self.var[s]] = s not in self.never
                if s in self.wanted:
                    said.add((self.r[c], self.var[s]))
            for w in u.operands:
                if w in self.owner:
                    said.add((self.var[w], self.r[self.classes[self.owner[w]]], self.r[c]))
        for row in sorted(said):
            rows.add([(row[0], 1.0), (row[1], 1.0)] + [(v, -1.0) for v in row[2:] if v not in row[:2]], 0.0 if len(row) > 2 else 1.0)
        self.rows = rows

    def solve(self, saved: float) -> Choice:
        """The cheapest that keeps what is forced and the part ``saved`` of the other bytes at most."""
        n = len(self.time)
        if not n:
            return Choice(frozenset(), 0.0, 0)
        unit = max(1.0, self.most / STEPS)  # whole numbers of it: bytes as they are would differ by the factor that tolerances have
        size = np.ceil(self.bytes / unit)
        forced, most = float(size @ self.forced), float(size @ self.wished)
        constraints = [LinearConstraint(size[None, :], -np.inf, forced + np.floor(saved * (most - forced)))]
        constraints += [self.rows.constraint(n)] if self.rows.low else []
        cost = self.time + TIE * self.bytes / max(1.0, self.bytes.sum())
        found = None
        for nodes in (NODES, 1000 * NODES):
            options = {"node_limit": nodes, "mip_rel_gap": GAP}
            found = milp(cost, constraints=constraints, integrality=np.ones(n), bounds=Bounds(self.low, self.high), options=options)
            if found.x is not None:
                break
        if found is None or found.x is None:
            raise AssertionError(f"the integer program of remat has no solution, though all that is forced fits: {found and found.message}")
        x = np.round(found.x) > 0.5
        kept = frozenset(s for s, v in self.var.items() if x[v])
        return Choice(kept, float(self.time @ x) / MICRO, round(float(self.bytes @ x)))
