"""A file of boxes, one behind the other, each as ``torch.save`` writes it: one pass over the bytes in either direction, with their checksums.

Written: sha256 of the file and crc32 of each box are taken while the system writes; by the thread that writes, piece by piece, where others are training.
Read: a box goes to its places piece by piece, straight into memory where a piece lies there as it does in the file, else through a buffer that stays in the cache; its
crc32 is taken from each piece when it has come, and compared in the end; what is not asked for of it is read for that only. Several boxes are read at a time.
A damaged box is found after it has been copied, so these places are memory that nothing uses yet.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.utils import _create_file_view

from deepseed.runtime.box import Box, Ints, common, cut
from deepseed.runtime.crc import crc32
from deepseed.runtime.folder import CheckpointError, DamagedError

CHUNK = 2**20  # bytes of a piece
THREADS = 4  # boxes that are read at a time
ALONE = 2**16  # fewer bytes are not worth another thread
TURN = 8 * CHUNK  # bytes that are written and summed by turns, where one thread does both


def write_boxes(path: Path, items: Iterable[Tensor | bytes]) -> tuple[list[_StorageInfo], dict[str, Any]]:
    """Where each item lies, a tensor as ``torch.save`` has it; and ``{"bytes", "sha256", "boxes": [[length, crc32], …]}`` of the file, which lasts then."""
    places: list[_StorageInfo] = []
    boxes: list[list[int]] = []
    waited_for = threading.current_thread() is threading.main_thread()  # another one must leave the cores to those who train
    with path.open("wb") as file, ThreadPoolExecutor(1, "checksums") as beside:
        out = _Summed(file, beside if waited_for else None)
        for item in items:
            start, out.crc = out.length, 0
            if isinstance(item, bytes):
                out.write(item)
            else:
                _save(_alone(item.detach().cpu().contiguous()), out)
            places.append(_StorageInfo(path.name, start, out.length - start))
            boxes.append([out.length - start, out.crc])
        file.flush()
        os.fsync(file.fileno())
    return places, {"bytes": out.length, "sha256": out.sha.hexdigest(), "boxes": boxes}


def _save(t: Tensor, out: _Summed) -> None:
    """As ``torch.save``, but without a crc32 of the values, which nothing reads: ours is of the whole box."""
    writer = torch._C.PyTorchFileWriter(out, False, 64)  # type: ignore[call-overload]
    torch.serialization._save(t, writer, pickle, torch.serialization.DEFAULT_PROTOCOL, False)  # type: ignore[no-untyped-call]
    writer.write_end_of_file()


def _alone(t: Tensor) -> Tensor:
    """A contiguous tensor on the same memory, whose storage is no larger."""
    storage, start = t.untyped_storage(), t.storage_offset() * t.dtype.itemsize
    return t if storage.nbytes() == t.nbytes else torch.empty(0, dtype=t.dtype).set_(storage[start : start + t.nbytes], 0, t.shape, t.stride())


class _Summed:
    """A file to write to. Large writes are summed by the thread ``beside``, where there is one."""

    def __init__(self, file: BinaryIO, beside: ThreadPoolExecutor | None) -> None:
        self.file, self.beside, self.sha, self.crc, self.length = file, beside, hashlib.sha256(), 0, 0

    def write(self, data: Any) -> int:
        if len(data) < ALONE or self.beside is None:
            for start in range(0, len(data), TURN):
                part = memoryview(data)[start : start + TURN]
                self.file.write(part)
                self._add(part)
        else:
            summed = self.beside.submit(self._sum, data)
            try:
                self.file.write(data)
            finally:
                summed.result()
        self.length += len(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()

    def _sum(self, data: Any) -> None:
        for start in range(0, len(data), CHUNK):
            self._add(memoryview(data)[start : start + CHUNK])

    def _add(self, part: memoryview) -> None:
        self.crc = crc32(part, self.crc)
        self.sha.update(part)


# reading ----------------------------------------------------------------------------------------------------------------


@dataclass
class Sums:
    """The boxes of a checkpoint's files as its manifest has them, and which of them (bit n: the n-th) this process has checked."""

    files: Mapping[str, Mapping[str, Any]]
    checked: int = 0
    boxes: dict[tuple[str, int], tuple[int, int, int]] = field(default_factory=dict)  # file, offset -> number, length, crc32

    def __post_init__(self) -> None:
        for name in sorted(self.files):
            at = 0
            for length, crc in self.files[name].get("boxes", ()):
                self.boxes[name, at] = len(self.boxes), length, crc
                at += length

    def left(self, checked: int) -> list[tuple[str, int]]:
        return [key for key, (n, _, _) in self.boxes.items() if not checked >> n & 1]


@dataclass(frozen=True)
class Part:
    """A rectangle of a box, and where it goes."""

    at: Ints
    sizes: Ints
    into: Tensor


def read_boxes(folder: Path, wanted: Iterable[tuple[str, int, int, Sequence[Part]]], sums: Sums) -> None:
    """Fill the parts of each wanted box: file, offset, length, parts; none to check it only. Raises DamagedError."""
    todo = sorted(wanted, key=lambda each: each[:2])
    few = sum(length for _, _, length, _ in todo) < CHUNK
    with torch.no_grad(), ThreadPoolExecutor(1 if few else min(THREADS, len(todo)), "boxes") as threads:
        for name, offset, found in threads.map(lambda each: (each[0], each[1], _read(folder / each[0], *each[1:])), todo):
            check(folder, name, offset, found, sums)


