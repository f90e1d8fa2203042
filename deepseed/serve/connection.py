"""One connection, as uvicorn's h11 has it, and what that leaves open: a mistake in HTTP itself is answered by an error object, a request that does not begin in time
ends, and a connection can be cut, which lets go of what nobody reads."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import MutableMapping
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from deepseed.serve.errors import ServeError

TRANSPORT = "deepseed.transport"  # its key in a request's scope


class Connection(H11Protocol):
    seconds = 30.0  # for the first line and the headers of a request
    _begins: asyncio.TimerHandle | None = None

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        app = self.app

        async def with_transport(scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
            await app({**scope, TRANSPORT: self.transport}, receive, send)

        self.app: Any = with_transport

    @property
    def busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._begins = self.loop.call_later(self.seconds, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._begun()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._begins is None and not self.busy:
            self._begins = self.loop.call_later(self.seconds, self._late)
        super().data_received(data)
        if self.busy:
            self._begun()

    def send_400_response(self, msg: str) -> None:
        """Called where h11 cannot read on."""
        error = sys.exc_info()[1]
        self._answer(ServeError(getattr(error, "error_status_hint", 400) or 400, f"no HTTP that can be read: {error or msg}"[:300]))

    def _begun(self) -> None:
        if self._begins is not None:
            self._begins.cancel()
            self._begins = None

    def _late(self) -> None:
        self._begins = None
        if not self.busy:
            self._answer(ServeError(408, f"the request did not begin within {self.seconds:g} s", kind="timeout_error", code="timeout"))

    def _answer(self, error: ServeError) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        body = json.dumps(error.body()).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), (b"connection", b"close")]
        for event in (h11.Response(status_code=error.status, headers=headers, reason=b""), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def within(seconds: float) -> type[Connection]:
    return type("Connection", (Connection,), {"seconds": seconds})
