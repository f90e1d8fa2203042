"""The packed step under plans of several ranks, simulated and on gloo: placed by the compiler's own passes, it says what one rank says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from gloo import inference
from gloo.launch import ranks
from inference_models import generated, ids, prompts, varied

from deepseed.inference.capture import look
from deepseed.inference.engine import Engine
from deepseed.inference.errors import InferenceError
from deepseed.inference.executable import Executable, any_size, stand_ins
from deepseed.inference.sampling import SamplingParams


@pytest.fixture(scope="module")
def llama() -> Any:
    return varied("LlamaForCausalLM")


@pytest.mark.parametrize(
    ("name", "plan", "heads"),
    [
        ("LlamaForCausalLM", "tp2", 1), ("GPT2LMHeadModel", "tp4", 1), ("GptOssForCausalLM", "tp2", 1), ("DeepseekV3ForCausalLM", "tp2", 2),
        *(pytest.param(*case, marks=pytest.mark.wide) for case in [
            ("LlamaForCausalLM", "tp4", 1), ("MistralForCausalLM", "tp2", 1), ("Gemma3ForCausalLM", "tp2", 1), ("MixtralForCausalLM", "tp2", 1), ("Qwen3MoeForCausalLM", "tp2", 1),
            ("Phi3ForCausalLM", "tp2", 1), ("Qwen2ForCausalLM", "tp2", 1), ("Qwen3ForCausalLM", "tp2", 1), ("GPTNeoXForCausalLM", "tp2", 2), ("OPTForCausalLM", "tp2", 2),
        ]),
    ],
)  # fmt: skip
def test_any_plan_says_what_generate_says(name: str, plan: str, heads: int) -> None:
    model = varied(name)
    want = generated(model, prompts(), 24)
    engine = Engine(model, plan, budget=24, block=4, sequences=4, max_length=128, cache="400kB")
    assert ids(engine.generate(prompts(), max_tokens=24)) == want
    assert [len(r.caches[0][0]) for r in engine.executable.ranks] == [heads] * int(plan[2:])


def test_no_rank_has_a_whole_weight(llama: Any) -> None:
    """Heads, widths and vocabulary are split, and a layer sends two sums of the hidden state."""
    engine = Engine(llama, "tp2", block=4, max_length=128)
    program = engine.executable.program
    whole = [i.key for i in program.inputs if i.role == "param" and len(i.type.shape) > 1 and i.type.local_bytes(program.mesh) > 0.6 * i.type.nbytes]
    assert not whole
    sent = [op for op in program.ops if op.target == "all_reduce.start" and op.path.startswith("model.layers.")]
    assert len(sent) == 2 * llama.config.num_hidden_layers


def test_real_ranks_read_their_part_and_say_the_same(llama: Any, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path, max_shard_size="100kB")
    want = generated(llama, prompts((5, 30)), 12)
    got = ranks(2, inference.completed, str(tmp_path), "tp2", prompts((5, 30)), 12)
    assert [g[0] for g in got] == [want, want]
    assert got[0][1] == got[1][1] and got[0][1][0][0] != got[0][1][0][1]
    assert [g[2] for g in got] == [[1, 1], [1, 1]]


@pytest.mark.wide
def test_the_command_starts_its_ranks(llama: Any, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from deepseed.cli import app

    llama.save_pretrained(tmp_path)
    (prompt,) = prompts((7,))
    done = CliRunner().invoke(app, ["generate", str(tmp_path), "--prompt-ids", ",".join(map(str, prompt)), "--max-tokens", "6", "--plan", "tp2", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["token_ids"] == generated(llama, [prompt], 6)[0]


def test_forks_copy_blocks_on_every_rank(llama: Any) -> None:
    params = SamplingParams(8, temperature=1.0, seed=3, n=3)
    want = Engine(llama, block=4, max_length=128).generate(prompts((10,)), params)
    got = Engine(llama, "tp2", block=4, max_length=128).generate(prompts((10,)), params)
    assert [[o.token_ids for o in c.outputs] for c in got] == [[o.token_ids for o in c.outputs] for c in want]


def test_numbers_of_tokens_are_found_in_a_source() -> None:
    assert stand_ins({1006, 509, 7}) == (521, 523)
    assert stand_ins({1005, 7}) == (509, 521)  # of which one of two ranks has 503
    source = "    (\n        i_503,  # batch ids: i64[503]\n        l,  # batch last: i64[509]\n    ) = inputs\n    inputs.clear()\n    x = y.reshape((1, 1006, 509, 64, -1, 0.503))\n"
    assert any_size(source, (503, 509)).splitlines()[4:] == ["    T, L = i_503.shape[0], l.shape[0]", "    inputs.clear()", "    x = y.reshape((1, T * 2, L, 64, -1, 0.503))"]


@pytest.mark.parametrize("window", [503, 2 * 509])
def test_a_window_is_no_number_of_tokens(window: int) -> None:
    model = varied("MistralForCausalLM", sliding_window=window, max_position_embeddings=2048)
    engine = Engine(model, "tp2", block=4, max_length=128, codegen="python")
    assert ids(engine.generate(prompts((9, 2)), max_tokens=8)) == generated(model, prompts((9, 2)), 8)
    assert all(f"window={window}" in s.source for s in engine.executable._sources)


def test_a_part_that_is_smaller_is_no_number_of_tokens() -> None:
    """1513 columns on three ranks are 505, 505 and 503."""
    assert 503 not in stand_ins({1513})
    model = varied("LlamaForCausalLM", intermediate_size=1513, hidden_size=24, num_attention_heads=3, num_key_value_heads=3, head_dim=8)
    engine = Engine(model, "tp3", block=4, max_length=128, codegen="python")
    assert ids(engine.generate(prompts((9, 2)), max_tokens=8)) == generated(model, prompts((9, 2)), 8)


def test_numbers_that_were_not_seen_before_choose_other_primes() -> None:
    """A forward looked at without its numbers: the program shows those of what is stored and of attention."""
    model = varied("MistralForCausalLM", sliding_window=503, intermediate_size=2 * 509, max_position_embeddings=2048)
    looked = look(model)
    assert {503, 1018} <= looked.numbers
    made = Executable(model, replace(looked, numbers=frozenset()), "tp2", 32, 4, codegen="python")
    assert all("window=503" in s.source for s in made._sources)
    assert {503, 509}.isdisjoint(n for i in made.program.inputs if i.role == "batch" for n in i.type.shape)


def test_plans_that_inference_does_not_have(llama: Any) -> None:
    with pytest.raises(InferenceError, match="splits over dp2; inference splits over tp alone"):
        Engine(llama, "dp2+tp2", max_length=128)


def test_bfloat16_runs_split(llama: Any) -> None:
    engine = Engine(varied("LlamaForCausalLM"), "tp2", torch.bfloat16, block=4, max_length=128)
    (done,) = engine.generate(prompts((9,)), max_tokens=8)
    assert len(done.token_ids) == 8
