"""Forms that cannot be followed: a 400 where it can be known, an error object where it comes up later, never a broken text with "stop"."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy
import pytest

pytest.importorskip("transformers")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("llguidance")

from deepseed.inference.engine import Engine
from deepseed.inference.errors import InferenceError
from deepseed.inference.sampling import SamplingParams
from deepseed.serve import constrained
from deepseed.serve.app import Limits
from tests.serving import Running, running

GOOD = {"model": "tiny", "prompt": "a", "temperature": 0, "max_tokens": 60}
FAR = 10**30


@pytest.fixture(scope="module")
def up(text: Any, weights: Any) -> Iterator[Running]:
    with running(Engine(weights, tokenizer=text, block=4), Limits(queue=64, timeout=60)) as found:
        yield found
        found.settled()


def schema(of: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": of}}}


ENDLESS = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"], "additionalProperties": False}


@pytest.mark.parametrize(
    ("form", "param", "says"),
    [
        (schema({"$ref": "#"}), "response_format", "no text has it"), (schema({"$ref": "#/$defs/x", "$defs": {"x": {"$ref": "#/$defs/x"}}}), "response_format", "no text has it"),
        (schema(ENDLESS), "response_format", "Too many items"), (schema({"type": "array", "items": {"const": 1}, "minItems": 100_000}), "response_format", "Too many items"),
        ({"structured_outputs": {"grammar": "start: start"}}, "structured_outputs", "no text has it"),
        (schema({"type": "integer", "minimum": FAR, "maximum": FAR + 5}), "response_format", "beyond 2**53"), (schema({"items": {"const": [{"a": 2**60 + 1}]}}), "response_format", "beyond 2**53"),
        (schema({"type": "integer", "maximum": -FAR}), "response_format", "beyond 2**53"), (schema({"type": "integer", "multipleOf": FAR}), "response_format", "beyond 2**53"),
        ({"structured_outputs": {"choice": ["a" * 200_000]}}, "structured_outputs", "200000"), ({"structured_outputs": {"choice": [f"{n:0100}" for n in range(20_000)]}}, "structured_outputs", "2000000"),
        ({"structured_outputs": {"regex": "a" * 200_000}}, "structured_outputs", "200000"), ({"structured_outputs": {"json": {"const": "a" * 9000}}}, "structured_outputs", "9000"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs", "the form of the output"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_refused(up: Running, form: dict[str, Any], param: str, says: str) -> None:
    status, error = up.error("/v1/completions", GOOD | form)
    assert (status, error["param"]) == (400, param) and says in error["message"], error


def ask(up: Running, form: dict[str, Any], **more: Any) -> Any:
    status, _, data = up.send("POST", "/v1/completions", GOOD | form | more)
    assert status == 200, data
    return json.loads(data)["choices"][0]


@pytest.mark.parametrize("temperature", [0, 1])
def test_thousands_of_choices_work(up: Running, temperature: int) -> None:
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz é\"\\\n", k=draw.randint(5, 25))) for _ in range(3000)]
    for form in ({"structured_outputs": {"choice": words}}, {"structured_outputs": {"choice": [str(n) * 20 for n in range(3000)]}}):
        got = ask(up, form, temperature=temperature, max_tokens=100)
        assert got["finish_reason"] == "stop" and got["text"] in form["structured_outputs"]["choice"]
    assert ask(up, {"structured_outputs": {"choice": ["", "x"]}})["text"] in ("", "x") and ask(up, {"structured_outputs": {"choice": [""]}})["text"] == ""
    odd = ["\x00\x7f\u2028\U0001f600", "${a}|/b/", "a\n"]
    assert ask(up, {"structured_outputs": {"choice": odd}}, temperature=temperature)["text"] in odd


def test_bounds_are_kept_as_far_as_numbers_are_exact(up: Running) -> None:
    for low, high in ((0, FAR), (-FAR, -3), (2**53 - 2, 2**53 + 9)):
        got = ask(up, schema({"type": "integer", "minimum": low, "maximum": high}))
        assert got["finish_reason"] == "stop" and low <= json.loads(got["text"]) <= high
    assert ask(up, schema({"type": "object", "properties": {"maximum": {"const": 1}}, "required": ["maximum"], "additionalProperties": False}))["text"] == '{"maximum":1}'


def test_a_stop_string_ends_a_form_too(up: Running) -> None:
    """As OpenAI's API has it: the request asked for it, and the text before it is the beginning of one of the form."""
    of = {"type": "object", "properties": {"a": {"enum": ["x"]}, "b": {"const": 1}}, "required": ["a", "b"], "additionalProperties": False}
    got = ask(up, schema(of), stop=[","])
    assert (got["text"], got["finish_reason"]) == ('{"a":"x"', "stop")


