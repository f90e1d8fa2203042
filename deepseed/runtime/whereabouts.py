"""Where a thread is, for a message: the line of the generated program, which is a node, and the line of the user's own script."""

from __future__ import annotations

import linecache
import sys
import sysconfig
import threading
from pathlib import Path
from types import FrameType

GENERATED = "deepseed.generated."
_PACKAGE = str(Path(__file__).parent.parent) + "/"
_LIBRARIES = tuple({*(sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")), "<"})


def main_thread() -> str:
    """``"%layers.0 = rt.wait(..) at train.py:20 in main"``, or "" where neither is on the stack."""
    return of(sys._current_frames().get(threading.main_thread().ident or 0))


def of(frame: FrameType | None) -> str:
    node = place = ""
    while frame is not None and not place:
        name, path = str(frame.f_globals.get("__name__", "")), frame.f_code.co_filename
        if name.startswith(GENERATED):
            node = node or linecache.getline(path, frame.f_lineno).strip()
        elif not path.startswith((_PACKAGE, *_LIBRARIES)) and "site-packages" not in path:
            place = f"at {path}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return ", ".join(filter(None, (node, place)))
