"""Routes, keys, limits, errors. Every error is an OpenAI error object; nothing here waits but by ``await``.

429 is the answer where no place is free, before the body is read and after. A request holds its places from then until the engine is done with it, read or not; what
clients have not read is bounded in bytes, all together, and who has left the most is cut off. Reading, waiting, computing and sending share a request's time. Whoever
leaves takes the request along, and its blocks come back after the step under way.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from deepseed.inference.outputs import Output
from deepseed.inference.sampling import SamplingParams
from deepseed.serve.answers import ChatAnswer, CompletionAnswer, usage
from deepseed.serve.connection import TRANSPORT
from deepseed.serve.errors import ClientGone, ServeError
from deepseed.serve.metrics import Metrics
from deepseed.serve.protocol import ChatRequest, CompletionRequest
from deepseed.serve.replicas import Replicas
from deepseed.serve.reply import Reply, Send, Unread
from deepseed.serve.served import Served
from deepseed.serve.text import Prepared, Texts
from deepseed.serve.worker import Tickets, Worker

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

LOG = logging.getLogger("deepseed.serve")
PAGE = Path(__file__).with_name("status.html")
COMPILING = 10.0  # seconds for the form of an output
BODIES = 32  # of the largest size, that may be under way
LINGER = 2.0  # seconds in which the rest of a body that is too large is read and thrown away


@dataclass(frozen=True)
class Limits:
    queue: int = 256  # outputs beyond those that one step computes
    body: int = 4 << 20  # bytes
    timeout: float = 600.0  # seconds
    body_timeout: float = 30.0  # seconds for a body to come, and for its headers
    unread: int = 64 << 20  # bytes of answers that clients have not taken, all together


class Server:
    """One engine behind one application. ``died`` is called in the engine's thread when it has failed."""

    def __init__(self, engine: Served, name: str, limits: Limits | None = None, api_key: str | None = None, died: Callable[[BaseException], None] | None = None) -> None:
        self.limits, self.key = limits or Limits(), api_key
        self.metrics = Metrics(name)
        self.texts = Texts(engine, name)
        self.worker = Worker(engine, self.metrics, died)
        self.text_thread = ThreadPoolExecutor(1, "deepseed-text")  # one: tokenizers keep state
        self.form_threads = ThreadPoolExecutor(2, "deepseed-form")
        self.engine = engine
        self.taken = 0  # outputs of requests that are prepared, computed or wait
        self.receiving = 0  # bytes of bodies that have not come whole
        self.unread = Unread(self.limits.unread)
        self._timers: set[asyncio.Timeout] = set()
        self.draining = self._over = False
        self.created = int(time.time())
        self.app: Any = _application(self)

    @property
    def capacity(self) -> int:
        return self.engine.sequences + self.limits.queue

    @property
    def ends(self) -> str | None:
        """Why nobody new is served."""
        return "the engine has stopped" if not self.worker.alive else "the server ends, and serves nobody new" if self.draining else None

    def close(self) -> None:
        self.worker.close()
        for threads in (self.text_thread, self.form_threads):
            threads.shutdown(wait=False, cancel_futures=True)

    def card(self) -> dict[str, Any]:
        return {"id": self.texts.name, "object": "model", "created": self.created, "owned_by": "deepseed", "max_model_len": self.texts.longest, "vocab_size": self.texts.vocabulary}

    def refuse(self, error: ServeError) -> Response:
        self.metrics.refused[error.status] += 1
        return JSONResponse(error.body(), error.status, error.headers)

    @contextmanager
    def place(self) -> Iterator[Place]:
        if self.taken >= self.capacity:
            raise self.full(1)
        made = Place(self)
        try:
            yield made
        finally:
            made.take(0)

    @asynccontextmanager
    async def within(self, seconds: float) -> AsyncIterator[None]:
        """The time of a request: 408 where it is over, 503 where the server's is."""
        try:
            async with asyncio.timeout(0 if self._over else seconds) as timer:
                self._timers.add(timer)
                try:
                    yield
                finally:
                    self._timers.discard(timer)
        except TimeoutError:
            if self._over:
                raise ServeError(503, "the server has ended, and this request with it; ask again", kind="server_error", code="shutting_down") from None
            raise ServeError(408, f"the request took longer than {seconds:g} s, the server's limit", kind="timeout_error", code="timeout") from None

    def cut(self) -> None:
        """The end of a drain: requests that are still there are told so."""
        self._over = True
        for timer in list(self._timers):
            timer.reschedule(0)

    def full(self, wanted: int) -> ServeError:
        return ServeError(
            429, f"{self.taken} outputs are being prepared or computed, or wait, of at most {self.capacity}, and {wanted} more were asked for; try again later", kind="rate_limit_error", code="rate_limit_exceeded", retry_after=1
        )  # fmt: skip


