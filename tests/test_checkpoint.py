"""Checkpoints: any plan goes on from any other's, plain PyTorch reads them, and a damaged one is refused before anything is changed.

The whole product of plans is in test_resume.py; here is a sample of it, with another model.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import pickle
import random
import re
import shutil
import socket
import tempfile
import threading
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import strategies as ours
import torch
import torch.distributed.checkpoint as dcp
from gloo import checkpoint as ranks_do
from gloo.checkpoint import FIRST, Tagger, batches, everything, made, trained
from gloo.launch import forkserver, ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from killing import killed
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

import deepseed
from deepseed.api import TrainStep
from deepseed.check.shards import coordinates, shards
from deepseed.ir.layout import Layout
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Type
from deepseed.runtime import boxfile, crc, saved
from deepseed.runtime import folder as folders
from deepseed.runtime.folder import CheckpointError, DamagedError, HalfLoadedError
from deepseed.runtime.saved import Entry, Reader, Want, boxes, read, share_out, write, write_metadata
from deepseed.runtime.saved import shares as shares_of

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("no_waiting_for_the_disk")]
torch.set_num_threads(1)

PLANS = [
    "zero0", "zero0+dp2", "zero1+dp2", "zero2+dp4", "zero3+dp2", "zero3+dp4", "tp2", "tp4", "zero1+tp2+dp2", "zero3+tp2+dp2",
    "zero3+pp2+dp2", "zero1+pp4+dp1", "zero3+tp2+pp2+dp2", "zero2+pp2+dp2+interleaved2", "zero3+pp2+dp2+zb",
]  # fmt: skip
TOLERANCE = 1e-12


def quiet(plan: str, **options: Any) -> TrainStep:
    return made(plan, backend="simulate", **options)


def close(mine: dict[str, Tensor], want: dict[str, Tensor], where: str = "") -> float:
    """The largest difference, relative to the largest number of the tensor."""
    assert set(mine) == set(want)
    error = 0.0
    for name, t in want.items():
        if t.numel() and t.is_floating_point():
            error = max(error, float((mine[name] - t).abs().max()) / (float(t.abs().max()) or 1.0))
        else:
            assert torch.equal(mine[name], t), f"{where}: {name}"
    assert error <= TOLERANCE, f"{where}: {error}"
    return error


def same(mine: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert set(mine) == set(want)
    assert not [name for name in want if not torch.equal(mine[name], want[name])]


# the boxes --------------------------------------------------------------------------------------------------------------


@st.composite
def stored(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[Mesh, Layout]]]:
    """A shape and two ways to lie, each on a mesh of its own; nothing partial."""
    shape = draw(ours.shapes())
    out = []
    for _ in range(2):
        mesh = draw(ours.meshes())
        layout = draw(ours.layouts(shape, mesh))
        out.append((mesh, Layout(tuple((a, e) for a, e in layout.elements if a not in dict(layout.partials)))))
    return shape, out


@settings(max_examples=60, deadline=None)
@given(stored(), st.sampled_from([100, 400, 10**6]), st.sampled_from([64, 2**20]))
def test_every_layout_reads_what_any_other_wrote(drawn: Any, largest: int, piece: int) -> None:
    """And each element is written once, in boxes that are not too large; they are read in pieces."""
    shape, ((mesh, layout), (other, wanted)) = drawn
    whole = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    entries = {"x": Entry(shape, whole.dtype, layout, shards(whole, Type("f64", shape, layout), mesh))}
    count = torch.zeros(shape, dtype=torch.int64)
    for rank in share_out(entries, mesh, largest):
        for _, box in rank:
            count[tuple(slice(i, i + n) for i, n in zip(box.at, box.sizes, strict=True))] += 1
            assert 8 * torch.Size(box.sizes).numel() <= max(largest, 8)
    assert bool((count == 1).all())
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(boxfile, "CHUNK", piece)
        results, files = write(Path(name), entries, {"extra": b"text"}, range(mesh.ranks), shares_of(entries, mesh, range(mesh.ranks), largest))
        write_metadata(Path(name), entries, {"extra": b"text"}, mesh, results, {"y": "x"}, {}, largest)
        for number, (coordinate, part) in enumerate(zip(coordinates(other), shards(whole, Type("f64", shape, wanted), other), strict=True)):
            wants = [Want(n, shape, wanted, coordinate, torch.full(part.shape, -1.0, dtype=torch.float64)) for n in ("x", "y")]
            sums = boxfile.Sums(files)
            assert read(Path(name), wants, other, ["extra"], sums) == {"extra": b"text"}
            assert all(torch.equal(w.into, part) for w in wants), number
            assert len(sums.left(0)) == sum(len(rank) for rank in share_out(entries, mesh, largest)) + 1
            assert bool(sums.checked) and (other.ranks > 1 or not sums.left(sums.checked))


def test_boxes_are_runs_of_consecutive_indices() -> None:
    mesh = Mesh((("dp", 2), ("tp", 2)))
    fused = Layout.of(tp=ours.Split(0, 3), dp=ours.Split(1))  # 3*8@tp, 4@dp
    got = boxes((24, 4), fused, mesh, {"dp": 1, "tp": 1})
    assert [(b.at, b.local, b.sizes) for b in got] == [((4, 2), (0, 0), (4, 2)), ((12, 2), (4, 0), (4, 2)), ((20, 2), (8, 0), (4, 2))]


def test_what_several_ranks_hold_is_written_once_and_by_turns() -> None:
    mesh = Mesh((("dp", 4),))
    entries = {f"w{n}": Entry((256,), torch.float32, Layout(), [torch.zeros(256)] * 4) for n in range(8)}
    assert [len(share) for share in share_out(entries, mesh)] == [2, 2, 2, 2]


# any plan from any plan -------------------------------------------------------------------------------------------------


@cache
def compiled(plan: str) -> TrainStep:
    return quiet(plan)


@cache
def checkpoint_of(plan: str) -> tuple[Path, list[float], dict[str, Tensor]]:
    """Two steps, a checkpoint, two more: its folder, and what an uninterrupted run comes to."""
    path = Path(tempfile.mkdtemp()) / "checkpoint"
    step, data = compiled(plan), batches()
    for batch in data[:FIRST]:
        step(batch)
    step.save(path)
    return (path, *trained(step, data[FIRST:]))


def used() -> TrainStep:
    """A step that has been trained."""
    checkpoint_of("zero3+dp2")
    return compiled("zero3+dp2")


def goes_on(step: TrainStep, path: Path, losses: list[float], values: dict[str, Tensor], where: str) -> float:
    step.load(path)
    assert step.steps == FIRST
    got, now = trained(step, batches()[FIRST:])
    assert got == pytest.approx(losses, rel=TOLERANCE, abs=0), where
    return close(now, values, where)


def sample() -> list[tuple[str, str]]:
    """Each plan once as the writer and once as the reader."""
    return list(zip(PLANS, random.Random(1).sample(PLANS, len(PLANS)), strict=True))


@pytest.mark.parametrize(("first", "then"), sample())
def test_training_goes_on_under_another_plan(first: str, then: str) -> None:
    """In a step that has trained before, four steps of its own."""
    checkpoint_of(then)
    goes_on(compiled(then), *checkpoint_of(first), f"{first} -> {then}")


@pytest.mark.parametrize(("first", "then"), [("zero3+tp2+dp2", "zero1+dp2"), ("zero0", "zero3+dp4"), ("tp2", "zero3+tp2+pp2+dp2"), ("zero1+pp4+dp1", "zero3+pp2+dp2")])
def test_loading_before_the_first_batch(first: str, then: str) -> None:
    """The usual way to resume: optimizer state waits for the first program."""
    step = quiet(then, seed=4)
    path, losses, values = checkpoint_of(first)
    step.load(path)
    assert (step.steps, step.seed) == (FIRST, 0) and not step.states
    assert set(step.state_dict()) < set(values)
    got, now = trained(step, batches()[FIRST:])
    assert got == pytest.approx(losses, rel=TOLERANCE, abs=0)
    close(now, values)


@pytest.mark.parametrize("plan", [pytest.param("zero0", marks=pytest.mark.wide), pytest.param("zero2+dp2", marks=pytest.mark.wide), "zero3+tp2+dp2", "zero3+pp2+dp2"])
def test_the_same_plan_goes_on_bit_for_bit_in_float32(plan: str, tmp_path: Path) -> None:
    """With dropout, and a scheduler that moves lr and betas: its own state is the user's ``extra``."""

    def start(seed: int, options: int) -> tuple[TrainStep, Any]:
        step = quiet(plan, seed=seed, dtype=torch.float32)
        return step, torch.optim.lr_scheduler.OneCycleLR(step.optimizer, max_lr=0.02 * options, total_steps=10)

    def run(step: TrainStep, scheduler: Any, data: list[Any]) -> list[float]:
        out = []
        for batch in data:
            out.append(float(step(batch)))
            scheduler.step()
        return out

    data = batches(6)
    step, scheduler = start(0, 1)
    run(step, scheduler, data[:3])
    step.save(tmp_path / "c", extra={"scheduler": scheduler.state_dict(), "epoch": 1})
    want = run(step, scheduler, data[3:])
    again, other = start(1, 3)
    extra = again.load(tmp_path / "c")
    other.load_state_dict(extra["scheduler"])
    assert extra["epoch"] == 1
    assert run(again, other, data[3:]) == want
    same(everything(again), everything(step))
    assert again.optimizer.param_groups[0]["lr"] == step.optimizer.param_groups[0]["lr"] and isinstance(again.optimizer.param_groups[0]["betas"], tuple)
    assert [g["weight_decay"] for g in again.optimizer.param_groups] == [0.1, 0.0]
    step.load(tmp_path / "c")  # back in time, in the running step
    scheduler.load_state_dict(extra["scheduler"])
    assert run(step, scheduler, data[3:]) == want


