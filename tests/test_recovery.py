"""Ranks that are lost in training: killed at random moments, the job goes on from its last checkpoint as if nothing had happened; told to stop, it saves first."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from deepseed.launcher.loss import loss_of
from deepseed.launcher.options import Options

ROOT = Path(__file__).resolve().parent.parent
STEPS, EVERY = 24, 3
BEGIN = """
import json, os, sys, time
import torch, deepseed
folder, config = sys.argv[1], json.loads(sys.argv[2])
rank, restart = int(os.environ["RANK"]), os.environ["TORCHELASTIC_RESTART_COUNT"]
assert os.environ.get("DEEPSEED_RESTART", restart) == restart
log = os.open(f"{folder}/log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def say(*words): os.write(log, (" ".join(map(str, [words[0], restart, rank, *words[1:]])) + "\\n").encode())
say("START", os.getpid(), os.environ["WORLD_SIZE"])
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Dropout(float(os.environ.get("DROP", "0.1"))), torch.nn.Linear(16, 4)).double()
def rows(step):
    g = torch.Generator().manual_seed(step)
    return torch.randn(12, 8, generator=g).double(), torch.randn(12, 4, generator=g).double()
"""
SCRIPT = f"""{BEGIN}
engine, *_ = deepseed.initialize(model=model, config=config, loss_fn=lambda m, b: (m(b[0]) - b[1]).square().mean())
engine.load_checkpoint(f"{{folder}}/checkpoints")
say("FROM", engine.global_steps)
def mine(step):
    n, at, count = engine.train_micro_batch_size_per_gpu(), engine.dp_rank, engine.gradient_accumulation_steps()
    return iter(tuple(t[at * n : (at + 1) * n] for t in part) for part in zip(*(t.tensor_split(count) for t in rows(step))))
while engine.global_steps < {STEPS}:
    loss = engine.train_batch(mine(engine.global_steps))
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
STEP_SCRIPT = f"""{BEGIN}
step = deepseed.compile(model, config["plan"], optimizer=torch.optim.AdamW(model.parameters(), lr=0.01), loss_fn=lambda m, b: (m(b[0]) - b[1]).square().mean())
checkpoints = deepseed.Checkpoints(step, f"{{folder}}/checkpoints", every={EVERY}, keep=2)
checkpoints.load()
say("FROM", step.steps)
while step.steps < {STEPS}:
    loss = step(rows(step.steps))
    say("LOSS", step.steps, float(loss).hex())
    time.sleep(float(os.environ.get("PACE", "0")))
    try:
        if checkpoints.after_step(): say("SAVED", step.steps)
    except SystemExit as error:
        say("STOPPED", step.steps, error.code)
        raise
weights = step.state_dict()
if rank == 0: torch.save(weights, f"{{folder}}/weights.pt")
"""


def config(stage: int = 3, **more: Any) -> dict[str, Any]:
    return {"train_batch_size": 12, "optimizer": {"type": "AdamW", "params": {"lr": 0.01}}, "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}, "zero_optimization": {"stage": stage}, **more}


JOBS: list[Job] = []


class Job:
    """A training script under the launcher, and what its ranks have said so far."""

    def __init__(self, folder: Path, ranks: int, of: dict[str, Any], *flags: object, pace: float = 0.0, words: Sequence[object] = (), **environment: str) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "train.py").write_text(STEP_SCRIPT if "plan" in of else SCRIPT)
        self.folder, self.started = folder, time.monotonic()
        where = words or ["--num_gpus", ranks]
        command = [sys.executable, "-m", "deepseed", *map(str, where), "--no_local_rank", *map(str, flags), str(folder / "train.py"), str(folder), json.dumps(of)]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "DEEPSEED_TIMEOUT": "60", "PACE": str(pace), **environment}
        self.errors = (folder / "stderr").open("a")
        JOBS.append(self)
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=self.errors, env=env)

    def said(self, what: str) -> list[list[str]]:
        """Lines of ``what``: restart, rank, and the rest."""
        path = self.folder / "log"
        return [words[1:] for line in (path.read_text().splitlines() if path.exists() else []) if (words := line.split())[0] == what]

    def until(self, true: Callable[[], object], seconds: float = 300.0) -> bool:
        """Wait; False where the job has ended before."""
        end = time.monotonic() + seconds
        while not true():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < end, f"nothing happened for {seconds} s\n{self.stderr()}"
            time.sleep(0.002)
        return True

    def ended(self, seconds: float = 300.0) -> int:
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


