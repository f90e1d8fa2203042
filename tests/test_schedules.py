"""Pipeline schedules: idle time equals the closed forms, memory its bound, and every schedule that cannot run is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import pytest
from schedule_cases import CASES, equal_stages, received, with_lane

from deepseed.ir.mesh import Mesh
from deepseed.ir.messages import Message, chain, messages_of, needs, queues, receives, runs_once
from deepseed.ir.program import Program
from deepseed.ir.schedule import Instruction, Schedule
from deepseed.ir.text import parse
from deepseed.solver.schedules import NAMES, ScheduleError, check, check_traffic, chunks_in_flight, in_flight, lanes
from deepseed.timeline import Timeline, simulate

RANKS = range(2, 9)


def run(name: str, p: int, m: int, v: int = 1) -> Timeline:
    """Checked, then run with equal stages and messages that take no time."""
    s = lanes(name, p, m, v)
    check(s, chain(s.stages))
    return simulate(s, equal_stages(s), chain(s.stages))


def idle(t: Timeline) -> float:
    return len(t.schedule.lanes) * t.step_seconds - sum(t.busy)


# closed forms ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", RANKS)
@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_bubble_share_of_gpipe_and_1f1b(name: str, p: int) -> None:
    for m in range(p, 4 * p + 1):
        t = run(name, p, m)
        assert abs(t.bubble_share - Fraction(p - 1, m + p - 1)) < 1e-12
        assert t.step_seconds == 3 * (m + p - 1)
        assert in_flight(t.schedule) == ((m,) * p if name == "gpipe" else tuple(p - k for k in range(p)))


@pytest.mark.parametrize("p", RANKS)
@pytest.mark.parametrize("v", [2, 3, 4])
def test_bubble_share_of_interleaved(p: int, v: int) -> None:
    multiple = {m: run("interleaved", p, m, v) for m in range(p, 4 * p + 1, p)}
    for m in range(p, 4 * p + 1):
        t = multiple.get(m) or run("interleaved", p, m, v)
        if m % p == 0:
            assert abs(t.bubble_share - Fraction(p - 1, v * m + p - 1)) < 1e-12
        else:
            assert t.step_seconds <= multiple[-(-m // p) * p].step_seconds
        bound = [2 * (p - k - 1) + (v - 1) * p + 1 for k in range(p)]
        assert all(held <= most for held, most in zip(chunks_in_flight(t.schedule), bound, strict=True))
        if m % p == 0 and m > p:
            assert chunks_in_flight(t.schedule) == tuple(bound)


@pytest.mark.parametrize("p", RANKS)
def test_zb_idles_a_third_of_1f1b_within_p_microbatches(p: int) -> None:
    for m in range(p, 4 * p + 1):
        t = run("zb", p, m)
        assert 3 * idle(t) == idle(run("1f1b", p, m))
        assert in_flight(t.schedule) == (p,) * p


def test_zb_idles_for_p_minus_1_of_forward_backward_less_weights_at_unequal_costs() -> None:
    s = lanes("zb", 4, 12)
    seconds = {(f"{kind}.1", k): value for kind, value in (("forward", 8.0), ("backward", 9.0), ("weights", 7.0)) for k in range(4)}
    t = simulate(s, seconds, chain(4))
    assert t.step_seconds == 12 * (8 + 9 + 7) + 3 * (8 + 9 - 7)


@pytest.mark.parametrize("name", NAMES)
def test_one_rank_accumulates_gradients(name: str) -> None:
    s = lanes(name, 1, 3)
    check(s, {})
    text = str(Program("p", Mesh(()), (), (), (), schedule=s))
    lane = {
        "gpipe": "once.0 F0 F1 F2 B0 B1 B2 once.1",
        "1f1b": "once.0 F0 B0 F1 B1 F2 B2 once.1",
        "interleaved": "once.0 F0 B0 F1 B1 F2 B2 once.1",
        "zb": "once.0 F0 B0 W0 F1 B1 W1 F2 B2 W2 once.1",
    }
    assert f"lane 0: {lane[name]}\n" in text
    assert run(name, 1, 3).bubble_share == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("p", RANKS)
def test_fewer_microbatches_than_ranks(name: str, p: int) -> None:
    for m in range(1, p):
        for v in (1, 2, 3) if name == "interleaved" else (1,):
            t = run(name, p, m, v)
            assert t.step_seconds <= run(name, p, p, v).step_seconds
            if name in ("gpipe", "1f1b"):
                assert abs(t.bubble_share - Fraction(p - 1, m + p - 1)) < 1e-12


# what a schedule is -----------------------------------------------------------------------------------------------------


def test_the_lanes_of_1f1b_and_zb_are_as_published() -> None:
    assert [" ".join(_letters(lane)) for lane in lanes("1f1b", 3, 4).lanes] == [
        "F0 F1 F2 B0 F3 B1 B2 B3",
        "F0 F1 B0 F2 B1 F3 B2 B3",
        "F0 B0 F1 B1 F2 B2 F3 B3",
    ]
    assert [" ".join(_letters(lane)) for lane in lanes("zb", 3, 4).lanes] == [
        "F0 F1 F2 B0 W0 F3 B1 W1 B2 W2 B3 W3",
        "F0 F1 B0 F2 B1 W0 F3 B2 W1 B3 W2 W3",
        "F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3",
    ]


def _letters(lane: tuple[Instruction, ...]) -> list[str]:
    return [f"{i.kind[0].upper()}{i.microbatch}" for i in lane if not runs_once(i.part)]


def test_parts_that_have_no_ops_are_left_out() -> None:
    parts = {("forward.1", 0), ("forward.1", 1), ("forward.2", 0), ("forward.2", 1), ("backward.2", 1), ("once.1", 3), ("once.2", 1)}
    s = lanes("interleaved", 2, 3, 2, loops=2, parts=parts)
    check(s, {}, parts)
    assert {(i.part, i.stage) for lane in s.lanes for i in lane} == (parts - {("once.1", 3)}) | {("once.1", 1)}  # once a lane
    assert in_flight(s) == (1, 3, 0, 0)


def test_a_loop_before_the_last_runs_all_forwards_first() -> None:
    s = lanes("1f1b", 2, 2, loops=2)
    check(s, {**chain(2, 1), **{f"{name}'": message for name, message in chain(2, 2).items()}})
    assert str(Program("p", Mesh(()), (), (), (), schedule=s)).splitlines()[2:] == [
        "lane 0: once.0 1:F0 1:F1 1:B0 1:B1 once.1 F0 F1 B0 B1 once.2",
        "lane 1: once.0 1:F0 1:F1 1:B0 1:B1 once.1 F0 B0 F1 B1 once.2",
    ]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: lanes("2f2b", 2, 4), "no schedule is called '2f2b'"),
        (lambda: lanes("1f1b", 0, 4), "0 pipeline ranks"),
        (lambda: lanes("gpipe", 2, 0), "0 microbatches"),
        (lambda: lanes("zb", 2, 4, v=2), "zb runs 1 stage a rank, not 2"),
        (lambda: lanes("interleaved", 2, 4, v=2, parts={("forward.1", 4)}), "stage 4"),
    ],
)
def test_numbers_that_make_no_schedule(call: Callable[[], Schedule], says: str) -> None:
    with pytest.raises(ScheduleError, match=says):
        call()


# refused --------------------------------------------------------------------------------------------------------------


def plain_interleaved(p: int, m: int, v: int) -> Schedule:
    """The formula as published, whatever m is: the last group is short."""
    turns = [(chunk, i) for first in range(0, m, p) for chunk in range(v) for i in range(first, min(first + p, m))]
    out = []
    for k in range(p):
        forward = [Instruction("forward.1", k + chunk * p, i) for chunk, i in turns]
        backward = [Instruction("backward.1", k + (v - 1 - chunk) * p, i) for chunk, i in turns]
        ahead = min(2 * (p - k - 1) + (v - 1) * p, len(turns))
        steady = [i for pair in zip(forward[ahead:], backward, strict=False) for i in pair]
        out.append((*forward[:ahead], *steady, *backward[len(turns) - ahead :]))
    return Schedule("interleaved", p * v, m, 1, tuple(out))


def test_the_plain_interleaved_formula_deadlocks_unless_p_divides_m() -> None:
    refused = total = 0
    for p, v in [(p, v) for p in RANKS for v in (2, 3, 4)]:
        for m in range(p, 4 * p + 1):
            s = plain_interleaved(p, m, v)
            if m % p == 0:
                assert s.lanes == lanes("interleaved", p, m, v, parts={(f"{kind}.1", k) for kind in ("forward", "backward") for k in range(p * v)}).lanes
                continue
            total += 1
            try:
                check(s, chain(p * v))
            except ScheduleError as error:
                refused += 1
                assert "deadlocks" in str(error)
                if p < 5:
                    with pytest.raises(ScheduleError, match="never end"):
                        simulate(s, equal_stages(s), chain(p * v))
    assert (refused, total) == (120, 252)


def test_a_deadlock_names_the_instructions_and_the_lanes() -> None:
    with pytest.raises(ScheduleError) as error:
        check(plain_interleaved(4, 5, 3), chain(12))
    assert str(error.value).startswith("interleaved of 4 ranks and 5 microbatches deadlocks: 4 instructions of the lanes 0, 3 wait for one another\n")
    assert "F4@8 of lane 0 waits for F4@7 of lane 3 (%x.8)" in str(error.value)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_mutants_are_refused(case: tuple[str, int, int, int]) -> None:
    """Every instruction in turn: dropped, doubled, run on another lane, and put before the part of its microbatch that it needs."""
    s = lanes(*case)
    messages = chain(s.stages)
    parts = {(i.part, i.stage) for lane in s.lanes for i in lane}
    check(s, messages, parts)
    count = 0
    for lane, program in enumerate(s.lanes):
        for n, i in enumerate(program):
            mutants = {"runs 0 times": program[:n] + program[n + 1 :], "runs 2 times": program[: n + 1] + program[n:]}
            before = [k for k, j in enumerate(program[:n]) if (j.stage, j.microbatch) == (i.stage, i.microbatch) and not runs_once(i.part) and not runs_once(j.part)]
            for k in before:  # swapped
                swapped = list(program)
                swapped[k], swapped[n] = i, program[k]
                mutants[f"deadlocks: {k}"] = tuple(swapped)
            for says, mutant in mutants.items():
                with pytest.raises(ScheduleError, match=says.partition(":")[0]):
                    check(with_lane(s, lane, mutant), messages, parts)
                count += 1
            if i.stage + 1 < s.stages and not runs_once(i.part):
                beside = (lane + 1) % len(s.lanes)
                with pytest.raises(ScheduleError, match=f"lane {beside} runs .*, which lane {lane} of"):
                    check(with_lane(with_lane(s, lane, mutants["runs 0 times"]), beside, (*s.lanes[beside], i)), messages, parts)
    assert count > 3 * s.stages * s.microbatches


def test_a_schedule_over_its_memory_bound_is_refused() -> None:
    with pytest.raises(ScheduleError, match="1f1b: stage 0 holds 4 microbatches, and 1f1b of 3 ranks holds at most 3 there"):
        check(replace(lanes("gpipe", 3, 4), name="1f1b"), chain(3))
    with pytest.raises(ScheduleError, match="zb: stage 0 holds 4 microbatches"):
        check(replace(lanes("gpipe", 3, 4), name="zb"), chain(3))
    with pytest.raises(ScheduleError, match="interleaved: lane 0 holds 16 microbatches, and interleaved of 2 ranks holds at most 5 there"):
        check(Schedule("interleaved", 4, 8, 1, _gpipe_of_chunks()), chain(4))


def _gpipe_of_chunks() -> tuple[tuple[Instruction, ...], ...]:
    forward = [[Instruction("forward.1", stage, i) for stage in (k, k + 2) for i in range(8)] for k in range(2)]
    return tuple((*lane, *(replace(i, part="backward.1") for i in reversed(lane))) for lane in forward)


def test_a_missing_microbatch_and_a_stray_one_are_named() -> None:
    s = lanes("1f1b", 2, 3)
    with pytest.raises(ScheduleError, match="F2 of lane 0 runs 0 times"):
        check(with_lane(s, 0, tuple(i for i in s.lanes[0] if (i.kind, i.microbatch) != ("forward", 2))), chain(2))
    with pytest.raises(ScheduleError, match="F7 of lane 1 is of microbatch 7, and there are 3"):
        check(with_lane(s, 1, (*s.lanes[1], Instruction("forward.1", 1, 7))), chain(2))
    with pytest.raises(ScheduleError, match=r"W0 of lane 1 runs 0 times"):
        check(s, chain(2), {("weights.1", 1)})


# traffic --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_order_of_a_pair_is_that_of_first_use_in_every_schedule(case: tuple[str, int, int, int]) -> None:
    """In a plain pipeline no receive is posted before the instruction that needs it, so nothing waits in a buffer."""
    s = lanes(*case)
    messages = chain(s.stages)
    for lane in range(len(s.lanes)):
        assert [sorted(items) for items in receives(s, lane, messages)] == [sorted(items) for items in needs(s, lane, messages)]
    assert received(s, messages) == queues(s, messages)
    assert sum(map(len, queues(s, messages).values())) == len(messages) * s.microbatches


def test_traffic_that_differs_is_refused() -> None:
    s = lanes("1f1b", 3, 4)
    sent = queues(s, chain(3))
    check_traffic(sent, received(s, chain(3)), s.name)
    x0, x1, *others = sent[0, 1]
    for pair, items, says in [
        ((0, 1), [x1, x0, *others], "number 0 is %x.1 of microbatch 0 sent and %x.1 of microbatch 1 received"),
        ((0, 1), [x0, *others], "sends 4 values to lane 1, which receives 3"),
        ((0, 1), [x0, x0, x1, *others], "lane 1 receives %x.1 of microbatch 0 2 times"),
        ((2, 0), [x0], "lane 2 sends 0 values to lane 0, which receives 1"),
    ]:
        with pytest.raises(ScheduleError, match=says):
            check_traffic(sent, {**sent, pair: items}, s.name)
    with pytest.raises(ScheduleError, match=r"lane 0 sends %x\.1 of microbatch 0 2 times"):
        check_traffic({**sent, (0, 1): [x0, *sent[0, 1]]}, sent, s.name)


def test_a_value_used_later_than_one_sent_after_it_is_posted_early() -> None:
    """A forward value of stage 2 is used in the backward of stage 1: it is sent ahead of gradients that stage 1 needs before it."""
    messages = {**chain(3), "late": (("forward.1", 2), ("backward.1", 1))}
    s = lanes("gpipe", 3, 3)
    check(s, messages)
    first = s.lanes[1].index(Instruction("backward.1", 1, 0))
    assert receives(s, 1, messages)[first] == (("late", 0), ("late", 1), ("late", 2), ("g.1", 0))
    assert needs(s, 1, messages)[first] == (("g.1", 0), ("late", 0))


def test_values_that_cross_once_go_before_the_loop_or_after_it() -> None:
    messages: dict[str, Message] = {**chain(2), "tied": (("once.0", 0), ("forward.1", 1)), "sum": (("backward.1", 1), ("once.1", 0))}
    s = lanes("1f1b", 2, 3)
    check(s, messages)
    assert [n for n, items in enumerate(receives(s, 1, messages)) if ("tied", 0) in items] == [s.lanes[1].index(Instruction("forward.1", 1, 0))]
    assert queues(s, messages)[0, 1][0] == ("tied", 0)
    assert queues(s, messages)[1, 0][-1] == ("sum", 0)
    with pytest.raises(ScheduleError, match="deadlocks"):  # the sum is complete only when every microbatch has run
        check(with_lane(s, 1, (*s.lanes[1][:-2], s.lanes[1][-1], s.lanes[1][-2])), messages)


STAGED = """
program p mesh() facts()
%w : f32[4] param "w"
%b : f32[4] batch "b"
%w.s1 = transfer(%w, source=0) : f32[4] {phase="forward", part="once.0", stage=1}
%x = aten.mul.Tensor(%b, %w) : f32[4] {phase="forward", part="forward.1"}
%x.s1 = transfer(%x, source=0) : f32[4] {phase="forward", part="forward.1", stage=1}
%y = aten.mul.Tensor(%x.s1, %w.s1) : f32[4] {phase="forward", part="forward.1", stage=1}
%x.s2 = transfer(%x, source=0) : f32[4] {phase="forward", part="forward.1", stage=2}
%g = aten.mul.Tensor(%x.s2, %b) : f32[4] {phase="backward", part="backward.1", stage=2}
%h = aten.mul.Tensor(%x.s2, %g) : f32[4] {phase="backward", part="weights.1", stage=2}
%g.s0 = transfer(%g, source=2) : f32[4] {phase="backward", part="backward.1"}
return %g.s0 grad "g"
"""


def test_messages_of_a_program_lead_to_its_transfers() -> None:
    messages = messages_of(parse(STAGED))
    assert messages == {
        "w.s1": (("once.0", 0), ("once.0", 1)),
        "x.s1": (("forward.1", 0), ("forward.1", 1)),
        "x.s2": (("forward.1", 0), ("forward.1", 2)),
        "g.s0": (("backward.1", 2), ("backward.1", 0)),
    }
    s = lanes("1f1b", 3, 2)
    check(s, messages)
    assert queues(s, messages)[0, 1] == [("w.s1", 0), ("x.s1", 0), ("x.s1", 1)]
    one_lane = lanes("interleaved", 1, 2, 3)
    check(one_lane, messages)
    assert queues(one_lane, messages) == {}
