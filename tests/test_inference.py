"""Requests to one engine: whatever shares their steps they say what ``generate`` says; they end, stream, fork and leave as asked."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from inference_models import VOCABULARY, generated, ids, prompts, varied

from deepseed.inference.engine import Engine
from deepseed.inference.errors import InferenceError
from deepseed.inference.sampling import SamplingParams


@pytest.fixture(scope="module")
def llama() -> Any:
    return varied("LlamaForCausalLM")


@pytest.mark.parametrize(
    ("how", "least"),
    [
        (dict(budget=3, block=1, sequences=2), {}), (dict(budget=64, block=16, sequences=8), {}), (dict(budget=16, block=4, sequences=8, chunk=5), {}),
        (dict(budget=16, block=4, sequences=8, cache=23), {"preempted": 1}), (dict(budget=16, block=8, sequences=3, prefix=False), {}),
    ],
)  # fmt: skip
def test_no_schedule_changes_a_token(llama: Any, how: dict[str, Any], least: dict[str, int]) -> None:
    want = generated(llama, prompts(), 32)
    if "cache" in how:
        how = {**how, "cache": how["cache"] * how["block"] * 2 * 2 * 2 * 16 * 4}  # blocks, to bytes
    engine = Engine(llama, max_length=128, **how)
    seen = []
    finish = engine.scheduler.finish
    engine.scheduler.finish = lambda s: (seen.append(s.preempted), finish(s))[1]  # type: ignore[method-assign]
    assert ids(engine.generate(prompts(), max_tokens=32)) == want
    assert max(seen) >= least.get("preempted", 0)


def test_a_known_prefix_changes_no_token(llama: Any) -> None:
    shared = prompts((32,), 1)[0]
    asked = [[*shared, n, n + 1] for n in range(3)] + [shared]
    want = generated(llama, asked, 16)
    engine = Engine(llama, block=4, max_length=128)
    assert ids(engine.generate(asked[:1], max_tokens=16)) == want[:1]
    before = engine.computed_tokens
    done = engine.generate(asked[1:], max_tokens=16)
    assert ids(done) == want[1:]
    assert [c.cached_tokens for c in done] == [32, 32, 28]
    assert engine.computed_tokens - before == 2 + 2 + 4 + 3 * 15


def test_cancelled_and_late_requests(llama: Any) -> None:
    all_of = prompts((5, 30, 12, 8), 2)
    want = generated(llama, all_of, 24)
    engine = Engine(llama, block=4, budget=8, max_length=128)
    names = [engine.add(all_of[0], SamplingParams(24)), engine.add(all_of[1], SamplingParams(24))]
    got: dict[str, list[int]] = {}
    for n in range(200):
        if n == 3:
            names.append(engine.add(all_of[2], SamplingParams(24)))
        if n == 5:
            engine.cancel(names[1])
        if n == 6:
            names.append(engine.add(all_of[3], SamplingParams(24)))
        for update in engine.step():
            got.setdefault(update.request, []).extend(update.token_ids)
        if engine.idle and n > 6:
            break
    assert [got[names[i]] for i in (0, 2, 3)] == [want[0], want[2], want[3]]
    assert len(got.get(names[1], [])) < 24
    assert engine.scheduler.pool.free == engine.scheduler.pool.count and not engine._requests and not engine._of


def test_nobody_waits_for_a_step(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a step computes and while it draws, requests come and go; the next step sees them."""
    from threading import Event, Thread

    from deepseed.inference import engine as where

    all_of = prompts((5, 12, 8), 2)
    want = generated(llama, all_of, 4)
    for blocked, of in (("run", lambda e: (e.executable, "run")), ("draw", lambda e: (where, "sample"))):
        engine = Engine(llama, block=4, max_length=128)
        target, name = of(engine)
        inside, go = Event(), Event()
        whole = getattr(target, name)

        def waits(*args: Any, inside: Any = inside, go: Any = go, whole: Any = whole) -> Any:
            inside.set()
            assert go.wait(30)
            return whole(*args)

        first, gone = engine.request(all_of[0], SamplingParams(4)), engine.request(all_of[1], SamplingParams(4))
        with monkeypatch.context() as patch:
            patch.setattr(target, name, waits)
            got: list[Any] = []
            thread = Thread(target=lambda engine=engine, got=got: got.append(engine.step()))
            thread.start()
            assert inside.wait(30)
            engine.cancel(gone.request)
            late = engine.request(all_of[2], SamplingParams(4))  # both returned, and the step is not over
            assert thread.is_alive() and not engine.idle, blocked
            go.set()
            thread.join(30)
        assert got, "the step failed"
        while not engine.idle:
            engine.step()
        assert [first.token_ids, late.token_ids] == [want[0], want[2]] and gone.finish_reason == "cancelled" and len(gone.token_ids) <= 1
        assert engine.scheduler.pool.free == engine.scheduler.pool.count and not engine._requests and not engine._of


