"""From an engine to a socket, until a signal: what has begun ends, what comes is refused, and the exit code is 0."""

from __future__ import annotations

import asyncio
import errno
import math
import signal
import socket
from typing import Any

import typer
import uvicorn

from deepseed.friendly import UsageError
from deepseed.serve.app import Limits, Server
from deepseed.serve.connection import within
from deepseed.serve.reply import LAST_WORD
from deepseed.serve.served import Served


class Serving(uvicorn.Server):
    """Over a socket; at the end ``drain`` seconds for requests that are there, which then are told that it is over."""

    def __init__(self, server: Server, drain: float = 60.0, **more: Any) -> None:
        config: Any = uvicorn.Config(server.app, http=within(server.limits.body_timeout), timeout_graceful_shutdown=math.ceil(drain + 2 * LAST_WORD), server_header=False, **more)
        super().__init__(config)
        self._server, self._drain = server, drain

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._server.draining = True
        timer = asyncio.get_running_loop().call_later(self._drain, self._server.cut)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()


def run(
    engine: Served, name: str, listening: socket.socket, *, api_key: str | None = None, queue: int = 256, body: int = 4 << 20, timeout: float = 600.0, body_timeout: float = 30.0,
    unread: int = 64 << 20, drain: float = 60.0, log_level: str = "warning",
) -> int:  # fmt: skip
    """0 after a signal, 1 where the engine has failed. ``listening``: a socket that ``bound`` has made, which is closed at the end."""
    failed: list[BaseException] = []
    uv: Any = None

    def died(error: BaseException) -> None:
        failed.append(error)
        uv.should_exit = True

    uv = Serving(Server(engine, name, Limits(queue, body, timeout, body_timeout, unread), api_key, died), drain, log_level=log_level, access_log=log_level == "debug")

    def ends(number: int, frame: Any) -> None:
        uv.should_exit = True

    before = {number: signal.signal(number, ends) for number in (signal.SIGTERM, signal.SIGINT)}  # uvicorn passes on to these what it got
    listening.listen(2048)
    host, port, *_ = listening.getsockname()
    where = f"[{host}]" if ":" in host else host
    typer.echo(f"serving {name} at http://{where}:{port}/v1, its page at /; {engine.room}")
    try:
        uv.run(sockets=[listening])
    finally:
        listening.close()
        for number, old in before.items():
            signal.signal(number, old)
    if failed:
        typer.echo(f"the engine has failed: {type(failed[0]).__name__}: {failed[0]}")
    return 1 if failed else 0


def bound(host: str, port: int) -> socket.socket:
    """A socket that has its address and does not listen yet: nobody connects to a server that is not ready."""
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except OSError as error:
        made.close()
        here = not isinstance(error, socket.gaierror) and error.errno != errno.EADDRNOTAVAIL
        fix = "another --port, or 0 for a free one" if here else "a --host of this machine, such as 127.0.0.1, or 0.0.0.0 for every interface"
        raise UsageError(f"cannot listen at {host}:{port}: {error.strerror}\n  fix: {fix}") from None
    return made
