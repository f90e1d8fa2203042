"""Blocks by trial: each kernel of a fragment with the candidates of the model, the fastest is kept; and what PyTorch itself does for the ops, where that is faster.

What times is given: on a device, the median of several launches. What was chosen is held against PyTorch's own numbers once (deepseed.codegen.agreement); kernels that are wrong are not used.
What was found is kept in a folder by fragment, device and versions, so that ranks that share it run the same code, as does a later process. Numbers do not depend on the choice but for the order of sums.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from deepseed.codegen.block_sizes import Blocks, candidates
from deepseed.codegen.expressions import DTYPES
from deepseed.codegen.kernels import Kernel
from deepseed.codegen.triton import launched, source
from deepseed.ir.program import FLOATS, Program

GAIN = 0.98  # of the time so far: less is noise
REPEATS = 7


@dataclass(frozen=True)
class Choice:
    """``blocks``: for ``source``, by kernel; ``library``: the Python function is faster than the kernels; ``wrong``: why it runs where they do not, or give other numbers."""

    blocks: tuple[tuple[str, Blocks], ...] = ()
    library: bool = False
    wrong: str = ""


def tuned(fragment: Program, seconds: Callable[[str], float]) -> tuple[tuple[str, Blocks], ...]:
    """The blocks for ``source``, one kernel after another; those of the model where nothing is faster by more than the noise of 2 percent."""
    return _tuned(fragment, seconds)[0]


def choice(k: Kernel, folder: Path, device: str, seconds: Callable[[str], float], library: Callable[[], float], wrong: Callable[[str], str]) -> Choice:
    """What is fastest for a kernel on ``device`` (with the versions that compile for it). ``seconds``: of a source, infinite where it does not run; ``library``: of the Python function;
    ``wrong``: what is wrong with a source's numbers. Timed and held against PyTorch's once a folder."""
    path = folder / f"{k.name}-{hashlib.sha256(f'{source(k.fragment)}{k.strides}{device}'.encode()).hexdigest()[:16]}.blocks.json"
    folder.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (known := _read(path)) is not None:
            return known
        blocks, best = _tuned(k.fragment, seconds)
        faster = library() < GAIN * best
        made = Choice(blocks, faster, "" if faster and best < float("inf") else wrong(source(k.fragment, blocks)))
        fresh = path.with_suffix(f".{os.getpid()}.tmp")
        fresh.write_text(json.dumps({"blocks": [(name, asdict(b)) for name, b in made.blocks], "library": made.library, "wrong": made.wrong}))
        fresh.replace(path)  # at once: a process that ends here leaves no half of it
        return made


def _read(path: Path) -> Choice | None:
    """None where there is none, or what is there is not whole."""
    try:
        found = json.loads(path.read_text())
        return Choice(tuple([(name, Blocks(**b)) for name, b in found["blocks"]]), found["library"], found["wrong"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def operands(k: Kernel, device: torch.device) -> list[Tensor]:
    """Numbers of the types and strides that a kernel is made for."""
    out = []
    for i, strides in zip(k.fragment.inputs, k.strides, strict=True):
        x = torch.empty_strided(i.type.shape, strides, dtype=getattr(torch, DTYPES[i.type.dtype].removeprefix("torch.")), device=device)
        memory = x.as_strided((x.untyped_storage().nbytes() // x.itemsize,), (1,))  # several elements may be one number
        memory.uniform_(0.5, 1.5) if i.type.dtype in FLOATS else memory.random_(0, 2) if i.type.dtype == "bool" else memory.zero_()
        out.append(x)
    return out


def on_device(f: Callable[..., object], given: list[Tensor]) -> float:
    """Median seconds of a call on the CUDA device that has its operands; the first calls compile and warm up."""
    event: Any = torch.cuda.Event
    for _ in range(3):
        f(*given)
    times: list[float] = []
    for _ in range(REPEATS):
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        f(*given)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return median(times)


def _tuned(fragment: Program, seconds: Callable[[str], float]) -> tuple[tuple[tuple[str, Blocks], ...], float]:
    chosen: dict[str, Blocks] = {}
    best = seconds(source(fragment))
    for launch in launched(fragment):
        for candidate in candidates(launch.blocks)[1:] if launch.free else ():
            tried = {**chosen, launch.kernel: candidate}
            took = seconds(source(fragment, tuple(tried.items())))
            if took < GAIN * best:
                best, chosen = took, tried
    return tuple(chosen.items()), best
