"""What each stage may compute for itself, and where a parameter is at home: helpers of ``cut_stages``.

A value made of inputs that every stage has (batch, constants, hyper-parameters, counters of random numbers) or of stored parameters
alone (casts, gathers) is *free*: each stage that uses it computes its own. All other ops stand on one stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from deepseed.ir.program import Op, Program
from deepseed.ir.schedule import loop_of, order_of

STORED = ("param", "buffer", "state")  # roles of inputs that are on one stage
_EVERYWHERE, _PARAM, _BUFFER, _BOUND = 1, 2, 4, 8  # what a value is made of


@dataclass(frozen=True)
class Kinds:
    """``free``: values that each stage makes for itself; ``stored``: by value, the parameters and buffers that it is made of, where it
    is free. ``loops``: how many loops the program has."""

    program: Program
    free: frozenset[str]
    stored: Mapping[str, frozenset[str]]
    loops: int

    @cached_property
    def glued(self) -> Mapping[str, str]:
        """A started collective is waited for on its own stage: wait -> start, by the ops' names."""
        starts = {op.name: op.name for op in self.program.ops if op.target.endswith(".start")}
        of = {r: op.name for op in self.program.ops if op.name in starts for r in op.results}
        return {op.name: of[op.refs[0].name] for op in self.program.ops if op.target == "wait"}

    @cached_property
    def parts(self) -> Mapping[str, Sequence[Op]]:
        """The ops that stand on one stage, by part, in order."""
        out: dict[str, list[Op]] = {}
        for op in self.program.ops:
            here = out.setdefault(op.part, [])
            if op.name not in self.free:
                here.append(op)
        return out

    def bound(self, part: str) -> Sequence[Op]:
        """The ops of a part that stand on one stage."""
        return self.parts.get(part, ())


def kinds(p: Program) -> Kinds:
    """Sort the values of a looped program: one sweep over its ops."""
    loops = max((loop_of(op.part) for op in p.ops), default=1)
    last = order_of(f"once.{loops}")
    made_of = {i.name: {"param": _PARAM, "buffer": _BUFFER, "state": _BOUND}.get(i.role, _EVERYWHERE) for i in p.inputs}
    stored: dict[str, frozenset[str]] = {i.name: frozenset({i.name}) for i in p.inputs if i.role in STORED}
    free = {i.name for i in p.inputs}
    none: frozenset[str] = frozenset()
    for op in p.ops:
        mask = 0
        for ref in op.refs:
            mask |= made_of[ref.name]
        if (mask & _PARAM and mask & _EVERYWHERE) or (mask & (_PARAM | _BUFFER) and order_of(op.part) == last):
            mask |= _BOUND
        made_of.update(dict.fromkeys(op.results, mask))
        if not mask & _BOUND:
            free.update(op.results)
            roots = none.union(*(stored[r.name] for r in op.refs if r.name in stored))
            if roots:
                stored.update(dict.fromkeys(op.results, roots))
    return Kinds(p, frozenset(free), stored, loops)


def owners(p: Program, part: str) -> Mapping[str, str]:
    """For the ops and operands of the epilogue ``part``: the key of the one parameter whose update they belong to."""
    keys = {i.key for i in p.inputs if i.role == "param"}

    def key_of(role: str, key: str) -> str:
        own = key.partition("/")[2] if role == "state" else key
        return own if own in keys else ""

    found: dict[str, str | None] = {}  # value -> key; None: of several parameters

    def note(value: str, key: str | None) -> None:
        if key != "":
            found[value] = key if found.setdefault(value, key) == key else None

    inputs = {i.name: key_of(i.role, i.key) for i in p.inputs if i.role in ("param", "state")}
    for o in p.outputs:
        if o.role in ("param", "state", "grad"):
            note(o.ref.name, key_of(o.role, o.key))
    for op in reversed(p.ops):
        if op.part == part:
            own = {inputs[r.name] for r in op.refs if inputs.get(r.name)}
            of = own or {key for r in op.results if (key := found.get(r))}
            key = of.pop() if len(of) == 1 else ""
            for r in op.results:
                found[r] = key
            for ref in op.refs:
                note(ref.name, key)
    return {value: key for value, key in found.items() if key}