def pid(job: Job, restart: int, rank: int) -> int:
    return next(int(words[2]) for words in job.said("START") if words[:2] == [str(restart), str(rank)])


def same(job: Job, other: Job) -> bool:
    return job.curve() == other.curve() and all(torch.equal(t, other.weights()[name]) for name, t in job.weights().items())


def kill(job: Job, ranks: int, kills: int, seed: int) -> int:
    """SIGKILL to a rank at a random moment of each start, ``kills`` times; how often it was done before the job was over."""
    draw = random.Random(seed)
    folder = job.folder / "checkpoints"
    for n in range(kills):

        def here(what: str, n: int = n) -> list[list[str]]:
            return [words for words in job.said(what) if words[0] == str(n)]

        if not job.until(lambda here=here: len(here("START")) == ranks):  # type: ignore[misc]
            return n
        how = draw.choice(("start", "step", "save", "save"))
        if how != "start" and not job.until(lambda here=here: here("LOSS")):  # type: ignore[misc]
            return n
        if how == "save":
            former, since = draw.randint(0, 2), time.monotonic()
            job.until(lambda here=here, former=former, since=since: time.monotonic() > since + 20 or (len(here("SAVED")) >= ranks * former and folder.is_dir() and any(".tmp-" in name for name in os.listdir(folder))))  # type: ignore[misc]
        time.sleep(draw.uniform(0, {"start": 3.0, "step": 1.0, "save": 0.01}[how]))
        rank, process = draw.choice([(words[1], int(words[2])) for words in here("START")])
        if job.process.poll() is not None:
            return n
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            return n
        said = f"deepseed: rank {rank} (local rank {rank}, process {process}) was killed by SIGKILL"
        if not job.until(lambda said=said: said in job.stderr()):  # type: ignore[misc]
            return n
    return kills


def check(job: Job, undisturbed: Job, kills: int) -> int:
    """The job has gone on as if nothing had happened; the most steps that one loss has cost."""
    assert job.stderr().count("was killed by SIGKILL") == kills
    assert "Work::exception" not in job.stderr() and "frame #" not in job.stderr(), "those that are left have nothing of their own to say"
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


