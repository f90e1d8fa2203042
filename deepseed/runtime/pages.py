"""How a process holds its memory on Linux: what was freed is kept, and what is in use lies in huge pages.

A step allocates and frees the same sizes again and again. glibc gives large ones back to the system, which clears them anew at the next use: 10 to 17% of a CPU step. In pages of 4 KiB
each 2 MiB take 512 entries of the tables that a core looks addresses up in, and as many to be looked up for another rank that reads them (deepseed.runtime.attach): another 5 to 8%.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path

HUGE = 1 << 21
PAGE = 1 << 12
LEAST = 1 << 25  # bytes of a mapping that is looked at: more than a thread's stack
MOSTLY = HUGE // PAGE * 7 // 8  # pages of a huge one that are in use already: memory grows by less than an eighth
COLLAPSE = 25  # MADV_COLLAPSE, since Linux 6.1; whatever stands in /sys/kernel/mm/transparent_hugepage
LATER = (4, 32)  # steps after which memory has found its places: it takes some two seconds of a core for each GiB, what 50 steps save
_steps = count(1)


def settle() -> None:
    """After each step of this process: what is freed is kept from the first one on; what is in use later gets huge pages."""
    n = next(_steps)
    if n == 1:
        keep_freed_memory()
    elif n in LATER:
        huge_pages()


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory instead of giving it back and faulting it in again.

    After a first step: what libraries take there for good, as room to pack matrices, would lie among values that are freed, and later ones of their size would no longer fit there.
    True where it took effect. mallopt(3): M_TRIM_THRESHOLD = -1, M_MMAP_THRESHOLD = -3.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False  # another C library
    large = 2**31 - 1
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what compiling has left, first
    return bool(mallopt(-1, large)) & bool(mallopt(-3, large))


def huge_pages() -> int:
    """Make huge pages of this process's large anonymous memory where it is in use; bytes that are in such pages then (0: the system has none)."""
    if not sys.platform.startswith("linux"):
        return 0
    library = ctypes.CDLL(None)
    found = 0
    for low, high in _runs(library):
        if library.madvise(ctypes.c_void_p(low), ctypes.c_size_t(high - low), COLLAPSE) == 0:
            found += high - low
    return found


def _runs(library: ctypes.CDLL) -> Iterator[tuple[int, int]]:
    """Aligned ranges whose pages are in use, nearly all."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rights, _, _, _, *name = line.split()
        low, high = (int(end, 16) for end in span.split("-"))
        low, high = -(-low // HUGE) * HUGE, high // HUGE * HUGE
        if high - low < LEAST or not rights.startswith("rw-p") or name not in ([], ["[heap]"]):
            continue
        seen = (ctypes.c_ubyte * ((high - low) // PAGE))()
        if library.mincore(ctypes.c_void_p(low), ctypes.c_size_t(high - low), seen) != 0:
            continue
        there, each = bytes(seen), HUGE // PAGE
        full = [there.count(1, k, k + each) >= MOSTLY for k in range(0, len(there), each)]
        began = 0
        for k, used in enumerate([*full, False]):
            if not used:
                if k > began:
                    yield low + began * HUGE, low + k * HUGE
                began = k + 1
