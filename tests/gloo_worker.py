"""One rank of a run over gloo: ``gloo_worker.py MODE FOLDER``, with torchrun's environment. See test_runtime.py."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from gloo import pipeline
from placed import MLP, lowered, new_state, random_inputs, random_reshard, sources
from rows import there_and_back

from deepseed.ir.mesh import Mesh
from deepseed.ir.text import parse
from deepseed.runtime import agree
from deepseed.runtime.distributed import DistributedRuntime, guarded, start, stop
from deepseed.runtime.errors import AgreementError
from deepseed.runtime.executable import Executable
from deepseed.runtime.state import gather_over

RESHARDS = 40


def reshards(folder: Path) -> None:
    """Random reshards: what this rank returns for each."""
    out = []
    for seed in range(RESHARDS):
        text, _, parts = random_reshard(seed, dist.get_world_size())
        p = lowered(text)
        rt = DistributedRuntime(p.mesh)
        with guarded(rt):
            out.append(Executable(sources(p)[rt.rank])(rt, [parts[rt.rank]])[0])
    torch.save(out, folder / f"{dist.get_rank()}.pt")


def step(folder: Path) -> None:
    """Two steps of the small model; outputs, stored tensors, and those as DTensors gathered by torch."""
    p = lowered(MLP)
    rt = DistributedRuntime(p.mesh)
    full = random_inputs(p)
    state = new_state(p, full, rt.rank)
    executable = Executable(sources(p)[rt.rank])
    with guarded(rt):
        outputs = [executable(rt, state.inputs(p, full)) for _ in range(2)]
        whole = {key: gather_over(rt, t, state.types[key]) for key, t in state.tensors.items()}
        dtensors = {key: state.dtensor(key, rt.device_mesh).full_tensor() for key in state.tensors}
    torch.save({"outputs": outputs, "local": state.tensors, "whole": whole, "dtensors": dtensors}, folder / f"{rt.rank}.pt")


def dtypes(folder: Path) -> None:
    """Every kind of collective in every dtype."""
    rt = DistributedRuntime(Mesh((("dp", dist.get_world_size()),)))
    n, out = dist.get_world_size(), {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.bool, torch.int64, torch.int32, torch.uint8, torch.complex64):
        x = (torch.arange(4 * n * 3).reshape(4 * n, 3) % 7 - (0 if dtype is torch.uint8 else 2) + rt.rank).to(dtype)
        out[str(dtype)] = [
            rt.wait(rt.all_gather_start(x, "dp", (1, 1))),
            rt.wait(rt.all_reduce_start(x, "dp")),
            rt.wait(rt.reduce_scatter_start(x, "dp", (0, 2))),
            rt.wait(rt.all_to_all_start(x, "dp", (0, 4), (1, 3))),
            rt.wait(rt.all_reduce_start(x[0, 0], "dp")),
            rt.wait(rt.all_gather_start(x[:0], "dp", (0, 1))),
        ]
        if not dtype.is_complex:
            out[str(dtype)].append(rt.wait(rt.all_reduce_start(x, "dp", "max")))
    torch.save(out, folder / f"{rt.rank}.pt")


def rows(folder: Path) -> None:
    """Rows to their owners and back."""
    rt = DistributedRuntime(Mesh((("ep", dist.get_world_size()),)))
    with guarded(rt):
        torch.save(there_and_back(rt, "ep"), folder / f"{rt.rank}.pt")


def agreement(folder: Path) -> None:
    rank = dist.get_rank()
    text = agree.broadcast_text("the text\nof rank 0" if rank == 0 else "another")
    assert text == "the text\nof rank 0", text
    assert agree.agree_on_text(text) == agree.digest(text)
    agree.agree_on_values([("batch", [8, 16])])
    said = []
    for call in (
        lambda: agree.agree_on_text("same\nline two" + (" differs" if rank else "")),
        lambda: agree.agree_on_values([("seq", 8), ("batch", 4 + rank)]),
    ):
        try:
            call()
        except AgreementError as error:
            said.append(str(error))
    torch.save(said, folder / f"{rank}.pt")


def trouble(folder: Path, kind: str) -> None:
    """The last rank raises, dies or stays away in the middle of a run."""
    p = parse(MLP)
    rt = DistributedRuntime(p.mesh, timeout=4.0)
    full = random_inputs(p)
    p = lowered(MLP)
    state = new_state(p, full, rt.rank)
    executable = Executable(sources(p)[rt.rank])
    with guarded(rt):
        executable(rt, state.inputs(p, full))
        if rt.rank == (0 if kind.endswith("0") else 3):
            if kind.startswith("die"):
                os._exit(7)
            if kind == "sleep":
                time.sleep(10)
            raise ValueError("the batch has a hole")
        executable(rt, state.inputs(p, full))
    print("not reached", flush=True)


def slow(folder: Path) -> None:
    """A rank that is late by more than one look, but not by the timeout, is waited for."""
    rt = DistributedRuntime(Mesh((("dp", dist.get_world_size()),)), timeout=30.0)
    if rt.rank:
        time.sleep(3.5)
    total = rt.wait(rt.all_reduce_start(torch.ones(3), "dp"))
    torch.save(total, folder / f"{rt.rank}.pt")


def main(mode: str, folder: Path) -> None:
    torch.set_num_threads(1)
    start("gloo", timeout=60.0)
    if mode.startswith("trouble."):
        trouble(folder, mode.partition(".")[2])
    elif mode.startswith("pipeline."):
        pipeline.trouble(mode.partition(".")[2])
    else:
        {"reshards": reshards, "step": step, "dtypes": dtypes, "agreement": agreement, "slow": slow, "rows": rows, "messages": pipeline.messages}[mode](folder)
    stop()


def child(mode: str, folder: str, environment: dict[str, str]) -> None:
    """A process forked from one that has torch loaded: ``main`` with its output in files."""
    os.environ.update(environment)
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{environment['RANK']}.{name}", os.O_CREAT | os.O_WRONLY), descriptor)
    main(mode, Path(folder))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
