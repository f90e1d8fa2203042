"""What the passes gave before is read from the cache folder: the same program, found by all that decides it, checked again, and made anew where anything is in doubt."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepseed
from deepseed import build, pipeline, remembered
from deepseed.api import TrainStep
from deepseed.plan import parse_plan
from deepseed.remembered import Entry, Took
from deepseed.solver import assignment
from deepseed.speed import Machine
from deepseed.verify import verify


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DEEPSEED_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("DEEPSEED_REMEMBER", "1")
    monkeypatch.setattr(remembered, "WORTH", 0.0)
    return tmp_path / "programs"


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The passes that ran, by name."""
    names: list[str] = []
    plain = pipeline.run

    def run(p: Any, args: Any, passes: Any = pipeline.PIPELINE, **options: Any) -> Any:
        names.extend(each.name for each in passes)
        return plain(p, args, passes, **options)

    monkeypatch.setattr(pipeline, "run", run)
    yield names


def compiled(plan: str = "zero3+tp2+mb2", width: int = 8, **options: Any) -> TrainStep:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, width))
    step = deepseed.compile(model, plan, optimizer=torch.optim.AdamW(model.parameters()), loss_fn=lambda m, x: m(x["x"]).square().mean(), **options)
    assert isinstance(step, TrainStep)
    return step


def batch(width: int = 8) -> dict[str, Tensor]:
    return {"x": torch.linspace(-1, 1, 8 * width).reshape(8, width)}


def losses(step: TrainStep) -> list[float]:
    return [float(step(batch())) for _ in range(3)]


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.program"))


def test_the_second_one_runs_no_pass_and_is_the_same(folder: Path, ran: list[str]) -> None:
    first = compiled()
    want = losses(first)
    assert len(files(folder)) == 1 and set(ran) == {p.name for p in pipeline.PIPELINE}
    ran.clear()
    second = compiled()
    assert losses(second) == want
    assert set(ran) == {"localize"}, "each rank's part is made from the program"
    assert second.program == first.program and second.program_hash == first.program_hash
    assert second.instances_checked == first.instances_checked > 0
    assert list(second.explain().seconds) == list(first.explain().seconds) == [p.name for p in pipeline.PIPELINE]
    assert {**second.explain().seconds, "localize": 0.0} == {**first.explain().seconds, "localize": 0.0}, "what each pass took when it ran"
    assert set(ran) == {"localize"}
    assert [(p.name, p.program) for p in second.passes] == [(p.name, p.program) for p in first.passes], "asked for, they run again"
    assert set(ran) == {p.name for p in pipeline.PIPELINE}
    assert second.passes is second.passes


@pytest.mark.parametrize("damage", [lambda raw: raw[:-1], lambda raw: b"", lambda raw: raw[:40], *(lambda raw, at=at: raw[: int(at * len(raw))] + bytes([raw[int(at * len(raw))] ^ 1]) + raw[int(at * len(raw)) + 1 :] for at in (0.0, 0.03, 0.5, 0.99))])
def test_what_is_damaged_is_made_anew(damage: Any, folder: Path, ran: list[str]) -> None:
    want = losses(compiled())
    (file,) = files(folder)
    whole = remembered.read(key := _only_key(folder))
    assert whole is not None
    file.write_bytes(damage(file.read_bytes()))
    assert remembered.read(key) is None
    ran.clear()
    assert losses(compiled()) == want
    assert "solve_placements" in ran
    again = remembered.read(key)
    assert again is not None and again.text == whole.text


def test_an_entry_of_another_key_is_not_taken(folder: Path) -> None:
    """A file that was renamed, or a key with the same beginning."""
    entry = Entry("text", (Took("canonicalize", 0.5, 0, ("a", "b")),), ("said",))
    remembered.write("a" * 64, entry)
    assert remembered.read("a" * 64) == entry
    assert remembered.read("a" * 32 + "b" * 32) is None


def _only_key(folder: Path) -> str:
    """The key under which the one file is found, asked from the compiler."""
    keys: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remembered, "read", lambda key: keys.append(key))
        patch.setattr(remembered, "write", lambda key, entry: None)
        compiled().compile(batch())
    (key,) = keys
    assert files(folder)[0].name == f"{key[:32]}.program"
    return key


