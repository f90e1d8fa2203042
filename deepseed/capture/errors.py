"""What capture raises: what cannot be captured, where in the user's code, and the cure."""

from __future__ import annotations


class CaptureError(ValueError):
    """A model, batch or optimizer that cannot be captured as one graph."""

    def __init__(self, what: str, *, path: str = "", line: str = "", fix: str = "") -> None:
        where = ", ".join(part for part in (f"at {path}" if path else "", line) if part)
        super().__init__(what + (f"\n  {where}" if where else "") + (f"\n  fix: {fix}" if fix else ""))


class BatchError(CaptureError):
    """A batch that does not fit the one that was captured."""
