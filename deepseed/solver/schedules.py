"""Pipeline schedules: what each rank runs, in order, as data; and the proof that a schedule runs to its end within its memory.

``gpipe`` runs all forwards, then all backwards (Huang et al. 2019). ``1f1b`` starts backward as soon as it can (Narayanan et al. 2019, PipeDream-flush):
rank k holds p - k microbatches at most. ``interleaved`` gives each rank v stages, p apart (Narayanan et al. 2021); its formula deadlocks where p does
not divide m, so the next multiple is laid out and the microbatches that do not exist are struck out: what is left of an order without a
cycle has none. ``zb`` is ZB-H1 (Qi et al. 2023): 1f1b with the weight gradients of a microbatch put off by k backwards on rank k, into the bubble.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from deepseed.ir.messages import Item, Message, Place, home, instructions_at, queues, receives, runs_once, within_once
from deepseed.ir.schedule import Instruction, Schedule, format_instruction, kind_of, loop_of, order_of

if TYPE_CHECKING:
    import networkx as nx  # 11 MB of a rank's memory, for checks of pipelines alone

NAMES = ("gpipe", "1f1b", "interleaved", "zb")
Step = tuple[str, int, int]  # kind, chunk (0 .. v - 1, the how manieth stage of the rank), microbatch


class ScheduleError(ValueError):
    """A schedule that cannot be made or must not run: says which instruction of which lane, and why."""


# making ---------------------------------------------------------------------------------------------------------------


def lanes(name: str, p: int, m: int, v: int = 1, loops: int = 1, parts: Collection[Place] | None = None) -> Schedule:
    """The schedule ``name`` of ``m`` microbatches over ``p`` ranks with ``v`` stages each (1 but for interleaved): the last loop as named, those before it all
    forwards and then all backwards. ``parts``: the (part, stage) that have ops, all others are left out; None: every part, weights only in zb.
    What runs once is one instruction a lane, for all of its stages. Raises ScheduleError on numbers that make no schedule."""
    if name not in NAMES:
        raise ScheduleError(f"no schedule is called {name!r}\n  fix: use one of {', '.join(NAMES)}")
    for what, number in (("pipeline ranks", p), ("microbatches", m), ("stages a rank", v), ("loops", loops)):
        if number < 1:
            raise ScheduleError(f"{name} with {number} {what}: at least 1 is needed\n  fix: use 1 or more")
    if v > 1 and name not in ("gpipe", "interleaved"):
        raise ScheduleError(f"{name} runs 1 stage a rank, not {v}\n  fix: use interleaved{v}, or {p} stages")
    stages = p * v
    there = _every_part(stages, loops, name == "zb") if parts is None else set(parts)
    if strays := sorted(stage for _, stage in there if not 0 <= stage < stages):
        raise ScheduleError(f"a part stands on stage {strays[0]}, and {name} of {p} ranks with {v} stages each has the stages 0 .. {stages - 1}")
    schedule = Schedule(name, stages, m, loops, ((),) * p)
    there = {home(schedule, place) for place in there}
    made = tuple(tuple(i for i in _lane(schedule, k, p, v) if (i.part, i.stage) in there) for k in range(p))
    return Schedule(name, stages, m, loops, made)


def _every_part(stages: int, loops: int, weights: bool) -> set[Place]:
    looped = {f"{kind}.{loop}" for kind in ("forward", "backward") for loop in range(1, loops + 1)}
    names = looped | {f"once.{q}" for q in range(loops + 1)} | ({f"weights.{loops}"} if weights else set())
    return {(part, stage) for part in names for stage in range(stages)}


def _lane(schedule: Schedule, k: int, p: int, v: int) -> Iterator[Instruction]:
    """All that rank k could run, in order."""
    m = schedule.microbatches
    main = {"gpipe": _gpipe, "1f1b": _one_forward_one_backward, "interleaved": _interleaved, "zb": _zero_bubble}[schedule.name]
    yield Instruction("once.0", k)
    for loop in range(1, schedule.loops + 1):
        steps = main(k, p, m, v) if loop == schedule.loops else _gpipe(k, p, m, v)
        for kind, chunk, microbatch in steps:
            if microbatch < m:
                yield Instruction(f"{kind}.{loop}", k + chunk * p, microbatch)
        yield Instruction(f"once.{loop}", k)


def _gpipe(k: int, p: int, m: int, v: int) -> Iterator[Step]:
    for chunk in range(v):
        for i in range(m):
            yield "forward", chunk, i
    for chunk in reversed(range(v)):
        for i in range(m):
            yield from _backward(chunk, i)


def _one_forward_one_backward(k: int, p: int, m: int, v: int) -> Iterator[Step]:
    ahead = p - k - 1
    yield from (("forward", 0, i) for i in range(min(ahead, m)))
    for i in range(m):
        if i + ahead < m:
            yield "forward", 0, i + ahead
        yield from _backward(0, i)


def _zero_bubble(k: int, p: int, m: int, v: int) -> Iterator[Step]:
    for kind, chunk, i in _one_forward_one_backward(k, p, m, v):
        if kind != "weights":
            yield kind, chunk, i
        elif i >= k:
            yield kind, chunk, i - k
    yield from (("weights", 0, i) for i in range(max(m - k, 0), m))


def _interleaved(k: int, p: int, m: int, v: int) -> Iterator[Step]:
    total = -(-m // p) * p * v  # the next multiple; the caller strikes out what is not there

    def turn(i: int) -> tuple[int, int]:
        """The i-th chunk and microbatch: p microbatches through one chunk, then the same p through the next."""
        group, rest = divmod(i, p * v)
        return rest // p, group * p + rest % p

    ahead = min(2 * (p - k - 1) + (v - 1) * p, total)
    yield from (("forward", *turn(i)) for i in range(ahead))
    for i in range(total):
        if i + ahead < total:
            yield ("forward", *turn(i + ahead))
        chunk, microbatch = turn(i)
        yield from _backward(v - 1 - chunk, microbatch)


def _backward(chunk: int, i: int) -> Iterator[Step]:
    yield "backward", chunk, i
    yield "weights", chunk, i


# checking -------------------------------------------------------------------------------------------------------------


def check(schedule: Schedule, messages: Mapping[str, Message], parts: Collection[Place] = ()) -> None:
    """Raises ScheduleError unless every instruction of ``parts``, of ``messages`` and of the lanes runs exactly once, on its lane; no instruction waits for itself,
    with asynchronous sends; each rank receives from each other exactly what that one sends, in the same order; and the microbatches held stay
    within the bound of the schedule's kind."""
    _check_complete(schedule, {*parts, *(place for message in messages.values() for place in message)})
    _check_deadlock(schedule, messages)
    _check_pairs(schedule, messages)
    _check_bound(schedule)


