"""Amounts of memory, as people write them."""

from __future__ import annotations

import re

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_bytes(text: str | int) -> int:
    """Raises ValueError on what is no amount above zero.

    >>> parse_bytes("256MiB"), parse_bytes("1.5 GB"), parse_bytes("4096"), parse_bytes("1e9")
    (268435456, 1500000000, 4096, 1000000000)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)\s*([kmgt]?i?b|)", str(text).strip().lower())
    if found is None or float(found[1]) <= 0:
        raise ValueError(f"{text!r} is no amount of memory: 256MiB, 8GiB, or a number of bytes above 0")
    return int(float(found[1]) * UNITS[found[2]])


def format_bytes(n: int) -> str:
    """The shortest way to write it that ``parse_bytes`` reads back exactly.

    >>> format_bytes(8 * 2**30), format_bytes(1500)
    ('8GiB', '1500')
    """
    for unit in ("tib", "gib", "mib", "kib"):
        if n % UNITS[unit] == 0 and n:
            return f"{n // UNITS[unit]}{unit[0].upper()}iB"
    return str(n)
