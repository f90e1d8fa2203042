"""Ranks that are lost in training: killed at random moments, the job goes on from its last checkpoint as if nothing had happened; told to stop, it saves first."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
STEPS, EVERY = 24, 3
SCRIPT = f"""
import json, os, sys, time
import torch, deepseed
folder, config = sys.argv[1], json.loads(sys.argv[2])
rank, restart = int(os.environ["RANK"]), os.environ["DEEPSEED_RESTART"]
assert os.environ["TORCHELASTIC_RESTART_COUNT"] == restart
log = os.open(f"{{folder}}/log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def say(*words): os.write(log, (" ".join(map(str, [words[0], restart, rank, *words[1:]])) + "\\n").encode())
say("START", os.getpid(), os.environ["WORLD_SIZE"])
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Dropout(0.1), torch.nn.Linear(16, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4)).double()
engine, *_ = deepseed.initialize(model=model, config=config, loss_fn=lambda m, b: (m(b[0]) - b[1]).square().mean())
engine.load_checkpoint(f"{{folder}}/checkpoints")
say("FROM", engine.global_steps)
def rows(step):
    g = torch.Generator().manual_seed(step)
    x, y = torch.randn(12, 8, generator=g).double(), torch.randn(12, 4, generator=g).double()
    return [(a, b) for a, b in zip(x.tensor_split(engine.gradient_accumulation_steps()), y.tensor_split(engine.gradient_accumulation_steps()))]
def mine(part):
    n, at = engine.train_micro_batch_size_per_gpu(), engine.dp_rank
    return tuple(t[at * n : (at + 1) * n] for t in part)
while engine.global_steps < {STEPS}:
    loss = engine.train_batch(iter([mine(part) for part in rows(engine.global_steps)]))
    say("LOSS", engine.global_steps, float(loss).hex())
    time.sleep(float(os.environ.get("PACE", "0")))
    if engine.global_steps % {EVERY} == 0:
        engine.save_checkpoint(f"{{folder}}/checkpoints")
        say("SAVED", engine.global_steps)
    if engine.preempted:
        if engine.global_steps % {EVERY}:
            engine.save_checkpoint(f"{{folder}}/checkpoints")
        say("STOPPED", engine.global_steps)
        sys.exit(143)
weights = engine.module_state_dict()
if rank == 0: torch.save(weights, f"{{folder}}/weights.pt")
"""


def config(stage: int = 3, **more: Any) -> dict[str, Any]:
    return {"train_batch_size": 12, "optimizer": {"type": "AdamW", "params": {"lr": 0.01}}, "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}, "zero_optimization": {"stage": stage}, **more}


class Job:
    """A training script under the launcher, and what its ranks have said so far."""

    def __init__(self, folder: Path, ranks: int, of: dict[str, Any], *flags: object, pace: float = 0.0, words: Sequence[object] = (), **environment: str) -> None:
        import json

        folder.mkdir(exist_ok=True)
        (folder / "train.py").write_text(SCRIPT)
        self.folder, self.started = folder, time.monotonic()
        where = words or ["--num_gpus", ranks]
        command = [sys.executable, "-m", "deepseed", *map(str, where), "--no_local_rank", *map(str, flags), str(folder / "train.py"), str(folder), json.dumps(of)]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "DEEPSEED_TIMEOUT": "60", "PACE": str(pace), **environment}
        self.errors = (folder / "stderr").open("a")
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=self.errors, env=env)

    def said(self, what: str) -> list[list[str]]:
        """Lines of ``what``: restart, rank, and the rest."""
        path = self.folder / "log"
        return [words[1:] for line in (path.read_text().splitlines() if path.exists() else []) if (words := line.split())[0] == what]

    def until(self, true: Callable[[], object], seconds: float = 100.0) -> bool:
        """Wait; False where the job has ended before."""
        end = time.monotonic() + seconds
        while not true():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < end, f"nothing happened for {seconds} s\n{self.stderr()}"
            time.sleep(0.002)
        return True

    def ended(self, seconds: float = 120.0) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"a hang: the launcher is there after {seconds} s\n{self.stderr()}") from None
        finally:
            self.errors.close()

    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    def weights(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = torch.load(self.folder / "weights.pt")
        return found

    def curve(self) -> dict[int, set[float]]:
        """Every loss that any rank of any start has said, by step."""
        out: dict[int, set[float]] = defaultdict(set)
        for _restart, _rank, step, loss in self.said("LOSS"):
            out[int(step)].add(float.fromhex(loss))
        return dict(out)


def kill(job: Job, ranks: int, kills: int, seed: int) -> int:
    """SIGKILL to a rank at a random moment of each start, ``kills`` times; how often it was done before the job was over."""
    draw = random.Random(seed)
    folder = job.folder / "checkpoints"
    for n in range(kills):

        def here(what: str, n: int = n) -> list[list[str]]:
            return [words for words in job.said(what) if words[0] == str(n)]

        if not job.until(lambda: len(here("START")) == ranks):
            return n
        how = draw.choice(("start", "step", "save", "save"))
        if how != "start" and not job.until(lambda: here("LOSS")):
            return n
        if how == "save":
            since = time.monotonic()
            job.until(lambda: time.monotonic() > since + 20 or (folder.is_dir() and any(".tmp-" in name for name in os.listdir(folder))))
        time.sleep(draw.uniform(0, {"start": 3.0, "step": 1.0, "save": 0.01}[how]))
        rank, process = draw.choice([(words[1], int(words[2])) for words in here("START")])
        if job.process.poll() is not None:
            return n
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            return n
        if not job.until(lambda: f"deepseed: rank {rank} (local rank {rank}, process {process}) was killed by SIGKILL" in job.stderr()):
            return n
    return kills


def check(job: Job, undisturbed: Job, kills: int) -> int:
    """The job has gone on as if nothing had happened; the most steps that one loss has cost."""
    assert job.stderr().count("was killed by SIGKILL") == kills
    assert f"deepseed: restart {kills} of " in job.stderr() and f"deepseed: restart {kills + 1} of" not in job.stderr()
    curve = job.curve()
    assert curve == undisturbed.curve(), "bitwise, steps that were done twice among them"
    ours, theirs = job.weights(), undisturbed.weights()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    most = 0
    for n in range(1, kills + 1):
        starts = {int(words[2]) for words in job.said("FROM") if words[0] == str(n)}
        if not starts:
            continue  # killed before it had loaded
        (start,) = starts
        done = max((int(words[2]) for words in job.said("LOSS") if int(words[0]) < n), default=0)
        saved = max((int(words[2]) for words in job.said("SAVED") if int(words[0]) < n), default=0)
        assert start >= saved and start % EVERY == 0 and done - start <= EVERY
        most = max(most, done - start)
    assert not [name for name in os.listdir(job.folder / "checkpoints") if ".old-" in name], "nothing is left of saves that were cut off"
    return most


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Stage 3 on two ranks."""
    job = Job(tmp_path_factory.mktemp("undisturbed"), 2, config())
    assert job.ended() == 0, job.stderr()
    return job


def test_ranks_that_are_killed(tmp_path: Path, undisturbed: Job) -> None:
    job = Job(tmp_path, 2, config(), "--max_restarts", 3, pace=0.05)
    done = kill(job, 2, 3, seed=0)
    assert job.ended() == 0 and done == 3, job.stderr()
    check(job, undisturbed, 3)
