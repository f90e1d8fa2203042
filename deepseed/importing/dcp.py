"""Folders of ``torch.distributed.checkpoint`` that FSDP and its kin have written: the chunks of each tensor, read one at a time.

Which names are the model's and which the optimizer's, the index says: ``{"model": .., "optim": {"state": {NAME: {SLOT: ..}}, "param_groups": ..}}`` as
``torch.distributed.checkpoint.state_dict`` makes it, flattened or not, under whatever names, at whatever depth. What is neither goes into the client's state.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from deepseed.importing.found import Found, Lazy
from deepseed.importing.optimizers import described
from deepseed.importing.records import kept
from deepseed.runtime.folder import CheckpointError
from deepseed.runtime.saved import Box, Reader, common

STATE, GROUPS = "state", "param_groups"


class Chunks:
    """The chunks of a folder; the last one that was read is kept, since boxes of a tensor are asked for in order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reader = Reader(folder)
        try:
            self.metadata: Metadata = self.reader.read_metadata()
            self.reader.set_up_storage_reader(self.metadata, True)
        except CheckpointError:
            raise
        except Exception as error:  # a torn pickle fails in many ways
            raise CheckpointError(f"{folder / '.metadata'} is damaged: {type(error).__name__}: {error}\n  fix: import another checkpoint") from error
        self.last: tuple[MetadataIndex, Tensor] | None = None
        files: dict[str, int] = {}
        for where in self.reader.storage_data.values():
            files[where.relative_path] = max(files.get(where.relative_path, 0), where.offset + where.length)
        for name, least in sorted(files.items()):
            path = folder / name
            if not path.is_file():
                raise CheckpointError(f"{path} is missing: .metadata names {len(files)} files\n  fix: copy the files of all ranks into one folder")
            if path.stat().st_size < least:
                raise CheckpointError(f"{path} is torn: .metadata tells of {least} bytes, {path.stat().st_size} are there\n  fix: copy it again, or import another checkpoint")

    def tensor(self, name: str) -> Lazy:
        saved = self.metadata.state_dict_metadata[name]
        assert isinstance(saved, TensorStorageMetadata)
        return Lazy(tuple(saved.size), saved.properties.dtype, lambda box: self.box(name, box))

    def box(self, name: str, box: Box) -> Tensor:
        saved = self.metadata.state_dict_metadata[name]
        assert isinstance(saved, TensorStorageMetadata)
        out = torch.empty(box.sizes, dtype=saved.properties.dtype)
        filled = 0
        for chunk in saved.chunks:
            if (met := common(box, tuple(chunk.offsets), tuple(chunk.sizes))) is None:
                continue
            at, sizes = met
            there = tuple(slice(a - b, a - b + n) for a, b, n in zip(at, chunk.offsets, sizes, strict=True))
            here = tuple(slice(a - b, a - b + n) for a, b, n in zip(at, box.at, sizes, strict=True))
            out[here] = self._read(MetadataIndex(name, chunk.offsets))[there]
            filled += prod(sizes)
        if filled != out.numel():
            raise CheckpointError(f"{self.folder}: {name} {list(saved.size)} lacks {out.numel() - filled} of {out.numel()} elements\n  fix: copy the files of all ranks into one folder")
        return out

    def text(self, name: str) -> Any:
        """What was saved as bytes. Raises CheckpointError where it is no plain data."""
        try:
            return torch.load(io.BytesIO(self.reader.raw(MetadataIndex(name))), map_location="cpu", weights_only=True)
        except Exception as error:
            first = str(error).strip().splitlines()[0]
            raise CheckpointError(f"{self.folder}: {name} is no plain data, and was not read: {type(error).__name__}: {first[:200]}\n  fix: import only checkpoints that you trust") from error

    def _read(self, index: MetadataIndex) -> Tensor:
        if self.last is None or self.last[0] != index:
            self.last = None
            raw = self.reader.raw(index)
            try:
                got = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
            except Exception as error:
                raise CheckpointError(f"{self.folder / self.reader.storage_data[index].relative_path} is damaged: {index.fqn} at {list(index.offset or ())} cannot be read: {type(error).__name__}\n  fix: import another checkpoint") from error
            self.last = (index, got)
        return self.last[1]