def in_flight(schedule: Schedule) -> tuple[int, ...]:
    """The most microbatches that each stage holds in the last loop: forward has run, and the last of backward and weights that it has not yet."""
    return _most_held(schedule, lambda i, _: i.stage, schedule.stages)


def chunks_in_flight(schedule: Schedule) -> tuple[int, ...]:
    """The same by lane, over all of its stages."""
    return _most_held(schedule, lambda _, lane: lane, len(schedule.lanes))


def _say(schedule: Schedule, i: Instruction) -> str:
    lane = schedule.lane_of(i.stage)
    return f"{format_instruction(i, lane, schedule.loops)} of lane {lane}"


def _check_complete(schedule: Schedule, parts: Collection[Place]) -> None:
    for lane, program in enumerate(schedule.lanes):
        for i in program:
            if not 0 <= i.stage < schedule.stages or schedule.lane_of(i.stage) != lane:
                owner = f"lane {schedule.lane_of(i.stage)} of {len(schedule.lanes)}"
                raise ScheduleError(f"{schedule.name}: lane {lane} runs {i.part} of stage {i.stage}, which {owner} runs")
    counts = Counter(i for program in schedule.lanes for i in program)
    want = {home(schedule, place) for place in parts} | {(i.part, i.stage) for i in counts}
    wanted = [i for place in sorted(want) for i in instructions_at(schedule, place)]
    for i in wanted:
        if counts[i] != 1:
            fix = f"each part of a stage runs exactly once for each of the {schedule.microbatches} microbatches"
            raise ScheduleError(f"{schedule.name}: {_say(schedule, i)} runs {counts[i]} times\n  fix: {fix}")
    if strays := counts.keys() - set(wanted):
        i = min(strays, key=lambda i: (i.part, i.stage, i.microbatch))
        raise ScheduleError(f"{schedule.name}: {_say(schedule, i)} is of microbatch {i.microbatch}, and there are {1 if runs_once(i.part) else schedule.microbatches}")


def graph(schedule: Schedule, messages: Mapping[str, Message]) -> nx.DiGraph:
    """Which instruction waits for which: an edge, labelled ``why``, from the one that must end to the one that waits: the lane's order, the parts of a
    microbatch on one stage, and the messages."""
    import networkx as nx

    out = nx.DiGraph()
    for program in schedule.lanes:
        out.add_nodes_from(program)
        out.add_edges_from(pairwise(program), why="")
        by_stage: dict[int, set[str]] = {}
        for i in program:
            by_stage.setdefault(i.stage, set()).add(i.part)
        lane_parts = {part for parts in by_stage.values() for part in parts if runs_once(part)}
        for stage, found in by_stage.items():
            parts = sorted({part for part in found if not runs_once(part)} | lane_parts, key=order_of)
            for before, after in pairwise(parts):
                if loop_of(before) == loop_of(after) or runs_once(before):
                    out.add_edges_from(_pairs(schedule, ((before, stage), (after, stage))), why=f"{before} of its stage")
    for name, message in messages.items():
        if not within_once(message):
            out.add_edges_from(_pairs(schedule, message), why=f"%{name}")
    return out


def _pairs(schedule: Schedule, message: Message) -> Iterator[tuple[Instruction, Instruction]]:
    source, target = (instructions_at(schedule, place) for place in message)
    if runs_once(message[0][0]) or runs_once(message[1][0]):
        yield from ((a, b) for a in source for b in target)
    else:
        yield from zip(source, target, strict=True)