@pytest.fixture(autouse=True)
def none_is_left() -> Iterator[None]:
    yield
    for job in JOBS:
        job.process.kill()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Stage 3 on two ranks."""
    job = Job(tmp_path_factory.mktemp("undisturbed"), 2, config())
    assert job.ended() == 0, job.stderr()
    return job


@pytest.mark.turn
def test_ranks_that_are_killed(tmp_path: Path, undisturbed: Job) -> None:
    job = Job(tmp_path, 2, config(), "--max_restarts", 3, pace=0.05)
    done = kill(job, 2, 3, seed=0)
    assert job.ended() == 0 and done == 3, job.stderr()
    check(job, undisturbed, 3)


@pytest.mark.wide
@pytest.mark.parametrize(
    ("ranks", "of", "kills"),
    [(2, config(3), 13), (3, config(2), 13), (2, config(1, train_micro_batch_size_per_gpu=2), 12), (2, config(0, pipeline={"stages": 2}, train_micro_batch_size_per_gpu=3), 12)],
    ids=["zero3", "zero2, three ranks", "zero1, microbatches", "pp2"],
)
def test_fifty_kills(tmp_path: Path, ranks: int, of: dict[str, Any], kills: int) -> None:
    reference = Job(tmp_path / "undisturbed", ranks, of)
    assert reference.ended() == 0, reference.stderr()
    done, seed, most = 0, 100, 0
    while done < kills:
        job = Job(tmp_path / f"job{seed}", ranks, of, "--max_restarts", kills, pace=0.1)
        now = kill(job, ranks, kills - done, seed)
        assert job.ended() == 0, job.stderr()
        if now:
            most = max(most, check(job, reference, now))
        done, seed = done + now, seed + 1
    print(f"{done} kills in {seed - 100} jobs, at most {most} steps done twice")
    assert most <= EVERY


@pytest.mark.parametrize("of", [config(), pytest.param({"plan": "pp2+mb2"}, marks=pytest.mark.wide)], ids=["engine", "step"])
@pytest.mark.turn
def test_told_to_stop_all_save_after_the_same_step(tmp_path: Path, request: pytest.FixtureRequest, of: dict[str, Any]) -> None:
    """SIGTERM to the launcher: one checkpoint of the step it was at; what is started later goes on from there."""
    job = Job(tmp_path / "job", 2, of, "--max_restarts", 3, pace=0.1)
    assert job.until(lambda: ["0", "0", "4"] in [words[:3] for words in job.said("LOSS")])
    job.process.send_signal(signal.SIGTERM)
    assert job.ended() == 143, job.stderr()
    assert job.stderr().rstrip().endswith("deepseed: ended by SIGTERM: all ranks had saved") and "restart" not in job.stderr()
    stops = {int(words[2]) for words in job.said("STOPPED")}
    assert len(job.said("STOPPED")) == 2 and len(stops) == 1 and stops <= {5, 6, 7, 8}, "all ranks after the same step, one or two after they were told"
    assert (job.folder / "checkpoints" / "latest").read_text().removeprefix("global_").strip() == f"step{max(stops)}"
    again = Job(job.folder, 2, of)
    assert again.ended() == 0, again.stderr()
    assert {int(words[2]) for words in again.said("FROM")} == {0, *stops}
    undisturbed = request.getfixturevalue("undisturbed") if "plan" not in of else Job(tmp_path / "undisturbed", 2, of)
    assert undisturbed.ended() == 0 and same(again, undisturbed)
    assert all(len([1 for words in again.said("LOSS") if words[2] == str(step)]) == 2 for step in range(1, STEPS + 1)), "no step was done twice"


@pytest.mark.wide
@pytest.mark.parametrize("of", [{"plan": "zero3"}, config()], ids=["step", "engine"])
@pytest.mark.parametrize("flags", [("--on_loss", "shrink", "--min_ranks", 2), ("--min_ranks", 2)], ids=["at once", "lost twice running"])
def test_a_smaller_world_goes_on_along_the_same_curve(tmp_path: Path, of: dict[str, Any], flags: Sequence[object]) -> None:
    """The batch is the global one. An engine's ranks draw dropout for their own rows, so that it is off there."""
    drop = {} if "plan" in of else {"DROP": "0"}
    job = Job(tmp_path / "job", 3, of, "--max_restarts", 4, *flags, pace=0.1, **drop)
    for n in range(1 if "shrink" in flags else 2):
        assert job.until(lambda n=n: [words for words in job.said("SAVED") if words[0] == str(n)])  # type: ignore[misc]
        time.sleep(0.15)
        os.kill(pid(job, n, 1), signal.SIGKILL)
    assert job.ended() == 0, job.stderr()
    assert "with 2 ranks: slot 1 of localhost is left out" in job.stderr()
    assert {words[3] for words in job.said("START")} == {"3", "2"}
    alone = Job(tmp_path / "alone", 1, of, **drop)
    assert alone.ended() == 0, alone.stderr()
    close(job, alone)


def close(job: Job, other: Job) -> None:
    """The same up to the order of sums."""
    wanted = other.curve()
    for step, losses in job.curve().items():
        assert all(abs(loss - next(iter(wanted[step]))) < 1e-10 for loss in losses), f"step {step}: {losses} {wanted[step]}"
    assert set(job.curve()) == set(wanted)
    for name, t in job.weights().items():
        torch.testing.assert_close(t, other.weights()[name], rtol=1e-10, atol=1e-10)


# nodes ------------------------------------------------------------------------------------------------------------------


def port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def two_nodes(tmp_path: Path, ssh: dict[str, str], *flags: object, **more: str) -> Job:
    (tmp_path / "home" / ".deepspeed_env").write_text("\n".join(f"{name}={value}" for name, value in {"PACE": "0.1", **more}.items()))
    return Job(tmp_path / "job", 2, config(), *flags, pace=0.1, words=["--hostfile", tmp_path / "hosts", "--master_port", port()], **ssh)


