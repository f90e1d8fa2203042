"""Stored tensors as files, by torch.distributed.checkpoint: global tensors, written and read as boxes of them.

A rank's part of a tensor is a product of runs of consecutive indices, one list of runs a dimension (``local_indices``), so it is
a few boxes of the global tensor: that covers every layout, fused blocks, several axes and uneven parts. What several ranks hold is
written by one of them, the one with the least to write so far; every rank computes who writes what, without asking. A rank
reads the written boxes that meet its own. No tensor is ever put together, and the files name no mesh: any tool of
``torch.distributed.checkpoint`` reads them.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from deepseed.ir.layout import REPLICATED, Layout, local_indices
from deepseed.ir.mesh import Mesh
from deepseed.runtime.folder import CheckpointError
from deepseed.runtime.state import position

LARGEST = 64 * 2**20  # bytes of a box in a file: reading a corner of it costs at most that
Ints = tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """A rectangle of a global tensor: where it starts there (``at``) and in the rank's own part (``local``), and its sizes."""

    at: Ints
    local: Ints
    sizes: Ints

    def of(self, part: Tensor) -> Tensor:
        """The view of it in a rank's part."""
        return part[tuple(slice(i, i + n) for i, n in zip(self.local, self.sizes, strict=True))]


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


def cut(box: Box, itemsize: int, largest: int = LARGEST) -> Iterator[Box]:
    """A box in pieces of at most ``largest`` bytes, along its first dimensions."""
    if not box.sizes or prod(box.sizes) * itemsize <= largest:
        yield box
        return
    dim = next(d for d, n in enumerate(box.sizes) if n > 1)
    rows = max(1, largest * box.sizes[dim] // (prod(box.sizes) * itemsize))
    for start in range(0, box.sizes[dim], rows):
        moved = [tuple(i + start if d == dim else i for d, i in enumerate(place)) for place in (box.at, box.local)]
        sizes = tuple(min(rows, n - start) if d == dim else n for d, n in enumerate(box.sizes))
        yield from cut(Box(moved[0], moved[1], sizes), itemsize, largest)


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


class Saver(SavePlanner):
    """What one rank writes: its boxes of the entries, and on rank 0 the ``texts`` (bytes by name)."""

    def __init__(self, entries: Mapping[str, Entry], held: Sequence[Share], texts: Mapping[str, bytes]) -> None:
        self.entries, self.texts = entries, texts
        self.shares = {MetadataIndex(share.name, share.box.at): share for share in held}

    def set_up_planner(self, state_dict: Any, storage_meta: StorageMeta | None = None, is_coordinator: bool = False) -> None:
        return None

    def create_local_plan(self) -> SavePlan:
        items = [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO, BytesIOWriteData(len(text))) for name, text in self.texts.items()]
        for index, share in self.shares.items():
            e = self.entries[index.fqn]
            data = TensorWriteData(_chunk(share.box), TensorProperties(dtype=e.dtype), torch.Size(e.shape))
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        raise NotImplementedError("what each rank writes is known without a meeting: share_out")

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type is WriteItemType.BYTE_IO:
            return io.BytesIO(self.texts[write_item.index.fqn])
        return self.shares[write_item.index].values.contiguous()


def write(folder: Path, entries: Mapping[str, Entry], texts: Mapping[str, bytes], hosted: Sequence[int], held: Sequence[Sequence[Share]]) -> list[WriteResult]:
    """Write what the hosted ranks have to write, a file a rank: ``__3_0.distcp`` of rank 3. ``held``: their ``shares``."""
    out: list[WriteResult] = []
    for rank, own in zip(hosted, held, strict=True):
        saver = Saver(entries, own, texts if rank == 0 else {})
        plans = [SavePlan([])] * rank + [saver.create_local_plan()]
        if plans[rank].items:
            writer = FileSystemWriter(folder, sync_files=True, thread_count=1)
            out += writer.write_data(writer.prepare_global_plan(plans)[rank], saver).value()
    return out


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
    FileSystemWriter(folder, sync_files=True).finish(Metadata(tensors, planner_data=dict(paths)), [found])


@dataclass(frozen=True)
class Want:
    """A rank's part of a saved tensor, to be read into ``into`` (of the part's shape; its dtype is cast to)."""

    name: str
    shape: Ints
    layout: Layout
    coordinate: Mapping[str, int]
    into: Tensor


