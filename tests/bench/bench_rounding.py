"""How far apart are trainings in 16 bits that begin next to each other? What a loss in bench_peers.py that is further away than its tolerance is judged by.

    python tests/bench/bench_rounding.py                    # GPT-2 60M, the eleven steps of the comparison: minutes
    python tests/bench/bench_rounding.py --lr 1e-3          # where training jumps about
    python tests/bench/bench_rounding.py --model llama --dtype fp32

Eager PyTorch under autocast, in one process, trains the model of the comparison on its batches, each time from weights multiplied by 1 + noise of a float32's rounding, 2^-20: values near the middle
between two bf16 numbers then round the other way, as they do where sums are added in another order. Losses of two engines cannot be asked to be nearer to each other than these are. DeepSeed trains it too, from the weights as they are.
"""

from __future__ import annotations

import argparse

import torch
from bench_peers import SIZES
from engines import ADAMW, CLIP, MODELS, adamw, tokens

import deepseed

NOISE = 2.0**-20


def losses(a: argparse.Namespace, seed: int) -> list[float]:
    """Of each step."""
    model = MODELS[a.model](a)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + NOISE * torch.randn(p.shape, generator=g))
    optimizer, found = adamw(a, model.parameters()), []
    batches = tokens(a, range(a.ranks))
    for step in range(a.steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=a.dtype == "bf16"):
            loss = model(**batches[step % len(batches)]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found.append(loss.item())
    return found


def ours(a: argparse.Namespace) -> list[float]:
    model = MODELS[a.model](a)
    step = deepseed.compile(model, a.dtype if a.dtype == "bf16" else "", optimizer=adamw(a, model.parameters()), codegen="auto", clip_grad_norm=CLIP)
    batches = tokens(a, range(a.ranks))
    return [float(step(batches[n % len(batches)])) for n in range(a.steps)]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--model", choices=["gpt2", "llama"], default="gpt2", help="of 60M parameters")
    p.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    p.add_argument("--seeds", type=int, default=4, help="how many trainings")
    p.add_argument("--steps", type=int, default=11)
    p.add_argument("--lr", type=float, default=ADAMW["lr"])
    a = p.parse_args()
    vars(a).update(next(size for name, size in SIZES.items() if "60M" in name and size["model"] == a.model), ranks=2, seq=128, vocab=8192, fused=True)
    ADAMW["lr"] = a.lr
    torch.set_num_threads(1)
    mine, rows = ours(a), list[list[float]]()
    print("DeepSeed", *(f"{x:.4f}" for x in mine), flush=True)
    for seed in range(a.seeds):
        rows.append(losses(a, seed))
        print(f"noise {seed}", *(f"{x:.4f}" for x in rows[-1]), flush=True)
    nearest = [min(abs(x - y) for y in peers) for x, *peers in zip(mine, *rows, strict=True)]
    for name, each in (("DeepSeed's distance", nearest), ("range", [max(x) - min(x) for x in zip(*rows, strict=True)]), ("change", [0.0, *(abs(b - a) for a, b in zip(rows[0], rows[0][1:], strict=False))])):
        print(name, *(f"{x:.4f}" for x in each))


if __name__ == "__main__":
    main()
