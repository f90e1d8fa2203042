"""Files of ``torch.save`` that others wrote, read without running what is in them: ``torch.load(weights_only=True)``, on the file's own pages.

DeepSpeed's files name classes of its own (a loss scaler, an enum, a range of a partition). Each such name gets an inert stand-in, which keeps what it was
made with and does nothing; any other name is refused before the file is read.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseed.runtime.folder import CheckpointError

INERT = ("deepspeed.", "argparse.Namespace", "numpy.dtype", "numpy.ndarray", "numpy.core.multiarray.", "numpy._core.multiarray.")  # data, in such files; a stand-in for each


class Record:
    """What stands for an object of a class that is not there. ``arguments``: what it was made with; the rest of its state are attributes."""

    arguments: tuple[Any, ...]

    def __new__(cls, *arguments: Any) -> Record:
        made = super().__new__(cls)
        made.arguments = arguments
        return made

    def __init__(self, *arguments: Any) -> None:
        return None

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})

    def get(self, name: str, default: Any = None) -> Any:
        return self.__dict__.get(name, default)


def load(path: Path) -> Any:
    """What a file holds, tensors on its own pages. Raises CheckpointError where it is missing or torn, or names anything that is no record."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing\n  fix: copy the whole folder, the files of all ranks")
    try:
        named = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        if strange := [name for name in named if not name.startswith(INERT)]:
            raise CheckpointError(
                f"{path} names {strange[0]}, which is neither a tensor nor a record of DeepSpeed: to read it could run code, so it was not read\n"
                "  fix: import only checkpoints that you trust; save its client state as numbers, strings, tensors, lists and dicts"
            )
        stand_ins = [(type(name.rpartition(".")[2], (Record,), {"__module__": "deepseed.importing.records"}), name) for name in named]
        with torch.serialization.safe_globals(stand_ins):  # type: ignore[arg-type]
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except CheckpointError:
        raise
    except (RuntimeError, ValueError, EOFError, KeyError, TypeError, AttributeError, OSError, pickle.UnpicklingError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise CheckpointError(f"{path} is torn, or no file of torch.save: {type(error).__name__}: {first} ({path.stat().st_size} bytes)\n  fix: copy it again, or import another checkpoint") from error


def mapping(path: Path) -> dict[str, Any]:
    """A file that holds a dict. Raises CheckpointError."""
    found = load(path)
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, not a dict")
    return {str(key): value for key, value in found.items()}


def plain(value: Any) -> bool:
    """Whether a value is numbers, strings, tensors, and lists and dicts of them."""
    if isinstance(value, Mapping):
        return all(plain(k) and plain(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(plain(v) for v in value)
    return value is None or isinstance(value, bool | int | float | str | Tensor)


def kept(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What of a dict is plain data, and the names of the rest. Tensors get memory of their own."""
    return {k: _own(v) for k, v in values.items() if plain(v)}, [k for k, v in values.items() if not plain(v)]


def _own(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _own(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_own(v) for v in value) if type(value) in (list, tuple) else [_own(v) for v in value]
    return value.clone() if isinstance(value, Tensor) else value
