"""Why another program is compiled: what differs from the program before, and what to do where the same thing differs each time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deepseed.batches import type_text
from deepseed.capture import BatchSpec
from deepseed.capture.attributes import MISSING, Change, short

OFTEN = 3  # compilations in a row with one cause, after which the cure is said


@dataclass(frozen=True)
class Cause:
    """One thing that differs: which (the same words each time), from what to what, and the cure if it keeps differing."""

    what: str
    change: str
    cure: str

    def __str__(self) -> str:
        return f"{self.what} {self.change}"


def causes(
    before: BatchSpec, batch: BatchSpec, settings: Sequence[tuple[str, object, object]], changes: Sequence[Change], read: Sequence[tuple[str, object, object]]
) -> list[Cause]:
    """``settings``: (name, then, now) of modes and options; ``changes``: Python values that the model reads; ``read``: values that
    the model reads out of its batch."""
    out = [*_entries(before.types, batch.types, before.constants, batch.constants)]
    out += [Cause(f"the {name}", f"{short(then)} -> {short(now)}", _OPTION if "option" in name else _MODE) for name, then, now in settings if then != now]
    out += [Cause(c.path + (f" ({c.line})" if c.line else ""), f"{c.then} -> {c.now}", _ATTRIBUTE) for c in changes]
    out += [Cause(name, f"{short(then)} -> {short(now)}", _READ) for name, then, now in read if then != now]
    return out


class Streak:
    """Counts causes over compilations in a row."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def often(self, these: Sequence[Cause]) -> list[Cause]:
        """Those that come for the ``OFTEN``-th time in a row, or a multiple of it."""
        self._counts = {c.what: self._counts.get(c.what, 0) + 1 for c in these}
        return [c for c in these if self._counts[c.what] % OFTEN == 0]


def _entries(types: Mapping[str, Any], new: Mapping[str, Any], constants: Mapping[str, Any], others: Mapping[str, Any]) -> list[Cause]:
    out = []
    for key in dict.fromkeys([*types, *constants, *new, *others]):
        name = f'batch entry "{key}"'
        then, now = types.get(key, constants.get(key, MISSING)), new.get(key, others.get(key, MISSING))
        if key in types and key in new:
            if then != now:
                out.append(Cause(name, f"{type_text(then)} -> {type_text(now)}", _SHAPE if then.dtype == now.dtype else _DTYPE))
        elif key in constants and key in others:
            if type(then) is not type(now) or then != now:
                number = isinstance(now, int | float) and not isinstance(now, bool)
                kind = "number" if number else type(now).__name__
                cure = f"make it a tensor: torch.tensor({short(now)})" if number else "leave it out of the batch, unless the model reads it"
                out.append(Cause(name, f"is a Python {kind} that changed {short(then)} -> {short(now)}", cure))
        else:
            said = [type_text(v) if k in t else short(v) for v, k, t in ((then, key, types), (now, key, new))]
            out.append(Cause(name, f"{said[0]} -> {said[1]}", "give every batch the same entries"))
    return out


_SHAPE = "pad batches to few lengths: compile(..., buckets=deepseed.Bucket(...))"
_DTYPE = "give it one dtype"
_OPTION = "change it seldom, or use an option that is an input of the program, as lr is"
_MODE = "change it seldom: each combination is a program"
_ATTRIBUTE = "keep what changes in a buffer of the module (register_buffer), as a tensor, or put it into the batch"
_READ = "compute with tensors (torch.where) in place of the Python branch"
