"""Train one model on one device and under two plans on two local ranks, and lay the curves on each other.

    python examples/demo.py            # --steps 50 --out out/demo

Runs ``train_text.py`` as a user would: plain PyTorch, then DeepSeed on one device, under ``zero3`` and under ``tp2``. Exits
with 1 if a curve leaves that of plain PyTorch. Needs matplotlib for the picture.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import matplotlib
import torch
import train_text
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

# How far the loss of a step may lie from plain PyTorch's, relative, in float32. A plan adds the same numbers in another order, and
# training magnifies the rounding. Measured over the 50 steps: 1.7e-6 for each plan, and as much for plain PyTorch against itself with
# every initial weight off by one rounding (6e-8). A learning rate that is wrong by one percent shows as 1.6e-3.
TOLERANCE = 1e-4
BYTES = {"parameters": "parameters", "gradients": "gradients", "optimizer": "optimizer", "sent": "sent a step"}  # of one rank, by explain()


@dataclass
class Run:
    """One training run in a process (or two ranks) of its own, and what it wrote."""

    title: str
    plan: str
    ranks: int
    records: list[dict[str, float]] = field(default_factory=list)

    def start(self, folder: Path, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
        self.log, self.said, self.weights = (folder / f"{self.plan}.{end}" for end in ("jsonl", "txt", "pt"))
        self.log.unlink(missing_ok=True)
        command = [sys.executable, train_text.__file__]
        if self.ranks > 1:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.ranks}", f"--log-dir={folder}", "--", train_text.__file__]
        command += ["--plan", self.plan, "--log", str(self.log), "--save", str(self.weights)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        with self.said.open("wb") as said:
            return subprocess.Popen([*command, *arguments], stdout=said, stderr=subprocess.STDOUT, env=environment)

    def read(self) -> None:
        lines = self.log.read_text().splitlines(keepends=True) if self.log.exists() else []
        self.records = [json.loads(line) for line in lines if line.endswith("\n")]

    @property
    def losses(self) -> list[float]:
        return [r["loss"] for r in self.records if "loss" in r]

    @property
    def seconds(self) -> float:
        """Of a step, the median without the first ones."""
        return median([r["seconds"] for r in self.records if "loss" in r][2:])

    def get(self, name: str) -> float | None:
        return next((r[name] for r in self.records if name in r), None)

    def differences(self, reference: Run) -> list[float]:
        """Of each step's loss, relative; infinite where a loss is no number."""
        return [abs(a - b) / abs(b) if math.isfinite(a) else math.inf for a, b in zip(self.losses, reference.losses, strict=True)]


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for logs, weights and the picture")
    args, arguments = p.parse_known_args()  # the others, such as --steps 50, are train_text.py's
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    runs = [Run("PyTorch", "eager", 1), Run("zero0, 1 rank", "zero0", 1), Run("zero3, 2 ranks", "zero3", 2), Run("tp2, 2 ranks", "tp2", 2)]
    train(runs, args.out, arguments)
    seconds = time.monotonic() - started

    console = Console()
    console.print(table(runs, train_text.parse(arguments)))
    picture = draw(runs, args.out / "curves.png")
    console.print(f"\n[bold]Text[/] from the weights that zero3 trained, after {len(runs[0].losses)} steps:", highlight=False)
    console.print(generate(runs[2].weights, train_text.parse(arguments)), style="italic", markup=False, highlight=False)
    worst = max(max(run.differences(runs[0])) for run in runs[1:])
    equal = worst <= TOLERANCE
    console.print(f"\nThe curves {'lie on each other' if equal else '[red]differ[/]'}: at most {worst:.1e} from PyTorch, allowed {TOLERANCE:.0e}. {seconds:.0f} s in all.")
    console.print(f"picture: {picture}    next: deepseed explain hf:LlamaForCausalLM --plan zero3 --world-size 2", soft_wrap=True, highlight=False)
    return 0 if equal else 1