def check(folder: Path, name: str, offset: int, found: tuple[int, str], sums: Sums) -> None:
    """Of what was read (crc32, what was wrong with it) whether it is what was written. Raises DamagedError, CheckpointError."""
    number, length, crc = sums.boxes.get((name, offset), (None, 0, None))
    if crc is not None and found[0] != crc:
        raise DamagedError(
            f"{folder / name} is damaged: crc32 {crc:08x} was written, {found[0]:08x} is there, in bytes {offset} to {offset + length}\n  nothing was loaded\n  fix: load another checkpoint"
        )
    if found[1]:
        raise CheckpointError(f"{folder / name} has no tensor at byte {offset}: {found[1]}")
    if number is not None:
        sums.checked |= 1 << number


def _read(path: Path, offset: int, length: int, parts: Sequence[Part]) -> tuple[int, str]:
    """Fill the parts of one box; its crc32, and why it is no tensor, if it is not."""
    with torch.no_grad(), path.open("rb", buffering=0) as opened:
        file: Any = opened
        if length <= CHUNK:  # one read, and no second one for the tensor's shape
            opened.seek(offset)
            whole = bytearray(length)
            _fill(opened, memoryview(whole))
            file, offset = io.BytesIO(whole), 0
        buffer = memoryview(b"")
        start, itemsize, pieces, wrong = length, 1, [], ""
        if parts:
            try:
                held, start = _inside(file, offset, length)
                sizes, dtype, itemsize = tuple(held.shape), held.dtype, held.dtype.itemsize
                pieces = list(cut(Box((0,) * len(sizes), (0,) * len(sizes), sizes), itemsize, CHUNK))
            except Exception as error:  # where the box is damaged the checksum says so
                wrong = f"{type(error).__name__}: {error}"
        file.seek(offset)
        crc = _passed(file, start, 0)
        for piece in pieces:
            n = prod(piece.sizes) * itemsize
            place = _place(piece, parts, dtype)
            if place is None and len(buffer) < n:
                buffer = memoryview(bytearray(n))
            there = buffer[:n] if place is None else place
            _fill(file, there)
            crc = crc32(there, crc)
            start += n
            if place is not None:
                continue
            values = torch.frombuffer(buffer, dtype=dtype, count=prod(piece.sizes)).view(piece.sizes)
            for part in parts:
                if (met := common(piece, part.at, part.sizes)) is not None:
                    _of(met, part.at, part.into).copy_(_of(met, piece.at, values))
        return _passed(file, length - start, crc), wrong


def _of(met: tuple[Ints, Ints], start: Ints, values: Tensor) -> Tensor:
    """The view of a rectangle in values that begin at ``start``."""
    return Box((), tuple(a - b for a, b in zip(met[0], start, strict=True)), met[1]).of(values)


def _place(piece: Box, parts: Sequence[Part], dtype: torch.dtype) -> memoryview | None:
    """The memory that a whole piece goes to as it is, where that is one place."""
    if len(parts) != 1 or (met := common(piece, parts[0].at, parts[0].sizes)) is None or met[1] != piece.sizes:
        return None
    there = _of(met, parts[0].at, parts[0].into)
    return there.view(-1).view(torch.uint8).numpy().data if there.dtype == dtype and there.is_cpu and there.is_contiguous() else None


def _inside(file: BinaryIO, offset: int, length: int) -> tuple[Tensor, int]:
    """The tensor that ``torch.save`` has written there, without its values, and at which byte these begin."""
    t = torch.load(_create_file_view(file, offset, length), map_location="meta", weights_only=True)  # type: ignore[arg-type]
    start = t.untyped_storage()._checkpoint_offset
    if not t.is_contiguous() or t.storage_offset() or start + t.nbytes > length:
        raise ValueError(f"a tensor of {list(t.shape)} with strides {list(t.stride())} from element {t.storage_offset()}")
    return t, start


def _passed(file: BinaryIO, number: int, crc: int) -> int:
    """The crc32 after ``number`` bytes more."""
    buffer = memoryview(bytearray(min(number, CHUNK)))
    while number > 0:
        part = buffer[:number]
        _fill(file, part)
        crc = crc32(part, crc)
        number -= len(part)
    return crc


def _fill(file: BinaryIO, buffer: memoryview) -> None:
    at = 0
    while at < len(buffer):
        n = file.readinto(buffer[at:])  # type: ignore[attr-defined]
        if not n:
            raise DamagedError(f"{file.name} is torn: it ends {len(buffer) - at} bytes too early\n  nothing was loaded\n  fix: load another checkpoint")
        at += n


def text(folder: Path, place: _StorageInfo, sums: Sums) -> bytes:
    """The bytes of an item that is no tensor."""
    with (folder / place.relative_path).open("rb") as file:
        file.seek(place.offset)
        found = file.read(place.length)
    check(folder, place.relative_path, place.offset, (crc32(found), ""), sums)
    return found
