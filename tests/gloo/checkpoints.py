"""Ranks of the tests of series of checkpoints: some save in a tight loop until they are killed, some meet trouble."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import deepseed
from deepseed.api import TrainStep
from deepseed.background import Writing
from deepseed.checkpoint import Saving
from deepseed.runtime.distributed import world
from gloo.tried import Tried


def small(plan: str, seed: int = 0, **options: Any) -> TrainStep:
    """Dropout among it: what the next step does depends on the count of steps too."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.2), nn.Linear(6, 4)).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step = deepseed.compile(model, plan, optimizer=optimizer, loss_fn=lambda m, x: m(x).square().mean(), **options)
    assert isinstance(step, TrainStep)
    return step


def batch(number: int) -> Tensor:
    return torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(number))


def everything(step: TrainStep) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in {**step.state_dict(), **step.optimizer_state()}.items()}


# until they are killed --------------------------------------------------------------------------------------------------


def launches(folder: str, port: int, told: str, asynchronous: bool, lag: float) -> None:
    """A launcher: it keeps the store, starts two ranks, writes their numbers into the file ``told``, and kills what is left ``lag`` seconds after one has ended."""
    os.setsid()
    environment = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    ranks = []
    for rank in range(2):
        if (child := os.fork()) == 0:
            os.environ.update({**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            try:
                saves_for_ever(folder, told, asynchronous)
            finally:
                os._exit(1)
        ranks.append(child)
    store = dist.TCPStore("localhost", port, None, True, wait_for_workers=False)
    Path(f"{told}.part").write_text(" ".join(map(str, ranks)))
    os.rename(f"{told}.part", told)
    os.wait()
    time.sleep(lag)
    for child in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.wait()
    del store


def saves_for_ever(folder: str, told: str, asynchronous: bool) -> None:
    """From the latest checkpoint on: a step, a checkpoint, a step, a checkpoint."""
    torch.set_num_threads(1)
    os.fsync = lambda descriptor: None
    log = os.open(f"{told}.{os.environ['RANK']}.err", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 2)
    step = small("zero3", backend="gloo")
    checkpoints = deepseed.Checkpoints(step, folder, every=1, keep=2, asynchronous=asynchronous)
    checkpoints.load()
    while True:
        step(batch(step.steps))
        checkpoints.after_step(extra={"step": step.steps})


# in trouble -------------------------------------------------------------------------------------------------------------


def troubles(folder: str) -> dict[str, Any]:
    """What goes wrong on one rank of two, or in its thread: every rank says it in the same call, none hangs, and training goes on."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    step = small("zero3", backend="gloo")
    out = tried = Tried()
    for asynchronous in (False, True):
        mode = "asynchronous" if asynchronous else "synchronous"
        checkpoints = deepseed.Checkpoints(step, f"{folder}/{mode}", every=1, asynchronous=asynchronous)
        step(batch(step.steps))
        checkpoints.after_step()
        checkpoints.wait()
        kept, where = everything(step), checkpoints.path
        step(batch(step.steps))
        write = Saving.write
        if rank == 1:
            def full(_: Saving) -> Any:
                raise OSError(28, "No space left on device")

            Saving.write = full  # type: ignore[method-assign]
        if asynchronous:
            checkpoints.save()
            tried(mode, lambda: until_said(step, checkpoints))  # noqa: B023
        else:
            tried(mode, checkpoints.after_step)
        Saving.write = write  # type: ignore[method-assign]
        out[f"{mode}, left"] = sorted(os.listdir(checkpoints.dir)) == [".lock", "latest", where.name]
        before = everything(step)
        checkpoints.save()
        checkpoints.wait()
        checkpoints.load(where.name)
        out[f"{mode}, former"] = all(torch.equal(t, kept[n]) for n, t in everything(step).items())
        checkpoints.load()
        out[f"{mode}, goes on"] = all(torch.equal(t, before[n]) for n, t in everything(step).items())
    return out


def until_said(step: TrainStep, checkpoints: deepseed.Checkpoints) -> None:
    """Training goes on; one of the next calls raises."""
    every, checkpoints.every = checkpoints.every, None
    try:
        while True:
            step(batch(step.steps))
            checkpoints.after_step()
    finally:
        checkpoints.every = every


def ends_between_two_questions(folder: str) -> list[bool]:
    """Rank 1's thread ends right after it was asked whether it has, rank 0's after the second time; which calls of ``after_step`` found the checkpoint in its place."""
    torch.set_num_threads(1)
    step = small("zero3", backend="gloo")
    answers = iter([False] * (2 - int(os.environ["RANK"])))
    step(batch(0))
    world(timeout=20.0)
    checkpoints = deepseed.Checkpoints(step, folder, asynchronous=True)
    checkpoints.save()
    Writing.done = property(lambda _: next(answers, True))  # type: ignore[method-assign, assignment]
    found = []
    for number in (1, 2, 3):
        step(batch(number))
        checkpoints.after_step()
        found.append(checkpoints._writing is None)
    return found


class Position:
    """A data loader of the protocol of stateful ones, whose state differs from rank to rank."""

    def __init__(self) -> None:
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "shuffle": torch.Generator().manual_seed(self.at).get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert torch.equal(state["shuffle"], torch.Generator().manual_seed(state["at"]).get_state())
        self.at = state["at"]


def positions(folder: str, save: bool) -> Any:
    """Each rank's own loader and generators; what all have alike."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    step, alike = small("zero3", backend="gloo"), Position()
    own = Position()
    step(batch(0))
    checkpoints = deepseed.Checkpoints(step, folder, asynchronous=True, objects={"own": own, "alike": alike})
    if save:
        own.at, alike.at = 10 + rank, 5
        torch.manual_seed(rank)
        with checkpoints:
            checkpoints.save()
        return torch.rand(2).tolist()
    checkpoints.load()
    return own.at, alike.at, torch.rand(2).tolist()
