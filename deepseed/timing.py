"""A schedule in simulated time: how long the step takes, how long ranks idle, what each stage holds, what crosses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deepseed.boundaries import boundaries
from deepseed.counts import local_flops, repeated
from deepseed.idle import idle_share
from deepseed.ir.messages import Message, Place, home, messages_of
from deepseed.ir.program import Op, Program
from deepseed.ir.schedule import Schedule, kind_of
from deepseed.solver.schedules import in_flight
from deepseed.speed import Course, Machine, course
from deepseed.timeline import Timeline, simulate


@dataclass(frozen=True)
class Timing:
    """What ``explain`` says of a schedule. Times are of the cost model (deepseed.speed), counts are of the program."""

    name: str
    stages: int
    microbatches: int
    loops: int  # over the microbatches: more than one where values of all of them are needed before the rest can go on
    repeated: float  # the share of the loops' matmul flops that a later loop computes again
    bubble_share: float  # of the step in which a rank is idle
    bubble_share_equal: float  # the same where all stages take as long and nothing else is done
    step_seconds: float
    in_flight: tuple[int, ...]  # most microbatches held, by stage
    boundaries: Sequence[Mapping[str, Sequence[str]]]  # values that cross, by boundary: forward and backward in each microbatch, once a step


@dataclass(frozen=True)
class Run:
    """``ran``: each part of each stage, one microbatch; ``messages`` between lanes, with their bytes."""

    ran: Mapping[Place, Course]
    messages: Mapping[str, Message]
    sizes: Mapping[str, int]
    timeline: Timeline


def run_schedule(p: Program, machine: Machine) -> Run:
    """The scheduled program ``p`` in simulated time."""
    schedule = p.schedule
    assert schedule is not None
    ran = {place: course(p, group, machine) for place, group in by_place(p, schedule).items()}
    messages = {name: m for name, m in messages_of(p).items() if schedule.lane_of(m[0][1]) != schedule.lane_of(m[1][1])}
    sizes = {name: p.types[name].local_bytes(p.mesh) for name in messages}
    return Run(ran, messages, sizes, simulate(schedule, {place: c.seconds for place, c in ran.items()}, messages, sizes, machine.link, machine.latency))


def timing(p: Program, machine: Machine) -> Timing:
    """Of a scheduled program."""
    s = p.schedule
    assert s is not None
    timeline = run_schedule(p, machine).timeline
    flops, again = {op.name: local_flops(p, op) for op in p.ops if kind_of(op.part) != "once"}, repeated(p)
    return Timing(
        s.name, s.stages, s.microbatches, s.loops, sum(n for name, n in flops.items() if name in again) / max(1, sum(flops.values())), timeline.bubble_share,
        idle_share(s.name, len(s.lanes), s.microbatches, s.stages // len(s.lanes)), timeline.step_seconds, tuple(in_flight(s)), boundaries(p),
    )  # fmt: skip


def by_place(p: Program, schedule: Schedule) -> dict[Place, list[Op]]:
    """The ops of each instruction: of a part and stage; what runs once, of all stages of a rank together."""
    out: dict[Place, list[Op]] = {}
    for op in p.ops:
        out.setdefault(home(schedule, (op.part, op.stage)), []).append(op)
    return out