# plain PyTorch ----------------------------------------------------------------------------------------------------------


def test_plain_pytorch_reads_it(tmp_path: Path) -> None:
    """By the converter, and by the default planner in one process without a process group; tied names included."""
    step = quiet("zero3+tp2+dp2")
    for batch in batches(2):
        step(batch)
    step.save(tmp_path / "c", extra={"epoch": 3})
    dcp_to_torch_save(tmp_path / "c", tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert set(whole) == {"model", "optimizer", "extra"} and whole["extra"] == {"epoch": 3}
    same(whole["optimizer"], step.optimizer_state())
    plain = Tagger().double()
    plain.load_state_dict(whole["model"])
    same(dict(plain.state_dict()), step.state_dict())
    other = Tagger().double()
    values = {"model": dict(other.state_dict())}
    dcp.load(values, checkpoint_id=tmp_path / "c", no_dist=True)
    same(values["model"], step.state_dict())
    stored_once = {item for share in json.loads((tmp_path / "c" / "manifest.json").read_text())["tensors"] for item in [share]}
    assert "model.embed.weight" in stored_once and "model.head.weight" not in stored_once


# damage -----------------------------------------------------------------------------------------------------------------

FILES = ["__0_0.distcp", "__1_0.distcp", ".metadata", "manifest.json"]


def flip(path: Path, at: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 4
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "torn": (lambda p: os.truncate(p, p.stat().st_size // 2), r"is torn: \d+ bytes were written, \d+ are there|is damaged"),
    "one byte short": (lambda p: os.truncate(p, p.stat().st_size - 1), r"is torn: \d+ bytes were written, \d+ are there|is damaged"),
    "empty": (lambda p: os.truncate(p, 0), "is torn: .* 0 are there|is damaged"),
    "a bit at the start": (lambda p: flip(p, 0.0), "is damaged"),
    "a bit in the middle": (lambda p: flip(p, 0.5), "is damaged"),
    "a bit at the end": (lambda p: flip(p, 0.999), "is damaged"),
    "missing": (lambda p: p.unlink(), "is missing|has no manifest"),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_by_name_and_nothing_is_changed(file: str, damage: str, tmp_path: Path) -> None:
    step = used()
    shutil.copytree(checkpoint_of("zero3+dp2")[0], tmp_path / "bad")
    before, options, at = everything(step), copy.deepcopy(step.optimizer.state_dict()["param_groups"]), (step.steps, step.seed)
    do, says = DAMAGE[damage]
    do(tmp_path / "bad" / file)
    with pytest.raises(CheckpointError, match=says) as caught:
        step.load(tmp_path / "bad")
    assert file in str(caught.value)
    same(everything(step), before)
    assert step.optimizer.state_dict()["param_groups"] == options and (step.steps, step.seed) == at


def test_every_single_flipped_bit_of_the_manifest_is_found_or_means_nothing(tmp_path: Path) -> None:
    path = checkpoint_of("zero3+dp2")[0]
    text, want = (path / "manifest.json").read_bytes(), folders.manifest_of(path)
    rng = random.Random(0)
    for _ in range(300):
        data = bytearray(text)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (tmp_path / "manifest.json").write_bytes(data)
        with contextlib.suppress(CheckpointError):
            assert folders.manifest_of(tmp_path) == want


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: shutil.rmtree(d), "there is no checkpoint at"),
        (lambda d: [(d / f).unlink() for f in FILES], "is no checkpoint, or a torn one"),
        (lambda d: _rewrite(d, format=2), "has format 2, this version reads 1"),
    ],
)
def test_what_is_no_checkpoint(change: Any, says: str, tmp_path: Path) -> None:
    shutil.copytree(checkpoint_of("zero3+dp2")[0], tmp_path / "c")
    change(tmp_path / "c")
    with pytest.raises(CheckpointError, match=says):
        used().load(tmp_path / "c")


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


@pytest.mark.parametrize("content", [pickle.dumps(Evil()), b"\x80\x04\x8c\x27torch.distributed.checkpoint.filesystem\x94\x8c\x09os.system\x94\x93\x94\x8c\x04true\x94\x85\x94R\x94."])
def test_an_index_that_would_run_code_is_refused(content: bytes, tmp_path: Path) -> None:
    """With a manifest that vouches for it."""
    shutil.copytree(checkpoint_of("zero3+dp2")[0], tmp_path / "c")
    (tmp_path / "c" / ".metadata").write_bytes(content)
    files = folders.manifest_of(tmp_path / "c")["files"]
    _rewrite(tmp_path / "c", files={**files, ".metadata": folders.digest(tmp_path / "c" / ".metadata")})
    refused(used(), tmp_path / "c", r"/c/.metadata names \S+system, which is no record of an index")


def _named(*words: str) -> bytes:
    return b"\x80\x04c" + words[0].encode() + b"\n" + words[1].encode() + b"\n"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (_named("torch.distributed.checkpoint.utils", "Stats") + b"(X\x01\x00\x00\x00xtR.", "names torch.distributed.checkpoint.utils.Stats"),
        (_named("torch.distributed.checkpoint._async_process_executor", "TCPStore") + b".", "names torch.distributed.checkpoint._async_process_executor.TCPStore"),
        (_named("torch.distributed.checkpoint.metadata", "Metadata") + b"(N}X\x0a\x00\x00\x00planner_at" + _named("torch", "Size")[2:] + b"stb.", "would change the classes that read it"),
        (_named("torch.distributed.checkpoint.metadata", "MetadataIndex") + b"(N}X\x08\x00\x00\x00__init__" + _named("torch", "Size")[2:] + b"stb.", "would change the classes that read it"),
    ],
    ids=["a constructor", "a connection", "an attribute", "a method"],
)
def test_an_index_makes_nothing_but_records(content: bytes, says: str, tmp_path: Path) -> None:
    """No other class of torch's package is called, and those that read it are afterwards what they were."""
    before = dict(vars(Metadata)), dict(vars(MetadataIndex))
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(says)):
        Reader(tmp_path).read_metadata()
    assert before == (dict(vars(Metadata)), dict(vars(MetadataIndex)))


