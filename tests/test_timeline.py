"""Schedules in simulated time, and their pictures."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_cases import CASES, equal_stages, norm, received, scheduled, with_lane

from deepseed.ir.mesh import Mesh
from deepseed.ir.messages import Message, chain, home, needs, queues, runs_once
from deepseed.ir.program import Program
from deepseed.ir.schedule import Schedule
from deepseed.ir.text import parse
from deepseed.solver.schedules import ScheduleError, check, graph, lanes
from deepseed.timeline import simulate
from deepseed.timeline_svg import draw


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_norm_crosses_to_and_fro_within_once(case: tuple[str, int, int, int]) -> None:
    s = lanes(*case)
    messages = {**chain(s.stages), **norm(s)}
    check(s, messages)
    t = simulate(s, {**equal_stages(s), **{("once.1", k): 4.0 for k in range(s.stages)}}, messages, dict.fromkeys(norm(s), 2), bandwidth=4.0, latency=0.25)
    looped = max(e.end for e in t.events if not runs_once(e.instruction.part))
    starts = {e.start for e in t.events if e.instruction.part == "once.1"}
    assert max(starts) == looped + 0.75  # all wait for the last lane, and for its message
    assert t.step_seconds == looped + 0.75 + 4.0 * s.stages / len(s.lanes)


def test_bytes_over_bandwidth_and_latency() -> None:
    """Two stages: a link carries one message at a time, and latency overlaps with the next message's bytes."""
    s = lanes("gpipe", 2, 3, parts={("forward.1", 0), ("forward.1", 1)})
    messages: dict[str, Message] = {"x": (("forward.1", 0), ("forward.1", 1))}
    t = simulate(s, {("forward.1", 0): 1.0, ("forward.1", 1): 1.0}, messages, {"x": 8}, bandwidth=4.0, latency=0.5)
    assert [(x.start, x.end) for x in t.transfers] == [(1.0, 3.5), (3.0, 5.5), (5.0, 7.5)]
    assert [(e.start, e.end) for e in t.events if e.lane == 1] == [(3.5, 4.5), (5.5, 6.5), (7.5, 8.5)]
    assert t.step_seconds == 8.5
    assert t.busy == (3.0, 3.0)
    assert t.bubble_share == 1 - 6 / 17


@settings(max_examples=150, deadline=None)
@given(scheduled(), st.randoms(use_true_random=False))
def test_every_schedule_runs_to_its_end(case: tuple[Schedule, dict[str, Message]], random: Random) -> None:
    s, messages = case
    check(s, messages)
    assert parse(str(program := Program("p", Mesh((("dp", 2),)), (), (), (), schedule=s))) == program
    assert received(s, messages) == queues(s, messages)
    places = {home(s, (i.part, i.stage)) for lane in s.lanes for i in lane}
    seconds = {place: random.uniform(0.5, 2) for place in sorted(places)}
    t = simulate(s, seconds, messages, {name: 1 + n for n, name in enumerate(messages)}, bandwidth=50.0, latency=0.01)
    assert [e.instruction for e in t.events] == [i for lane in s.lanes for i in lane]
    assert all(abs(e.end - e.start - seconds[e.instruction.part, e.instruction.stage]) < 1e-9 for e in t.events)
    assert all(a.lane != b.lane or a.end <= b.start for a, b in pairwise(t.events))
    when = {e.instruction: e for e in t.events}
    assert all(when[a].end <= when[b].start for a, b in graph(s, messages).edges)
    arrived = {(x.name, x.microbatch): x.end for x in t.transfers}
    for lane, program_of_lane in enumerate(s.lanes):
        for i, items in zip(program_of_lane, needs(s, lane, messages), strict=True):
            assert all(arrived[item] <= when[i].start for item in items if item in arrived)
    assert max(t.busy) <= t.step_seconds + 1e-9
    assert 0 <= t.bubble_share < 1


@settings(max_examples=100, deadline=None)
@given(scheduled(), st.data())
def test_what_the_check_lets_pass_runs_to_its_end(case: tuple[Schedule, dict[str, Message]], data: st.DataObject) -> None:
    """Two instructions of a lane swapped at random: a run that is stuck was refused, and only for a deadlock or for its memory."""
    s, messages = case
    lane = data.draw(st.integers(0, len(s.lanes) - 1))
    a, b = (data.draw(st.integers(0, len(s.lanes[lane]) - 1)) for _ in range(2))
    swapped = list(s.lanes[lane])
    swapped[a], swapped[b] = swapped[b], swapped[a]
    mutant = with_lane(s, lane, tuple(swapped))
    try:
        check(mutant, messages)
    except ScheduleError as error:
        assert ("deadlocks" in str(error) and " waits for " in str(error)) or " holds " in str(error)
    else:
        assert len(simulate(mutant, {}, messages).events) == len([i for program in mutant.lanes for i in program])


def test_a_large_schedule_is_made_checked_and_run_in_a_moment() -> None:
    """Work, not seconds: 4096 instructions give at most four edges each, so all three are linear."""
    s = lanes("interleaved", 8, 64, 4)
    looped = sum(not runs_once(i.part) for lane in s.lanes for i in lane)
    assert looped == 2 * 32 * 64
    check(s, chain(32))
    assert graph(s, chain(32)).number_of_edges() < 4 * looped
    assert abs(simulate(s, equal_stages(s), chain(32)).bubble_share - 7 / (4 * 64 + 7)) < 1e-12


# the picture ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [("1f1b", 8, 32, 1), ("interleaved", 4, 8, 2), ("zb", 4, 8, 1)], ids=str)
def test_the_picture_has_a_box_an_instruction(case: tuple[str, int, int, int]) -> None:
    t = simulate(s := lanes(*case), {place: value / 1000 for place, value in equal_stages(s).items()}, chain(s.stages))
    ns = {"s": "http://www.w3.org/2000/svg"}
    root = ET.fromstring(draw(t))
    boxes = [g for g in root.findall("s:g", ns) if (g.get("class") or "").startswith("box ")]
    assert len(boxes) == len(t.events)
    looped = [g for g in boxes if g.get("class") != "box once"]
    titles = [g.findtext("s:title", "", ns) for g in looped]
    assert len(set(titles)) == len(titles) == sum(not runs_once(e.instruction.part) for e in t.events)
    labels = [g.findtext("s:text", "", ns) for g in looped]
    assert all(label and title.startswith(f"{label} stage ") for label, title in zip(labels, titles, strict=True))  # each has room for its text
    rows = {g.find("s:rect", ns).get("y") for g in boxes}  # type: ignore[union-attr]
    assert len(rows) == len(s.lanes)
    assert sorted({title.split("rank ")[1].split(":")[0] for title in titles}) == [str(k) for k in range(len(s.lanes))]
    shades = {r.get("fill-opacity") for g in boxes if (r := g.find("s:rect", ns)) is not None}
    assert len(shades) == s.stages // len(s.lanes)
    width = float(root.get("width", "0"))
    assert all(float(r.get("x", "0")) + float(r.get("width", "0")) <= width for r in root.iter("{http://www.w3.org/2000/svg}rect"))
    assert "0 ms" in [x.text for x in root.findall("s:text", ns)]
    assert "http" not in draw(t).replace("http://www.w3.org/2000/svg", "")


def test_a_timeline_of_no_time_can_be_drawn() -> None:
    assert ET.fromstring(draw(simulate(lanes("gpipe", 2, 2), {}))).tag.endswith("svg")
