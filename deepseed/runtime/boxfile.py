"""A file of boxes, one behind the other, each as ``torch.save`` writes it: one pass over the bytes in either direction, with their checksums.

Written: what ``torch.save`` puts around the values depends on shape and dtype alone, and is made once for all tensors of one kind; the values go from where they
are to the system, piece by piece, and the crc32 is taken of each piece. Where others are training a thread does that which yields to them, and needs the interpreter only between two pieces.
Read in two passes: ``check_boxes`` compares each box's crc32 and writes nothing. ``read_boxes`` puts a box into its places piece by piece, straight into memory where
a piece lies there as it does in the file, else through a buffer that stays in the cache. A file that is another one by then, by number, size or times, is refused after it has been read; of a box that was
not checked before, the crc32 is taken from each piece when it has come. Several boxes are read at a time.
"""

from __future__ import annotations

import io
import os
import pickle
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from io import FileIO
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.utils import _create_file_view

from deepseed.runtime.box import Box, Ints, common, cut
from deepseed.runtime.crc import crc32, crc32_of
from deepseed.runtime.folder import CheckpointError, DamagedError

CHUNK = 2**20  # bytes of a piece
HEAD = 2**12  # bytes that what comes before a box's values has, at the most, where boxes are known again by it
THREADS = 4  # boxes that are read at a time
TURN = CHUNK  # bytes that are written and then summed: they are still in the cache

R = TypeVar("R")


def write_boxes(path: Path, items: Iterable[Tensor | bytes]) -> tuple[list[_StorageInfo], dict[str, Any]]:
    """Where each item lies, a tensor as ``torch.save`` has it; and ``{"bytes", "boxes": [[length, crc32], …]}`` of the file, which lasts then."""
    if threading.current_thread() is threading.main_thread():
        return _write(path, items)
    items = list(items)
    for item in items:
        if isinstance(item, Tensor):
            _around(tuple(item.shape), item.dtype)  # while this thread is as urgent as any
    with ThreadPoolExecutor(1, "bytes of a checkpoint", _yielding) as beside:
        return beside.submit(_write, path, items).result()


def _write(path: Path, items: Iterable[Tensor | bytes]) -> tuple[list[_StorageInfo], dict[str, Any]]:
    places: list[_StorageInfo] = []
    boxes: list[list[int]] = []
    at = 0
    with path.open("wb", buffering=0) as file:
        for item in items:
            crc, start = 0, at
            for part in _parts(item):
                for piece in (part[n : n + TURN] for n in range(0, len(part), TURN)):
                    left = piece
                    while left:
                        left = left[file.write(left) :]
                    crc = crc32(piece, crc)
                at += len(part)
            places.append(_StorageInfo(path.name, start, at - start))
            boxes.append([at - start, crc])
        os.fsync(file.fileno())
    return places, {"bytes": at, "boxes": boxes}


def _parts(item: Tensor | bytes) -> list[memoryview]:
    if isinstance(item, bytes):
        return [memoryview(item)]
    before, after = _around(tuple(item.shape), item.dtype)
    values = item.detach().cpu().contiguous().view(-1)
    return [memoryview(before), values.view(torch.uint8).numpy().data, memoryview(after)]


@lru_cache(maxsize=4096)
def _around(shape: Ints, dtype: torch.dtype) -> tuple[bytes, bytes]:
    """What ``torch.save`` writes before and after the values of a tensor, without a crc32 of these, which nothing reads: ours is of the whole box."""
    t = torch.empty(shape, dtype=dtype)  # never touched: it takes no memory
    out = _Around(t)
    writer = torch._C.PyTorchFileWriter(out, False, 64)  # type: ignore[call-overload]
    torch.serialization._save(t, writer, pickle, torch.serialization.DEFAULT_PROTOCOL, False)  # type: ignore[no-untyped-call]
    writer.write_end_of_file()
    return bytes(out.before), bytes(out.after)


class _Around:
    """A file to write to, which keeps all but the values."""

    def __init__(self, t: Tensor) -> None:
        self.t, self.before, self.after, self.passed = t, bytearray(), bytearray(), not t.numel()

    def write(self, data: Any) -> int:
        if not self.passed and len(data) == self.t.nbytes and np.frombuffer(data, np.uint8).__array_interface__["data"][0] == self.t.data_ptr():
            self.passed = True
        else:
            (self.after if self.passed else self.before).extend(data)
        return len(data)

    def flush(self) -> None:
        return None


