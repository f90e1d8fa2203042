"""The zoo: what is equal, refused, wrong, crashed or too slow, one process a target; the page that comes out."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deepseed.cli import app
from deepseed.plan import PlanError
from deepseed.zoo import PLANS, TARGETS, Outcome, Result, examine, line, parse_plans, read_results, run, summary, table

FILE = """
import os, time
import torch
from torch import nn

def error(m, b):
    return (m(b["x"]) ** 2).mean()

def good():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)), {"x": torch.randn(8, 8)}, dict(loss_fn=error)

def branches():
    def loss(m, b):
        y = m(b["x"]).mean()
        return y if y > 0 else -y
    return nn.Linear(8, 8), {"x": torch.randn(8, 8)}, dict(loss_fn=loss)

def crashes():
    os._exit(3)

def raises():
    raise RuntimeError("no such data")

def sleeps():
    time.sleep(1000)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "models.py"
    path.write_text(FILE)
    return path


def test_the_list_has_thirty_targets_and_plans_that_can_be_read() -> None:
    assert len(TARGETS) == len(set(TARGETS)) == 30
    assert parse_plans(",".join(PLANS)) == [("zero1", 2), ("zero2", 3), ("zero3", 4), ("tp2", None), ("sp2", None), ("zero3+tp2", 4)]
    with pytest.raises(PlanError, match="did you mean zero3"):
        parse_plans("tp2,zer3x2")


@pytest.mark.turn
def test_one_targets_end_is_not_the_others(file: Path) -> None:
    said: list[str] = []
    names = ("crashes", "raises", "branches", "good")
    results = run([f"{file}:{name}" for name in names], ["zero1x2", "tp2", "sp2"], steps=1, tell=said.append)
    crashed, raised, refused, good = results
    assert [o.verdict for o in crashed.outcomes] == ["failed"] * 3 and "code 3" in crashed.why and not crashed.captured
    assert "raised RuntimeError: no such data" in raised.why and "Traceback" in Path(raised.log).read_text() and raised.wrong
    assert [o.verdict for o in refused.outcomes] == ["refused"] * 3 and "CaptureError" in refused.why and not refused.wrong
    assert [o.verdict for o in good.outcomes] == ["equal", "equal", "none"] and good.ok and good.parameters == 8 * 16 + 16 + 16 * 8 + 8
    assert all(o.loss_error <= 1e-12 and o.grad_error <= 1e-10 for o in good.outcomes)
    assert [text.split()[0] for text in said] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"] and raised.log in said[1]
    assert summary(results).splitlines()[-1] == f"next: deepseed verify '{crashed.target}' --plan zero1 --world-size 2"


def test_a_target_that_takes_too_long_is_stopped(file: Path) -> None:
    (slow,) = run([f"{file}:sleeps"], ["tp2"], timeout=3)
    assert slow.outcomes[0].verdict == "failed" and slow.why == "stopped after 3 s"


def test_the_page_says_what_was_refused_and_why() -> None:
    equal = Outcome("zero1x2", "equal", 2e-16, 3e-15, 1e-16, 0.25)
    results = [
        Result("hf:LlamaForCausalLM(num_hidden_layers=4)", 1234, True, 900, {}, 0.0, [equal, Outcome("tp2", "refused", why="PlanError: two lines\n  fix: none")], 3.2),
        Result("a/b.py:dlrm", 99, True, 300, {"aten.odd": 2}, 0.125, [equal, Outcome("tp2", "differs", why="after pass x: %y")], 1.0),
    ]
    page = table(results, ["zero1x2", "tp2"])
    rows = [text for text in page.splitlines() if text.startswith("| ")]
    assert rows[0].startswith("| model | parameters | captured | zero1 x2 | tp2 |")
    assert rows[1] == "| LlamaForCausalLM | 1,234 | 900 ops | 2e-16 / 3e-15 | refused [1] | - | 0.0% | 25% | 3 |"
    assert rows[2] == "| dlrm | 99 | 300 ops | 2e-16 / 3e-15 | DIFFERS [2] | aten.odd x2 | 12.5% | 25% | 1 |"
    assert "[1] refused: PlanError: two lines  \n[2] differs: after pass x: %y\n" in page
    assert "0 of 2 models equal in all plans; 2 equal, 1 refused, 1 differs." in page
    assert "1 differs; 3 of the list of 5 not run yet." in table(results, ["zero1x2", "tp2"], listed=5)
    assert "1/2 equal" in line(results[0]) and "tp2 refused: PlanError: two lines  (" in line(results[0])


