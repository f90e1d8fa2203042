"""One rank before its script begins: which cores and which GPU it has, where it prints, what its arguments are.

    python -m deepseed.launcher.rank SETTINGS SCRIPT [arguments]

SETTINGS is JSON. Python's own: this process becomes the script, as ``python script.py`` would be; an exception is also written to the file in
which torchrun's agent looks for it.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import runpy
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

RESTART = "DEEPSEED_RESTART"  # how often the ranks were started again
_PARENT_DEATH_SIGNAL = 1
_FRAME = re.compile(r'^  File "([^"\n]*)", line .*\n(?:    .*\n)*', re.MULTILINE)


@dataclass(frozen=True)
class Settings:
    """``cores``: of the node, to be divided; ``log_dir``: "" prints to the terminal; ``launcher``: its process, which a rank does not outlive."""

    module: bool = False
    no_python: bool = False
    no_local_rank: bool = False
    bind_cores: bool = False
    cores: tuple[int, ...] = ()
    log_dir: str = ""
    launcher: int = 0

    def text(self) -> str:
        return json.dumps(asdict(self))


def main(words: Sequence[str]) -> None:
    given = json.loads(words[0])
    s = Settings(**{**given, "cores": tuple(given["cores"])})
    _end_with(s.launcher)
    script, arguments = words[1], list(words[2:])
    os.environ["TORCHELASTIC_RESTART_COUNT"] = os.environ[RESTART]
    local, ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    os.environ |= {"LOCAL_SIZE": str(ranks), "CROSS_RANK": os.environ["GROUP_RANK"], "CROSS_SIZE": os.environ["GROUP_WORLD_SIZE"]}
    if s.bind_cores:
        mine = share(s.cores or tuple(sorted(os.sched_getaffinity(0))), local, ranks)
        os.sched_setaffinity(0, mine)
        os.environ["OMP_NUM_THREADS"] = str(len(mine))
    if s.log_dir:
        _print_into(Path(s.log_dir) / f"rank_{os.environ['RANK']}.log")
    if not s.no_local_rank and not s.no_python:
        arguments = [f"--local_rank={local}", *arguments]
    if s.no_python:
        os.execvp(script, [script, *arguments])
    from torch.distributed.elastic.multiprocessing.errors import record

    sys.argv = [script, *arguments]
    if not s.module:
        sys.path[0] = str(Path(script).resolve().parent)
    try:
        record(lambda: runpy.run_module(script, run_name="__main__", alter_sys=True) if s.module else runpy.run_path(script, run_name="__main__"))()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if type(error).__name__ == "RankError":  # another rank's fault, who says where
            print(f"rank {os.environ['RANK']}: {' '.join(line.strip() for line in str(error).splitlines())}", file=sys.stderr, flush=True)
            sys.exit(1)
        print(own_frames("".join(traceback.format_exception(error))), end="", file=sys.stderr, flush=True)
        sys.exit(1)


def own_frames(text: str) -> str:
    """A traceback, with those of its causes, without what started the script.

    >>> print(own_frames('Traceback:\\n  File "<frozen runpy>", line 1, in run\\n  File "a.py", line 2, in f\\n    f()\\nValueError: b'))
    Traceback:
      File "a.py", line 2, in f
        f()
    ValueError: b
    """
    ours = ("<frozen runpy>", "deepseed/launcher/rank.py", "multiprocessing/errors/__init__.py")
    return _FRAME.sub(lambda m: "" if any(name in m[1] for name in ours) else m[0], text)


def share(cores: Sequence[int], rank: int, ranks: int) -> tuple[int, ...]:
    """The cores of one of ``ranks``; neighbours stay together. All of them share where there are too few.

    >>> share((0, 1, 2, 3, 8), 1, 2)
    (2, 3)
    """
    each = len(cores) // ranks
    return tuple(cores[rank * each : (rank + 1) * each]) if each else tuple(cores)


def _print_into(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | (os.O_APPEND if os.environ[RESTART] != "0" else os.O_TRUNC))
    sys.stdout.flush()
    for stream in (1, 2):
        os.dup2(file, stream)


def _end_with(launcher: int) -> None:
    """Have the kernel end this process where its launcher ends without a word: a job that is started again would meet it. (No thread, as deepseed.on_ranks has: a rank may become another program.)"""
    with suppress(OSError, AttributeError):  # Linux's own
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if launcher and os.getppid() != launcher:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
