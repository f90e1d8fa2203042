"""Several engines behind one server: who gets which request, and what a lost one takes with it."""

from __future__ import annotations

import json
import os
import secrets
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from deepseed.inference.engine import Engine
from deepseed.inference.sampling import SamplingParams
from deepseed.serve.app import Limits
from deepseed.serve.replicas import Card, Prefixes, Replicas, answer
from tests.serving import running
from tests.test_serve import children, slow, started

PROMPT = "once upon a time"


@contextmanager
def together(text: Any, engines: list[Engine], folder: Path, spare: Engine | None = None) -> Iterator[Replicas]:
    """Replicas whose processes are threads of this one; ``spare`` takes the place of one that has ended."""
    address, key = str(folder / "s"), secrets.token_bytes(8)

    def end(engine: Engine, n: int) -> None:
        with suppress(ZeroDivisionError):
            answer(engine, address, key, n)

    with Listener(address, "AF_UNIX", authkey=key) as listener:
        threads: list[threading.Thread] = []

        def begin(engine: Engine, n: int) -> Any:
            threads.append(threading.Thread(target=end, args=(engine, n)))
            threads[-1].start()
            connection = listener.accept()
            return connection, connection.recv()

        found = [begin(e, n) for n, e in enumerate(engines)]
        made = Replicas(found, text, None if spare is None else lambda n: begin(spare, n))
        try:
            yield made
        finally:
            made.close()
            for thread in threads:
                thread.join(30)
                assert not thread.is_alive()


def test_requests_go_where_their_beginning_is(text: Any, weights: Any, plain: Engine, tmp_path: Path) -> None:
    engines = [Engine(weights, tokenizer=text, block=4, sequences=2) for _ in range(2)]
    with together(text, engines, tmp_path) as several, running(several, Limits(timeout=60)) as up:
        assert up.server.capacity == 2 + 2 + 256 and json.loads(up.send("GET", "/health")[2]) == {"status": "ok", "replicas": 2, "of": 2, "started_again": 0}

        def ask(prompt: list[int], **more: Any) -> Any:
            status, _, data = up.send("POST", "/v1/completions", {"model": "tiny", "prompt": prompt, "max_tokens": 6, "temperature": 0, "ignore_eos": True, **more})
            assert status == 200, data
            return json.loads(data)

        a, b = list(range(40, 60)), list(range(80, 100))
        cached = [ask(p)["usage"]["prompt_tokens_details"]["cached_tokens"] for p in (a, b, a, b, [*a[:12], 7, 7])]
        assert cached == [0, 0, 16, 16, 12]
        assert [r.sent for r in several.all] == [3, 2]
        want = plain.generate([a], SamplingParams(6, temperature=0.9, seed=3, n=2, ignore_eos=True, logprobs=1))[0]
        got = ask(a, temperature=0.9, seed=3, n=2, logprobs=1)
        assert [c["text"] for c in got["choices"]] == [o.text for o in want.outputs]
        assert got["choices"][1]["logprobs"]["token_logprobs"] == pytest.approx([d.logprob for d in want.outputs[1].logprobs], abs=1e-4)  # float32, other order of sums
        assert several.counts.steps == sum(e.counts.steps for e in engines) and not several._where and all(r.load == 0 for r in several.all)


def test_a_full_replica_gives_to_one_that_is_not(text: Any, weights: Any, tmp_path: Path) -> None:
    engines = [Engine(weights, tokenizer=text, block=4, sequences=1) for _ in range(2)]
    with together(text, engines, tmp_path) as several:
        prompt = list(range(40, 60))
        asked = [several.request(prompt, SamplingParams(200, ignore_eos=True)) for _ in range(4)]
        assert [r.load for r in several.all] == [2, 2]
        for each in asked:
            several.cancel(each.request)
        assert [r.load for r in several.all] == [0, 0]
        until = time.monotonic() + 30
        while any(not e.idle or e.scheduler.pool.free < e.scheduler.pool.count for e in engines):
            assert time.monotonic() < until
            time.sleep(0.01)


def test_what_is_known_is_bounded_and_the_oldest_goes() -> None:
    known = Prefixes(Card(0, 4, 2, 8, 99, 99, frozenset()))
    known.learn([1, 2, 3, 4, 5])
    assert [known.known(t) for t in ([1, 2, 3, 4, 5, 6], [1, 2, 9, 9], [3, 4])] == [2, 1, 0]
    known.learn(list(range(10, 16)))
    assert known.known([1, 2, 3, 4]) == 0 and known.known([10, 11, 12, 13, 14, 15]) == 3 and len(known._known) == 4


