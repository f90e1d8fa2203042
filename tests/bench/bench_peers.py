"""The whole comparison of docs/performance.md: models, precisions and accumulation, against each peer of a memory class.

    python tests/bench/bench_peers.py --deepspeed-python PATH             # all: 12 selections of 5 classes
    python tests/bench/bench_peers.py --only "Llama 7M bf16 x1"            # one selection: model, precision, microbatches a step
    python tests/bench/bench_peers.py --quick                              # the smallest, few engines, one turn: minutes
    python tests/bench/bench_peers.py --bound                              # what share of the best eager peer's step no compiler can take away
    python tests/bench/bench_peers.py --report                             # nothing is run: the tables and the chart of what was measured

The engines of a class live at the same time and take turns (turns.py). Each class of a selection is a line of --keep, so that a run that was stopped goes on where it was: remove a line to measure it anew.
Peers have torch's fused AdamW. What is compiled, ours and theirs, is kept in a folder beside --keep, where a first start is a cold one, followed by a warm one; how long it took stays there. `--rounds 0` fills it beforehand.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from functools import partial
from math import inf, isfinite
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any

from turns import alternate, installed, summary

SIZES: dict[str, dict[str, Any]] = {
    "Llama 7M": {"model": "llama", "hidden": 256, "layers": 4, "batch": 4},
    "Llama 60M": {"model": "llama", "hidden": 768, "layers": 8, "batch": 2},
    "GPT-2 60M": {"model": "gpt2", "hidden": 768, "layers": 8, "batch": 2},
}
SELECTIONS = [f"{size} {dtype} x{n}" for n in (1, 4) for size in SIZES for dtype in ("fp32", "bf16")]
CODEGENS = {"": "python", ":auto": "auto"}  # those of the summary and the chart
WITH_INDUCTOR = ("Llama 7M fp32 x1", "Llama 7M bf16 x1")  # where a third row has it: it compiles for minutes
PEERS: dict[str, tuple[str, ...]] = {  # engines that keep the same on a rank
    "zero0": ("ddp", "ddp+compile"),
    "zero1": ("ddp-zero1", "ddp-zero1+compile", "deepspeed-zero1"),
    "zero2": ("fsdp2-zero2", "fsdp2-zero2+compile", "deepspeed-zero2"),
    "zero3": ("fsdp2-zero3", "fsdp2-zero3+compile", "deepspeed-zero3"),
    "one process": ("eager", "eager+compile"),
}
CLASSES = {c: (*peers, *(f"deepseed-{c.replace('one process', 'single')}{codegen}" for codegen in (*CODEGENS, ":inductor"))) for c, peers in PEERS.items()}
NAMES = {"ddp": "DDP", "ddp-zero1": "DDP, ZeroRedundancyOptimizer", "fsdp2-zero2": "FSDP2, kept after forward", "fsdp2-zero3": "FSDP2", "eager": "eager PyTorch"}
SIXTEEN = {"ddp": "autocast", "eager": "autocast", "fsdp2": "bf16 shards", "deepspeed": "bf16 copy", "deepseed": "bf16 copy"}
GOALS = {"zero0": 1.1, "zero1": 1.3, "zero2": 1.3, "zero3": 1.3, "one process": 1.1}  # times the best eager peer; 1.0 the best compiled
TOLERANCE = {"fp32": 1e-4, "bf16": 0.05}  # of a loss, from the nearest peer's: peers that add in other orders are themselves up to 3e-4 apart after eleven steps of GPT-2
DOCS = Path(__file__).resolve().parents[2] / "docs"
BEGIN, END = "<!-- peers: written by make bench -->", "<!-- end of peers -->"
Figures = dict[str, dict[str, Any]]  # of each engine of a selection: turns.summary


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--only", nargs="+", choices=SELECTIONS, default=None, metavar="SELECTION", help=f"of {', '.join(SELECTIONS)}")
    p.add_argument("--classes", nargs="+", choices=list(CLASSES), default=list(CLASSES), metavar="CLASS", help="engines that keep the same on a rank")
    p.add_argument("--engines", nargs="+", default=None, metavar="ENGINE", help="default: all")
    p.add_argument("--rounds", type=int, default=7, help="turns of each engine, of one step, for the smallest model with one microbatch two; at most 5 of the longest steps; 0: compile, beside other work, and measure nothing")
    p.add_argument("--bound", action="store_true", help="instead of the comparison, profile the best eager peer of zero1 in float32")
    p.add_argument("--quick", action="store_true", help="one turn of the smallest model, few engines; kept apart, and not written into the docs")
    p.add_argument("--report", action="store_true", help="run nothing")
    p.add_argument("--deepspeed-python", default=sys.executable, help="interpreter that has DeepSpeed")
    p.add_argument("--keep", default="build/peers.jsonl", help="what was measured")
    return p.parse_args()


def settings(selection: str, a: argparse.Namespace) -> argparse.Namespace:
    """Those of bench_training for one selection."""
    size, dtype, n = selection.rsplit(" ", 2)
    given = argparse.Namespace(ranks=2, rounds=a.rounds if "7M" in size or n == "x1" else min(a.rounds, 5), steps=2 if (size, n) == ("Llama 7M", "x1") else 1, warmup=4, seq=128, vocab=8192, threads=1, fused=True, malloc=False,
                               timeout=900 if a.rounds else 7200, dtype=dtype, accumulation=int(n[1:]), deepspeed_python=a.deepspeed_python)  # fmt: skip
    vars(given).update(SIZES[size])
    return given


def classes(selection: str, a: argparse.Namespace) -> dict[str, list[str]]:
    """The engines of each memory class that run here."""
    found = {c: [e for e in engines if (not a.engines or e in a.engines) and (selection in WITH_INDUCTOR or not e.endswith(":inductor"))] for c, engines in CLASSES.items() if c in a.classes}
    return {c: there for c, engines in found.items() if (there := [e for e in engines if installed(a, e)])}


def home(folder: Path, selection: str, engine: str) -> Path:
    """Where an engine's compiled code is kept. Peers compile a microbatch, however many there are; DeepSeed compiles the step."""
    return folder / (selection if engine.startswith("deepseed") else selection.rsplit(" ", 1)[0]).replace(" ", "-") / engine


