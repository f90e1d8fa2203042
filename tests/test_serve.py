"""The server through OpenAI's client and through bare sockets: what it says is what the engine says, every mistake is an error object, and blocks come back."""

from __future__ import annotations

import codecs
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from deepseed.inference.engine import Engine
from deepseed.inference.sampling import SamplingParams
from deepseed.serve.app import Limits
from deepseed.serve.tokens import byte_level
from tests import chromium
from tests.serving import Running, running

PROMPT = "once upon a time"


@pytest.fixture(scope="module")
def up(text: Any, weights: Any) -> Iterator[Running]:
    with running(Engine(weights, tokenizer=text, block=4), Limits(queue=64, body=1 << 20, timeout=60)) as found:
        yield found
        found.settled()


@pytest.fixture
def client(up: Running) -> Any:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{up.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def slow(engine: Engine, seconds: float) -> Any:
    """Each step of ``engine`` takes longer; gives what undoes it."""
    before = engine.step

    def step() -> Any:
        time.sleep(seconds)
        return before()

    engine.step = step  # type: ignore[method-assign]
    return lambda: setattr(engine, "step", before)


# what is said -------------------------------------------------------------------------------------------------------------


def test_completions_are_the_engines(client: Any, plain: Engine) -> None:
    want = plain.generate([PROMPT, "the lazy"], max_tokens=12)
    got = client.completions.create(model="tiny", prompt=[PROMPT, "the lazy"], max_tokens=12, temperature=0)
    assert [c.text for c in got.choices] == [w.text for w in want]
    assert [c.finish_reason for c in got.choices] == [w.finish_reason for w in want]
    assert got.usage.prompt_tokens == sum(len(w.prompt_token_ids) for w in want)
    assert got.usage.completion_tokens == sum(len(w.token_ids) for w in want)
    ids = client.completions.create(model="tiny", prompt=want[0].prompt_token_ids, max_tokens=12, temperature=0, echo=True)
    assert ids.choices[0].text == PROMPT + want[0].text
    assert ids.usage.prompt_tokens_details.cached_tokens == (len(want[0].prompt_token_ids) - 1) // 4 * 4


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_is_the_same_text(client: Any, plain: Engine, n: int) -> None:
    params = SamplingParams(max_tokens=20, temperature=0.8, seed=7, n=n, top_p=0.9)
    want = plain.generate(PROMPT, params)[0]
    asked = dict(model="tiny", prompt=PROMPT, max_tokens=20, temperature=0.8, seed=7, n=n, top_p=0.9)
    whole = client.completions.create(**asked)
    assert [c.text for c in whole.choices] == [o.text for o in want.outputs]
    texts, ends, usage = [""] * n, [None] * n, None
    for chunk in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            ends[choice.index] = choice.finish_reason or ends[choice.index]
        assert (chunk.usage is None) == bool(chunk.choices)
        usage = chunk.usage or usage
    assert texts == [o.text for o in want.outputs] and ends == [o.finish_reason for o in want.outputs]
    assert usage == whole.usage.model_copy(update={"prompt_tokens_details": usage.prompt_tokens_details})


def test_the_wire_is_what_clients_expect(up: Running) -> None:
    status, headers, data = up.send("POST", "/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3, "ignore_eos": True, "stream": True})
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    events = data.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and all(e.startswith("data: {") for e in events[:-2])
    first, *_, last = [json.loads(e[6:]) for e in events[:-2]]
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""} and first["object"] == "chat.completion.chunk"
    assert last["choices"][0]["finish_reason"] == "length"


def test_chat_goes_through_the_template(client: Any, plain: Engine) -> None:
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "dog"}]}]
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    got = client.chat.completions.create(model="tiny", messages=messages, tools=tools, max_tokens=9, temperature=0)
    prompt = "tool look\nsystem: be brief\nuser: the dog\nassistant: "
    assert got.choices[0].message.content == plain.generate(prompt, max_tokens=9)[0].text and got.choices[0].message.role == "assistant"
    streamed = client.chat.completions.create(model="tiny", messages=messages, tools=tools, max_completion_tokens=9, temperature=0, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == got.choices[0].message.content
    without = client.chat.completions.create(model="tiny", messages=messages, tools=tools, tool_choice="none", max_tokens=9, temperature=0)
    assert without.usage.prompt_tokens < got.usage.prompt_tokens
    endless = client.chat.completions.create(model="tiny", messages=messages, temperature=0, extra_body={"ignore_eos": True})
    assert endless.usage.total_tokens == 256 and endless.choices[0].finish_reason == "length"


def test_tools_that_the_template_does_not_know_are_refused(up: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(up.server.texts.tokenizer, "chat_template", "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    tools = {"tools": [{"type": "function", "function": {"name": "look"}}]}
    status, error = up.error("/v1/chat/completions", CHAT | tools)
    assert (status, error["param"]) == (400, "tools") and "no place for them" in error["message"]
    assert up.send("POST", "/v1/chat/completions", CHAT | tools | {"tool_choice": "none"})[0] == 200


def test_stop_strings_end_the_text_before_them(client: Any, plain: Engine) -> None:
    whole = plain.generate(PROMPT, max_tokens=30)[0].text
    stop = whole[10:13]
    got = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=30, temperature=0, stop=[stop])
    assert got.choices[0].text == whole[: whole.index(stop)] and got.choices[0].finish_reason == "stop"
    chunks = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=30, temperature=0, stop=stop, stream=True)
    assert "".join(c.choices[0].text for c in chunks) == got.choices[0].text


def begins(text: Any, ids: list[int]) -> list[int]:
    """Where the character of each token's first byte is; what is no character counts as one."""
    raw, out = [bytes(b for b, c in byte_level().items() for x in text.convert_ids_to_tokens(t) if x == c) if len(text.convert_ids_to_tokens(t)) == 1 else text.decode([t]).encode() for t in ids], list[int]()
    for n in range(len(ids)):
        before, byte = b"".join(raw[:n]), raw[n][:1]
        cut = codecs.getincrementaldecoder("utf-8")("replace")
        whole = len(cut.decode(before))
        out.append(whole + bool(cut.getstate()[0] and not 0x80 <= byte[0] < 0xC0))
    return out


def test_logprobs_of_both_kinds(client: Any, plain: Engine, text: Any) -> None:
    want = plain.generate(PROMPT, max_tokens=6, logprobs=2)[0].outputs[0]
    token = [text.decode([d.token]) for d in want.logprobs]
    got = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=6, temperature=0, logprobs=2).choices[0].logprobs
    assert got.tokens == token and got.token_logprobs == pytest.approx([d.logprob for d in want.logprobs], rel=1e-6)  # JSON keeps all digits; the steps differ in who shares them
    assert got.text_offset == begins(text, [d.token for d in want.logprobs]) and all(1 <= len(t) <= 3 for t in got.top_logprobs)
    prompt = text.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    want = plain.generate(prompt, max_tokens=6, logprobs=2)[0].outputs[0]
    asked = dict(model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=6, temperature=0, logprobs=True, top_logprobs=2)
    chat = client.chat.completions.create(**asked).choices[0].logprobs.content
    assert [t.logprob for t in chat] == pytest.approx([d.logprob for d in want.logprobs], rel=1e-6)
    assert [[p.logprob for p in t.top_logprobs] for t in chat] == [pytest.approx([p for _, p in d.top], rel=1e-6) for d in want.logprobs]
    assert [bytes(t.bytes).decode("utf-8", "replace") for t in chat] == [t.token for t in chat]
    streamed = [t for c in client.chat.completions.create(**asked, stream=True) for t in (c.choices[0].logprobs.content if c.choices[0].logprobs else [])]
    assert [t.token for t in streamed] == [t.token for t in chat]


