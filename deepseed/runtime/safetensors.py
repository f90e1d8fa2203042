"""The safetensors format, by parts: a header in JSON says where the bytes of each tensor lie, so that nobody needs a file whole.

    8 bytes, little endian    length of the header
    {"lm_head.weight": {"dtype": "BF16", "shape": [512, 64], "data_offsets": [0, 65536]}, ..., "__metadata__": {...}}
    bytes                     of each tensor, row-major, without gaps

A file is memory-mapped: what is copied of it is read from the disk, the rest is not. A new one is laid out and its room on the disk taken
before any value is there, then parts are written in any order. The format has no checksums.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseed.runtime.folder import CheckpointError
from deepseed.runtime.saved import Box, Ints

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PREFIX = 8  # bytes of the header's length
_MOST = 100_000_000  # bytes of a header: no more is legal


@dataclass(frozen=True)
class Stored:
    """A tensor in a file; ``at``: where its first byte is, from the start of the file."""

    path: Path
    dtype: torch.dtype
    shape: Ints
    at: int

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def part(self, file: Tensor, box: Box) -> Tensor:
        """A box of it, which is not empty, from the bytes of the mapped ``file``: a view, or a copy where the file does not align the dtype."""
        rows = self.shape[0] if self.shape else 1
        raw = file[self.at : self.at + self.bytes].view(rows, -1)
        first, count = (box.at[0], box.sizes[0]) if self.shape else (0, 1)
        own = raw[first : first + count]
        own = (own.clone() if own.storage_offset() % self.dtype.itemsize else own).view(self.dtype).view(count, *self.shape[1:])
        return own[(slice(None), *(slice(i, i + n) for i, n in zip(box.at[1:], box.sizes[1:], strict=True)))].view(box.sizes)


def stored(path: Path) -> dict[str, Stored]:
    """The tensors of a file by name. Raises CheckpointError where it is no safetensors file, or torn."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_PREFIX), "little")
        if size < _PREFIX or length > min(_MOST, size - _PREFIX):
            raise CheckpointError(f"{path} is no safetensors file, or torn: {size} bytes, of which the header would be {length}")
        text = file.read(length)
    try:
        entries: dict[str, Any] = json.loads(text)
        entries.pop("__metadata__", None)
        found = {n: Stored(path, DTYPES[e["dtype"]], tuple(map(int, e["shape"])), _PREFIX + length + int(e["data_offsets"][0])) for n, e in entries.items()}
        ends = {n: _PREFIX + length + int(e["data_offsets"][1]) for n, e in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path} has a damaged header: {type(error).__name__}: {error}") from error
    for name, t in found.items():
        if t.at + t.bytes != ends[name] or t.at < _PREFIX + length or min(t.shape, default=0) < 0:
            raise CheckpointError(f"{path} has a damaged header: {name} {list(t.shape)} of {t.dtype.itemsize} bytes an element is said to lie at {t.at}:{ends[name]}")
    said = max(ends.values(), default=_PREFIX + length)
    if said != size:
        raise CheckpointError(f"{path} is torn: its header tells of {said} bytes, {size} are there")
    return found


def mapped(path: Path, write: bool = False) -> Tensor:
    """The bytes of a file, u8[size], on the file's own pages; ``write``: what is written there goes to the file."""
    return torch.from_file(str(path), shared=write, size=path.stat().st_size, dtype=torch.uint8)


def layout(path: Path, tensors: Mapping[str, tuple[torch.dtype, Ints]]) -> tuple[bytes, dict[str, Stored]]:
    """The first bytes of a file of these tensors, and where each lies. Raises CheckpointError for a dtype that the format lacks."""
    entries: dict[str, Any] = {}
    at = 0
    for name in sorted(tensors, key=lambda n: -tensors[n][0].itemsize):  # so that each is aligned, since a header is
        dtype, shape = tensors[name]
        if dtype not in _NAMES:
            raise CheckpointError(f"{name} is {str(dtype).removeprefix('torch.')}, which safetensors cannot hold\n  fix: step.save(dir) holds every dtype")
        end = at + prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _PREFIX)
    start = _PREFIX + len(text)
    found = {name: Stored(path, *tensors[name], start + e["data_offsets"][0]) for name, e in entries.items()}
    return len(text).to_bytes(_PREFIX, "little") + text, found


def make(path: Path, tensors: Mapping[str, tuple[torch.dtype, Ints]]) -> None:
    """Make the file of ``layout``, its tensors all zeros. Raises OSError where the disk has no room."""
    head, found = layout(path, tensors)
    size = len(head) + sum(t.bytes for t in found.values())
    with path.open("wb") as file:
        file.write(head)
        file.flush()
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk fails here, not in a page of the map
        file.truncate(size)


def sync(path: Path) -> None:
    """Make what was written last."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
