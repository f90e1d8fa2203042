"""The machine that times are estimated for: as ``deepseed calibrate`` measured it for this device, host and number of ranks, as a file or the words of ``--machine`` say, else the default."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from deepseed.runtime.executable import cache_dir
from deepseed.speed import Machine, MachineError, parse_machine

FORMAT = 1  # of the file


def device_kind(device: str = "cuda") -> str:
    """Of this host's accelerators, as their driver names them; ``cpu`` where there is none, or where the CPU is what is asked about."""
    return torch.cuda.get_device_name(0) if device == "cuda" and torch.cuda.is_available() else "cpu"


def path_of(ranks: int, kind: str | None = None) -> Path:
    """Where the machine of so many ranks on this host is written and looked for."""
    words = (kind or device_kind(), socket.gethostname(), f"{ranks} ranks")
    return cache_dir() / "machine" / ("-".join(re.sub(r"[^A-Za-z0-9.]+", "_", word) for word in words) + ".json")


def measured(ranks: int, kind: str | None = None) -> Machine | None:
    """What was measured here for so many ranks, of this host's accelerators or of another ``kind`` of device; None where nothing was."""
    path = path_of(ranks, kind)
    return read(path) if path.is_file() else None


def assumed(ranks: int) -> Machine:
    """What was measured here, else the default."""
    return measured(ranks) or Machine()


def machine_of(text: str, ranks: int) -> Machine:
    """What ``--machine`` says: ``measured``, a file of ``deepseed calibrate``, words as ``flops=300e12,link=1e11``; without a word, what is ``assumed``. Raises MachineError with the fix."""
    if not text:
        return assumed(ranks)
    if text == "measured":
        found = measured(ranks)
        if found is None:
            raise MachineError(f"--machine measured: nothing was measured on this host for {ranks} rank{'s' if ranks > 1 else ''} of {device_kind()}\n  fix: deepseed calibrate --world-size {ranks}")
        return found
    if text.endswith(".json"):
        return read(Path(text))
    return parse_machine(text)


def save(path: Path, machine: Machine, about: Mapping[str, Any]) -> None:
    """Write a machine, and what else is known ``about`` how it was measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.tmp")
    fresh.write_text(json.dumps({"format": FORMAT, "machine": asdict(machine), **about}, indent=1) + "\n")
    fresh.replace(path)


def read(path: Path) -> Machine:
    """Raises MachineError where the file is not there, or holds no machine."""
    fix = f"\n  fix: deepseed calibrate -o {path}"
    try:
        said = json.loads(path.read_text())
        values = said["machine"]
        rates = tuple((str(dtype), float(rate)) for dtype, rate in values.pop("rates", ()))
        known = {f.name for f in fields(Machine)} - {"rates"}
        if said["format"] != FORMAT or set(values) - known:
            raise MachineError(f"{path}: written by another version (format {said['format']}, this one reads {FORMAT}; {', '.join(sorted(set(values) - known)) or 'no unknown numbers'}){fix}")
        bad = [f"{name}={value}" for name, value in (*values.items(), *rates) if not isinstance(value, int | float) or not 0 < value < float("inf")]
        if bad:
            raise MachineError(f"{path}: numbers of a machine are above zero, not {', '.join(bad)}{fix}")
        return Machine(**values, rates=rates)
    except FileNotFoundError:
        raise MachineError(f"no file {path} for --machine{fix}") from None
    except MachineError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MachineError(f"{path} holds no machine: {type(error).__name__}: {error}{fix}") from None