def _yielding() -> None:
    """This thread takes what processors have left, where the system has priorities of threads."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


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


Place = tuple[str, int, int]  # of a box: file, offset, length


@dataclass(frozen=True)
class Part:
    """A rectangle of a box, and where it goes."""

    at: Ints
    sizes: Ints
    into: Tensor


@dataclass(frozen=True)
class Header:
    """Of the tensor in a box that was checked: its sizes and dtype, at which byte of the box its values begin, and which file it was (``_same``)."""

    sizes: Ints
    dtype: torch.dtype
    start: int
    file: Ints


Known = dict[int, list[tuple[bytes, Header]]]  # by a box's length, what it begins with up to its values: of boxes that begin alike one is parsed


def check_boxes(folder: Path, wanted: Mapping[Place, bool], sums: Sums) -> dict[Place, Header]:
    """Compare the checksums of these boxes; the headers of those that are to be read later (True). Raises DamagedError, CheckpointError."""
    out: dict[Place, Header] = {}
    known: Known = {}
    for place, (crc, header, wrong) in _each(folder, wanted, lambda file, place: _checked(file, place, known if wanted[place] else None, place[:2] in sums.boxes)):
        check(folder, place, crc, wrong, sums)
        if header is not None:
            out[place] = header
    return out


def read_boxes(folder: Path, wanted: Mapping[Place, Sequence[Part]], sums: Sums, checked: Mapping[Place, Header] = MappingProxyType({})) -> None:
    """Fill the parts of each wanted box. ``checked``: what ``check_boxes`` has given. Raises DamagedError, CheckpointError."""
    known: Known = {}
    for place, (crc, wrong) in _each(folder, wanted, lambda file, place: _read(file, place, wanted[place], checked.get(place), known)):
        if crc is not None:
            check(folder, place, crc, wrong, sums)


def _each(folder: Path, places: Collection[Place], do: Callable[[FileIO, Place], R]) -> Iterator[tuple[Place, R]]:
    """``do`` of each place and its file, several at a time, in the order of the files."""

    def one(place: Place) -> R:
        path = folder / place[0]
        try:
            with torch.no_grad(), path.open("rb", buffering=0) as file:
                return do(file, place)
        except OSError as error:
            raise DamagedError(f"{path} cannot be read: {error.strerror or error}\n  nothing was loaded\n  fix: load another checkpoint") from error

    todo = sorted(places)
    few = sum(length for _, _, length in todo) < CHUNK
    with ThreadPoolExecutor(1 if few else min(THREADS, len(todo)), "boxes") as threads:
        yield from zip(todo, threads.map(one, todo), strict=True)


def check(folder: Path, place: Place, found: int, wrong: str, sums: Sums) -> None:
    """Whether a box is what was written, by the crc32 of what was read, and ``wrong``, why that is no tensor. Raises DamagedError, CheckpointError."""
    name, offset, _ = place
    number, length, crc = sums.boxes.get((name, offset), (None, 0, None))
    if crc is not None and found != crc:
        raise DamagedError(
            f"{folder / name} is damaged: crc32 {crc:08x} was written, {found:08x} is there, in bytes {offset} to {offset + length}\n  nothing was loaded\n  fix: load another checkpoint"
        )
    if wrong:
        raise CheckpointError(f"{folder / name} has no tensor at byte {offset}: {wrong}")
    if number is not None:
        sums.checked |= 1 << number


def _checked(file: FileIO, place: Place, known: Known | None, summed: bool) -> tuple[int, Header | None, str]:
    """The crc32 of a box, where one is known; its header, where that is wanted (``known``), or why it is no tensor."""
    _, offset, length = place
    whole: Any = file
    if length <= CHUNK:  # one read, and no second one for the header
        whole, offset = _content(file, offset, length), 0
    header, wrong = _header(whole, offset, length, file, known) if known is not None else (None, "")
    crc = crc32_of(file, offset, length) if summed and whole is file else None
    if crc is None:
        whole.seek(offset)
        crc = _passed(whole, length, 0) if summed else 0
    return crc, header, wrong


def _content(file: FileIO, offset: int, length: int) -> io.BytesIO:
    file.seek(offset)
    whole = bytearray(length)
    _fill(file, memoryview(whole))
    return io.BytesIO(whole)


def _header(content: Any, offset: int, length: int, file: FileIO, known: Known) -> tuple[Header | None, str]:
    """Of the tensor that ``torch.save`` has written there; why there is none: where the box is damaged the checksum says so."""
    content.seek(offset)
    head = content.read(min(length, HEAD))
    for before, header in known.get(length, ()):
        if head.startswith(before):
            return replace(header, file=_same(file)), ""
    try:
        t = torch.load(_create_file_view(content, offset, length), map_location="meta", weights_only=True)  # type: ignore[arg-type]
        start = t.untyped_storage()._checkpoint_offset
        if not t.is_contiguous() or t.storage_offset() or start + t.nbytes > length:
            raise ValueError(f"a tensor of {list(t.shape)} with strides {list(t.stride())} from element {t.storage_offset()}")
    except OSError:
        raise
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
    header = Header(tuple(t.shape), t.dtype, start, _same(file))
    if start <= len(head):
        known.setdefault(length, []).append((head[:start], header))
    return header, ""


def _same(file: FileIO) -> Ints:
    """Another one once the file is replaced or written to."""
    now = os.fstat(file.fileno())
    return now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns


def _read(file: FileIO, place: Place, parts: Sequence[Part], checked: Header | None, known: Known) -> tuple[int | None, str]:
    """Fill the parts of one box. Of one that is not ``checked`` its crc32, and why it is no tensor, if it is not."""
    _, offset, length = place
    whole: Any = file
    if checked is None and length <= CHUNK:
        whole, offset = _content(file, offset, length), 0
    header, wrong = (checked, "") if checked is not None else _header(whole, offset, length, file, known)
    if header is None:
        whole.seek(offset)
        return _passed(whole, length, 0), wrong
    whole.seek(offset if checked is None else offset + header.start)
    crc, at, itemsize = _passed(whole, header.start, 0) if checked is None else 0, header.start, header.dtype.itemsize
    buffer = memoryview(b"")
    for piece in cut(Box((0,) * len(header.sizes), (0,) * len(header.sizes), header.sizes), itemsize, CHUNK):
        n = prod(piece.sizes) * itemsize
        there = _place(piece, parts, header.dtype)
        straight = there is not None
        if there is None:
            buffer = buffer if len(buffer) >= n else memoryview(bytearray(n))
            there = buffer[:n]
        _fill(whole, there)
        crc, at = crc32(there, crc) if checked is None else 0, at + n
        if not straight:
            values = torch.frombuffer(buffer, dtype=header.dtype, count=prod(piece.sizes)).view(piece.sizes)
            for part in parts:
                if (met := common(piece, part.at, part.sizes)) is not None:
                    _of(met, part.at, part.into).copy_(_of(met, piece.at, values))
    if checked is None:
        return _passed(whole, length - at, crc), ""
    if (now := _same(file)) != checked.file:
        raise DamagedError(f"{file.name} was changed while it was loaded: {_said(checked.file)} when it was checked, {_said(now)} when it was read")
    return None, ""


def _said(file: Ints) -> str:
    return f"file {file[1]} of {file[2]} bytes, written at {max(file[3:]) / 1e9:.3f} s"


def _of(met: tuple[Ints, Ints], start: Ints, values: Tensor) -> Tensor:
    """The view of a rectangle in values that begin at ``start``."""
    return Box((), tuple(a - b for a, b in zip(met[0], start, strict=True)), met[1]).of(values)


def _place(piece: Box, parts: Sequence[Part], dtype: torch.dtype) -> memoryview | None:
    """The memory that a whole piece goes to as it is, where that is one place."""
    if len(parts) != 1 or (met := common(piece, parts[0].at, parts[0].sizes)) is None or met[1] != piece.sizes:
        return None
    there = _of(met, parts[0].at, parts[0].into)
    return there.view(-1).view(torch.uint8).numpy().data if there.dtype == dtype and there.is_cpu and there.is_contiguous() else None


def _passed(file: Any, number: int, crc: int) -> int:
    """The crc32 after ``number`` bytes more."""
    buffer = memoryview(bytearray(min(number, CHUNK)))
    while number > 0:
        part = buffer[:number]
        _fill(file, part)
        crc = crc32(part, crc)
        number -= len(part)
    return crc


def _fill(file: Any, buffer: memoryview) -> None:
    at = 0
    while at < len(buffer):
        n = file.readinto(buffer[at:])
        if not n:
            raise DamagedError(f"{file.name} is torn: it ends {len(buffer) - at} bytes too early\n  nothing was loaded\n  fix: load another checkpoint")
        at += n


def text(folder: Path, place: _StorageInfo, sums: Sums) -> bytes:
    """The bytes of an item that is no tensor."""
    with (folder / place.relative_path).open("rb") as file:
        file.seek(place.offset)
        found = file.read(place.length)
    check(folder, (place.relative_path, place.offset, place.length), crc32(found), "", sums)
    return found
