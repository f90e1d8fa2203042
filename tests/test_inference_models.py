"""Each model says in the engine what its own ``generate`` says, token for token; what the engine cannot run it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers")

from inference_models import generated, ids, prompts, sealed, varied

from deepseed.inference import native
from deepseed.inference.capture import look
from deepseed.inference.engine import Engine
from deepseed.inference.errors import InferenceError

MODELS = [
    "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM", "Gemma3ForCausalLM", "Phi3ForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM",
    "OPTForCausalLM", "MixtralForCausalLM", "Qwen3MoeForCausalLM", "GptOssForCausalLM", "DeepseekV3ForCausalLM",
]  # fmt: skip
ROUTED = ("MixtralForCausalLM", "Qwen3MoeForCausalLM", "GptOssForCausalLM", "DeepseekV3ForCausalLM")  # rows go to experts: no loop over rows


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.turn
def test_greedy_equals_generate(name: str) -> None:
    """64 tokens, mixed steps of decodes and chunks, blocks of 4; the model's own forward is gone after capture."""
    model = varied(name)
    want = generated(model, prompts(), 64)
    assert len({t for tokens in want for t in tokens}) > 40, "the model says the same again and again: it would prove little"
    for codegen in ("auto", "python"):
        engine: Any = Engine(model, budget=24, block=4, sequences=4, cache="400kB", codegen=codegen)
        with sealed(model):
            assert ids(engine.generate(prompts(), max_tokens=64)) == want
        assert engine.scheduler.pool.free == engine.scheduler.pool.count
        if codegen == "python":
            code = engine.executable._sources[0].source
            assert "torch.bmm(" not in code, "an expert's matrix is copied for each row"
            assert code.count("paged_attention(") == len(engine.executable.ranks[0].caches) == model.config.num_hidden_layers
        elif native.load() is not None:
            routed = name in ROUTED
            assert set(engine.executable.in_python) <= ({"step"} if routed else set()), "a group has no C++"
            assert (engine.executable.whole is None) == routed, "a step of few rows is no function of its own"


@pytest.mark.skipif(native.load() is None, reason="no C++ compiler")
def test_a_decoded_token_launches_little(llama: Any) -> None:
    """At most 40 % of the ops that the model's own step computes with; views are not counted."""

    class Count(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.n += not (f.is_view or f.__name__.startswith(("_unsafe_view", "detach", "lift_fresh")))
            return f(*args, **(kwargs or {}))

    with torch.no_grad():
        kept = llama(torch.tensor([[5, 17, 3]]), use_cache=True).past_key_values
        with Count() as counted:
            llama(torch.tensor([[8]]), past_key_values=kept, use_cache=True)
    engine: Any = Engine(llama, max_length=128)
    assert 0 < engine.executable.launches <= 0.4 * counted.n


@pytest.fixture
def llama() -> Any:
    return varied("LlamaForCausalLM")


@pytest.mark.parametrize("name", ["BloomForCausalLM", "MptForCausalLM", "MambaForCausalLM", "FalconForCausalLM"])
def test_what_bypasses_the_hook_is_refused(name: str) -> None:
    with pytest.raises(InferenceError, match=r"(?s)(cannot be served|attends by itself).*fix: serve a"):
        look(varied(name, positions=False))


@pytest.mark.parametrize("codegen", ["auto", "python"])
def test_positions_of_one_sequence_do_not_decide_for_another(codegen: str) -> None:
    """Frequencies that a forward switches at a length, by the largest position that it is given."""
    from transformers import Phi3Config, Phi3ForCausalLM

    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "rope_theta": 10000.0}
    model = Phi3ForCausalLM(Phi3Config(vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=128, original_max_position_embeddings=32, pad_token_id=0, eos_token_id=1, bos_token_id=2, rope_scaling=rope))  # type: ignore[no-untyped-call]
    for _ in range(2):
        with pytest.raises(InferenceError, match=r"asks for the largest of all positions(.|\n)*fix: serve a model"):
            Engine(model, codegen=codegen)
        model.generate(torch.tensor([[5, 17, 3]]), max_new_tokens=2)


def test_a_layer_that_attends_by_itself_is_counted(llama: Any) -> None:
    """One layer of two bypasses the table of attention functions, and still remembers."""
    attention = llama.model.layers[1].self_attn
    usual = type(attention).forward

    def own(self: Any, hidden_states: Any, *args: Any, cache: Any = None, **kwargs: Any) -> Any:
        states = self.k_proj(hidden_states)[:, None]
        cache.update(states, states, 1)
        return hidden_states, None

    attention.forward = own.__get__(attention)
    try:
        with pytest.raises(InferenceError, match="2 of its layers keep something in the cache, 1 of them attend"):
            look(llama)
    finally:
        del attention.forward
    assert type(attention).forward is usual


def test_looking_leaves_no_mark(llama: Any) -> None:
    before = {n: dict(m.__dict__) for n, m in llama.named_modules()}
    looked = look(llama)
    assert len(looked.layers) == 2 and {64, 128, 199} <= looked.numbers and llama.config._attn_implementation != "deepseed_paged"
    assert {n: dict(m.__dict__) for n, m in llama.named_modules()} == before
