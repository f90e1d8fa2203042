"""The whole comparison of docs/performance.md: models, precisions and accumulation, against each peer of a memory class.

    python tests/bench/bench_peers.py --deepspeed-python PATH             # all: about half a minute a turn, 26 engines, 12 selections, --rounds turns; it says what is left
    python tests/bench/bench_peers.py --only "Llama 7M bf16 x1"            # one selection: model, precision, microbatches a step
    python tests/bench/bench_peers.py --quick                              # the smallest, few engines, one round: minutes
    python tests/bench/bench_peers.py --report                             # nothing is run: the table and the chart of what was measured

Each turn (an engine, once) is a line of --keep, so that a run that was stopped goes on where it was: remove the file to begin anew. Measured as in bench_training.py. Peers have torch's fused AdamW;
what is compiled, ours and theirs, is kept in a folder beside --keep, so that a first round is a cold start and later ones are warm.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any

import bench_training as one

SIZES: dict[str, dict[str, Any]] = {
    "Llama 7M": {"model": "llama", "hidden": 256, "layers": 4, "batch": 4},
    "Llama 60M": {"model": "llama", "hidden": 768, "layers": 8, "batch": 2},
    "GPT-2 60M": {"model": "gpt2", "hidden": 768, "layers": 8, "batch": 2},
}
SELECTIONS = [f"{size} {dtype} x{n}" for n in (1, 4) for size in SIZES for dtype in ("fp32", "bf16")]
CODEGENS = ("", ":inductor")
CLASSES: dict[str, tuple[str, ...]] = {  # engines that keep the same on a rank
    "zero0": ("ddp", "ddp+compile", *(f"deepseed-zero0{c}" for c in CODEGENS)),
    "zero1": ("ddp-zero1", "ddp-zero1+compile", "deepspeed-zero1", *(f"deepseed-zero1{c}" for c in CODEGENS)),
    "zero2": ("fsdp2-zero2", "fsdp2-zero2+compile", "deepspeed-zero2", *(f"deepseed-zero2{c}" for c in CODEGENS)),
    "zero3": ("fsdp2-zero3", "fsdp2-zero3+compile", "deepspeed-zero3", *(f"deepseed-zero3{c}" for c in CODEGENS)),
    "one process": ("eager", "eager+compile", *(f"deepseed-single{c}" for c in CODEGENS)),
}
NAMES = {"ddp": "DDP", "ddp-zero1": "DDP, ZeroRedundancyOptimizer", "fsdp2-zero2": "FSDP2, kept after forward", "fsdp2-zero3": "FSDP2", "eager": "eager PyTorch"}
SIXTEEN = {"ddp": "autocast", "eager": "autocast", "fsdp2": "bf16 shards", "deepspeed": "bf16 copy", "deepseed": "bf16 copy"}
GOALS = {"zero0": 1.1, "zero1": 1.3, "zero2": 1.3, "zero3": 1.3, "one process": 1.1}  # times the best eager peer; 1.0 the best compiled
TOLERANCE = {"fp32": 1e-4, "bf16": 0.05}  # of a loss
DOCS = Path(__file__).resolve().parents[2] / "docs"
BEGIN, END = "<!-- peers: written by make bench -->", "<!-- end of peers -->"


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--only", nargs="+", choices=SELECTIONS, default=None, metavar="SELECTION", help=f"of {', '.join(SELECTIONS)}")
    p.add_argument("--engines", nargs="+", default=None, metavar="ENGINE", help="default: all")
    p.add_argument("--rounds", type=int, default=3, help="turns of each engine")
    p.add_argument("--steps", type=int, default=5, help="measured steps a turn")
    p.add_argument("--quick", action="store_true", help="one round of the smallest model, few engines; kept apart, and not written into the docs")
    p.add_argument("--report", action="store_true", help="run nothing")
    p.add_argument("--deepspeed-python", default=sys.executable, help="interpreter that has DeepSpeed")
    p.add_argument("--keep", default="build/peers.jsonl", help="turns that are done")
    return p.parse_args()


def settings(selection: str, a: argparse.Namespace) -> argparse.Namespace:
    """Those of bench_training for one selection."""
    size, dtype, n = selection.rsplit(" ", 2)
    given = argparse.Namespace(ranks=2, rounds=a.rounds, steps=a.steps, warmup=3, seq=128, vocab=8192, threads=1, fused=True, malloc=False, timeout=900, dtype=dtype, accumulation=int(n[1:]),
                               deepspeed_python=a.deepspeed_python)  # fmt: skip
    vars(given).update(SIZES[size])
    return given


def run(a: argparse.Namespace, keep: Path) -> None:
    done = {(t["selection"], t["engine"], t["round"]) for t in turns(keep)}
    engines = a.engines or [e for group in CLASSES.values() for e in group if one.installed_engine(a, e)]
    todo = [(s, e, r) for s in a.only or SELECTIONS for r in range(a.rounds) for e in (engines if r % 2 == 0 else engines[::-1]) if (s, e, r) not in done]
    print(f"{len(todo)} turns, about {len(todo) * 30 / 60:.0f} minutes on a quiet machine", file=sys.stderr)
    folder = keep.parent.resolve() / "peers-compiled"
    os.environ.update(DEEPSEED_CACHE_DIR=str(folder / "deepseed"), TORCHINDUCTOR_CACHE_DIR=str(folder / "torch"))
    spent: list[float] = []
    for n, (selection, engine, number) in enumerate(todo):
        began = perf_counter()
        row: dict[str, Any] = {"selection": selection, "engine": engine, "round": number}
        try:
            row["ranks"] = one.turn(settings(selection, a), engine)
        except RuntimeError as error:
            row["failed"] = str(error)
        spent.append(perf_counter() - began)
        with keep.open("a") as file:
            file.write(json.dumps(row) + "\n")
        said = row["failed"].splitlines()[0] if "failed" in row else f"{median(x for r in row['ranks'] for x in r['cpu']):.4f} CPU s/step"
        print(f"{n + 1}/{len(todo)} {selection}, {engine}: {said}; {spent[-1]:.0f} s, {(len(todo) - n - 1) * median(spent) / 60:.0f} minutes left", file=sys.stderr, flush=True)


def turns(keep: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in keep.read_text().splitlines()] if keep.exists() else []


# the report ---------------------------------------------------------------------------------------------------------


def figures(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over all steps of all turns of one engine; a step's figure is the mean of its ranks."""
    found = [t["ranks"] for t in rows if "ranks" in t]
    over = {key: [[mean(step) for step in zip(*(r[key] for r in ranks), strict=True)] for ranks in found] for key in ("cpu", "wall", "losses")}
    firsts = [max(r["first"] + r["setup"] for r in ranks) for _, ranks in sorted((t["round"], t["ranks"]) for t in rows if "ranks" in t)]
    return {"cpu": median(x for t in over["cpu"] for x in t), "range": [median(t) for t in over["cpu"]], "wall": median(x for t in over["wall"] for x in t), "steps": sum(map(len, over["cpu"])),
            "rss": median(max(r["rss"] for r in ranks) for ranks in found), "first": firsts, "losses": over["losses"][0], "parameters": found[0][0]["parameters"], "versions": found[0][0]["versions"]}  # fmt: skip