class Place:
    """How many of the server's outputs one request has taken."""

    def __init__(self, server: Server) -> None:
        self.server, self.held = server, 1
        server.taken += 1

    def take(self, wanted: int) -> None:
        server = self.server
        if wanted > server.capacity:
            raise ServeError(400, f"{wanted} outputs in one request; this server has room for {server.capacity}", param="n")
        if server.taken - self.held + wanted > server.capacity:
            raise server.full(wanted)
        server.taken += wanted - self.held
        self.held = wanted


class Endpoint:
    """A POST route, from its first byte to its last."""

    def __init__(self, server: Server, kind: type[CompletionRequest] | type[ChatRequest], answer: type[CompletionAnswer] | type[ChatAnswer]) -> None:
        self.server, self.kind, self.answer = server, kind, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        server = self.server
        reply = Reply(send, scope.get(TRANSPORT))
        try:
            async with server.within(server.limits.timeout):
                if server.taken >= server.capacity:
                    raise server.full(1)
                body = await _read(scope, receive, server)
                reply.read = True
                with server.place() as place:
                    await _while_there(receive, self._serve(body, place, reply))
        except ClientGone:
            reply.abort()
        except ServeError as error:
            server.metrics.refused[error.status] += 1
            await reply.error(error)
        except Exception as error:
            LOG.exception("a request failed")
            server.metrics.refused[500] += 1
            await reply.error(ServeError(500, f"{type(error).__name__}: an error of the server's", kind="server_error"))
        finally:
            server.unread.forget(reply)

    async def _serve(self, body: bytes, place: Place, reply: Reply) -> None:
        server = self.server
        if not server.worker.alive:
            raise ServeError(500, "the engine has stopped", kind="server_error")
        prepared: Prepared = await asyncio.get_running_loop().run_in_executor(server.text_thread, server.texts.prepare, self.kind, body)
        place.take(prepared.outputs)
        answer = self.answer(server.texts.name, server.texts.tokens, prepared.asked.top is not None)
        params = await self._formed(prepared) if prepared.grammar is not None else prepared.params
        with server.worker.open(prepared.prompts, params, lambda size: server.unread.add(reply, size), lambda: place.take(0)) as tickets:
            await tickets.accepted
            await (self._stream if prepared.asked.stream else self._whole)(prepared, tickets, answer, reply)

    async def _formed(self, prepared: Prepared) -> list[SamplingParams]:
        server = self.server
        try:
            async with asyncio.timeout(COMPILING):
                return await asyncio.get_running_loop().run_in_executor(server.form_threads, server.texts.formed, prepared)
        except TimeoutError:
            raise ServeError(400, f"the form of the output is not compiled within {COMPILING:g} s", code="form_too_large") from None

    async def _whole(self, prepared: Prepared, tickets: Tickets, answer: CompletionAnswer | ChatAnswer, reply: Reply) -> None:
        async for _ in tickets:
            pass
        n, alone = prepared.asked.outputs, prepared.asked.prompt_alone
        outputs = [(i * n + o.index, Output(o.index, finish_reason="length") if alone else o, prepared.echoes[i], c.prompt_logprobs) for i, c in enumerate(tickets.completions) for o in c.outputs]
        count = usage(sum(map(len, prepared.prompts)), sum(len(o.token_ids) for _, o, *_ in outputs), tickets.cached)
        self.server.unread.forget(reply)
        await reply.json(200, answer.whole([answer.choice(*each) for each in outputs], count), lies=lambda size: self.server.unread.add(reply, size))

    async def _stream(self, prepared: Prepared, tickets: Tickets, answer: CompletionAnswer | ChatAnswer, reply: Reply) -> None:
        n, asked = prepared.asked.outputs, prepared.asked
        more: dict[str, Any] = {"usage": None} if asked.usage_at_end else {}
        await reply.begin()
        completion, met = 0, set[int]()

        def begin(i: int) -> list[dict[str, Any]]:
            met.add(i)
            return [first for k in range(n) if (first := answer.first(i * n + k, prepared.echoes[i], tickets.completions[i].prompt_logprobs)) is not None]

        if asked.prompt_top is None:  # else with the first token, when they are known
            await reply.events([answer.chunk([first], **more) for i in range(len(prepared.prompts)) for first in begin(i)])
        async for items in tickets:
            if asked.prompt_alone:
                items = [(i, replace(u, token_ids=(), text="", finish_reason="length", logprobs=())) for i, u in items]
            completion += sum(len(u.token_ids) for _, u in items)
            await reply.events([answer.chunk([first], **more) for i, _ in items if i not in met for first in begin(i)])
            told = [(i * n + u.index, u.text, u.logprobs, u.finish_reason) for i, u in items if u.text or u.finish_reason or u.logprobs]
            await reply.events([answer.chunk([answer.piece(*each)], **more) for each in told])
        if asked.usage_at_end:
            await reply.events([answer.chunk([], usage=usage(sum(map(len, prepared.prompts)), completion, tickets.cached))])
        await reply.end()