@pytest.mark.parametrize("n", [1, 2])
def test_logprobs_of_the_prompt(client: Any, plain: Engine, weights: Any, text: Any, n: int) -> None:
    """What the model itself gives each token of the prompt; an equal prompt before does not keep them from being computed."""
    import torch

    ids = text(PROMPT)["input_ids"]
    logs = torch.log_softmax(weights(torch.tensor([ids])).logits[0], -1).detach()
    asked = dict(model="tiny", prompt=[PROMPT, "the lazy dog"], max_tokens=3, temperature=0, echo=True, logprobs=2, n=n)
    for _ in range(2):
        got = client.completions.create(**asked)
        found = got.choices[0].logprobs
        assert found.tokens[: len(ids)] == [text.decode([t]) for t in ids] and len(found.tokens) == len(ids) + 3
        assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
        assert found.token_logprobs[1 : len(ids)] == pytest.approx([float(logs[i, t]) for i, t in enumerate(ids[1:])], abs=1e-4)  # float32, other order of sums
        assert max(found.top_logprobs[4].values()) == pytest.approx(float(logs[3].max()), abs=1e-4)
        said = plain.generate(PROMPT, max_tokens=3)[0].token_ids
        assert found.text_offset == begins(text, [*ids, *said]) and got.choices[0].text.startswith(PROMPT)
    streamed: list[list[Any]] = [[] for _ in got.choices]
    texts = [""] * len(got.choices)
    for chunk in client.completions.create(**asked, stream=True):
        for c in chunk.choices:
            texts[c.index] += c.text
            streamed[c.index] += zip(c.logprobs.tokens, c.logprobs.text_offset, strict=True)
    assert texts == [c.text for c in got.choices] and streamed == [list(zip(c.logprobs.tokens, c.logprobs.text_offset, strict=True)) for c in got.choices]


