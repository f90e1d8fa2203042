"""Series of checkpoints: whoever is killed at whatever moment, the last whole one loads and a partial one does not; and what is written beside training.

The 200 random kills are ``wide``; a seeded sample of them runs every time.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gloo import checkpoints as ranks_do
from gloo.checkpoints import Position, batch, everything, small
from gloo.launch import forkserver, ranks
from killing import killed
from torch import nn

import deepseed
from deepseed import background
from deepseed.checkpoint import Saving
from deepseed.engine.data import Loader, Order
from deepseed.importing.listing import listed
from deepseed.runtime import hold
from deepseed.runtime.folder import CheckpointError, DamagedError
from deepseed.runtime.series import series

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("no_waiting_for_the_disk")]
torch.set_num_threads(1)
BOTH = pytest.mark.parametrize("asynchronous", [False, True])


def same(mine: dict[str, Any], want: dict[str, Any]) -> bool:
    """Bit for bit."""
    return set(mine) == set(want) and all(torch.equal(mine[name], want[name]) for name in want)


def begin(seed: int = 0, plan: str = "zero3+dp2", steps: int = 0) -> Any:
    step = small(plan, seed, backend="simulate", example_batch=batch(0))
    return trained(step, steps)


def trained(step: Any, steps: int) -> Any:
    for _ in range(steps):
        step(batch(step.steps))
    return step


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name != ".lock")


# what is killed ---------------------------------------------------------------------------------------------------------


class Reference:
    """What an uninterrupted run holds after each step, in one process."""

    def __init__(self) -> None:
        self.step = begin()
        self.states = [everything(self.step)]

    def after(self, steps: int) -> dict[str, Any]:
        while len(self.states) <= steps:
            self.step(batch(self.step.steps))
            self.states.append(everything(self.step))
        return self.states[steps]


def wait_for(what: Callable[[], Any], seconds: float = 60) -> Any:
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until, "nothing happens"
        time.sleep(0.002)
    return found


def alive(process: int) -> bool:
    """Not ended, and not waiting to be buried."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def killed_at_random(folder: Path, told: Path, victim: str, asynchronous: bool, rng: random.Random) -> None:
    """Two ranks go on from the folder and save after each step, until one is killed, or both at once, or who started them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    told.unlink(missing_ok=True)
    launcher = forkserver().Process(target=ranks_do.launches, args=(str(folder), port, str(told), asynchronous, rng.uniform(0, 0.05)))
    latest = folder / "latest"
    former = latest.read_text() if latest.exists() else ""
    launcher.start()
    pids = list(map(int, wait_for(lambda: told.exists() and told.read_text()).split()))
    try:
        wait_for(lambda: not alive(pids[0]) or not alive(pids[1]) or (latest.exists() and latest.read_text() != former))
        assert alive(pids[0]) and alive(pids[1]), Path(f"{told}.0.err").read_text() + Path(f"{told}.1.err").read_text()
        if rng.random() < 0.5:
            time.sleep(rng.uniform(0, 0.06))
        else:  # in a save, however long one takes to begin
            wait_for(lambda: any(".tmp-" in name for name in os.listdir(folder)))
            time.sleep(rng.uniform(0, 0.01))
        first = {"rank 0": pids[:1], "rank 1": pids[1:], "both ranks": pids, "the launcher": [launcher.pid]}[victim]
        for process in first:
            os.kill(process, signal.SIGKILL)
        if victim == "the launcher":
            time.sleep(rng.uniform(0, 0.05))
    finally:
        for process in pids if victim == "the launcher" else ():
            os.kill(process, signal.SIGKILL)
        launcher.join(60)
        wait_for(lambda: not any(map(alive, pids)))


def check_after(folder: Path, reader: Any, reference: Reference, capsys: pytest.CaptureFixture[str]) -> tuple[int, int]:
    """The latest one loads and is what was saved; so is each whole one; each partial one is refused, and named. How many steps, and how many partial ones."""
    capsys.readouterr()
    checkpoints = deepseed.Checkpoints(reader, folder)
    extra = checkpoints.load()
    said = capsys.readouterr().err
    steps = int((folder / "latest").read_text().removeprefix("step"))
    assert checkpoints.path == folder / f"step{steps}" and reader.steps == steps and extra == {"step": steps}
    assert same(everything(reader), reference.after(steps)), f"step {steps} is not what was saved"
    partial = []
    for path in (p for p in folder.iterdir() if p.is_dir()):
        if (path / "manifest.json").exists():
            reader.load(path)
            assert same(everything(reader), reference.after(reader.steps)) and path.name.split(".")[0] == f"step{reader.steps}"
        else:
            partial.append(path)
            before = everything(reader)
            with pytest.raises(DamagedError, match=rf"{path.name} has no manifest.json: it is partial: (a save was cut off|it was being deleted)"):
                reader.load(path)
            assert same(everything(reader), before) and re.search(rf"{path} is partial: (a save into )?step\d+ was (cut off|being deleted)", said)
    return steps, len(partial)


VICTIMS = ["rank 0", "rank 1", "both ranks", "the launcher"]


def kill_many(number: int, seed: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, int]:
    rng, reader, reference, steps, partial = random.Random(seed), begin(7), Reference(), 0, 0
    here = folder / "series"
    for trial in range(number):
        former = steps
        killed_at_random(here, folder / "told", VICTIMS[trial % len(VICTIMS)], bool(trial // len(VICTIMS) % 2), rng)
        steps, left = check_after(here, reader, reference, capsys)
        assert steps > former
        partial += left
    return steps, partial


@pytest.mark.turn
def test_killed_at_random_moments_the_last_whole_one_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each run goes on from what the one before has left."""
    kill_many(12, 1, tmp_path, capsys)


