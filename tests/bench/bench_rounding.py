"""How far apart is training in float32 from weights that differ by a rounding? What the tolerance of bench_peers.py for 16 bits is taken from.

    python tests/bench/bench_rounding.py                    # GPT-2 60M, the first twelve steps of the comparison: a minute or two
    python tests/bench/bench_rounding.py --model llama

Eager PyTorch in one process trains the model of the comparison on its batches, once as it is, then with each weight multiplied by 1 + noise of a bf16's rounding (2^-8). A program in 16 bits rounds
every value of every step so: its losses cannot be asked to be nearer to another one's than these are to each other.
"""

from __future__ import annotations

import argparse

import torch
from bench_peers import SIZES
from engines import CLIP, MODELS, adamw, tokens

ROUNDING = 2.0**-8


def losses(a: argparse.Namespace, seed: int) -> list[float]:
    """Of each step; ``seed`` 0: without noise."""
    model = MODELS[a.model](a)
    if seed:
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + ROUNDING * torch.randn(p.shape, generator=g))
    optimizer, found = adamw(a, model.parameters()), []
    batches = tokens(a, range(a.ranks))
    for step in range(a.steps):
        loss = model(**batches[step % len(batches)]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found.append(loss.item())
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--model", choices=["gpt2", "llama"], default="gpt2", help="of 60M parameters")
    p.add_argument("--seeds", type=int, default=4, help="trainings with noise")
    p.add_argument("--steps", type=int, default=12)
    a = p.parse_args()
    vars(a).update(next(size for name, size in SIZES.items() if "60M" in name and size["model"] == a.model), ranks=2, seq=128, vocab=8192, fused=True)
    torch.set_num_threads(1)
    rows = []
    for seed in range(a.seeds + 1):
        rows.append(losses(a, seed))
        print(f"{f'noise {seed}' if seed else 'as it is':9}", *(f"{x:.3f}" for x in rows[-1]), flush=True)
    for name, each in (("apart", [max(x) - min(x) for x in zip(*rows, strict=True)]), ("change", [0.0, *(b - a for a, b in zip(rows[0], rows[0][1:], strict=False))])):
        print(f"{name:9}", *(f"{x:.3f}" for x in each))


if __name__ == "__main__":
    main()