def train(runs: Sequence[Run], folder: Path, arguments: Sequence[str]) -> None:
    """Two processes at a time, a core each: first both runs on one device, then two ranks of one plan, then of the other."""
    columns = (SpinnerColumn(), TextColumn("{task.description:18}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"), TimeElapsedColumn())
    steps = train_text.parse(arguments).steps
    with Progress(*columns) as bar:
        tasks = {run.plan: bar.add_task(run.title, total=steps, loss="", start=False) for run in runs}
        for together in ([run for run in runs if run.ranks == 1], *([run] for run in runs if run.ranks > 1)):
            processes = []
            for run in together:
                bar.start_task(tasks[run.plan])
                processes.append((run, run.start(folder, arguments)))
            running = True
            while running:
                time.sleep(0.2)
                running = any([process.poll() is None for _, process in processes])
                for run, process in processes:
                    run.read()
                    bar.update(tasks[run.plan], completed=len(run.losses), loss=f"loss {run.losses[-1]:.4f}" if run.losses else "compiling")
                    if process.poll():
                        sys.exit(f"{run.title} failed with exit code {process.returncode}; what it said is in {run.said}:\n{run.said.read_text()[:4000]}")


def table(runs: Sequence[Run], args: argparse.Namespace) -> Table:
    title = f"Llama, {size(args)} parameters, AdamW, float32, {args.batch * args.seq} tokens a step; MiB of one rank"
    out = Table("", *(run.title for run in runs), title=title, title_justify="left")
    for column in out.columns[1:]:
        column.justify = "right"
    steps = len(runs[0].losses)
    for step in sorted({1, *range(10, steps + 1, 10), steps}):
        out.add_row(f"loss, step {step}", *(f"{run.losses[step - 1]:.6f}" for run in runs))
    out.add_row("most apart", "", *(f"{max(run.differences(runs[0])):.1e}" for run in runs[1:]), end_section=True)
    for name, title in BYTES.items():
        values = [run.get(name) for run in runs]
        out.add_row(f"{title}, MiB", *("" if v is None else f"{v / 2**20:.1f}" for v in values), end_section=name == "sent")
    out.add_row("tokens/s", *(f"{args.batch * args.seq / run.seconds:.0f}" for run in runs))
    out.add_row("compiling, s", *(f"{run.get('ready'):.1f}" for run in runs))
    return out


def size(args: argparse.Namespace) -> str:
    return f"{sum(p.numel() for p in train_text.make_model(args).parameters()) / 1e6:.1f}M"


def draw(runs: Sequence[Run], path: Path) -> Path:
    """The losses, thick to thin so that all can be seen, and under them how far each lies from PyTorch."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(7, 5), height_ratios=(2, 1), layout="constrained")
    x = range(1, len(runs[0].losses) + 1)
    for run, width, color, style in zip(runs, (9, 5, 2.5, 1), ("tab:gray", "tab:orange", "tab:blue", "black"), ("-", "-", "-", "--"), strict=True):
        above.plot(x, run.losses, style, linewidth=width, color=color, label=run.title)
        if run is not runs[0]:
            below.semilogy(x, [min(max(d, 1e-9), 1) for d in run.differences(runs[0])], style, color=color, label=run.title)
    below.axhline(TOLERANCE, color="red", linestyle=":", label="allowed")
    above.set_ylabel("loss")
    below.set(ylabel="relative to PyTorch", xlabel="step")
    above.legend()
    below.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return path


def generate(weights: Path, args: argparse.Namespace) -> str:
    """Text from a fresh Hugging Face model that has loaded the trained weights."""
    model = train_text.make_model(args)
    model.load_state_dict(torch.load(weights))
    tokenizer = train_text.make_tokenizer(args.vocab)
    torch.manual_seed(0)
    prompt = torch.tensor([tokenizer.encode("The class").ids])
    tokens = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=60, do_sample=True, temperature=0.8, top_k=50, repetition_penalty=1.2, pad_token_id=0
    )  # fmt: skip
    return str(tokenizer.decode(tokens[0].tolist()))


if __name__ == "__main__":
    sys.exit(main())