def test_a_path_in_an_index_is_no_path_of_pythons(tmp_path: Path) -> None:
    """The index of a folder names the folder; a pickle can change the class that it names."""
    (tmp_path / ".metadata").write_bytes(_named("pathlib", "PosixPath") + b"(N}X\x06\x00\x00\x00exists" + _named("pathlib", "PurePosixPath")[2:] + b"stb.")
    before = Path.exists
    Reader(tmp_path).read_metadata()
    assert Path.exists is before and "exists" not in vars(type(tmp_path))


def _rewrite(path: Path, **changes: Any) -> None:
    manifest = {**folders.manifest_of(path), **changes}
    (path / "manifest.json").write_text(json.dumps({**manifest, "checksum": folders.checksum(manifest)}))


# a writer that is killed ------------------------------------------------------------------------------------------------


def small(seed: int) -> TrainStep:
    torch.manual_seed(seed)
    model = nn.Linear(4, 4).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step = deepseed.compile(model, "zero3+dp2", optimizer=optimizer, loss_fn=lambda m, x: m(x).square().mean(), backend="simulate", example_batch=torch.ones(4, 4).double())
    assert isinstance(step, TrainStep)
    return step


@pytest.mark.parametrize("former", [True, False])
def test_a_writer_killed_at_any_moment_leaves_one_that_loads(former: bool, tmp_path: Path) -> None:
    step, reader, batch = small(0), small(1), torch.ones(4, 4).double()
    step(batch)
    here, path, start = tmp_path / "here", tmp_path / "here" / "c", tmp_path / "start"
    here.mkdir()
    states = [everything(step)]
    if former:
        step.save(path)
    shutil.copytree(here, start)
    step(batch)
    states.append(everything(step))
    found, at, calls = [], 0, None
    while calls is None:
        shutil.rmtree(here)
        shutil.copytree(start, here)
        calls = killed(lambda: step.save(path), at)
        before = everything(reader)
        try:
            reader.load(path)
        except CheckpointError as error:
            assert not former and "there is no checkpoint at" in str(error)
            same(everything(reader), before)
            found.append(-1)
        else:
            now = everything(reader)
            found.append(next(n for n, values in enumerate(states) if all(torch.equal(now[k], values[k]) for k in values)))
        if at % 5 == 0:  # the next save finds all in order, and leaves nothing behind
            step.save(path)
            reader.load(path)
            same(everything(reader), states[1])
            assert [p.name for p in here.iterdir()] == ["c"]
        at += 1
    assert at > 15 and found == sorted(found) and set(found) == {0 if former else -1, 1}


