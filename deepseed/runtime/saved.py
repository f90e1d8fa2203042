"""Stored tensors as files of torch.distributed.checkpoint: global tensors, written and read as boxes of them.

A rank's part of a tensor is a product of runs of consecutive indices, one list of runs a dimension (``local_indices``), so it is
a few boxes of the global tensor: that covers every layout, fused blocks, several axes and uneven parts. What several ranks hold is
written by one of them, the one with the least to write so far; every rank computes who writes what, without asking. A rank
reads the written boxes that meet its own. No tensor is ever put together, and the files name no mesh: any tool of
``torch.distributed.checkpoint`` reads them.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.distributed.checkpoint import metadata as metadata_records
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.serialization import _get_layout

from deepseed.ir.layout import REPLICATED, Layout, local_indices
from deepseed.ir.mesh import Mesh
from deepseed.runtime.box import LARGEST as LARGEST
from deepseed.runtime.box import Box as Box
from deepseed.runtime.box import Ints as Ints
from deepseed.runtime.box import common as common
from deepseed.runtime.box import cut as cut
from deepseed.runtime.boxfile import Header, Part, Place, Sums, check_boxes, read_boxes, text, write_boxes
from deepseed.runtime.folder import CheckpointError, writing
from deepseed.runtime.state import position


@dataclass(frozen=True)
class Entry:
    """One global tensor, and this process's parts of it, one a hosted rank: None where that rank is not at ``home``, the position on the
    pipeline whose ranks store it. ``own``: only rank 0 has it (whole)."""

    shape: Ints
    dtype: torch.dtype
    layout: Layout
    parts: Sequence[Tensor | None]
    own: bool = False
    home: int = 0

    @staticmethod
    def whole(t: Tensor, ranks: int = 1) -> Entry:
        return Entry(tuple(t.shape), t.dtype, REPLICATED, [t.detach()] * ranks, own=True)


def boxes(shape: Ints, layout: Layout, mesh: Mesh, coordinate: Mapping[str, int]) -> list[Box]:
    """The part at ``coordinate`` as boxes of the global tensor, in the order of its rows; none where it is empty."""
    where = tuple(coordinate.items())
    return [
        Box(tuple(r[0] for r in runs), tuple(r[1] for r in runs), tuple(r[2] for r in runs))
        for runs in product(*(_runs(size, dim, layout, mesh, where) for dim, size in enumerate(shape)))
    ]


@lru_cache(maxsize=4096)
def _runs(size: int, dim: int, layout: Layout, mesh: Mesh, coordinate: tuple[tuple[str, int], ...]) -> tuple[Ints, ...]:
    """Consecutive indices of a dimension that a rank holds: (first global index, first local index, length) each."""
    if not layout.splits(dim):
        return ((0, 0, size),) if size else ()
    out: list[list[int]] = []
    for here, index in enumerate(local_indices(size, dim, layout, mesh, dict(coordinate))):
        if out and index == out[-1][0] + out[-1][2]:
            out[-1][2] += 1
        else:
            out.append([index, here, 1])
    return tuple((a, b, n) for a, b, n in out)


def share_out(entries: Mapping[str, Entry], mesh: Mesh, largest: int = LARGEST) -> list[list[tuple[str, Box]]]:
    """Who writes what: for each rank the boxes it writes. Each element of each tensor is written once."""
    out: list[list[tuple[str, Box]]] = [[] for _ in range(mesh.ranks)]
    load = [0] * mesh.ranks
    coordinates = [mesh.coordinate(rank) for rank in range(mesh.ranks)]
    for name, entry in entries.items():
        if entry.layout.partials:
            raise CheckpointError(f"{name} is held as partial sums, which no checkpoint can hold")
        split = [axis for axis, _ in entry.layout.elements]
        holders: dict[Ints, list[int]] = {}
        for rank, c in enumerate(coordinates):
            if position(c) != entry.home and not entry.own:
                continue
            holders.setdefault(tuple(c[axis] for axis in split), []).append(rank)
        for ranks in holders.values():
            for box in boxes(entry.shape, entry.layout, mesh, coordinates[ranks[0]]):
                for piece in cut(box, entry.dtype.itemsize, largest):
                    writer = 0 if entry.own else min(ranks, key=lambda rank: load[rank])
                    out[writer].append((name, piece))
                    load[writer] += prod(piece.sizes) * entry.dtype.itemsize
    return out


@dataclass(frozen=True)
class Share:
    """A box of an entry that a rank writes, and its values: a view of the rank's part, or a copy."""

    name: str
    box: Box
    values: Tensor