def test_characters_of_several_tokens(client: Any, text: Any) -> None:
    """Bytes are a token's own, and offsets count characters of the text that the answer has."""
    prompt = "日本 is 😀🎉 ok"
    ids = text(prompt)["input_ids"]
    got = client.completions.create(model="tiny", prompt=prompt, max_tokens=6, temperature=0, echo=True, logprobs=0).choices[0]
    spans = [0] * len(ids)
    for n in range(1, len(ids)):
        spans[n] = len(text.decode(ids[:n]).rstrip("\ufffd"))
    assert got.logprobs.text_offset[: len(ids)] == spans and len(ids) > len(prompt) and got.logprobs.text_offset[len(ids)] == len(prompt)
    first = ids[0]
    asked = dict(model="tiny", messages=[{"role": "user", "content": "a"}], max_tokens=2, temperature=0, logprobs=True, logit_bias={str(first): 100})
    chat = client.chat.completions.create(**asked).choices[0].logprobs.content
    assert [bytes(t.bytes) for t in chat] == ["日".encode()[:1]] * 2


def test_a_prompt_alone(client: Any, text: Any) -> None:
    ids = text(PROMPT)["input_ids"]
    asked = dict(model="tiny", prompt=PROMPT, max_tokens=0, echo=True, logprobs=1, n=2)
    got = client.completions.create(**asked)
    assert [(c.text, len(c.logprobs.tokens), c.finish_reason) for c in got.choices] == [(PROMPT, len(ids), "length")] * 2 and got.usage.completion_tokens == 0
    chunks = [c for chunk in client.completions.create(**asked, stream=True) for c in chunk.choices if c.index == 1]
    assert "".join(c.text for c in chunks) == PROMPT and sum(len(c.logprobs.tokens) for c in chunks) == len(ids) and chunks[-1].finish_reason == "length"


def test_models_health_and_metrics(client: Any, up: Running) -> None:
    assert [m.id for m in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").max_model_len == 256
    assert json.loads(up.send("GET", "/health")[2]) == {"status": "ok"}
    before = _metrics(up)
    client.completions.create(model="tiny", prompt=[5, 6, 7], max_tokens=4, extra_body={"ignore_eos": True})
    after = _metrics(up)
    grown = {name: after[name] - before[name] for name in after}
    assert grown["vllm:prompt_tokens_total"] == 3 and grown["vllm:generation_tokens_total"] == 4
    assert grown["vllm:time_to_first_token_seconds_count"] == 1 and grown["vllm:inter_token_latency_seconds_count"] == 3 and grown["vllm:e2e_request_latency_seconds_count"] == 1
    assert grown['vllm:request_success_total:length'] == 1
    for name in ("queue", "prefill", "decode", "inference"):
        assert grown[f"vllm:request_{name}_time_seconds_count"] == 1 and grown[f"vllm:request_{name}_time_seconds_sum"] > 0
    assert grown["vllm:request_inference_time_seconds_sum"] == pytest.approx(grown["vllm:request_prefill_time_seconds_sum"] + grown["vllm:request_decode_time_seconds_sum"])
    assert grown["vllm:e2e_request_latency_seconds_sum"] == pytest.approx(grown["vllm:request_queue_time_seconds_sum"] + grown["vllm:request_inference_time_seconds_sum"])
    assert grown["vllm:request_time_per_output_token_seconds_sum"] == pytest.approx(grown["vllm:request_decode_time_seconds_sum"] / 3)
    assert grown["vllm:iteration_tokens_total_count"] == 4 and grown["vllm:iteration_tokens_total_sum"] == 3 + 3
    assert grown["vllm:request_max_num_generation_tokens_count"] == 1 and grown["vllm:request_max_num_generation_tokens_sum"] == 4
    assert {"vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc", "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"} <= set(after)


def _metrics(up: Running) -> dict[str, float]:
    out = {}
    for line in up.send("GET", "/metrics")[2].decode().splitlines():
        found = re.fullmatch(r'([\w:]+)\{model_name="tiny",engine="0"(?:,(\w+)="([^"]+)")?\} (\S+)', line)
        assert found or line.startswith("# "), line
        if found and found[2] != "le":
            out[found[1] + (f":{found[3]}" if found[3] else "")] = float(found[4])
    return out


# mistakes -----------------------------------------------------------------------------------------------------------------

GOOD = {"model": "tiny", "prompt": "a", "max_tokens": 2}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}


