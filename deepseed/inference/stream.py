"""Requests from asyncio: one thread runs the engine's steps while anyone waits, and hands what is new to whoever asked.

    serving = Serving(engine)
    async for update in serving.stream("Once upon a time", SamplingParams(max_tokens=64)):
        print(update.text, end="")

Leaving the loop early, or a client that goes away, cancels the request and frees its blocks.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

from deepseed.inference.engine import Engine
from deepseed.inference.outputs import Update
from deepseed.inference.prompts import Prompt
from deepseed.inference.sampling import SamplingParams


class Serving:
    """One thread around an engine, for any number of event loops. Use the engine only through it while it is open."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._listeners: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Queue[Update | BaseException]]] = {}
        self._wake = threading.Condition()
        self._closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="deepseed-engine", daemon=True)
        self._thread.start()

    async def stream(self, prompt: Prompt, params: SamplingParams | None = None, request: str | None = None) -> AsyncIterator[Update]:
        """What each step gives the request, to its end; of ``n`` outputs in the order in which they come."""
        queue: asyncio.Queue[Update | BaseException] = asyncio.Queue()
        with self._wake:
            if self._error is not None or self._closed:
                raise RuntimeError("the engine has stopped") from self._error
            name = self.engine.add(prompt, params, request)
            self._listeners[name] = (asyncio.get_running_loop(), queue)
            self._wake.notify()
        left = params.n if params is not None else 1
        try:
            while left:
                item = await queue.get()
                if isinstance(item, BaseException):
                    raise RuntimeError("the engine has stopped") from item
                left -= item.finish_reason is not None
                yield item
        finally:
            self.cancel(name)

    def cancel(self, request: str) -> None:
        self._listeners.pop(request, None)
        self.engine.cancel(request)

    def close(self) -> None:
        """End the thread after the step under way."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    while self.engine.idle and not self._closed:
                        self._wake.wait()
                    if self._closed:
                        raise RuntimeError("it was closed")
                for update in self.engine.step():
                    self._tell(update.request, update)
        except BaseException as error:
            with self._wake:
                self._error = error
                for request in list(self._listeners):
                    self._tell(request, error)

    def _tell(self, request: str, item: Update | BaseException) -> None:
        found = self._listeners.get(request)
        if found is None:
            return
        loop, queue = found
        try:
            loop.call_soon_threadsafe(queue.put_nowait, item)
        except RuntimeError:  # its loop is closed
            self.cancel(request)