def shares(entries: Mapping[str, Entry], mesh: Mesh, hosted: Sequence[int], largest: int = LARGEST) -> list[list[Share]]:
    """What each of the hosted ranks writes, as views."""
    every = share_out(entries, mesh, largest)
    out: list[list[Share]] = []
    for n, rank in enumerate(hosted):
        out.append([])
        for name, box in every[rank]:
            part = entries[name].parts[n]
            assert part is not None, f"{name} is written by rank {rank}, which does not store it"
            out[-1].append(Share(name, box, box.of(part).detach()))
    return out


def write(
    folder: Path, entries: Mapping[str, Entry], texts: Mapping[str, bytes], hosted: Sequence[int], held: Sequence[Sequence[Share]]
) -> tuple[list[WriteResult], dict[str, dict[str, Any]]]:
    """Write what the hosted ranks have to write, a file a rank: ``__3_0.distcp`` of rank 3; and each file's size and checksums. ``held``: their ``shares``."""
    out: list[WriteResult] = []
    files: dict[str, dict[str, Any]] = {}
    for rank, own in zip(hosted, held, strict=True):
        more = texts if rank == 0 else {}
        indices = [*map(MetadataIndex, more), *(MetadataIndex(share.name, share.box.at) for share in own)]
        if indices:
            path = folder / f"__{rank}_0.distcp"
            with writing(path):
                places, files[path.name] = write_boxes(path, [*more.values(), *(share.values for share in own)])
            out += [WriteResult(index, place.length, place) for index, place in zip(indices, places, strict=True)]
    return out, files


def write_metadata(
    folder: Path, entries: Mapping[str, Entry], texts: Mapping[str, bytes], mesh: Mesh, results: Sequence[WriteResult], aliases: Mapping[str, str],
    paths: Mapping[str, tuple[str, ...]], largest: int = LARGEST,
) -> None:  # fmt: skip
    """``.metadata``: which boxes there are and where. ``aliases``: further names of a tensor, which is stored once. ``paths``: where
    each name goes in a nested dict."""
    tensors: dict[str, Any] = {n: TensorStorageMetadata(TensorProperties(dtype=e.dtype), torch.Size(e.shape), []) for n, e in entries.items()}
    for share in share_out(entries, mesh, largest):
        for name, box in share:
            tensors[name].chunks.append(_chunk(box))
    found = list(results)
    for alias, name in aliases.items():
        tensors[alias] = tensors[name]
        found += [replace(r, index=replace(r.index, fqn=alias)) for r in results if r.index.fqn == name]
    tensors |= {name: BytesStorageMetadata() for name in texts}
    with writing(folder / ".metadata"):
        FileSystemWriter(folder, sync_files=True).finish(Metadata(tensors, planner_data=dict(paths)), [found])


@dataclass(frozen=True)
class Want:
    """A rank's part of a saved tensor, to be read into ``into`` (of the part's shape; its dtype is cast to)."""

    name: str
    shape: Ints
    layout: Layout
    coordinate: Mapping[str, int]
    into: Tensor

    def __post_init__(self) -> None:
        if any(size > 1 and stride == 0 for size, stride in zip(self.into.shape, self.into.stride(), strict=True)):
            raise CheckpointError(f"{self.name} is an expanded tensor: several of its elements are one in memory, and values cannot be read into it\n  fix: .contiguous() or .clone() where it is made")