@pytest.mark.parametrize(
    ("change", "status", "param", "says"),
    [
        ({"model": "gpt-4"}, 404, "model", "'gpt-4' does not exist"), ({"prompt": []}, 400, "prompt", "at least 1"), ({"prompt": None}, 400, "prompt", ""),
        ({"prompt": [300]}, 400, "prompt", "outside the vocabulary"), ({"prompt": [-1]}, 400, "prompt", "outside the vocabulary"), ({"prompt": [10**30]}, 400, "prompt", "outside the vocabulary"),
        ({"prompt": [5] * 256}, 400, "prompt", "context is 256 tokens"), ({"prompt": [5] * 250, "max_tokens": 7}, 400, "prompt", "250 in the prompt and 7"), ({"prompt": "a" * 9000}, 400, "prompt", "context"),
        ({"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"), ({"max_tokens": "5"}, 400, "max_tokens", "integer"), ({"max_tokens": 10**40}, 400, "prompt", "context"),
        ({"temperature": -1}, 400, "temperature", "greater"), ({"temperature": 3}, 400, "temperature", "less"), ({"top_p": 0}, 400, "top_p", "greater"), ({"n": 129}, 400, "n", "128"), ({"n": 0}, 400, "n", "1"),
        ({"n": True}, 400, "n", "integer"), ({"stop": ["a", ""]}, 400, "stop", "1 character"), ({"logprobs": 21}, 400, "logprobs", "20"),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias", "no token id"), ({"logit_bias": {"300": 1}}, 400, "logit_bias", "outside"), ({"logit_bias": {"5": 101}}, 400, "logit_bias", "100"),
        ({"stop_token_ids": [10**9], "min_tokens": 1}, 400, "stop_token_ids", "outside"), ({"min_tokens": 3}, 400, None, "min_tokens"), ({"temprature": 1}, 400, "temprature", "did you mean temperature"),
        ({"suffix": "b"}, 400, "suffix", "between"), ({"best_of": 3}, 400, "best_of", "best_of=3"), ({"stream_options": {"include_usage": True}}, 400, "stream_options", "stream: true"),
        ({"seed": 2**70}, 400, "seed", ""), ({"stream": "yes"}, 400, "stream", "boolean"), ({"response_format": {"type": "json_schema"}}, 400, "response_format", ""),
    ],
)  # fmt: skip
def test_a_bad_parameter_is_named(up: Running, change: dict[str, Any], status: int, param: str | None, says: str) -> None:
    got, error = up.error("/v1/completions", GOOD | change)
    assert (got, error["param"], error["type"]) == (status, param, "invalid_request_error") and says in error["message"], error


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"messages": []}, "at least 1"), ({"messages": [{"role": "king", "content": "a"}]}, "messages"), ({"messages": [{"role": "tool", "content": "a"}]}, "a tool without a call"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"), ({"top_logprobs": 2}, "logprobs: true"), ({"tool_choice": "required"}, "tool_choice"),
        ({"messages": [{"role": "user", "content": "ab " * 200}]}, "context"), ({"messages": [{"role": "user", "content": "a" * 9000}]}, "context"), ({"max_completion_tokens": 3}, "one of the two"),
        ({"tools": [{"type": "function"}]}, "tools.0.function is missing"), ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools"), ({"tools": [{"type": "function", "function": {"name": "a", "x": 1}}]}, "unknown"),
    ],
)  # fmt: skip
def test_a_bad_chat_is_refused(up: Running, change: dict[str, Any], says: str) -> None:
    status, error = up.error("/v1/chat/completions", CHAT | change)
    assert status == 400 and says in error["message"], error


