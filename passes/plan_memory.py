"""What the backward reads of the forward is kept, or computed again: the least time for the bytes that may be kept.

Which, deepseed.solver.remat chooses. What is not kept is computed again just before the backward first reads it, from what is kept, as the same
ops with the same arguments: the same bits, and the same random draws. Of what depends on parameters alone the backward has its own casts and
gathers already, which are pulled forward to where a value that runs again needs them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from deepseed.ir.contract import PassError, program_pass
from deepseed.ir.program import Arg, Builder, Op, Program, Ref
from deepseed.passes.weights_per_phase import gathered_once, read
from deepseed.solver.between import Between
from deepseed.solver.remat import GATHERS, choose

_MOVES = ("wait", "shard", "summand")
AGAIN = ".again"  # the end of the names of what the backward computes again


@program_pass(requires={"lowered"}, provides={"budgeted"})
def plan_memory(p: Program, saved: float = 1.0, every: int = 0, gathers: str = "again") -> Program:
    """Let the backward compute again what is not kept for it.

    ``every``: the input of every ``every``-th layer is kept, 0: of none. ``saved``: of the other bytes that the backward reads, the part that
    may be kept; 1.0 and no ``every`` leave the program as it is. ``gathers``: of parameters, ``again`` in the backward, ``kept`` from the
    forward, or whichever is cheaper (``solve``); ``once``: for the step, microbatches or not. Raises PassError on arguments that are none of these.

    before: %x : f32[64, 64] batch "x"
            %h = aten.exp(%x) : f32[64, 64]
            %y = aten.exp(%h) : f32[64, 64]
            %d = aten.mul.Tensor(%y, %h) : f32[64, 64] {phase="backward"}
    after, saved=0:
            %x : f32[64, 64] batch "x"
            %h.again = aten.exp(%x) : f32[64, 64] {phase="backward"}
            %y.again = aten.exp(%h.again) : f32[64, 64] {phase="backward"}
            %d = aten.mul.Tensor(%y.again, %h.again) : f32[64, 64] {phase="backward"}
    """
    if not 0.0 <= saved <= 1.0 or every < 0 or gathers not in (*GATHERS, "once"):
        raise PassError(f"saved={saved}, every={every}, gathers={gathers!r}, pass plan_memory\n  fix: saved from 0 to 1, every 0 or more, gathers one of {', '.join(GATHERS)}, once")
    once = gathers == "once"
    if (saved, every, gathers) not in ((1.0, 0, "again"), (1.0, 0, "once")):
        b = Between(p)
        p = _Again(b, choose(b, saved, every, "again" if once else gathers).kept).run()
    return gathered_once(p) if once else p


class _Again:
    """Writes the program in which the backward reads ``kept`` storages of the forward only."""

    def __init__(self, b: Between, kept: frozenset[str]) -> None:
        self.b, self.p, self.kept = b, b.p, kept | b.inputs
        self.out = Builder(self.p)
        self.there = {i.name for i in self.p.inputs}  # values that are emitted
        self.made: dict[str, str] = {}  # a value of the forward -> the backward's own
        self.groups: dict[str, list[Op]] = {}  # origin -> its members in the backward
        self.forward_of = {own: value for value, own in b.again.items() if b.storage[value] in kept}

    def run(self) -> Program:
        for op in self.p.ops:
            if op.name in self.there:
                continue  # pulled forward
            if op.phase == "backward":
                op = op.map_refs(lambda ref: Ref(self._read(self.forward_of.get(ref.name, ref.name))))
                self._emit(op)
                if op.origin in self.out.origins:
                    self.groups.setdefault(op.origin, []).append(op)
            else:
                self._emit(op)
        producers = {r: op for op in self.out.ops for r in op.results}
        self.out.origins.update({key: self._group(key, producers) for key in self.groups})
        return read(self.out.program())  # of the forward not what only the backward read, of the backward not its own gathers where it reads the forward's

    def _emit(self, op: Op) -> None:
        self.out.emit(op)
        self.there.update(op.results)

    def _read(self, value: str, inside: str = "") -> str:
        """``value`` for the backward; ``inside``: for an op of this origin group, whose members all run again."""
        if not self._lost(value, inside):
            return value
        if value not in self.made:
            own = self.b.again.get(value)
            if own is not None:
                self._pull(own)
                self.made[value] = own
            else:
                self._run_again(value)
        return self.made[value]

    def _lost(self, value: str, inside: str) -> bool:
        """Whether a value of the forward is not kept."""
        op = self.p.producers.get(value)
        if op is None or op.phase != "forward":
            return False
        return bool(inside and op.origin == inside) or self.b.storage[value] not in self.kept

    def _run_again(self, value: str) -> None:
        """The op that makes ``value``, and before it, in the forward's order, those whose values it reads that are not there."""
        ops: dict[int, Op] = {}
        pending = [value]
        while pending:
            op = self.p.producers[pending.pop()]
            n = self.b.position[op.name]
            if n not in ops and op.name not in self.made:
                ops[n] = op
                pending += [r.name for r in op.refs if self._lost(r.name, op.origin) and r.name not in self.b.again]
        for n in sorted(ops):
            self._clone(ops[n])

    def _pull(self, value: str) -> None:
        """Emit an op of the backward, which depends on parameters alone, before its turn."""
        op = self.p.producers.get(value)
        if op is not None and op.name not in self.there:
            for ref in op.refs:
                self._pull(ref.name)
            self._emit(op)

    def _clone(self, op: Op) -> None:
        copy = op.map_refs(lambda ref: Ref(self._read(ref.name, op.origin)))
        names = tuple(self.out.fresh(r + AGAIN) for r in op.results)
        self.made.update(zip(op.results, names, strict=True))
        copy = replace(copy, results=names, phase="backward", origin=op.origin + AGAIN if op.origin in self.out.origins else "")
        self._emit(copy)
        if copy.origin:
            self.groups.setdefault(copy.origin, []).append(copy)

    def _group(self, key: str, producers: Mapping[str, Op]) -> Op:
        """The op that the members of a group in the backward are, on the values that they read now. Members that run again are a group of
        their own."""
        first = key.removesuffix(AGAIN) if key not in self.out.origins else key
        whole = self.out.origins[first]
        read = _sources(self.groups[key], producers)

        def operand(ref: Ref) -> Arg:
            own = self.made.get(ref.name, ref.name)
            return Ref(own if own in read else ref.name)

        whole = whole.map_refs(operand)
        if first == key:
            return whole
        return replace(whole, results=tuple(self.made[r] if r in self.made else self.out.fresh(r + AGAIN) for r in whole.results), phase="backward")


def _sources(ops: Sequence[Op], producers: Mapping[str, Op]) -> set[str]:
    """The values that ``ops`` read, and those of which these are other layouts."""
    found: set[str] = set()
    pending = [r.name for op in ops for r in op.refs]
    while pending:
        name = pending.pop()
        if name not in found:
            found.add(name)
            op = producers.get(name)
            if op is not None and (op.target in _MOVES or op.target.endswith(".start")):
                pending.append(op.refs[0].name)
    return found
