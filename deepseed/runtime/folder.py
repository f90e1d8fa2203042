"""A folder that is whole or not there: written aside, checksummed, and renamed at the end.

    aside(dir)      dir.tmp-1f0c…   files are written here
    publish(...)    manifest.json, fsync, then   dir -> dir.old-1f0c…,  dir.tmp-1f0c… -> dir,  and the old one is deleted

``manifest.json`` comes last and holds size and checksums of every file (crc32 of each box, or the sha256), and its own: a folder without it is not whole. A process
that ends between the two renames leaves no ``dir`` but two whole folders beside it; ``find`` then takes the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepseed.runtime.crc import crc32

MANIFEST = "manifest.json"
_OURS = re.compile(r"__\d+_\d+\.distcp|\.metadata(\.tmp)?|manifest\.json(\.tmp)?")
LEFT = re.compile(r"(.+)\.(tmp|old)-[0-9a-f]{8}")  # what a save leaves beside a folder where it is cut off


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, is damaged, or does not fit: names the file or tensor, what is and what was expected."""


class DamagedError(CheckpointError):
    """A checkpoint that is partial, torn, damaged, or not there: another one may load."""


class HalfLoadedError(DamagedError):
    """A checkpoint that was whole when it was checked, and failed while its values were read: some tensors are overwritten, others are not."""


def aside(target: Path, by: str = "step.save", ours: re.Pattern[str] = _OURS, carry: bool = False) -> Path:
    """Make the folder beside ``target`` in which the new checkpoint is written. ``ours``: names of files that ``by`` writes,
    which are replaced in the end; ``carry``: other files beside such ones go into the new folder too. Raises CheckpointError where ``target`` is in
    use for something else."""
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file\n  fix: give a folder of its own to each checkpoint")
    names = sorted(p.name for p in target.iterdir()) if target.is_dir() else []
    strange = [name for name in names if MANIFEST not in names or not ours.fullmatch(name)]
    carried = [name for name in strange if carry and MANIFEST in names and (target / name).is_file() and not _OURS.fullmatch(name)]
    if len(strange) > len(carried):
        raise CheckpointError(
            f"{target} holds {len(strange)} files that {by} has not written, such as {strange[0]}: saving would delete them\n"
            f"  fix: save to a folder of its own, such as {target / 'checkpoint'}"
        )
    folder = target.with_name(f"{target.name}.tmp-{uuid.uuid4().hex[:8]}")
    folder.mkdir(parents=True)
    for name in carried:
        shutil.copy2(target / name, folder / name)
    return folder


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around the writing of a file: CheckpointError names it, its size and what is free where the system refuses (a full disk)."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        size = path.stat().st_size if path.exists() else 0
        free = shutil.disk_usage(path.parent).free if path.parent.exists() else 0
        raise CheckpointError(
            f"{path} cannot be written: {cause.strerror or cause} (after {size} bytes; {free} are free)\n  fix: make room, keep fewer checkpoints (keep=), or save to another disk; training can go on"
        ) from error


