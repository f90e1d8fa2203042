"""What becomes of every key that a config has: one row a key, in the order of the file."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from dataclasses import dataclass
from types import UnionType
from typing import Any

from deepseed.config.auto import FILLED
from deepseed.config.fields import AUTO, Kind, Says, Section
from deepseed.config.model import Config

AUTO_NOTE = "the HF Trainer fills it in"


@dataclass(frozen=True)
class Verdict:
    """``key``: its path, ``zero_optimization.stage``."""

    key: str
    verdict: Kind
    note: str = ""


def verdicts(config: Config) -> list[Verdict]:
    """A row for every key that was written; of a section whose keys have rows of their own, none unless it is rejected."""
    return list(_rows(config, ""))


def rejections(config: Config) -> list[Verdict]:
    return [v for v in verdicts(config) if v.verdict == "rejected"]


def _rows(section: Section, prefix: str) -> Iterator[Verdict]:
    written = section.model_fields_set
    for name, field in type(section).model_fields.items():
        if name not in written:
            continue
        value = getattr(section, name)
        key = f"{prefix}{field.alias or name}"
        if isinstance(value, Section) and value.model_fields_set:
            yield from _rows(value, f"{key}.")
            continue
        says = next((m for m in field.metadata if isinstance(m, Says)), None)
        if says is None:
            raise TypeError(f"{type(section).__name__}.{name} says nothing of itself")
        if says.each is not None and value:
            yield from (_verdict(f"{key}.{k}", v, says.each(k, v)) for k, v in value.items())
        else:
            yield _verdict(key, value, says.about(value))


def _verdict(key: str, value: Any, said: tuple[Kind, str]) -> Verdict:
    if value != AUTO:
        return Verdict(key, *said)
    return Verdict(key, "supported", AUTO_NOTE) if key in FILLED else Verdict(key, "rejected", '"auto" is nothing that the HF Trainer fills in here; say a value')


def sections_of(annotation: Any) -> list[type[Section]]:
    """The sections that a field can hold."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, UnionType, typing.Annotated):
        return [s for each in typing.get_args(annotation) for s in sections_of(each)]
    return []
