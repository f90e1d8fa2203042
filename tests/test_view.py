"""The page of ``explain --html``: its figures against what explain counts, and the page itself in a headless Chromium."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import chromium
import pytest
from typer.testing import CliRunner

from deepseed import pipeline
from deepseed.cli import app
from deepseed.explain import Explanation, explain
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Program
from deepseed.meshes import program_mesh
from deepseed.plan import parse_plan
from deepseed.speed import Machine, course, parse_machine
from deepseed.timeline import simulate
from deepseed.view import DIGITS, page, thinned, view
from deepseed.view_lanes import KINDS, Moment, by_place, storage_kinds

TARGET = "hf:LlamaForCausalLM(num_hidden_layers=4,batch_size=16)"
PLANS = ("zero3+dp2+tp2", "zero1+dp2+pp2+mb4", "pp2+mb4+interleaved2", "zero1+dp2+tp2+pp2+mb4+zb")
ROUNDED = 10.0 ** (1 - DIGITS)
plans = pytest.mark.parametrize("plan", PLANS)


@cache
def captured() -> Program:
    pytest.importorskip("transformers")
    from deepseed.asked import captured

    return captured(TARGET, "zero0", None, None, None)[0]


@cache
def program(plan: str) -> tuple[Program, Explanation, Mesh]:
    """What ranks run under a plan, explain's answer, and the mesh of the ranks."""
    said = parse_plan(plan)
    ranks = said.mesh(None)
    args = pipeline.arguments(program_mesh(captured(), said, ranks), said.stage, {}, plan=said)
    p = pipeline.run(captured(), args, pipeline.SHARED, check=False)[-1].program
    return p, explain(p, zero=said.stage, ranks=ranks), ranks


@cache
def figures(plan: str) -> dict[str, Any]:
    p, e, ranks = program(plan)
    return view(p, e, ranks=ranks, title=TARGET, plan=plan)


# figures -------------------------------------------------------------------------------------------------------------


@plans
@pytest.mark.turn
def test_the_figures_are_those_of_explain(plan: str) -> None:
    _, e, ranks = program(plan)
    f = figures(plan)
    assert len(f["ranks"]) == ranks.ranks and f["mesh"] == [list(axis) for axis in ranks.axes]
    assert sorted(r for position in f["positions"] for r in position["ranks"]) == list(range(ranks.ranks))
    for position in f["positions"]:
        for r in position["ranks"]:
            live, rank = position["peak"]["live"], e.ranks[r]
            assert live["parameters"] == rank.param_bytes and live["optimizer"] == rank.optimizer_bytes
            assert sum(live.values()) == position["peak"]["bytes"] == max(map(sum, zip(*position["memory"]["live"], strict=True)))
            assert position["peak"]["bytes"] == rank.peak_bytes
    busiest = max(f["positions"], key=lambda p: sum(c["bytes"] for c in p["collectives"]))
    counted = {(c.axis, c.op): (c.count, c.bytes) for c in e.collectives if c.axis != "pp"}
    if len(f["positions"]) == 1:  # of several, explain shows the one that sends most, messages included
        assert {(c["axis"], c["op"]): (c["count"], c["bytes"]) for c in busiest["collectives"]} == counted
    assert max(p["flops"] for p in f["positions"]) == e.matmul_flops


@pytest.mark.parametrize("plan", ["zero1+dp2+offload(optimizer)", "zero3+dp2+pp2+mb2+offload(optimizer,params,activations)"])
@pytest.mark.turn
def test_what_is_moved_and_how_much_of_it_is_hidden(plan: str) -> None:
    p, e, ranks = program(plan)
    f = figures(plan)
    for position in f["positions"]:
        rank = e.ranks[position["ranks"][0]]
        assert position["host"] == rank.host_bytes > 0
        assert {kind: n for kind, n, _ in position["moved"]} == {kind: n for kind, n in rank.moved_bytes.items() if n}
        assert "params" in rank.moved_hidden and rank.moved_hidden.keys() == {kind for kind, n in rank.moved_bytes.items() if n}
        assert not any(c["op"] in ("to_host", "to_device") for c in position["collectives"])
    slow = explain(p, zero=parse_plan(plan).stage, ranks=ranks, machine=Machine(host_link=1e6))
    fast = explain(p, zero=parse_plan(plan).stage, ranks=ranks, machine=Machine(host_link=1e15, latency=1e-12))
    for a, b, c in zip(slow.ranks, e.ranks, fast.ranks, strict=True):
        assert a.moved_hidden["params"] <= b.moved_hidden["params"] <= c.moved_hidden["params"]
        assert a.moved_hidden["params"] < 0.5
    assert " % hidden)" in str(e)


