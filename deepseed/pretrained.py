"""``step.save_pretrained(dir)``: safetensors files and their index, as ``from_pretrained`` of transformers reads them, from any plan.

Every rank knows the layout of every file: which tensors, at which bytes, and which rank writes it. The writer takes the room on the disk and maps
the file; then the parts of each tensor go from one of the ranks that hold them to its writer, at most 64 MiB at a time, straight into the file. So each
byte travels once at most, and no rank puts a tensor together. The folder is written aside and renamed at the end (``deepseed.runtime.folder``);
its manifest holds the checksums that the format lacks.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import deepseed
from deepseed.checkpoint import WEIGHTS, model_entries
from deepseed.hf_names import Made, Shapes, in_files
from deepseed.ir.amounts import parse_bytes
from deepseed.pieces import Piece, Source
from deepseed.runtime.folder import CheckpointError, aside, digest, discard, publish
from deepseed.runtime.host import everywhere
from deepseed.runtime.safetensors import layout, make, mapped, sync
from deepseed.runtime.saved import Box, Entry, share_out
from deepseed.weights import INDEX, SINGLE

if TYPE_CHECKING:
    from deepseed.compiled import Compiled

_TOLD = ("config.json", "generation_config.json")
OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|(generation_)?config\.json|manifest\.json")


def save(step: Compiled, dir: str | os.PathLike[str], max_shard_size: int | str = "5GB") -> None:
    host, target, largest = step.host, Path(os.path.realpath(dir)), _largest(max_shard_size)
    what = f"saving to {target}"
    host.agree([("the folder to save to", str(target)), ("max_shard_size", largest)])
    if step.states:
        host.begin(step.model, step.states)  # what the user wrote into the module
    skipped = getattr(step.model, "_keys_to_ignore_on_save", None) or ()
    entries: dict[str, Entry] = {}
    everywhere(host, what, lambda: entries.update({name: e for name, e in model_entries(step).items() if name not in skipped}))
    tensors, made = in_files(step.model, {name: (e.dtype, e.shape) for name, e in entries.items()})
    files = shards(tensors, largest)
    folder = Path(everywhere(host, what, lambda: str(aside(target, "step.save_pretrained", OURS, carry=True)) if host.first else "")[0])
    try:
        written = _write(step, folder, entries, made, {name: {t: tensors[t] for t in held} for name, held in files.items()})

        def close() -> None:
            _config(step.model, folder, entries)
            if len(files) > 1:
                index(folder, tensors, files)
            others = [name for name in (INDEX, *_TOLD) if (folder / name).exists()]
            digests = {name: d for each in written for name, d in each.items()} | {name: digest(folder / name) for name in others}
            model = {"format": WEIGHTS, "deepseed": deepseed.__version__, "torch": torch.__version__, "model": type(step.model).__name__}
            publish(folder, target, {**model, "plan": str(step.plan), "step": step.steps, "files": digests})

        everywhere(host, what, lambda: close() if host.first else None)
    except Exception:
        if host.first:
            discard(folder)
        raise


def _write(
    step: Compiled, folder: Path, entries: Mapping[str, Entry], made: Mapping[str, Made], files: Mapping[str, Shapes]
) -> list[dict[str, Any]]:  # fmt: skip
    """Write the files, each by one rank; what each rank wrote, with checksums."""
    host, what = step.host, f"saving to {folder}"
    hosted = {step.mesh.rank(c): n for n, c in enumerate(host.coordinates)}
    writer = {folder / name: n % step.mesh.ranks for n, name in enumerate(files)}
    mine = [path for path in writer if writer[path] in hosted]
    laid = {t: stored for name, shapes in files.items() for t, stored in layout(folder / name, shapes)[1].items()}
    sources = {t: Source.made(t, made[t], laid) if t in made else Source.whole(t, laid[t]) for t in entries}
    maps: dict[Path, Tensor] = {}

    def begin() -> None:
        if odd := [t for t in entries if sources[t].shape != entries[t].shape]:
            raise CheckpointError(f"{odd[0]} is {list(entries[odd[0]].shape)} in the model and would be {list(sources[odd[0]].shape)} in the files")
        if not folder.is_dir():
            raise CheckpointError(f"{folder}, which rank 0 has made, is not there\n  fix: save to a file system that all ranks share")
        for path in mine:
            make(path, files[path.name])
            maps[path] = mapped(path, write=True)

    def move(t: str, sender: int, piece: Piece, box: Box) -> None:
        """A box of a tensor from the rank that sends it into the file."""
        own = entries[t].parts[hosted[sender]] if sender in hosted else None
        came = host.hand(None if own is None else box.of(own.detach()), box.sizes, entries[t].dtype, sender, writer[piece.stored.path])
        if came is not None:
            piece.part(maps[piece.stored.path], box).copy_(came)

    def end() -> dict[str, Any]:
        maps.clear()
        for path in mine:
            sync(path)
        return {path.name: digest(path) for path in mine}

    everywhere(host, what, begin)
    order = {t: n for n, t in enumerate(entries)}
    parts = [(t, sender, box) for sender, share in enumerate(share_out(entries, step.mesh)) for t, box in share]
    for t, sender, box in sorted(parts, key=lambda each: order[each[0]]):  # one order for all ranks
        for piece in sources[t].pieces:
            if (met := piece.meets(box)) is not None:
                move(t, sender, piece, met)
    return everywhere(host, what, end)


def shards(tensors: Shapes, largest: int) -> dict[str, list[str]]:
    """The tensors of each file, in the order of the model: a file is full where the next tensor would make it larger than ``largest`` bytes."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, (dtype, shape) in tensors.items():
        size = prod(shape) * dtype.itemsize
        if groups[-1] and held + size > largest:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return {SINGLE if len(groups) == 1 else f"model-{n:05}-of-{len(groups):05}.safetensors": names for n, names in enumerate(groups, 1)}


def index(folder: Path, tensors: Shapes, files: Mapping[str, list[str]]) -> None:
    count, size = (sum(prod(shape) * (dtype.itemsize if of_bytes else 1) for dtype, shape in tensors.values()) for of_bytes in (False, True))
    where = {t: name for name, held in files.items() for t in held}
    said = {"metadata": {"total_parameters": count, "total_size": size}, "weight_map": dict(sorted(where.items()))}
    (folder / INDEX).write_text(json.dumps(said, indent=2) + "\n")
    sync(folder / INDEX)


def _config(model: Any, folder: Path, entries: Mapping[str, Entry]) -> None:
    """What ``from_pretrained`` builds the model from, where the model has a configuration: its class and dtype stand in it."""
    if hasattr(getattr(model, "config", None), "save_pretrained"):
        said = copy.deepcopy(model.config)
        said.architectures = [type(model).__name__]
        said.dtype = next((e.dtype for e in entries.values() if e.dtype.is_floating_point), None)
        said.save_pretrained(folder)
        if hasattr(model, "can_generate") and model.can_generate():
            model.generation_config.save_pretrained(folder)


def _largest(size: int | str) -> int:
    try:
        return parse_bytes(size)
    except ValueError as error:
        raise CheckpointError(f"max_shard_size={error}") from None
