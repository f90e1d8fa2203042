"""What products of 16 bits take on this CPU, in units of float32's: torch's own, and deepseed.ops.products' by way of float32; one thread, by turns, medians.

python tests/bench/bench_products.py [--rounds 9]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from deepseed.ops import products
from deepseed.runtime.pages import keep_freed_memory

SIZES = [(256, 768, 768), (256, 768, 2048), (256, 2048, 768), (512, 256, 8192), (256, 768, 16384)]  # rows, width, outputs


def seconds(do: Callable[[], Tensor]) -> float:
    began = time.process_time()
    do()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_freed_memory()
    for dtype in (torch.bfloat16, torch.float16):
        print(f"{dtype}: {'emulated' if products.emulated(dtype) else 'has instructions, or not known'}\n| rows, width, outputs | product | float32, ms | torch's, times that | by way of float32 |\n|---|---|---|---|---|")
        for rows, width, outputs in SIZES:
            x, w, g = (torch.randn(shape).to(dtype) for shape in ((rows, width), (outputs, width), (rows, outputs)))
            for name, a, b in (("forward", x, w.t()), ("input's gradient", g, w), ("weight's gradient", g.t(), x)):
                wide = (a.float(), b.float())
                ways: list[Callable[[], Tensor]] = [lambda wide=wide: torch.mm(*wide), lambda a=a, b=b: torch.mm(a, b), lambda a=a, b=b: products._mm(a, b)]  # type: ignore[misc]
                times = [[seconds(way) for way in ways] for _ in range(rounds + 1)][1:]
                own, torchs, ours = (median(each) for each in zip(*times, strict=True))
                print(f"| {rows}, {width}, {outputs} | {name} | {own * 1e3:.2f} | {torchs / own:.1f} | {ours / own:.2f} |", flush=True)


if __name__ == "__main__":
    main()