def _check_deadlock(schedule: Schedule, messages: Mapping[str, Message]) -> None:
    import networkx as nx

    waits = graph(schedule, messages)
    if nx.is_directed_acyclic_graph(waits):
        return
    ring: list[tuple[Instruction, Instruction, str]] = []
    for a, b in reversed(list(nx.find_cycle(waits))):  # b waits for a
        why = waits.edges[a, b]["why"]
        if ring and not why and not ring[-1][2]:  # the order of one lane: from its last to its first
            ring[-1] = (a, ring[-1][1], "")
        else:
            ring.append((a, b, why))
    said = [f"{_say(schedule, b)} waits for {_say(schedule, a)}" + (f" ({why})" if why else "") for a, b, why in ring]
    names = ", ".join(str(lane) for lane in sorted({schedule.lane_of(b.stage) for _, b, _ in ring}))
    many = f"\n  and {len(said) - 12} more" if len(said) > 12 else ""
    raise ScheduleError(
        f"{schedule.name} of {len(schedule.lanes)} ranks and {schedule.microbatches} microbatches deadlocks: "
        f"{len(ring)} instructions of the lanes {names} wait for one another\n  " + "\n  ".join(said[:12]) + many + "\n  fix: take the lanes from deepseed.solver.schedules.lanes, or put the instruction that waits behind what it waits for"
    )


def check_traffic(sent: Mapping[tuple[int, int], Sequence[Item]], received: Mapping[tuple[int, int], Sequence[Item]], name: str) -> None:
    """Raises ScheduleError unless what each (sender, receiver) pair of lanes sends and receives is the same list, each item once."""
    for pair in sorted(sent.keys() | received.keys()):
        out, got = list(sent.get(pair, ())), list(received.get(pair, ()))
        for what, items in (("sends", out), ("receives", got)):
            item, count = max(Counter(items).items(), key=lambda entry: entry[1], default=(("", 0), 0))
            if count > 1:
                said = f"{name}: lane {pair[what == 'receives']} {what} %{item[0]} of microbatch {item[1]} {count} times"
                raise ScheduleError(f"{said}\n  fix: each value crosses once to each stage that uses it")
        if out != got:
            n = next((n for n, (a, b) in enumerate(zip(out, got, strict=False)) if a != b), min(len(out), len(got)))
            a, b = (f"%{x[n][0]} of microbatch {x[n][1]}" if n < len(x) else "nothing" for x in (out, got))
            raise ScheduleError(
                f"{name}: lane {pair[0]} sends {len(out)} values to lane {pair[1]}, which receives {len(got)}: number {n} is {a} sent and {b} received\n"
                "  fix: post the receives of deepseed.ir.messages.receives, in that order"
            )


def _check_pairs(schedule: Schedule, messages: Mapping[str, Message]) -> None:
    source_of = {name: schedule.lane_of(stage) for name, ((_, stage), _) in messages.items()}
    received: dict[tuple[int, int], list[Item]] = {}
    for lane in range(len(schedule.lanes)):
        for items in receives(schedule, lane, messages):
            for item in items:
                received.setdefault((source_of[item[0]], lane), []).append(item)
    check_traffic(queues(schedule, messages), received, schedule.name)


def _most_held(schedule: Schedule, of: Callable[[Instruction, int], int], size: int) -> tuple[int, ...]:
    main = {(i.part, i.stage) for program in schedule.lanes for i in program if not runs_once(i.part) and i.loop == schedule.loops}
    ends: dict[int, str] = {}
    for part, stage in sorted(main, key=lambda place: order_of(place[0])):
        ends[stage] = part
    now, most = [0] * size, [0] * size
    for lane, program in enumerate(schedule.lanes):
        for i in program:
            if (i.part, i.stage) not in main:
                continue
            key = of(i, lane)
            now[key] += kind_of(i.part) == "forward"
            most[key] = max(most[key], now[key])
            now[key] -= ends[i.stage] == i.part and (f"forward.{i.loop}", i.stage) in main
    return tuple(most)


def _check_bound(schedule: Schedule) -> None:
    p, v = len(schedule.lanes), schedule.stages // len(schedule.lanes)
    for n, held, bound, what in _bounds(schedule, p, v):
        if held > bound:
            raise ScheduleError(
                f"{schedule.name}: {what} {n} holds {held} microbatches, and {schedule.name} of {p} ranks holds at most {bound} there\n"
                "  fix: run a backward before the forward that goes over, or name the schedule gpipe, which holds all"
            )


def _bounds(schedule: Schedule, p: int, v: int) -> Iterable[tuple[int, int, int, str]]:
    """(number, held, bound, stage or lane) of each place that the schedule's kind bounds."""
    if schedule.name == "interleaved":
        return [(k, held, 2 * (p - k - 1) + (v - 1) * p + 1, "lane") for k, held in enumerate(chunks_in_flight(schedule))]
    most = [{"1f1b": p - k, "zb": p}.get(schedule.name, schedule.microbatches) for k in range(schedule.stages)]
    return [(k, held, most[k], "stage") for k, held in enumerate(in_flight(schedule))]
