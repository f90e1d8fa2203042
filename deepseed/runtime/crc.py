"""zlib's crc32, by the fastest that this Python has at hand: liblzma, which its module ``lzma`` is linked with, computes the same sum with carry-less
products from 5.6 on, more than twice as fast. The GIL is free meanwhile."""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

SMALL = 2**14  # bytes: fewer are not worth a foreign call
_CARRY_LESS = 50060020  # liblzma 5.6.2
_SAMPLE = bytes(range(256)) * 17 + b"deepseed"


def crc32(data: Any, value: int = 0) -> int:
    """As ``zlib.crc32``, of contiguous bytes."""
    sums = _linked()
    if sums is None or len(data) < SMALL:
        return zlib.crc32(data, value)
    here = np.frombuffer(data, np.uint8)
    return sums(here.__array_interface__["data"][0], here.nbytes, value)


@cache
def _linked() -> Callable[[int, int, int], int] | None:
    """liblzma's, where there is one that is fast and agrees with zlib's."""
    try:
        import _lzma  # a Python without it has none

        library = ctypes.CDLL(_lzma.__file__)  # what the module is linked with is found by its own handle
        sums, version = library.lzma_crc32, library.lzma_version_number
    except (ImportError, AttributeError, OSError):
        return None
    version.restype = sums.restype = ctypes.c_uint32
    sums.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint32
    sample = np.frombuffer(_SAMPLE, np.uint8)
    agrees = sums(sample.__array_interface__["data"][0], sample.nbytes, 1) == zlib.crc32(_SAMPLE, 1)
    return sums if version() >= _CARRY_LESS and agrees else None
