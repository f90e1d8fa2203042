"""Drafts by prompt lookup on a real model: the same tokens, texts and log-probabilities, in fewer steps where the text repeats itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

from inference_models import VOCABULARY, generated, prompts, varied

from deepseed.inference.engine import Engine
from deepseed.inference.errors import InferenceError
from deepseed.inference.sampling import SamplingParams
from tests.serving import model, tokenizer

EXAMPLES = settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def llama() -> Any:
    return varied("LlamaForCausalLM")


@pytest.fixture(scope="module")
def repeats() -> Any:
    """Its greedy output soon runs in a circle."""
    made = varied("LlamaForCausalLM")
    for name, p in made.named_parameters():
        if p.dim() > 1 and "layers" in name:
            p.data.mul_(0.05)
    return made


params = st.builds(
    SamplingParams, st.integers(4, 30), temperature=st.sampled_from([0.0, 0.0, 0.7]), top_p=st.sampled_from([1.0, 0.8]), repetition_penalty=st.sampled_from([1.0, 1.2]), frequency_penalty=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 9), n=st.sampled_from([1, 1, 2]), stop_token_ids=st.lists(st.integers(0, VOCABULARY - 1), max_size=4), logprobs=st.sampled_from([None, 2]), prompt_logprobs=st.sampled_from([None, 1]),
)  # fmt: skip
requests = st.lists(st.tuples(st.sampled_from([(5, 6, 7) * 6, (1, 2) * 10, tuple(range(20)), (3, 3, 3)]), st.integers(3, 20), params, st.integers(0, 6), st.one_of(st.none(), st.integers(1, 12))), min_size=1, max_size=4)


@pytest.mark.parametrize("kind", ["llama", "repeats"])
def test_no_schedule_and_no_draft_change_a_token(kind: str, request: pytest.FixtureRequest) -> None:
    found = request.getfixturevalue(kind)
    plain = Engine(found, block=4, max_length=64)
    a_block = 4 * 2 * 2 * 2 * 16 * 4  # tokens, heads, keys and values, layers, width, bytes
    engines = [Engine(found, block=4, max_length=64, budget=24, sequences=3, cache=a_block * 14, speculative="lookup", draft=5), Engine(found, block=4, max_length=64, speculative="lookup")]

    @EXAMPLES
    @given(requests)
    @example([((5, 6, 7) * 6, 18, SamplingParams(30, ignore_eos=True), 0, None)] * 3)  # more than the first engine has blocks for
    @example([((1, 2) * 10, 20, SamplingParams(30, ignore_eos=True), 0, None)])  # what follows repeats itself: something is drafted, whatever is drawn
    def same(asked: Any) -> None:
        alone = [plain.generate([list(p)[:cut]], how)[0] for p, cut, how, *_ in asked]
        for engine in engines:
            check(asked, alone, engine)

    def check(asked: Any, alone: Any, engine: Engine) -> None:
        grows = {}
        for now in range(200):
            for n, (p, cut, how, arrives, leaves) in enumerate(asked):
                if arrives == now:
                    grows[n] = engine.request(list(p)[:cut], how)
                if leaves == now and n in grows:
                    engine.cancel(grows[n].request)
            engine.step()
            if engine.idle and now > 12:
                break
        for n, want in enumerate(alone):
            for a, b in zip(grows[n].outputs, want.outputs, strict=True):
                assert a.token_ids == b.token_ids[: len(a.token_ids)]
                if a.finish_reason != "cancelled":
                    assert (a.token_ids, a.finish_reason, len(a.logprobs)) == (b.token_ids, b.finish_reason, len(b.logprobs))
                for x, y in zip(a.logprobs, b.logprobs, strict=False):
                    assert x.token == y.token and x.logprob == pytest.approx(y.logprob, abs=1e-4)  # float32, other order of sums
        assert engine.scheduler.pool.free == engine.scheduler.pool.count and not engine._requests and not engine._of
        engine.scheduler.pool.check()

    same()
    assert all(e.counts.drafted_tokens > 0 for e in engines)
    assert engines[0].scheduler.preemptions > 0
    assert kind == "llama" or all(e.counts.accepted_tokens > 0 for e in engines)


def test_repetitive_text_takes_fewer_steps(repeats: Any) -> None:
    (prompt,) = prompts((8,), 1)
    (want,) = generated(repeats, [prompt], 96)
    plain, fast = Engine(repeats, max_length=128), Engine(repeats, max_length=128, speculative="lookup", draft=6)
    assert plain.generate([prompt], max_tokens=96)[0].token_ids == want == fast.generate([prompt], max_tokens=96)[0].token_ids
    assert plain.steps == 96 and fast.steps <= 96 / 3, fast.steps
    assert fast.steps + fast.counts.accepted_tokens == 96
    again = fast.generate([prompt], SamplingParams(96, temperature=0.3, seed=5))[0].token_ids
    assert again == plain.generate([prompt], SamplingParams(96, temperature=0.3, seed=5))[0].token_ids


def test_ranks_take_the_same_drafts(repeats: Any) -> None:
    (prompt,) = prompts((8,), 1)
    engine = Engine(repeats, "tp2", max_length=128, speculative="lookup")
    assert engine.generate([prompt], max_tokens=40)[0].token_ids == generated(repeats, [prompt], 40)[0]
    assert engine.counts.accepted_tokens > 0


def test_a_stop_within_a_draft_ends_the_text_there() -> None:
    text = tokenizer()
    found = model(text)
    plain, fast = (Engine(found, tokenizer=text, block=4, **how) for how in ({}, {"speculative": "lookup"}))
    prompt = "the quick brown fox jumps over the quick brown fox jumps over the quick"
    whole = plain.generate(prompt, max_tokens=60, ignore_eos=True)[0].text
    for stop in (whole[20:23], whole[31:33]):
        asked = SamplingParams(60, stop=stop, ignore_eos=True, min_tokens=3)
        a, b = plain.generate(prompt, asked)[0], fast.generate(prompt, asked)[0]
        assert (a.text, a.token_ids, a.finish_reason) == (b.text, b.token_ids, b.finish_reason)


def test_a_form_goes_back_where_a_draft_was_wrong(repeats: Any) -> None:
    class Steps:
        """A token may come that is not the sum of all before it, which needs all of them."""

        def follow(self, *_: Any) -> Any:
            return self

        def allowed(self, output: Any) -> Any:
            may = np.arange(VOCABULARY) % 3 != sum(output) % 3
            return may

    (prompt,) = prompts((8,), 1)
    asked = SamplingParams(40, form=Steps())
    plain, fast = (Engine(repeats, max_length=128, **how) for how in ({}, {"speculative": "lookup"}))
    want = plain.generate([prompt], asked)[0].token_ids
    assert all(t % 3 != sum(want[:n]) % 3 for n, t in enumerate(want))
    assert fast.generate([prompt], asked)[0].token_ids == want != plain.generate([prompt], replace(asked, form=None))[0].token_ids


def test_drafts_that_cannot_be(llama: Any) -> None:
    for how in ({"speculative": "magic"}, {"speculative": "lookup", "draft": 0}):
        with pytest.raises(InferenceError, match="fix: speculative='lookup'"):
            Engine(llama, **how)
