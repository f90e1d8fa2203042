"""One launcher on each node, over ssh or pdsh; when one fails the others are ended."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from deepseed.launcher.errors import LaunchError
from deepseed.launcher.hosts import Nodes
from deepseed.launcher.options import PORT, Options
from deepseed.logs import fail, say

EXPORTED = ("NCCL", "GLOO", "PYTHON", "UCX", "TORCH", "OMP", "DEEPSEED", "LD_LIBRARY_PATH", "PATH", "CUDA_HOME", "HF_")  # beginnings of names
ENVIRONMENT = ".deepspeed_env"  # a file of NAME=VALUE lines, here or at home
GRACE = 20.0  # seconds that the other nodes have to end


def run_nodes(o: Options, nodes: Nodes) -> int:
    """Start a launcher on each node and wait; the exit code of the first that failed."""
    hosts = list(nodes)
    address, port = o.master_addr or hosts[0], o.master_port or PORT
    running = {host: subprocess.Popen([*reach(o, host), command(o, nodes, n, address, port)], stdin=subprocess.DEVNULL) for n, host in enumerate(hosts)}
    if not o.quiet:
        say(f"{len(hosts)} nodes by {o.launcher}: {', '.join(hosts)}; {address}:{port}")
    failed: tuple[str, int] | None = None
    try:
        while running_now := [host for host, process in running.items() if process.poll() is None]:
            failed = failed or _failed(running)
            if failed is not None:
                _end([running[host] for host in running_now])
            time.sleep(0.1)
    except KeyboardInterrupt:
        _end(list(running.values()))
        say("ended by SIGINT")
        return 128 + signal.SIGINT
    failed = failed or _failed(running)
    if failed is None:
        return 0
    fail(f"node {failed[0]} failed with exit code {failed[1]}; the other nodes were ended")
    return failed[1]


def _failed(running: dict[str, subprocess.Popen[bytes]]) -> tuple[str, int] | None:
    for host, process in running.items():
        if (code := process.poll()) not in (None, 0):
            return host, 128 - code if code < 0 else code
    return None


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    until = time.monotonic() + GRACE
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


def command(o: Options, nodes: Nodes, number: int, address: str, port: int) -> str:
    """What the launcher of node ``number`` is called with, as a line of shell."""
    slots = list(nodes.values())[number]
    counts = {len(each) for each in nodes.values()}
    if len(counts) > 1:
        raise LaunchError(f"nodes of {' and '.join(map(str, sorted(counts)))} slots\n  fix: --num_gpus {min(counts)}, or --include as many slots of each")
    words = [sys.executable, "-m", "deepseed.launcher", f"--num_nodes={len(nodes)}", f"--node_rank={number}", f"--num_gpus={len(slots)}", f"--master_addr={address}", f"--master_port={port}"]
    for flag, on in (("--module", o.module), ("--no_python", o.no_python), ("--no_local_rank", o.no_local_rank), ("--bind_cores_to_rank", o.bind_cores), ("--quiet", o.quiet)):
        words += [flag] if on else []
    words += [f"--bind_core_list={','.join(map(str, o.core_list))}"] if o.core_list else []
    words += [f"--enable_each_rank_log={o.log_dir}"] if o.log_dir else []
    exports = {**_said(), "CUDA_VISIBLE_DEVICES": ",".join(map(str, slots))}
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