def read(folder: Path, optimizer: str | None = None) -> Found:
    """Raises CheckpointError."""
    chunks = Chunks(folder)
    paths, root = _paths(chunks.metadata)
    tensors = {n: p for n, p in paths.items() if isinstance(chunks.metadata.state_dict_metadata[n], TensorStorageMetadata)}
    texts = {n: p for n, p in paths.items() if isinstance(chunks.metadata.state_dict_metadata[n], BytesStorageMetadata)}
    optim = {n: p[len(root) + 1 :] for n, p in tensors.items() if root is not None and p[: len(root) + 1] == (*root, STATE)}
    rest = {n: p for n, p in tensors.items() if n not in optim}
    key = _model_root(rest)
    model = {n: ".".join(p[len(key) :]) for n, p in rest.items() if p[: len(key)] == key}
    if not model:
        raise CheckpointError(f"{folder} holds no tensors of a model: it has {', '.join(sorted(paths)[:3]) or 'nothing'}\n  fix: save {{'model': get_model_state_dict(model), 'optim': get_optimizer_state_dict(model, optimizer)}}")
    found = Found("torch.distributed.checkpoint", folder, {name: chunks.tensor(n) for n, name in model.items()})
    order = list(found.model)
    for n, p in optim.items():
        name, slot = _owner(p, order)
        t = chunks.tensor(n)
        found.slots[f"{slot}/{name}"] = t if t.shape or slot != "step" else t.as_(torch.float32)
    numbers, groups, others = _texts(chunks, texts, root, order)
    found.slots |= {key: Lazy.of(torch.tensor(float(value), dtype=torch.float32)) for key, value in numbers.items()}
    if strange := [key for key in found.slots if key.partition("/")[2] not in found.model and optimizer != "none"]:
        raise CheckpointError(
            f"{folder} has optimizer state {strange[0].partition('/')[0]} of {strange[0].partition('/')[2]!r}, which is no tensor of the model: an optimizer's own state_dict has numbers for names\n"
            "  fix: save get_optimizer_state_dict(model, optimizer) of torch.distributed.checkpoint.state_dict; or --optimizer none leaves it out"
        )
    found.step = max((int(t.whole()) for key, t in found.slots.items() if key.startswith("step/") and not t.shape), default=0)
    _tie(found)
    if groups or found.slots:
        described(found, [{k: v for k, v in g.items() if k != "params"} for g in groups], [[str(n) for n in g["params"]] for g in groups], None, optimizer)
    others |= {n: chunks.tensor(n).whole() for n in rest if n not in model}
    plain, left = kept(_nested({paths[n]: value for n, value in others.items()}))
    schedule = next((v for k, v in plain.items() if "sched" in k and isinstance(v, Mapping)), None)
    found.notes += [f"left out, since they are no plain data: {', '.join(left)}"] if left else []
    found.extra = {"client_state": plain, "lr_scheduler": schedule, "skipped_steps": 0, "global_steps": found.step, "global_samples": 0, "micro_steps": found.step}
    return found


def _paths(metadata: Metadata) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...] | None]:
    """Where each name was in the nested dict, and where in it the optimizer's state_dict is: what holds ``param_groups``. Its keys may be flattened,
    ``("optim", "state.NAME.SLOT")``: they become ``("optim", "state", "NAME.SLOT")``."""
    said = metadata.planner_data or {}
    paths = {n: tuple(map(str, said[n])) if n in said else tuple(n.split(".")) for n in metadata.state_dict_metadata}
    root = next((p[:n] for p in paths.values() for n, part in enumerate(p) if part == GROUPS or part.startswith(f"{GROUPS}.")), None)
    if root is None:
        return paths, None
    at = len(root)
    flat = {n for n, p in paths.items() if p[:at] == root and len(p) == at + 1 and p[at].startswith((f"{STATE}.", f"{GROUPS}."))}
    return {n: (*root, *p[at].split(".", 1)) if n in flat else p for n, p in paths.items()}, root