@pytest.mark.wide
def test_a_rank_of_another_node_is_lost_and_then_all_are_told_to_stop(tmp_path: Path, ssh: dict[str, str], undisturbed: Job) -> None:
    job = two_nodes(tmp_path, ssh, "--max_restarts", 2)
    assert job.until(lambda: len([words for words in job.said("SAVED") if words[2] == "6"]) == 2)
    os.kill(pid(job, 0, 1), signal.SIGKILL)
    assert job.until(lambda: len([words for words in job.said("SAVED") if words[0] == "1" and words[2] == "12"]) == 2)
    said = job.stderr()
    assert "rank 1 (local rank 0" in said and "was killed by SIGKILL" in said and "deepseed: node localhost failed with exit code 137" in said and "restart 1 of 2, with 2 ranks\n" in said
    assert len({words[2] for words in job.said("FROM") if words[0] == "1"}) == 1
    job.process.send_signal(signal.SIGTERM)
    assert job.ended() == 143 and "all ranks had saved" in job.stderr() and "restart 2" not in job.stderr(), job.stderr()
    assert len(job.said("STOPPED")) == 2 and len({words[2] for words in job.said("STOPPED")}) == 1
    job = two_nodes(tmp_path, ssh)
    assert job.ended() == 0 and same(job, undisturbed), job.stderr()


@pytest.mark.wide
def test_a_node_that_is_gone_is_left_out(tmp_path: Path, ssh: dict[str, str]) -> None:
    job = two_nodes(tmp_path, ssh, "--max_restarts", 3, "--min_ranks", 1, DROP="0")
    assert job.until(lambda: len([words for words in job.said("SAVED") if words[2] == "6"]) == 2)
    rank = pid(job, 0, 1)
    (tmp_path / "home" / "gone-localhost").touch()
    os.kill(int(Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[1]), signal.SIGKILL)  # its launcher, and so the rank
    assert job.ended() == 0, job.stderr()
    assert "restart 1 of 3, with 2 ranks\n" in job.stderr() and "restart 2 of 3, with 1 rank: node localhost is left out" in job.stderr()
    alone = Job(tmp_path / "alone", 1, config(), DROP="0")
    assert alone.ended() == 0, alone.stderr()
    close(job, alone)


@pytest.mark.wide
def test_nodes_that_torchrun_starts_again(tmp_path: Path, undisturbed: Job) -> None:
    """Its dynamic rendezvous restarts the other node's ranks too: each start meets in a store of its own."""
    (tmp_path / "train.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port()}", "--nnodes", "2", "--nproc_per_node", "1", "--max_restarts", "3", "--log_dir", str(tmp_path)]
    job = Job.__new__(Job)
    job.folder = tmp_path
    with (tmp_path / "stderr").open("w") as errors:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "DEEPSEED_TIMEOUT": "60", "PACE": "0.2"}
        both = [subprocess.Popen([*command, str(tmp_path / "train.py"), str(tmp_path), json.dumps(config())], stdout=subprocess.DEVNULL, stderr=errors, env=env) for _ in range(2)]
        job.process = both[0]
        try:
            assert job.until(lambda: len([words for words in job.said("SAVED") if words[2] == "6"]) == 2)
            os.kill(pid(job, 0, 1), signal.SIGKILL)
            assert [process.wait(400) for process in both] == [0, 0], job.stderr()
        finally:
            for process in both:
                process.kill()
    assert {words[2] for words in job.said("FROM")} > {"0"} and same(job, undisturbed)


# what a launcher does with scripts of any kind ----------------------------------------------------------------------------


def launch(tmp_path: Path, text: str, *flags: object, of: dict[str, str] | None = None) -> tuple[int, str]:
    path = tmp_path / "script.py"
    path.write_text(text)
    command = [sys.executable, "-m", "deepseed", *map(str, flags), "--no_local_rank", str(path), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env={**os.environ, "PYTHONPATH": str(ROOT), **(of or {})}, check=False)
    return done.returncode, done.stderr


