"""Drawing tokens: filters equal those of transformers, draws follow their chances, seeds decide alone; and text comes in whole characters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseed.inference.detokenize import TextOf
from deepseed.inference.errors import InferenceError
from deepseed.inference.sampling import Row, SamplingParams, adjusted, number, probabilities, sample


def row(output: list[int] | None = None, prompt: list[int] | None = None, seed: int = 0, **said: Any) -> Row:
    return Row(SamplingParams(**said), seed, prompt or [1], output or [])


LOGITS = torch.randn(1, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3


@pytest.mark.parametrize(
    "said", [{"temperature": 0.7}, {"temperature": 1.5, "top_k": 5}, {"temperature": 1.0, "top_p": 0.8}, {"temperature": 1.3, "min_p": 0.1}, {"temperature": 0.9, "top_k": 12, "top_p": 0.9, "min_p": 0.05}]
)  # fmt: skip
def test_filters_are_those_of_transformers(said: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    want = LOGITS.clone()
    makers = {"temperature": transformers.TemperatureLogitsWarper, "top_k": transformers.TopKLogitsWarper, "top_p": transformers.TopPLogitsWarper, "min_p": transformers.MinPLogitsWarper}
    for field, maker in makers.items():
        if field in said:
            want = maker(said[field])(torch.zeros(1, 1, dtype=torch.long), want)
    got = probabilities(LOGITS, [SamplingParams(**said)])
    assert (got - torch.softmax(want, -1)).abs().max() <= 1e-12


def test_rows_are_filtered_each_in_its_own_way() -> None:
    each = [SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_k=1), SamplingParams(temperature=0.5, top_p=0.3), SamplingParams(temperature=1.0, min_p=1.0), SamplingParams(temperature=2.0, top_k=100)]
    together = probabilities(LOGITS.repeat(5, 1), each)
    for n, params in enumerate(each):
        assert (together[n] - probabilities(LOGITS, [params])[0]).abs().max() <= 1e-14
    assert int((together[1] > 0).sum()) == int((together[3] > 0).sum()) == 1 and int((together[4] > 0).sum()) == 40


def test_penalties_are_those_of_transformers_and_openai() -> None:
    transformers = pytest.importorskip("transformers")
    prompt, output = [3, 5], [5, 7, 7]
    want = transformers.RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([prompt + output]), LOGITS.clone())
    assert (adjusted(LOGITS, [row(output, prompt, repetition_penalty=1.3)]) - want).abs().max() <= 1e-14
    got = adjusted(LOGITS, [row(output, prompt, presence_penalty=0.5, frequency_penalty=0.25, logit_bias={9: 2.0})]) - LOGITS
    assert {int(n): float(got[0, n]) for n in got[0].nonzero()} == pytest.approx({5: -0.75, 7: -1.0, 9: 2.0})


def test_draws_follow_their_chances() -> None:
    """4000 positions of one seed: every token within 5 standard deviations, and no token that was filtered out."""
    params = {"temperature": 1.0, "top_p": 0.95}
    chance = probabilities(LOGITS, [SamplingParams(**params)])[0]
    n = 4000
    drawn = torch.tensor([d.token for d in sample(LOGITS.repeat(n, 1), [row([0] * i, seed=11, **params) for i in range(n)])])
    counts = torch.bincount(drawn, minlength=40).double()
    assert not counts[chance == 0].any()
    assert ((counts - n * chance).abs() <= 5 * (n * chance * (1 - chance)).sqrt() + 1e-9).all()


def test_a_seed_decides_alone() -> None:
    alone = sample(LOGITS, [row([2, 4], seed=5, temperature=1.0)])[0].token
    others = [row([1], seed=8, temperature=2.0), row([2, 4], seed=5, temperature=1.0), row(seed=5)]
    drawn = sample(LOGITS.repeat(3, 1), others)
    assert drawn[1].token == alone and drawn[2].token == int(LOGITS.argmax())
    assert len({number(seed, at) for seed in range(30) for at in range(30)}) == 900


def test_the_last_token_is_never_one_without_a_chance() -> None:
    logits = torch.full((64, 8), -torch.inf)
    logits[:, 2] = 0.0
    assert {d.token for d in sample(logits, [row([0] * i, temperature=1.0) for i in range(64)])} == {2}


def test_logits_stay_as_they_are() -> None:
    before = LOGITS.clone()
    sample(LOGITS, [row([1], temperature=1.0, repetition_penalty=2.0, logprobs=2)])
    assert torch.equal(LOGITS, before)


@pytest.mark.parametrize(("said", "says"), [({"temperature": -1}, "temperature=-1 is out of range"), ({"top_p": 0}, "top_p=0"), ({"n": 0}, "n=0"), ({"stop": [""]}, "empty stop string"), ({"max_tokens": 2, "min_tokens": 3}, "from 0 to max_tokens = 2")])
def test_parameters_out_of_range(said: dict[str, Any], says: str) -> None:
    with pytest.raises(InferenceError, match=says):
        SamplingParams(**said)


class Bytes:
    """A tokenizer whose tokens are bytes: characters span tokens."""

    def decode(self, tokens: list[int], **_: Any) -> str:
        return bytes(tokens).decode("utf-8", "replace")


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="aüb€😀 ", max_size=24), st.text(alphabet="aü€", max_size=6), st.lists(st.text(alphabet="aüb😀", min_size=1, max_size=4), max_size=3))
def test_text_comes_in_whole_characters_and_ends_at_a_stop(text: str, prompt: str, stops: list[str]) -> None:
    said = TextOf(Bytes(), list(prompt.encode()), stops)
    pieces = []
    for token in text.encode():
        if said.stopped:
            break
        pieces.append(said.add(token))
    pieces.append(said.end())
    ends = [text.find(s) + len(s) for s in stops if s in text]  # the first to be complete ends it
    want = text[: min(at for s in stops if (at := text[: min(ends)].find(s)) >= 0)] if ends else text
    assert said.text == "".join(pieces) == want
    assert said.stopped == bool(ends)


def test_a_stop_string_counts_from_where_it_may() -> None:
    said = TextOf(Bytes(), [], ["ab", "cde"])
    pieces = [said.add(token, n >= 6) for n, token in enumerate(b"xabcdeabcdefab")]
    assert "".join(pieces) == said.text == "xabcde" and said.stopped  # "cde" is whole within the sixth, "ab" after it


def test_broken_bytes_do_not_hold_the_text_back_for_ever() -> None:
    said = TextOf(Bytes(), [])
    out = "".join(said.add(0xFF) for _ in range(40))
    assert len(out) >= 32


def test_a_bias_of_a_thousand_tokens_is_one_addition_a_row() -> None:
    from time import perf_counter

    logits, biases = torch.zeros(60, 2000, dtype=torch.float64), {t: t / 7 - 50 for t in range(0, 2000, 2)}
    rows = [Row(SamplingParams(logit_bias=biases), 0, (), ())] * 60
    taken = []
    for _ in range(3):
        began = perf_counter()
        got = adjusted(logits, rows)
        taken.append(perf_counter() - began)
    assert all(got[n, t] == biases.get(t, 0.0) for n in (0, 59) for t in range(2000))
    assert min(taken) < 0.1  # one by one, 60,000 additions take half a second