def test_a_budget_is_a_line_of_the_page() -> None:
    p, e, ranks = program(PLANS[0])
    assert view(p, e, ranks=ranks)["budget"] is None
    made = view(p, e, ranks=ranks, budget=1 << 20)
    assert made["budget"] == 1 << 20 and '"budget":1048576' in page(made)


def test_the_mean_rank_of_a_pipeline_has_what_the_formula_says() -> None:
    _, e, _ = program(PLANS[1])
    rows = {c.what: (c.counted, c.expected) for c in e.closed_forms}
    for what in ("parameters", "gradients", "matmuls"):
        counted, expected = rows[what]
        assert counted == pytest.approx(expected, rel=1e-12)
    assert sum(r.param_bytes for r in e.ranks) == 2 * sum(i.type.nbytes for i in captured().by_role("param"))  # whole on each of two
    sent = {c.axis: c.bytes for c in e.collectives}
    assert sent["pp"] == 4 * (2 * 16 * 64 * 4) + 4  # in each of 4 microbatches an activation, or a gradient, of 2 rows x 16 tokens x 64; a summand of the norm


@plans
def test_boxes_follow_one_another_and_fill_the_step(plan: str) -> None:
    f = figures(plan)
    for position in f["positions"]:
        boxes = position["boxes"]
        assert all(a[6] <= b[5] * (1 + ROUNDED) for a, b in pairwise(boxes)) and all(b[5] <= b[6] for b in boxes)
        assert position["memory"]["time"] == sorted(position["memory"]["time"])
    assert f["step"] == max(b[6] for p in f["positions"] for b in p["boxes"])
    kinds = {b[1] for p in f["positions"] for b in p["boxes"]}
    assert {"forward", "backward"} <= kinds and ("weights" in kinds) == ("zb" in plan)


@pytest.mark.parametrize("plan", PLANS[1:])
def test_a_scheduled_program_has_the_boxes_of_its_schedule(plan: str) -> None:
    p, e, _ = program(plan)
    f = figures(plan)
    assert p.schedule is not None and e.schedule is not None
    assert [len(position["boxes"]) for position in f["positions"]] == [len(lane) for lane in p.schedule.lanes]
    for lane, position in zip(p.schedule.lanes, f["positions"], strict=True):
        assert [(b[2], b[3], b[4]) for b in position["boxes"]] == [(i.part, i.stage, i.microbatch) for i in lane]
    looped = [m for m in f["messages"] if not f["positions"][m[0]]["boxes"][m[6]][2].startswith("once")]  # within what runs once, only the order counts
    assert sum(m[4] for m in looped) == sum(row["bytes"] for row in f["transfers"] if not row["part"].startswith("once")) > 0
    for source, target, left, came, _, _, made, used in looped:
        sender, receiver = f["positions"][source]["boxes"][made], f["positions"][target]["boxes"][used]
        assert sender[6] <= left * (1 + ROUNDED) and came <= receiver[5] * (1 + ROUNDED) and sender[4] == receiver[4]


def test_boxes_are_as_long_as_their_ops() -> None:
    p, _, _ = program(PLANS[1])
    machine = Machine(link=25e9)
    assert p.schedule is not None
    seconds = {place: course(p, ops, machine).seconds for place, ops in by_place(p, p.schedule).items()}
    alone = simulate(p.schedule, seconds)
    for e in alone.events:
        assert e.end - e.start == pytest.approx(seconds.get((e.instruction.part, e.instruction.stage), 0.0), abs=1e-12)


