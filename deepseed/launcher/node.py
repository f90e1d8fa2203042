"""The ranks of one node, by torch.distributed's agent: started together, watched, and ended together when one fails; and started again, as often as
``--max_restarts`` says. Each start is an agent of its own with a store of its own: nothing of the one before is in it.

The exit code is that of the rank that failed first, its traceback the last thing printed.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path

from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from deepseed.launcher.agent import PREEMPTED, Agent
from deepseed.launcher.hosts import Nodes
from deepseed.launcher.loss import Loss, loss_of, ranks_of, restarting, smaller
from deepseed.launcher.options import PORT, Options
from deepseed.launcher.rank import RESTART, Settings
from deepseed.logs import fail, say

LOST = "lost"  # what the launcher of all nodes writes to that of one: another node has lost a rank
STOP = "stop"  # or: it was told to stop
TOLD = "DEEPSEED_TOLD"  # set where such a launcher speaks on the standard input


def run_node(o: Options, nodes: Nodes) -> int:
    """Start this node's ranks and wait for them; the exit code."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if o.save_pid:
        Path(f"deepseed-{os.getpid()}.pid").write_text(f"{os.getpid()}\n")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    heard: list[signal.Signals] = []
    lost, now = threading.Event(), nodes
    if os.environ.pop(TOLD, ""):
        _listen(lost)
    restart, first, before = 0, int(os.environ.get(RESTART, "0")), -1
    while True:
        os.environ[RESTART] = str(first + restart)
        found = _start(o, now, restart > 0, heard, lost)
        if isinstance(found, int):
            return found
        fail(found.said)
        host = list(now)[o.node_rank or 0]
        if restart == o.max_restarts or found.recurs or found.told:
            if (found.recurs or found.told) and o.max_restarts:
                say(f"not restarted: rank {found.rank} was told to stop, before its script asked for the first time" if found.told else "not restarted: it would end in the same way")
            return found.code
        slot = now[host][found.rank] if found.rank < len(now[host]) else -1
        fewer = smaller(now, host, slot, o, slot == before)
        restart += 1
        say(restarting(restart, o, now, fewer, f"slot {slot} of {host}"))
        now, before = fewer, slot


def _start(o: Options, nodes: Nodes, again: bool, heard: list[signal.Signals], lost: threading.Event) -> int | Loss:
    """One start of the ranks: the exit code, or the rank that was lost."""
    hosts = list(nodes)
    slots = nodes[hosts[o.node_rank or 0]]
    address, port = o.master_addr or "127.0.0.1", o.master_port or PORT
    if len(hosts) == 1:
        port = free_port(port, o.quiet or again)
    if _has_gpus():
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, slots))
    if not o.quiet and not again:
        ranks = ranks_of(nodes)
        say(f"{ranks} rank{'s' if ranks > 1 else ''} on {len(hosts)} node{'s' if len(hosts) > 1 else ''}, {address}:{port}" + (f"; each prints into {o.log_dir}" if o.log_dir else ""))
    settings = Settings(o.module, o.no_python, o.no_local_rank, o.bind_cores, o.core_list, str(o.log_dir or ""), os.getpid())
    os.environ["TORCHELASTIC_ERROR_FILE"] = ""
    with tempfile.TemporaryDirectory(prefix="deepseed-ranks-") as folder:
        meeting = RendezvousParameters("static", f"{address}:{port}", "deepseed", len(hosts), len(hosts), rank=o.node_rank or 0, timeout=900)
        spec = WorkerSpec(
            "default_role", len(slots), get_rendezvous_handler(meeting), entrypoint=sys.executable, args=("-u", "-m", "deepseed.launcher.rank", settings.text(), o.script, *o.arguments),
            max_restarts=0, monitor_interval=0.1, master_addr=address, master_port=port,
        )  # fmt: skip
        agent = Agent(spec, DefaultLogsSpecs(log_dir=folder), o.grace, heard, lost, groups=o.no_python)
        try:
            failures = agent.run().failures
        except SignalException as error:
            say(f"ended by {signal.Signals(error.sigval).name}")
            return 128 + int(error.sigval)
        if heard:
            late = ", ".join(str(rank) for rank, failure in failures.items() if failure.local_rank in agent.overdue)
            saved = failures and all(failure.exitcode == PREEMPTED for failure in failures.values())
            how = f": rank {late} was still there after {o.grace:.0f} s (--grace)" if late else ": all ranks had saved" if saved else ""
            say(f"ended by {heard[0].name}{how}")
            return 128 + int(heard[0])
        if not failures:
            return 0
        if lost.is_set() and all(failure.local_rank in agent.ended for failure in failures.values()):
            return 128 + signal.SIGTERM
        if all(failure.exitcode == PREEMPTED for failure in failures.values()):
            say("a rank was told to stop: all ranks had saved")
            return PREEMPTED
        return loss_of(failures, agent.ended, o)


def _listen(lost: threading.Event) -> None:
    """Hear what the launcher of all nodes says to this one's, on the standard input, of which ranks have nothing. Where it is gone the job is lost."""
    file, nothing = os.dup(0), os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)

    def hear() -> None:
        with os.fdopen(file) as words:
            for word in words:
                if word.strip() == STOP:
                    os.kill(os.getpid(), signal.SIGTERM)
                elif word.strip() == LOST:
                    break
        lost.set()

    threading.Thread(target=hear, daemon=True).start()


def _has_gpus() -> bool:
    import torch

    return torch.cuda.is_available()


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
