"""Tokens per CPU second of one thread: transformers' generate, DeepSeed and, where they are importable, CTranslate2 and vLLM. Prints the table of docs/inference.md.

    python tests/bench/bench_inference.py MODEL [--rounds 3] [--tokens 32] [--only ours,hf] [--vllm-python PATH]

MODEL is a folder that save_pretrained wrote; vLLM wants other versions of its libraries than ours, so its interpreter can be another one. Each measurement is a process of its own, the engines take turns, the best of the rounds counts: other load on
the machine only takes away. Also: requests one by one against 16 at a time, time to the first token with and without a known prefix, the share of a step
that is not the model, and how much is launched for a decoded token.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BATCHES = (1, 8, 32)
PROMPTS = ["The capital of France is", "Water boils at", "In the year 1969", "My favourite animal is", "The sun is", "Once upon a time", "A triangle has", "The largest ocean is"]
PREFIX = 512  # tokens that requests share


def prompts(n: int) -> list[str]:
    return (PROMPTS * n)[:n]


def rate(run: Callable[[], int]) -> float:
    """Tokens per CPU second, of the second call."""
    run()
    begun = time.process_time()
    return run() / (time.process_time() - begun)


# engines: each gives numbers by name --------------------------------------------------------------------------------


def hf(model: str, tokens: int) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    words = AutoTokenizer.from_pretrained(model, padding_side="left")
    words.pad_token = words.pad_token or words.eos_token
    out = {}
    for n in BATCHES:
        given = words(prompts(n), return_tensors="pt", padding=True)
        out[f"batch {n}"] = rate(lambda given=given, n=n: n * loaded.generate(**given, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False).shape[1] and n * tokens)
    out["ops a token"] = float(_ops(loaded, words))
    return out


def _ops(model: Any, words: Any) -> int:
    """aten ops of one decoding step that compute something."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    views = ("view", "_unsafe_view", "t", "transpose", "unsqueeze", "squeeze", "slice", "select", "expand", "permute", "alias", "detach", "split", "as_strided", "lift_fresh", "sym_size", "_reshape_alias")

    class Count(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.n += f.__name__.partition(".")[0] not in views
            return f(*args, **(kwargs or {}))

    given = words("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        first = model(**given, use_cache=True)
        with Count() as counted:
            model(input_ids=given["input_ids"][:, -1:], past_key_values=first.past_key_values, use_cache=True)
    return counted.n


def ours(model: str, tokens: int) -> dict[str, float]:
    import torch

    from deepseed.inference.engine import Engine
    from deepseed.inference.sampling import SamplingParams

    torch.set_num_threads(1)
    engine = Engine(model, dtype="float32", max_length=1024)
    params = SamplingParams(tokens, ignore_eos=True)
    out = {}
    for n in BATCHES:
        out[f"batch {n}"] = rate(lambda n=n: sum(len(c.token_ids) for c in engine.generate(prompts(n), params)))
    out["one by one"] = rate(lambda: sum(len(engine.generate(p, params)[0].token_ids) for p in prompts(16)))
    out["16 at a time"] = rate(lambda: sum(len(c.token_ids) for c in engine.generate(prompts(16), params)))
    for n, name in ((0, "first token, unknown prefix"), (1, "first token, known prefix")):  # a warm-up, then another prefix, then the same again
        for shared in (7, 8) if n == 0 else (8,):
            ids = [(i * 31 + shared) % 40000 + 10 for i in range(PREFIX)]
            begun = time.process_time()
            engine.generate([[*ids, 100 + n, 200]], SamplingParams(1))
        out[name] = time.process_time() - begun
    few, inside = engine.executable.whole, [0.0]  # type: ignore[union-attr]
    assert few is not None
    function = few.function

    def timed(*given: Any) -> None:
        begun = time.process_time()
        function(*given)
        inside[0] += time.process_time() - begun

    few.function = timed
    for p in prompts(8):
        engine.add(p, params)
    engine.step()  # the prompts, which are no decoding step
    inside[0], begun = 0.0, time.process_time()
    while not engine.idle:
        engine.step()
    out["overhead at batch 8"] = 1 - inside[0] / (time.process_time() - begun)
    few.function = function
    out["launches a token"] = float(engine.executable.launches)  # type: ignore[union-attr]
    return out


def ct2(model: str, tokens: int) -> dict[str, float]:
    os.environ["OMP_NUM_THREADS"] = "1"
    import ctranslate2
    from transformers import AutoTokenizer

    where = Path(tempfile.gettempdir()) / f"deepseed-bench-ct2-{Path(model).name}"
    if not where.exists():
        ctranslate2.converters.TransformersConverter(model).convert(str(where), quantization="float32")
    generator = ctranslate2.Generator(str(where), device="cpu", compute_type="float32", inter_threads=1, intra_threads=1)
    words = AutoTokenizer.from_pretrained(model)
    out = {}
    for n in BATCHES:
        given = [words.convert_ids_to_tokens(words(p)["input_ids"]) for p in prompts(n)]
        out[f"batch {n}"] = rate(lambda given=given: sum(len(r.sequences_ids[0]) for r in generator.generate_batch(given, max_length=tokens, min_length=tokens, include_prompt_in_result=False, sampling_topk=1)))
    return out


def vllm(model: str, tokens: int) -> dict[str, float]:
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="0", HF_HUB_OFFLINE="1")
    from vllm import LLM, SamplingParams

    engine = LLM(model, dtype="float32", enforce_eager=True, max_model_len=1024)
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0)
    return {f"batch {n}": rate(lambda n=n: sum(len(r.outputs[0].token_ids) for r in engine.generate(prompts(n), params, use_tqdm=False))) for n in BATCHES}


