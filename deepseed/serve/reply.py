"""The way back to a client, and a bound for what clients leave unread."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from deepseed.serve.errors import ServeError

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
LAST_WORD = 1.0  # seconds for an error that nobody may be reading


class Reply:
    """The way back: one JSON object, or events and then, where it must be, an error among them."""

    def __init__(self, send: Send, transport: asyncio.Transport | None = None) -> None:
        self._send, self._transport = send, transport
        self.begun = self.ended = self.streams = self.cut = False
        self.read = False  # the whole of the request's body

    async def json(self, status: int, body: Any, headers: dict[str, str] | None = None, lies: Callable[[int], None] | None = None) -> None:
        """``lies`` is told how many bytes wait here for the client."""
        content = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
        named = {"content-type": "application/json", "content-length": str(len(content)), **(headers or {})}
        self.begun = True
        await self._send({"type": "http.response.start", "status": status, "headers": [(k.encode(), v.encode()) for k, v in named.items()]})
        if lies is not None:
            lies(len(content))
        await self._send({"type": "http.response.body", "body": content, "more_body": True})
        await self._send({"type": "http.response.body", "body": b""})  # waits until the client has taken most of it
        self.ended = True

    async def begin(self) -> None:
        self.begun = self.streams = True
        await self._send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]})

    async def events(self, objects: list[dict[str, Any]]) -> None:
        if objects:
            text = "".join(f"data: {json.dumps(o, ensure_ascii=False, separators=(',', ':'))}\n\n" for o in objects)
            await self._send({"type": "http.response.body", "body": text.encode("utf-8", "replace"), "more_body": True})

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
        self.ended = True

    async def error(self, error: ServeError) -> None:
        try:
            async with asyncio.timeout(LAST_WORD):
                if not self.begun:
                    await self.json(error.status, error.body(), error.headers | ({} if self.read else {"connection": "close"}))
                elif self.streams and not self.ended:
                    await self.events([error.body()])
                    await self.end()
        except TimeoutError:
            pass
        self.abort()

    def abort(self) -> None:
        """Close the connection where the answer is not whole, and forget what it has not taken."""
        if not self.ended:
            self.cut = True
            if self._transport is not None:
                self._transport.abort()


class Unread:
    """Bytes of answers that lie here, by whose they are; in the event loop alone."""

    def __init__(self, most: int) -> None:
        self.most, self.total = most, 0
        self._of: dict[Reply, int] = {}

    def add(self, reply: Reply, size: int) -> None:
        if reply.cut:
            return
        self._of[reply] = self._of.get(reply, 0) + size
        self.total += size
        while self.total > self.most:
            worst = max(self._of, key=self._of.__getitem__)
            self.forget(worst)
            worst.abort()

    def forget(self, reply: Reply) -> None:
        self.total -= self._of.pop(reply, 0)
