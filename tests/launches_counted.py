"""Counts what Triton's interpreter launches in this process: for scripts that tests start, which put the folder of this file on the path."""

from __future__ import annotations

from typing import Any

from triton.runtime.interpreter import GridExecutor

launched = 0
_plain = GridExecutor.__call__


def _counted(self: Any, *args: Any, **kwargs: Any) -> Any:
    global launched
    launched += 1
    return _plain(self, *args, **kwargs)


GridExecutor.__call__ = _counted