def test_every_file_and_folder_is_made_to_last_before_the_former_one_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    step, rename, rmtree = used(), os.rename, shutil.rmtree
    step.save(tmp_path / "c")
    monkeypatch.setattr(os, "fsync", lambda descriptor: said.append("sync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
    monkeypatch.setattr(os, "rename", lambda a, b: (said.append(f"{Path(a).name} -> {Path(b).name}"), rename(a, b)))
    monkeypatch.setattr(shutil, "rmtree", lambda p, **k: (said.append(f"delete {p.name}"), rmtree(p, **k)))
    step.save(tmp_path / "c")
    names = "\n".join(re.sub(r"-[0-9a-f]{8}", "", line) for line in said)
    assert names == (
        "sync __0_0.distcp\nsync __1_0.distcp\nsync .metadata.tmp\n.metadata.tmp -> .metadata\nsync manifest.json.tmp\nmanifest.json.tmp -> manifest.json\nsync c.tmp\n"
        f"c -> c.old\nc.tmp -> c\nsync {tmp_path.name}\ndelete c.old"
    )


def test_a_folder_that_holds_other_things_is_left_alone(tmp_path: Path) -> None:
    step = used()
    dcp.save({"x": torch.zeros(2)}, checkpoint_id=tmp_path / "plain", no_dist=True)
    with pytest.raises(CheckpointError, match=r"holds 2 files that step.save has not written, such as .metadata"):
        step.save(tmp_path / "plain")
    shutil.rmtree(tmp_path / "plain")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds 1 files that step.save has not written, such as notes.txt(.|\n)*fix: save to a folder of its own"):
        step.save(tmp_path / "mine")
    with pytest.raises(CheckpointError, match="is a file"):
        step.save(tmp_path / "mine" / "notes.txt")
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["mine", "mine/notes.txt"]
    step.save(tmp_path / "new" / "deep")  # parents are made
    (tmp_path / "link").symlink_to(tmp_path / "new" / "deep")
    step.save(tmp_path / "link")  # where it points to
    assert (tmp_path / "link").is_symlink() and step.load(tmp_path / "link") is None


def test_a_save_that_fails_leaves_the_former_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = used()
    step.save(tmp_path / "c", extra="former")
    with pytest.raises(CheckpointError, match=r"extra=dict cannot be saved and read back(.|\n)*scheduler.state_dict"):
        step.save(tmp_path / "c", extra={"model": step.model})

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("deepseed.runtime.saved.write_boxes", full)
    with pytest.raises(CheckpointError, match=r"/c\.tmp-.*/__0_0\.distcp cannot be written: No space left on device"):
        step.save(tmp_path / "c")
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["c"] and step.load(tmp_path / "c") == "former"


# between the two passes ------------------------------------------------------------------------------------------------

BETWEEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a bit": (lambda p: flip(p, 0.5), r"__1_0.distcp was changed while it was loaded: file \d+ of \d+ bytes, written at \S+ s when it was checked, file \d+ of"),
    "torn": (lambda p: os.truncate(p, p.stat().st_size // 2), "__1_0.distcp (is torn: it ends|was changed)"),
    "gone": (lambda p: p.unlink(), "__1_0.distcp cannot be read: No such file or directory"),
    "another file": (lambda p: (shutil.copy2(p, p.with_suffix(".new")), os.rename(p.with_suffix(".new"), p)), "__1_0.distcp was changed while it was loaded"),
}


def failing(patch: pytest.MonkeyPatch, do: Callable[[Path], Any], here: Path) -> None:
    """Of this folder a file is no more what it was, once all is checked."""
    fill = saved.Reading.fill

    def fails(reading: saved.Reading) -> None:
        if reading.folder == here:
            do(here / "__1_0.distcp")
        fill(reading)

    patch.setattr(saved.Reading, "fill", fails)


@pytest.mark.parametrize("how", BETWEEN)
def test_a_file_that_fails_after_it_was_checked_leaves_a_step_that_refuses_all_but_a_load(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, (path, losses, values) = used(), checkpoint_of("zero3+dp2")
    shutil.copytree(path, tmp_path / "bad")
    do, says = BETWEEN[how]
    with monkeypatch.context() as patch:
        failing(patch, do, tmp_path / "bad")
        with pytest.raises(HalfLoadedError, match=says + r"(.|\n)*the step is half loaded, and neither runs nor saves\n  fix: load again"):
            step.load(tmp_path / "bad")
    uses: dict[str, Callable[[], Any]] = {
        "run": lambda: step(batches()[0]), "loss": lambda: step.loss(batches()[0]), "save": lambda: step.save(tmp_path / "c"), "series": lambda: deepseed.Checkpoints(step, tmp_path / "d").save(),
        "pretrained": lambda: step.save_pretrained(tmp_path / "e"), "values": step.state_dict, "state": step.optimizer_state,
    }  # fmt: skip
    for use in uses.values():
        with pytest.raises(HalfLoadedError, match=r"the step is half loaded from .*/bad, which failed (.|\n)*fix: load again, this checkpoint or another one, with its optimizer state"):
            use()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad"]
    step.load(path, optimizer=False)  # the optimizer's state is still half of it
    with pytest.raises(HalfLoadedError, match=r"half loaded from .*/bad, which failed"):
        step(batches()[0])
    goes_on(step, path, losses, values, how)


def test_a_file_without_sums_of_its_boxes_that_changes_before_the_first_batch_is_seen(tmp_path: Path) -> None:
    """As earlier versions wrote them: one sha256 a file."""
    path = tmp_path / "c"
    shutil.copytree(checkpoint_of("zero3+dp2")[0], path)
    manifest = {k: v for k, v in json.loads((path / "manifest.json").read_text()).items() if k != "checksum"}
    manifest["files"] = {name: folders.digest(path / name) for name in manifest["files"]}
    (path / "manifest.json").write_text(json.dumps({**manifest, "checksum": folders.checksum(manifest)}))
    step = quiet("zero3+dp2", seed=7)
    step.load(path)
    for name in ("__1_0.distcp", ".metadata"):
        whole = (path / name).read_bytes()
        (path / name).write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
        with pytest.raises(CheckpointError, match=rf"{re.escape(name)}"):
            step(batches()[0])
        (path / name).write_bytes(whole)
    step(batches()[0])


def test_values_are_not_read_into_elements_that_share_memory(tmp_path: Path) -> None:
    wide = torch.ones(1, dtype=torch.float64).expand(8)
    with pytest.raises(CheckpointError, match=r"w is an expanded tensor(.|\n)*fix: .contiguous"):
        Want("w", (8,), Layout(()), {}, wide)


def test_a_series_goes_back_to_the_one_before_where_the_latest_fails_after_it_was_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    step = quiet("zero1+dp2")
    checkpoints = deepseed.Checkpoints(step, tmp_path)
    step(batches()[0])
    checkpoints.save("first")
    want = everything(step)
    step(batches()[1])
    checkpoints.save("second")
    failing(monkeypatch, lambda p: flip(p, 0.5), tmp_path / "step2")
    assert checkpoints.load() == "first" and step.steps == 1
    same(everything(step), want)
    assert re.search(r"step1 is loaded, the newest checkpoint that is whole\n  .*step2/__1_0.distcp was changed while it was loaded", capsys.readouterr().err)


def test_values_are_read_into_their_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No second copy of a rank's part; and who looks at a tensor's version sees that it was written."""
    step, seen = used(), []
    init = saved.Reading.__init__
    monkeypatch.setattr(saved.Reading, "__init__", lambda self, folder, wants, *a: (seen.extend(wants), init(self, folder, wants, *a))[1])
    stored = {t.data_ptr(): (t, t._version) for s in step.states for t in s.tensors.values()}
    step.load(checkpoint_of("zero3+dp2")[0])
    assert {w.name for w in seen} > {"model.mean", "model.up.weight", "optimizer.exp_avg/up.weight"} and {w.into.data_ptr() for w in seen} <= set(stored)
    assert all(stored[w.into.data_ptr()][0]._version > stored[w.into.data_ptr()][1] for w in seen)


# what does not fit ------------------------------------------------------------------------------------------------------


class Other(Tagger):
    def __init__(self) -> None:
        super().__init__(width=24)
        self.more = nn.Linear(2, 3)
        del self.down.bias
        self.down.bias = None


class Untied(Tagger):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = nn.Parameter(self.embed.weight.detach().clone() + 1)


def refused(step: TrainStep, path: Path, says: str, **options: Any) -> None:
    before = everything(step)
    with pytest.raises(CheckpointError, match=says):
        step.load(path, **options)
    same(everything(step), before)


def test_a_checkpoint_of_another_model_is_refused() -> None:
    path = checkpoint_of("zero3+dp2")[0]
    refused(
        quiet("zero1+dp2", model=Other()), path,
        r"is a checkpoint of another model: 2 tensors of the model are not in the checkpoint, 1 in the checkpoint are not in the model, 8 have another shape\n"
        r"  not in the checkpoint: more.weight \[3, 2\]\n  not in the checkpoint: more.bias \[3\]\n  not in the model: down.bias \[16\]\n"
        r"  embed.weight: \[24, 16\] in the checkpoint, \[24, 24\] in the model\n(.|\n)*fix:",
    )  # fmt: skip


def test_tied_and_untied(tmp_path: Path) -> None:
    """A tied checkpoint has both names, so an untied model takes it, without the optimizer; the other way round would lose a tensor."""
    path = checkpoint_of("zero3+dp2")[0]
    untied = quiet("zero1+dp2", model=Untied())
    refused(untied, path, "groups differ: 2 groups of 3, 4 parameters in the checkpoint, 2 groups of 4, 4 parameters in this step")
    untied.load(path, optimizer=False)
    assert torch.equal(untied.model.head.weight, untied.model.embed.weight)
    fresh = quiet("zero1+dp2", model=Untied())
    fresh.save(tmp_path / "c")
    refused(quiet("zero1+dp2"), tmp_path / "c", "head.weight and embed.weight are one tensor in this model, two in the checkpoint")


def test_a_switch_of_the_optimizer_that_differs_is_refused(tmp_path: Path) -> None:
    """Numbers are where training had them; what says which update it is stays as the user wrote it, or is named."""
    saved = quiet("zero1+dp2", optimizer=lambda m: torch.optim.AdamW(m.parameters(), lr=0.5, weight_decay=0.25))
    saved.save(tmp_path / "c")
    for option in ("amsgrad", "maximize"):
        other = quiet("zero1+dp2", optimizer=lambda m, option=option: torch.optim.AdamW(m.parameters(), lr=0.1, **{option: True}))
        says = rf"{option} of the optimizer's group 0 is False in the checkpoint, True in this step\n  fix: AdamW\(..., {option}=False\), or load\(dir, optimizer=False\)"
        refused(other, tmp_path / "c", says)
        assert other.optimizer.param_groups[0][option] is True and other.optimizer.param_groups[0]["lr"] == 0.1
    other = quiet("zero1+dp2", optimizer=lambda m: torch.optim.AdamW(m.parameters(), lr=0.1, foreach=True))
    other.load(tmp_path / "c")
    assert (other.optimizer.param_groups[0]["lr"], other.optimizer.param_groups[0]["weight_decay"]) == (0.5, 0.25)


def test_another_optimizer_is_refused() -> None:
    path = checkpoint_of("zero3+dp2")[0]
    sgd = quiet("zero1+dp2", optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    refused(sgd, path, r"holds the state of torch.optim.adamw.AdamW, this step's optimizer is torch.optim.sgd.SGD\n  fix: use AdamW, or load\(dir, optimizer=False\)")
    one = quiet("zero1+dp2", optimizer=lambda m: torch.optim.AdamW(m.parameters()))
    refused(one, path, r"groups differ: 2 groups of 3, 4 parameters in the checkpoint, 1 groups of 7(.|\n)*first difference, group 0: up.weight in the checkpoint, norm.weight in this step")
    sgd.load(path, optimizer=False)
    assert sgd.steps == 0 and sgd.optimizer.param_groups[0]["lr"] == 0.1
    close({n: t for n, t in sgd.state_dict().items()}, dict(torch.load(_whole(path))["model"]))


def _whole(path: Path) -> io.BytesIO:
    out = Path(tempfile.mkdtemp()) / "whole.pt"
    dcp_to_torch_save(path, out)
    return io.BytesIO(out.read_bytes())


def test_another_dtype_is_cast_only_when_asked() -> None:
    path = checkpoint_of("zero3+dp2")[0]
    for step in (quiet("zero1+dp2", dtype=torch.float32), quiet("zero1+dp2", dtype=torch.float32, example_batch=batches(1)[0])):
        refused(step, path, r"model.\S+ is float64 in the checkpoint, float32 in this step\n  fix: load\(dir, cast=True\) casts")
        step.load(path, cast=True)
        float(step(batches()[FIRST]))
        assert step.optimizer_state()["exp_avg/up.weight"].dtype == torch.float32 and step.steps == FIRST + 1
        assert float(step.optimizer_state()["step/up.weight"]) == FIRST + 1


def test_a_model_without_an_optimizer(tmp_path: Path) -> None:
    """A module loads a training checkpoint; a training step does not take a module's for its optimizer."""
    path, _, _ = checkpoint_of("zero3+dp2")
    torch.manual_seed(6)
    module = deepseed.compile(Tagger().double().eval(), "tp2", loss_fn=ranks_do.cross_entropy, backend="simulate")
    module(batches()[0]["ids"])
    module.load(path)
    want = Tagger().double().eval()
    want.load_state_dict(torch.load(_whole(path))["model"])
    torch.testing.assert_close(module(batches()[0]["ids"]), want(batches()[0]["ids"]), rtol=1e-12, atol=1e-12)
    module.save(tmp_path / "c")
    refused(used(), tmp_path / "c", r"has no optimizer state: no optimizer was compiled where it was saved\n  fix: load\(dir, optimizer=False\)")
    used().load(tmp_path / "c", optimizer=False)


def test_lacking_optimizer_state_is_named(tmp_path: Path) -> None:
    shutil.copytree(checkpoint_of("zero3+dp2")[0], tmp_path / "c")
    tensors = folders.manifest_of(tmp_path / "c")["tensors"]
    _rewrite(tmp_path / "c", tensors={k: v for k, v in tensors.items() if k != "optimizer.exp_avg/up.weight"})
    refused(used(), tmp_path / "c", r"lacks 1 of the 21 tensors of optimizer state that this step has, such as exp_avg/up.weight\n  fix: load\(dir, optimizer=False\)")
    fresh = quiet("zero1+dp2")
    fresh.load(tmp_path / "c")
    for _ in range(2):  # not only the first time
        with pytest.raises(CheckpointError, match="lacks 1 of the 21"):
            fresh(batches()[0])


# the way through a life -------------------------------------------------------------------------------------------------


def test_before_anything_is_trained(tmp_path: Path) -> None:
    """A checkpoint of step 0 has no optimizer state yet: who loads it starts anew, also where it has trained since."""
    step = quiet("zero3+dp2")
    step.save(tmp_path / "c", extra=[1, 2])
    want = trained(step, batches(2))
    for plan in ("zero1+dp2", "zero3+dp2"):
        again = quiet(plan, seed=7)
        assert again.load(tmp_path / "c") == [1, 2]
        got = trained(again, batches(2))
        assert got[0] == pytest.approx(want[0], rel=TOLERANCE)
        close(got[1], want[1])
    step.load(tmp_path / "c")
    got = trained(step, batches(2))
    assert got[0] == want[0]
    same(got[1], want[1])


def test_a_checkpoint_that_waits_must_stay(tmp_path: Path) -> None:
    shutil.copytree(checkpoint_of("zero3+dp2")[0], tmp_path / "c")
    step = quiet("zero1+dp2")
    step.load(tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"is read with the first batch(.|\n)*fix: run a batch, or step.compile\(example_batch\)"):
        step.save(tmp_path / "other")
    used().save(tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"is another checkpoint than step.load was given"):
        step(batches()[0])
    step.load(tmp_path / "c")
    step(batches()[0])


def test_state_of_a_parameter_that_is_frozen_meanwhile(tmp_path: Path) -> None:
    """It waits in ``optimizer.state``, is saved again from there, and is there when the parameter is trained again."""
    path = checkpoint_of("zero3+dp2")[0]
    step = quiet("zero1+dp2", seed=3)
    step.model.up.requires_grad_(False)
    step.load(path)
    step(batches()[FIRST])
    assert {key for key in step.optimizer_state() if "up." in key} == set() and set(step.optimizer.state) == set(step.model.up.parameters())
    step.save(tmp_path / "c")
    again = quiet("zero3+dp2", seed=4)
    again.load(tmp_path / "c")
    again(batches()[FIRST])
    key = "step/up.weight"
    assert float(again.optimizer_state()[key]) == FIRST + 1 and float(again.optimizer_state()["step/down.weight"]) == FIRST + 2


def test_what_the_user_wrote_into_the_module_is_saved(tmp_path: Path) -> None:
    step = quiet("zero3+dp2")
    step(batches()[0])
    with torch.no_grad():
        step.model.up.weight.fill_(0.25)
    step.save(tmp_path / "c")
    again = quiet("zero1+dp2")
    again.load(tmp_path / "c")
    assert bool((again.model.up.weight == 0.25).all())


# whole tensors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["zero0", "zero3+tp2+dp2"])
@pytest.mark.parametrize("early", [True, False])
def test_load_state_dict_of_the_step(plan: str, early: bool) -> None:
    step = quiet(plan) if early else compiled(plan)
    values = {name: t.clone() for name, t in quiet("zero0", seed=8).model.state_dict().items()}
    step.load_state_dict(values)
    same(step.state_dict(), values)
    other = quiet("zero0", seed=8)
    rng = (step.steps, step.seed)
    other.steps = rng[0]
    assert float(step(batches()[0])) == pytest.approx(float(other(batches()[0])), rel=TOLERANCE)


def test_a_state_dict_that_does_not_fit() -> None:
    step = used()
    values, before = dict(step.state_dict()), everything(step)
    wrong = {**{n: t for n, t in values.items() if n != "norm.bias"}, "up.weight": torch.zeros(2, 2), "bonus": torch.zeros(1)}
    with pytest.raises(CheckpointError) as caught:
        step.load_state_dict(wrong)
    assert str(caught.value) == (
        "the state_dict does not fit Tagger: 1 tensors of the model are not in the state_dict, 1 in the state_dict are not in the model, 1 have another shape\n"
        "  not in the state_dict: norm.bias [16]\n  not in the model: bonus [1]\n  up.weight: [2, 2] in the state_dict, [48, 16] in the model\n"
        "  fix: build the model with the configuration that these tensors were made with"
    )
    with pytest.raises(CheckpointError, match=r"head.weight and embed.weight are one tensor in the model, and differ"):
        step.load_state_dict({**values, "head.weight": values["head.weight"] + 1})
    with pytest.raises(CheckpointError, match=r"up.weight \(int\) is not a whole tensor"):
        step.load_state_dict({**values, "up.weight": 3})
    same(everything(step), before)


# real ranks -------------------------------------------------------------------------------------------------------------


@pytest.mark.turn
def test_real_ranks_write_their_parts_and_others_go_on(tmp_path: Path) -> None:
    """zero3 on two ranks -> tp2 on two, zero1 on four, and one simulated process; no rank gathers anything to save."""
    folder = str(tmp_path / "c")
    written = ranks(2, ranks_do.writes, "zero3", folder)
    want = torch.load(io.BytesIO(written[0]["values"]))
    assert max(w["bytes"] for w in written) < 1.2 * min(w["bytes"] for w in written)
    for w in written:
        assert set(w["sent"]) <= {"what each rank has over all ranks", "agreement over all ranks"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c"]
    reference = checkpoint_of("zero3+dp2")
    close(want, reference[2])
    for number, plan in ((2, "tp2"), (4, "zero1")):
        for got in ranks(number, ranks_do.goes_on, plan, folder):
            assert got["extra"] == {"note": "kept"}
            assert got["losses"] == pytest.approx(written[0]["losses"], rel=TOLERANCE) and got["again"] == got["losses"]
            for when in ("values", "values again"):
                close(torch.load(io.BytesIO(got[when])), want, f"{plan} on {number}")
            assert got["largest"] <= max(t.numel() for t in want.values()) // 2  # optimizer state is read by parts
    goes_on(quiet("zero3+tp2+dp2", seed=4), tmp_path / "c", written[0]["losses"], want, "gloo -> simulate")


@pytest.mark.turn
def test_real_ranks_of_a_pipeline_write_their_parts_and_others_go_on(tmp_path: Path) -> None:
    """zero3+pp2 on four ranks -> zero1+pp4 on four, tp2 simulated; what is saved of zero3 -> zero3+pp2 on four."""
    folder = str(tmp_path / "c")
    written = ranks(4, ranks_do.writes, "zero3+pp2", folder)
    want = torch.load(io.BytesIO(written[0]["values"]))
    for w in written:
        assert set(w["sent"]) <= {"what each rank has over all ranks", "agreement over all ranks"}
        close(torch.load(io.BytesIO(w["values"])), want)
        assert w["losses"] == written[0]["losses"] == pytest.approx(checkpoint_of("zero3+dp2")[1], rel=TOLERANCE)
    close(want, checkpoint_of("zero3+dp2")[2])
    for got in ranks(4, ranks_do.goes_on, "zero1+pp4", folder):
        assert got["extra"] == {"note": "kept"}
        assert got["losses"] == pytest.approx(written[0]["losses"], rel=TOLERANCE) and got["again"] == got["losses"]
        for when in ("values", "values again"):
            close(torch.load(io.BytesIO(got[when])), want)
    goes_on(quiet("tp2", seed=4), tmp_path / "c", written[0]["losses"], want, "gloo -> simulate")
    path, losses, values = checkpoint_of("zero3+dp2")
    for got in ranks(4, ranks_do.goes_on, "zero3+pp2", str(path)):
        assert got["losses"] == pytest.approx(losses, rel=TOLERANCE) and got["again"] == got["losses"]
        close(torch.load(io.BytesIO(got["values again"])), values)


def test_a_rank_in_trouble_does_not_leave_the_others_waiting(tmp_path: Path) -> None:
    got = ranks(2, ranks_do.troubles, str(tmp_path / "c"))
    says = {
        "disk full": "CheckpointError: rank 1: .*/__1_0.distcp cannot be written: No space left on device",
        "other folders": "AgreementError: ranks disagree: the folder to save to",
        "one has nothing": "AgreementError: ranks disagree: the folder to load",
        "other model": "CheckpointError: the state_dict does not fit Tagger: 9 tensors",
        "other values": "AgreementError: ranks disagree: the values of",
        "assign": r"assign=True\) would take the parameters out of the compiled step",
        "shape": "size mismatch for up.weight",
        "half loaded": r"HalfLoadedError: rank 1: OSError: \[Errno 5\] Input/output error\n.*half loaded, and neither runs nor saves\n  fix: ",
        "half run": "HalfLoadedError: the step is half loaded from",
        "half saved": "HalfLoadedError: the step is half loaded from",
    }  # fmt: skip
    for rank, each in enumerate(got):
        for name, pattern in says.items():
            assert re.search(pattern, each["messages"][name], re.DOTALL), f"rank {rank}, {name}: {each['messages'][name]}"
            assert each["seconds"][name] < 10, f"{name}: {each['seconds'][name]} s"
        assert each["unchanged"] and each["former"] and each["by the step"] and each["by the model"] and each["by a part of it"]
        assert each["goes on"] == got[0]["goes on"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c"]


def test_a_rank_killed_while_saving_leaves_the_former_checkpoint(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [forkserver().Process(target=ranks_do.dies, args=(str(tmp_path / "c"), {**environment, "RANK": str(r), "LOCAL_RANK": str(r)})) for r in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(90)
    assert processes[1].exitcode == 9 and processes[0].exitcode == 1
    assert "RankError: rank 1 died" in (tmp_path / "c.0.err").read_text()
    step = quiet("zero1+dp2", seed=4)
    step.load(tmp_path / "c")
    assert step.steps == 1
    want = quiet("zero1+dp2")
    want(batches()[0])
    step(batches()[1])
    want(batches()[1])
    close(everything(step), everything(want))


# bytes ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("linked", [True, False])
def test_the_sum_is_that_of_zlib(linked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not linked:
        monkeypatch.setattr(crc, "_linked", lambda: None)
    data = memoryview(random.Random(0).randbytes(3 * crc.SMALL + 7))
    for start, end in ((0, len(data)), (1, crc.SMALL), (1, crc.SMALL + 1), (3, 2 * crc.SMALL + 8), (5, 5)):
        for each in (data[start:end], bytes(data[start:end]), memoryview(bytearray(data[start:end]))):
            assert crc.crc32(each, 77) == zlib.crc32(each, 77)
    assert crc.crc32(data[crc.SMALL + 1 :], crc.crc32(data[: crc.SMALL + 1])) == zlib.crc32(data)


@pytest.mark.parametrize("way", ["mapped", "read", "not there"])
def test_the_sum_of_a_part_of_a_file(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the system's own pages; one that cannot be had is no signal."""
    data = random.Random(0).randbytes(3 * 2**16 + 5)
    (tmp_path / "f").write_bytes(data)
    monkeypatch.setattr(crc, "WINDOW", 2**16)
    if way == "not there":
        monkeypatch.setattr(crc, "_populate", lambda: None)
    with (tmp_path / "f").open("rb", buffering=0) as file:
        for start, length in ((0, len(data)), (5000, 2**17), (2**16, 7), (len(data) - 1, 1)):
            want = None if way == "not there" else zlib.crc32(data[start : start + length])
            assert crc.crc32_of(file, start, length) == want
        for start, length in ((1, len(data)), (len(data) + 2**16, 5)):
            assert crc.crc32_of(file, start, length) is None
        if way == "mapped":  # it becomes shorter when its size has been seen
            mapped = crc.mmap.mmap
            monkeypatch.setattr(crc.mmap, "mmap", lambda *a, **k: (mapped(*a, **k), os.truncate(tmp_path / "f", 10))[0])
            assert crc.crc32_of(file, 0, len(data)) is None


def test_of_boxes_that_begin_alike_one_header_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [torch.randn(3, 4), torch.randn(3, 4), torch.randn(4, 3), torch.randn(3, 4).int(), torch.randn(600, 1024), torch.randn(600, 1024)]
    places, sums = boxfile.write_boxes(tmp_path / "f", items)
    parsed, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: (parsed.append(a), load(*a, **k))[1])
    found = boxfile.check_boxes(tmp_path, {(p.relative_path, p.offset, p.length): True for p in places}, boxfile.Sums({"f": sums}))
    assert [(h.sizes, h.dtype) for h in found.values()] == [(tuple(t.shape), t.dtype) for t in items] and len(parsed) in range(4, 7)  # two threads may parse the same


@pytest.mark.parametrize("mapped", [True, False])
def test_a_large_box_is_checked_in_both_ways(mapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not mapped:
        monkeypatch.setattr(crc, "_populate", lambda: None)
    _, sums = boxfile.write_boxes(tmp_path / "f", [torch.randn(700, 1024)])
    place, found = ("f", 0, sums["bytes"]), boxfile.Sums({"f": sums})
    header = boxfile.check_boxes(tmp_path, {place: True}, found)[place]
    assert (header.sizes, header.dtype) == ((700, 1024), torch.float32) and found.checked == 1
    flip(tmp_path / "f", 0.7)
    with pytest.raises(DamagedError, match="f is damaged: crc32"):
        boxfile.check_boxes(tmp_path, {place: False}, found)
    os.truncate(tmp_path / "f", 2**20)
    with pytest.raises(DamagedError, match="f is torn: it ends"):
        boxfile.check_boxes(tmp_path, {place: False}, found)
    (tmp_path / "f").unlink()
    with pytest.raises(DamagedError, match="f cannot be read: No such file or directory\n  nothing was loaded\n  fix: load another"):
        boxfile.check_boxes(tmp_path, {place: False}, found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64])
def test_a_piece_that_lies_as_in_the_file_is_read_straight_to_its_place(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other is: a column, another dtype, two places."""
    whole = torch.randn(700, 1024).to(dtype)  # several pieces
    _, sums = boxfile.write_boxes(tmp_path / "f", [whole, torch.tensor(3.0).to(dtype)])
    lengths, buffers, made = [n for n, _ in sums["boxes"]], [], torch.frombuffer
    monkeypatch.setattr(torch, "frombuffer", lambda *a, **k: (buffers.append(a), made(*a, **k))[1])

    def read(offset: int, length: int, *parts: boxfile.Part) -> int:
        buffers.clear()
        place = "f", offset, length
        boxfile.read_boxes(tmp_path, {place: parts}, boxfile.Sums({"f": sums}))
        found, one_pass = [part.into.clone() for part in parts], len(buffers)
        for part in parts:
            part.into.zero_()
        boxfile.read_boxes(tmp_path, {place: parts}, boxfile.Sums({"f": sums}), boxfile.check_boxes(tmp_path, {place: True}, boxfile.Sums({"f": sums})))
        assert len(buffers) == 2 * one_pass and all(torch.equal(part.into, t) for part, t in zip(parts, found, strict=True))
        return one_pass

    into, one, column, other = torch.empty_like(whole), torch.zeros((), dtype=dtype), torch.zeros(700, 5, dtype=dtype), torch.empty(700, 1024, dtype=torch.complex128)
    assert read(0, lengths[0], boxfile.Part((0, 0), (700, 1024), into)) == 0 and torch.equal(into, whole)
    assert read(lengths[0], lengths[1], boxfile.Part((), (), one)) == 0 and one == torch.tensor(3.0).to(dtype)
    assert read(0, lengths[0], boxfile.Part((0, 7), (700, 5), column)) > 0 and torch.equal(column, whole[:, 7:12])
    assert read(0, lengths[0], boxfile.Part((0, 0), (700, 1024), other)) > 0 and torch.equal(other, whole.to(torch.complex128))
    wide = torch.zeros(700, 2048, dtype=dtype)
    assert read(0, lengths[0], boxfile.Part((0, 0), (700, 1024), wide[:, ::2])) > 0 and torch.equal(wide[:, ::2], whole) and not wide[:, 1::2].any()
    assert read(0, lengths[0], *(boxfile.Part((0, 0), (700, 1024), t.zero_()) for t in (into, wide[:, :1024]))) > 0 and torch.equal(into, whole) and torch.equal(wide[:, :1024], whole)
    damaged = bytearray((tmp_path / "f").read_bytes())
    damaged[lengths[0] // 2] ^= 1
    (tmp_path / "f").write_bytes(damaged)
    with pytest.raises(DamagedError, match=r"f is damaged: crc32 [0-9a-f]{8} was written, [0-9a-f]{8} is there, in bytes 0 to"):
        read(0, lengths[0], boxfile.Part((0, 0), (700, 1024), into))


def test_a_box_is_what_torch_save_writes_for_its_shape(tmp_path: Path) -> None:
    """Whatever the values; torch.load reads it."""
    items = [torch.randn(3, 5), torch.ones(3, 5), torch.tensor(2.0), torch.zeros(0, 4), torch.randn(7, 3).to(torch.bfloat16), torch.randn(4).to(torch.complex64), torch.tensor([True, False]), torch.randn(6, 4)[1:3], torch.randn(4, 6).t()]
    places, _ = boxfile.write_boxes(tmp_path / "f", items)
    content = (tmp_path / "f").read_bytes()
    for item, place in zip(items, places, strict=True):
        found = torch.load(io.BytesIO(content[place.offset : place.offset + place.length]), weights_only=True)
        assert torch.equal(found, item) and (found.dtype, found.shape) == (item.dtype, item.shape)
    assert places[-1].offset + places[-1].length == len(content)


def test_a_thread_that_is_not_the_main_one_writes_the_same_file_and_yields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items, urgent = [b"text", torch.randn(300, 1024), torch.tensor(1.0)], []
    monkeypatch.setattr(boxfile, "TURN", 2**18)
    monkeypatch.setattr(os, "fsync", lambda _: urgent.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))
    found = [boxfile.write_boxes(tmp_path / "f", items)[1]]
    content = (tmp_path / "f").read_bytes()
    thread = threading.Thread(target=lambda: (found.append(boxfile.write_boxes(tmp_path / "f", items)[1]), os.fsync(0)))
    thread.start()
    thread.join()
    mine = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert found[0] == found[1] and content == (tmp_path / "f").read_bytes()
    assert urgent == [mine, 19, mine]