def test_n_outputs_of_one_prompt(llama: Any) -> None:
    """The prompt is computed once; outputs differ, and are those that the seed gives alone."""
    (prompt,) = prompts((21,), 3)
    engine = Engine(llama, block=4, max_length=128)
    params = SamplingParams(12, temperature=1.0, seed=7, n=3)
    (done,) = engine.generate([prompt], params)
    outputs = [o.token_ids for o in done.outputs]
    assert engine.computed_tokens == 21 + 3 * 11
    assert len({tuple(o) for o in outputs}) == 3
    again = Engine(llama, block=8, budget=5, max_length=128).generate([prompts((40,), 4)[0], prompt], params)[1]
    assert [o.token_ids for o in again.outputs] == outputs


def test_logprobs_are_those_of_the_model(llama: Any) -> None:
    (prompt,) = prompts((9,), 5)
    (done,) = Engine(llama, max_length=128).generate([prompt], SamplingParams(4, logprobs=3))
    with torch.no_grad():
        logits = llama(torch.tensor([prompt + done.token_ids])).logits[0, 8:-1]
    want = torch.log_softmax(logits, -1)
    for n, drawn in enumerate(done.outputs[0].logprobs):
        best = want[n].topk(3)
        assert drawn.token == done.token_ids[n] and [t for t, _ in drawn.top] == best.indices.tolist()
        assert torch.allclose(torch.tensor([x for _, x in drawn.top]), best.values, atol=1e-4)  # float32, other order of sums
        assert drawn.logprob == pytest.approx(float(want[n, drawn.token]), abs=1e-4)


@pytest.mark.parametrize("how", [{"budget": 5, "block": 4}, {"budget": 64, "block": 4}, {"budget": 16, "block": 4, "cache": 14 * 4 * 2 * 2 * 2 * 16 * 4}])
def test_logprobs_of_a_prompt_are_those_of_the_model(llama: Any, how: dict[str, Any]) -> None:
    """In chunks, after a known prefix and after a preemption: each token once."""
    all_of = [*prompts((24, 20, 9), 5), prompts((24,), 5)[0]]
    engine = Engine(llama, max_length=56, **how)
    for _ in range(2):
        for prompt, done in zip(all_of, engine.generate(all_of, SamplingParams(28, prompt_logprobs=2, n=2)), strict=True):
            with torch.no_grad():
                want = torch.log_softmax(llama(torch.tensor([prompt])).logits[0], -1)
            assert [d.token for d in done.prompt_logprobs] == prompt and done.prompt_logprobs[0].logprob is None
            for n, drawn in enumerate(done.prompt_logprobs[1:]):
                assert drawn.logprob == pytest.approx(float(want[n, prompt[n + 1]]), abs=1e-4)  # float32, other order of sums
                assert [p for _, p in drawn.top] == pytest.approx(want[n].topk(2).values.tolist(), abs=1e-4)
    assert "cache" not in how or engine.scheduler.preemptions > 0