@pytest.mark.wide
def test_killed_at_two_hundred_random_moments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps, partial = kill_many(200, 2, tmp_path, capsys)
    print(f"{steps} steps, {partial} times a partial one")
    assert partial >= 10, "saves were hardly hit"


def saves(step: Any, path: Path, **options: Any) -> None:
    """One save, to its end."""
    with deepseed.Checkpoints(step, path, **options) as checkpoints:
        checkpoints.save()


@BOTH
@pytest.mark.turn
def test_latest_moves_last_and_an_old_one_goes_after_that(asynchronous: bool, tmp_path: Path) -> None:
    """At every moment ``latest`` names one that is whole: the former, then the new one, and there is no way back."""
    here, start = tmp_path / "here", tmp_path / "start"
    step, reader = begin(steps=1), begin(1)
    deepseed.Checkpoints(step, start).save()
    states = {1: everything(step), 2: everything(trained(step, 1))}
    seen, calls, at, kept = [], None, 0, []
    while calls is None:
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(start, here)
        calls = killed(lambda: saves(step, here, keep=1, asynchronous=asynchronous), at)
        checkpoints = deepseed.Checkpoints(reader, here)
        checkpoints.load()
        assert checkpoints.path is not None and checkpoints.path.name == (here / "latest").read_text()
        assert same(everything(reader), states[reader.steps])
        seen.append(reader.steps)
        kept.append((here / "step1" / "manifest.json").exists())
        if reader.steps == 1:
            assert kept[-1]
        assert all((p / "manifest.json").exists() for p in here.iterdir() if p.is_dir() and "." not in p.name), "a tag's folder is whole, or not there"
        if at % 6 == 0:  # the next save tidies up
            trained(reader, 3 - reader.steps)
            with deepseed.Checkpoints(reader, here, keep=1, asynchronous=asynchronous) as checkpoints:
                checkpoints.save()
            assert names(here) == ["latest", "step3"]
        at += 1
    assert seen == sorted(seen) and set(seen) == {1, 2} and at > 15
    assert kept[-1] is False and sum(s == 2 and k for s, k in zip(seen, kept, strict=True)) >= 1  # a moment at which both are there


def test_the_first_save_that_is_cut_off_leaves_nothing_to_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step, reader = begin(steps=1), begin(1)
    before, seen, calls, at = everything(reader), [], None, 0
    while calls is None:
        shutil.rmtree(tmp_path / "here", ignore_errors=True)
        calls = killed(lambda: saves(step, tmp_path / "here"), at)
        capsys.readouterr()
        checkpoints = deepseed.Checkpoints(reader, tmp_path / "here")
        extra, said = checkpoints.load(), capsys.readouterr().err
        assert extra is None
        seen.append(checkpoints.path is not None)
        if not seen[-1]:
            assert same(everything(reader), before)
            if (tmp_path / "here").exists() and names(tmp_path / "here"):
                assert re.search(r"there is no checkpoint in .*/here to load\n  .*step1.tmp-\w{8} is partial: a save into step1 was cut off", said)
        at += 1
    assert seen == sorted(seen) and seen[0] is False and seen[-1] is True


# the series -------------------------------------------------------------------------------------------------------------