async def _read(scope: Scope, receive: Receive, server: Server) -> bytes:
    most, seconds = server.limits.body, server.limits.body_timeout
    headers = {k.lower(): v for k, v in scope["headers"]}
    kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
    if kind != b"application/json":  # also what keeps pages of other sites from posting here
        raise ServeError(415, "the body must be JSON, with content-type: application/json")
    said = headers.get(b"content-length", b"0")
    too_large = ServeError(413, f"a body of more than {most} bytes; this server reads at most that", code="request_too_large")
    if said.isdigit() and int(said[:20]) > most:
        await _discard(receive)
        raise too_large
    parts, size = list[bytes](), 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                part = message.get("body", b"")
                size += len(part)
                server.receiving += len(part)
                if size > most:
                    await _discard(receive)
                    raise too_large
                if server.receiving > BODIES * most:
                    raise ServeError(429, f"bodies of {server.receiving} bytes are being received; try again later", kind="rate_limit_error", code="rate_limit_exceeded", retry_after=1)
                parts.append(part)
                if not message.get("more_body"):
                    return b"".join(parts)
    except TimeoutError:
        raise ServeError(408, f"the body has not come within {seconds:g} s: {size} bytes of it have", kind="timeout_error", code="timeout") from None
    finally:
        server.receiving -= size


async def _discard(receive: Receive) -> None:
    """What is still being sent, for a moment: many clients send all before they read an answer, and a connection that is closed meanwhile takes the answer with it."""
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER):
            while (message := await receive())["type"] != "http.disconnect" and message.get("more_body"):
                pass


async def _while_there(receive: Receive, work: Any) -> None:
    """Run ``work`` until it is done; ClientGone, and no more of it, where the client leaves first."""

    async def leaves() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    doing, leaving = asyncio.ensure_future(work), asyncio.ensure_future(leaves())
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientGone
        doing.result()
    except OSError as error:  # it left while something was sent
        raise ClientGone from error
    finally:
        doing.cancel()
        leaving.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)


