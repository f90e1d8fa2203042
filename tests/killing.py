"""A process that saves and is killed at a moment that the test chooses."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from typing import Any

from deepseed.runtime import boxfile

LASTING = ((os, ("fsync", "rename", "mkdir", "unlink", "rmdir")), (boxfile, ("_parts",)), (json, ("dump",)))  # calls that make something last


def killed(save: Callable[[], Any], at: int) -> int | None:
    """Run ``save`` in a forked process that is killed before its ``at``-th such call; their number, if it is not that many."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        count = [0]

        def counted(function: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                if count[0] == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                count[0] += 1
                return function(*args, **kwargs)

            return call

        for module, calls in LASTING:
            for name in calls:
                setattr(module, name, counted(getattr(module, name)))
        try:
            save()
            os.write(writer, str(count[0]).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return int(said) if said else None
