"""What DeepSeed says on its way: the logger ``deepseed`` of ``logging``, whose records carry ``rank`` and ``step``.

``DEEPSEED_LOG`` has the form and the least level, joined by a comma: ``text`` (the default) is one line, ``deepseed: ..``, and ``json`` an object a line, with
``time``, ``level``, ``rank``, ``step``, ``message`` and what else is known. ``DEEPSEED_LOG=json,warning``. Handlers of a script's own are added as to any logger.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
FORMS = ("text", "json")
logger = logging.getLogger("deepseed")
_step: ContextVar[int | None] = ContextVar("step", default=None)


def say(line: str, level: int = logging.INFO, **fields: Any) -> None:
    """One message, of which ``fields`` are the numbers: a JSON record has them beside it."""
    logger.log(level, line, extra={"rank": rank(), "step": fields.pop("step", _step.get()), "fields": fields})


def warn(line: str, **fields: Any) -> None:
    say(line, logging.WARNING, **fields)


def fail(line: str, **fields: Any) -> None:
    say(line, logging.ERROR, **fields)


@contextmanager
def at_step(step: int) -> Iterator[None]:
    """What is said inside of it is said of this step."""
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


def rank() -> int:
    """This process's, of the process group or of the launcher; 0 alone."""
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        return int(dist.get_rank())
    word = os.environ.get("RANK", "0")
    return int(word) if word.isdecimal() else 0


def asked(words: str) -> tuple[str, int, list[str]]:
    """Form, level, and the words that are neither.

    >>> asked("json,warning"), asked(""), asked("xml")
    (('json', 30, []), ('text', 20, []), ('text', 20, ['xml']))
    """
    said = [word.strip().lower() for word in words.split(",") if word.strip()]
    form = next((word for word in said if word in FORMS), "text")
    level = next((LEVELS[word] for word in said if word in LEVELS), logging.INFO)
    return form, level, [word for word in said if word not in FORMS and word not in LEVELS]


class _Stderr(logging.Handler):
    """Writes to what ``sys.stderr`` is at the time, as the environment says at the time."""

    _told = False

    def emit(self, record: logging.LogRecord) -> None:
        form, level, unknown = asked(os.environ.get("DEEPSEED_LOG", ""))
        if unknown and not self._told:
            self._told = True
            print(f"deepseed: DEEPSEED_LOG has {', '.join(unknown)}\n  fix: one of {', '.join(FORMS)} and one of {', '.join(LEVELS)}, as DEEPSEED_LOG=json,warning", file=sys.stderr)
        if record.levelno >= level:
            print(as_json(record) if form == "json" else f"deepseed: {record.getMessage()}", file=sys.stderr, flush=True)


def as_json(record: logging.LogRecord) -> str:
    known = {"time": round(record.created, 3), "level": record.levelname.lower(), "rank": getattr(record, "rank", None), "step": getattr(record, "step", None)}
    return json.dumps(known | {"message": record.getMessage()} | getattr(record, "fields", {}), default=str)


if not logger.handlers:
    logger.addHandler(_Stderr())
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
