"""How long does compiling take, and does it grow with depth? Seconds of each pass, of HiGHS, and of the default checks.

    python tests/bench/bench_compile.py [--layers 12 24 48 96] [--target hf:LlamaForCausalLM ..] [--plan zero3+tp2] [--memory]
    python tests/bench/bench_compile.py --layers 96 --plan pp8+mb64      # cutting and scheduling: the line cut_stages
    python tests/bench/bench_compile.py --share --target hf:LlamaForCausalLM hf:BertForMaskedLM hf:MixtralForCausalLM --layers 12

A tiny Llama by default; captured from the meta device, solved, checked, and generated for one rank, as rank 0 of a run does it.
Seconds are of this process's CPU, one thread: other work on the machine does not count. The instances' memory on disk is left out, as in
a first compile, unless ``--memory`` is given. ``--share``: the share of the default checks alone, each target and depth in a process of
its own that starts with an empty folder (cold), then in another one that finds there what the first has shown (warm).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from statistics import median
from time import process_time


@dataclass
class Timed:
    """One depth: seconds by pass (checks apart), and of each axis's integer program its whole placement and HiGHS alone."""

    layers: int
    ops: int = 0
    passes: dict[str, float] = field(default_factory=dict)
    checks: float = 0.0
    solver: dict[str, float] = field(default_factory=dict)
    variables: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.passes.values()) + self.checks


def measure(target: str, layers: int, plan: str) -> Timed:
    import torch

    from deepseed import pipeline
    from deepseed.capture import capture
    from deepseed.codegen.python import generate
    from deepseed.ir.mesh import STAGES
    from deepseed.meshes import program_mesh
    from deepseed.passes.placement import Assignment, AxisReport
    from deepseed.plan import parse_plan
    from deepseed.runtime.executable import Executable
    from deepseed.solver import assignment
    from deepseed.target import load

    pipeline.perf_counter = assignment.perf_counter = process_time  # type: ignore[attr-defined]
    parsed = parse_plan(plan)
    ranks = parsed.mesh()
    rows = max(8, ranks.sizes.get("dp", 1) * (parsed.mb or 1))
    found = load(f"{target}(num_hidden_layers={layers},batch_size={rows})", meta=True)
    out = Timed(layers)
    reports: list[AxisReport] = []
    solve = Assignment._solve

    def watched(self: Assignment, *args: object) -> None:
        solve(self, *args)  # type: ignore[arg-type]
        reports.append(self.reports[-1])

    def stage(name: str, started: float) -> None:
        out.passes[name] = process_time() - started

    Assignment._solve = watched  # type: ignore[assignment,method-assign]
    try:
        started = process_time()
        captured = capture(found.model, found.batch, optimizer=torch.optim.AdamW(found.model.parameters()), clip_grad_norm=1.0)
        stage("capture", started)
        mesh = program_mesh(captured.program, parsed, ranks)
        done = pipeline.run(captured.program, pipeline.arguments(mesh, parsed.stage, {}, plan=parsed), pipeline.SHARED)
        started = process_time()
        where = ranks.coordinate(0) if ranks.axes else {}
        local = pipeline.run(done[-1].program, pipeline.arguments(mesh, parsed.stage, where, plan=parsed), pipeline.EACH_RANK)
        source = generate(local[-1].program, where.get(STAGES, 0))
        Executable(source, "bench")
        stage("codegen", started)
        out.passes["codegen"] -= sum(p.check_seconds for p in local)
    finally:
        Assignment._solve = solve  # type: ignore[method-assign]
    out.ops = len(done[0].program.ops)
    out.passes |= {p.name: p.seconds for p in done}
    out.checks = sum(p.check_seconds for p in (*done, *local))
    for r in reports:
        out.solver[f"{r.axis} {r.part}"] = r.solution.seconds
        out.variables[f"{r.axis} {r.part}"] = r.solution.variables
    return out


def table(rows: list[Timed]) -> str:
    names = [*rows[0].passes]
    lines = [f"{'seconds':24}" + "".join(f"{f'{r.layers} layers':>12}" for r in rows) + f"{'last/first':>12}"]

    def line(name: str, values: list[float]) -> None:
        lines.append(f"{name:24}" + "".join(f"{v:>12.2f}" for v in values) + f"{values[-1] / max(values[0], 1e-9):>12.1f}")

    for name in names:
        line(name, [r.passes[name] for r in rows])
    line("checks, all passes", [r.checks for r in rows])
    line("whole compile", [r.total for r in rows])
    lines.append("")
    for name in rows[0].solver:
        line(f"HiGHS, {name}", [r.solver[name] for r in rows])
    lines.append(f"{'ops captured':24}" + "".join(f"{r.ops:>12}" for r in rows))
    lines.append(f"{'variables':24}" + "".join(f"{sum(r.variables.values()):>12}" for r in rows))
    lines.append(f"{'checks of compile':24}" + "".join(f"{r.checks / r.total:>12.1%}" for r in rows))
    return "\n".join(lines)


def share(targets: list[str], layers: list[int], plan: str, rounds: int) -> None:
    """Print the default checks' share of a compile in fresh processes, cold and warm: of each the medians of ``rounds``."""
    for target, depth in ((t, n) for t in targets for n in layers):
        seconds: dict[str, list[tuple[float, float]]] = {"cold": [], "warm": []}
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as folder:
                for found in seconds.values():
                    call = [sys.executable, __file__, "--once", "--target", target, "--layers", str(depth), "--plan", plan]
                    said = subprocess.run(call, env={**os.environ, "DEEPSEED_CACHE_DIR": folder}, capture_output=True, text=True, check=True).stdout
                    checks, total = map(float, said.split()[-2:])
                    found.append((checks, total))
        for name, found in seconds.items():
            checks, total = (median(column) for column in zip(*found, strict=True))
            of = sorted(c / t for c, t in found)
            print(f"{target:28}{depth:>7} {name}: checks {checks:.2f} of {total:.2f} CPU s, {median(of):.1%} ({of[0]:.1%} to {of[-1]:.1%})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 24, 48, 96])
    parser.add_argument("--target", nargs="+", default=["hf:LlamaForCausalLM"])
    parser.add_argument("--plan", default="zero3+tp2")
    parser.add_argument("--memory", action="store_true", help="use the instances that earlier compiles checked")
    parser.add_argument("--share", action="store_true", help="only the share of the default checks, in fresh processes, cold and warm")
    parser.add_argument("--rounds", type=int, default=3, help="of --share")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    said = parser.parse_args()
    if said.share:
        share(said.target, said.layers, said.plan, said.rounds)
        return
    import torch

    torch.set_num_threads(1)
    if said.once:
        timed = measure(said.target[0], said.layers[0], said.plan)
        print(timed.checks, timed.total)
        return
    for target in said.target:
        compare(target, said.layers, said.plan, said.memory)


def compare(target: str, depths: list[int], plan: str, memory: bool) -> None:
    """Print a target's table, depth by depth, in this process."""
    import torch

    from deepseed.check import instances

    measure(target, 1, plan)  # imports
    rows = []
    for layers in depths:
        with tempfile.TemporaryDirectory() as folder:
            if not memory:
                os.environ["DEEPSEED_CACHE_DIR"] = folder
                instances._passed.clear()
                instances._hashes.clear()
            rows.append(measure(target, layers, plan))
        print(f"{layers} layers: {rows[-1].total:.1f} s", flush=True)
    print(f"\n{target} under {plan}, {torch.get_num_threads()} thread\n")
    print(table(rows))


if __name__ == "__main__":
    main()