@BOTH
def test_every_and_keep(asynchronous: bool, tmp_path: Path) -> None:
    step = begin()
    checkpoints = deepseed.Checkpoints(step, tmp_path, every=2, keep=2, asynchronous=asynchronous)
    assert checkpoints.load() is None and checkpoints.path is None
    saved = []
    for _ in range(9):
        trained(step, 1)
        saved.append(checkpoints.after_step(extra=lambda: step.steps))
    checkpoints.save(tag="best")
    trained(step, 1)
    checkpoints.after_step()
    checkpoints.wait()
    assert [path and path.name for path in saved] == [None, "step2", None, "step4", None, "step6", None, "step8", None]
    assert names(tmp_path) == ["best", "latest", "step10", "step8"] and (tmp_path / "latest").read_text() == "step10"
    checkpoints.save(tag="aside", move_latest=False)
    checkpoints.wait()
    other = begin(1)
    assert deepseed.Checkpoints(other, tmp_path).load() is None and other.steps == 10
    assert deepseed.Checkpoints(other, tmp_path).load("step8") == 8 and other.steps == 8
    assert [f.tag for f in series(tmp_path)] == ["aside", "step10", "best", "step8"]


def test_the_one_that_latest_names_is_never_deleted(tmp_path: Path) -> None:
    step = begin(steps=1)
    checkpoints = deepseed.Checkpoints(step, tmp_path, keep=1)
    checkpoints.save()
    for _ in range(3):
        checkpoints_of = trained(step, 1)
        checkpoints.save(move_latest=False)
    assert names(tmp_path) == ["latest", "step1", "step4"] and checkpoints_of.steps == 4
    (tmp_path / "latest").write_text("step4")
    checkpoints.save()
    assert names(tmp_path) == ["latest", "step4"]


def test_a_run_that_went_back_keeps_what_it_writes(tmp_path: Path) -> None:
    """The newest are those that were written last, not those of the highest step."""
    step = begin(steps=5)
    checkpoints = deepseed.Checkpoints(step, tmp_path, keep=2)
    checkpoints.save()
    checkpoints.save(tag="step7")
    step.load(tmp_path / "step5")
    step.steps = 1
    checkpoints.save()
    assert names(tmp_path) == ["latest", "step1", "step7"]


