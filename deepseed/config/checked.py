"""What ``deepseed config check`` says of a file: a row for each key, and the plan that equals it."""

from __future__ import annotations

from dataclasses import dataclass, field

from deepseed.config.auto import by_default
from deepseed.config.fields import ConfigError
from deepseed.config.read import Source, raw_config, read
from deepseed.config.settings import settings
from deepseed.config.verdicts import AUTO_NOTE, Verdict, verdicts


@dataclass(frozen=True)
class Checked:
    """``plan``: None where ``error`` says why. ``auto``: keys that a Trainer fills in; the plan is that of its default arguments. ``read``: whether the file could be read."""

    keys: list[Verdict] = field(default_factory=list)
    plan: str | None = None
    auto: list[str] = field(default_factory=list)
    error: str | None = None
    read: bool = True

    def __str__(self) -> str:
        wide = max((len(row.key) for row in self.keys), default=0)
        rows = [f"{row.key:{wide}}  {row.verdict:9}  {row.note}".rstrip() for row in self.keys]
        if self.plan is None:
            return "\n".join([*rows, "", f"no plan: {self.error}"])
        note = '   ("auto" as the HF Trainer\'s default arguments fill it in)' if self.auto else ""
        return "\n".join([*rows, "", f"plan: {self.plan}{note}", f"next: deepseed explain TARGET --plan '{self.plan}'"])


def checked(source: Source, world_size: int | None = None) -> Checked:
    try:
        config = read(source)
    except ConfigError as error:
        return Checked(error=str(error), read=False)
    rows = verdicts(config)
    autos = [row.key for row in rows if row.note == AUTO_NOTE]
    try:
        plan = settings(read(by_default(raw_config(source)[0], world_size)) if autos else config, world_size).plan
    except ConfigError as error:
        return Checked(rows, None, autos, str(error))
    return Checked(rows, plan, autos)
