"""What a key of ds_config.json says of itself: its type, its verdict and its note, beside each other on one line of a model.

A verdict is ``supported`` (DeepSeed does what DeepSpeed does), ``mapped`` (another knob does it, or it needs none; the note says which) or
``rejected`` (the note gives the reason and the nearest alternative). Where it depends on the value, ``Says.of`` decides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict

AUTO = "auto"
Kind = Literal["supported", "mapped", "rejected"]
T = TypeVar("T")


class ConfigError(ValueError):
    """A config that cannot be read, or asks for what cannot be: names the key, the reason and the fix."""


@dataclass(frozen=True)
class Says:
    """The verdict on a key. ``of``: value -> (verdict, note), where the value decides; ``each``: of a dict, (its key, value) -> the same."""

    kind: Kind
    note: str = ""
    of: Callable[[Any], tuple[Kind, str]] | None = None
    each: Callable[[str, Any], tuple[Kind, str]] | None = None

    def about(self, value: Any) -> tuple[Kind, str]:
        return self.of(value) if self.of is not None else (self.kind, self.note)


SUPPORTED = Says("supported")


def mapped(note: str) -> Says:
    return Says("mapped", note)


def rejected(note: str) -> Says:
    return Says("rejected", note)


def unless_off(note: str, off: tuple[Any, ...] = (False, None, 0)) -> Says:
    """Rejected where it is switched on; a key that says what is the case anyway is fine."""
    return Says("rejected", note, lambda v: ("mapped", "off, as it is here") if v in off else ("rejected", note))


class Section(BaseModel):
    """A section of the file: unknown keys are errors, and ``auto`` is a value that a Trainer fills in. ``SAYS``: of the section as a whole."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, protected_namespaces=())


def _count(value: Any) -> Any:
    """``5e8`` and ``"5e8"`` are the whole number 500000000."""
    _no_flag(value)
    if value is None or value == AUTO:
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        return value
    return int(number) if number == int(number) else value


def _number(value: Any) -> Any:
    _no_flag(value)
    if isinstance(value, str) and value != AUTO:
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _no_flag(value: Any) -> None:
    """To Python ``true`` is 1: nobody who writes it means that."""
    if isinstance(value, bool):
        raise ValueError(f"{str(value).lower()} is no number")


Auto = Literal["auto"]
Count = Annotated[int | Auto, BeforeValidator(_count)]
Number = Annotated[float | Auto, BeforeValidator(_number)]
Flag = bool | Auto
