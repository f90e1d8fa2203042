"""What goes wrong when ranks run together."""

from __future__ import annotations


class RankError(RuntimeError):
    """A rank failed, died or fell silent; ``rank`` is the culprit's number (-1: unknown)."""

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(message)
        self.rank = rank


class AgreementError(RuntimeError):
    """Ranks that would run different programs or different batches."""


class ElsewhereError(RuntimeError):
    """A computation with a parameter or buffer that other ranks of the pipeline store."""
