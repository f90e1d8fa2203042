"""The server under load, minutes long: many clients, ten times too many, clients that leave, and forms that nobody has tried."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from deepseed.inference.engine import Engine
from deepseed.inference.sampling import SamplingParams
from deepseed.serve.app import Limits
from tests.serving import Running, running
from tests.test_serve import _stream, slow

SECONDS = float(os.environ.get("DEEPSEED_LOAD_SECONDS", "120"))
EXAMPLES = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def up(text: Any, weights: Any) -> Iterator[Running]:
    with running(Engine(weights, tokenizer=text, block=4, speculative="lookup"), Limits(queue=200, timeout=60)) as found:
        yield found
        found.settled()


def held() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.wide
def test_sixty_four_clients_for_minutes(text: Any, weights: Any, up: Running) -> None:
    """OpenAI's own client: no error, and what each gets is what an engine without a server says."""
    openai = pytest.importorskip("openai")
    plain = Engine(weights, tokenizer=text, block=4)
    draw = random.Random(0)
    asked = []
    for n in range(64):
        prompt = [draw.randrange(1, 300) for _ in range(draw.randrange(1, 60))]
        params = SamplingParams(draw.randrange(1, 60), temperature=draw.choice([0.0, 0.0, 0.8]), seed=n)
        asked.append((prompt, params, plain.generate([prompt], params)[0].text))
    until, done = time.monotonic() + SECONDS, Counter[str]()
    before = held()

    def client(n: int) -> None:
        own = random.Random(n)
        with openai.OpenAI(base_url=f"{up.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
            while time.monotonic() < until:
                prompt, params, want = own.choice(asked)
                said = dict(model="tiny", prompt=prompt, max_tokens=params.max_tokens, temperature=params.temperature, seed=params.seed)
                if own.random() < 0.5:
                    got = "".join(c.choices[0].text for c in made.completions.create(**said, stream=True))
                else:
                    got = made.completions.create(**said).choices[0].text
                done["right" if got == want else "wrong"] += 1

    with ThreadPoolExecutor(64) as many:
        list(many.map(client, range(64)))
    up.settled()
    print(f"{done.total()} requests in {SECONDS:g} s, {(held() - before) / 2**20:+.0f} MiB")
    assert done["right"] > 64 and not done["wrong"]


@pytest.mark.wide
def test_ten_times_too_many(text: Any, weights: Any) -> None:
    engine = Engine(weights, tokenizer=text, block=4, sequences=4)
    undo = slow(engine, 0.002)
    with running(engine, Limits(queue=12, timeout=60)) as up:
        asked = {"model": "tiny", "prompt": [5] * 30, "max_tokens": 20, "ignore_eos": True}
        until, seen, sizes = time.monotonic() + SECONDS / 2, Counter[int](), list[int]()

        def client(n: int) -> None:
            while time.monotonic() < until:
                status, headers, _ = up.send("POST", "/v1/completions", asked)
                seen[status] += 1
                assert status == 200 or int(headers["retry-after"]) >= 1
                if n == 0:
                    sizes.append(held())

        with ThreadPoolExecutor(160) as many:
            list(many.map(client, range(160)))
        undo()
        print(f"{seen[200]} answered, {seen[429]} refused, {(sizes[-1] - sizes[len(sizes) // 3]) / 2**20:+.0f} MiB in the last two thirds")
        assert set(seen) == {200, 429} and seen[429] > seen[200] > 0
        assert sizes[-1] - sizes[len(sizes) // 3] < 32 << 20
        up.settled()
        assert all(up.send("POST", "/v1/completions", asked)[0] == 200 for _ in range(5))
        up.settled()


@pytest.mark.wide
def test_ten_thousand_leave_in_mid_stream(up: Running) -> None:
    sizes: list[int] = []

    def one(n: int) -> None:
        draw = random.Random(n)
        asked = {"model": "tiny", "prompt": [draw.randrange(1, 300) for _ in range(draw.randrange(1, 40))], "max_tokens": draw.randrange(2, 100), "n": draw.randrange(1, 3), "stream": True, "ignore_eos": True}
        made, _ = _stream(up, asked)
        time.sleep(draw.choice([0, 0, 0.01]))
        made.close()
        if n in (3_000, 9_999):
            sizes.append(held())

    with ThreadPoolExecutor(16) as many:
        list(many.map(one, range(10_000)))
    up.settled()
    print(f"{(sizes[1] - sizes[0]) / 2**20:+.1f} MiB between the 3,000th and the last, {up.server.metrics.aborted} outputs were cut off")
    assert sizes[1] - sizes[0] < 24 << 20 and threading.active_count() < 60


# forms --------------------------------------------------------------------------------------------------------------------

WORDS = st.text("abcdefg xyz_-\"\\é/", min_size=1, max_size=6)
LEAVES = (
    st.just({"type": "null"}) | st.just({"type": "boolean"}) | st.builds(lambda a, b: {"type": "integer", "minimum": a, "maximum": a + b}, st.integers(-99, 99), st.integers(0, 999))
    | st.lists(WORDS, min_size=1, max_size=3, unique=True).map(lambda w: {"enum": w}) | st.integers(0, 6).map(lambda n: {"type": "string", "maxLength": n}) | st.just({"type": "string", "pattern": "^[a-z]{2}[0-9]$"})
)  # fmt: skip
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.builds(lambda of, n: {"type": "array", "items": of, "minItems": min(n, 1), "maxItems": n}, inner, st.integers(0, 3))
    | st.dictionaries(WORDS, inner, max_size=3).map(lambda fields: {"type": "object", "properties": fields, "required": sorted(fields), "additionalProperties": False})
    | st.lists(inner, min_size=1, max_size=2).map(lambda each: {"anyOf": each}),
    max_leaves=6,
)  # fmt: skip


def follows(value: Any, schema: dict[str, Any]) -> bool:
    """As much of JSON Schema as is drawn here."""
    if "anyOf" in schema:
        return any(follows(value, s) for s in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    match schema["type"]:
        case "null":
            return value is None
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
        case "string":
            return isinstance(value, str) and len(value) <= schema.get("maxLength", 99) and re.search(schema.get("pattern", ""), value) is not None
        case "array":
            return isinstance(value, list) and schema["minItems"] <= len(value) <= schema["maxItems"] and all(follows(v, schema["items"]) for v in value)
        case _:
            return isinstance(value, dict) and value.keys() == schema["properties"].keys() and all(follows(v, schema["properties"][k]) for k, v in value.items())


def drawn(up: Running, how: settings) -> Counter[str]:
    seen = Counter[str]()

    @how
    @given(SCHEMAS, st.sampled_from([0.0, 1.0]), st.integers(0, 1000))
    def each(schema: dict[str, Any], temperature: float, seed: int) -> None:
        asked = {"model": "tiny", "prompt": "a value: ", "max_tokens": 230, "temperature": temperature, "seed": seed, "n": 2 if temperature else 1}
        status, _, data = up.send("POST", "/v1/completions", asked | {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}})
        said = json.loads(data)
        assert status == 200, (schema, said)
        for choice in said["choices"]:
            seen[choice["finish_reason"]] += 1
            if choice["finish_reason"] == "stop":
                assert follows(json.loads(choice["text"]), schema), (schema, choice["text"])

    each()
    return seen


def test_drawn_forms_are_followed(up: Running) -> None:
    pytest.importorskip("llguidance")
    seen = drawn(up, EXAMPLES)
    assert seen["stop"] > 9 * seen["length"]


@pytest.mark.wide
def test_many_drawn_forms_are_followed(up: Running) -> None:
    pytest.importorskip("llguidance")
    seen = drawn(up, settings(EXAMPLES, max_examples=1500))
    print(dict(seen))
    assert seen["stop"] > 9 * seen["length"]
