"""How far a compilation is, or other work of many parts: a bar on a terminal while it lasts, and one line at its end; nothing where it was quick, or this is not the rank that speaks.

    with Compiling(shown) as at:
        at("capture")
        at("passes", 3, 12, "lower_reshards")
        at("kernels", 7, 38)
"""

from __future__ import annotations

import logging
import os
import sys
from time import perf_counter
from types import TracebackType
from typing import Any

from deepseed.logs import asked, say

SOON = 0.5  # seconds after which there is a bar
SLOW = 2.0  # seconds of compiling that are worth a line


class Compiling:
    """Called with what begins, and how much of it is done; it draws by itself at no other time. ``words``: for what is done, and has been."""

    def __init__(self, shown: bool, words: tuple[str, str] = ("compiling", "compiled")) -> None:
        form, level, _ = asked(os.environ.get("DEEPSEED_LOG", ""))
        self._words, self._shown, self._drawn = words, shown, shown and form == "text" and level <= logging.INFO and sys.stderr.isatty()
        self._bar: Any = None
        self._seconds: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._began = self._last = perf_counter()
        self._what = ""

    def __call__(self, what: str, done: int = 0, of: int = 0, name: str = "") -> None:
        self._turn(what)
        if of:
            self._counts[what] = max(of, self._counts.get(what, 0))
        if self._drawn and self._last - self._began > SOON:
            self._draw(f"{what} {done} of {of} {name}" if of else what, done, of)

    def __enter__(self) -> Compiling:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._turn("")
        if kind is None and self._shown and self._last - self._began > SLOW:
            each = [(f"{self._counts[what]} {what}" if what == "kernels" else what, seconds) for what, seconds in self._seconds.items()]
            numbers: dict[str, Any] = {what: round(seconds, 3) for what, seconds in self._seconds.items()}
            say(f"{self._words[1]} in {self._last - self._began:.1f} s: {', '.join(f'{what} {seconds:.1f} s' for what, seconds in each)}", **numbers)

    def _turn(self, what: str) -> None:
        now = perf_counter()
        if self._what:
            self._seconds[self._what] = self._seconds.get(self._what, 0.0) + now - self._last
        self._last, self._what = now, what

    def _draw(self, text: str, done: int, of: int) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        if self._bar is None:
            from rich.console import Console

            columns = (TextColumn(f"deepseed: {self._words[0]}"), BarColumn(24), TextColumn("{task.description}"), TimeElapsedColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False, redirect_stdout=False)
            self._bar.add_task("", total=None)
            self._bar.start()
        (task,) = self._bar.task_ids
        self._bar.update(task, description=text, completed=done, total=of or None)
        self._bar.refresh()
