"""Where the main thread is, for a message: the line of the generated program, which is a node, and the line of the user's own script.

faulthandler reads its stack at one go. Frames of a thread that runs, walked in Python one after another, have crashed the interpreter
(CPython 3.11; python/cpython, issues 106092, 106883 and 111363), once in some hours of ranks that beat every second.
"""

from __future__ import annotations

import faulthandler
import linecache
import re
import sysconfig
import threading
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile

from deepseed.runtime.executable import cache_dir

_PACKAGE = str(Path(__file__).parent.parent) + "/"
_LIBRARIES = tuple({*(sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")), "<"})
_THREAD = re.compile(r"(?:Current thread|Thread) 0x([0-9a-f]+) ")
_FRAME = re.compile(r'  File "(.*)", line (\d+) in (.*)')
_ESCAPED = re.compile(r"\\x([0-9a-f]{2})|\\u([0-9a-f]{4})|\\U([0-9a-f]{8})")  # faulthandler writes ASCII


def main_thread() -> str:
    """``"%layers.0 = rt.wait(..) at train.py:20 in main"``, or "" where neither is on the stack."""
    with suppress(OSError), TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return of(file.read().decode("ascii", "replace"), threading.main_thread().ident or 0)
    return ""


def of(stacks: str, thread: int) -> str:
    """``stacks``: as faulthandler writes them, each from its innermost frame."""
    node = place = ""
    here, generated = False, tuple(f"{cache_dir() / folder}/" for folder in ("source", "kernels"))
    for line in stacks.splitlines():
        if (head := _THREAD.match(line)) is not None:
            here = int(head[1], 16) == thread
        elif here and not place and (frame := _FRAME.fullmatch(line)) is not None:
            path, number, name = (_ESCAPED.sub(lambda m: chr(int(m[1] or m[2] or m[3], 16)), part) for part in frame.groups())
            if path.startswith(generated):
                node = node or linecache.getline(path, int(number)).strip()
            elif not path.startswith((_PACKAGE, *_LIBRARIES)) and "site-packages" not in path:
                place = f"at {path}:{number} in {name}"
    return ", ".join(filter(None, (node, place)))
