"""The launcher: its flags and hostfiles; ranks that end well, badly and not at all; two nodes on this machine, by hand and through a stand-in for ssh."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from deepseed.launcher.errors import LaunchError
from deepseed.launcher.hosts import chosen, nodes_of, read_hostfile
from deepseed.launcher.node import free_port
from deepseed.launcher.options import Options, cores, parse
from deepseed.launcher.rank import share

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import json, os, signal, subprocess, sys, time
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE", "MASTER_PORT", "OMP_NUM_THREADS", "SAID")
how = sys.argv[-1]
seen = {**{n: os.environ.get(n) for n in names}, "argv": sys.argv[1:], "cores": sorted(os.sched_getaffinity(0))}
os.write(1, f"HERE {json.dumps(seen)}\\n".encode())  # in one piece: the nodes share a pipe
if how.startswith("file "):
    open(how[5:] + os.environ["RANK"], "w").close()
    how = "hang"
if how.startswith("tree "):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
    open(how[5:] + os.environ["RANK"], "w").write(str(child.pid))
    both = [how[5:] + rank for rank in "01"]
    while not all(os.path.exists(name) and os.path.getsize(name) for name in both): time.sleep(0.02)
    how = "exit"
if os.environ["RANK"] == "1":
    if how == "raise": raise ValueError("row 7 is unreadable")
    if how == "exit": sys.exit(3)
    if how == "kill": os.kill(os.getpid(), signal.SIGKILL)
if how != "ok": time.sleep(120)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train it.py"
    path.write_text(SCRIPT)
    return path


def launch(*words: object, environment: dict[str, str] | None = None) -> Any:
    command = [sys.executable, "-m", "deepseed", *map(str, words)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env=env, check=False)


def seen(output: str) -> list[dict[str, Any]]:
    import json

    found = [json.loads(line.partition("HERE ")[2]) for line in output.splitlines() if "HERE " in line]
    return sorted(found, key=lambda each: int(each["RANK"]))


# flags and hosts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--num_gpu", "2", "train.py"], "unrecognized arguments: --num_gpu"),
        (["--num_gpus", "0", "x.py"], "at least 1"),
        (["--include", "a:0", "--exclude", "b", "x.py"], "--include and --exclude are both given"),
        (["--include", "a:0", "--num_gpus", "1", "x.py"], "keep one of the two"),
        (["--module", "--no_python", "x"], "--module and --no_python"),
        (["--no_ssh", "x.py"], "--node_rank"),
        (["--num_nodes", "2", "--node_rank", "2", "x.py"], "0 to 1"),
        (["--launcher", "slurm", "x.py"], "srun"),
        (["--autotuning", "x.py"], "deepseed explain"),
        (["--bind_core_list", "3-1", "x.py"], "is no core"),
        (["nowhere.py"], "no file nowhere.py"),
    ],
)
def test_flags_that_cannot_be(words: Sequence[str], says: str) -> None:
    with pytest.raises(LaunchError, match=says):
        parse(words)


def test_what_follows_the_script_is_its_own(script: Path) -> None:
    o = parse(["--num_accelerators=4", "--master_port", "1234", str(script), "--num_gpus", "7", "--deepspeed_config", "x.json"])
    assert (o.num_gpus, o.master_port, o.arguments) == (4, 1234, ("--num_gpus", "7", "--deepspeed_config", "x.json"))


def test_hostfiles(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# two\nworker-0 slots=4  # first\n\nworker-1 slots=2\n")
    assert read_hostfile(path) == {"worker-0": 4, "worker-1": 2}
    o = Options("x.py", (), hostfile=path)
    assert nodes_of(o) == {"worker-0": (0, 1, 2, 3), "worker-1": (0, 1)}
    assert nodes_of(Options("x.py", (), hostfile=path, num_nodes=1, num_gpus=2)) == {"worker-0": (0, 1)}
    assert nodes_of(Options("x.py", (), hostfile=path, exclude="worker-0:0,3@worker-1")) == {"worker-0": (1, 2)}
    for text, says in (("worker-0 slots=four\n", "line 1"), ("a slots=1\na slots=2\n", "line 2: the host a is there twice"), ("# none\n", "names no host"), ("a slots=0", "line 1")):
        path.write_text(text)
        with pytest.raises(LaunchError, match=says):
            read_hostfile(path)
    with pytest.raises(LaunchError, match="no file"):
        nodes_of(Options("x.py", (), hostfile=tmp_path / "nowhere"))
    with pytest.raises(LaunchError, match="without a hostfile"):
        nodes_of(Options("x.py", (), num_nodes=2))


def test_slots_that_are_not_there() -> None:
    nodes = {"a": (0, 1), "b": (0, 1)}
    assert chosen(nodes, "b@a:1", "") == {"b": (0, 1), "a": (1,)}
    for include, exclude, says in (("c", "", "no host 'c'"), ("a:2", "", "has the slots 0, 1, not 2"), ("a:x", "", "slots are numbers"), ("", "a@b", "leaves no slot")):
        with pytest.raises(LaunchError, match=says):
            chosen(nodes, include, exclude)


def test_cores_are_divided() -> None:
    assert cores("1,3-5") == (1, 3, 4, 5) and cores("") == ()
    assert [share((0, 1, 2, 3, 8), n, 2) for n in range(2)] == [(0, 1), (2, 3)]
    assert share((5,), 1, 2) == (5,)


def test_a_port_that_is_taken_is_not_used(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as s:
        s.bind(("", 0))
        s.listen()
        port = s.getsockname()[1]
        found = free_port(port)
    assert found != port and f"port {port} is taken" in capsys.readouterr().err


# ranks ------------------------------------------------------------------------------------------------------------------


def test_ranks_begin_and_end(script: Path, tmp_path: Path) -> None:
    done = launch("--num_gpus", 2, "--bind_cores_to_rank", script, "--config", "a b", "ok")
    assert done.returncode == 0, done.stderr
    ranks = seen(done.stdout)
    assert [(r["RANK"], r["LOCAL_RANK"], r["WORLD_SIZE"], r["LOCAL_SIZE"], r["CROSS_RANK"], r["CROSS_SIZE"]) for r in ranks] == [("0", "0", "2", "2", "0", "1"), ("1", "1", "2", "2", "0", "1")]
    assert [r["argv"] for r in ranks] == [[f"--local_rank={n}", "--config", "a b", "ok"] for n in range(2)]
    available = len(os.sched_getaffinity(0))
    assert all(len(r["cores"]) == max(1, available // 2) == int(r["OMP_NUM_THREADS"]) or available == 1 for r in ranks)


def test_a_log_of_each_rank(script: Path, tmp_path: Path) -> None:
    done = launch("--num_gpus", 2, "--no_local_rank", "--enable_each_rank_log", tmp_path / "logs", script, "ok")
    assert done.returncode == 0 and "HERE" not in done.stdout
    for n in range(2):
        (rank,) = seen((tmp_path / "logs" / f"rank_{n}.log").read_text())
        assert rank["RANK"] == str(n) and rank["argv"] == ["ok"]


@pytest.mark.parametrize(("how", "code", "says"), [("raise", 1, "ended with exit code 1"), ("tree", 3, "ended with exit code 3"), ("kill", 137, "was killed by SIGKILL")])
@pytest.mark.turn
def test_a_rank_that_fails_ends_all(script: Path, tmp_path: Path, how: str, code: int, says: str) -> None:
    started = time.monotonic()
    done = launch("--num_gpus", 2, script, f"tree {tmp_path}/child" if how == "tree" else how)
    assert time.monotonic() - started < 60, "all ranks end within half a minute of the first"
    assert done.returncode == code, done.stderr
    last = done.stderr[done.stderr.rindex("deepseed: rank 1") :]
    assert says in last and "train it.py" in last
    if how == "raise":
        assert last.rstrip().endswith("ValueError: row 7 is unreadable") and "runpy" not in last and last.count("File ") == 1
    started_too = sorted(tmp_path.glob("child*"))
    assert len(started_too) == (2 if how == "tree" else 0)
    for child in started_too:  # what a rank has started ends with it, that of the rank which failed too
        status = Path(f"/proc/{child.read_text()}/status")
        assert not status.exists() or "State:\tZ" in status.read_text(), f"{child.name} lives"


HANGING = """
import sys, time
import torch, torch.distributed as dist
from deepseed.runtime.distributed import guarded, start, world
start()
w = world()
def load_a_page(): time.sleep(60)
with w.guarded():
    for n in range(3):
        if n == 2 and w.rank == 1: load_a_page()
        w.run(lambda: dist.all_reduce(torch.ones(2), async_op=True), f"all_reduce over dp, number {n}")