def _nested(values: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for path, value in values.items():
        inner = out
        for part in path[:-1]:
            inner = inner.setdefault(part, {})
        inner[path[-1]] = value
    return out


def _model_root(rest: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The part of the paths above the model's names: the shortest that ends in ``model`` or the like, else none."""
    roots = {p[: n + 1] for p in rest.values() for n, part in enumerate(p[:-1]) if part in ("model", "module", "state_dict", "model_state_dict") and n < 2}
    return min(roots, key=len) if roots else ()


def _owner(path: tuple[str, ...], names: list[str]) -> tuple[str, str]:
    """The parameter and the slot that ``NAME.SLOT`` is of."""
    text = ".".join(path)
    name = max((n for n in names if text.startswith(f"{n}.")), key=len, default=text.rpartition(".")[0])
    return name, text[len(name) + 1 :]


def _texts(chunks: Chunks, texts: Mapping[str, tuple[str, ...]], root: tuple[str, ...] | None, names: list[str]) -> tuple[dict[str, float], list[dict[str, Any]], dict[str, Any]]:
    """What was saved as bytes: numbers of optimizer state, the groups, and the rest."""
    numbers: dict[str, float] = {}
    groups: list[dict[str, Any]] = []
    flat: dict[str, dict[str, Any]] = {}  # of flattened groups: parameter -> options
    others: dict[str, Any] = {}
    for n, p in texts.items():
        inside = p[len(root) :] if root is not None and p[: len(root)] == root else ()
        if inside[:1] == (STATE,):
            name, slot = _owner(inside[1:], names)
            if isinstance(value := chunks.text(n), int | float):
                numbers[f"{slot}/{name}"] = value
        elif inside[:1] == (GROUPS,):
            if len(inside) == 1:
                groups = [dict(g) for g in chunks.text(n)]
            elif inside[1].isdigit() and len(inside) > 2:
                number = int(inside[1])
                groups += [{} for _ in range(number + 1 - len(groups))]
                if inside[2] == "params" and len(inside) > 3:
                    groups[number].setdefault("params", []).append(chunks.text(n))
                else:
                    groups[number][".".join(inside[2:])] = chunks.text(n)
            else:
                name, option = _owner(inside[1:], names)
                flat.setdefault(name, {})[option] = chunks.text(n)
        else:
            others[n] = chunks.text(n)
    for name in (n for n in names if n in flat):
        same = next((g for g in groups if {k: v for k, v in g.items() if k != "params"} == flat[name]), None)
        if same is None:
            groups.append({**flat[name], "params": [name]})
        else:
            same["params"].append(name)
    return numbers, groups, others


def _tie(found: Found) -> None:
    """A tied tensor was saved under each of its names, its optimizer state under one: what has none, and is equal to another in every bit, is a further name."""
    owned = {key.partition("/")[2] for key in found.slots if "/" in key}
    beginnings: dict[str, bytes] = {}

    def beginning(name: str) -> bytes:
        if name not in beginnings:
            t = found.model[name]
            row = t.part(Box((0,) * len(t.shape), (0,) * len(t.shape), (1, *t.shape[1:])))
            beginnings[name] = hashlib.sha256(row.view(torch.uint8).numpy().tobytes()).digest()
        return beginnings[name]

    for alias in reversed([n for n, t in found.model.items() if n not in owned and len(t.shape) > 1 and 0 not in t.shape]):
        one = found.model[alias]
        like = [n for n, t in found.model.items() if n != alias and (t.shape, t.dtype) == (one.shape, one.dtype)]
        twin = next((n for n in like if beginning(n) == beginning(alias) and _equal(found.model[n], one)), None)
        if twin is not None:
            found.tied[alias] = twin
            del found.model[alias]


def _equal(a: Lazy, b: Lazy) -> bool:
    """Whether two tensors are equal, row by row as far as they are."""
    rows = a.shape[0]
    step = max(1, min(rows, 2**22 // max(1, prod(a.shape[1:]))))
    for at in range(0, rows, step):
        box = Box((at, *[0] * (len(a.shape) - 1)), (0,) * len(a.shape), (min(step, rows - at), *a.shape[1:]))
        if not torch.equal(a.part(box), b.part(box)):
            return False
    return True