FAILING = """
import os, sys
open(f"{sys.argv[1]}/{os.environ['DEEPSEED_RESTART']}-{os.environ['RANK']}", "w").close()
if os.environ["RANK"] == "1": BODY
import time; time.sleep(60)
"""


def test_restarts_end(tmp_path: Path) -> None:
    code, said = launch(tmp_path, FAILING.replace("BODY", "sys.exit(3)"), "--num_gpus", 2, "--max_restarts", 1)
    assert code == 3 and said.count("ended with exit code 3") == 2 and said.count("deepseed: restart 1 of 1, with 2 ranks\n") == 1, said
    assert {"0-1", "1-1"} <= set(os.listdir(tmp_path))


def test_what_would_recur_is_not_restarted(tmp_path: Path) -> None:
    code, said = launch(tmp_path, FAILING.replace("BODY", 'raise __import__("deepseed.plan").plan.PlanError("tp3 does not divide 2 ranks")'), "--num_gpus", 2, "--max_restarts", 3)
    assert code == 1 and said.rstrip().endswith("deepseed: not restarted: it would end in the same way") and "restart 1" not in said, said


@pytest.mark.parametrize(
    ("failures", "rank", "code", "recurs"),
    [
        ({0: (-15, ""), 1: (2, "")}, 1, 2, True),
        ({0: (-9, ""), 1: (-9, "")}, 1, 137, False),  # the first was ended
        ({1: (1, "ValueError: x"), 2: (1, "deepseed.runtime.errors.RankError: rank 1 failed: ValueError: x")}, 1, 1, False),
        ({2: (1, "deepseed.runtime.errors.RankError: rank 1 did not come to a collective")}, 1, 1, False),  # it hung: 1 is the one to leave out
        ({1: (1, "deepseed.plan.PlanError: tp3 does not divide 2 ranks")}, 1, 1, True),
        ({1: (1, "ModuleNotFoundError: No module named 'x'\n\nDuring handling\n\nTraceback (most recent call last):\nValueError: y")}, 1, 1, False),
    ],
)
def test_which_rank_was_lost(tmp_path: Path, failures: dict[int, tuple[int, str]], rank: int, code: int, recurs: bool) -> None:
    def failure(local: int, exit_code: int, text: str) -> ProcessFailure:
        path = tmp_path / str(local)
        if text:
            path.write_text(json.dumps({"message": {"message": "", "extraInfo": {"py_callstack": f"Traceback (most recent call last):\n{text}\n", "timestamp": local}}}))
        return ProcessFailure(local, 1, exit_code, str(path))

    found = loss_of({n: failure(n, *of) for n, of in failures.items()}, {0}, Options("x.py", ()))
    assert (found.rank, found.code, found.recurs) == (rank, code, recurs), found.said


DYING = """
import os, signal, subprocess, sys, time
if os.environ["DEEPSEED_RESTART"] == "1": sys.exit(0)
signal.signal(signal.SIGTERM, lambda *_: None)  # as one that hears it and goes on
child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"],
                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # or whoever reads the launcher's output waits until it has ended
open(f"{sys.argv[1]}/{os.environ['RANK']}", "w").write(f"{os.getpid()} {child.pid}")
time.sleep(1)
both = [f"{sys.argv[1]}/{rank}" for rank in "01"]
while not all(os.path.exists(name) and os.path.getsize(name) for name in both): time.sleep(0.02)
if os.environ["RANK"] == "1": os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
"""


