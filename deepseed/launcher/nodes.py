"""One launcher on each node, over ssh or pdsh; when one fails the others are ended, and all may be started again."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from deepseed.launcher.errors import LaunchError
from deepseed.launcher.hosts import Nodes
from deepseed.launcher.loss import UNREACHABLE, USAGE, interrupted, restarting, smaller
from deepseed.launcher.node import LOST, STOP, TOLD
from deepseed.launcher.options import PORT, Options
from deepseed.launcher.rank import RESTART
from deepseed.logs import fail, say

EXPORTED = ("NCCL", "GLOO", "PYTHON", "UCX", "TORCH", "OMP", "DEEPSEED", "LD_LIBRARY_PATH", "PATH", "CUDA_HOME", "HF_")  # beginnings of names
ENVIRONMENT = ".deepspeed_env"  # a file of NAME=VALUE lines, here or at home
GRACE = 20.0  # seconds that the other nodes have to end


def run_nodes(o: Options, nodes: Nodes) -> int:
    """Start a launcher on each node and wait; the exit code of the first that failed. A lost rank or node: all are started again."""
    restart, before, now = 0, "", nodes
    while True:
        failed, code = _run(o, now, restart, next(iter(nodes)))
        if failed is None or interrupted(code) or code == USAGE or restart == o.max_restarts:
            return code
        fewer = smaller(now, failed, None if code == UNREACHABLE else 0, o, failed == before)
        restart += 1
        say(restarting(restart, o, now, fewer, f"node {failed}"))
        now, before = fewer, failed


def _run(o: Options, nodes: Nodes, restart: int, first: str) -> tuple[str | None, int]:
    """One start: the node that failed first, if any did, and the exit code. ``first``: the node of which --master_addr speaks."""
    hosts = list(nodes)
    address = o.master_addr if o.master_addr and hosts[0] == first else hosts[0]
    port = (o.master_port or PORT) + restart  # ranks of the start before that are still about meet nobody there
    stdin = subprocess.PIPE if o.launcher == "ssh" else subprocess.DEVNULL
    running = {host: subprocess.Popen([*reach(o, host), command(o, nodes, n, address, port, restart)], stdin=stdin) for n, host in enumerate(hosts)}
    if not o.quiet:
        say(f"{len(hosts)} nodes by {o.launcher}: {', '.join(hosts)}; {address}:{port}")
    failed: tuple[str, int] | None = None
    previous = signal.signal(signal.SIGTERM, _stopped)
    try:
        while running_now := [host for host, process in running.items() if process.poll() is None]:
            failed = failed or _failed(running)
            if failed is not None:
                _end([running[host] for host in running_now], LOST, GRACE)
            time.sleep(0.1)
    except KeyboardInterrupt:
        _end(list(running.values()), LOST, GRACE)
        say("ended by SIGINT")
        return None, 128 + signal.SIGINT
    except _Stopped:
        _end(list(running.values()), STOP, o.grace + GRACE)
        say("ended by SIGTERM")
        return None, 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, previous)
    failed = failed or _failed(running)
    if failed is None:
        return None, 0
    fail(f"node {failed[0]} failed with exit code {failed[1]}; the other nodes were ended")
    return failed


class _Stopped(Exception):
    """This launcher was told to stop."""


def _stopped(number: int, frame: object) -> None:
    raise _Stopped


def _failed(running: dict[str, subprocess.Popen[bytes]]) -> tuple[str, int] | None:
    for host, process in running.items():
        if (code := process.poll()) not in (None, 0):
            return host, 128 - code if code < 0 else code
    return None


def _end(processes: Sequence[subprocess.Popen[bytes]], word: str, grace: float) -> None:
    """Say ``word`` to the nodes' launchers, through ssh; where one does not hear it, end what reaches it."""
    for process in processes:
        if process.poll() is None and process.stdin is not None:
            with suppress(OSError):
                process.stdin.write(f"{word}\n".encode())
                process.stdin.flush()
        elif process.poll() is None:
            process.send_signal(signal.SIGTERM)
    until = time.monotonic() + grace
    for process in processes:
        try:
            process.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def reach(o: Options, host: str) -> list[str]:
    """The words before the command that runs on ``host``."""
    if o.launcher == "pdsh":
        return ["pdsh", "-S", "-f", "1024", "-w", host]
    port = ["-p", str(o.ssh_port)] if o.ssh_port else []
    return ["ssh", "-tt", "-o", "BatchMode=yes", "-o", "PasswordAuthentication=no", *port, host]


def command(o: Options, nodes: Nodes, number: int, address: str, port: int, restart: int = 0) -> str:
    """What the launcher of node ``number`` is called with, as a line of shell."""
    slots = list(nodes.values())[number]
    counts = {len(each) for each in nodes.values()}
    if len(counts) > 1:
        raise LaunchError(f"nodes of {' and '.join(map(str, sorted(counts)))} slots\n  fix: --num_gpus {min(counts)}, or --include as many slots of each")
    words = [sys.executable, "-m", "deepseed.launcher", f"--num_nodes={len(nodes)}", f"--node_rank={number}", f"--num_gpus={len(slots)}", f"--master_addr={address}", f"--master_port={port}", f"--grace={o.grace:g}"]
    for flag, on in (("--module", o.module), ("--no_python", o.no_python), ("--no_local_rank", o.no_local_rank), ("--bind_cores_to_rank", o.bind_cores), ("--quiet", o.quiet)):
        words += [flag] if on else []
    words += [f"--bind_core_list={','.join(map(str, o.core_list))}"] if o.core_list else []
    words += [f"--enable_each_rank_log={o.log_dir}"] if o.log_dir else []
    exports = {**_said(), "CUDA_VISIBLE_DEVICES": ",".join(map(str, slots)), RESTART: str(restart), **({TOLD: "1"} if o.launcher == "ssh" else {})}
    lines = [f"cd {shlex.quote(os.getcwd())}", *(f"export {name}={shlex.quote(value)}" for name, value in exports.items())]
    lines += [f"source {shlex.quote(o.venv_script)}"] if o.venv_script else []
    return "; ".join([*lines, "exec " + shlex.join([*words, o.script, *o.arguments])])


def _said() -> dict[str, str]:
    """What other nodes are told of this one's environment, and of the file."""
    found = {name: value for name, value in os.environ.items() if name.startswith(EXPORTED)}
    for folder in (Path.home(), Path.cwd()):
        file = folder / ENVIRONMENT
        if file.is_file():
            for line in file.read_text().splitlines():
                name, equals, value = line.strip().partition("=")
                if equals and not name.startswith("#"):
                    found[name] = value
    return found
