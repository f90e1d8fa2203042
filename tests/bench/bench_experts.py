"""What does raising the experts' products bring? A step of a mid-size Mixtral, with and without it, and eager PyTorch.

    python tests/bench/bench_experts.py            # 512 tokens, hidden 256, ffn 512, 8 experts, top 2

All run in this process, step by step in turns, on one thread; the figure is process CPU time (median), which other work on
the machine does not change. `gathered` is the same compiler without `route_products`: each row's matrix is copied.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable
from statistics import median
from time import process_time
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

import deepseed
from deepseed.memory import memory
from deepseed.passes import canonicalize
from deepseed.target import load


def compiled(model: nn.Module, batch: Any, routed: bool) -> Any:
    """A step, compiled on its first call; with the experts' products as the model wrote them where not ``routed``."""
    step = deepseed.compile(model, "zero0", optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3), world_size=1, backend="simulate")
    os.environ["DEEPSEED_REMEMBER"] = "0"  # a pass that is changed in this process alone
    with patch.object(canonicalize, "route_products", canonicalize.route_products if routed else lambda p: p):
        step(batch)
    return step


def eager(model: nn.Module, experts: str) -> Callable[[Any], Any]:
    model.set_experts_implementation(experts)  # type: ignore[operator]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step(batch: Any) -> Any:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--tokens", type=int, default=512)
    p.add_argument("--hidden", type=int, default=256)
    p.add_argument("--ffn", type=int, default=512)
    p.add_argument("--experts", type=int, default=8)
    p.add_argument("--layers", type=int, default=2)
    p.add_argument("--rounds", type=int, default=5)
    said = p.parse_args()
    torch.set_num_threads(1)
    t = load(
        f"hf:MixtralForCausalLM(num_hidden_layers={said.layers},hidden_size={said.hidden},intermediate_size={said.ffn},"
        f"num_local_experts={said.experts},batch_size=4,sequence_length={said.tokens // 4})"
    )
    steps: dict[str, Callable[[Any], Any]] = {}
    for name in ("routed", "gathered"):
        step = compiled(copy.deepcopy(t.model), t.batch, name == "routed")
        print(f"{name:16s} memory at its peak {memory(step.program).peak_bytes / 2**20:8.1f} MiB, {len(step.program.ops)} ops")
        steps[name] = step
    for experts in ("batched_mm", "eager"):
        steps[f"eager {experts}"] = eager(copy.deepcopy(t.model), experts)
        steps[f"eager {experts}"](t.batch)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, float] = {}
    for n in range(said.rounds + 1):
        for name, each in steps.items():
            started = process_time()
            losses[name] = float(each(t.batch))
            if n:
                seconds[name].append(process_time() - started)
    base = median(seconds["routed"])
    for name in steps:
        print(f"{name:16s} {1e3 * median(seconds[name]):8.1f} ms of CPU a step, {median(seconds[name]) / base:6.2f} x routed, loss {losses[name]:.6f}")


if __name__ == "__main__":
    main()