def lives(process: str) -> bool:
    status = Path(f"/proc/{process}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def test_nothing_of_a_start_is_left_at_the_next(tmp_path: Path) -> None:
    code, said = launch(tmp_path, DYING, "--num_gpus", 2, "--max_restarts", 1)
    assert code == 0 and "rank 1 (local rank 1" in said, said
    left = [f"{name}: {process}" for name in ("0", "1") for process in (tmp_path / name).read_text().split() if lives(process)]
    assert not left, "ranks that hear SIGTERM and go on, and what they have started, end within seconds too"


def test_ranks_do_not_outlive_their_launcher(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text("import os, sys, time\nopen(f'{sys.argv[1]}/' + os.environ['RANK'], 'w').write(str(os.getpid()))\ntime.sleep(100)\n")
    process = subprocess.Popen([sys.executable, "-m", "deepseed", "--num_gpus", "2", "--no_local_rank", str(path), str(tmp_path)], env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 150
    while not all((tmp_path / str(n)).exists() and (tmp_path / str(n)).read_text() for n in range(2)) and time.monotonic() < end:
        time.sleep(0.05)
    process.kill()
    process.wait()
    end = time.monotonic() + 30
    while any(lives((tmp_path / str(n)).read_text()) for n in range(2)):
        assert time.monotonic() < end, "a rank trains on, and the job that is started anew would meet it"
        time.sleep(0.05)


SLOW = """
import os, signal, subprocess, sys, time
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
open(f"{sys.argv[1]}/{os.environ['RANK']}", "w").close()
while not told: time.sleep(0.05)
time.sleep(1)
assert worker.poll() is None, "what a rank has started is not told"
if os.environ["RANK"] == "1": time.sleep(100)
worker.kill()
sys.exit(143)
"""


def test_grace(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(SLOW)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-m", "deepseed", "--num_gpus", "2", "--grace", "4", "--no_local_rank", str(path), str(tmp_path)], stderr=subprocess.PIPE, text=True, env=env)
    end = time.monotonic() + 150
    while not all((tmp_path / str(n)).exists() for n in range(2)) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143
    assert said.rstrip().endswith("deepseed: ended by SIGTERM: rank 1 was still there after 4 s (--grace)"), said


AGREEING = """
import os, random, signal, sys, time
import torch, torch.distributed as dist
from deepseed.runtime import preempt
from deepseed.runtime.distributed import start, stop, world
preempt.listen()
start("gloo")
rank = world().rank
own, stops = random.Random(rank), []
for trial in range(60):
    told = random.Random(trial)
    ranks = {r: told.randrange(6) for r in told.sample(range(3), told.randint(1, 3))}  # who is told, and while it does which step
    preempt._told = False
    for step in range(1, 20):
        if own.random() < 0.1: time.sleep(own.random() / 500)
        if ranks.get(rank) == step - 1: os.kill(os.getpid(), signal.SIGTERM)
        dist.all_reduce(torch.ones(1))
        if preempt.asked(step, str(trial)): break
    found = [torch.zeros(2) for _ in range(3)]
    dist.all_gather(found, torch.tensor([float(step), min(ranks.values()) + 1.0]))
    stops.append(all(f[0] == found[0][0] and f[1] < f[0] <= f[1] + 1 for f in found))
assert all(stops), stops.count(False)
stop()
open(f"{sys.argv[1]}/{rank}", "w").close()
"""


def test_all_ranks_stop_after_the_same_step_whoever_is_told(tmp_path: Path) -> None:
    """Any of three ranks, during any step, ranks at different speeds: at the end of the step after the one in which the first was told."""
    code, said = launch(tmp_path, AGREEING, "--num_gpus", 3)
    assert code == 0 and {"0", "1", "2"} <= set(os.listdir(tmp_path)), said


def test_a_rank_that_is_told_before_it_asks(tmp_path: Path) -> None:
    """It ends as any process does, and the job is not started again: whoever sends SIGTERM wants it to stop."""
    text = "import os, signal, time\nif os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(60)"
    code, said = launch(tmp_path, text, "--num_gpus", 2, "--max_restarts", 3)
    assert code == 143 and "rank 1 (local rank 1" in said and said.rstrip().endswith("not restarted: rank 1 was told to stop, before its script asked for the first time"), said


def test_a_rank_that_is_told_alone(tmp_path: Path) -> None:
    """A cluster may speak to a rank and not to the launcher; ranks that have saved are not started again."""
    text = "import os, sys, time\ntime.sleep(1.5 * int(os.environ['RANK']))\nsys.exit(143)"
    code, said = launch(tmp_path, text, "--num_gpus", 2, "--max_restarts", 3)
    assert code == 143 and said.rstrip().endswith("a rank was told to stop: all ranks had saved"), said
