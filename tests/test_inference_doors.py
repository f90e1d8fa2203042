"""What callers hand to the engine and to DeepSpeed's doors: arrays and lists, names of transformers, and what is refused with a fix."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from inference_models import VOCABULARY, generated, ids, prompts, varied

import deepseed
from deepseed.inference.capture import look
from deepseed.inference.doors import _params
from deepseed.inference.engine import Engine
from deepseed.inference.errors import InferenceError
from deepseed.inference.prompts import ids_of, several


@pytest.fixture(scope="module")
def llama() -> Any:
    return varied("LlamaForCausalLM")


def test_a_temperature_of_zero_is_greedy() -> None:
    for zero in (0, 0.0):
        assert _params({"temperature": zero}).temperature == _params({"temperature": zero, "do_sample": True}).temperature == 0
    assert _params({}).temperature == _params({"temperature": 0.7, "do_sample": False}).temperature == 0
    assert _params({"do_sample": True}).temperature == 1 and _params({"temperature": 0.7}).temperature == _params({"temperature": 0.7, "do_sample": True}).temperature == 0.7


def test_an_end_that_is_said_replaces_the_models(llama: Any) -> None:
    (prompt,) = prompts((6,), 8)
    (want,) = generated(llama, [prompt], 12)
    model_end, other = want[4], want[7]
    first = min(want.index(model_end), want.index(other))
    llama.generation_config.eos_token_id = model_end
    try:
        door = deepseed.init_inference(llama, max_length=128, codegen="python")
        given = torch.tensor([prompt])

        def tokens(**asked: Any) -> list[int]:
            return door.generate(given, max_new_tokens=12, **asked)[0, len(prompt) :].tolist()

        assert tokens() == want[: want.index(model_end) + 1] and first < 8
        assert tokens(eos_token_id=None) == want
        assert tokens(eos_token_id=other) == tokens(eos_token_id=[other]) == want[: want.index(other) + 1]
        theirs = llama.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=12, do_sample=False, eos_token_id=other)[0, len(prompt) :].tolist()
        assert tokens(eos_token_id=other) == theirs
    finally:
        llama.generation_config.eos_token_id = None


def test_arrays_of_ids_are_prompts(llama: Any) -> None:
    (prompt,) = prompts((6,), 8)
    other = prompt[::-1]
    engine = Engine(llama, max_length=128, codegen="python")
    want = generated(llama, [prompt, other], 6)
    for one in (prompt, tuple(prompt), torch.tensor(prompt), np.array(prompt), [np.int64(t) for t in prompt]):
        assert ids(engine.generate(one, max_tokens=6)) == want[:1]
    for both in ([prompt, other], torch.tensor([prompt, other]), np.array([prompt, other], dtype=np.int32), [torch.tensor(prompt), np.array(other)]):
        assert ids(engine.generate(both, max_tokens=6)) == want
    assert engine.generate([]) == []


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([[1.7, 2.2]], "'1.7', a float, where token ids"), ([1.5], "'1.5', a float"), (torch.tensor([1.0]), r"an array torch.float32\[1\]"), (np.array([[0.5]]), r"an array float64\[1, 1\]"),
        (torch.zeros(1, 1, 1, dtype=torch.long), r"an array torch.int64\[1, 1, 1\]"), (torch.tensor([True]), "an array torch.bool"), (7, "prompts: '7', of type int"), ([[1, "a"]], "'a', a str"), ([None], "a NoneType"),
    ],
)  # fmt: skip
def test_what_is_no_prompt(given: Any, says: str) -> None:
    with pytest.raises(InferenceError, match=rf"{says}(.|\n)*\n  fix: "):
        [ids_of(p, VOCABULARY) for p in several(given)]


def test_words_that_nobody_knows(llama: Any) -> None:
    engine = Engine(llama, max_length=128, codegen="python")
    for call, says in [
        (lambda: engine.generate([[1]], foo=2), "generate does not know foo\n  fix: one of max_tokens"), (lambda: Engine(llama, dtype=torch.int8), "dtype torch.int8 is unknown\n  fix: .*quantize='int8'"),
        (lambda: Engine(llama, dtype=torch.long), "dtype torch.int64 is unknown\n  fix: "), (lambda: Engine(llama, cache="lots"), "cache='lots': (.|\n)*fix: "),
        (lambda: Engine(llama, codegen="inductor"), "codegen='inductor' (.|\n)*fix: one of auto, cpp, python, triton"), (lambda: Engine(llama, "zero3"), "plan 'zero3' splits over zero3; inference"),
        (lambda: Engine(llama, "zero1+dp4+tp2"), "splits over dp4; inference"),
    ]:  # fmt: skip
        with pytest.raises(InferenceError, match=says):
            call()


def test_init_inference_passes_the_engines_own_on(llama: Any) -> None:
    made = deepseed.init_inference(llama, quantize="int8", speculative="lookup", draft=3, codegen="python", max_length=128).engine
    assert made.quantized is not None and made.drafts == 3 and made.executable.codegen == "python"


@pytest.mark.parametrize("name", ["JambaForCausalLM", "RecurrentGemmaForCausalLM", pytest.param("BambaForCausalLM", marks=pytest.mark.wide), pytest.param("NemotronHForCausalLM", marks=pytest.mark.wide)])
def test_layers_that_keep_a_state_are_refused(name: str) -> None:
    from deepseed.tiny import tiny_model

    with pytest.raises(InferenceError, match=rf"{name} cannot be served: \d of its \d layers, number \d the first, keep a state(.|\n)*fix: serve a model whose layers all attend"):
        look(tiny_model(name, {"vocab_size": VOCABULARY})[0])


def test_a_forward_without_a_cache_is_refused_in_words() -> None:
    from deepseed.tiny import tiny_model

    with pytest.raises(InferenceError, match="its forward takes no key-value cache and no position_ids;"):
        look(tiny_model("RwkvForCausalLM", {"vocab_size": VOCABULARY})[0])
