"""What products take on this CPU; one thread, by turns, medians.

Of 16 bits, in units of float32's: torch's own, and deepseed.ops.products' by way of float32. Of float32, with the weights of a 60M Llama one after another (none is in a cache when its turn comes): the
library's, and deepseed.codegen.cpp_products', with the errors of both.

python tests/bench/bench_products.py [--rounds 9] [--float32]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from deepseed.codegen import cpp_files
from deepseed.ops import products
from deepseed.runtime.executable import cache_dir
from deepseed.runtime.pages import keep_freed_memory

LLAMA = [*[(768, 768), (384, 768), (384, 768), (768, 768), (2048, 768), (2048, 768), (768, 2048)] * 8, (8192, 768)]  # outputs, width
SIZES = [(256, 768, 768), (256, 768, 2048), (256, 2048, 768), (512, 256, 8192), (256, 768, 16384)]  # rows, width, outputs


def seconds(do: Callable[[], Tensor]) -> float:
    began = time.process_time()
    do()
    return time.process_time() - began


def float32(rounds: int) -> None:
    weights = [torch.randn(shape) for shape in LLAMA]
    gradients = [torch.zeros(shape) for shape in LLAMA]
    products = cpp_files.product(cache_dir() / "kernels")
    print(f"own: by {'a matrix unit, in parts of bfloat16' if products.in_tiles else 'vectors'}; errors are the root of the mean square, against float64, in half units of the sum of magnitudes")
    print("| rows | product | library's, GFLOP/s | own, GFLOP/s | times as fast | library's error | own error |\n|---|---|---|---|---|---|---|")
    for rows in (128, 256, 512, 1024):
        given = {width: torch.randn(rows, width) for shape in LLAMA for width in shape}
        flops = sum(2 * rows * n * k for n, k in LLAMA)
        kinds: dict[str, list[tuple[Tensor, Tensor, Tensor, Tensor | None]]] = {
            "forward": [(torch.empty(rows, n), given[k], w.t(), None) for w, (n, k) in zip(weights, LLAMA, strict=True)],
            "input's gradient": [(torch.empty(rows, k), given[n], w, None) for w, (n, k) in zip(weights, LLAMA, strict=True)],
            "weight's gradient, added up": [(total, given[n].t(), given[k], total) for total, (n, k) in zip(gradients, LLAMA, strict=True)],
        }
        for name, calls in kinds.items():

            def library(out: Tensor, a: Tensor, b: Tensor, start: Tensor | None) -> object:
                return torch.mm(a, b, out=out) if start is None else out.addmm_(a, b)

            def all_of(way: Callable[[Tensor, Tensor, Tensor, Tensor | None], object], calls: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = calls) -> Tensor:
                for each in calls:
                    way(*each)
                return calls[0][0]

            times = [[seconds(lambda way=way: all_of(way)) for way in (library, products.into)] for _ in range(rounds + 1)][1:]  # type: ignore[misc]
            theirs, ours = (median(each) for each in zip(*times, strict=True))
            errors = [error(way, *calls[0][1:3]) for way in (library, products.into)]
            print(f"| {rows} | {name} | {flops / theirs / 1e9:.0f} | {flops / ours / 1e9:.0f} | {theirs / ours:.2f} | {errors[0]:.2f} | {errors[1]:.2f} |", flush=True)


def error(way: Callable[[Tensor, Tensor, Tensor, Tensor | None], object], a: Tensor, b: Tensor) -> float:
    out = torch.empty(a.shape[0], b.shape[1])
    way(out, a, b, None)
    units = (out.double() - a.double() @ b.double()) / (2.0**-24 * (a.double().abs() @ b.double().abs()))
    return units.square().mean().sqrt().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--float32", action="store_true", help="of float32 alone")
    rounds, wide = (said := parser.parse_args()).rounds, said.float32
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_freed_memory()
    if wide:
        return float32(rounds)
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
