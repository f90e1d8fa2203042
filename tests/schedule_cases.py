"""Schedules, messages and times for the tests of schedules and of timelines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from hypothesis import strategies as st

from deepseed.ir.messages import Item, Message, Place, chain, receives
from deepseed.ir.schedule import Instruction, Schedule
from deepseed.solver.schedules import NAMES, lanes

CASES = [("gpipe", 3, 4, 1), ("1f1b", 4, 6, 1), ("interleaved", 2, 5, 2), ("interleaved", 3, 6, 2), ("zb", 3, 5, 1)]


def equal_stages(s: Schedule) -> dict[Place, float]:
    """Forward 1, backward 2; in zb backward is 1 for the inputs and 1 for the weights."""
    split = s.name == "zb"
    kinds = {"forward": 1.0, "backward": 1.0 if split else 2.0} | ({"weights": 1.0} if split else {})
    return {(f"{kind}.{s.loops}", stage): value for kind, value in kinds.items() for stage in range(s.stages)}


def norm(s: Schedule) -> dict[str, Message]:
    """A gradient norm: each stage's summand to stage 0, the sum back to each."""
    part = f"once.{s.loops}"
    there: dict[str, Message] = {f"square.{k}": ((part, k), (part, 0)) for k in range(1, s.stages)}
    return there | {f"norm.{k}": ((part, 0), (part, k)) for k in range(1, s.stages)}


def with_lane(s: Schedule, lane: int, program: tuple[Instruction, ...]) -> Schedule:
    return replace(s, lanes=(*s.lanes[:lane], program, *s.lanes[lane + 1 :]))


def received(s: Schedule, messages: Mapping[str, Message]) -> dict[tuple[int, int], list[Item]]:
    out: dict[tuple[int, int], list[Item]] = {}
    for lane in range(len(s.lanes)):
        for items in receives(s, lane, messages):
            for name, microbatch in items:
                out.setdefault((s.lane_of(messages[name][0][1]), lane), []).append((name, microbatch))
    return out


@st.composite
def scheduled(draw: st.DrawFn) -> tuple[Schedule, dict[str, Message]]:
    """Any schedule, with the messages of a pipeline and others that a cut may make: skips, late uses, tied weights, norms."""
    name = draw(st.sampled_from(NAMES))
    p, m, v = draw(st.integers(1, 6)), draw(st.integers(1, 13)), draw(st.integers(1, 3)) if name == "interleaved" else 1
    loops = draw(st.integers(1, 3))
    s = lanes(name, p, m, v, loops)
    messages: dict[str, Message] = {f"{n}.{q}": message for q in range(1, loops + 1) for n, message in chain(s.stages, q).items()}
    stages = st.integers(0, s.stages - 1)
    for n in range(draw(st.integers(0, 5))):
        low, high = sorted((draw(stages), draw(stages)))
        q = draw(st.integers(1, loops))
        kinds: list[Message] = [((f"backward.{q}", high), (f"once.{q}", low)), ((f"once.{q - 1}", high), (f"forward.{q}", low)), ((f"once.{q}", low), (f"once.{q}", high))]
        kinds += [((f"once.{q}", high), (f"once.{q}", low)), ((f"forward.{q}", high), (f"backward.{q}", low)), ((f"forward.{q}", low), (f"backward.{q}", high))]
        if low < high:
            kinds += [((f"forward.{q}", low), (f"forward.{q}", high)), ((f"backward.{q}", high), (f"backward.{q}", low))]
        messages[f"more.{n}"] = draw(st.sampled_from(kinds))
    return s, messages