def flip(path: Path, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("file", ["__0_0.distcp", "__1_0.distcp", ".metadata", "manifest.json"])
def test_a_damaged_one_is_named_and_the_one_before_is_loaded(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = begin(steps=1)
    checkpoints = deepseed.Checkpoints(step, tmp_path)
    checkpoints.save("first")
    first = everything(step)
    trained(step, 1)
    checkpoints.save("second")
    flip(tmp_path / "step2" / file)
    other = begin(1)
    again = deepseed.Checkpoints(other, tmp_path)
    assert again.load() == "first" and again.path == tmp_path / "step1" and same(everything(other), first)
    said = capsys.readouterr().err
    assert f"deepseed: {tmp_path / 'step1'} is loaded, the newest checkpoint that is whole\n  {tmp_path / 'step2' / file} is damaged" in said
    with pytest.raises(DamagedError, match=rf"step2/{re.escape(file)} is damaged"):
        again.load("step2")
    flip(tmp_path / "step1" / "__1_0.distcp")
    with pytest.raises(DamagedError, match=rf"no checkpoint in {tmp_path} is whole(.|\n)*step2/{re.escape(file)} is damaged(.|\n)*step1/__1_0.distcp is damaged(.|\n)*fix: "):
        again.load()
    assert same(everything(other), first)


def test_latest_that_names_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = begin(steps=1)
    checkpoints = deepseed.Checkpoints(step, tmp_path)
    checkpoints.save("it")
    for text, says in (("step9", "there is no checkpoint at .*step9"), ("\0\0", "latest is damaged: it holds"), ("../other", "latest is damaged: it holds")):
        (tmp_path / "latest").write_text(text)
        assert checkpoints.load() == "it" and re.search(f"step1 is loaded, the newest checkpoint that is whole\n  {says}" if "\0" in text or "/" in text else says, capsys.readouterr().err.replace(f"{tmp_path}/", ""))
    (tmp_path / "latest").unlink()
    assert checkpoints.load() == "it"
    shutil.rmtree(tmp_path / "step1")
    (tmp_path / "latest").write_text("step1")
    with pytest.raises(DamagedError, match=r"no checkpoint in .* is whole\n  there is no checkpoint at .*step1"):
        checkpoints.load()


def test_what_does_not_fit_is_no_damage(tmp_path: Path) -> None:
    """A checkpoint of another model is an error, and no older one is tried."""
    step = begin(steps=1)
    deepseed.Checkpoints(step, tmp_path).save()
    model = nn.Linear(2, 2).double()
    other = deepseed.compile(model, optimizer=torch.optim.SGD(model.parameters()), loss_fn=lambda m, x: m(x).sum(), backend="simulate")
    with pytest.raises(CheckpointError, match="is a checkpoint of another model") as caught:
        deepseed.Checkpoints(other, tmp_path).load()
    assert not isinstance(caught.value, DamagedError)


@pytest.mark.parametrize(("arguments", "says"), [({"every": 0}, r"every=0\)\n  fix: a number of steps"), ({"keep": -1}, r"keep=-1\)\n  fix: a number of checkpoints"), ({"objects": {"a": 3}}, r"objects\['a'\], a int, has no state_dict\(\)"), ({"objects": {"count": Position()}}, "a name that is taken")])
def test_what_is_refused(arguments: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=says):
        deepseed.Checkpoints(begin(), tmp_path, **arguments)


@pytest.mark.parametrize("tag", ["latest", "a/b", "..", "", ".x", "step1.tmp-0123abcd"])
def test_tags_are_names_of_folders(tag: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is no name of a checkpoint\n  fix: "):
        deepseed.Checkpoints(begin(steps=1), tmp_path).save(tag=tag)
    assert not names(tmp_path)


# one job to a folder ----------------------------------------------------------------------------------------------------

HOLDS = """
import sys, time, os, torch, deepseed
from gloo.checkpoints import small, batch
step = small("zero0", backend="simulate")
step(batch(0))
deepseed.Checkpoints(step, sys.argv[1], every=1).after_step()
child = os.fork() if sys.argv[2] == "forks" else os.getpid()
if child:
    print("holds", child, flush=True)
time.sleep(60)
"""


def other_job(folder: Path, how: str = "") -> subprocess.Popen[str]:
    """Another process that has saved there and goes on."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", ""), str(Path(__file__).parent.parent)]), "OMP_NUM_THREADS": "1"}
    job = subprocess.Popen([sys.executable, "-W", "ignore", "-c", HOLDS, str(folder), how], stdout=subprocess.PIPE, text=True, env=environment)
    assert job.stdout is not None
    said, _, child = job.stdout.readline().partition(" ")
    assert said == "holds"
    job.child = int(child)  # type: ignore[attr-defined]
    return job


def test_a_second_job_is_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hold, "PATIENCE", 0.1)
    job = other_job(tmp_path, "forks")
    child = job.child  # type: ignore[attr-defined]
    step, says = begin(1), rf"{tmp_path} is in use: process {job.pid} on {socket.gethostname()}, since \d.* saves there, and two jobs(.|\n)*fix: a folder of its own for each job"
    try:
        before, there = everything(step), names(tmp_path)
        for use in (lambda: deepseed.Checkpoints(step, tmp_path).save(), lambda: deepseed.Checkpoints(step, tmp_path, every=5).load(), lambda: saves(step, tmp_path, asynchronous=True)):
            with pytest.raises(CheckpointError, match=says):
                use()
        assert same(everything(step), before) and names(tmp_path) == there
        deepseed.Checkpoints(step, tmp_path).load()  # only reads
        assert step.steps == 1 and [f.state for f in listed(tmp_path, read=True)] == ["complete"]
        step.load(tmp_path / "step1")
    finally:
        job.kill()
        job.wait()
    try:
        assert alive(child)  # what the job has forked does not keep the lock
        checkpoints = deepseed.Checkpoints(trained(step, 1), tmp_path, every=1)
        checkpoints.load()
        trained(step, 1)
        checkpoints.after_step()
        deepseed.Checkpoints(step, tmp_path).save(tag="again")  # one process as often as it likes
        assert names(tmp_path) == ["again", "latest", "step1", "step2"]
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_lock_is_had_though_nothing_can_be_written_into_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's file, or a full disk: a second job is refused all the same."""
    opened = os.open

    def theirs(path: Any, flags: int, *mode: int) -> int:
        if flags & os.O_RDWR and str(path).endswith(hold.LOCK):
            raise PermissionError(errno.EACCES, "not yours", str(path))
        return opened(path, flags, *mode)

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name, change in (("open", theirs), ("pwrite", full)):
        (tmp_path / name).mkdir()
        (tmp_path / name / hold.LOCK).touch()
        with monkeypatch.context() as patch:
            patch.setattr(hold.os, name, change)
            hold.hold(tmp_path / name)
            hold.hold(tmp_path / name)
        with (tmp_path / name / hold.LOCK).open() as other, pytest.raises(BlockingIOError):
            hold.fcntl.flock(other, hold.fcntl.LOCK_EX | hold.fcntl.LOCK_NB)


def test_a_killed_process_is_waited_for(tmp_path: Path) -> None:
    job = other_job(tmp_path)
    threading.Timer(0.5, job.kill).start()
    began = time.monotonic()
    deepseed.Checkpoints(begin(1), tmp_path, every=1).load()
    assert 0.2 < time.monotonic() - began < hold.PATIENCE
    job.wait()


def test_a_file_system_without_locks_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(hold.fcntl, "flock", none)
    monkeypatch.setattr(hold, "_UNLOCKED", set())
    step = begin(steps=1)
    for n in range(2):
        deepseed.Checkpoints(step, tmp_path / str(n)).save()
    assert capsys.readouterr().err.count(f"the file system of {tmp_path / '0'} has no locks: take care that no second job saves there") == 1


# a disk that is full ----------------------------------------------------------------------------------------------------


def limited(do: Callable[[], None], most: int) -> str:
    """What ``do`` says in a forked process whose files may have at most so many bytes: the system refuses what is more."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        said = "nothing"
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
            do()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        finally:
            os.write(writer, said.encode())
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(child, 0)
    return said


@BOTH
def test_a_disk_that_is_full(asynchronous: bool, tmp_path: Path) -> None:
    """The error names the file, nothing is left of the new one, and the former one is as it was."""
    step = begin(steps=1)
    deepseed.Checkpoints(step, tmp_path).save("former")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    trained(step, 1)

    def save() -> None:
        with deepseed.Checkpoints(step, tmp_path, keep=1, asynchronous=asynchronous) as checkpoints:
            checkpoints.save()

    said = limited(save, 2000)
    assert re.match(rf"CheckpointError: {tmp_path}/.*/__0_0.distcp cannot be written: File too large \(after \d+ bytes; \d+ are free\)\n  fix: make room", said), said
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    other = begin(1)
    assert deepseed.Checkpoints(other, tmp_path).load() == "former"


@BOTH
def test_latest_that_cannot_be_moved(asynchronous: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, rename = begin(steps=1), os.rename
    checkpoints = deepseed.Checkpoints(step, tmp_path, keep=1, asynchronous=asynchronous)
    checkpoints.save("former")
    checkpoints.wait()
    trained(step, 1)

    def full(a: Path, b: Path) -> None:
        if Path(b).name == "latest":
            raise OSError(28, "No space left on device")
        rename(a, b)

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(CheckpointError, match=r"/latest cannot be written: No space left on device \(after 5 bytes; \d+ are free\)"):
        checkpoints.save()
        checkpoints.wait()
    monkeypatch.undo()
    assert names(tmp_path) == ["latest", "step1", "step2"] and checkpoints.load() == "former" and step.steps == 1


def test_on_ranks_every_one_says_it_in_the_same_call(tmp_path: Path) -> None:
    got = ranks(2, ranks_do.troubles, str(tmp_path))
    for rank, each in enumerate(got):
        for mode in ("synchronous", "asynchronous"):
            assert re.fullmatch(r"CheckpointError: rank 1: saving to .*/step\d: OSError: \[Errno 28\] No space left on device", each["messages"][mode]), f"rank {rank}, {mode}: {each['messages'][mode]}"
            assert each["seconds"][mode] < 20 and each[f"{mode}, left"], (mode, each)
            assert each[f"{mode}, former"] and each[f"{mode}, goes on"]


def test_a_thread_that_ends_between_two_questions_leaves_ranks_in_step(tmp_path: Path) -> None:
    assert ranks(2, ranks_do.ends_between_two_questions, str(tmp_path)) == [[False, False, True]] * 2


# while training goes on -------------------------------------------------------------------------------------------------


class Held:
    """The writing of a checkpoint waits until it may; how many are under way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may, self.threads = threading.Event(), []
        write = Saving.write

        def waits(saving: Saving) -> Any:
            self.threads.append(threading.current_thread())
            assert self.may.wait(60)
            return write(saving)

        monkeypatch.setattr(Saving, "write", waits)


@pytest.mark.parametrize("plan", ["zero0", "zero3+dp2", "zero3+tp2+dp2", "zero1+pp2+dp2", "zero2+dp2+offload(optimizer)"])
def test_what_is_written_while_training_goes_on_is_what_was_there(plan: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit the files of a save that training waits for."""
    step = begin(plan=plan, steps=2)
    deepseed.Checkpoints(step, tmp_path / "a").save("extra")
    held = Held(monkeypatch)
    checkpoints = deepseed.Checkpoints(step, tmp_path / "b", asynchronous=True, every=10)
    checkpoints.save("extra")
    for _ in range(3):
        trained(step, 1)
        assert checkpoints.after_step() is None
    assert not (tmp_path / "b" / "step2").exists() and held.threads and threading.main_thread() not in held.threads
    held.may.set()
    checkpoints.wait()
    files = [json.loads((tmp_path / each / "step2" / "manifest.json").read_text()) for each in "ab"]
    for manifest in files:
        del manifest["saved"], manifest["checksum"], manifest["files"][".metadata"]  # when, and which save it was
    assert files[0] == files[1]
    other = begin(1, plan="zero1+dp2")
    assert deepseed.Checkpoints(other, tmp_path / "b").load() == "extra" and other.steps == 2


def test_a_second_save_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, held = begin(steps=1), Held(monkeypatch)
    checkpoints = deepseed.Checkpoints(step, tmp_path, asynchronous=True)
    checkpoints.save()
    trained(step, 1)
    threading.Timer(0.2, held.may.set).start()
    checkpoints.save()
    assert (tmp_path / "step1" / "manifest.json").exists()
    checkpoints.wait()
    assert names(tmp_path) == ["latest", "step1", "step2"]
    other = begin(1)
    held.may.clear()
    checkpoints.save(tag="third")
    threading.Timer(0.2, held.may.set).start()
    assert checkpoints.load("third") is None and deepseed.Checkpoints(other, tmp_path).load() is None and other.steps == 2


def test_what_fails_in_the_thread_is_raised_by_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = begin(steps=1)
    checkpoints = deepseed.Checkpoints(step, tmp_path, asynchronous=True, every=1)
    checkpoints.save("good")

    def fails(_: Saving) -> Any:
        raise OSError(5, "Input/output error")

    for ask in (checkpoints.after_step, checkpoints.save, checkpoints.wait, checkpoints.load):
        checkpoints.wait()
        trained(step, 1)
        with monkeypatch.context() as patch:
            patch.setattr(Saving, "write", fails)
            checkpoints.save()
            wait_for(lambda: checkpoints._writing is not None and checkpoints._writing.done)
        with pytest.raises(CheckpointError, match=r"saving to .*: OSError: \[Errno 5\] Input/output error"):
            ask()
        assert (tmp_path / "latest").read_text() == "step1" and names(tmp_path) == ["latest", "step1"]
    assert checkpoints.load() == "good" and step.steps == 1
    assert not background._UNSETTLED


def test_the_copies_are_counted_and_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    step = begin(steps=1)
    checkpoints = deepseed.Checkpoints(step, tmp_path, asynchronous=True)
    assert checkpoints.host_bytes == 0
    checkpoints.save()
    want = sum(t.nbytes for t in everything(step).values())
    assert checkpoints.host_bytes == want
    assert f"{want / 1024:.1f} KiB of host memory in each of 1 processes hold a copy of what is saved" in capsys.readouterr().err
    checkpoints.wait()
    memory = {t.data_ptr() for t in checkpoints._staged._memory.values()}
    trained(step, 1)
    checkpoints.save()
    checkpoints.wait()
    assert {t.data_ptr() for t in checkpoints._staged._memory.values()} == memory and not capsys.readouterr().err
    monkeypatch.setattr("deepseed.checkpoints.available", lambda: want - 1)
    other = deepseed.Checkpoints(step, tmp_path, asynchronous=True)
    other.save(tag="whole")
    assert other._writing is None and other.host_bytes == 0 and (tmp_path / "whole" / "manifest.json").exists()
    assert f"{(want - 1) / 1024:.1f} KiB are free, so training waits for {tmp_path / 'whole'}" in capsys.readouterr().err


def test_the_account_of_host_memory_has_them(tmp_path: Path) -> None:
    step = small("zero3+dp2+offload(optimizer)", backend="simulate", device_memory="unlimited")
    trained(step, 2)
    before = [each["host"] for each in step.counted_peak_bytes]
    checkpoints = deepseed.Checkpoints(step, tmp_path, asynchronous=True)
    checkpoints.save()
    trained(step, 1)
    checkpoints.wait()
    after = [each["host"] for each in step.counted_peak_bytes]
    assert [a - b for a, b in zip(after, before, strict=True)] == [checkpoints._staged.of(rank) for rank in range(2)] and sum(after) - sum(before) == checkpoints.host_bytes


ENDS = """
import sys, torch, deepseed
from gloo.checkpoints import small, batch
from deepseed.checkpoint import Saving
from deepseed.runtime import boxfile
import time
boxfile.ALONE = 0  # every write is summed by a thread of its own, as large ones are
write = Saving.write
def slow(saving):
    time.sleep(0.3)
    if sys.argv[2] == "fails":
        raise OSError(28, "No space left on device")
    return write(saving)
Saving.write = slow
step = small("zero0", backend="simulate")
step(batch(0))
deepseed.Checkpoints(step, sys.argv[1], asynchronous=True).save("the last")
if sys.argv[2] == "raises":
    raise ValueError("something else")
"""


@pytest.mark.turn
def test_a_process_that_ends_has_written_what_it_began(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", ""), str(Path(__file__).parent.parent)]), "OMP_NUM_THREADS": "1"}
    done = {how: subprocess.Popen([sys.executable, "-W", "ignore", "-c", ENDS, str(tmp_path / how), how], stderr=subprocess.PIPE, text=True, env=environment) for how in ("ends", "raises", "fails")}
    said = {how: each.communicate()[1] for how, each in done.items()}
    for how in ("ends", "raises"):
        assert deepseed.Checkpoints(begin(), tmp_path / how).load() == "the last", said[how]
    assert "something else" in said["raises"] and done["raises"].returncode == 1 and done["ends"].returncode == 0
    assert re.search(r"deepseed: saving to .*/fails/step1: OSError: \[Errno 28\] No space left", said["fails"]) and not names(tmp_path / "fails")


# what else goes on ------------------------------------------------------------------------------------------------------


def test_schedules_loaders_and_generators_go_on(tmp_path: Path) -> None:
    step, own = begin(steps=1), Position()
    scheduler = torch.optim.lr_scheduler.StepLR(step.optimizer, 1, 0.5)
    scheduler.step()
    own.at = 3
    checkpoints = deepseed.Checkpoints(step, tmp_path, objects={"scheduler": scheduler, "loader": own})
    checkpoints.save({"note": 1})
    want = torch.rand(2).tolist(), random.random(), float(np.random.rand()), torch.randn(3).tolist(), random.gauss(0, 1), float(np.random.standard_normal())
    other, loader = begin(1), Position()
    schedule = torch.optim.lr_scheduler.StepLR(other.optimizer, 1, 0.5)
    assert deepseed.Checkpoints(other, tmp_path, objects={"scheduler": schedule, "loader": loader}).load() == {"note": 1}
    got = torch.rand(2).tolist(), random.random(), float(np.random.rand()), torch.randn(3).tolist(), random.gauss(0, 1), float(np.random.standard_normal())
    assert got == want and loader.at == 3 and schedule.last_epoch == 1 and other.optimizer.param_groups[0]["lr"] == 0.005
    lacking = deepseed.Checkpoints(other, tmp_path, objects={"other": Position()})
    before = everything(other)
    with pytest.raises(CheckpointError, match=r"has no state of 'other', it has loader, scheduler\n  fix: "):
        lacking.load()
    assert same(everything(other), before)
    state = torch.get_rng_state()
    lacking.load(objects=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_state_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Odd:
        def state_dict(self) -> Any:
            return {"f": print}

        def load_state_dict(self, state: Any) -> None:
            raise AssertionError

    step = begin(steps=1)
    with pytest.raises(CheckpointError, match=r"objects\['odd'\].state_dict\(\): dict cannot be saved and read back"):
        deepseed.Checkpoints(step, tmp_path, objects={"odd": Odd()}).save()
    assert not tmp_path.exists() or not names(tmp_path)


def test_each_process_has_its_own_states(tmp_path: Path) -> None:
    drawn = ranks(2, ranks_do.positions, str(tmp_path), True)
    assert drawn[0] != drawn[1]
    assert ranks(2, ranks_do.positions, str(tmp_path), False) == [(10, 5, drawn[0]), (11, 5, drawn[1])]
    step, own, alike = begin(), Position(), Position()
    with pytest.raises(CheckpointError, match=r"the state of 'own' differs by process and is of 2 of them, here are 1\n  fix: "):
        deepseed.Checkpoints(step, tmp_path, objects={"alike": alike, "own": own}).load()
    deepseed.Checkpoints(step, tmp_path, objects={"alike": alike}).load()
    assert alike.at == 5


def test_a_module_counts_calls(tmp_path: Path) -> None:
    """Its steps are the user's: forward may be called more than once a step, or less."""
    module = deepseed.compile(nn.Linear(6, 2).double(), "zero0", backend="simulate")
    checkpoints = deepseed.Checkpoints(module, tmp_path, every=2)
    for _ in range(3):
        module(batch(0)), module(batch(1))
        checkpoints.after_step()
    assert names(tmp_path) == ["latest", "step2"]
    again = deepseed.Checkpoints(module, tmp_path, every=2)
    again.load()
    assert again.steps == 2 and [again.after_step() and again.path.name for _ in range(2)] == [None, "step4"]


# the engine's loader ----------------------------------------------------------------------------------------------------


def loaded(loader: Loader, number: int) -> list[Any]:
    """So many batches, epoch after epoch."""
    out: list[Any] = []
    while len(out) < number:
        for rows in loader:
            out.append(rows)
            if len(out) == number:
                return out
    return out


def loader(ranks: int, rank: int, rows: int, drop_last: bool = False, length: int = 22) -> Loader:
    order = Order(range(length), ranks, rank, 3)
    return Loader(torch.utils.data.DataLoader(range(length), batch_sampler=torch.utils.data.BatchSampler(order, rows, drop_last), collate_fn=list), order, rows)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("at", range(14))
def test_the_order_of_rows_goes_on(drop_last: bool, at: int) -> None:
    """On each of two ranks, at every batch of two epochs; twice over."""
    for rank in range(2):
        whole = loaded(loader(2, rank, 3, drop_last), 20)
        first = loader(2, rank, 3, drop_last)
        assert loaded(first, at) == whole[:at]
        second = loader(2, rank, 3, drop_last)
        second.load_state_dict(first.state_dict())
        assert loaded(second, 2) == whole[at : at + 2]
        third = loader(2, rank, 3, drop_last)
        third.load_state_dict(second.state_dict())
        assert loaded(third, 18 - at) == whole[at + 2 :]


def test_the_order_of_rows_is_one_for_any_number_of_ranks() -> None:
    """Rows of the same epoch, none twice and none left out, when two ranks with batches of three become four, or one with batches of two."""
    two = [loader(2, rank, 3, length=24) for rank in range(2)]
    seen = [row for each in two for rows in loaded(each, 2) for row in rows]
    assert two[0].state_dict() == two[1].state_dict() == {"epoch": 1, "rows": 12}
    for ranks_, rows in ((4, 3), (1, 2), (3, 2)):
        more = []
        for rank in range(ranks_):
            each = loader(ranks_, rank, rows, length=24)
            each.load_state_dict(two[0].state_dict())
            more += [row for batch_ in each for row in batch_]
        assert sorted(seen + more) == list(range(24))
    whole = [loaded(loader(1, 0, 12, length=24), 2)[1]]
    one = loader(1, 0, 12, length=24)
    one.load_state_dict(two[0].state_dict())
    assert loaded(one, 1) == whole


def test_an_iterable_dataset_goes_on() -> None:
    class Rows(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            return iter(range(10))

    def make() -> Loader:
        return Loader(torch.utils.data.DataLoader(Rows(), batch_size=3, collate_fn=list), None, 3)

    first, second = make(), make()
    loaded(first, 6)
    second.load_state_dict(first.state_dict())
    assert loaded(second, 3) == loaded(make(), 9)[6:]


def test_an_engine_goes_on_in_its_data(tmp_path: Path) -> None:
    """Saved by its own name for it; written while training goes on where the config says so."""
    data = [batch(n)[0] for n in range(10)]
    config = {"train_batch_size": 2, "optimizer": {"type": "AdamW", "params": {"lr": 0.01}}, "checkpoint": {"writer": {"type": "FAST", "decoupled": True}}}

    def make(seed: int) -> Any:
        torch.manual_seed(seed)
        return deepseed.initialize(model=nn.Linear(6, 3).double(), config=config, training_data=data, loss_fn=lambda m, x: m(x).square().mean())[0]

    engine = make(0)
    for _ in range(3):
        engine.train_batch()
    engine.save_checkpoint(tmp_path)
    assert engine._checkpoints[str(tmp_path)]._writing is not None
    want = [float(engine.train_batch()) for _ in range(8)]
    other = make(1)
    engine._checkpoints[str(tmp_path)].wait()
    assert other.load_checkpoint(tmp_path)[0] == str(tmp_path / "global_step3")
    assert [float(other.train_batch()) for _ in range(8)] == want
    engine.load_checkpoint(tmp_path)  # back in time
    assert [float(engine.train_batch()) for _ in range(8)] == want
