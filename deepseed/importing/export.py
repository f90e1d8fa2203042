"""``deepseed checkpoint export DIR DEST --to hf | torch | dcp``: what others load, from a checkpoint of ours (or one that can be imported), in one process.

    hf      safetensors files and their index, as from_pretrained reads them; a config makes names and stacks of experts as transformers' files have them
    torch   one file of torch.save: {name: tensor}; the only one for which all weights are in memory at once
    dcp     {"model": .., "optim": {"state": .., "param_groups": ..}} of torch.distributed.checkpoint, which FSDP's users load
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import deepseed
from deepseed.checkpoint import WEIGHTS
from deepseed.hf_names import in_files
from deepseed.importing import find, hf
from deepseed.importing.dcp import Chunks
from deepseed.importing.found import Found, Lazy, store
from deepseed.importing.optimizers import defaults
from deepseed.ir.amounts import parse_bytes
from deepseed.pieces import Source
from deepseed.pretrained import OURS, index, shards
from deepseed.runtime.folder import MANIFEST, CheckpointError, aside, digest, discard, faults, manifest_of, publish, writing
from deepseed.runtime.safetensors import layout, make, mapped, sync
from deepseed.runtime.saved import Box, cut
from deepseed.runtime.series import latest

KINDS = ("hf", "torch", "dcp")
_TOLD = ("config.json", "generation_config.json")


def export(source: str | os.PathLike[str], dest: str | os.PathLike[str], to: str, dtype: torch.dtype | None = None, config: str | os.PathLike[str] | None = None, max_shard_size: str = "5GB", tag: str | None = None) -> Found:
    """Write ``dest``. ``dtype``: of all weights that are floats, else as they are. ``config``: a config.json or its folder. Raises CheckpointError."""
    if to not in KINDS:
        raise CheckpointError(f"--to {to}: not known\n  fix: one of {', '.join(KINDS)}")
    if to != "hf" and config is not None:
        raise CheckpointError(f"--config is of hf alone, and --to is {to}\n  fix: leave it out")
    try:
        largest = parse_bytes(max_shard_size)
    except ValueError as error:
        raise CheckpointError(f"--max-shard-size {error}\n  fix: such as 5GB") from error
    found = ours(source, tag)
    cast = {name: t.as_(dtype) if dtype is not None and t.dtype.is_floating_point else t for name, t in found.model.items()}
    found.model = cast
    target = Path(os.path.realpath(dest))
    target.parent.mkdir(parents=True, exist_ok=True)
    if to == "torch":
        _torch(found, target)
    elif to == "dcp":
        _dcp(found, target)
    else:
        _hf(found, target, Path(config) if config is not None else None, largest)
    return found


def ours(source: str | os.PathLike[str], tag: str | None = None) -> Found:
    """A checkpoint of ours, each file checked, else what ``find`` finds."""
    where = Path(os.path.realpath(source))
    where = where / tag if tag is not None else where / (latest(where) or "")
    if not (where / MANIFEST).is_file() or (manifest := manifest_of(where)).get("format") == WEIGHTS:
        return find(source, tag=tag)
    if wrong := faults(where, manifest["files"], sorted(manifest["files"])):
        raise CheckpointError("\n  ".join(wrong) + "\n  nothing was written\n  fix: export another checkpoint")
    chunks = Chunks(where)
    found = Found("deepseed", where, {}, step=int(manifest["step"]))
    for name in manifest["tensors"]:
        kind, _, key = name.partition(".")
        (found.model if kind == "model" else found.slots)[key] = chunks.tensor(name)
    found.tied = {alias.removeprefix("model."): name.removeprefix("model.") for alias, name in manifest["tied"].items()}
    optimizers = manifest["optimizers"]
    found.groups = [{"params": g["params"], **g["options"]} for o in optimizers for g in o["groups"]]
    found.optimizer = optimizers[0]["class"] if len(optimizers) == 1 else None
    return found


def _torch(found: Found, target: Path) -> None:
    if target.is_dir():
        raise CheckpointError(f"{target} is a folder\n  fix: give a file, such as {target / 'pytorch_model.bin'}")
    whole: dict[str, Tensor] = {name: t.whole().clone() for name, t in found.model.items()}
    whole |= {alias: whole[name] for alias, name in found.tied.items()}
    fresh = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    try:
        with writing(fresh), fresh.open("wb") as file:
            torch.save(whole, file)
        sync(fresh)
        fresh.replace(target)
    finally:
        fresh.unlink(missing_ok=True)


def _dcp(found: Found, target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} is there already\n  fix: give a folder of its own")
    tensors = {f"model.{name}": t for name, t in found.model.items()}
    paths: dict[str, tuple[Any, ...]] = {f"model.{name}": ("model", name) for name in [*found.model, *found.tied]}
    for key, t in found.slots.items():
        slot, _, name = key.partition("/")
        if name:
            tensors[f"optim.state.{name}.{slot}"] = t
            paths[f"optim.state.{name}.{slot}"] = ("optim", "state", name, slot)
    texts = {}
    for n, group in enumerate(found.groups):
        for option, value in {**defaults(found.optimizer), **group}.items():
            file = io.BytesIO()
            torch.save(tuple(value) if isinstance(value, list) and option != "params" else value, file)
            texts[f"optim.param_groups.{n}.{option}"] = file.getvalue()
            paths[f"optim.param_groups.{n}.{option}"] = ("optim", "param_groups", n, option)
    folder = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    folder.mkdir()
    try:
        store(folder, tensors, texts, {f"model.{alias}": f"model.{name}" for alias, name in found.tied.items()}, paths)
        folder.rename(target)
    except BaseException:
        discard(folder)
        raise


def _hf(found: Found, target: Path, config: Path | None, largest: int) -> None:
    told = config.parent if config is not None and config.is_file() else config
    if config is not None and (told is None or not (told / "config.json").is_file()):
        raise CheckpointError(f"--config {config}: no config.json is there\n  fix: the folder that save_pretrained of the model's configuration was given")
    model: Any = hf.built(told) if told is not None else None
    skipped = getattr(model, "_keys_to_ignore_on_save", None) or ()
    own = {name: (t.dtype, t.shape) for name, t in found.model.items() if name not in skipped}
    if model is not None and (strange := [n for n in own if n not in model.state_dict()]):
        raise CheckpointError(f"{found.source} holds {strange[0]}, which {type(model).__name__} of {told} has not\n  fix: --config of the model that was trained")
    tensors, made = in_files(model, own) if model is not None else (own, {})
    files = shards(tensors, largest)
    folder = aside(target, "deepseed checkpoint export", OURS, carry=True)
    try:
        laid: dict[str, Any] = {}
        for name, held in files.items():
            with writing(folder / name):
                make(folder / name, {t: tensors[t] for t in held})
            laid |= layout(folder / name, {t: tensors[t] for t in held})[1]
        pages = {folder / name: mapped(folder / name, write=True) for name in files}
        for name in own:
            source = Source.made(name, made[name], laid) if name in made else Source.whole(name, laid[name])
            shape = own[name][1]
            for box in cut(Box((0,) * len(shape), (0,) * len(shape), shape), own[name][0].itemsize):
                _into(source, found.model[name], box, pages)
        pages.clear()
        for name in files:
            sync(folder / name)
        if len(files) > 1:
            index(folder, tensors, files)
        if told is not None:
            _configured(told, folder, next((dtype for dtype, _ in own.values() if dtype.is_floating_point), None))
        digests = {p.name: digest(p) for p in sorted(folder.iterdir()) if OURS.fullmatch(p.name)}
        publish(folder, target, {"format": WEIGHTS, "deepseed": deepseed.__version__, "torch": torch.__version__, "model": type(model).__name__ if model is not None else "", "plan": found.kind, "step": found.step, "files": digests})
    except BaseException:
        discard(folder)
        raise


def _into(source: Source, t: Lazy, box: Box, pages: Mapping[Path, Tensor]) -> None:
    """A box of a tensor into the files that hold it."""
    if 0 in box.sizes:
        return
    values = t.part(box)
    local = Box(box.at, (0,) * len(box.at), box.sizes)
    for piece in source.pieces:
        if (met := piece.meets(local)) is not None:
            piece.part(pages[piece.stored.path], met).copy_(met.of(values))


def _configured(told: Path, folder: Path, dtype: torch.dtype | None) -> None:
    for name in (n for n in _TOLD if (told / n).is_file()):
        said = json.loads((told / name).read_text())
        if name == "config.json" and dtype is not None:
            said.pop("torch_dtype", None)
            said["dtype"] = str(dtype).removeprefix("torch.")
        (folder / name).write_text(json.dumps(said, indent=2) + "\n")
        sync(folder / name)
