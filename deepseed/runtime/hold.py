"""One job to a folder of checkpoints: two would delete each other's.

The process that closes folders (rank 0) locks a file there until it ends, however it ends: the system keeps the lock, so a killed job leaves none behind.
Children that it forks are of the same job, and do not keep the lock when it is gone.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from deepseed.logs import warn
from deepseed.runtime.folder import CheckpointError

try:
    import fcntl
except ImportError:  # no such system call here
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
PATIENCE = 10.0  # seconds that a process which was killed may take to free its memory, and then the lock
_HELD: dict[tuple[int, int], int] = {}  # by device and number of the file, its descriptor
_UNLOCKED: set[int] = set()  # devices that know no locks: said once


def hold(dir: Path) -> None:
    """Lock the folder for this process, which may do so many times. Raises CheckpointError where another one has it."""
    path = dir / LOCK
    try:
        dir.mkdir(parents=True, exist_ok=True)
        if path.exists() and _number(os.stat(path)) in _HELD:
            return
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except PermissionError:  # another user's, in a folder of both
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # who cannot write there cannot save there: saving says so
        return
    try:
        if _locked(descriptor, path):
            _HELD[_number(os.fstat(descriptor))] = descriptor
            with suppress(OSError):  # a full disk, or another user's file: the lock is had, it only does not say whose
                os.truncate(descriptor, 0)
                os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}".encode(), 0)
            return
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)


def _locked(descriptor: int, path: Path) -> bool:
    """Whether the lock is had; False where there are none."""
    until = time.monotonic() + PATIENCE
    while fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                break
        if time.monotonic() >= until:
            who = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
            raise CheckpointError(
                f"{path.parent} is in use: {who} saves there, and two jobs would delete each other's checkpoints\n"
                "  fix: a folder of its own for each job, or end that one; Checkpoints(step, dir).load() without every= only reads, and step.load does"
            )
        time.sleep(0.05)
    if (device := os.fstat(descriptor).st_dev) not in _UNLOCKED:
        _UNLOCKED.add(device)
        warn(f"the file system of {path.parent} has no locks: take care that no second job saves there")
    return False


def _number(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _forked() -> None:
    """A child's copies would keep the lock beyond its parent's end."""
    for key, descriptor in _HELD.items():
        if descriptor >= 0:
            os.close(descriptor)
            _HELD[key] = -1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