@pytest.mark.turn
def test_the_command_writes_the_page_and_json(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "models.md"
    done = CliRunner().invoke(app, ["zoo", f"{file}:good", "--plans", "tp2", "--steps", "1", "--out", str(out), "--json"])
    assert done.exit_code == 0, done.output
    (found,) = json.loads(done.stdout)
    assert found["captured"] and found["outcomes"][0]["verdict"] == "equal"
    assert "| good |" in out.read_text() and "wrote" in done.stderr
    failed = CliRunner().invoke(app, ["zoo", f"{file}:raises", "--plans", "tp2"])
    assert failed.exit_code == 1 and failed.output.splitlines()[-1].startswith("next: deepseed verify ")
    assert CliRunner().invoke(app, ["zoo", f"{file}:good", "--plans", "zer3"]).exit_code == 2


@pytest.mark.turn
def test_a_list_of_targets_whose_results_are_kept(file: Path, tmp_path: Path) -> None:
    listed, keep, out = tmp_path / "list.txt", tmp_path / "kept.jsonl", tmp_path / "page.md"
    listed.write_text(f"# Two models\n#\n# A word on them.\n\n{file}:good\n# a remark\n{file}:branches\n")
    command = ["zoo", "--list", str(listed), "--keep", str(keep), "--plans", "tp2", "--steps", "1", "--out", str(out)]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0 and len(keep.read_text().splitlines()) == 2, first.output
    page = out.read_text()
    assert page.startswith("# Two models\n\nA word on them.\n") and "1 of 2 models equal in all plans; 1 equal, 1 refused." in page
    file.write_text("raise SystemExit")  # nothing is run again
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0 and out.read_text() == page
    so_far: list[list[str]] = []
    run([f"{file}:branches", f"{file}:other", f"{file}:good"], ["tp2"], keep=keep, so_far=lambda results: so_far.append([r.target for r in results]))
    assert so_far[0] == [f"{file}:branches", f"{file}:good"] and so_far[-1] == [f"{file}:branches", f"{file}:other", f"{file}:good"]
    (one, two, _) = read_results(keep)
    assert one.ok and two.verdict == "refused"
    assert CliRunner().invoke(app, [*command, f"{file}:good"]).exit_code == 2
    keep.write_text("{}\n")
    assert "kept.jsonl:1 is no result" in CliRunner().invoke(app, command).output
    listed.write_text(f"{file}:good\n{file}:good\n")
    assert "twice" in CliRunner().invoke(app, command).output


SMALL = [target for target in TARGETS if target.split(":")[1].startswith(("Llama", "GPT2", "Mpt", "Phi3", "OPT", "dlrm", "dit"))]
DRAWN = random.Random(3).sample([(target, plan) for target in SMALL for plan in ("zero1x2", "zero3x4", "tp2", "zero3+tp2x4")], 4)


@pytest.mark.parametrize(("target", "plan"), DRAWN)
def test_a_sample_of_the_zoo(target: str, plan: str) -> None:
    pytest.importorskip("transformers")
    (outcome,) = (found["outcome"] for found in examine(target, [plan], steps=2) if "outcome" in found)
    assert outcome["verdict"] == "equal", outcome


@pytest.mark.wide
@pytest.mark.parametrize("target", TARGETS)
def test_the_whole_zoo(target: str) -> None:
    """Nothing differs, nothing fails; what does not work is refused."""
    pytest.importorskip("transformers")
    (result,) = run([target])
    assert result.captured and not result.wrong, line(result)
