"""What an exchange between two ranks of this host costs: read out of each other's memory, and through gloo's sockets.

    python tests/bench/bench_exchange.py                   # CPU milliseconds of a rank, its threads included; milliseconds of the clock

Both by turns in the same two processes, one thread each; medians. The operand's size is what a rank brings.
"""

from __future__ import annotations

import argparse
from statistics import median
from time import perf_counter, process_time

import torch

from deepseed.ir.mesh import Mesh
from deepseed.on_ranks import on_ranks
from deepseed.runtime.distributed import DistributedRuntime, start, stop

KINDS = ("all_gather", "reduce_scatter", "all_reduce")


def measured(sizes: list[int], rounds: int) -> list[tuple[str, int, str, float, float]]:
    torch.set_num_threads(1)
    start("gloo")
    ways = {"memory": DistributedRuntime(Mesh((("dp", 2),))), "gloo": DistributedRuntime(Mesh((("dp", 2),)))}
    ways["gloo"]._links = {}
    found = []
    for kind in KINDS:
        for size in sizes:
            took: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
            x = torch.randn((2, size // 8) if kind == "reduce_scatter" else size // 4)
            for n in range(rounds + 1):
                for way in (*ways,) if n % 2 else (*ways,)[::-1]:
                    rt = ways[way]
                    rt.exchange("all_reduce", torch.zeros(1), "dp", "sum")()  # both are here
                    c, w = process_time(), perf_counter()
                    rt.exchange(kind, x, "dp", "" if kind == "all_gather" else "sum")()
                    took[way].append((process_time() - c, perf_counter() - w))
            found += [(kind, size, way, *(median(each) for each in zip(*t[1:], strict=True))) for way, t in took.items()]
    stop()
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--sizes", type=int, nargs="+", default=[1 << 14, 1 << 20, 1 << 23, 1 << 25], help="bytes")
    p.add_argument("--rounds", type=int, default=15)
    a = p.parse_args()
    print(f"{'':16}{'bytes':>10}{'memory: CPU ms':>18}{'clock':>9}{'gloo: CPU ms':>16}{'clock':>9}{'CPU ratio':>12}")
    rows = on_ranks(measured, 2, a.sizes, a.rounds)[0]
    for (kind, size, _, cpu, wall), (_, _, _, other, clock) in zip(rows[::2], rows[1::2], strict=True):
        print(f"{kind:16}{size:>10}{cpu * 1e3:>18.3f}{wall * 1e3:>9.3f}{other * 1e3:>16.3f}{clock * 1e3:>9.3f}{other / cpu:>12.1f}")


if __name__ == "__main__":
    main()
