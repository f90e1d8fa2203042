"""What checkpoints a folder holds, and whether they are whole: ``deepseed checkpoint ls`` looks at sizes, ``verify`` reads every byte."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from deepseed.runtime.folder import LEFT, MANIFEST, CheckpointError, DamagedError, faults, manifest_of
from deepseed.runtime.series import LATEST, latest, leftovers, series


@dataclass
class Listed:
    """One checkpoint. ``state``: complete, partial (its save was cut off) or damaged; ``why``: what is missing or of another size."""

    tag: str
    path: str
    state: str
    step: int | None = None
    plan: str = ""
    ranks: int | None = None
    bytes: int = 0
    latest: bool = False
    why: list[str] = field(default_factory=list)


def listed(where: str | os.PathLike[str], read: bool = False) -> list[Listed]:
    """The checkpoint at ``where``, or those in it, by step. ``read``: check the sums too. Raises CheckpointError where there is none."""
    folder = Path(os.path.realpath(where))
    if not folder.is_dir():
        raise CheckpointError(f"{where}: no such folder\n  fix: the folder that step.save, Checkpoints or save_checkpoint was given")
    if _ours(folder):
        return [_one(folder.name, folder, read)]
    named, wrong = None, ""
    try:
        named = latest(folder)
    except DamagedError as error:
        wrong = str(error)
    known = series(folder)
    if not any(_ours(each.folder) or each.tag == named for each in known):
        known = []  # what has no manifest at all is somebody else's
    shown = {each.folder for each in known}
    found = [_one(each.tag if not each.fault else each.folder.name, each.folder, read) for each in known]
    found += [_one(p.name, p, read) for p in leftovers(folder) if p not in shown]
    for each in found:
        each.latest = each.tag == named
    if named is not None and all(each.tag != named for each in found):
        found.append(Listed(named, str(folder / named), "damaged", latest=True, why=[f"{folder / named} is missing: {folder / LATEST} names it"]))
    if wrong:
        found.append(Listed(LATEST, str(folder / LATEST), "damaged", why=[wrong]))
    if not found:
        holds = ", ".join(sorted(p.name for p in folder.iterdir())[:3]) or "nothing"
        raise CheckpointError(f"{folder} holds no checkpoint of deepseed: it holds {holds}\n  fix: deepseed checkpoint import SOURCE DEST reads those of others")
    return sorted(found, key=lambda each: (each.step is None, each.step or 0, each.tag))


def _ours(folder: Path) -> bool:
    return (folder / MANIFEST).is_file() or LEFT.fullmatch(folder.name) is not None or (any(p.suffix == ".distcp" for p in folder.iterdir()) and not (folder / ".metadata").is_file())


def _one(tag: str, folder: Path, read: bool) -> Listed:
    size = sum(p.stat().st_size for p in folder.iterdir() if p.is_file())
    out = Listed(tag, str(folder), "complete", bytes=size)
    if not (folder / MANIFEST).is_file():
        out.state, out.why = "partial", [f"{folder / MANIFEST} is missing: a save was cut off before its end"]
        return out
    try:
        manifest: dict[str, Any] = manifest_of(folder)
    except CheckpointError as error:
        out.state, out.why = "damaged", [str(error).splitlines()[0]]
        return out
    out.step, out.plan = manifest.get("step"), str(manifest.get("plan", ""))
    out.ranks = prod(manifest["mesh"].values()) if "mesh" in manifest else None
    out.why = faults(folder, manifest["files"], sorted(manifest["files"]), sizes=not read)
    out.state = "damaged" if out.why else "complete"
    return out

