"""How much of the communication of a step hides behind its computation, over an artificial link (tests/gloo/link.py): measured, predicted from the measured op times, and what could hide at all.

    python tests/bench/bench_overlap.py --plans zero2 zero3 tp2 --latency 5e-4 --bandwidth 400e6

Each op takes what it took in the median of the first steps, and the last one is measured, so that other work on the machine does not count; ``--wall`` takes the wall's clock, with real sleeps.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gloo.link import Ran, linked_steps

from deepseed.counts import is_collective, sent_bytes
from deepseed.ir.text import parse
from deepseed.on_ranks import on_ranks
from deepseed.overlap import Overlap, best, free_order, whole_weights
from deepseed.speed import Known, course

LLAMA = "hf:LlamaForCausalLM(num_hidden_layers=2,hidden_size=640,intermediate_size=1792,num_attention_heads=10,num_key_value_heads=10,vocab_size=2048,sequence_length=128,batch_size=4)"


@dataclass(frozen=True)
class Result:
    """``measured``: medians over the steps that count, means over the ranks. ``fixed``: the best in this order of computation within ``whole`` bytes of gathered weights; ``free``: in any order, without a bound."""

    plan: str
    measured: Overlap
    predicted: Overlap
    fixed: Overlap
    free: Overlap
    whole: int
    losses: tuple[float, ...]

    def __str__(self) -> str:
        m, p = self.measured, self.predicted
        return (
            f"{self.plan:8} compute {m.compute * 1e3:6.0f} ms, sending {m.sending * 1e3:6.0f}, still {m.still * 1e3:6.0f} (predicted {p.still * 1e3:6.0f}), hidden {m.hidden * 1e3:6.0f} (predicted {p.hidden * 1e3:6.0f}); "
            f"hideable in this order {self.fixed.hidden * 1e3:6.0f}: {share(m, self.fixed):.0%}, in any {self.free.hidden * 1e3:6.0f}: {share(m, self.free):.0%}; {self.whole / 1e6:.1f} MB of weights whole"
        )


def share(hidden: Overlap, of: Overlap) -> float:
    return hidden.hidden / of.hidden if of.hidden > 0 else 1.0


def result(plan: str, text: str, ranks: list[list[Ran]], latency: float, bandwidth: float, losses: list[float]) -> Result:
    p = parse(text)
    times = {op.name: sum(median(mean(steps[k].took.get(r, 0.0) for steps in ranks) for k in range(len(ranks[0]))) for r in op.results) for op in p.ops}
    machine = Known(latency=latency, link=bandwidth, took=times)
    sending = {op.name: latency + sent_bytes(p, op) / bandwidth for op in p.ops if is_collective(op)}
    ran, compute = course(p, p.ops, machine), sum(times.values())
    measured = Overlap(
        median(mean(sum(steps[k].took.values()) for steps in ranks) for k in range(len(ranks[0]))), mean(steps[0].sending for steps in ranks),
        median(mean(sum(steps[k].held.values()) for steps in ranks) for k in range(len(ranks[0]))),
    )  # fmt: skip
    whole = whole_weights(p)
    return Result(
        plan, measured, Overlap(compute, sum(sending.values()), ran.seconds - compute), best(p, times, sending, whole), free_order(p, times, sending), whole, tuple(losses)
    )


def measure(plan: str, latency: float, bandwidth: float, steps: int, wall: bool = False, machine: str = "", target: str = LLAMA) -> Result:
    got = on_ranks(linked_steps, 2, target, plan, latency, bandwidth, steps, wall, machine)
    return result(plan, got[0][0], [each[1] for each in got], latency, bandwidth, got[0][2])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--plans", nargs="+", default=["zero2", "zero3", "tp2"])
    parser.add_argument("--latency", type=float, default=5e-4)
    parser.add_argument("--bandwidth", type=float, default=400e6)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--wall", action="store_true")
    parser.add_argument("--machine", default="", help="what the schedule is chosen by; left out, the default")
    parser.add_argument("--target", default=LLAMA)
    a = parser.parse_args()
    for plan in a.plans:
        print(measure(plan, a.latency, a.bandwidth, a.steps, a.wall, a.machine, a.target), flush=True)


if __name__ == "__main__":
    main()