class Breaks:
    """A form whose library gives up after some tokens."""

    def follow(self, *_: Any) -> Any:
        return self

    def allowed(self, output: Any) -> Any:
        if len(output) > 3:
            raise InferenceError("the form of the output: Too many items")
        may = numpy.zeros(len(self.text), dtype=bool)
        may[5 + len(output)] = True
        return may

    def __init__(self, text: Any) -> None:
        self.text = text


@pytest.mark.parametrize("speculative", [None, "lookup"])
def test_the_engine_ends_an_output_whose_form_fails(text: Any, weights: Any, speculative: str | None) -> None:
    engine = Engine(weights, tokenizer=text, block=4, speculative=speculative)
    bad, good = engine.generate([[7, 8], [7, 8]], [SamplingParams(20, form=Breaks(text), n=2), SamplingParams(20, ignore_eos=True)])
    assert [o.finish_reason for o in bad.outputs] == ["error"] * 2 and [o.token_ids for o in bad.outputs] == [[5, 6, 7, 8]] * 2
    assert good.finish_reason == "length" and good.token_ids == engine.generate([[7, 8]], max_tokens=20, ignore_eos=True)[0].token_ids
    assert engine.scheduler.pool.free == engine.scheduler.pool.count and not engine._requests and not engine._of


def test_a_form_that_fails_later_is_an_error(up: Running, text: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constrained.Grammar, "follow", lambda *_: Breaks(text))
    status, error = up.error("/v1/completions", GOOD | {"structured_outputs": {"regex": "[a-z]+"}})
    assert (status, error["type"]) == (400, "invalid_request_error") and "Too many items" in error["message"]
    _, _, data = up.send("POST", "/v1/completions", GOOD | {"structured_outputs": {"regex": "[a-z]+"}, "stream": True})
    events = data.decode().split("\n\n")
    assert "Too many items" in json.loads(events[-3][6:])["error"]["message"] and events[-2] == "data: [DONE]" and b'"stop"' not in data
    up.settled()


def test_a_mask_that_takes_too_long_is_an_error(text: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constrained, "MOST_SECONDS", 0.0)
    monkeypatch.setattr(constrained, "MOST_A_TOKEN", 0.0)
    followed = constrained.Grammar(str(constrained._library("x").LLMatcher.grammar_from_regex("a{200000}"))).follow(text, frozenset({text.eos_token_id}), len(text))
    with pytest.raises(InferenceError, match="too large"):
        followed.allowed([])


def test_nobody_waits_for_a_form_that_compiles(up: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither who asks for none, nor the thread that reads texts."""
    compile_, go = constrained.matcher, threading.Event()
    monkeypatch.setattr(constrained, "matcher", lambda *given: (go.wait(30), compile_(*given))[1])
    got: list[Any] = []
    asks = threading.Thread(target=lambda: got.append(ask(up, {"structured_outputs": {"choice": ["yes", "no"]}})))
    asks.start()
    while up.server.taken == 0:
        time.sleep(0.01)
    assert up.send("POST", "/v1/completions", GOOD)[0] == 200 and not got
    go.set()
    asks.join(30)
    assert got[0]["text"] in ("yes", "no")
    monkeypatch.setattr(constrained, "matcher", lambda *_: time.sleep(0.5))
    monkeypatch.setattr("deepseed.serve.app.COMPILING", 0.1)
    assert up.error("/v1/completions", GOOD | {"structured_outputs": {"choice": ["yes"]}})[1]["code"] == "form_too_large"
