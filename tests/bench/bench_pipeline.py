"""How close is a schedule in simulated time to the clock? Real processes over gloo, each part a sleep of known length.

    python tests/bench/bench_pipeline.py                 # p = 2 and 4, all schedules, equal and unequal stages

A forward sleeps ``--unit`` ms, a backward twice that (half and half with `zb`, where the weights are apart); with a tilt the last
stage takes so much longer than the first. A message has 128 bytes; its latency is measured first, and is the simulation's.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gloo.launch import ranks
from gloo.sleep import Case, predicted, timed


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--unit", type=float, default=50.0, help="ms of a forward")
    p.add_argument("--steps", type=int, default=3)
    p.add_argument("--ranks", type=int, nargs="*", default=[2, 4])
    said = p.parse_args()
    print("  p   m  schedule       tilt   latency   simulated    measured (least)   (median)    off")
    for number in said.ranks:
        kinds = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zb", 1)]
        cases = [Case(name, number, 2 * number, v, said.unit / 1e3, tilt) for name, v in kinds for tilt in (0.0, 0.5)]
        for case, (wire, steps) in zip(cases, ranks(number, timed, cases, said.steps)[0], strict=True):
            want, took = predicted(case, wire), [real for real, _ in steps]
            print(
                f"{number:3} {case.microbatches:3}  {case.name + (str(case.chunks) if case.chunks > 1 else ''):13}{case.tilt:5.1f} {1e3 * wire:7.2f} ms"
                f" {1e3 * want:8.1f} ms {1e3 * min(took):13.1f} ms {1e3 * median(took):9.1f} ms {min(took) / want - 1:+7.1%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
