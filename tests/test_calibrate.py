"""Calibration: the line through the times of collectives, medians by a clock that the test moves, what is written and read back, refusals; and two real ranks within bounds that no machine leaves."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small import small
from typer.testing import CliRunner

import deepseed
from deepseed import budget
from deepseed import calibrate as measuring
from deepseed.calibrate import combined, fit, per_call
from deepseed.cli import app
from deepseed.ir.text import parse
from deepseed.machines import assumed, machine_of, measured, path_of, read, save
from deepseed.speed import Machine, MachineError

schedule = importlib.import_module("deepseed.passes.schedule_collectives")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DEEPSEED_CACHE_DIR", str(tmp_path / "cache"))


def test_the_line_is_found_again() -> None:
    exact = fit([(n, 3e-4 + n / 2e8) for n in measuring.SIZES])
    assert exact.latency == pytest.approx(3e-4, rel=1e-9) and exact.link == pytest.approx(2e8, rel=1e-9) and exact.missed[1] < 1e-9
    bent = fit([(n, (3e-4 + n / 2e8) * (1.2 if k % 2 else 0.8)) for k, n in enumerate(measuring.SIZES)])
    assert 0.05 < bent.missed[0] <= bent.missed[1] < 0.3 and 0.7 * 3e-4 < bent.latency < 1.3 * 3e-4
    assert fit([(n, n / 1e9) for n in (1, 2, 4)]).link == pytest.approx(1e9, rel=1e-6)  # no latency at all
    assert fit([(n, 5e-5) for n in (100, 1000)]).latency == pytest.approx(5e-5, rel=1e-6)  # no time for bytes


def test_a_call_takes_the_median_by_the_clock() -> None:
    now, calls = 0.0, 0

    def run() -> None:
        nonlocal now, calls
        calls += 1
        now += 0.9 if calls == 55 else 0.002  # one run is disturbed

    assert per_call(run, clock=lambda: now) == pytest.approx(0.002, rel=1e-9)
    assert calls > 4 * 0.03 / 0.002


def test_ranks_wait_for_the_slowest() -> None:
    a = Machine(flops=2e9, memory=3e9, launch=1e-6, rates=(("f32", 2e9),))
    points = [("all_reduce", n, 1e-4 + n / 1e8) for n in (1000, 100000)]
    found = combined([(a, 0.5), (replace(a, flops=1e9, launch=2e-6, rates=(("f32", 1e9),)), 1.0)], [points, [(k, n, 2 * t) for k, n, t in points]], "gloo", 1.0)
    assert found.machine.flops == 1e9 and found.machine.launch == 2e-6 and dict(found.machine.rates) == {"f32": 1e9}
    assert found.busy == 0.5 and "had a core 50% of the time" in str(found) and "fix: measure again" in str(found) and "fix" not in str(replace(found, busy=0.95))
    assert found.machine.link == pytest.approx(5e7) and found.machine.latency == pytest.approx(2e-4)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    m = Machine(flops=1e11, link=2e8, rates=(("f32", 1e11), ("bf16", 3e11)))
    save(path_of(2), m, {})
    assert measured(2) == assumed(2) == machine_of("", 2) == machine_of("measured", 2) == m
    assert measured(4) is None and machine_of("", 4) == Machine() and machine_of("link=1e9", 2) == Machine(link=1e9)
    save(tmp_path / "m.json", m, {"host": "x"})
    assert machine_of(str(tmp_path / "m.json"), 8) == m


def test_a_rate_is_of_the_dtype() -> None:
    p = parse('program p mesh() facts(captured)\n%x : bf16[64, 64] batch "x"\n%y = aten.mm(%x, %x) : bf16[64, 64] {phase="forward"}\nreturn %y output "y"\n')
    slow = Machine(flops=1e6, launch=0.0, rates=(("bf16", 4e6),))
    assert slow.seconds(p, p.ops[0]) == pytest.approx(2 * 64**3 / 4e6)
    assert replace(slow, rates=()).seconds(p, p.ops[0]) == pytest.approx(2 * 64**3 / 1e6)


@pytest.mark.parametrize("text", ["", "[]", '{"format": 1}', '{"format": 0, "machine": {}}', '{"format": 1, "machine": {"flops": -1}}', '{"format": 1, "machine": {"speed": 1}}', '{"format": 1, "machine": {"rates": [["f32", "abc"]]}}', '{"format": 1, "machine": {"rates": [["f32", 1, 2]]}}'])
def test_no_machine_in_a_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(MachineError, match="fix: deepseed calibrate -o"):
        read(tmp_path / "m.json")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(MachineError, match="holds no machine"):
        read(tmp_path / "m.json")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["calibrate", "--backend", "mpi"], "unknown backend 'mpi'"), (["calibrate", "-o", "/no/such/m.json"], "no folder /no/such"), (["calibrate", "--backend", "nccl", "--world-size", "512"], "nccl needs a GPU a rank: 512 asked for"),
        (["calibrate", "-o", "here"], "fix: -o here.json"), (["explain", "hf:LlamaForCausalLM", "--machine", "flops=nan"], "cannot read 'flops=nan'"), (["profile", "hf:LlamaForCausalLM", "--plan", "dp512", "--backend", "nccl"], "nccl needs a GPU a rank"),
        (["verify", "hf:LlamaForCausalLM", "--plan", "dp512", "--backend", "nccl"], "nccl needs a GPU a rank"),
        (["explain", "hf:LlamaForCausalLM", "--plan", "zero3", "--machine", "measured"], "fix: deepseed calibrate --world-size 2"), (["explain", "hf:LlamaForCausalLM", "--machine", "none.json"], "no file none.json"),
    ],
)  # fmt: skip
def test_refusals(words: list[str], said: str) -> None:
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2 and said in done.output and "fix:" in done.output, done.output


class Heard(Exception):
    pass


def test_a_compiled_program_is_chosen_by_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the scheduler and by a budget, on the rank that decides."""
    save(path_of(2), m := Machine(link=123e6), {})
    model, batch, loss_fn = small()
    heard: list[Machine] = []
    monkeypatch.setattr(schedule, "fill_waits", lambda p, machine, live: heard.append(machine) or p)
    deepseed.compile(model, "zero2+dp2", optimizer=torch.optim.SGD(model.parameters(), lr=0.1), loss_fn=loss_fn).compile(batch)
    assert heard == [m]

    def search(*args: object, machine: Machine, **kwargs: object) -> object:
        heard.append(machine)
        raise Heard

    monkeypatch.setattr(budget, "Search", search)
    with pytest.raises(Heard):
        deepseed.compile(model, "zero2+dp2+budget(1e9)", optimizer=torch.optim.SGD(model.parameters(), lr=0.1), loss_fn=loss_fn).compile(batch)
    assert heard[1:] == [m]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_command(ranks: int, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["calibrate", "--world-size", str(ranks), "--backend", "gloo", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout[done.stdout.index("{") : done.stdout.rindex("}") + 1])
    m = measured(ranks)
    assert m is not None and m.flops == found["machine"]["flops"] and found["seconds"] < 60
    assert 1e7 < m.flops < 1e15 and 1e7 < m.memory < 1e14 and 1e7 < m.host_link < 1e14 and 1e-8 < m.launch < 1e-1 and {d for d, _ in m.rates} == {"f32", "bf16", "f16", "f64"}
    assert 0 < found["busy"] <= 1 and (found["line"] is None) == (ranks == 1)
    if ranks == 2:
        assert 1e4 < m.link < 1e13 and 0 < m.latency < 1.0 and {k for k, _, _ in found["points"]} == set(measuring.KINDS)


def test_ranks_over_gloo_are_the_cpus_machine_on_a_host_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is where `explain --kernels --measure` looks for the machine of the CPU's back ends; the GPU's stays what it was."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda n: "NVIDIA H100")
    monkeypatch.setattr(measuring, "alone", lambda device: (Machine(memory=5.0, rates=(("f32", 1.0),)), 1.0))
    for backend, kind in (("gloo", "cpu"), ("nccl", "NVIDIA H100")):
        found = measuring.calibrate(1, backend)
        assert found.kind == found.about()["device"] == kind and str(found).startswith(f"{kind} on ")
    done = CliRunner().invoke(app, ["calibrate", "--backend", "gloo"])
    assert done.exit_code == 0 and measured(1, "cpu") is not None and measured(1) is None, done.output
