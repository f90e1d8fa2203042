"""One rank that saves and loads a state of a given size by turns, as DeepSeed does it and as torch.distributed.checkpoint alone."""

from __future__ import annotations

import gc
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable
from ctypes import CDLL
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

import deepseed
from deepseed import checkpoint
from deepseed.api import TrainStep
from deepseed.runtime import boxfile

WIDTH = 2048


def made(plan: str, size: int, width: int = WIDTH) -> TrainStep:
    """``size``: bytes of parameters and Adam's two moments."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(max(1, round(size / (3 * 4 * width * (width + 1)))))))
    step = deepseed.compile(model, plan, optimizer=torch.optim.AdamW(model.parameters(), fused=True), loss_fn=lambda model, x: model(x).square().mean(), backend="gloo")
    assert isinstance(step, TrainStep)
    return step


def lying(step: TrainStep) -> dict[str, Any]:
    """The same state as a user of torch.distributed.checkpoint has it: tensors and DTensors on the same memory."""
    state, out = step.states[0], {"model": dict(step.model.state_dict())}
    for key, type_ in state.types.items():
        if key[0] == "state":
            out.setdefault("optimizer", {})[key[1]] = state.dtensor(key, step.host.meshes[0]) if type_.layout.elements else state.tensors[key]  # type: ignore[attr-defined]
    return out


class Took:
    """Wall clock of all ranks together; this rank's CPU seconds, and its resident memory at the most beyond what it had."""

    def __init__(self, do: Callable[[], Any]) -> None:
        gc.collect()
        CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        before = _resident("VmRSS")
        dist.barrier()
        wall, cpu = time.perf_counter(), time.process_time()
        do()
        self.cpu = time.process_time() - cpu
        dist.barrier()
        self.wall = time.perf_counter() - wall
        self.resident = _resident("VmHWM") - before


def _forget(folder: Path) -> None:
    """Have the system read these files from the disk again."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _resident(what: str) -> int:
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))


def by_turns(plan: str, size: int, rounds: int, folder: str, trace: str = "", cold: bool = False, checksum: bool = True) -> dict[str, Any]:
    """``{"save": {"ours": [Took…], "dcp": […]}, "load": …}`` as plain numbers, and how many bytes this rank stores."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    step = made(plan, size)
    step(torch.randn(8, WIDTH))
    if not checksum:  # the same sum of all boxes
        boxfile.crc32 = lambda _data, _value=0: 0
    values, rank = lying(step), dist.get_rank()
    want = {name: t.clone() for name, t in step.states[0].tensors.items()}
    out: dict[str, Any] = {what: {who: [] for who in ("ours", "dcp")} for what in ("save", "load")}
    for n in range(rounds):
        names = {who: f"{folder}/{who}-{n}" for who in ("ours", "dcp")}
        do: dict[str, dict[str, Callable[[], Any]]] = {
            "save": {"ours": lambda names=names: step.save(names["ours"]), "dcp": lambda names=names: dcp.save(values, storage_writer=dcp.FileSystemWriter(names["dcp"], sync_files=True))},
            "load": {"ours": lambda names=names: step.load(names["ours"]), "dcp": lambda names=names: dcp.load(values, checkpoint_id=names["dcp"])},
        }  # type: ignore[misc]
        for what in ("save", "load"):
            for who in ("ours", "dcp")[:: 1 if n % 2 else -1]:
                if what == "load":
                    for t in step.states[0].tensors.values():
                        t.zero_()
                    if cold and rank == 0:
                        _forget(Path(names[who]))
                took = _profiled(do[what][who], f"{trace}/{what}-{rank}") if trace and who == "ours" and n == 1 else Took(do[what][who])
                out[what][who].append((took.wall, took.cpu, took.resident))
                wrong = [name for name, t in step.states[0].tensors.items() if not torch.equal(t, want[name])]
                assert not wrong, f"{what} by {who}: {wrong[0]} differs"
        dist.barrier()
        if rank == 0:
            for name in names.values():
                shutil.rmtree(name)
    return {**out, "stored": sum(t.nbytes for t in want.values())}


def beside(plan: str, size: int, rows: int, steps: int, rounds: int, folder: str) -> list[dict[str, Any]]:
    """Of each round: ``steps`` steps in ``plain``, as many after an asynchronous save in ``saving``: [wall, CPU] of each; of the call that starts it in
    ``call``; CPU of the wait at the end in ``wait``; seconds until the thread had written in ``wrote``, and how many steps had begun by then in ``met``."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    step, out = made(plan, size), []
    batch = torch.randn(rows, WIDTH)

    def timed(do: Callable[[], Any]) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        do()
        return time.perf_counter() - wall, time.process_time() - cpu

    checkpoints = deepseed.Checkpoints(step, folder, keep=1, asynchronous=True)
    for n in range(-1, rounds):  # in the first one memory is faulted in: it is not counted
        found: dict[str, Any] = {"size": checkpoints.host_bytes}
        dist.barrier()
        found["plain"] = [timed(lambda: step(batch)) for _ in range(steps)]
        dist.barrier()
        began = time.perf_counter()
        found["call"] = timed(checkpoints.save)
        writing, found["saving"], found["met"] = checkpoints._writing, [], 0
        assert writing is not None, "the copies had no room"
        run, ended = writing._thread.join, []
        watch = threading.Thread(target=lambda run=run, ended=ended: (run(), ended.append(time.perf_counter())))
        watch.start()
        for _ in range(steps):
            found["met"] += not writing.done
            found["saving"].append(timed(lambda: step(batch)))
        found["wait"] = timed(checkpoints.wait)[1]
        watch.join()
        found["wrote"] = ended[0] - began
        out += [found] if n >= 0 else []
    return out


def reads(plan: str, folder: str, width: int = 512, size: int = 25 * 10**6) -> dict[str, int]:
    """Bytes that this rank reads of files, as the system counts them: at a load of a step that has run, of one that has not, and with its first batch."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    batch, out = torch.randn(8, width), {}
    step = made(plan, size, width)
    step(batch)
    step.save(folder)
    out["state"] = sum(t.numel() * t.element_size() for t in (*step.state_dict().values(), *step.optimizer_state().values()))
    fresh = made(plan, size, width)
    fresh.compile(batch)
    for what, do in {"running": lambda: step.load(folder), "compiled": lambda: fresh.load(folder)}.items():
        before = _read()
        do()
        out[what] = _read() - before
    waiting = made(plan, size, width)
    before = _read()
    waiting.load(folder)
    out["before the first batch"] = _read() - before
    read = checkpoint.read
    checkpoint.read = lambda *a, **k: (out.update(begin=_read()), read(*a, **k), out.update(end=_read()))[1]  # compiling reads files too
    waiting(batch)
    checkpoint.read = read
    out["with the first batch"] = out.pop("end") - out.pop("begin")
    return out


def _read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def _profiled(do: Callable[[], Any], path: str) -> Took:
    import cProfile

    profile = cProfile.Profile()
    took = Took(lambda: profile.runcall(do))
    profile.dump_stats(path)
    return took


