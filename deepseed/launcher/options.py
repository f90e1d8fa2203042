"""The flags of the launcher, DeepSpeed's names; what follows the script is the script's own."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from deepseed.launcher.errors import LaunchError

PORT = 29500
NOT_HERE = {  # flag -> what to do instead
    "--autotuning": "deepseed explain prices a plan without running it",
    "--elastic_training": "--max_restarts N --min_ranks M; a checkpoint goes on with any number of ranks",
    "--min_elastic_nodes": "--max_restarts N --min_ranks M",
    "--max_elastic_nodes": "start as many as there are; a checkpoint goes on with any number of ranks",
}
LAUNCHERS = ("ssh", "pdsh")
ON_LOSS = ("restart", "shrink")


@dataclass(frozen=True)
class Options:
    """``num_gpus``: ranks a node (on a machine without GPUs too); None: not said, as for the others."""

    script: str
    arguments: tuple[str, ...]
    num_gpus: int | None = None
    num_nodes: int | None = None
    node_rank: int | None = None
    master_addr: str | None = None
    master_port: int | None = None
    hostfile: Path | None = None
    include: str = ""
    exclude: str = ""
    module: bool = False
    no_python: bool = False
    no_local_rank: bool = False
    bind_cores: bool = False
    core_list: tuple[int, ...] = ()
    log_dir: Path | None = None
    launcher: str = "ssh"
    ssh_port: int | None = None
    venv_script: str = ""
    save_pid: bool = False
    force_multi: bool = False
    quiet: bool = False
    max_restarts: int = 0
    on_loss: str = "restart"
    min_ranks: int | None = None
    grace: float = 30.0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise LaunchError(f"{message}\n  fix: deepseed [flags] script.py [arguments]; deepseed --help lists the flags")


def parser() -> argparse.ArgumentParser:
    p = _Parser(prog="deepseed", allow_abbrev=False, description="Start a script on several ranks. Subcommands: deepseed COMMAND --help.")
    p.add_argument("--num_gpus", "--num_accelerators", type=int, metavar="N", help="ranks on each node; without GPUs they are gloo processes")
    p.add_argument("--num_nodes", type=int, metavar="N", help="of the hostfile, the first N")
    p.add_argument("--node_rank", type=int, metavar="I", help="start this node alone, by hand: the I-th of --num_nodes")
    p.add_argument("--no_ssh", action="store_true", help="each node is started by hand, with --node_rank")
    p.add_argument("--master_addr", metavar="HOST", help="of node 0")
    p.add_argument("--master_port", type=int, metavar="PORT", help=f"on node 0 (default {PORT}; on one node another one where that is taken)")
    p.add_argument("-H", "--hostfile", type=Path, metavar="FILE", help="lines such as: worker-0 slots=8")
    p.add_argument("-i", "--include", default="", metavar="HOST:SLOTS@HOST", help="only these, as worker-0@worker-1:0,2")
    p.add_argument("-e", "--exclude", default="", metavar="HOST:SLOTS@HOST", help="all but these")
    p.add_argument("--module", action="store_true", help="the script is a module, as of python -m")
    p.add_argument("--no_python", action="store_true", help="the script is a program of its own")
    p.add_argument("--no_local_rank", action="store_true", help="do not add --local_rank=I to the script's arguments")
    p.add_argument("--bind_cores_to_rank", action="store_true", help="divide the cores among the ranks of a node")
    p.add_argument("--bind_core_list", default="", metavar="0-3,8", help="divide these cores")
    p.add_argument("--enable_each_rank_log", type=Path, metavar="DIR", help="what each rank prints goes into a file of its own there")
    p.add_argument("--launcher", default="ssh", metavar="NAME", help="ssh or pdsh, to reach other nodes (default ssh)")
    p.add_argument("--ssh_port", type=int, metavar="PORT")
    p.add_argument("--venv_script", default="", metavar="FILE", help="sourced on other nodes before Python starts")
    p.add_argument("--max_restarts", "--max-restarts", type=int, default=0, metavar="N", help="where a rank is lost, start all again, up to N times; the script loads its last checkpoint")
    p.add_argument("--on_loss", "--on-loss", default="restart", metavar="WHAT", help="restart: with as many ranks (default); shrink: without the slot, or of several nodes the node, that was lost")
    p.add_argument("--min_ranks", "--min-ranks", type=int, metavar="M", help="leave out what was lost twice running, or a node that is gone, while M ranks are left")
    p.add_argument("--grace", type=float, default=30.0, metavar="SECONDS", help="that ranks have to save and end after SIGTERM (default 30)")
    p.add_argument("--save_pid", action="store_true", help="write this launcher's process number into a file")
    p.add_argument("--force_multi", action="store_true", help="go through ssh for one node too")
    p.add_argument("-q", "--quiet", action="store_true", help="say nothing but errors")
    p.add_argument("--log_level", default="info", metavar="LEVEL", help="warning and above is as -q")
    p.add_argument("script", help="and its own arguments, DeepSpeed's --deepspeed_config among them")
    p.add_argument("arguments", nargs=argparse.REMAINDER)
    return p


def parse(arguments: Sequence[str]) -> Options:
    """Raises LaunchError; ``--help`` prints and exits."""
    for word in arguments:
        if not word.startswith("-"):
            break
        if word.partition("=")[0] in NOT_HERE:
            raise LaunchError(f"{word} is not supported: {NOT_HERE[word.partition('=')[0]]}")
    a = parser().parse_args(list(arguments))
    for one, other, both in (
        (a.include, a.exclude, "--include and --exclude"), (a.module, a.no_python, "--module and --no_python"),
        (a.include or a.exclude, a.num_gpus or a.num_nodes, "--include or --exclude, and --num_gpus or --num_nodes"),
    ):  # fmt: skip
        if one and other:
            raise LaunchError(f"{both} are both given\n  fix: keep one of the two")
    for name in ("num_gpus", "num_nodes"):
        if getattr(a, name) is not None and getattr(a, name) < 1:
            raise LaunchError(f"--{name} {getattr(a, name)}: at least 1 is needed")
    if a.no_ssh and a.node_rank is None:
        raise LaunchError("--no_ssh: which node is this?\n  fix: --node_rank I, from 0 to --num_nodes less one")
    if a.node_rank is not None and not 0 <= a.node_rank < (a.num_nodes or 1 + a.node_rank):
        raise LaunchError(f"--node_rank {a.node_rank} of --num_nodes {a.num_nodes}\n  fix: 0 to {a.num_nodes - 1}")
    if a.on_loss not in ON_LOSS:
        raise LaunchError(f"--on_loss {a.on_loss}\n  fix: one of {', '.join(ON_LOSS)}")
    if a.max_restarts < 0 or a.grace < 0 or (a.min_ranks is not None and a.min_ranks < 1):
        raise LaunchError(f"--max_restarts {a.max_restarts}, --grace {a.grace:g}, --min_ranks {a.min_ranks}\n  fix: restarts and seconds from 0, ranks from 1")
    if not a.max_restarts and (a.on_loss != "restart" or a.min_ranks is not None):
        raise LaunchError("--on_loss and --min_ranks say how to restart, and --max_restarts is 0\n  fix: --max_restarts N")
    if a.max_restarts and a.node_rank is not None:
        raise LaunchError("--max_restarts with --node_rank: launchers that are started by hand cannot start each other's ranks\n  fix: --hostfile FILE, or torchrun --rdzv_backend c10d --max_restarts N on each node")
    if a.launcher.lower() not in LAUNCHERS:
        raise LaunchError(f"--launcher {a.launcher} is not supported\n  fix: ssh or pdsh; or start the script under srun, mpirun or torchrun as it is")
    bound = cores(a.bind_core_list)
    if not (a.module or a.no_python) and not Path(a.script).is_file():
        raise LaunchError(f"no file {a.script}")
    return Options(
        a.script, tuple(a.arguments), a.num_gpus, a.num_nodes, a.node_rank, a.master_addr, a.master_port, a.hostfile, a.include, a.exclude, a.module,
        a.no_python, a.no_local_rank, a.bind_cores_to_rank or bool(bound), bound, a.enable_each_rank_log, a.launcher.lower(),
        a.ssh_port, a.venv_script, a.save_pid, a.force_multi, a.quiet or a.log_level.lower() in ("warning", "error", "critical"),
        a.max_restarts, a.on_loss, a.min_ranks, a.grace,
    )  # fmt: skip


def cores(text: str) -> tuple[int, ...]:
    """
    >>> cores("1,3-5")
    (1, 3, 4, 5)
    """
    found: list[int] = []
    for word in filter(None, text.split(",")):
        m = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", word)
        if m is None or int(m[2] or m[1]) < int(m[1]):
            raise LaunchError(f"--bind_core_list {text}: {word!r} is no core\n  fix: numbers and ranges, as in 0-3,8")
        found += range(int(m[1]), int(m[2] or m[1]) + 1)
    if len(set(found)) < len(found):
        raise LaunchError(f"--bind_core_list {text} names a core twice")
    return tuple(found)