class Guard:
    """The key, before anything else is read; and HEAD is GET whose body the connection leaves out."""

    def __init__(self, app: Any, server: Server) -> None:
        self.app, self.server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = self.server.key
        if scope["type"] == "http" and key is not None and scope["path"].startswith("/v1"):
            said = next((v for k, v in scope["headers"] if k.lower() == b"authorization"), b"")
            word, _, given = said.partition(b" ")
            if word.lower() != b"bearer" or not hmac.compare_digest(given.strip(), key.encode()):
                error = ServeError(401, "the API key is missing or wrong; send it as Authorization: Bearer KEY", code="invalid_api_key")
                self.server.metrics.refused[401] += 1
                return await Reply(send).error(error)
        await self.app({**scope, "method": "GET"} if scope["type"] == "http" and scope["method"] == "HEAD" else scope, receive, send)


def _application(server: Server) -> Any:
    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(server.close)

    app = FastAPI(title="DeepSeed", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, server=server)
    kinds = {"/v1/completions": (CompletionRequest, CompletionAnswer), "/v1/chat/completions": (ChatRequest, ChatAnswer)}
    for path, (kind, answer) in kinds.items():
        app.router.routes.append(Route(path, Endpoint(server, kind, answer), methods=["POST"]))  # type: ignore[arg-type]

    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [server.card()]}

    async def model(name: str) -> dict[str, Any]:
        if name != server.texts.name:
            raise ServeError(404, f"the model {name[:200]!r} does not exist; this server has {server.texts.name!r}", param="model", code="model_not_found")
        return server.card()

    async def health() -> dict[str, Any]:
        if not server.worker.alive:
            raise ServeError(503, "the engine has stopped", kind="server_error")
        return {"status": "ok", **({"replicas": len(several.living), "of": len(several.all), "started_again": several.starts} if isinstance(several := server.engine, Replicas) else {})}

    async def metrics() -> Any:
        several = [("replicas", len(e.living)), ("replicas_of", len(e.all)), ("replicas_started_again", e.starts)] if isinstance(e := server.engine, Replicas) else []
        return PlainTextResponse(server.metrics.text(several), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def status() -> dict[str, Any]:
        return {"model": server.texts.name, "capacity": server.capacity, "taken": server.taken, "ends": server.ends, **server.metrics.status()}

    async def page() -> Any:
        return HTMLResponse(PAGE.read_text(), headers={"content-security-policy": "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'"})

    async def serve_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, ServeError)
        return server.refuse(error)

    async def http_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        made = ServeError(error.status_code, str(error.detail))
        made.headers.update(error.headers or {})
        return server.refuse(made)

    for path, get in (("/v1/models", models), ("/v1/models/{name:path}", model), ("/health", health), ("/status.json", status)):
        app.add_api_route(path, get, methods=["GET"])
    for path, get in (("/metrics", metrics), ("/", page)):
        app.add_api_route(path, get, methods=["GET"], response_class=PlainTextResponse if path == "/metrics" else HTMLResponse)
    app.add_exception_handler(ServeError, serve_error)
    app.add_exception_handler(HTTPException, http_error)
    described: Any = app
    described.openapi = lambda: _described(app, {path: kind for path, (kind, _) in kinds.items()})
    return app


def _described(app: Any, kinds: dict[str, Any]) -> dict[str, Any]:
    """The schema of the routes, those that read their bodies themselves too."""
    found: dict[str, Any] = get_openapi(title="DeepSeed", version="1", routes=app.routes)
    schemas = found.setdefault("components", {}).setdefault("schemas", {})
    for path, kind in kinds.items():
        schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(schema.pop("$defs", {}))
        schemas[kind.__name__] = schema
        answers = {"200": {"description": "the answer, or its stream", "content": {"application/json": {}, "text/event-stream": {}}}}
        answers["default"] = {"description": "an OpenAI error object", "content": {"application/json": {}}}
        found["paths"][path] = {"post": {"operationId": kind.__name__, "requestBody": {"required": True, "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}}, "responses": answers}}
    return found
