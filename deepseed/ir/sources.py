"""The package's own source, as part of the names under which results of it are kept."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent


def files(*parts: str) -> list[Path]:
    """The Python files of the package, or of some folders and files in it; what is behind links too."""
    found: list[Path] = []
    for part in parts or ("",):
        if (ROOT / part).is_file():
            found.append(ROOT / part)
        for folder, _, names in os.walk(ROOT / part, followlinks=True):
            found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found)


def digest(paths: Iterable[Path]) -> str:
    """Changes with names and content."""
    text = hashlib.sha256()
    for path in paths:
        text.update(f"{path.relative_to(ROOT)} ".encode() + path.read_bytes())
    return text.hexdigest()
