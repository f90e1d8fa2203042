"""Programs that the passes gave before, in the cache folder: a job that starts again runs none of them.

An entry is found by what decides what the passes give: the captured program, the plan, the arguments of every pass, the machine that was measured,
DeepSeed's own source, and the versions of torch and of the solver. It was checked pass by pass when it was written; when it is read it is parsed, typed, and
those of its instances are executed that never were, as with a text that comes from another rank. What is damaged is not there.

What a process changes in a pass's module in its own memory is in no key: such a process sets ``DEEPSEED_REMEMBER=0``, and nothing is read or written.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from time import time
from typing import Any

import scipy
import torch

from deepseed.ir import sources
from deepseed.ir.contract import Pass
from deepseed.ir.program import Program
from deepseed.pipeline import PIPELINE
from deepseed.plan import Plan
from deepseed.runtime.executable import cache_dir
from deepseed.speed import Machine

_BEGAN = time()  # the modules that run are those that were there now
WORTH = 0.25  # seconds of passes, from which on their program is written
MOST = 1024  # programs that are kept; the one that was asked for longest ago goes first


@dataclass(frozen=True)
class Took:
    """What is known of a pass that ran when an entry was written: seconds without its checks, instances and values as deepseed.pipeline.Passed has them."""

    name: str
    seconds: float
    instances: int
    unproved: tuple[str, ...]


@dataclass(frozen=True)
class Entry:
    """The text after the last pass that all ranks share, what each took, and what a budget chose."""

    text: str
    passes: tuple[Took, ...]
    said: tuple[str, ...] = ()


def key_of(p: Program, plan: Plan, arguments: Mapping[str, Any], passes: Sequence[Pass], machine: Machine | None) -> str | None:
    """Of a program before the ``passes``, with the ``arguments`` that the plan gives them. None where nothing is to be kept, or they are not DeepSeed's own, whose source is known."""
    if os.environ.get("DEEPSEED_REMEMBER") == "0" or [id(each) for each in passes] != [id(each) for each in PIPELINE[: len(passes)]] or (source := source_hash()) is None:
        return None
    what = (source, torch.__version__, scipy.__version__, str(plan), repr(sorted(arguments.items())), [each.name for each in passes], repr(machine), str(p))
    return hashlib.sha256(repr(what).encode()).hexdigest()


@cache
def source_hash() -> str | None:
    """Changes with any file of the package; None where one was written after this process had begun, which may run what was there before."""
    found = sources.files()
    return None if any(path.stat().st_ctime >= _BEGAN for path in found) else sources.digest(found)


def read(key: str) -> Entry | None:
    """The entry of ``key``; None where there is none, or what is there is no whole entry."""
    path = _path(key)
    try:
        raw = path.read_bytes()
        said = json.loads(zlib.decompress(raw[32:]))
        if hashlib.sha256(key.encode() + raw[32:]).digest() != raw[:32]:
            return None
        with suppress(OSError):  # a folder that is only read
            os.utime(path)
        return Entry(said["text"], tuple(Took(**{**each, "unproved": tuple(each["unproved"])}) for each in said["passes"]), tuple(said["said"]))
    except (OSError, ValueError, KeyError, TypeError, zlib.error):
        return None


def write(key: str, entry: Entry) -> None:
    """Keep an entry, where the folder lets it; the one asked for longest ago goes for it where there are ``MOST``."""
    body = zlib.compress(json.dumps(asdict(entry)).encode(), 1)
    path = _path(key)
    fresh = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_bytes(hashlib.sha256(key.encode() + body).digest() + body)
        fresh.replace(path)
        held = sorted(path.parent.iterdir(), key=lambda file: file.stat().st_mtime)  # with what is left of a process that was killed
        for file in held[: max(0, len(held) - MOST)]:
            file.unlink(missing_ok=True)
    except OSError:
        return


def _path(key: str) -> Path:
    return cache_dir() / "programs" / f"{key[:32]}.program"