def test_all_that_decides_the_program_is_in_the_key(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: dict[str, str] = {}

    def look(what: str, **options: Any) -> None:
        seen: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(remembered, "read", lambda key: seen.append(key))
            patch.setattr(remembered, "write", lambda key, entry: None)
            compiled(**options).compile(batch(options.get("width", 8)))
        (keys[what],) = seen

    look("as it is")
    look("once more")
    assert keys.pop("once more") == keys["as it is"]
    look("plan", plan="zero2+tp2+mb2")
    look("world size", world_size=8)
    look("model", width=6)
    look("option", clip_grad_norm=1.0)
    look("back end", codegen="cpp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "measured", lambda ranks: replace(Machine(), link=1.0))
        look("machine")
    for module, name in ((torch, "__version__"), (remembered.scipy, "__version__")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, name, type(getattr(module, name))("0.0"))
            look(f"version of {module.__name__}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remembered, "source_hash", lambda: "another")
        look("source")
    assert len(set(keys.values())) == len(keys) == 10, keys


def test_what_an_earlier_program_stored_is_in_the_key(folder: Path) -> None:
    """A second program of a model is pinned to where the first one has put its parameters: it is no other's."""
    p = compiled()
    p.compile(batch())
    alone = len(files(folder))
    p.compile({"x": torch.zeros(16, 8)})
    fresh = compiled()
    fresh.compile({"x": torch.zeros(16, 8)})
    assert alone == 1 and len(files(folder)) == 3


def test_every_file_of_the_package_is_in_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folders that are links too; names and content."""
    package, passes = tmp_path / "a" / "deepseed", tmp_path / "a" / "passes"
    (package / "ir").mkdir(parents=True)
    passes.mkdir()
    (package / "passes").symlink_to(passes)
    (package / "ir" / "text.py").write_text("1")
    (passes / "fuse.py").write_text("2")
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(remembered.sources, "ROOT", package)
    remembered.source_hash.cache_clear()
    assert remembered.source_hash() is None, "written after this process began: what runs may be older"
    monkeypatch.setattr(remembered, "_BEGAN", float("inf"))
    seen = []
    for change in (lambda: None, lambda: (passes / "fuse.py").write_text("3"), lambda: (package / "ir" / "text.py").rename(package / "ir" / "text2.py"), lambda: (package / "view.js").write_text("")):
        change()
        remembered.source_hash.cache_clear()
        seen.append(remembered.source_hash())
    remembered.source_hash.cache_clear()
    assert len(set(seen)) == 3 and seen[2] == seen[3]


@pytest.mark.parametrize("how", ["switched off", "other passes", "float64 for a verification", "quick"])
def test_what_is_not_kept(how: str, folder: Path, monkeypatch: pytest.MonkeyPatch, ran: list[str]) -> None:
    if how == "switched off":
        monkeypatch.setenv("DEEPSEED_REMEMBER", "0")
    if how == "other passes":
        monkeypatch.setattr(pipeline, "SHARED", tuple(replace(each) for each in pipeline.SHARED))
    if how == "quick":
        monkeypatch.setattr(remembered, "WORTH", 1e9)
    if how == "float64 for a verification":
        step = compiled()
        assert verify(step.model, batch(), "zero3+tp2+mb2", loss_fn=lambda m, x: m(x["x"]).square().mean()).ok
    else:
        losses(compiled())
    assert not files(folder) and "solve_placements" in ran


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "programs").write_text("a file")
    remembered.write("a" * 64, Entry("text", ()))
    assert remembered.read("a" * 64) is None
    assert len(losses(compiled())) == 3


@pytest.mark.parametrize("what", ["no program", "another layer's value"])
def test_a_wrong_program_is_not_taken_though_its_file_is_whole(what: str, folder: Path, ran: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """It is read and checked again; all passes run, and give a right one."""
    want = losses(compiled())
    key = _only_key(folder)
    entry = remembered.read(key)
    assert entry is not None and "aten.gelu" in entry.text
    line = next(line for line in entry.text.splitlines() if " = aten.gelu(" in line)
    wrong = {"no program": "%New York = ?", "another layer's value": line.replace("%", "%no_such_", 2).replace("%no_such_", "%", 1)}[what]
    remembered.write(key, replace(entry, text=entry.text.replace(line, wrong)))
    capsys.readouterr()
    ran.clear()
    assert losses(compiled()) == want and "solve_placements" in ran
    assert "the program that the cache folder had is not taken, all passes run: " in capsys.readouterr().err
    again = remembered.read(key)
    assert again is not None and again.text == entry.text


@pytest.mark.parametrize("plan", ["zero0", "zero3+dp2", "pp2+mb2"])
def test_modules_and_batches_that_are_called_anything(plan: str, ran: list[str]) -> None:
    """A program that is read back has their names."""
    class Cities(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("New York", "a(b)", 'q"', "tab\tand\x85", "ne\u2028xt", "x=y")})

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            (x,) = batch.values()
            for head in self.heads.values():
                x = head(x).relu()
            return x.square().mean()

    found = []
    for _ in range(2):
        ran.clear()
        torch.manual_seed(0)
        model = Cities()
        step = deepseed.compile(model, plan, optimizer=torch.optim.AdamW(model.parameters()), loss_fn=lambda m, b: m(b))
        found.append([float(step({"the\x85 x\u2028": torch.linspace(-1, 1, 32).reshape(4, 8)})) for _ in range(2)])
    assert found[0] == found[1] and set(ran) == {"localize"}


def test_what_the_solvers_clock_cut_short_is_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quiet machine may find a better one."""
    plain = assignment.milp

    def short(*args: Any, **options: Any) -> Any:
        found = plain(*args, **options)
        found.status = assignment.TIMED_OUT
        return found

    monkeypatch.setattr(assignment, "_SOLVED", {})
    with monkeypatch.context() as patch:
        patch.setattr(assignment, "milp", short)
        want = losses(compiled())
    assert not files(folder)
    assert losses(compiled()) == want and len(files(folder)) == 1


def test_passes_that_give_another_program_now_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled().compile(batch())
    second = compiled()
    second.compile(batch())
    plain = build.run_passes
    monkeypatch.setattr(build, "run_passes", lambda p, plan, *args, **options: plain(p, parse_plan("zero1+tp2+mb2"), *args, **options))
    with pytest.raises(build.CompileError, match="the passes give another program than the cache folder had, which runs\n  fix: DEEPSEED_REMEMBER=0"):
        _ = second.passes


def test_a_folder_that_is_only_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one in an image."""
    def refused(*args: Any) -> None:
        raise PermissionError("read-only")

    remembered.write("a" * 64, Entry("text", ()))
    monkeypatch.setattr(os, "utime", refused)
    assert remembered.read("a" * 64) == Entry("text", ())


def test_the_one_that_was_asked_for_longest_ago_goes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "MOST", 3)
    keys = [c * 64 for c in "abcd"]
    for n, key in enumerate(keys[:3]):
        remembered.write(key, Entry(key, ()))
        os.utime(folder / f"{key[:32]}.program", (n, n))
    assert remembered.read(keys[0]) is not None
    remembered.write(keys[3], Entry("d", ()))
    assert [remembered.read(key) is not None for key in keys] == [True, False, True, True]


def test_what_a_budget_chose_is_said_again(capsys: pytest.CaptureFixture[str], ran: list[str]) -> None:
    said = []
    for _ in range(2):
        ran.clear()
        step = compiled("zero1+dp2+budget(8KiB)")
        losses(step)
        said.append(([line for line in capsys.readouterr().err.splitlines() if "budget(" in line], step.instances_checked))
    assert set(ran) == {"localize"} and len(said[0][0]) == 1 and said[0] == said[1]
    assert step.instances_checked == max(p.instances for p in step.passes)


SCRIPT = """
import torch, deepseed
import deepseed.compiling, deepseed.remembered
deepseed.compiling.SLOW = deepseed.remembered.WORTH = 0.0
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 8))
step = deepseed.compile(model, "zero3+offload(optimizer)", optimizer=torch.optim.AdamW(model.parameters()), loss_fn=lambda m, x: m(x["x"]).square().mean())
print([float(step({"x": torch.linspace(-1, 1, 64).reshape(8, 8)})) for _ in range(2)])
"""


@pytest.mark.turn
def test_ranks_that_start_again(tmp_path: Path, folder: Path) -> None:
    """Rank 0 reads it for all; names are found again in another process, whatever its hashes of strings."""
    (tmp_path / "script.py").write_text(SCRIPT)
    found = []
    for seed in ("1", "2"):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(tmp_path / "script.py")], capture_output=True, text=True, env=environment, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append((sorted(re.findall(r"\[.*?\]", done.stdout)), done.stderr))  # ranks write into each other's lines
    assert len(files(folder)) == 1
    assert found[0][0] == found[1][0] and len(found[0][0]) == 2
    assert ", passes " in found[0][1] and "known passes" not in found[0][1]
    assert ", known passes " in found[1][1]
