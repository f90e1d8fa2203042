"""Requests that nobody would write: whatever comes, the answer is the model's or an error object of a 4xx, and afterwards all blocks are free."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from deepseed.inference.engine import Engine
from deepseed.serve.app import Limits
from deepseed.serve.protocol import ChatRequest, CompletionRequest
from tests.serving import Running, model, running, tokenizer

EXAMPLES = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
WIDE = settings(EXAMPLES, max_examples=5000, derandomize=False)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from([10**400, -1, 0, 2**63, 1e308, "\x00", "\ud83e\udd8a", "<end>", "{{ messages }}"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def up() -> Iterator[Running]:
    text = tokenizer()
    with running(Engine(model(text, 64), tokenizer=text, block=4), Limits(queue=200, body=1 << 16, timeout=60)) as found:
        yield found
        found.settled()


def near(kind: Any, good: dict[str, Any]) -> Any:
    """A good request with some fields changed to likely values, and some to anything."""
    likely = {
        "max_tokens": st.integers(1, 6), "temperature": st.floats(0, 2), "top_p": st.floats(0, 1, exclude_min=True), "top_k": st.integers(-1, 400), "min_p": st.floats(0, 1), "n": st.integers(1, 3),
        "seed": st.integers(), "presence_penalty": st.floats(-2, 2), "frequency_penalty": st.floats(-2, 2), "repetition_penalty": st.floats(0.001, 1000), "stop": st.text(max_size=3) | st.lists(st.text(max_size=3)),
        "stop_token_ids": st.lists(st.integers(-1, 310), max_size=3), "logit_bias": st.dictionaries(st.integers(-1, 310).map(str), st.floats(-101, 101), max_size=3), "min_tokens": st.integers(0, 6), "stream": st.booleans(),
        "ignore_eos": st.booleans(), "echo": st.booleans(), "prompt": st.text(max_size=90) | st.lists(st.integers(-1, 310), max_size=70) | st.lists(st.text(max_size=9), max_size=3),
        "messages": st.lists(st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": st.text(max_size=20)}), max_size=3),
        "logprobs": st.integers(0, 5) if kind is CompletionRequest else st.booleans(), "top_logprobs": st.integers(0, 20), "structured_outputs": st.fixed_dictionaries({"regex": st.text(max_size=6)}),
    }  # fmt: skip
    names = list(kind.model_fields)
    changes = st.dictionaries(st.sampled_from([n for n in names if n in likely]), st.none(), max_size=5).flatmap(lambda d: st.fixed_dictionaries({k: likely[k] for k in d}))
    wild = st.dictionaries(st.sampled_from(names) | st.text(max_size=5), ANYTHING, max_size=1)
    return st.builds(lambda a, b, c: {**good, **a, **(b if c else {})}, changes, wild, st.integers(0, 2).map(lambda n: n == 0))


BODIES = {
    "/v1/completions": near(CompletionRequest, {"model": "tiny", "prompt": "a", "max_tokens": 2}),
    "/v1/chat/completions": near(ChatRequest, {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}),
}


def check(up: Running, path: str, body: bytes) -> int:
    status, headers, data = up.send("POST", path, body)
    if status == 200 and headers["content-type"].startswith("text/event-stream"):
        assert data.endswith(b"data: [DONE]\n\n") and b'"error"' not in data.split(b"\n\n")[-3], data[-500:]
        return status
    said = json.loads(data)
    if status == 200:
        assert said["choices"] and said["usage"]["total_tokens"] >= 1
    else:
        assert 400 <= status < 500 and set(said["error"]) == {"message", "type", "param", "code"} and said["error"]["message"], (status, body, data)
    return status


def fuzzed(up: Running, path: str, how: settings) -> None:
    seen: set[int] = set()

    @how
    @given(BODIES[path])
    def each(body: Any) -> None:
        seen.add(check(up, path, json.dumps(body, default=str).encode()))

    each()
    assert {200, 400} <= seen
    assert up.server.worker.alive and up.send("GET", "/health")[0] == 200


@pytest.mark.parametrize("path", BODIES)
def test_near_misses(up: Running, path: str) -> None:
    fuzzed(up, path, EXAMPLES)


@pytest.mark.wide
@pytest.mark.parametrize("path", BODIES)
def test_many_near_misses(up: Running, path: str) -> None:
    fuzzed(up, path, WIDE)


@EXAMPLES
@given(body=st.binary(max_size=64) | ANYTHING.map(lambda v: json.dumps(v).encode()))
def test_any_bytes(up: Running, body: bytes) -> None:
    assert check(up, "/v1/completions", body) == 400


@pytest.mark.parametrize("examples", [5, pytest.param(60, marks=pytest.mark.wide)])
def test_by_the_schema(up: Running, examples: int) -> None:
    """Every operation of the OpenAPI schema, by schemathesis: no 5xx."""
    import schemathesis

    schema = schemathesis.openapi.from_url(f"{up.url}/openapi.json")
    count = 0
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(EXAMPLES, max_examples=examples)
        @given(case=operation.as_strategy())
        def each(case: Any) -> None:
            assert case.call(timeout=60).status_code < 500

        each()
        count += 1
    assert count >= 8