"""


@pytest.mark.turn
def test_a_rank_that_hangs_is_named_with_its_place_and_ends_all(tmp_path: Path) -> None:
    path = tmp_path / "slow.py"
    path.write_text(HANGING)
    done = launch("--num_gpus", 2, path, environment={"DEEPSEED_TIMEOUT": "4"})
    places = f"  rank 0: all_reduce over dp, number 2; at {path}:11 in <module>\n  rank 1: computation after all_reduce on dp, number 1; at {path}:7 in load_a_page\n"
    assert done.returncode == 1
    assert f"deepseed: rank 0 has waited 2 s, and gives up after 4 (DEEPSEED_TIMEOUT)\n{places}" in done.stderr, "in good time before it gives up"
    last = done.stderr[done.stderr.rindex("deepseed: rank 0 (local") :]
    assert "RankError: rank 1 did not come to a collective" in last and last.endswith(places), last
    others = done.stderr[: done.stderr.index("deepseed: rank 0 (local")].splitlines()
    assert sum("RankError" in line or "did not come to a collective" in line for line in others) == 1 and not any("Traceback" in line or "gloo" in line.split(" (")[0] for line in others), done.stderr
    assert "runpy" not in last and "launcher/rank.py" not in last, "in what it was caused by either"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all(script: Path, tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "deepseed", "--num_gpus", "2", str(script), f"file {tmp_path}/rank"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True)
    until = time.monotonic() + 150
    while not all((tmp_path / f"rank{n}").exists() for n in range(2)) and time.monotonic() < until:
        time.sleep(0.1)
    if number is signal.SIGINT:
        os.killpg(process.pid, number)  # Ctrl-C in a terminal reaches the ranks too
    else:
        process.send_signal(number)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 128 + number and err.rstrip().endswith(f"deepseed: ended by {number.name}") and "Traceback" not in err, err


# nodes ------------------------------------------------------------------------------------------------------------------


def port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def test_two_nodes_by_hand(script: Path) -> None:
    at = port()
    command = [sys.executable, "-m", "deepseed", "--num_gpus", "1", "--num_nodes", "2", "--master_addr", "127.0.0.1", "--master_port", str(at), "--no_ssh"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    both = [subprocess.Popen([*command, "--node_rank", str(n), str(script), "ok"], stdout=subprocess.PIPE, text=True, env=env) for n in range(2)]
    ranks = seen("".join(process.communicate(timeout=90)[0] for process in both))
    assert [process.returncode for process in both] == [0, 0]
    assert [(r["RANK"], r["LOCAL_RANK"], r["WORLD_SIZE"], r["CROSS_RANK"], r["CROSS_SIZE"], r["MASTER_PORT"]) for r in ranks] == [(str(n), "0", "2", str(n), "2", str(at)) for n in range(2)]


def test_two_nodes_of_a_hostfile(script: Path, tmp_path: Path, ssh: dict[str, str]) -> None:
    done = launch("--hostfile", tmp_path / "hosts", "--master_port", port(), script, "ok", environment=ssh)
    assert done.returncode == 0, done.stderr
    ranks = seen(done.stdout)
    assert [(r["RANK"], r["WORLD_SIZE"], r["CROSS_RANK"], r["SAID"]) for r in ranks] == [("0", "2", "0", "a b"), ("1", "2", "1", "a b")]


@pytest.mark.turn
def test_a_node_that_fails_ends_the_others(script: Path, tmp_path: Path, ssh: dict[str, str]) -> None:
    done = launch("--hostfile", tmp_path / "hosts", "--master_port", port(), script, "exit", environment=ssh)
    assert done.returncode == 3, done.stderr
    assert "node localhost failed with exit code 3" in done.stderr and "rank 1" in done.stderr


TRAINING = """
import os, sys, torch, deepseed
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4)).double()
step = deepseed.compile(model, "zero3", optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2), loss_fn=lambda m, b: (m(b[0]) - b[1]).square().mean())
g = torch.Generator().manual_seed(1)
for _ in range(5):
    loss = step((torch.randn(8, 8, generator=g).double(), torch.randn(8, 4, generator=g).double()))
    os.write(1, f"LOSS {os.environ['RANK']} {float(loss)!r}\\n".encode())
"""


@pytest.mark.wide
def test_two_nodes_train_as_one(tmp_path: Path, ssh: dict[str, str]) -> None:
    path = tmp_path / "train.py"
    path.write_text(TRAINING)
    at, env = port(), {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "deepseed", "--num_gpus", "1", "--num_nodes", "2", "--master_addr", "127.0.0.1", "--master_port", str(at), "--no_ssh"]
    both = [subprocess.Popen([*command, "--node_rank", str(n), "--no_local_rank", str(path)], stdout=subprocess.PIPE, text=True, env=env) for n in range(2)]
    by_hand = "".join(process.communicate(timeout=120)[0] for process in both)
    one = launch("--num_gpus", 2, path).stdout
    by_ssh = launch("--hostfile", tmp_path / "hosts", "--master_port", port(), path, environment=ssh).stdout
    losses = [sorted(line.partition("LOSS ")[2] for line in said.splitlines() if "LOSS " in line) for said in (one, by_hand, by_ssh)]
    assert len(losses[0]) == 10 and losses[0] == losses[1] == losses[2]