def test_a_lost_replica_takes_only_its_own(text: Any, weights: Any, plain: Engine, tmp_path: Path) -> None:
    engines = [Engine(weights, tokenizer=text, block=4) for _ in range(2)]
    for each in engines:
        slow(each, 0.02)
    with together(text, engines, tmp_path) as several, running(several, Limits(timeout=60)) as up:
        asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 120, "temperature": 0, "ignore_eos": True}
        got: dict[int, Any] = {}
        there = [threading.Thread(target=lambda n=n: got.__setitem__(n, up.send("POST", "/v1/completions", asked | {"prompt": [n + 5] * 9}))) for n in range(2)]
        for thread in there:
            thread.start()
        while not all(r.load for r in several.all):
            time.sleep(0.01)
        lost = several.all[1]
        engines[1].step = lambda: 1 / 0  # type: ignore[assignment,return-value]
        for thread in there:
            thread.join(60)
        answers = sorted((status, json.loads(data)) for status, _, data in got.values())
        assert [status for status, _ in answers] == [200, 500]
        assert "replica 1 of 2 has ended" in answers[1][1]["error"]["message"] and "ZeroDivisionError" in answers[1][1]["error"]["message"] and lost.lost
        status, _, data = up.send("POST", "/v1/completions", asked)
        assert status == 200 and json.loads(data)["choices"][0]["text"] == plain.generate(PROMPT, max_tokens=120, ignore_eos=True)[0].text
        assert json.loads(up.send("GET", "/health")[2]) == {"status": "ok", "replicas": 1, "of": 2, "started_again": 0}
        engines[0].step = lambda: 1 / 0  # type: ignore[assignment,return-value]
        status, error = up.error("/v1/completions", asked)
        assert status == 500 and "replica 0 of 2" in error["message"]
        until = time.monotonic() + 10
        while up.send("GET", "/health")[0] != 503:
            assert time.monotonic() < until
            time.sleep(0.01)


def test_a_lost_replica_is_started_again(text: Any, weights: Any, plain: Engine, tmp_path: Path) -> None:
    """What it has counted stays counted, and it gets requests as before."""
    first, second, spare = (Engine(weights, tokenizer=text, block=4) for _ in range(3))
    with together(text, [first, second], tmp_path, spare) as several, running(several, Limits(timeout=60)) as up:
        asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        want = plain.generate(PROMPT, max_tokens=12, ignore_eos=True)[0].text
        assert json.loads(up.send("POST", "/v1/completions", asked)[2])["choices"][0]["text"] == want
        steps = first.counts.steps
        first.step = lambda: 1 / 0  # type: ignore[assignment,return-value]
        assert up.error("/v1/completions", asked)[0] == 500
        until = time.monotonic() + 20
        while (health := json.loads(up.send("GET", "/health")[2]))["replicas"] < 2:
            assert time.monotonic() < until
            time.sleep(0.01)
        assert health == {"status": "ok", "replicas": 2, "of": 2, "started_again": 1} and several.counts.steps >= steps > 0
        assert 'deepseed:replicas_started_again{model_name="tiny",engine="0"} 1' in up.send("GET", "/metrics")[2].decode()
        for n in range(4):  # of no known beginning: to the one that had the fewest requests
            status, _, data = up.send("POST", "/v1/completions", asked | {"prompt": [n + 5] * 9})
            assert status == 200, data
        assert spare.counts.steps > 0 and json.loads(up.send("POST", "/v1/completions", asked)[2])["choices"][0]["text"] == want


@pytest.mark.wide
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize("plan", ["dp2", "dp2+tp2"])
def test_processes_of_replicas(plan: str, text: Any, weights: Any, plain: Engine, tmp_path: Path) -> None:
    weights.save_pretrained(tmp_path)
    text.save_pretrained(tmp_path)
    want = plain.generate(PROMPT, max_tokens=12)[0].text
    process, up = started(tmp_path, "--plan", plan)
    try:
        asked = {"model": tmp_path.name, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
        replicas = children(process.pid)
        assert len(replicas) == 2
        leaf = [children(r) for r in replicas]
        assert [len(x) for x in leaf] == [0 if plan == "dp2" else 2] * 2
        for _ in range(2):
            status, _, data = up.send("POST", "/v1/completions", asked)
            assert status == 200 and json.loads(data)["choices"][0]["text"] == want
        os.kill(leaf[0][1] if leaf[0] else replicas[0], signal.SIGKILL)
        until = time.monotonic() + 120
        while (health := json.loads(up.send("GET", "/health")[2]))["replicas"] < 2 or not health["started_again"]:
            status, _, data = up.send("POST", "/v1/completions", asked)
            assert status == 200 or "replica 0 of 2 has ended" in json.loads(data)["error"]["message"], data
            assert time.monotonic() < until
            time.sleep(0.2)
        status, _, data = up.send("POST", "/v1/completions", asked)
        assert status == 200 and json.loads(data)["choices"][0]["text"] == want
        new = children(process.pid)
        assert len(new) == 2 and replicas[1] in new and replicas[0] not in new and b"deepseed:replicas_started_again" in up.send("GET", "/metrics")[2]
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
        assert not any(Path(f"/proc/{p}").exists() for p in (*replicas, *new, *leaf[0], *leaf[1]))
    finally:
        process.kill()
        process.wait()


@pytest.mark.turn
def test_replicas_that_cannot_start_are_named(tmp_path: Path) -> None:
    from deepseed.inference.errors import InferenceError
    from deepseed.serve import ranks

    with pytest.raises(InferenceError, match=r"replica [01] of 2 ended with exit code 1"):
        ranks.serve(ranks.Asked(str(tmp_path / "nothing"), "dp2", None, {}, "x", "127.0.0.1", 0, {}))
