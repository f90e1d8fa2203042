"""What crosses between pipeline ranks, in which order: the sends and the receives of each lane of a schedule.

A message is one value made at one place (part, stage) and first used at another. Inside a loop it goes once a microbatch; from
``once.q`` into a loop it goes once, ahead of the first use; out of a loop into ``once.q`` (an accumulator) once, after the last microbatch.
A lane runs all its stages' ops of ``once.q`` as ONE instruction, in the order of the program: each waits for what stands before it in the
program and no more, whichever stages they are on, so a norm may cross to and fro within ``once.q``.

Sends are asynchronous and leave when the value is made: by instruction, then in the order of ``messages``, which is the order of the program.
Receives of one pair of ranks are posted in the order in which they were sent, so no tags are needed: before an instruction, all up to the last one
that it needs.
"""

from __future__ import annotations

from collections.abc import Mapping

from deepseed.ir.program import Program
from deepseed.ir.schedule import Instruction, Schedule, kind_of

TRANSFER = "transfer"  # the op whose result is its operand on another stage

Place = tuple[str, int]  # part, stage
Message = tuple[Place, Place]  # where it is made; where it is first used
Item = tuple[str, int]  # name, microbatch (0 where it goes once)


def messages_of(p: Program) -> dict[str, Message]:
    """A message for every op ``transfer`` of a staged program, in the order of the program: made and received in the op's part, on its ``source``
    and on its stage. Transfers between stages of one lane are in it; they order instructions and send nothing."""
    out: dict[str, Message] = {}
    for op in p.ops:
        if op.target == TRANSFER:
            source = op.kw("source")
            if not isinstance(source, int):
                raise ValueError(f"%{op.name} = {TRANSFER} has the source {source!r}, and needs the number of a stage")
            out[op.name] = (op.part, source), (op.part, op.stage)
    return out


def chain(stages: int, loop: int = 1) -> dict[str, Message]:
    """The messages of a plain pipeline: one activation forward and one gradient backward a boundary.

    >>> chain(2)
    {'x.1': (('forward.1', 0), ('forward.1', 1)), 'g.0': (('backward.1', 1), ('backward.1', 0))}
    """
    out: dict[str, Message] = {f"x.{s + 1}": ((f"forward.{loop}", s), (f"forward.{loop}", s + 1)) for s in range(stages - 1)}
    out |= {f"g.{s}": ((f"backward.{loop}", s + 1), (f"backward.{loop}", s)) for s in reversed(range(stages - 1))}
    return out


def runs_once(part: str) -> bool:
    return kind_of(part) == "once"


def home(schedule: Schedule, place: Place) -> Place:
    """The place as instructions name it: what runs once stands on the lane, not on one of its stages."""
    part, stage = place
    return (part, schedule.lane_of(stage)) if runs_once(part) else place


def within_once(message: Message) -> bool:
    """Do both ends stand in the same ``once.q``? Then only the order of the program counts, not that of the instructions."""
    (source, _), (target, _) = message
    return source == target and runs_once(source)


def sends(schedule: Schedule, lane: int, messages: Mapping[str, Message]) -> list[tuple[Item, ...]]:
    """For each instruction of the lane what it sends to other lanes, in order."""
    made = _by_place(schedule, messages, 0)
    program = schedule.lanes[lane]
    last = {(i.part, i.stage): n for n, i in enumerate(program)}
    out: list[tuple[Item, ...]] = []
    for n, i in enumerate(program):
        items: list[Item] = []
        for name in made.get((i.part, i.stage), ()):
            (source, _), (target, stage) = messages[name]
            if schedule.lane_of(stage) != lane and (runs_once(source) or not runs_once(target) or last[i.part, i.stage] == n):
                items.append((name, 0 if runs_once(target) else i.microbatch))
        out.append(tuple(items))
    return out


def needs(schedule: Schedule, lane: int, messages: Mapping[str, Message]) -> list[tuple[Item, ...]]:
    """For each instruction of the lane what it is the first to use of what other lanes send."""
    used = _by_place(schedule, messages, 1)
    out: list[tuple[Item, ...]] = []
    here: set[str] = set()  # values that come once, once they came
    for i in schedule.lanes[lane]:
        items: list[Item] = []
        for name in used.get((i.part, i.stage), ()):
            (source, stage), (target, _) = messages[name]
            if schedule.lane_of(stage) == lane or name in here:
                continue
            if runs_once(source) and not runs_once(target):
                here.add(name)
            items.append((name, 0 if runs_once(source) else i.microbatch))
        out.append(tuple(items))
    return out


def queues(schedule: Schedule, messages: Mapping[str, Message]) -> dict[tuple[int, int], list[Item]]:
    """All that one lane sends to another in a step, in order, by (sender, receiver)."""
    lane_of = {name: schedule.lane_of(stage) for name, (_, (_, stage)) in messages.items()}
    out: dict[tuple[int, int], list[Item]] = {}
    for lane in range(len(schedule.lanes)):
        for items in sends(schedule, lane, messages):
            for item in items:
                out.setdefault((lane, lane_of[item[0]]), []).append(item)
    return out


def receives(schedule: Schedule, lane: int, messages: Mapping[str, Message]) -> list[tuple[Item, ...]]:
    """For each instruction of the lane the receives to post before it, per sending rank in the order in which that rank sends. Raises ValueError
    naming a value that is used but not sent."""
    mine = {name: message for name, message in messages.items() if schedule.lane_of(message[1][1]) == lane}
    sent = {source: items for (source, _), items in queues(schedule, mine).items()}
    place = {item: (source, n) for source, items in sent.items() for n, item in enumerate(items)}
    posted = dict.fromkeys(sent, 0)
    out: list[tuple[Item, ...]] = []
    for i, needed in zip(schedule.lanes[lane], needs(schedule, lane, messages), strict=True):
        upto = dict(posted)
        for item in needed:
            if item not in place:
                raise ValueError(f"lane {lane} needs %{item[0]} of microbatch {item[1]} for {i.part} of stage {i.stage}, and no lane sends it")
            source, n = place[item]
            upto[source] = max(upto[source], n + 1)
        out.append(tuple(item for source, items in sent.items() for item in items[posted[source] : upto[source]]))
        posted = upto
    return out


def instructions_at(schedule: Schedule, place: Place) -> list[Instruction]:
    """The instructions of a place: one, or one a microbatch."""
    part, stage = home(schedule, place)
    return [Instruction(part, stage, n) for n in range(1 if runs_once(part) else schedule.microbatches)]


def _by_place(schedule: Schedule, messages: Mapping[str, Message], end: int) -> dict[Place, list[str]]:
    out: dict[Place, list[str]] = {}
    for name, message in messages.items():
        out.setdefault(home(schedule, message[end]), []).append(name)
    return out