class Reader(FileSystemReader):
    """The index of a folder, and the bytes of what it names."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        with path.open("rb") as file:
            found: Metadata = _Records(file, path).load()
        return found

    def raw(self, index: MetadataIndex) -> bytes:
        """The bytes of a written box or text."""
        where = self.storage_data[index]
        with (Path(self.path) / where.relative_path).open("rb") as file:
            file.seek(where.offset)
            return bytes(file.read(where.length))


_META, _FILES = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
_RECORDS = {
    **{(_META, name): getattr(metadata_records, name) for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )},
    (_FILES, "_StorageInfo"): _StorageInfo, ("torch", "Size"): torch.Size, ("torch.serialization", "_get_layout"): _get_layout,
}  # fmt: skip


class _Records(pickle.Unpickler):
    """Takes only what an index is made of, so that reading it runs nothing: these records, by their exact names, dtypes, and paths that reach no file."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        super().__init__(file)
        self.path = path
        self._place = type("_Place", (PurePosixPath,), {})

    def find_class(self, module: str, name: str) -> Any:
        found = _RECORDS.get((module, name))
        if found is None and module.partition(".")[0] == "pathlib" and re.fullmatch(r"(Pure)?(Posix|Windows)?Path", name):
            found = self._place
        if found is None and module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            found = dtype
        if found is None:
            raise CheckpointError(f"{self.path} names {module}.{name}, which is no record of an index\n  fix: load only checkpoints that you trust")
        return found

    def load(self) -> Any:
        """Raises CheckpointError, too, where the file changes a record's class, which a pickle can."""
        classes = [c for c in _RECORDS.values() if isinstance(c, type) and c is not torch.Size]
        before = [dict(vars(c)) for c in classes]
        try:
            return super().load()
        finally:
            changed = False
            for c, was in zip(classes, before, strict=True):
                for key in {k for k, v in vars(c).items() if was.get(k, self) is not v} - {"__doc__"}:
                    changed = True
                    setattr(c, key, was[key]) if key in was else delattr(c, key)
            if changed:
                raise CheckpointError(f"{self.path} would change the classes that read it: it was made to do harm, and was not read\n  fix: load only checkpoints that you trust")


class Reading:
    """Wanted parts of a folder's tensors, in two passes: ``check`` overwrites nothing, ``fill`` does. Nobody else is asked: every rank reads for itself the boxes
    that meet its parts, and compares their checksums where ``sums`` knows them."""

    def __init__(self, folder: Path, wants: Sequence[Want], mesh: Mesh, sums: Sums | None = None) -> None:
        self.folder, self.sums, self._wants = folder, sums or Sums({}), wants
        self._reader = Reader(folder)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, True)
        self._headers: Mapping[Place, Header] = {}
        self._parts: dict[Place, list[Part]] = {}
        for want in wants:
            for index, part in _parts(want, metadata, mesh):
                at = self._reader.storage_data[index]
                self._parts.setdefault((at.relative_path, at.offset, at.length), []).append(part)

    def check(self) -> None:
        self._headers = check_boxes(self.folder, dict.fromkeys(self._parts, True), self.sums)

    def fill(self) -> None:
        try:
            read_boxes(self.folder, self._parts, self.sums, self._headers)
        finally:
            increment_version([want.into for want in self._wants])  # of which a read into memory knows nothing

    def texts(self, names: Sequence[str]) -> dict[str, bytes]:
        return {name: text(self.folder, self._reader.storage_data[MetadataIndex(name)], self.sums) for name in names}


def read(folder: Path, wants: Sequence[Want], mesh: Mesh, texts: Sequence[str] = (), sums: Sums | None = None) -> dict[str, bytes]:
    """Fill the wanted parts, in one pass; the ``texts`` by name."""
    reading = Reading(folder, wants, mesh, sums)
    reading.fill()
    return reading.texts(texts)


def _parts(want: Want, metadata: Metadata, mesh: Mesh) -> Iterator[tuple[MetadataIndex, Part]]:
    """Which rectangles of which written boxes make up a wanted part."""
    saved = metadata.state_dict_metadata[want.name]
    if not isinstance(saved, TensorStorageMetadata) or tuple(saved.size) != want.shape:
        raise CheckpointError(f"{want.name} is {list(getattr(saved, 'size', ()))} in .metadata, {list(want.shape)} is wanted")
    found = 0
    for box in boxes(want.shape, want.layout, mesh, want.coordinate):
        for chunk in saved.chunks:
            if (met := common(box, tuple(chunk.offsets), tuple(chunk.sizes))) is not None:
                here = tuple(a - b + c for a, b, c in zip(met[0], box.at, box.local, strict=True))
                there = tuple(a - b for a, b in zip(met[0], chunk.offsets, strict=True))
                yield MetadataIndex(want.name, chunk.offsets), Part(there, met[1], Box((), here, met[1]).of(want.into))
                found += prod(met[1])
    if found != want.into.numel():
        raise CheckpointError(f"{want.name}: the checkpoint holds {found} of the {want.into.numel()} elements that are wanted of {list(want.shape)}")


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(box.at), torch.Size(box.sizes))
