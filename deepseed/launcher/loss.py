"""A lost rank: what is said of it, whether another start can help, and with which slots."""

from __future__ import annotations

import re
import signal
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from deepseed.launcher.hosts import Nodes
from deepseed.launcher.options import Options
from deepseed.launcher.rank import own_frames

USAGE = 2  # exit code of a mistake in arguments
UNREACHABLE = 255  # exit code of ssh where it has lost the other side
_RECURS = re.compile(r"^(?:deepseed\.[\w.]+\.(?:PlanError|ConfigError|CompileError|CaptureError|PassError|MeshError|AgreementError)|SyntaxError|IndentationError|ModuleNotFoundError|NameError)\b", re.MULTILINE)
_CULPRIT = re.compile(r"^(?:\w+\.)*RankError: rank (\d+)", re.MULTILINE)


@dataclass(frozen=True)
class Loss:
    """``rank``: the one that was lost; it may not be the one that ended first. ``code``: of the launcher."""

    rank: int
    code: int
    said: str
    recurs: bool
    told: bool = False  # ended by a SIGTERM that is not the launcher's, for which it did not listen


def loss_of(failures: Mapping[int, ProcessFailure], ended: Collection[int], o: Options) -> Loss:
    """Of the ranks that failed the one that was lost; ``ended``: local ranks that were ended because of it."""

    def order(item: tuple[int, ProcessFailure]) -> tuple[bool, bool, int]:
        _rank, failure = item
        return failure.local_rank in ended, "RankError" in _traceback(failure), failure.timestamp  # those named another one

    rank, failure = min(failures.items(), key=order)
    code, traceback = failure.exitcode, _traceback(failure)
    how = f"was killed by {failure.signal_name()}" if code < 0 else f"ended with exit code {code}"
    where = f", its output is in {o.log_dir}/rank_{rank}.log" if o.log_dir else ""
    said = f"rank {rank} (local rank {failure.local_rank}, process {failure.pid}) {how}{where}: {' '.join([o.script, *o.arguments])}"
    named = _CULPRIT.findall(traceback)
    last = traceback.rstrip().rpartition("\nTraceback (most recent call last):\n")[2]
    return Loss(int(named[-1]) if named else rank, 128 - code if code < 0 else code, "\n".join(filter(None, [said, traceback.rstrip()])), code == USAGE or bool(_RECURS.search(last)), code == -signal.SIGTERM and failure.local_rank not in ended)


def _traceback(failure: ProcessFailure) -> str:
    said = failure.error_file_data.get("message") if isinstance(failure.error_file_data, dict) else None
    extra = said.get("extraInfo", {}) if isinstance(said, dict) else {}
    return own_frames(str(extra.get("py_callstack", "")))


def interrupted(code: int) -> bool:
    """Whether a launcher has this exit code because somebody asked it to stop."""
    return code in (128 + signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGHUP)


def smaller(nodes: Nodes, host: str, slot: int | None, o: Options, again: bool) -> Nodes:
    """The slots of the next start: without the lost one (of several nodes, without its node; ``slot`` None: the node itself) where the flags say so
    and ``--min_ranks`` are left, else the same. ``again``: it was also the one that was lost before.

    >>> o = Options("x.py", (), on_loss="shrink", min_ranks=2)
    >>> smaller({"localhost": (0, 1, 2)}, "localhost", 1, o, False), smaller({"localhost": (0, 1)}, "localhost", 1, o, False)
    ({'localhost': (0, 2)}, {'localhost': (0, 1)})
    """
    if o.on_loss != "shrink" and (o.min_ranks is None or not (again or slot is None)):
        return nodes
    fewer = {name: slots for name, slots in nodes.items() if name != host} if len(nodes) > 1 else {name: tuple(n for n in slots if n != slot) for name, slots in nodes.items()}
    return fewer if ranks_of(fewer) >= (o.min_ranks or 1) else nodes


def ranks_of(nodes: Nodes) -> int:
    return sum(map(len, nodes.values()))


def restarting(number: int, o: Options, before: Nodes, now: Nodes, left_out: str) -> str:
    """What is said before a restart.

    >>> restarting(1, Options("x.py", (), max_restarts=3), {"localhost": (0, 1)}, {"localhost": (0,)}, "slot 1 of localhost")
    'restart 1 of 3, with 1 rank: slot 1 of localhost is left out'
    """
    ranks = ranks_of(now)
    return f"restart {number} of {o.max_restarts}, with {ranks} rank{'s' if ranks > 1 else ''}" + (f": {left_out} is left out" if ranks < ranks_of(before) else "")
