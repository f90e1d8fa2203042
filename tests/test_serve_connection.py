"""Clients that send or read too little: they hold no place, no memory without bound, and no connection for ever."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from deepseed.inference.engine import Engine
from deepseed.serve.app import Limits
from tests.serving import Running, running
from tests.test_serve import GOOD, _stream, slow

LONG = {"model": "tiny", "prompt": [9] * 8, "max_tokens": 240, "n": 4, "logprobs": 20, "ignore_eos": True}


@contextmanager
def connection(up: Running, sent: bytes = b"", room: int | None = None) -> Iterator[socket.socket]:
    with socket.socket() as made:
        made.settimeout(30)
        if room is not None:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
        made.connect(("127.0.0.1", up.port))
        made.sendall(sent)
        yield made


def request(body: dict[str, Any]) -> bytes:
    text = json.dumps(body).encode()
    return b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(text) + text


def rest(made: socket.socket) -> bytes:
    """All that comes until the server closes."""
    got = b""
    try:
        while part := made.recv(1 << 16):
            got += part
    except ConnectionResetError:
        pass
    return got


def until(true: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def said(got: bytes) -> tuple[int, dict[str, Any]]:
    head, _, body = got.partition(b"\r\n\r\n")
    return int(head.split(b" ")[1]), json.loads(body)["error"]


def test_half_a_body_holds_no_place_and_ends(text: Any, weights: Any) -> None:
    engine = Engine(weights, tokenizer=text, block=4, sequences=2)
    with running(engine, Limits(queue=2, timeout=60, body_timeout=1.5)) as up, ExitStack() as stack:
        half = [stack.enter_context(connection(up, request(GOOD)[:-5])) for _ in range(12)]
        none = stack.enter_context(connection(up, b"POST /v1/compl"))
        until(lambda: up.server.receiving == 12 * len(request(GOOD)[:-5].partition(b"\r\n\r\n")[2]))
        assert up.server.taken == 0 and up.send("POST", "/v1/completions", GOOD)[0] == 200
        for each in half:
            status, error = said(rest(each))
            assert (status, error["code"]) == (408, "timeout") and "has not come within 1.5 s" in error["message"]
        assert said(rest(none))[0] == 408
        until(lambda: up.server.receiving == 0)
        up.settled()


def test_bodies_under_way_are_bounded(up: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepseed.serve.app.BODIES", 0)
    status, error = up.error("/v1/completions", GOOD)
    assert (status, error["code"]) == (429, "rate_limit_exceeded") and "being received" in error["message"]


def test_who_reads_nothing_is_cut_off_at_the_bound(text: Any, weights: Any) -> None:
    with running(Engine(weights, tokenizer=text, block=4, sequences=4), Limits(queue=0, timeout=60, unread=5_000_000)) as up:
        asked = LONG | {"stream": True}
        first, _ = _stream(up, asked, 2048)
        until(lambda: up.engine.idle and up.server.taken == 0 and up.server.unread.total > 0)  # all four places are free again
        lies = up.server.unread.total
        assert 3_000_000 < lies < 5_000_000  # the second leaves nearly as much: together they are beyond the bound, by far
        second, _ = _stream(up, asked | {"max_tokens": 230}, 2048)
        until(lambda: up.server.unread.total < lies)
        with first, second:
            assert b"[DONE]" not in rest(first) and rest(second).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")  # who left the most is gone, and the other has all
        until(lambda: up.server.unread.total == 0)
        up.settled()


def test_an_answer_that_nobody_reads_ends_with_its_time(text: Any, weights: Any) -> None:
    with running(Engine(weights, tokenizer=text, block=4), Limits(timeout=60)) as up:
        began = time.monotonic()
        assert up.send("POST", "/v1/completions", LONG)[0] == 200
        seconds = 2 + 3 * (time.monotonic() - began)  # the answer is there long before its time ends, on any machine
        up.settled()
    with running(Engine(weights, tokenizer=text, block=4), Limits(timeout=seconds)) as up, connection(up, request(LONG), 2048) as made:
        began = time.monotonic()
        until(lambda: up.engine.idle and up.server.taken == 0 and up.server.unread.total > 100_000)  # while outputs are computed, what waits for them lies there too
        until(lambda: up.server.unread.total == 0, 2 * seconds)
        assert time.monotonic() - began > 0.9 * seconds
        whole = int(made.recv(512).lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        assert len(rest(made)) < whole


@pytest.fixture(scope="module")
def up(text: Any, weights: Any) -> Iterator[Running]:
    with running(Engine(weights, tokenizer=text, block=4), Limits(queue=64, body=1 << 20, timeout=60)) as found:
        yield found
        found.settled()


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01 hello\r\n\r\n", 400), (b"GET /health HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 100_000, 431), (b"GET /health HTTP/1.1\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: -1\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", 400),
    ],
)  # fmt: skip
def test_a_mistake_in_http_is_an_error_object(up: Running, sent: bytes, status: int) -> None:
    with connection(up, sent) as made:
        answer = rest(made)
    got, error = said(answer)
    assert got == status and b"connection: close" in answer and set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"


def test_head(up: Running) -> None:
    for path in ("/health", "/", "/metrics", "/v1/models"):
        status, headers, data = up.send("HEAD", path)
        assert (status, data) == (200, b"") and int(headers["content-length"]) > 0


def test_the_end_of_a_drain_is_said(text: Any, weights: Any) -> None:
    """Streams get an event with the error and their end, other requests the error, and the server is gone soon after."""
    engine = Engine(weights, tokenizer=text, block=4)
    slow(engine, 0.05)
    with running(engine, Limits(timeout=60), drain=1.0) as up:
        stream, got = _stream(up, LONG | {"stream": True})
        with stream, connection(up, request(LONG)) as waits:
            until(lambda: up.server.taken == 8)
            began = time.monotonic()
            up.uv.should_exit = True
            got += rest(stream)
            status, error = said(rest(waits))
            assert 0.9 < time.monotonic() - began < 4
        events = got.split(b"\n\n")
        assert json.loads(events[-3].splitlines()[-1][6:])["error"]["code"] == "shutting_down" and b"data: [DONE]" in events[-2]
        assert (status, error["code"]) == (503, "shutting_down")
        up.thread.join(5)
        assert not up.thread.is_alive()
