"""What was found in a checkpoint of another program, and how it becomes one of ours: box by box, no more than one of 64 MiB in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult

import deepseed
from deepseed.checkpoint import EXTRA, FORMAT, packed
from deepseed.fits import HOW
from deepseed.ir.layout import REPLICATED
from deepseed.ir.mesh import Mesh
from deepseed.runtime.boxfile import write_boxes
from deepseed.runtime.folder import CheckpointError, aside, digest, discard, publish, writing
from deepseed.runtime.refusals import named
from deepseed.runtime.saved import Box, Entry, Ints, share_out, write_metadata

Read = Callable[[Box], Tensor]
DATA, METADATA = "__0_0.distcp", ".metadata"


@dataclass(frozen=True)
class Lazy:
    """A tensor that lies in files: ``read`` gives a box of it."""

    shape: Ints
    dtype: torch.dtype
    read: Read

    @staticmethod
    def of(t: Tensor, dtype: torch.dtype | None = None) -> Lazy:
        """A tensor that is there, or on the pages of a mapped file."""
        return Lazy(tuple(t.shape), dtype or t.dtype, lambda box: _box(t, box))

    @staticmethod
    def joined(shape: Ints, parts: Sequence[Tensor], name: str, dtype: torch.dtype | None = None) -> Lazy:
        """A tensor whose elements are those of flat ``parts``, one after another; what is left over at their end is padding."""
        have, need = sum(p.numel() for p in parts), prod(shape)
        if have < need:
            raise CheckpointError(f"{name} {list(shape)} has {need} elements, the files of all ranks hold {have} of them\n  fix: copy the whole folder again, the files of all ranks")

        def read(box: Box) -> Tensor:
            out = window(parts, _first(shape, box), prod(box.sizes))
            return (torch.cat(out) if len(out) != 1 else out[0]).view(box.sizes)

        return Lazy(shape, dtype or parts[0].dtype, read)

    def as_(self, dtype: torch.dtype) -> Lazy:
        return Lazy(self.shape, dtype, self.read)

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def whole(self) -> Tensor:
        return self.part(Box((0,) * len(self.shape), (0,) * len(self.shape), self.shape))

    def part(self, box: Box) -> Tensor:
        got = self.read(box).detach()
        if tuple(got.shape) != tuple(box.sizes):
            raise CheckpointError(f"a box {list(box.sizes)} at {list(box.at)} of a tensor {list(self.shape)} was read as {list(got.shape)}")
        return got.to(self.dtype).contiguous()


def window(parts: Sequence[Tensor], start: int, count: int) -> list[Tensor]:
    """Elements ``start`` to ``start + count`` of parts that lie one after another, as views of them."""
    out = []
    for part in parts:
        if count and start < part.numel():
            out.append(part[max(start, 0) : max(start, 0) + count])
            count -= out[-1].numel()
        start = max(0, start - part.numel())
    return out or [parts[0][:0]]


def _first(shape: Ints, box: Box) -> int:
    """The index of a box's first element; a box that ``cut`` has cut is one run of consecutive elements."""
    at = 0
    for size, index in zip(shape, box.at, strict=True):
        at = at * size + index
    return at


def _box(t: Tensor, box: Box) -> Tensor:
    return t.detach()[tuple(slice(i, i + n) for i, n in zip(box.at, box.sizes, strict=True))]


@dataclass
class Found:
    """A checkpoint of another program. ``model``: by the model's names; ``slots``: optimizer state, by ``SLOT/NAME``; ``tied``: further name -> name;
    ``groups``: names and options of each parameter group; ``optimizer``: its class, None where nothing says it; ``notes``: what was left out."""

    kind: str
    source: Path
    model: dict[str, Lazy]
    slots: dict[str, Lazy] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)
    optimizer: str | None = None
    step: int = 0
    extra: dict[str, Any] | None = None
    frozen: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def optimizers(self) -> list[dict[str, Any]]:
        """As the manifest has them."""
        if not self.groups:
            return []
        groups = [{"params": list(g["params"]), "options": {k: v for k, v in g.items() if k not in HOW}} for g in self.groups]
        return [{"class": self.optimizer, "groups": groups}]


def store(folder: Path, tensors: Mapping[str, Lazy], texts: Mapping[str, bytes], tied: Mapping[str, str], paths: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """Files of ``torch.distributed.checkpoint`` with these tensors, in a folder that is there; each file's size and checksums."""
    entries = {name: Entry(t.shape, t.dtype, REPLICATED, [None], own=True) for name, t in tensors.items()}
    boxes = share_out(entries, Mesh(()))[0]

    def part(name: str, box: Box) -> Tensor:
        try:
            return tensors[name].part(box)
        except OSError as error:
            raise CheckpointError(f"{name} cannot be read: {named(error)}") from error

    with writing(folder / DATA):
        places, sums = write_boxes(folder / DATA, chain(texts.values(), (part(name, box) for name, box in boxes)))
    indices = [*map(MetadataIndex, texts), *(MetadataIndex(name, torch.Size(box.at)) for name, box in boxes)]
    results = [WriteResult(index, place.length, place) for index, place in zip(indices, places, strict=True)]
    write_metadata(folder, entries, texts, Mesh(()), results, tied, paths)
    return {DATA: sums, METADATA: digest(folder / METADATA)}


def write(found: Found, dest: str | os.PathLike[str]) -> Path:
    """Write what was found as a checkpoint that ``step.load`` takes; the folder is whole or not there."""
    target = Path(os.path.realpath(dest))
    tensors = {f"model.{name}": t for name, t in found.model.items()} | {f"optimizer.{key}": t for key, t in found.slots.items()}
    tied = {f"model.{alias}": f"model.{name}" for alias, name in found.tied.items()}
    texts = {EXTRA: packed(found.extra)} if found.extra is not None else {}
    manifest = {
        "format": FORMAT, "deepseed": deepseed.__version__, "torch": torch.__version__, "model": "", "plan": found.kind, "mesh": {},
        "step": found.step, "seed": 0, "moving": [], "optimizers": found.optimizers(), "imported": str(found.source),
        "tensors": {name: f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for name, t in tensors.items()}, "tied": tied, "texts": sorted(texts),
    }  # fmt: skip
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = aside(target, "deepseed checkpoint import")
    try:
        files = store(folder, tensors, texts, tied, {name: tuple(name.split(".", 1)) for name in [*tensors, *tied, *texts]})
        publish(folder, target, {**manifest, **({"frozen": found.frozen} if found.frozen else {}), "files": files})
    except BaseException:
        discard(folder)
        raise
    return target
