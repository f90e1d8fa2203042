"""An error as OpenAI's clients expect it: a status and ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from typing import Any

from deepseed.runtime.errors import RankError


class ServeError(Exception):
    def __init__(self, status: int, message: str, *, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.headers = {"retry-after": str(retry_after)} if retry_after is not None else {}
        if status == 401:
            self.headers["www-authenticate"] = "Bearer"

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


class ClientGone(Exception):
    """Nobody reads the answer any more."""


class Lost(RuntimeError):
    """Replicas that have ended, in words for clients."""


def cause(error: BaseException) -> str:
    """What clients are told of an error of the server's: which rank or replica, else its kind; the rest is for the log."""
    if isinstance(error, RankError) and error.rank >= 0:
        return f"rank {error.rank} has ended"
    return str(error) if isinstance(error, Lost) else type(error).__name__
