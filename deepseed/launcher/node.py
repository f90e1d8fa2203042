"""The ranks of one node, by torch.distributed.run's agent: started together, watched, and ended together when one fails.

The exit code is that of the rank that failed first, its traceback the last thing printed.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from deepseed.launcher.hosts import Nodes
from deepseed.launcher.options import PORT, Options
from deepseed.launcher.rank import Settings, own_frames
from deepseed.logs import fail, say

GRACE = 10  # seconds between asking a rank to end and ending it


def run_node(o: Options, nodes: Nodes) -> int:
    """Start this node's ranks and wait for them; the exit code."""
    hosts = list(nodes)
    here = hosts[o.node_rank or 0]
    slots = nodes[here]
    address, port = o.master_addr or "127.0.0.1", o.master_port or PORT
    if len(hosts) == 1:
        port = free_port(port, o.quiet)
    settings = Settings(o.module, o.no_python, o.no_local_rank, o.bind_cores, o.core_list, str(o.log_dir or ""))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if _has_gpus():
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, slots))
    if o.save_pid:
        Path(f"deepseed-{os.getpid()}.pid").write_text(f"{os.getpid()}\n")
    if not o.quiet:
        ranks = sum(map(len, nodes.values()))
        say(f"{ranks} rank{'s' if ranks > 1 else ''} on {len(hosts)} node{'s' if len(hosts) > 1 else ''}, {address}:{port}" + (f"; each prints into {o.log_dir}" if o.log_dir else ""))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="deepseed-ranks-") as folder:
        os.environ["TORCHELASTIC_ERROR_FILE"] = ""
        config = LaunchConfig(
            min_nodes=len(hosts), max_nodes=len(hosts), nproc_per_node=len(slots), run_id="deepseed", max_restarts=0,
            rdzv_backend="static", rdzv_endpoint=f"{address}:{port}", rdzv_configs={"rank": o.node_rank or 0, "timeout": 900},
            logs_specs=DefaultLogsSpecs(log_dir=folder), **_grace(),
        )  # fmt: skip
        try:
            elastic_launch(config, sys.executable)("-u", "-m", "deepseed.launcher.rank", settings.text(), o.script, *o.arguments)
        except ChildFailedError as error:
            for failure in error.failures.values():  # each rank leads a process group: what the dead one has started ends too
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(failure.pid, signal.SIGKILL)
            return _failed(error.failures, o)
        except SignalException as error:
            say(f"ended by {signal.Signals(error.sigval).name}")
            return 128 + int(error.sigval)
    return 0


def _grace() -> Mapping[str, Any]:
    """Torch before 2.12 has no such setting and waits 30 seconds."""
    return {"shutdown_timeout": GRACE} if "shutdown_timeout" in LaunchConfig.__dataclass_fields__ else {}


def _has_gpus() -> bool:
    import torch

    return torch.cuda.is_available()


def _failed(failures: Mapping[int, ProcessFailure], o: Options) -> int:
    """Say which rank failed, its traceback last."""

    def order(item: tuple[int, ProcessFailure]) -> tuple[bool, bool, int]:
        _rank, failure = item
        return failure.exitcode == -signal.SIGTERM, "RankError" in _traceback(failure), failure.timestamp  # those were ended, or named another one

    rank, failure = min(failures.items(), key=order)
    code = failure.exitcode
    how = f"was killed by {failure.signal_name()}" if code < 0 else f"ended with exit code {code}"
    where = f", its output is in {o.log_dir}/rank_{rank}.log" if o.log_dir else ""
    traceback = _traceback(failure)
    fail(f"rank {rank} (local rank {failure.local_rank}, process {failure.pid}) {how}{where}: {' '.join([o.script, *o.arguments])}")
    if traceback:
        print(traceback.rstrip(), file=sys.stderr)
    return 128 - code if code < 0 else code


def _traceback(failure: ProcessFailure) -> str:
    said = failure.error_file_data.get("message") if isinstance(failure.error_file_data, dict) else None
    extra = said.get("extraInfo", {}) if isinstance(said, dict) else {}
    return own_frames(str(extra.get("py_callstack", "")))


def free_port(port: int, quiet: bool = False) -> int:
    """``port`` itself, or one that the system gives where it is taken."""
    for wanted in (port, 0):
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind(("", wanted))
            except OSError:
                continue
            found = int(s.getsockname()[1])
            if found != port and not quiet:
                say(f"port {port} is taken, {found} is used")
            return found
    return port