def run(a: argparse.Namespace, keep: Path) -> None:
    done = {(line["selection"], line["class"]) for line in lines_of(keep) if "class" in line}
    todo = [(s, c, engines) for s in a.only or SELECTIONS for c, engines in classes(s, a).items() if (s, c) not in done]
    folder, began = keep.parent.resolve() / "peers-compiled", perf_counter()
    for n, (selection, group, engines) in enumerate(todo):
        print(f"{n + 1}/{len(todo)} {selection}, {group}, {(perf_counter() - began) / 60:.1f} minutes so far", file=sys.stderr, flush=True)
        given, where = settings(selection, a), partial(home, folder, selection)
        if not a.rounds:
            for engine in engines:
                alternate(given, [engine], where)
            continue
        found = alternate(given, engines, where)
        with keep.open("a") as file:
            file.write(json.dumps({"selection": selection, "class": group, "load": os.getloadavg()[2], "engines": found}) + "\n")
    print(f"{(perf_counter() - began) / 60:.1f} minutes", file=sys.stderr)


def bound(a: argparse.Namespace, keep: Path) -> None:
    """Profiles the eager peers of one class and keeps the parts of the best one's step."""
    for selection in a.only or [s for s in SELECTIONS if " fp32 " in s]:
        given = settings(selection, a)
        found = alternate(given, [e for e in classes(selection, a).get("zero1", []) if not e.startswith("deepseed") and not e.endswith("+compile")], after=lambda engine: engine.ask("parts"))
        summaries = [(summary(given, e, r)["cpu_s"], e, r["after"]) for e, r in found.items() if "after" in r]
        if summaries:
            cpu, engine, parts = min(summaries)
            row = {"selection": selection, "engine": engine, "cpu": cpu, "parts": {key: mean(p[key] for p in parts) for key in parts[0]}}
            with keep.open("a") as file:
                file.write(json.dumps(row) + "\n")