@pytest.mark.parametrize("body", [b"", b"{", b"null", b"[]", b"\xff\xfe", b'{"model": "tiny", "prompt": "\\ud800"}', b"[" * 100_000, b'{"model":"tiny","prompt":"a","temperature":NaN}', b'{"model":"tiny","prompt":"a","temperature":1e999}'])
def test_garbage_is_refused(up: Running, body: bytes) -> None:
    assert up.error("/v1/completions", body)[0] == 400


def test_errors_of_http_are_objects_too(up: Running) -> None:
    assert up.error("/v1/nothing", None, method="GET")[0] == 404
    assert up.error("/v1/completions", None, method="GET")[0] == 405
    assert up.error("/v1/models/other", None, method="GET")[1]["code"] == "model_not_found"
    assert up.error("/v1/completions", GOOD, {"content-type": "text/plain"})[0] == 415
    status, error = up.error("/v1/completions", GOOD | {"prompt": "a" * (10 << 20)})
    assert (status, error["code"]) == (413, "request_too_large")

    def chunks() -> Iterator[bytes]:  # no content-length
        for _ in range(40):
            yield b" " * (1 << 16)

    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", up.port, timeout=30)
    try:
        connection.request("POST", "/v1/completions", chunks(), {"content-type": "application/json"}, encode_chunked=True)
        assert connection.getresponse().status == 413
    except (BrokenPipeError, ConnectionResetError):
        pass  # it was cut off while it sent
    finally:
        connection.close()


def test_openais_client_knows_the_errors(client: Any) -> None:
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError, match="context is 256"):
        client.completions.create(model="tiny", prompt="a", max_tokens=1000)


# load, time, leaving ------------------------------------------------------------------------------------------------------


def _stream(up: Running, asked: dict[str, Any], room: int | None = None) -> tuple[socket.socket, bytes]:
    """A connection with the beginning of its stream. ``room``: bytes that it takes unread."""
    made = socket.socket()
    made.settimeout(30)
    if room is not None:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
    made.connect(("127.0.0.1", up.port))
    body = json.dumps(asked).encode()
    made.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    got = b""
    while b"data: " not in got:
        part = made.recv(4096)
        assert part, got
        got += part
    return made, got


