"""Which ranks can read each other's memory, and how they come to know: helper of ``deepseed.runtime.distributed``.

The ranks of a group tell each other, through the group itself, where they are, where 16 random bytes lie in their memory, and at which socket they listen. Where all are on one host, and each has
read the others' bytes, they connect, and exchange as ``deepseed.runtime.attach`` has it; else all of them go on through gloo.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

from deepseed.logs import say
from deepseed.runtime.attach import Link, read

if TYPE_CHECKING:
    from deepseed.runtime.distributed import World

MOST = 64  # ranks of a group that is tried at all
PR_SET_PTRACER, ANYONE = 0x59616D61, ctypes.c_ulong(-1)


def attach(world: World, ranks: Sequence[int], group: ProcessGroup) -> Link | None:
    """The link of a group of ranks that can read each other's memory, else None; all of them call it at the same time, and get the same answer. ``world.rank`` is one of them."""
    if len(ranks) > MOST or len(ranks) == 1:
        return None
    me, n = ranks.index(world.rank), len(ranks)
    token = (ctypes.c_char * 16).from_buffer_copy(os.urandom(16))

    def told(mine: Any) -> list[Any]:
        found: list[Any] = [None] * n
        try:
            dist.all_gather_object(found, mine, group)
        except (RuntimeError, ValueError) as error:
            raise world.diagnosed(error, f"setup over ranks {', '.join(map(str, ranks))}") from error
        return found

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) if willing() else nullcontext() as door:
        if door is not None:
            _allow()
            door.bind(f"\0deepseed-{os.urandom(12).hex()}")
            door.listen(n)
        mine = _Rank(_host(), os.getpid(), ctypes.addressof(token), token.raw, door.getsockname()) if door is not None else None
        all_of_them = told(mine)
        if any(each is None or each.host != all_of_them[0].host for each in all_of_them):
            return None
        sockets, why = _open(all_of_them, me)
        reasons = [reason for reason in told(why) if reason]
        if reasons:
            if me == 0:
                say(f"ranks {', '.join(map(str, ranks))} are on one host, but cannot read each other's memory ({reasons[0]}): their exchanges go through gloo\n  fix: allow it (in a container --cap-add=SYS_PTRACE), or say DEEPSEED_CMA=0")
            for each in sockets:
                if each is not None:
                    each.close()
            return None
        assert door is not None
        for _ in range(me + 1, n):
            other, _ = door.accept()
            sockets[struct.unpack("<I", other.recv(4))[0]] = other
        told(None)  # until here each rank keeps its door, and what the others read there
    return Link(world, ranks, [each.pid for each in all_of_them], sockets)


@dataclass(frozen=True)
class _Rank:
    """What a rank tells of itself: its host, its process, where 16 bytes lie in its memory, which they are, and the address of its socket."""

    host: str
    pid: int
    at: int
    token: bytes
    door: bytes


def willing() -> bool:
    return sys.platform == "linux" and os.environ.get("DEEPSEED_CMA", "1") != "0"


def possible() -> bool:
    """Whether a process here may read the memory of another one of its own: one that is forked for it tries."""
    if not willing():
        return False
    token, seen = ctypes.create_string_buffer(b"here"), ctypes.create_string_buffer(4)
    _allow()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a process with threads: the child calls the kernel and is gone
        here, child = os.getpid(), os.fork()
    if child == 0:
        try:
            read(here, [(ctypes.addressof(token), ctypes.addressof(seen), 4)])
        finally:
            os._exit(0 if seen.raw == b"here" else 1)
    return os.waitpid(child, 0)[1] == 0


def _open(all_of_them: Sequence[_Rank], me: int) -> tuple[list[socket.socket | None], str]:
    """Connections to the ranks before this one, and why this one cannot read the memory of one of the others."""
    sockets: list[socket.socket | None] = [None] * len(all_of_them)
    try:
        for k, each in enumerate(all_of_them):
            if k != me:
                seen = (ctypes.c_char * 16)()
                read(each.pid, [(each.at, ctypes.addressof(seen), 16)])
                if seen.raw != each.token:
                    return sockets, f"process {each.pid} is another one here"
            if k < me:
                s = sockets[k] = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                s.connect(each.door)
                s.send(struct.pack("<I", me))
    except (OSError, AttributeError) as error:
        return sockets, str(error)
    return sockets, ""


def _allow() -> None:
    """Where the kernel lets only ancestors attach (Yama, scope 1), this process lets its siblings."""
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    if scope.exists() and scope.read_text().strip() == "1":
        ctypes.CDLL(None).prctl(PR_SET_PTRACER, ANYONE, 0, 0, 0)


def _host() -> str:
    """What tells hosts apart."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