def lines_of(keep: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in keep.read_text().splitlines()] if keep.exists() else []


# the report ---------------------------------------------------------------------------------------------------------


def gathered(keep: Path, a: argparse.Namespace) -> dict[str, Figures]:
    """selection -> engine -> figures, of the last line of each class; engines that failed have none."""
    last = {(line["selection"], line["class"]): line["engines"] for line in lines_of(keep) if "class" in line}
    found: dict[str, Figures] = {}
    for selection, group in ((s, c) for s in SELECTIONS for c in CLASSES if (s, c) in last):
        found.setdefault(selection, {}).update({e: summary(settings(selection, a), e, r) for e, r in last[selection, group].items() if "ranks" in r})
    return {s: engines for s, engines in found.items() if engines}


def failures(keep: Path) -> list[str]:
    last = {(line["selection"], line["class"]): line["engines"] for line in lines_of(keep) if "class" in line}
    return [f"{selection}, {r['failed'].splitlines()[0]}" for (selection, _), engines in last.items() for r in engines.values() if "failed" in r]


def best(found: Figures, engines: Iterable[str], key: str = "cpu_s") -> tuple[str, float] | None:
    return min(((e, found[e][key]) for e in engines if e in found), key=lambda each: each[1], default=None)


def shares(found: Figures, group: str) -> dict[str, dict[str, float]]:
    """Of each of our engines in a class: how many times the best eager peer's speed, and the best compiled one's; its peak memory to the smallest peer's."""
    peers = PEERS[group]
    against = {"eager": best(found, [e for e in peers if not e.endswith("+compile")]), "compiled": best(found, [e for e in peers if e.endswith("+compile")]), "memory": best(found, peers, "peak_rss_mb")}
    return {e: {k: (found[e]["peak_rss_mb"] / b[1] if k == "memory" else b[1] / found[e]["cpu_s"]) for k, b in against.items() if b} for e in CLASSES[group] if e.startswith("deepseed") and e in found}


def report(keep: Path, a: argparse.Namespace) -> str:
    all_found = gathered(keep, a)
    lines = ["Speed of DeepSeed over the best peer that keeps the same on a rank: CPU seconds a step of the peer over ours, `codegen=\"python\"` / `\"auto\"`. Bold: below the aim, which is 1.3 of the best eager peer"
             " (zero0, one process: 1.1) and 1.0 of the best compiled one.", "", "| | " + " | ".join(f"{c}: eager | compiled" for c in CLASSES) + " |", "|---" * (2 * len(CLASSES) + 1) + "|"]  # fmt: skip
    for selection, found in all_found.items():
        lines.append(f"| {selection} | " + " | ".join(cell(found, group, key, goal) for group in CLASSES for key, goal in (("eager", GOALS[group]), ("compiled", 1.0))) + " |")
    lines += ["", "![speed beside the peers](img/peers.svg)", "", "Peak resident memory of a rank, ours to the smallest peer's of the class, `python` / `auto`; bold: above it.", "", "| | " + " | ".join(CLASSES) + " |",
              "|---" * (len(CLASSES) + 1) + "|", *(f"| {selection} | " + " | ".join(cell(found, group, "memory", 1.0) for group in CLASSES) + " |" for selection, found in all_found.items()), "", *bounds(keep)]  # fmt: skip
    for selection, found in all_found.items():
        lines += section(selection, found, settings(selection, a))
    return "\n".join(lines)


def cell(found: Figures, group: str, key: str, goal: float) -> str:
    ours, said = shares(found, group), []
    for engine in CLASSES[group][len(PEERS[group]) : len(PEERS[group]) + len(CODEGENS)]:
        x = ours.get(engine, {}).get(key)
        said.append("-" if x is None else f"{x:.2f}" if (round(x, 2) <= goal if key == "memory" else x >= goal) else f"**{x:.2f}**")
    return " / ".join(said)


