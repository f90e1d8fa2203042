"""What eight bits cost and give: perplexity on English prose, seconds a decoded token, bytes of weights.

    python tests/bench/bench_quantize.py path/to/model [--tokens 4000]

The text is the language reference that Python carries (``pydoc_data.topics``), in windows of the same length for each kind; the log-probabilities are those of the engine (``prompt_logprobs``).
Times are CPU seconds of this process with one thread.
"""

from __future__ import annotations

import argparse
import gc
import math
import pydoc_data.topics
import time
from typing import Any

import torch

from deepseed.inference.engine import Engine
from deepseed.inference.sampling import SamplingParams

WINDOW = 256
SETTINGS: tuple[dict[str, Any], ...] = ({}, {"quantize": "int8"}, {"quantize": "fp8"})


def measured(model: str, settings: dict[str, Any], tokens: int) -> tuple[str, float, dict[int, float]]:
    engine = Engine(model, dtype="fp32", cache="256MiB", **settings)
    text = "\n".join(pydoc_data.topics.topics[k] for k in sorted(pydoc_data.topics.topics))
    ids = engine.tokenizer(text)["input_ids"]
    step = max(WINDOW, len(ids) * WINDOW // tokens)
    windows = [ids[at : at + WINDOW] for at in range(0, len(ids) - WINDOW, step)]
    total = n = 0.0
    for window in windows:
        (done,) = engine.generate([window], SamplingParams(max_tokens=1, prompt_logprobs=0))
        total -= sum(d.logprob for d in done.prompt_logprobs if d.logprob is not None)
        n += WINDOW - 1
    speed = {}
    for batch in (1, 8):
        prompts = [window[:16] for window in windows[:batch]]
        engine.generate(prompts, max_tokens=2, ignore_eos=True)
        began = time.process_time()
        engine.generate(prompts, max_tokens=33, ignore_eos=True)
        speed[batch] = 33 * batch / (time.process_time() - began)
    mib = sum(p.numel() * p.element_size() for p in engine.model.parameters()) / 2**20
    said = str(engine.quantized) if engine.quantized is not None else f"fp32: {mib:.1f} MiB of weights"
    return f"{said}; {int(n)} tokens scored", math.exp(total / n), speed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=4000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    first = 0.0
    for settings in SETTINGS:
        said, perplexity, speed = measured(args.model, settings, args.tokens)
        first = first or perplexity
        print(said)
        print(f"  perplexity {perplexity:.4f} ({perplexity / first - 1:+.2%}); tokens a CPU second: " + ", ".join(f"{v:.1f} at batch {b}" for b, v in speed.items()), flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
