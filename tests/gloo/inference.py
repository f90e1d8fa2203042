"""One rank of an engine under a plan: what it says to the prompts, and what its caches hold."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import traceback
from typing import Any

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
        return [c.token_ids for c in done], [[o.token_ids for o in c.outputs] for c in drawn], [len(pair[0]) for pair in engine.executable.ranks[0].caches.values()]
    finally:
        stop()


def from_checkpoint(folder: str, checkpoint: str, prompts: list[list[int]], tokens: int) -> tuple[list[list[int]], int]:
    """Greedy tokens, and the bytes of parameters that the rank holds."""
    torch.set_num_threads(1)
    start("gloo")
    try:
        engine = Engine(folder, "tp2", block=4, max_length=128, weights=checkpoint)
        done = engine.generate(prompts, max_tokens=tokens, ignore_eos=True)
        (state,) = engine.executable._step.states
        return [c.token_ids for c in done], sum(x.numel() * x.element_size() for (role, _), x in state.tensors.items() if role == "param")
    finally:
        stop()


def in_eight_bits(folder: str, prompts: list[list[int]], tokens: int) -> tuple[list[list[int]], int, int]:
    """Greedy tokens, the bytes of whole matrices that the rank still holds, and of those in eight bits."""
    torch.set_num_threads(1)
    start("gloo")
    try:
        engine: Any = Engine(folder, "tp2", block=4, max_length=128, quantize="int8")
        done = engine.generate(prompts, max_tokens=tokens, ignore_eos=True)
        (state,), (given,) = engine.executable._step.states, engine.executable._given
        return [c.token_ids for c in done], sum(x.numel() * x.element_size() for x in state.tensors.values() if x.dim() > 1), sum(x.numel() for x in given if x.dtype is torch.int8)
    finally:
        stop()


def dies(folder: str, environment: dict[str, str]) -> None:
    """Rank 1 is killed at its fifth step; what rank 0 says goes to ``0.err``."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    rank = int(environment["RANK"])
    with open(os.path.join(folder, f"{rank}.err"), "w") as err:
        sys.stderr = err
        start("gloo")
        engine = Engine(folder, "tp2", block=4, max_length=128)
        steps, run = itertools.count(), engine.executable._run

        def counted(plain: Any) -> Any:
            if rank == 1 and next(steps) == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return run(plain)

        engine.executable._run = counted  # type: ignore[method-assign]
        try:
            engine.generate([[5, 17, 3]], max_tokens=40, ignore_eos=True)
        except BaseException:
            traceback.print_exc()
            err.flush()
            os._exit(1)
