"""A folder of checkpoints: one a tag, and ``latest``, a text that names the one to go on from.

    run/step100/  run/step200/  run/latest        "step200"
    run/step300.tmp-1f0c9a3e/                     a save that is under way, or was cut off: partial

``latest`` is replaced by a rename after the checkpoint is in its place, so what it names is complete.
"""

from __future__ import annotations

import os
import re
import uuid
from dataclasses import dataclass
from pathlib import Path

from deepseed.runtime.folder import LEFT, MANIFEST, CheckpointError, DamagedError, discard, find, partial, sync, writing

LATEST = "latest"
AUTOMATIC = re.compile(r"(global_)?step\d+")  # tags that nobody has chosen: the oldest of these go
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=,+-]*")


@dataclass(frozen=True)
class Found:
    """One checkpoint of a series. ``saved``: when, in seconds. ``fault``: empty where its manifest says that it is complete. ``partial``: it has none."""

    tag: str
    folder: Path
    step: int
    saved: float
    fault: str
    partial: bool = False


def check_tag(tag: str) -> str:
    """Raises CheckpointError where it names no folder of its own."""
    if not _TAG.fullmatch(tag) or tag == LATEST or LEFT.fullmatch(tag):
        raise CheckpointError(f"tag={tag!r} is no name of a checkpoint\n  fix: letters, digits and any of _ . = , + -, such as step100; not {LATEST!r}")
    return tag


def latest(dir: Path) -> str | None:
    """The tag that ``latest`` names; None where there is no such file. Raises DamagedError."""
    path = dir / LATEST
    if not path.is_file():
        return None
    text = path.read_text(errors="replace").strip()
    if not _TAG.fullmatch(text):
        raise DamagedError(f"{path} is damaged: it holds {text[:80]!r}, which is no tag")
    return text


def point(dir: Path, tag: str) -> None:
    """Let ``latest`` name a tag, at once and lastingly."""
    fresh = dir / f".{LATEST}.{uuid.uuid4().hex[:8]}"
    try:
        with writing(dir / LATEST):
            with fresh.open("w") as file:
                file.write(tag)
                file.flush()
                os.fsync(file.fileno())
            os.rename(fresh, dir / LATEST)
            sync(dir)
    except CheckpointError:
        fresh.unlink(missing_ok=True)
        raise


def series(dir: Path) -> list[Found]:
    """The checkpoints of a folder: complete ones first, the newest first, then those that are partial or whose manifest is damaged. Files are not read."""
    tags: dict[str, None] = {}
    for path in sorted(dir.iterdir()) if dir.is_dir() else ():
        if path.is_dir() and (LEFT.fullmatch(path.name) or (path / MANIFEST).exists() or partial(path, (p.name for p in path.iterdir()))):
            left = LEFT.fullmatch(path.name)
            tags[left[1] if left else path.name] = None
    found = [_found(dir, tag) for tag in tags]
    return sorted(found, key=lambda f: (not f.fault, f.saved, f.step), reverse=True)


def _found(dir: Path, tag: str) -> Found:
    try:
        folder, manifest = find(dir / tag)
    except CheckpointError as error:
        left = leftovers(dir, tag)
        folder = dir / tag if (dir / tag).exists() or not left else left[0]
        what = f"{folder} is partial: a save into {tag} was cut off" if folder != dir / tag else str(error).split("\n", 1)[0]
        return Found(tag, folder, -1, folder.stat().st_mtime, what, not (folder / MANIFEST).exists())
    return Found(tag, folder, int(manifest.get("step", 0)), float(manifest.get("saved", (folder / MANIFEST).stat().st_mtime)), "")


def leftovers(dir: Path, tag: str | None = None) -> list[Path]:
    """What saves that were cut off have left; of one tag, or all."""
    return sorted(p for p in dir.iterdir() if (m := LEFT.fullmatch(p.name)) and p.is_dir() and tag in (None, m[1]))


def prune(dir: Path, keep: int | None) -> None:
    """Delete what is partial, and of the complete ones with an automatic tag all but the newest ``keep``; never the one that ``latest`` names."""
    pointed = latest(dir)
    for path in dir.glob(f".{LATEST}.*"):
        path.unlink()
    gone = [path for path in leftovers(dir) if not (path / MANIFEST).exists()]
    ours = [f.tag for f in series(dir) if not f.fault and AUTOMATIC.fullmatch(f.tag)]
    for tag in ours[keep:] if keep is not None else ():
        gone += [dir / tag, *leftovers(dir, tag)] if tag != pointed else []
    for path in gone:
        if path.exists():
            discard(path)