def test_a_text_ends_where_it_should(llama: Any) -> None:
    (prompt,) = prompts((9,), 6)
    (want,) = generated(llama, [prompt], 16)
    engine = Engine(llama, max_length=128)
    end = want[6]
    first = want.index(end)
    done = engine.generate([prompt], SamplingParams(16, stop_token_ids=[end]))[0]
    assert (done.token_ids, done.finish_reason) == (want[: first + 1], "stop")
    assert engine.generate([prompt], SamplingParams(16))[0].finish_reason == "length"
    late = engine.generate([prompt], SamplingParams(16, stop_token_ids=[end], min_tokens=first + 2))[0]
    assert len(late.token_ids) >= first + 2 and end not in late.token_ids[: first + 2]
    llama.generation_config.eos_token_id = end
    try:
        assert Engine(llama, max_length=128).generate([prompt], max_tokens=16)[0].token_ids == want[: first + 1]
        assert Engine(llama, max_length=128).generate([prompt], max_tokens=16, ignore_eos=True)[0].token_ids == want
    finally:
        llama.generation_config.eos_token_id = None
    assert len(Engine(llama, max_length=12).generate([prompt], max_tokens=16)[0].token_ids) == 3


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda e: e.generate("text"), "no tokenizer"), (lambda e: e.generate([[VOCABULARY]]), f"token {VOCABULARY} is outside the vocabulary"), (lambda e: e.generate([[]]), "empty prompt"),
        (lambda e: e.generate([[1] * 128]), "a prompt of 128 tokens leaves no room in 128"), (lambda e: e.generate([[1]], max_tokens=0), "max_tokens=0"),
        (lambda e: e.generate([[1]], stop="x"), "stop strings need a tokenizer"), (lambda e: e.generate([[1]], logit_bias={-1: 1.0}), "token -1 of stop_token_ids or logit_bias is outside"), (lambda e: e.generate([[1], [2]], [SamplingParams()]), "2 prompts, but 1 params"),
    ],
)  # fmt: skip
def test_requests_that_cannot_be_served(llama: Any, call: Any, says: str) -> None:
    engine = Engine(llama, max_length=128)
    with pytest.raises(InferenceError, match=says):
        call(engine)
    assert engine.idle and engine.scheduler.pool.free == engine.scheduler.pool.count


def test_engines_that_cannot_be_made(llama: Any, tmp_path: Path) -> None:
    for call, says in [
        (lambda: Engine(tmp_path), "no folder with a config.json"),
        (lambda: Engine(llama, dtype="int3"), "dtype 'int3' is unknown"), (lambda: Engine(llama, cache=64), "room for no block"), (lambda: Engine(torch.nn.Linear(2, 2)), "has no config"),
    ]:  # fmt: skip
        with pytest.raises(InferenceError, match=says):
            call()


def test_the_command_and_the_folder(llama: Any, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from deepseed.cli import app

    llama.save_pretrained(tmp_path)
    all_of = prompts((5, 7), 7)
    want = generated(llama, all_of, 8)
    said = [word for prompt in all_of for word in ("--prompt-ids", ",".join(map(str, prompt)))]
    done = CliRunner().invoke(app, ["generate", str(tmp_path), *said, "--max-tokens", "8", "--json"])
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [x["token_ids"] for x in lines] == want and {x["finish_reason"] for x in lines} == {"length"}
    done = CliRunner().invoke(app, ["generate", str(tmp_path)])
    assert done.exit_code == 2


def test_deepspeeds_doors(llama: Any) -> None:
    import deepseed

    (prompt,) = prompts((6,), 8)
    (want,) = generated(llama, [prompt], 8)
    engine = deepseed.init_inference(llama, tensor_parallel={"tp_size": 1}, dtype=torch.float32, replace_with_kernel_inject=True)
    padded = torch.tensor([[0, 0, *prompt], [*prompt, 1, 2]])
    mask = torch.tensor([[0] * 2 + [1] * 6, [1] * 8])
    assert engine.generate(padded, attention_mask=mask, max_new_tokens=8)[0].tolist() == [0, 0, *prompt, *want]
    assert deepseed.pipeline(llama)([prompt], max_new_tokens=8)[0].token_ids == want
    with pytest.raises(InferenceError, match="does not know wrong"):
        deepseed.init_inference(llama, wrong=1)
    with pytest.raises(InferenceError, match=r"checkpoint=(.|\n)*fix: .*weights="):
        deepseed.init_inference(llama, checkpoint="weights.json")


def test_streams_end_and_leave(llama: Any) -> None:
    import asyncio

    from deepseed.inference.stream import Serving

    all_of = prompts((6, 11), 9)
    want = generated(llama, all_of, 12)
    engine = Engine(llama, block=4, max_length=128)
    serving = Serving(engine)

    async def whole(prompt: list[int]) -> list[int]:
        return [t async for update in serving.stream(prompt, SamplingParams(12)) for t in update.token_ids]

    async def leaves() -> None:
        stream = serving.stream(all_of[0], SamplingParams(100))
        async for _ in stream:
            break
        await stream.aclose()  # type: ignore[attr-defined]

    async def both() -> tuple[list[int], list[int], None]:
        return await asyncio.gather(whole(all_of[0]), whole(all_of[1]), leaves())

    try:
        assert list(asyncio.run(both())[:2]) == want
        for _ in range(100):
            if engine.idle:
                break
            time.sleep(0.05)
        assert engine.idle and engine.scheduler.pool.free == engine.scheduler.pool.count
    finally:
        serving.close()