def test_a_collective_holds_the_computation_until_it_has_come() -> None:
    p, _, _ = program(PLANS[0])
    free = course(p, p.ops, Machine(link=1e30, latency=1e-30))
    slow = course(p, p.ops, Machine(link=1e6))
    assert free.seconds == pytest.approx(sum(Machine().seconds(p, op) for op in p.ops), rel=1e-9)
    held = sum(s.held for s in slow.sent)
    assert slow.spans[-1][1] == pytest.approx(free.spans[-1][1] + held, rel=1e-9) and held > 0
    for axis in ("dp", "tp"):
        mine = [s for s in slow.sent if s.axis == axis]
        assert mine and all(a.end <= b.start for a, b in pairwise(mine))
    starts = [op for op in p.ops if op.target.endswith(".start")]
    assert len(slow.sent) == len(starts) and all(s.end - s.start == pytest.approx(Machine().latency + s.nbytes / 1e6) for s in slow.sent)


def test_a_machine_is_read_and_refused() -> None:
    assert parse_machine("") == Machine() and parse_machine("flops=1e12, latency=2e-6") == Machine(flops=1e12, latency=2e-6)
    for text, word in (("speed=3", "speed=3"), ("link=fast", "link=fast"), ("link=-1", "link=-1"), ("link", "link")):
        with pytest.raises(ValueError, match=re.escape(word)):
            parse_machine(text)


def test_thinning_keeps_every_peak() -> None:
    moments = [Moment(t * 0.01, f"op{t}", {KINDS[0]: (t * 7919) % 1000}) for t in range(1000)]
    few = thinned(moments, 50)
    assert len(few) <= 50 and max(m.nbytes for m in few) == max(m.nbytes for m in moments)
    assert [m.time for m in few] == sorted(m.time for m in few) and thinned(few, 50) == few


def test_what_storage_is_counted_as() -> None:
    p, _, _ = program(PLANS[0])
    kinds = storage_kinds(p)
    assert set(kinds.values()) == set(KINDS) and set(kinds) == set(p.types)
    gathered = [op.name for op in p.ops if op.target == "all_gather.start" and op.phase == "forward" and op.refs[0].name in {i.name for i in p.by_role("param")}]
    assert gathered and all(kinds[name] == "weights in use" for name in gathered)


# the file ------------------------------------------------------------------------------------------------------------