class Loader(LoadPlanner):
    """Reads of each wanted part the boxes in which it was written."""

    def __init__(self, wants: Sequence[Want], mesh: Mesh) -> None:
        self.wants, self.mesh = wants, mesh

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        assert metadata is not None
        self.metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        items: list[ReadItem] = []
        for n, want in enumerate(self.wants):
            saved = self.metadata.state_dict_metadata[want.name]
            if not isinstance(saved, TensorStorageMetadata) or tuple(saved.size) != want.shape:
                raise CheckpointError(f"{want.name} is {list(getattr(saved, 'size', ()))} in .metadata, {list(want.shape)} is wanted")
            read = 0
            for box in boxes(want.shape, want.layout, self.mesh, want.coordinate):
                for chunk in saved.chunks:
                    met = common(box, tuple(chunk.offsets), tuple(chunk.sizes))
                    if met is None:
                        continue
                    at, sizes = met
                    here = torch.Size(a - b + c for a, b, c in zip(at, box.at, box.local, strict=True))
                    there = torch.Size(a - b for a, b in zip(at, chunk.offsets, strict=True))
                    stored = MetadataIndex(want.name, chunk.offsets)
                    items.append(ReadItem(LoadItemType.TENSOR, MetadataIndex(want.name, index=n), here, stored, there, torch.Size(sizes)))
                    read += prod(sizes)
            if read != want.into.numel():
                raise CheckpointError(f"{want.name}: the checkpoint holds {read} of the {want.into.numel()} elements that are wanted of {list(want.shape)}")
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise NotImplementedError

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        n = read_item.dest_index.index
        assert n is not None
        return Box((), tuple(read_item.dest_offsets), tuple(read_item.lengths)).of(self.wants[n].into)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        return None


class Reader(FileSystemReader):
    """Loads each written box once, however many parts of it are wanted."""

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        groups: dict[MetadataIndex, list[ReadItem]] = {}
        for item in plan.items:
            groups.setdefault(item.storage_index, []).append(item)
        for index, items in sorted(groups.items(), key=lambda pair: self._place(pair[0])):
            written = torch.load(io.BytesIO(self.raw(index)), map_location="cpu", weights_only=True)
            for item in items:
                target = planner.resolve_tensor(item)
                target.copy_(Box((), tuple(item.storage_offsets), tuple(item.lengths)).of(written))
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

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

    def _place(self, index: MetadataIndex) -> tuple[str, int]:
        return self.storage_data[index].relative_path, self.storage_data[index].offset


class _Records(pickle.Unpickler):
    """Takes only what an index is made of, so that reading it runs nothing."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        super().__init__(file)
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        plain = (module.partition(".")[0] == "pathlib" and name.endswith("Path")) or (module, name) in (("torch", "Size"), ("torch.serialization", "_get_layout"))
        if "." not in name:
            found = getattr(torch, name, None) if module == "torch" else None
            if plain or isinstance(found, torch.dtype):
                return super().find_class(module, name)
            if module.startswith("torch.distributed.checkpoint.") and isinstance(record := super().find_class(module, name), type):
                return record
        raise CheckpointError(f"{self.path} names {module}.{name}, which is no record of torch.distributed.checkpoint\n  fix: load only checkpoints that you trust")


def read(folder: Path, wants: Sequence[Want], mesh: Mesh, texts: Sequence[str] = ()) -> dict[str, bytes]:
    """Fill the wanted parts; the ``texts`` by name. Nobody else is asked: every rank reads for itself."""
    reader, loader = Reader(folder), Loader(wants, mesh)
    metadata = reader.read_metadata()
    loader.set_up_planner({}, metadata)
    reader.set_up_storage_reader(metadata, True)
    with torch.no_grad():
        reader.read_data(loader.create_local_plan(), loader).wait()
    return {name: reader.raw(MetadataIndex(name)) for name in texts}


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(box.at), torch.Size(box.sizes))


def common(box: Box, start: Ints, sizes: Ints) -> tuple[Ints, Ints] | None:
    """Where a box meets another one of its tensor, which begins at ``start``: start and sizes."""
    at = tuple(map(max, box.at, start))
    end = tuple(min(a + n, b + m) for a, n, b, m in zip(box.at, box.sizes, start, sizes, strict=True))
    both = tuple(e - a for a, e in zip(at, end, strict=True))
    return (at, both) if all(n > 0 for n in both) else None