def bounds(keep: Path) -> list[str]:
    last = {line["selection"]: line for line in lines_of(keep) if "parts" in line}
    if not last:
        return []
    lines = ["### What bounds a step in float32", "", "Of the best eager peer of zero1 (`--bound`): matrix products, in the library that all engines call, and gloo's own threads, which add and copy what is sent. If all else took no time, a step"
             " through gloo would be as many times as fast as the last column says; DeepSeed's ranks of one host do without gloo's part, and its own products of float32 take 2 to 13 % less time than the library's by vectors, 25 to 38 % less by a matrix unit.", "", "| | peer | CPU s/step | products | gloo's threads | both | attention | bound |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for selection, line in last.items():
        p = line["parts"]
        both = (p["products"] + p["gloo"]) / line["cpu"]
        lines.append(f"| {selection} | {named(line['engine'])} | {line['cpu']:.4f} | {p['products']:.4f} | {p['gloo']:.4f} | {both:.0%} | {p['attention']:.4f} | {1 / both:.2f} |")
    return [*lines, ""]


def section(selection: str, found: Figures, given: argparse.Namespace) -> list[str]:
    any_of = next(iter(found.values()))
    wide = given.dtype == "fp32"
    lines = [f"### {selection}", "", f"{any_of['parameters'] / 1e6:.1f} M parameters; a step is {given.accumulation} x {given.batch} x {given.seq} tokens on each of two ranks; medians of {min(len(f['cpu_s_steps']) for f in found.values())} steps or more;"
             f" losses agree to {spread(found):.0e}.{aside(found)}", "", f"| class | engine |{'' if wide else ' 16 bits |'} CPU s/step | range | tokens/s | peak MB | first step, s: cold, warm | speed to best eager, compiled |",
             f"|---|---|{'' if wide else '---|'}---|---|---|---|---|---|"]  # fmt: skip
    for group, engines in CLASSES.items():
        ours = shares(found, group)
        for e in (e for e in engines if e in found):
            f = found[e]
            first = ", ".join("-" if x is None else f"{x:.1f}" for x in (f["cold_s"], f["first_s"]))
            share = ", ".join(f"{ours[e][k]:.2f}" for k in ("eager", "compiled") if k in ours[e]) if e in ours else ""
            sixteen = "" if wide else f" {SIXTEEN[e.split('-')[0].split('+')[0]]} |"
            lines.append(f"| {group} | {named(e, f['codegen'])} |{sixteen} {f['cpu_s']:.4f} | {min(f['cpu_s_steps']):.3f}-{max(f['cpu_s_steps']):.3f} | {f['tokens_per_s']:.0f} | {f['peak_rss_mb']:.0f} | {first} | {share} |")
    return [*lines, ""]


def aside(found: Figures) -> str:
    """Of which engines how many steps were disturbed, since the cores had not kept their pace, and whether they count all the same."""
    each = [f"{named(e, f['codegen'])} {f['disturbed']} of {f['set_aside'] + len(f['cpu_s_steps'])}{'' if f['set_aside'] else ', which count'}" for e, f in found.items() if f["disturbed"]]
    return f" Steps on cores that others used, set aside where not said otherwise: {'; '.join(each)}." if each else ""


def spread(found: Figures) -> float:
    """The largest difference of a loss between two engines."""
    return max(max(each) - min(each) for each in zip(*(f["losses"] for f in found.values()), strict=False))


def off(found: Figures) -> float:
    """The most that a loss of an engine of ours is away from those of the peer that is nearest to it; infinite where one is no number."""
    ours, peers = ([f["losses"] for e, f in found.items() if e.startswith("deepseed") == own] for own in (True, False))
    if not all(isfinite(x) for losses in (*ours, *peers) for x in losses):
        return inf
    return max((min(max(abs(a - b) for a, b in zip(mine, theirs, strict=False)) for theirs in peers) for mine in ours if peers), default=0.0)


def named(engine: str, codegen: str | None = None) -> str:
    """``codegen``: what ``auto`` has meant."""
    base, compiled = engine.removesuffix("+compile"), engine.endswith("+compile")
    if base.startswith("deepseed"):
        plan, _, word = base.removeprefix("deepseed-").partition(":")
        return f"DeepSeed {plan.replace('single', 'one process')}, {word or 'python'}{f' ({codegen})' if word == 'auto' else ''}"
    return NAMES.get(base, base.replace("deepspeed-", "DeepSpeed ")) + (", torch.compile" if compiled else "")


def chart(keep: Path, a: argparse.Namespace, target: Path) -> None:
    """For each selection and class the speed over the best eager peer; the aim is a line."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "peers"
    import matplotlib.pyplot as plt

    all_found = gathered(keep, a)
    fig, grid = plt.subplots(1, len(CLASSES), figsize=(12, 0.9 + 0.42 * len(all_found)), sharey=True, squeeze=False)
    for axis, group in zip(grid[0], CLASSES, strict=True):
        for n, (codegen, name) in enumerate(CODEGENS.items()):
            engine = CLASSES[group][len(PEERS[group])] + codegen
            values = [shares(found, group).get(engine, {}).get("eager", 0.0) for found in all_found.values()]
            axis.barh([y + (n - 0.5) * 0.38 for y in range(len(values))], values, 0.36, label=f"DeepSeed, {name}", color=("#4878a8", "#e0903a")[n])
        peers = [[best(found, [e for e in PEERS[group] if e.endswith("+compile") == after]) for after in (False, True)] for found in all_found.values()]
        diamonds = [(eager[1] / compiled[1], y) for y, (eager, compiled) in enumerate(peers) if eager and compiled]
        axis.scatter([x for x, _ in diamonds], [y for _, y in diamonds], marker="D", s=22, color="#333", zorder=3, label="best compiled peer")
        axis.axvline(1.0, color="#999", lw=1)
        axis.axvline(GOALS[group], color="#c33", lw=1, ls="--")
        axis.set_title(group, fontsize=9)
        axis.tick_params(labelsize=8)
    grid[0][0].set_yticks(range(len(all_found)), list(all_found))
    grid[0][0].invert_yaxis()
    fig.supxlabel("times the speed of the best eager peer (dashed: the aim)", fontsize=9)
    grid[0][-1].legend(fontsize=7, loc="lower right")
    fig.tight_layout()
    fig.savefig(target, metadata={"Date": None})
    plt.close(fig)


def write(keep: Path, a: argparse.Namespace, docs: Path = DOCS) -> None:
    page = docs / "performance.md"
    text = page.read_text()
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{page} has no {BEGIN} .. {END}\n  fix: put both lines where the table belongs")
    head, rest = text.split(BEGIN)
    page.write_text(f"{head}{BEGIN}\n{report(keep, a)}\n{END}{rest.split(END)[1]}")
    if gathered(keep, a):
        chart(keep, a, docs / "img" / "peers.svg")


def main() -> None:
    a = arguments()
    if a.quick:
        a.only, a.rounds, a.engines = SELECTIONS[:2], 1, a.engines or ["ddp", "ddp-zero1", "fsdp2-zero3", "deepseed-zero0", "deepseed-zero1", "deepseed-zero3", "eager", "deepseed-single"]
    keep = Path(a.keep).with_suffix(".quick.jsonl") if a.quick else Path(a.keep)
    keep.parent.mkdir(parents=True, exist_ok=True)
    if a.quick:
        keep.unlink(missing_ok=True)
    if not a.report:
        (bound if a.bound else run)(a, keep)
    if a.quick:
        print(report(keep, a))
    elif a.rounds:
        write(keep, a)
    wrong = [f"{s}: losses are {off(found):.1e} off, {TOLERANCE[s.split()[-2]]:.0e} is allowed" for s, found in gathered(keep, a).items() if off(found) > TOLERANCE[s.split()[-2]]]
    failed = failures(keep)
    print("\n".join([*wrong, *failed]), file=sys.stderr)
    sys.exit(1 if wrong or failed else 0)


if __name__ == "__main__":
    main()
