"""``deepseed checkpoint import SOURCE DEST``: checkpoints of DeepSpeed, FSDP and transformers, as one that ``step.load`` takes under any plan.

A reader for each format says what there is (``found.Found``): names, shapes, and where each box of a tensor lies. ``found.write`` streams that into a
checkpoint. Nothing that a file says is run.
"""

from __future__ import annotations

import os
from pathlib import Path

from deepseed.importing import dcp, hf, universal, zero
from deepseed.importing.found import Found, write
from deepseed.runtime.folder import MANIFEST, CheckpointError, manifest_of
from deepseed.weights import INDEX, SINGLE

FORMATS = ("deepspeed", "dcp", "hf")
LATEST = ("latest", "latest_universal")


def find(source: str | os.PathLike[str], format: str = "auto", optimizer: str | None = None, tag: str | None = None) -> Found:
    """What is at ``source``: a folder of tags (``tag``, else the one that ``latest`` names) or of one checkpoint, or a file of weights. ``optimizer``: whose
    state it is, where the files do not say; ``none`` leaves it out. Raises CheckpointError."""
    if format not in ("auto", *FORMATS):
        raise CheckpointError(f"--format {format}: not known\n  fix: one of auto, {', '.join(FORMATS)}")
    where = _folder(Path(os.path.realpath(source)), tag)
    kind = _kind(where) if format == "auto" else format
    if kind == "deepspeed":
        return universal.read(where, optimizer) if (where / "zero").is_dir() else zero.read(where, optimizer)
    return dcp.read(where, optimizer) if kind == "dcp" else hf.read(where, optimizer)


def bring(source: str | os.PathLike[str], dest: str | os.PathLike[str], format: str = "auto", optimizer: str | None = None, tag: str | None = None) -> Found:
    """Write what ``find`` has found to ``dest``, a folder of its own. Raises CheckpointError."""
    found = find(source, format, optimizer, tag)
    write(found, dest)
    return found


def _folder(source: Path, tag: str | None) -> Path:
    if not source.exists():
        raise CheckpointError(f"{source}: no such file or folder\n  fix: the folder that save_checkpoint, torch.distributed.checkpoint.save or save_pretrained was given")
    latest = next((source / name for name in LATEST if (source / name).is_file()), None)
    if tag is None and latest is None:
        return source
    folder = source / (tag if tag is not None else latest.read_text(errors="replace").strip() if latest is not None else "")
    if not folder.is_dir():
        tags = sorted(p.name for p in source.iterdir() if p.is_dir())
        raise CheckpointError(f"{folder} is not there{'' if tag is not None or latest is None else f', though {latest} names it'}: {source} has {', '.join(tags) or 'no folders'}\n  fix: --tag with one of these")
    return folder


def _kind(where: Path) -> str:
    if where.is_file():
        return "hf"
    names = {p.name for p in where.iterdir()}
    if MANIFEST in names and manifest_of(where).get("format") != "safetensors":
        raise CheckpointError(f"{where} is a checkpoint of deepseed already\n  fix: step.load({str(where)!r})")
    if any(zero.MODEL.fullmatch(n) or zero.OPTIM.fullmatch(n) for n in names):
        return "deepspeed"
    if ".metadata" in names and any((p / MANIFEST).is_file() for p in where.parent.iterdir() if p != where):
        raise CheckpointError(f"{where} is partial: it has lost its {MANIFEST}, which those beside it have\n  fix: import another one; --format dcp, if it is no checkpoint of deepseed")
    if ".metadata" in names:
        return "dcp"
    if names & {SINGLE, INDEX, hf.BIN, hf.BIN_INDEX}:
        return "hf"
    raise CheckpointError(
        f"{where} is no checkpoint that is known: it holds {', '.join(sorted(names)[:5]) or 'nothing'}\n"
        "  fix: a folder of DeepSpeed (*_model_states.pt), of torch.distributed.checkpoint (.metadata), or of transformers (model.safetensors, pytorch_model.bin)"
    )
