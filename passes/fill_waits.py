"""While a value travels that the next op needs, do what does not need it: computation from before its start goes between the start and the wait.

A gradient of activations that tensor parallelism sums up is waited for by the layer before, while the gradients of this layer's weights are needed only at the end. The op that comes latest
goes first, with what reads it, until the link's time is filled (deepseed.speed); as its operands live longer, only where no op is held under way beside it above the program's peak.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

from deepseed.counts import is_collective
from deepseed.ir.messages import TRANSFER
from deepseed.ir.program import Op, Program
from deepseed.speed import VIEWS, Machine

Live = Callable[[Program], Sequence[int]]  # bytes that are live while each op runs
WINDOW = 400  # ops before a start that are looked at
MOMENT = 1e-9  # seconds that are not worth a move
STAY = ("wait", "send", "collect", TRANSFER)


def fill_waits(p: Program, machine: Machine, live: Live) -> Program:
    """``p`` with the computation between starts and waits; its peak is no higher. Stages of a pipeline stay as they are."""
    if p.schedule is not None or not any(is_collective(op) for op in p.ops):
        return p
    found = _Fill(p, machine, live)
    now = found.run()
    return now if now is p or max(live(now)) <= found.peak else p


class _Fill:
    def __init__(self, p: Program, machine: Machine, live: Live) -> None:
        self.p, self.machine, self._live = p, machine, live
        self.out: list[Op] = []
        self.emitted: set[str] = set()
        self.changed = False

    @cached_property
    def live(self) -> dict[str, int]:
        return {op.name: n for op, n in zip(self.p.ops, self._live(self.p), strict=True)}

    @cached_property
    def peak(self) -> int:
        return max(self.live.values(), default=0)

    def run(self) -> Program:
        begun: set[str] = set()  # starts with a wait behind
        for op in self.p.ops:
            start = self.p.producers.get(op.refs[0].name) if op.target == "wait" else None
            if start is not None and is_collective(start) and start.name not in begun:
                begun.add(start.name)
                if start.part == op.part:
                    self._fill(start)
            self.out.append(op)
            self.emitted.update(op.results)
        return replace(self.p, ops=tuple(self.out)) if self.changed else self.p

    def _fill(self, start: Op) -> None:
        """Before a wait for ``start``."""
        at = next((n for n in range(len(self.out) - 1, max(-1, len(self.out) - WINDOW), -1) if self.out[n].name == start.name), None)
        if at is None:
            return
        wanted = self.machine.sending(self.p, start) - sum(self.machine.seconds(self.p, op) for op in self.out[at:])
        needed = {ref.name for op in self.out[at:] for ref in op.refs}
        moved: list[int] = []
        names: set[str] = set()
        extra = 0
        for n in range(at - 1, max(-1, at - WINDOW), -1):
            if wanted <= MOMENT:
                break
            op = self.out[n]
            stays = op.target in STAY or op.target.endswith(".start") or op.part != start.part or op.phase != start.phase or not needed.isdisjoint(op.results)
            held = 0 if stays else self._held(op, names)
            if stays or self._most(n) + extra + held > self.peak:
                needed.update(ref.name for ref in op.refs)
                continue
            moved.append(n)
            names.update(op.results)
            extra += held
            wanted -= self.machine.seconds(self.p, op)
        while moved and self.machine.seconds(self.p, self.out[moved[-1]]) == 0:  # views of what stays
            moved.pop()
        if not moved:
            return
        going = set(moved)
        first = min(moved)
        rest = [op for n, op in enumerate(self.out[first:], first) if n not in going]
        for op in rest:
            self.live[op.name] += extra
        self.out[first:] = rest + [self.out[n] for n in sorted(moved)]
        self.changed = True

    def _most(self, n: int) -> int:
        return max(self.live[op.name] for op in self.out[n:])

    def _held(self, op: Op, moved: set[str]) -> int:
        """Bytes of operands that would be free by now if ``op`` stayed."""
        out = 0
        for name in {_root(self.p, ref.name) for ref in op.refs}:
            made = self.p.producers.get(name)
            if made is not None and name not in moved and not self._read_later(name):
                out += self.p.types[name].local_bytes(self.p.mesh)
        return out

    def _read_later(self, name: str) -> bool:
        for u in self.p.uses[name]:
            if not isinstance(u, Op) or u.name not in self.emitted or (u.target in VIEWS and any(self._read_later(r) for r in u.results)):
                return True
        return False


def _root(p: Program, name: str) -> str:
    made = p.producers.get(name)
    while made is not None and made.target in VIEWS and made.target != "wait" and made.refs:
        name = made.refs[0].name
        made = p.producers.get(name)
    return name
