"""What does recomputation cost, and what does it save? The same step with all kept, with `remat`, and at levels between, in turns.

    python tests/bench/bench_remat.py                              # a Llama of 8 layers, hidden 256, 512 tokens, one rank
    python tests/bench/bench_remat.py --levels 0.5,0 0.3,0 0.0,2   # saved,every of plan_memory
    python tests/bench/bench_remat.py --gate                       # fails where remat costs more than 35 % of the step

One process, so that all see the same machine; the figure is process CPU seconds a step, the median over steps. The peak is predicted (tests
compare it with what is counted). All levels start from the same weights and see the same batch: their losses must be equal to the bit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from statistics import median
from time import process_time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import deepseed
from deepseed import pipeline
from deepseed.memory import memory

MOST = 0.35  # of the step without


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--layers", type=int, default=8)
    p.add_argument("--hidden", type=int, default=256)
    p.add_argument("--vocab", type=int, default=1024)
    p.add_argument("--batch", type=int, default=4, help="sequences")
    p.add_argument("--seq", type=int, default=128)
    p.add_argument("--steps", type=int, default=15, help="measured steps of each level")
    p.add_argument("--warmup", type=int, default=2)
    p.add_argument("--levels", nargs="*", default=["0.5,0", "0.3,0"], metavar="SAVED,EVERY", help="beside all kept and remat")
    p.add_argument("--gate", action="store_true", help=f"fail where remat costs more than {MOST:.0%} of the step")
    return p.parse_args()


def made(said: argparse.Namespace, level: Mapping[str, Any]) -> Any:
    """A compiled step at a level."""
    torch.manual_seed(0)
    heads = said.hidden // 64
    config = LlamaConfig(
        vocab_size=said.vocab, hidden_size=said.hidden, intermediate_size=said.hidden * 8 // 3, num_hidden_layers=said.layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=said.seq,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    step = deepseed.compile(model, "", optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3), clip_grad_norm=1.0)
    plain = pipeline.arguments
    pipeline.arguments = lambda *a, **k: plain(*a, **k) | {"plan_memory": dict(level)}  # levels have no plan word
    try:
        step.compile(batch(said))
    finally:
        pipeline.arguments = plain
    return step


def batch(said: argparse.Namespace) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, said.vocab, (said.batch, said.seq), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def main() -> None:
    said = arguments()
    torch.set_num_threads(1)
    levels: dict[str, dict[str, Any]] = {"all kept": {}, "remat": {"saved": 0.0, "every": 1}}
    for text in said.levels:
        saved, every = text.split(",")
        levels[text] = {"saved": float(saved), "every": int(every)}
    steps = {name: made(said, level) for name, level in levels.items()}
    took: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, list[float]] = {name: [] for name in steps}
    for n in range(said.warmup + said.steps):
        for name, step in steps.items():
            started = process_time()
            loss = float(step(batch(said)))
            if n >= said.warmup:
                took[name].append(process_time() - started)
            losses[name].append(loss)
    base = median(took["all kept"])
    print(f"Llama, {said.layers} layers, hidden {said.hidden}, {said.batch} x {said.seq} tokens, float32, one rank; {said.steps} steps")
    print("level        CPU s a step   more   peak beside stored, MB")
    for name, step in steps.items():
        found = memory(step.program)
        print(f"{name:12}{median(took[name]):13.4f}{median(took[name]) / base - 1:+8.1%}{(found.peak_bytes - found.resident_bytes) / 1e6:15.1f}")
    if any(each != losses["all kept"] for each in losses.values()):
        sys.exit(f"losses differ: {losses}")
    if said.gate and median(took["remat"]) > (1 + MOST) * base:
        sys.exit(f"remat costs {median(took['remat']) / base - 1:.1%} of the step, more than {MOST:.0%}")


if __name__ == "__main__":
    main()
