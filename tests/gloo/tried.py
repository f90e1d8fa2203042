"""What goes wrong on a rank, by name: its message and how long it took, while the rank goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


class Tried(dict[str, Any]):
    """``messages`` and ``seconds`` by name; a call does one thing that may fail."""

    def __init__(self) -> None:
        super().__init__(messages={}, seconds={})

    def __call__(self, name: str, do: Callable[[], Any]) -> None:
        began = time.monotonic()
        try:
            do()
            self["messages"][name] = "no error"
        except Exception as error:
            self["messages"][name] = f"{type(error).__name__}: {error}"
        self["seconds"][name] = time.monotonic() - began
