"""One rank of an engine under a plan: what it says to the prompts, and what its caches hold."""

from __future__ import annotations

import torch

from deepseed.inference.engine import Engine
from deepseed.inference.sampling import SamplingParams
from deepseed.runtime.distributed import start, stop


def completed(folder: str, plan: str, prompts: list[list[int]], tokens: int) -> tuple[list[list[int]], list[list[list[int]]], list[int]]:
    """Greedy tokens, tokens of two sampled outputs without a seed, and the kv heads of each layer's cache."""
    torch.set_num_threads(1)
    start("gloo")
    try:
        engine = Engine(folder, plan, block=4, budget=16, max_length=128, cache="400kB")
        done = engine.generate(prompts, max_tokens=tokens)
        drawn = engine.generate(prompts[:1], SamplingParams(4, temperature=1.0, n=2))
        return [c.token_ids for c in done], [[o.token_ids for o in c.outputs] for c in drawn], [len(pair[0]) for pair in engine.executable.ranks[0].caches.values()]  # type: ignore[union-attr]
    finally:
        stop()
