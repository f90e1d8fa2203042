"""Profiles of steps: every node of every rank once, in its order and within the step; a profiled step is a step; the command, its trace and its refusals."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from small import small
from typer.testing import CliRunner

import deepseed
from deepseed import kernels
from deepseed.cli import app
from deepseed.codegen import inductor
from deepseed.profiles import Profile

UNSHOWN = ("send", "collect")  # no value of their own


def profiled(plan: str) -> tuple[Any, Profile]:
    model, batch, loss_fn = small()
    step = deepseed.compile(model, plan, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2), loss_fn=loss_fn)
    step.profile(batch)
    return step, step.profile(batch)


@pytest.mark.parametrize("plan", ["zero0", "zero2+dp2", "tp2+mb2", "pp2+mb4"])
def test_every_node_once_a_microbatch(plan: str) -> None:
    step, found = profiled(plan)
    p, ranks = found.program, step.mesh.ranks
    assert len(found.moments) == len(found.began) == ranks
    for rank, moments in enumerate(found.moments):
        assert all(m.begin <= m.end for m in moments) and all(a.end == b.begin for a, b in pairwise(moments))
        seen = [(m.name, m.mb) for m in moments if m.name in p.producers]
        assert len(seen) == len(set(seen))
        stages = set(range(p.schedule.stages)) if p.schedule is not None else {0}
        mine = {s for s in stages if p.schedule is None or p.schedule.lane_of(s) == step.mesh.coordinate(rank).get("pp", 0)}
        times = {op.name: step.plan.mb or 1 if op.part and not op.part.startswith("once") else 1 for op in p.ops if op.stage in mine and op.target not in UNSHOWN}
        assert {name: sum(n == name for n, _ in seen) for name in times} == times
    assert abs(sum(seconds for _, seconds, _ in found.spent("node")) - sum(m.end - m.begin for each in found.moments for m in each if m.name in p.producers) / ranks) < 1e-9


def test_a_profiled_step_is_a_step() -> None:
    model, batch, loss_fn = small()
    other, _, _ = small()
    a = deepseed.compile(model, "zero3+dp2", optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2), loss_fn=loss_fn)
    b = deepseed.compile(other, "zero3+dp2", optimizer=torch.optim.AdamW(other.parameters(), lr=1e-2), loss_fn=loss_fn)
    a.profile(batch)
    b(batch)
    assert torch.equal(a(batch), b(batch))
    assert all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())


def test_the_trace_and_the_table(tmp_path: Path) -> None:
    _, found = profiled("zero2+dp2")
    found.save(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    ops = [e for e in events if e["ph"] == "X"]
    assert {e["pid"] for e in ops} == {0, 1} and {"op", "module", "line", "phase"} <= set(ops[0]["args"])
    begun, ended = ({e["id"]: e["ts"] for e in events if e["ph"] == ph} for ph in "be")
    assert begun.keys() == ended.keys() and begun and all(begun[key] <= ended[key] for key in begun)
    names = {e["name"] for e in events if e["ph"] == "b"}
    assert any(name == "reduce_scatter dp" for name in names), names
    text = str(found)
    assert text.startswith("a step of ") and all(found.spent(by)[0][0] in text for by in ("op", "module"))
    assert any("proj" in module for module, _, _ in found.spent("module"))
    assert any(op == "optim.adamw" for op, _, _ in found.spent("op"))


@pytest.mark.parametrize("plan", ["zero2+dp2", "pp2+mb2"])
def test_a_kernel_is_one_event_with_its_nodes_and_modules(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs is what runs without the clock, and each group is there once a microbatch, with what it made elsewhere."""
    monkeypatch.setitem(kernels.BACK_ENDS, "functions", lambda wanted, folder, tell: [inductor.python(k) for k in wanted])
    model, batch, loss_fn = small()
    a, b = (deepseed.compile(m, plan, optimizer=torch.optim.AdamW(m.parameters(), lr=1e-2), loss_fn=loss_fn, codegen="functions") for m in (model, small()[0]))
    found = a.profile(batch)
    b(batch)
    assert torch.equal(a(batch), b(batch))
    names, events = found.kernels, [e for e in found.trace()["traceEvents"] if e["ph"] == "X"]
    groups = [e for e in events if "nodes" in e["args"]]
    marks = {op.kernel for op in found.program.ops if op.kernel}
    assert {e["name"] for e in groups} == marks == names.keys() and marks
    for e in groups:
        inside = [op for op in found.program.ops if op.kernel == e["name"]]
        assert e["args"]["nodes"] == [op.name for op in inside] and e["args"]["op"] == names[e["name"]]
        assert e["args"]["modules"] == sorted({op.path for op in inside}) and e["args"]["module"] == inside[-1].path
    seen = [(e["pid"], e["name"], e["args"].get("microbatch", 0)) for e in events]
    assert len(seen) == len(set(seen))
    assert not {name for _, name, _ in seen} & {op.name for op in found.program.ops if op.kernel and op.name != op.kernel}
    assert {name for name, _, _ in found.spent("op")} >= set(names.values())


def test_the_command_on_real_ranks(tmp_path: Path) -> None:
    out = tmp_path / "trace.json"
    codegen = "cpp" if inductor.compiler() else "python"
    done = CliRunner().invoke(app, ["profile", "hf:LlamaForCausalLM", "--plan", "zero3+dp2", "--steps", "2", "--codegen", codegen, "--json", "-o", str(out)])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout[done.stdout.index("{") : done.stdout.rindex("}") + 1])
    assert found["ranks"] == 2 and found["seconds"] > 0 and {row["name"] for row in found["phase"]} == {"forward", "backward", "update"}
    events = json.loads(out.read_text())["traceEvents"]
    assert {e["pid"] for e in events} == {0, 1} and any(e["name"] == "all_gather dp" for e in events)
    assert any("nodes" in e["args"] for e in events if e["ph"] == "X") == (codegen == "cpp")


@pytest.mark.parametrize(("options", "said"), [(["--backend", "mpi"], "unknown backend 'mpi'"), (["-o", "/no/such/trace.json"], "no folder /no/such"), (["--codegen", "cobol"], "no such back end"), (["--optimizer", "none", "--backend", "simulate"], "without an update is not profiled")])
def test_refusals(options: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["profile", "hf:LlamaForCausalLM", *options])
    assert done.exit_code == 2 and said in done.output and "fix:" in done.output