def test_who_leaves_frees_the_blocks(up: Running) -> None:
    undo = slow(up.engine, 0.1)  # to their ends they would take 20 s
    aborted = up.server.metrics.aborted
    try:
        made = [_stream(up, {"model": "tiny", "prompt": [n + 1] * 20, "max_tokens": 200, "stream": True, "n": 2, "ignore_eos": True})[0] for n in range(4)]
        assert up.engine.scheduler.pool.free < up.engine.scheduler.pool.count
        for each in made:
            each.close()
        up.settled(10)
        body = json.dumps({"model": "tiny", "prompt": [3] * 20, "max_tokens": 230, "ignore_eos": True}).encode()  # not a stream: it leaves while it waits
        with socket.create_connection(("127.0.0.1", up.port), timeout=30) as waits:
            waits.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
            while up.server.taken == 0 or up.engine.idle:
                time.sleep(0.005)
        with socket.create_connection(("127.0.0.1", up.port), timeout=30) as half:  # it leaves within its body
            half.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 9999\r\n\r\n{")
        up.settled(10)
    finally:
        undo()
    assert up.server.metrics.aborted - aborted == 9


def test_overload_is_429_and_recovers(text: Any, weights: Any) -> None:
    engine = Engine(weights, tokenizer=text, block=4, sequences=2)
    undo = slow(engine, 0.01)
    with running(engine, Limits(queue=2, timeout=60)) as up, ThreadPoolExecutor(40) as many:
        assert up.error("/v1/completions", GOOD | {"n": 5})[0] == 400  # more than there will ever be room for
        asked = GOOD | {"max_tokens": 20, "ignore_eos": True}
        got = list(many.map(lambda _: up.send("POST", "/v1/completions", asked), range(40)))
        assert {status for status, *_ in got} == {200, 429}
        for status, headers, data in got:
            if status == 429:
                assert int(headers["retry-after"]) >= 1 and json.loads(data)["error"]["code"] == "rate_limit_exceeded"
        assert up.server.metrics.refused[429] == sum(status == 429 for status, *_ in got)
        up.settled()
        undo()
        assert up.send("POST", "/v1/completions", asked)[0] == 200
        up.settled()


def test_time_runs_out(text: Any, weights: Any) -> None:
    engine = Engine(weights, tokenizer=text, block=4)
    slow(engine, 0.02)
    with running(engine, Limits(timeout=0.5, body_timeout=0.4)) as up:
        asked = {"model": "tiny", "prompt": [5, 6], "max_tokens": 250, "ignore_eos": True}
        status, error = up.error("/v1/completions", asked)
        assert (status, error["code"]) == (408, "timeout")
        _, _, data = up.send("POST", "/v1/completions", asked | {"stream": True})
        assert json.loads(data.decode().split("\n\n")[-3][6:])["error"]["code"] == "timeout" and data.endswith(b"data: [DONE]\n\n")
        with socket.create_connection(("127.0.0.1", up.port), timeout=30) as half:  # a body that never ends
            half.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 9999\r\n\r\n{")
            assert half.recv(4096).startswith(b"HTTP/1.1 408")
        up.settled()


def test_who_reads_slowly_holds_up_nobody(up: Running) -> None:
    slow_reader, _ = _stream(up, {"model": "tiny", "prompt": [9] * 8, "max_tokens": 240, "n": 4, "logprobs": 20, "stream": True, "ignore_eos": True}, 2048)
    with slow_reader:
        until = time.monotonic() + 30
        while not up.engine.idle and time.monotonic() < until:  # the engine ends, read or not
            assert up.send("GET", "/health")[0] == 200
            time.sleep(0.05)
        assert up.engine.idle and up.engine.scheduler.pool.free == up.engine.scheduler.pool.count
        assert up.send("POST", "/v1/completions", GOOD)[0] == 200
        up.settled()  # its places are free, though it still waits for its reader
        assert up.server.unread.total > 0
    up.settled()


def test_a_failed_engine_says_so(text: Any, weights: Any) -> None:
    engine = Engine(weights, tokenizer=text, block=4)
    with running(engine) as up:
        engine.step = lambda: 1 / 0  # type: ignore[assignment,return-value]
        status, error = up.error("/v1/completions", GOOD)
        assert (status, error["type"]) == (500, "server_error") and "ZeroDivisionError" in error["message"]
        assert up.error("/v1/completions", GOOD)[0] == 500 and up.error("/health", None, method="GET")[0] == 503


def test_the_key_is_wanted(text: Any, weights: Any) -> None:
    with running(Engine(weights, tokenizer=text, block=4), api_key="secret") as up:
        for headers in ({}, {"authorization": "Bearer other"}, {"authorization": "secret"}, {"authorization": "Bearer sécret".encode().decode("latin-1")}):
            assert up.error("/v1/completions", GOOD, headers)[1]["code"] == "invalid_api_key"
            assert up.error("/v1/models", None, headers, "GET")[0] == 401
        assert up.send("POST", "/v1/completions", GOOD, {"authorization": "Bearer secret"})[0] == 200
        assert up.send("GET", "/health")[0] == 200


# constrained --------------------------------------------------------------------------------------------------------------

SCHEMA = {"type": "object", "properties": {"name": {"enum": ["fox", "dog"]}, "legs": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["name", "legs"], "additionalProperties": False}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_constrained_outputs_parse(client: Any, temperature: float) -> None:
    pytest.importorskip("llguidance")
    asked = dict(model="tiny", messages=[{"role": "user", "content": "an animal"}], temperature=temperature, seed=1, n=4, max_tokens=100)
    got = client.chat.completions.create(**asked, response_format={"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA, "strict": True}})
    for choice in got.choices:
        said = json.loads(choice.message.content)
        assert choice.finish_reason == "stop" and set(said) == {"name", "legs"} and said["name"] in ("fox", "dog") and 0 <= said["legs"] <= 9
    picked = client.chat.completions.create(**asked, extra_body={"structured_outputs": {"choice": ["yes", "no \"never\""]}})
    assert {c.message.content for c in picked.choices} <= {"yes", "no \"never\""}
    matched = client.chat.completions.create(**asked, extra_body={"structured_outputs": {"regex": "[a-f]{3}-[0-9]{2}"}})
    assert all(re.fullmatch("[a-f]{3}-[0-9]{2}", c.message.content) for c in matched.choices)


@pytest.mark.parametrize("form", [{"regex": "("}, {"grammar": "begin:"}, {"json": {"type": "nothing"}}, {"json": "{"}, {"regex": "a", "choice": ["b"]}, {}, {"choice": []}])
def test_a_form_that_cannot_be_is_refused(up: Running, form: dict[str, Any]) -> None:
    pytest.importorskip("llguidance")
    assert up.error("/v1/completions", GOOD | {"structured_outputs": form})[0] == 400
    assert up.error("/v1/completions", GOOD | {"structured_outputs": {"regex": "a"}, "min_tokens": 1})[0] == 400


# page, bench, process -----------------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_from_outside(up: Running) -> None:
    status, headers, data = up.send("GET", "/")
    assert status == 200 and headers["content-type"].startswith("text/html") and "default-src 'none'" in headers["content-security-policy"]
    assert not re.search(rb"(?:src|href)=|https?://", data)
    named = set(re.findall(r"\bnow\.(\w+)", data.decode()))
    assert named and named <= set(json.loads(up.send("GET", "/status.json")[2]))


@pytest.mark.skipif(chromium.found() is None, reason="no browser")
def test_the_page_in_a_browser(up: Running) -> None:
    with chromium.browser() as page:
        page.open_url(up.url + "/")
        before, text = up.server.metrics.success.total(), lambda name: page.run(f"document.getElementById('{name}').textContent")
        undo = slow(up.engine, 0.02)
        stream, _ = _stream(up, {"model": "tiny", "prompt": [7] * 20, "max_tokens": 200, "n": 2, "stream": True, "ignore_eos": True})
        try:
            with stream:
                wait(page, "parseFloat(document.getElementById('rate').textContent) > 0 && document.getElementById('running').textContent === '2'")
                held, rate, top = up.server.metrics.cache, float(text("rate")), float(text("top").replace(",", ""))
                assert 0 < rate < 2.5 / 0.02 and rate <= top and text("half") and text("model") == "tiny"  # two tokens a step of at least 20 ms
                share = float(text("cache").rstrip(" %")) / 100
                assert 0 < share <= up.server.metrics.cache + 0.0005 and held > 0 and abs(page.run("document.getElementById('meter').value") - share) < 0.0006
                assert not page.run("document.body.classList.contains('old')")
        finally:
            undo()
        wait(page, f"+document.getElementById('finished').textContent.replaceAll(',', '') >= {before}")
        up.server.draining = True
        try:
            wait(page, "document.body.classList.contains('old')")
            assert re.search(r"serves nobody new; figures as of \d\d:\d\d:\d\d$", text("state"))
        finally:
            up.server.draining = False
        wait(page, "!document.body.classList.contains('old')")
        assert not page.console and all(r.startswith(up.url) for r in page.requests)
        page.run("window.fetch = () => Promise.reject(new Error('gone'))")
        wait(page, "document.body.classList.contains('old')")
        assert re.match(r"the server does not answer; figures as of \d\d:", text("state"))
        if folder := os.environ.get("DEEPSEED_SCREENSHOTS"):
            page.screenshot(Path(folder) / "status.png")


def wait(page: Any, true: str) -> None:
    assert page.run(f"new Promise(done => {{ let n = 0; const look = () => ({true}) ? done(true) : ++n > 600 ? done(false) : setTimeout(look, 50); look() }})"), true


def test_bench_serve_counts_what_it_sent(up: Running) -> None:
    from typer.testing import CliRunner

    from deepseed.cli import app

    before = _metrics(up)
    done = CliRunner().invoke(app, ["bench", "serve", "--base-url", up.url, "--num-prompts", "6", "--request-rate", "50", "--random-input-len", "9", "--random-output-len", "5", "--goodput", "ttft:60000", "--goodput", "tpot:0.000001", "--json"])
    assert done.exit_code == 0, done.output
    found, after = json.loads(done.output), _metrics(up)
    assert (found["completed"], found["failed"], found["total_input_tokens"], found["total_output_tokens"]) == (6, 0, 54, 30)
    assert after["vllm:prompt_tokens_total"] - before["vllm:prompt_tokens_total"] == 54 and after["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"] == 30
    assert found["request_goodput"] == 0 and found["request_throughput"] == pytest.approx(6 / found["duration"])
    for what in ("ttft", "tpot", "itl", "e2el"):
        assert 0 < found[f"median_{what}_ms"] <= found[f"p99_{what}_ms"]


def test_arrivals_are_poisson() -> None:
    from deepseed.serve.bench import Load

    at = Load(num_prompts=20_000, request_rate=4.0).arrivals()
    gaps = [b - a for a, b in pairwise(at)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 4, rel=0.03)  # four standard errors of 20,000 gaps
    assert sum((g - mean) ** 2 for g in gaps) / len(gaps) == pytest.approx(mean**2, rel=0.1)  # an exponential's variance is its mean squared


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, text: Any, weights: Any) -> Path:
    made = tmp_path_factory.mktemp("tiny")
    weights.save_pretrained(made)
    text.save_pretrained(made)
    return made


@pytest.mark.turn
def test_sigterm_drains(folder: Path) -> None:
    """A stream that has begun goes on to its end, nobody new is served, and the process ends well."""
    process, stub = started(folder, "--speculative", "--draft", "3", "--quantize", "int8")
    try:
        made, got = _stream(stub, {"model": folder.name, "prompt": [5, 6], "max_tokens": 250, "ignore_eos": True, "stream": True, "logprobs": 1})
        process.send_signal(signal.SIGTERM)
        while not got.endswith(b"0\r\n\r\n"):
            part = made.recv(1 << 16)
            assert part, got[-300:]
            got += part
        made.close()
        assert got.count(b'"token_logprobs":[') == 250 and b"data: [DONE]" in got
        assert process.wait(60) == 0
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", stub.port), timeout=5)
    finally:
        process.kill()
        process.wait()


def started(folder: Path, *options: str) -> tuple[subprocess.Popen[str], Any]:
    """``deepseed serve`` in a process of its own, once it says where it listens."""
    command = [sys.executable, "-m", "deepseed", "serve", str(folder), "--port", "0", "--drain", "50", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert process.stdout is not None
    lines = list[str]()
    for line in process.stdout:
        lines.append(line)
        if found := re.search(r"http://127\.0\.0\.1:(\d+)/v1", line):
            return process, type("Stub", (Running,), {"__init__": lambda self: None, "port": int(found[1])})()
    raise AssertionError("".join(lines))


def children(process: int) -> list[int]:
    """The ranks: what was started by this process to run Python's own spawn."""
    out = []
    for each in Path("/proc").glob("[0-9]*/stat"):
        try:
            stat, command = each.read_text(), (each.parent / "cmdline").read_text()
        except OSError:
            continue
        if int(stat.rsplit(")", 1)[1].split()[1]) == process and "spawn_main" in command:
            out.append(int(each.parent.name))
    return sorted(out)


@pytest.mark.wide
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds ranks in /proc")
def test_ranks_serve_together_and_end_together(folder: Path, plain: Engine) -> None:
    want = plain.generate(PROMPT, max_tokens=12)[0].text
    for end in ("a signal", "a lost rank", "a lost parent", "a signal"):
        process, up = started(folder, "--plan", "tp2")
        try:
            status, _, data = up.send("POST", "/v1/completions", {"model": folder.name, "prompt": PROMPT, "max_tokens": 12, "temperature": 0})
            assert status == 200 and json.loads(data)["choices"][0]["text"] == want
            ranks = children(process.pid)
            assert len(ranks) == 2
            if end == "a signal":
                process.send_signal(signal.SIGTERM)
                assert process.wait(120) == 0
            elif end == "a lost rank":
                os.kill(ranks[1], signal.SIGKILL)
                began = time.monotonic()
                status, error = up.error("/v1/completions", {"model": folder.name, "prompt": PROMPT, "max_tokens": 12})
                assert (status, error["message"]) == (500, "the engine has stopped: rank 1 has ended")
                assert process.wait(120) != 0 and "rank 1" in process.stdout.read()  # type: ignore[union-attr]
                print(f"ended after {time.monotonic() - began:.1f} s")
                assert time.monotonic() - began < 25  # 30 s where a launcher waits for who does not listen
            else:
                process.kill()
                process.wait()
            until = time.monotonic() + 5
            while any(Path(f"/proc/{rank}").exists() for rank in ranks):
                assert time.monotonic() < until
                time.sleep(0.05)
        finally:
            process.kill()
            process.wait()