def digest(path: Path) -> dict[str, Any]:
    """``{"bytes": size, "sha256": hex}`` of a file."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": found}


def publish(folder: Path, target: Path, manifest: Mapping[str, Any]) -> None:
    """Close the folder with its manifest (``manifest["files"]``: name -> ``digest``) and put it in the place of ``target``."""
    missing = [name for name in manifest["files"] if not (folder / name).exists()]
    if missing:
        raise CheckpointError(f"{missing[0]} is not in {folder} as rank 0 sees it\n  fix: save to a file system that all ranks share")
    with writing(folder / MANIFEST):
        fresh = folder / f"{MANIFEST}.tmp"  # a folder that has a manifest is whole: it comes at once
        with fresh.open("w") as file:
            json.dump({**manifest, "checksum": checksum(manifest)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.rename(fresh, folder / MANIFEST)
    sync(folder)
    former = target.with_name(folder.name.replace(".tmp-", ".old-"))
    if target.exists():
        os.rename(target, former)
    try:
        os.rename(folder, target)
    except OSError:
        if former.exists():
            os.rename(former, target)
        raise
    sync(target.parent)
    for leftover in _beside(target, "old") + _beside(target, "tmp"):
        discard(leftover)


def discard(folder: Path) -> None:
    """Delete a folder that nobody reads; the manifest first, so that no half of it looks whole."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def find(target: Path) -> tuple[Path, dict[str, Any]]:
    """Where the checkpoint ``target`` lies, and its manifest. Raises CheckpointError."""
    if target.is_dir():
        return target, manifest_of(target)
    for candidate in _beside(target, "tmp") + _beside(target, "old"):  # a save ended between its two renames
        if (candidate / MANIFEST).exists():
            return candidate, manifest_of(candidate)
    left = _beside(target, "tmp")
    half = f": a save into it was cut off ({left[0].name} is not whole)" if left else ""
    raise DamagedError(f"there is no checkpoint at {target}{half}\n  fix: give the folder that step.save(dir) was given")


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest, checked against its own checksum."""
    path = folder / MANIFEST
    if not path.exists():
        names = sorted(p.name for p in folder.iterdir())
        left = LEFT.fullmatch(folder.name)
        half = "it was being deleted" if left and left[2] == "old" else "a save was cut off before its end"
        what = f"is partial: {half}" if partial(folder, names) else "is no checkpoint, or a torn one"
        raise DamagedError(f"{folder} has no {MANIFEST}: it {what} (it holds {', '.join(names[:3]) or 'nothing'})\n  fix: load another checkpoint")
    try:
        found = json.loads(path.read_bytes())
        said = found.pop("checksum")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DamagedError(f"{path} is damaged: {type(error).__name__}: {error} ({path.stat().st_size} bytes)\n  fix: load another checkpoint") from error
    if said != (got := checksum(found)):
        raise DamagedError(f"{path} is damaged: sha256 {said} was written, {got} is there\n  fix: load another checkpoint")
    return dict(found)


def partial(folder: Path, names: Iterable[str]) -> bool:
    """Whether a folder without a manifest, which holds these files, is what a save has left that was cut off."""
    return LEFT.fullmatch(folder.name) is not None or any(_OURS.fullmatch(name) for name in names)


def faults(folder: Path, files: Mapping[str, Mapping[str, Any]], names: Iterable[str], sizes: bool = False) -> list[str]:
    """What is wrong with these files of a checkpoint, one line each: a missing one, another size, another checksum. ``sizes``: nothing is read."""
    out = []
    for name in names:
        path, want = folder / name, files[name]
        if not path.exists():
            out.append(f"{path} is missing: {want['bytes']} bytes were written")
        elif (size := path.stat().st_size) != want["bytes"]:
            out.append(f"{path} is torn: {want['bytes']} bytes were written, {size} are there")
        elif not sizes and (wrong := _damage(path, want)):
            out.append(f"{path} is damaged: {wrong}")
    return out


def _damage(path: Path, want: Mapping[str, Any]) -> str:
    if "boxes" not in want:
        got = digest(path)["sha256"]
        return f"sha256 {want['sha256']} was written, {got} is there" if got != want["sha256"] else ""
    at, wrong = 0, []
    with path.open("rb") as file:
        for length, crc in want["boxes"]:
            found, left = 0, length
            while left and (piece := file.read(min(left, 2**20))):
                found, left = crc32(piece, found), left - len(piece)
            wrong += [f"crc32 {crc:08x} was written, {found:08x} is there, in bytes {at} to {at + length}"] if found != crc else []
            at += length
    return "; ".join([*wrong[:3], *([f"and {len(wrong) - 3} boxes more"] if wrong[3:] else [])])


def checksum(manifest: Mapping[str, Any]) -> str:
    """sha256 of what a manifest says: it stands for the whole checkpoint, since it holds every file's."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _beside(target: Path, kind: str) -> list[Path]:
    """What saves into ``target`` have left beside it, newest first."""
    name = re.compile(re.escape(target.name) + rf"\.{kind}-[0-9a-f]{{8}}")
    found = [p for p in target.parent.iterdir() if name.fullmatch(p.name)] if target.parent.is_dir() else []
    return sorted(found, key=lambda p: p.stat().st_mtime, reverse=True)


def sync(folder: Path) -> None:
    """Make the names in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