def gathered(keep: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """selection -> engine -> figures; the failed ones have none."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for t in turns(keep):
        found.setdefault(t["selection"], {}).setdefault(t["engine"], []).append(t)
    return {s: {e: figures(rows) for e, rows in found[s].items() if any("ranks" in t for t in rows)} for s in SELECTIONS if s in found}


def best(found: dict[str, dict[str, Any]], engines: Iterable[str], key: str = "cpu") -> tuple[str, float] | None:
    return min(((e, found[e][key]) for e in engines if e in found), key=lambda each: each[1], default=None)


def shares(found: dict[str, dict[str, Any]], group: str) -> dict[str, dict[str, float]]:
    """Of each of our engines in a class: how many times the best eager peer's speed, and the best compiled one's; its peak memory to the smallest peer's."""
    engines = CLASSES[group]
    peers = [e for e in engines if not e.startswith("deepseed")]
    against = {"eager": best(found, [e for e in peers if not e.endswith("+compile")]), "compiled": best(found, [e for e in peers if e.endswith("+compile")]), "memory": best(found, peers, "rss")}
    return {e: {k: (found[e]["rss"] / b[1] if k == "memory" else b[1] / found[e]["cpu"]) for k, b in against.items() if b} for e in engines if e.startswith("deepseed") and e in found}


def report(keep: Path, a: argparse.Namespace) -> str:
    all_found = gathered(keep)
    lines = ["Speed of DeepSeed over the best peer that keeps the same on a rank: CPU seconds a step of the peer over ours, `python` / `inductor` back end. Bold: below the aim, which is 1.3 of the best eager peer"
             " (zero0, one process: 1.1) and 1.0 of the best compiled one.", "", "| | " + " | ".join(f"{c}: eager | compiled" for c in CLASSES) + " |", "|---" * (2 * len(CLASSES) + 1) + "|"]  # fmt: skip
    for selection, found in all_found.items():
        cells = []
        for group in CLASSES:
            ours = shares(found, group)
            for key, goal in (("eager", GOALS[group]), ("compiled", 1.0)):
                said = [(s[key] if (s := ours.get(e)) and key in s else None) for e in CLASSES[group] if e.startswith("deepseed")]
                cells.append(" / ".join("-" if x is None else f"{x:.2f}" if x >= goal else f"**{x:.2f}**" for x in said))
        lines.append(f"| {selection} | " + " | ".join(cells) + " |")
    lines += ["", "![speed beside the peers](img/peers.svg)", ""]
    for selection, found in all_found.items():
        lines += section(selection, found, settings(selection, a))
    return "\n".join(lines)


def section(selection: str, found: dict[str, dict[str, Any]], given: argparse.Namespace) -> list[str]:
    any_of = next(iter(found.values()))
    wide = given.dtype == "fp32"
    lines = [f"### {selection}", "", f"{any_of['parameters'] / 1e6:.1f} M parameters; a step is {given.accumulation} x {given.batch} x {given.seq} tokens on each of two ranks; medians of {min(f['steps'] for f in found.values())} steps or more;"
             f" losses agree to {spread(found):.0e}.", "", f"| class | engine |{'' if wide else ' 16 bits |'} CPU s/step | range | tokens/s | peak MB | first step, s: cold, warm | speed to best eager, compiled |",
             f"|---|---|{'' if wide else '---|'}---|---|---|---|---|---|"]  # fmt: skip
    for group, engines in CLASSES.items():
        ours = shares(found, group)
        for e in (e for e in engines if e in found):
            f = found[e]
            tokens = given.ranks * given.batch * given.seq * given.accumulation / f["wall"]
            first = f"{f['first'][0]:.1f}" + (f", {median(f['first'][1:]):.1f}" if len(f["first"]) > 1 else "")
            share = ", ".join(f"{ours[e][k]:.2f}" for k in ("eager", "compiled") if k in ours[e]) if e in ours else ""
            sixteen = "" if wide else f" {SIXTEEN[e.split('-')[0].split('+')[0]]} |"
            lines.append(f"| {group} | {named(e)} |{sixteen} {f['cpu']:.4f} | {min(f['range']):.3f}-{max(f['range']):.3f} | {tokens:.0f} | {f['rss']:.0f} | {first} | {share} |")
    return [*lines, ""]


def spread(found: dict[str, dict[str, Any]]) -> float:
    """The largest difference of a loss between two engines."""
    return max(max(each) - min(each) for each in zip(*(f["losses"] for f in found.values()), strict=True))


def named(engine: str) -> str:
    base, compiled = engine.removesuffix("+compile"), engine.endswith("+compile")
    if base.startswith("deepseed"):
        plan, _, codegen = base.removeprefix("deepseed-").partition(":")
        return f"DeepSeed {plan.replace('single', 'one process')}, {codegen or 'python'}"
    return NAMES.get(base, base.replace("deepspeed-", "DeepSpeed ")) + (", torch.compile" if compiled else "")


def chart(keep: Path, target: Path) -> None:
    """For each selection and class the speed over the best eager peer; the aim is a line."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "peers"
    import matplotlib.pyplot as plt

    all_found = gathered(keep)
    fig, grid = plt.subplots(1, len(CLASSES), figsize=(12, 0.9 + 0.42 * len(all_found)), sharey=True, squeeze=False)
    for axis, group in zip(grid[0], CLASSES, strict=True):
        for n, codegen in enumerate(CODEGENS):
            values = [next((s.get("eager", 0.0) for e, s in shares(found, group).items() if e.endswith(codegen) and (":" in e) == bool(codegen)), 0.0) for found in all_found.values()]
            axis.barh([y + (n - 0.5) * 0.38 for y in range(len(values))], values, 0.36, label=f"DeepSeed, {codegen[1:] or 'python'}", color=("#4878a8", "#e0903a")[n])
        compiled = [next((b[1] / c[1] for b, c in [(best(found, [e for e in CLASSES[group] if "deepseed" not in e and "+" not in e]), best(found, [e for e in CLASSES[group] if "+compile" in e]))] if b and c), None) for found in all_found.values()]
        axis.scatter([c or 0 for c in compiled], range(len(compiled)), marker="D", s=22, color="#333", zorder=3, label="best compiled peer")
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


def write(keep: Path, a: argparse.Namespace) -> None:
    page = DOCS / "performance.md"
    text = page.read_text()
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{page} has no {BEGIN} .. {END}\n  fix: put both lines where the table belongs")
    head, rest = text.split(BEGIN)
    page.write_text(f"{head}{BEGIN}\n{report(keep, a)}\n{END}{rest.split(END)[1]}")
    chart(keep, DOCS / "img" / "peers.svg")


def main() -> None:
    a = arguments()
    if a.quick:
        a.only, a.rounds, a.engines = SELECTIONS[:2], 1, a.engines or ["ddp", "ddp-zero1", "fsdp2-zero3", "deepseed-zero0", "deepseed-zero1", "deepseed-zero3", "eager", "deepseed-single"]
    keep = Path(a.keep).with_suffix(".quick.jsonl") if a.quick else Path(a.keep)
    keep.parent.mkdir(parents=True, exist_ok=True)
    if a.quick:
        keep.unlink(missing_ok=True)
    if not a.report:
        run(a, keep)
    if a.quick:
        print(report(keep, a))
    else:
        write(keep, a)
    wrong = [f"{s}: losses differ by {spread(found):.1e}, {TOLERANCE[s.split()[-2]]:.0e} is allowed" for s, found in gathered(keep).items() if spread(found) > TOLERANCE[s.split()[-2]]]
    failed = sorted({f"{t['selection']}, {t['engine']}: {t['failed'].splitlines()[0]}" for t in turns(keep) if "failed" in t})
    print("\n".join([*wrong, *failed]), file=sys.stderr)
    sys.exit(1 if wrong or failed else 0)


if __name__ == "__main__":
    main()
