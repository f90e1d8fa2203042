"""A script of ``examples/from_deepspeed`` on N ranks, as a user starts it: under torchrun's launcher, with a config file; what it printed.

A script stands in two forms, which differ in one line: DeepSeed's and ``original``, which is DeepSpeed's, or (for the Trainer's scripts) that of stock
transformers, plain DDP; where a class of TRL's is extended two lines differ. The scripts that call ``initialize`` have a plain DDP twin, ``ddp.py``.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import re
import runpy
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from gloo.launch import launched, preload
from torch import Tensor

from deepseed.runtime.executable import Executable

preload("transformers.trainer", "datasets", "peft", "tokenizers")
FOLDER = Path(__file__).resolve().parent.parent / "examples" / "from_deepspeed"
ENGINE = ("cifar", "bert", "raw_loop")
TRAINER = ("causal_lm_trainer", "lora", "trl_sft")
WAS = re.compile(r"^(?P<now>.+?)  # was: (?P<was>.+)$", re.MULTILINE)
BASES = re.compile(r"\((?:DeepSeedArguments|DeepSeedMixin), ")
TRAINING = ["--use_cpu", "--learning_rate", "1e-3", "--max_steps", "20", "--logging_steps", "1", "--max_grad_norm", "0.5", "--report_to", "none", "--disable_tqdm", "true", "--save_strategy", "no", "--bf16", "false"]
LINE = re.compile(r"step (\d+) loss (\S+) norm (\S+)")


class Step(NamedTuple):
    number: int
    loss: float
    norm: float


class Printed(NamedTuple):
    steps: list[Step]
    lines: list[str]
    runs: int  # of compiled programs, by the first rank


def original(name: str) -> str:
    """The script as it was before DeepSeed."""
    return BASES.sub("(", WAS.sub(lambda m: m["was"], (FOLDER / f"{name}.py").read_text()))


def config(path: Path, base: str = "ds_config", **changes: Any) -> Path:
    """The folder's config ``base`` with some keys changed, as a file; ``stage`` is ZeRO's."""
    content: dict[str, Any] = json.loads((FOLDER / f"{base}.json").read_text())
    if "stage" in changes:
        content["zero_optimization"]["stage"] = changes.pop("stage")
    path.mkdir(parents=True, exist_ok=True)
    file = path / f"{base}.json"
    file.write_text(json.dumps({**content, **changes}))
    return file


def sizes(micro: int, accumulation: int) -> dict[str, int]:
    return {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": accumulation}


def training(folder: Path, micro: int = 2, accumulation: int = 4) -> list[str]:
    """Arguments of a Trainer's script."""
    return [*TRAINING, "--per_device_train_batch_size", str(micro), "--gradient_accumulation_steps", str(accumulation), "--output_dir", str(folder)]


def start(name: str, ranks: int, arguments: Sequence[object], tmp_path: Path, source: str | None = None) -> Printed:
    """``name`` of the folder (``source`` in its place) on ``ranks`` fresh processes. Raises what the launcher raises where one fails."""
    tmp_path.mkdir(parents=True, exist_ok=True)
    script = FOLDER / f"{name}.py"
    if source is not None:
        script = tmp_path / script.name
        script.write_text(source)
    output = tmp_path / f"{name}.out"
    launched(ranks, run, str(script), [str(a) for a in arguments], str(output))
    lines = output.read_text().splitlines()
    return Printed([Step(int(m[1]), float(m[2]), float(m[3])) for m in map(LINE.fullmatch, lines) if m], lines, int(Path(f"{output}.runs").read_text()))


def run(script: str, arguments: Sequence[str], output: str) -> None:
    """One rank: the script as the main module; what the first rank prints goes to the file."""
    warnings.simplefilter("ignore")
    multiprocessing.set_start_method("fork", force=True)  # as in a process that was not forked itself: of a DataLoader's workers
    sys.path.insert(0, str(FOLDER))
    sys.argv = [script, *arguments]
    first = os.environ["RANK"] == "0"
    sys.stdout = open(output if first else os.devnull, "w")  # noqa: SIM115
    count, call = itertools.count(), Executable.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Executable, "__call__", lambda self, *args: (next(count), call(self, *args))[1])
        try:
            runpy.run_path(script, run_name="__main__")
        finally:
            sys.stdout.flush()
    if first:
        Path(f"{output}.runs").write_text(str(next(count)))


def apart(a: Sequence[Step], b: Sequence[Step]) -> float:
    """The largest relative difference of losses and norms, step by step."""
    assert [s.number for s in a] == [s.number for s in b], (len(a), len(b))
    return max(abs(x - y) / max(abs(x), abs(y), 1e-3) for p, q in zip(a, b, strict=True) for x, y in ((p.loss, q.loss), (p.norm, q.norm)))


def weights_apart(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The largest difference of any weight over the largest weight."""
    assert list(a) == list(b)
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a) / max(float(t.abs().max()) for t in a.values())