def test_the_file_needs_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    out = tmp_path / "out.html"
    done = CliRunner().invoke(app, ["explain", TARGET, "--plan", "zero3+tp2", "--html", str(out), "--machine", "flops=1e12"])
    assert done.exit_code == 0 and str(out) in done.output, done.output
    text = out.read_text()
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)|url\(|@import|https?://|fetch\(|XMLHttpRequest|import\(""", text)
    assert "default-src 'none'" in text and "{{" not in text.replace("${{", "")
    found = json.loads(re.findall(r'<script type="application/json" id="figures">(.*?)</script>', text, re.DOTALL)[0])
    assert found["machine"]["flops"] == 1e12 and found["plan"] == "zero3+tp2" and len(found["ranks"]) == 4


def test_no_text_of_the_user_ends_a_tag() -> None:
    p, e, ranks = program(PLANS[0])
    text = page(view(p, e, ranks=ranks, title="</script><script>alert(1)</script>", plan="a&b"))
    assert "<script>alert" not in text and text.count("</script>") == 2


# in a browser --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tab() -> Iterator[chromium.Page]:
    if chromium.found() is None:
        pytest.skip(f"no browser: none of {', '.join(chromium.NAMES)} is on PATH")
    with chromium.browser() as one:
        yield one


def opened(tab: chromium.Page, tmp_path: Path, plan: str, width: int = 1280, dark: bool = False) -> chromium.Page:
    file = tmp_path / "view.html"
    file.write_text(page(figures(plan)))
    tab.console.clear()
    tab.requests.clear()
    tab.open(file, width=width, dark=dark)
    return tab


def shown(tab: chromium.Page) -> tuple[float, float]:
    """The visible range, in seconds."""
    low, high = tab.run("[+document.getElementById('timeline').dataset.t0, +document.getElementById('timeline').dataset.t1]")
    return low, high


def middle(tab: chromium.Page, selector: str) -> tuple[float, float]:
    x, y = tab.run(f"(r => [r.x + r.width / 2, r.y + r.height / 2])(document.querySelector({selector!r}).getBoundingClientRect())")
    return x, y


def text(tab: chromium.Page, name: str) -> str:
    return str(tab.run(f"document.getElementById({name!r}).textContent"))


@plans
def test_a_lane_for_each_rank_and_a_box_for_each_instruction(tab: chromium.Page, tmp_path: Path, plan: str) -> None:
    f = figures(plan)
    opened(tab, tmp_path, plan, width=4000)  # wide enough for the shortest box
    assert tab.run("document.querySelectorAll('#lanes .lane').length") == len(f["ranks"])
    lanes = tab.run("[...document.querySelectorAll('#lanes .lane')].map(l => [+l.dataset.boxes, [...l.querySelectorAll('.box[data-box]')].map(b => +b.dataset.box)])")
    for r, (told, drawn) in enumerate(lanes):
        position = next(p for p in f["positions"] if r in p["ranks"])
        assert told == len(position["boxes"]) and drawn == sorted(set(drawn))
        pixels = [(b[6] - b[5]) / f["step"] * (4000 - 120) for b in position["boxes"]]
        assert {n for n, wide in enumerate(pixels) if wide > 2} <= set(drawn)  # what is narrower is drawn with its neighbours
        assert sum(wide > 2 for wide in pixels) >= 3
    assert len(tab.run("[...document.querySelectorAll('#memory svg')].map(s => s.querySelectorAll('path').length)")) == len(f["positions"])
    assert tab.run("document.querySelectorAll('#mesh button').length") == len(f["ranks"])
    assert tab.console == [] and tab.requests == [(tmp_path / "view.html").resolve().as_uri()]


def test_wheel_drag_keys_and_buttons_move_the_view(tab: chromium.Page, tmp_path: Path) -> None:
    step = figures(PLANS[1])["step"]
    opened(tab, tmp_path, PLANS[1])
    assert shown(tab) == (0, step) and "all" in text(tab, "range")
    x, y = middle(tab, "#lanes .lane:nth-of-type(2)")
    tab.mouse("mouseWheel", x, y, deltaX=0, deltaY=-240)
    low, high = shown(tab)
    assert 0 < low < high < step and " of " in text(tab, "range")
    tab.mouse("mousePressed", x, y, button="left", clickCount=1)
    tab.mouse("mouseMoved", x - 90, y, button="left", buttons=1)
    tab.mouse("mouseReleased", x - 90, y, button="left", clickCount=1)
    moved = shown(tab)
    assert moved[0] > low and moved[1] - moved[0] == pytest.approx(high - low)
    tab.run("document.getElementById('timeline').focus()")
    tab.key("0")
    assert shown(tab) == (0, step)
    tab.key("+")
    low, high = shown(tab)
    assert high - low == pytest.approx(0.7 * step)
    tab.key("ArrowRight")
    assert shown(tab)[0] > low
    tab.key("-")
    tab.key("-")
    assert shown(tab) == (0, step)
    tab.run("document.getElementById('in').click()")
    tab.settle()
    assert shown(tab)[1] - shown(tab)[0] == pytest.approx(0.6 * step)
    tab.run("document.getElementById('fit').click()")
    tab.settle()
    assert shown(tab) == (0, step) and tab.console == []


def test_hovering_says_what_a_box_is(tab: chromium.Page, tmp_path: Path) -> None:
    opened(tab, tmp_path, PLANS[1])
    n = tab.run("document.querySelector('.lane[data-rank=\"2\"]').querySelectorAll('.box[data-box]')[2].dataset.box")
    x, y = middle(tab, f'.lane[data-rank="2"] .box[data-box="{n}"]')
    tab.mouse("mouseMoved", x, y)
    f = figures(PLANS[1])
    label, _, part, stage, microbatch = next(p for p in f["positions"] if 2 in p["ranks"])["boxes"][int(n)][:5]
    said = text(tab, "tip")
    assert tab.run("document.getElementById('tip').hidden") is False
    assert f"{label}: {part}" in said and f"stage {stage}, microbatch {microbatch}" in said and "rank 2" in said and " to " in said
    tab.mouse("mousePressed", x, y, button="left", clickCount=1)
    tab.mouse("mouseReleased", x, y, button="left", clickCount=1)
    assert f"{label}: {part}" in text(tab, "readout") and tab.run("document.querySelectorAll('#lanes .box.chosen').length") == 1
    assert tab.run("document.querySelector('#mesh [aria-pressed=true]').textContent") == "2"
    x, y = middle(tab, "#memory svg")
    tab.mouse("mouseMoved", x, y)
    assert "while" in text(tab, "tip") and "parameters" in text(tab, "tip")


def test_boxes_and_ranks_are_reached_by_keys(tab: chromium.Page, tmp_path: Path) -> None:
    f = figures(PLANS[1])
    opened(tab, tmp_path, PLANS[1])
    tab.run("document.getElementById('timeline').focus()")
    for _ in range(2):
        tab.key(".")
    assert f["positions"][0]["boxes"][1][0] in text(tab, "readout")
    tab.key("ArrowDown")
    assert text(tab, "readout").startswith("rank 1") and "peak" in text(tab, "readout")
    tab.run("document.querySelector('#mesh [aria-pressed=true]').focus()")
    tab.key("ArrowDown")
    assert tab.run("document.activeElement.textContent") == "3" and "rank 3" in text(tab, "peers")
    assert tab.run("[...document.querySelectorAll('[role=img]')].every(e => e.getAttribute('aria-label').length > 20)")
    tab.run("document.querySelector('#boxes summary').click()")
    tab.settle()
    assert tab.run("document.querySelectorAll('#boxes tbody tr').length") == sum(len(p["boxes"]) for p in f["positions"])
    assert tab.console == []


def test_messages_of_the_chosen_box_are_drawn(tab: chromium.Page, tmp_path: Path) -> None:
    f = figures(PLANS[1])
    opened(tab, tmp_path, PLANS[1])
    sender = next(m for m in f["messages"] if m[0] == 0 and f["positions"][0]["boxes"][m[6]][1] == "forward")
    tab.run("document.getElementById('timeline').focus()")
    for _ in range(sender[6] + 1):
        tab.key(".")
    own = [m for m in f["messages"] if (m[0] == 0 and m[6] == sender[6]) or (m[1] == 0 and m[7] == sender[6])]
    assert tab.run("document.querySelectorAll('#lanes .message').length") == len(own) > 0


def test_ranks_that_do_the_same_share_a_lane(tab: chromium.Page, tmp_path: Path) -> None:
    f = figures(PLANS[3])
    opened(tab, tmp_path, PLANS[3])
    tab.run("document.getElementById('group').click()")
    tab.settle()
    assert tab.run("document.querySelectorAll('#lanes .lane').length") == len(f["positions"]) < len(f["ranks"])


@pytest.mark.parametrize("dark", [False, True])
def test_nothing_is_wider_than_the_window(tab: chromium.Page, tmp_path: Path, dark: bool) -> None:
    opened(tab, tmp_path, PLANS[3], width=1000, dark=dark)
    assert tab.run("document.documentElement.scrollWidth <= innerWidth")
    outside = "[...document.querySelectorAll('main *')].filter(e => !e.closest('.wide, svg, figcaption') && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
    assert tab.run(outside) == []
    ink, ground = tab.run("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")
    light = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, ground)]
    assert (light[0] > light[1]) == dark