ENGINES = {"hf": hf, "ours": ours, "ct2": ct2, "vllm": vllm}
NEEDS = {"ct2": "ctranslate2", "vllm": "vllm"}
NAMES = {"hf": "transformers generate", "ours": "DeepSeed", "ct2": "CTranslate2", "vllm": "vLLM"}


def main() -> None:
    asked = argparse.ArgumentParser()
    asked.add_argument("model")
    asked.add_argument("--rounds", type=int, default=3)
    asked.add_argument("--tokens", type=int, default=32)
    asked.add_argument("--only", default="")
    asked.add_argument("--vllm-python", default=sys.executable, help="interpreter that has vLLM")
    asked.add_argument("--worker", default="")
    given = asked.parse_args()
    if given.worker:
        print(json.dumps(ENGINES[given.worker](given.model, given.tokens)))
        return
    pythons = {n: given.vllm_python if n == "vllm" else sys.executable for n in ENGINES}
    names = [n for n in ENGINES if (not given.only or n in given.only.split(",")) and (n not in NEEDS or importable(pythons[n], NEEDS[n]))]
    best: dict[str, dict[str, float]] = {n: {} for n in names}
    for _ in range(given.rounds):
        for n in names:
            done = subprocess.run([pythons[n], __file__, given.model, "--worker", n, "--tokens", str(given.tokens)], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
            if done.returncode:
                print(f"{NAMES[n]} failed: {done.stderr[-300:]}", file=sys.stderr)
                continue
            for key, x in json.loads(done.stdout.splitlines()[-1]).items():
                better = min if key.startswith(("first", "overhead", "launches", "ops")) else max
                best[n][key] = better(best[n].get(key, x), x)
            print(n, {k: round(v, 3) for k, v in best[n].items()}, file=sys.stderr)
    report(best)


def importable(python: str, module: str) -> bool:
    found = subprocess.run([python, "-c", f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"], check=False).returncode == 0
    if not found:
        print(f"left out: {module} (not importable by {python})", file=sys.stderr)
    return found


def report(best: dict[str, dict[str, float]]) -> None:
    base = best.get("hf", {})
    print("| tokens per CPU second | " + " | ".join(f"batch {n}" for n in BATCHES) + " |\n|---|" + "---|" * len(BATCHES))
    for n, found in best.items():
        cells = [f"{x:.1f}" + (f" ({x / base[k]:.2f}x)" if n != "hf" and k in base else "") if (x := found.get(k)) else "failed" for k in (f"batch {b}" for b in BATCHES)]
        print(f"| {NAMES[n]} | " + " | ".join(cells) + " |")
    if mine := best.get("ours"):
        print(f"\n16 at a time: {mine['16 at a time'] / mine['one by one']:.2f}x the throughput of one by one ({mine['16 at a time']:.1f} against {mine['one by one']:.1f} tokens per CPU second)")
        cold, warm = mine["first token, unknown prefix"], mine["first token, known prefix"]
        print(f"a known prefix of {PREFIX} tokens: the first token after {1000 * warm:.0f} ms instead of {1000 * cold:.0f} ms, {cold / warm:.1f}x sooner")
        print(f"scheduler and runtime at batch 8: {mine['overhead at batch 8']:.1%} of a step")
        if base:
            print(f"launches a decoded token: {mine['launches a token']:.0f} against {base['ops a token']:.0f} ops of transformers, {mine['launches a token'] / base['ops a token']:.0%}")


if __name__ == "__main__":
    main()
