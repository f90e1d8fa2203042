"""What does a training step cost beside DDP, FSDP2, DeepSpeed and plain eager PyTorch?

    python tests/bench/bench_training.py                                   # every engine that is installed, two ranks
    python tests/bench/bench_training.py --engines ddp deepseed-zero1 --rounds 5
    python tests/bench/bench_training.py --deepspeed-python PATH           # an interpreter that has DeepSpeed
    python tests/bench/bench_training.py --offload --fused                 # ZeRO-Offload, FSDP2's CPU offload, and what each costs over none

Engines live at the same time and take turns (turns.py), so that drift of a shared machine falls on all alike. All
start from the same weights, see the same tokens, use AdamW with the same settings and clip the gradient norm at 1.0, so in
float32 their losses must agree: the run fails when they do not. The single-process engines see the ranks' batches put
together: the same global batch, the same losses.

The figure to compare is process CPU seconds a step and rank (median over steps): it repeats on a machine that
other work shares, wall time does not. Compiling is in `setup` and `first step`, never in a step. Python 3.11, torch,
transformers; CPU and gloo. This process itself imports neither, so that children do not inherit its peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from turns import Record, alternate, installed, summary

RANKED = (
    "ddp", "ddp+compile", "ddp-zero1", "ddp-zero1+compile", "fsdp2-zero2", "fsdp2-zero2+compile", "fsdp2-zero3", "fsdp2-zero3+compile", "deepspeed-zero1", "deepspeed-zero2", "deepspeed-zero3",
    *(f"deepseed-zero{stage}{codegen}" for stage in range(4) for codegen in ("", ":inductor")),
)  # fmt: skip
SINGLE = ("eager", "eager+compile", "deepseed-single", "deepseed-single:inductor")  # behind the colon: codegen=
OFFLOAD = ("fsdp2-zero3+offload", "deepspeed-zero2+offload", "deepspeed-zero3+offload", "deepseed-zero2+offload(optimizer)", "deepseed-zero3+offload(optimizer)",
           "deepseed-zero3+offload(optimizer,params)")  # fmt: skip
EXTRA = ("deepspeed-zero0", "deepspeed-zero2+offload+cpuadam", *OFFLOAD)  # by name only


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--engines", nargs="+", default=None, metavar="ENGINE", help=f"default: all that are installed of {', '.join([*RANKED, *SINGLE])}; by name only: {', '.join(EXTRA)}; other plans as deepseed-PLAN:CODEGEN")
    p.add_argument("--offload", action="store_true", help="the engines that keep the optimizer's state on the host, and each without that")
    p.add_argument("--ranks", type=int, default=2)
    p.add_argument("--rounds", type=int, default=15, help="turns of each engine")
    p.add_argument("--steps", type=int, default=2, help="measured steps a turn")
    p.add_argument("--warmup", type=int, default=3, help="steps before them, the first one included")
    p.add_argument("--together", type=int, default=6, help="engines that are alive at the same time and take turns")
    p.add_argument("--model", choices=("llama", "gpt2"), default="llama")
    p.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="what each engine does for bf16: tests/bench/engines.py")
    p.add_argument("--accumulation", type=int, default=1, help="microbatches a step")
    p.add_argument("--batch", type=int, default=4, help="sequences of a microbatch and rank")
    p.add_argument("--seq", type=int, default=128)
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--hidden", type=int, default=256)
    p.add_argument("--vocab", type=int, default=8192)
    p.add_argument("--threads", type=int, default=1, help="torch threads a process")
    p.add_argument("--fused", action="store_true", help="fused AdamW for the peers (DeepSeed's update is fused by itself)")
    p.add_argument("--malloc", action="store_true", help="glibc keeps freed memory, for every engine (DeepSeed sets this by itself)")
    p.add_argument("--tolerance", type=float, default=1e-4, help="largest difference of a loss between engines; in bf16 0.02 is added")
    p.add_argument("--timeout", type=float, default=600, help="seconds for one answer: setting up, a first step, a step")
    p.add_argument("--deepspeed-python", default=sys.executable, help="interpreter that has DeepSpeed")
    p.add_argument("--json", default="out/bench_training.json", help="where the figures go")
    return p.parse_args()


def chosen(a: argparse.Namespace) -> list[str]:
    """The default engines that can run here; says what is left out."""
    engines = ("ddp", "fsdp2-zero3", "deepspeed-zero2", "deepspeed-zero3", "deepseed-zero2", "deepseed-zero3", *OFFLOAD) if a.offload else (*RANKED, *SINGLE)
    return [e for e in engines if installed(a, e)]


def disagreement(results: Iterable[dict[str, Any]], tolerance: float) -> list[str]:
    """Sets ``loss_diff`` (largest difference to the first engine's losses) and returns a line for each engine above tolerance."""
    reference: dict[str, Any] | None = None
    out = []
    for r in results:
        reference = reference or r
        pairs = list(zip(r["losses"], reference["losses"], strict=True))
        r["loss_diff"], at = max((abs(x - y), i) for i, (x, y) in enumerate(pairs))
        if not r["loss_diff"] <= tolerance:
            out.append(f"{r['engine']}: loss {pairs[at][0]:.6f} at step {at}, {reference['engine']} has {pairs[at][1]:.6f}: apart by {r['loss_diff']:.1e}, tolerance {tolerance:.0e}")
    return out


def table(results: list[dict[str, Any]]) -> str:
    head = ("engine", "ranks", "CPU s/step", "range", "ratio", "wall s/step", "tokens/s", "setup s", "first step s", "peak MB", "over model", "last loss", "max diff")
    rows = [head]
    for r in results:
        base = next((x["cpu_s"] for x in results if x["ranks"] == r["ranks"]), r["cpu_s"])  # the first engine of its kind
        rows.append((r["engine"], str(r["ranks"]), f"{r['cpu_s']:.4f}", f"{min(r['cpu_s_steps']):.3f}-{max(r['cpu_s_steps']):.3f}", f"{r['cpu_s'] / base:.2f}",
                     f"{r['wall_s']:.4f}", f"{r['tokens_per_s']:.0f}", f"{r['setup_s']:.1f}", f"{r['first_step_s']:.2f}", f"{r['peak_rss_mb']:.0f}",
                     f"{r['rss_over_model_mb']:.0f}", f"{r['losses'][-1]:.6f}", f"{r['loss_diff']:.0e}"))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def main(a: argparse.Namespace) -> int:
    engines = a.engines or chosen(a)
    found: dict[str, Record] = {}
    for n in range(0, len(engines), a.together):
        found |= alternate(a, engines[n : n + a.together])
    failed = {e: found[e]["failed"] for e in engines if "failed" in found[e]}
    results = [summary(a, e, found[e]) for e in engines if e not in failed]
    if not results:
        return 1
    wrong = disagreement(results, a.tolerance + (0.02 if a.dtype == "bf16" else 0))
    settings = {k: v for k, v in vars(a).items() if k not in ("json", "deepspeed_python", "engines")}
    machine = {"processor": platform.processor() or platform.machine(), "cpus": os.cpu_count(), "python": platform.python_version(), **results[0]["versions"]}
    target = Path(a.json)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"settings": settings, "machine": machine, "results": results, "failed": failed, "disagree": wrong}, indent=1) + "\n")
    print(table(results))
    print(f"\n{results[0]['parameters'] / 1e6:.2f} M parameters, {a.ranks} x {a.accumulation} x {a.batch} x {a.seq} tokens a step, {a.dtype}, {a.rounds} turns of {a.steps} steps"
          f"; ratio: CPU to the first engine with as many ranks\nfigures: {target}")  # fmt: skip
    for line in [*wrong, *(f"failed: {x.splitlines()[0]}" for x in failed.values())]:
        print(line)
    return 1 if wrong or failed else 0


if __name__ == "__main__":
    sys.exit(main(arguments()))
