"""State in files, one a tensor and rank: memory-mapped, so that the host's memory holds what is in use and the system reads and writes the rest.

A file has its whole size before anything is written (a full disk is found when it is made), and no name from then on: nobody else can write, cut or remove it, and
the system frees it with the process, however that ends. What lasts is a checkpoint. Behind each step threads take a checksum of every file, beside whatever the process
does next; before the next one they are compared. Where the process itself has written a tensor since (a checkpoint, the user), which its version tells, the checksum
is taken anew.
"""

from __future__ import annotations

import os
import uuid
import zlib
from collections.abc import Callable, Collection, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from weakref import finalize

import torch
from torch import Tensor

THREADS = 4
Key = tuple[str, str]  # role, key


class DiskError(RuntimeError):
    """A file of offloaded state that cannot be made, or holds other values than were written: names what is in it."""


@dataclass
class _File:
    tensor: Tensor
    sum: Future[int] | None = None  # of what the latest step has left
    mark: Hashable = None  # the tensor's version then


class Disk:
    """One rank's files below ``folder``. ``roles``: what is stored there. Raises DiskError where there can be none."""

    def __init__(self, folder: str | os.PathLike[str], rank: int, roles: frozenset[str]) -> None:
        self.folder, self.roles = Path(folder), roles
        self._files: dict[Key, _File] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DiskError(f"{self.folder}: no folder for offloaded state can be made: {error.strerror}\n  fix: disk= a folder that this process may write") from error
        self._threads = ThreadPoolExecutor(THREADS, f"disk of rank {rank}")
        finalize(self, self._threads.shutdown, wait=True, cancel_futures=True)

    def tensor(self, key: Key, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor on a file, zeros at first; the one that there is, if there is one. Raises DiskError where it does not fit."""
        found = self._files.get(key)
        if found is not None and (found.tensor.shape, found.tensor.dtype) == (shape, dtype):
            return found.tensor
        numel = torch.Size(shape).numel()
        if not numel:
            return torch.empty(shape, dtype=dtype)
        try:
            descriptor = _reserved(self.folder, numel * dtype.itemsize)
        except OSError as error:
            raise DiskError(
                f"{self.folder}: {numel * dtype.itemsize} bytes of {key[0]} {key[1]!r} cannot be stored: {error.strerror}\n"
                "  fix: disk= a folder of one's own with room for the state of each rank, or leave params out of offload(..)"
            ) from error
        try:
            made = torch.from_file(f"/dev/fd/{descriptor}", shared=True, size=numel, dtype=dtype).view(shape)
        finally:
            os.close(descriptor)  # the mapping keeps the file
        self._files[key] = _File(made)
        return made

    def seal(self, mark: Callable[[Key], Hashable]) -> None:
        """Behind a step: start to take the checksums. ``mark``: of each tensor, another one once the process has written it elsewhere."""
        for key, file in self._files.items():
            file.sum, file.mark = self._threads.submit(_checksum, file.tensor), (file.tensor._version, mark(key))

    def check(self, mark: Callable[[Key], Hashable]) -> None:
        """Before a step: every file holds what the latest step has left, or the process itself has written since. Raises DiskError."""
        now: dict[Key, Future[int]] = {}
        for key, file in self._files.items():
            if file.sum is not None and file.mark == (file.tensor._version, mark(key)):
                file.sum.result()
                now[key] = self._threads.submit(_checksum, file.tensor)
        for key, found in now.items():
            file = self._files[key]
            assert file.sum is not None
            if found.result() != file.sum.result():
                raise DiskError(
                    f"the file of {key[0]} {key[1]!r} in {self.folder} is damaged: crc32 {file.sum.result():08x} was written, {found.result():08x} is there\n"
                    "  fix: load the last checkpoint (step.load)"
                )


def disk_of(folder: str, what: Collection[str], rank: int) -> Disk | None:
    """The files of a rank whose plan has ``offload(what, disk=folder)``; None where it names no folder."""
    roles = {"state": "optimizer", "param": "params"}
    return Disk(folder, rank, frozenset(role for role, word in roles.items() if word in what)) if folder else None


def _reserved(folder: Path, nbytes: int) -> int:
    """A descriptor of a file of ``nbytes`` zeros that has its blocks and no name. Raises OSError."""
    path = folder / f"deepseed-{uuid.uuid4().hex}.bin"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        path.unlink()
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, nbytes)
        else:
            for at in range(0, nbytes, 2**24):
                os.write(descriptor, bytes(min(2**24, nbytes - at)))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _checksum(t: Tensor) -> int:
    return zlib.crc32(t.detach().view(-1).view(torch.uint8).numpy().data)
