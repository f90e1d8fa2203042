"""Is every value of a looped and staged program there, when and where it is read? Called by ``deepseed.ir.verify``.

Invariants:
1. ops stand in the order of their parts; every stage is one of the schedule's;
2. a loop reads values of the same loop, of what runs once before it, or what an earlier loop added up; with microbatches, what is
   added up or collected over them is read after its loop only, and nothing else of a loop is read after it;
3. an op reads values of its own stage; ``transfer`` alone reads one of another stage, its ``source``; a stored parameter, buffer or state is on
   the stage of its input, and comes back there; all other inputs are everywhere.
"""

from __future__ import annotations

from deepseed.ir.collective import IN_TIME
from deepseed.ir.mesh import TIME
from deepseed.ir.program import Op, Program, ProgramError
from deepseed.ir.schedule import kind_of, loop_of, order_of

STORED = ("param", "buffer", "state")  # roles of inputs and outputs that are on one stage
KNOWN = ("once", "forward", "backward", "weights")


def check_staged(p: Program) -> None:
    """Raises ProgramError naming the op, the value, and the two parts or stages that disagree."""
    stages = p.schedule.stages if p.schedule is not None else 1
    timed = TIME in p.mesh.sizes
    made: dict[str, Op] = {}
    stored = {i.name: i for i in p.inputs if i.role in STORED}
    for i in stored.values():
        if not 0 <= i.stage < stages:
            raise ProgramError(f"input {i.role} {i.key!r} is stored on stage {i.stage}, and there are {stages}: 0 .. {stages - 1}")
    before = ""
    for op in p.ops:
        if op.part != before:
            _check_part(op, before)
            before = op.part
        if not 0 <= op.stage < stages:
            raise ProgramError(f"{_said(op)} stands on stage {op.stage}, and there are {stages}: 0 .. {stages - 1}")
        at = _reads_on(op)
        for ref in op.refs:
            maker, source = made.get(ref.name), stored.get(ref.name)
            if maker is not None:
                _check_time(op, maker, ref.name, timed)
            there = maker or source
            on = there.stage if there is not None else at
            if on != at:
                raise ProgramError(
                    f"{_said(op)} reads %{ref.name} on stage {at}, and it is on stage {on}" + (f": {_said(maker)}" if maker is not None else "")
                    + f"\n  fix: %{ref.name} crosses by transfer(%{ref.name}, source={on}) on stage {op.stage}, which the op reads instead"
                )  # fmt: skip
        made.update(dict.fromkeys(op.results, op))
    homes = {(i.role, i.key): i for i in stored.values()}
    for o in p.outputs:
        maker, home = made.get(o.ref.name), homes.get((o.role, o.key))
        if maker is not None and timed and kind_of(maker.part) != "once" and maker.target not in IN_TIME:
            raise ProgramError(f"output {o.role} {o.key!r} is %{o.ref.name} of {maker.part}, one value a microbatch: {_said(maker)}")
        there = maker or stored.get(o.ref.name)
        if home is not None and there is not None and home.stage != there.stage:
            raise ProgramError(f"output {o.role} {o.key!r} comes back on stage {there.stage}, and is stored on stage {home.stage}")


def _check_part(op: Op, before: str) -> None:
    """A part is known, and none comes after a later one."""
    kind, dot, loop = op.part.partition(".")
    if kind not in KNOWN or not dot or not loop.isdecimal():
        raise ProgramError(f"{_said(op)} has the part {op.part!r}; a part is once.N, forward.N, backward.N or weights.N")
    if before and order_of(op.part) < order_of(before):
        raise ProgramError(f"{_said(op)} of {op.part} stands after ops of {before}, which runs later")


def _reads_on(op: Op) -> int:
    """The stage of an op's operands."""
    if op.target != "transfer":
        return op.stage
    source = op.kw("source")
    if not isinstance(source, int) or isinstance(source, bool) or source == op.stage:
        raise ProgramError(f"{_said(op)} on stage {op.stage} has the source {source!r}; another stage is needed")
    return source


def _check_time(op: Op, maker: Op, value: str, timed: bool) -> None:
    """Whether the part of ``op`` may read what ``maker`` made in its part."""
    if kind_of(maker.part) == "once":
        return
    same = kind_of(op.part) != "once" and loop_of(op.part) == loop_of(maker.part)
    if timed and same and maker.target in IN_TIME:
        raise ProgramError(f"{_said(op)} of {op.part} reads %{value} of all microbatches, which is there after {maker.part} only")
    if not same and maker.target not in IN_TIME and (timed or kind_of(op.part) != "once"):
        where = f"{_said(op)} of {op.part} reads %{value} of {maker.part}, one value a microbatch, outside of its loop"
        raise ProgramError(f"{where}\n  fix: accumulate or collect it over {TIME}")


def _said(op: Op) -> str:
    return f"{', '.join(f'%{r}' for r in op.results)} = {op.target}" + (f" at {op.path}" if op.path else "") + (f" ({op.line})" if op.line else "")
