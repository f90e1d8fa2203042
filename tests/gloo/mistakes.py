"""One rank of the tests of what users do wrong: the message that each mistake is answered with, and ranks that die."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from pipeline_models import Plain, squares
from torch import Tensor, nn

import deepseed
from deepseed.runtime.distributed import DistributedRuntime


class Mlp(nn.Module):
    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, hidden), nn.Linear(hidden, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Branching(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        if h.sum() > 0:  # the line that is named
            h = h * 2
        return h


def mse(model: Any, batch: Any) -> Tensor:
    return (model(batch["x"]) - batch["y"]).square().mean()


def batch(seed: int = 0, rows: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(rows, 8, generator=generator), "y": torch.randn(rows, 4, generator=generator)}


def made(plan: str, model: nn.Module | None = None, optimizer: Any = torch.optim.AdamW, **options: Any) -> Any:
    torch.manual_seed(0)
    model = Mlp() if model is None else model
    return deepseed.compile(model, plan, optimizer=optimizer(model.parameters()), loss_fn=mse, **options)


def rank() -> int:
    return int(os.environ["RANK"])


# one start of processes for all that ranks survive -----------------------------------------------------------------------


def other_keys() -> None:
    step = made("zero1")
    step(batch())
    step({**batch(1), "z": torch.ones(8)} if rank() else batch(1))


def other_shapes() -> None:
    step = made("zero1")
    step(batch())
    step(batch(1, rows=8 + 2 * rank()))


def other_option(option: str, values: tuple[float, float], local: bool = False) -> None:
    """An option that goes apart after the first step."""
    step = made("zero1", batch="local" if local else "global")
    step(batch(rank() if local else 0))
    step.optimizer.param_groups[0][option] = values[rank()]
    step(batch(rank() if local else 1))


MISTAKES: dict[str, Callable[[], Any]] = {
    "plans": lambda: made("tp2" if rank() else "zero1"),
    "a plan that one cannot read": lambda: made("zer1" if rank() else "zero1"),
    "unknown word": lambda: made("zero33"),
    "world size": lambda: made("tp3"),
    "more ranks than started": lambda: made("zero1", world_size=4),
    "models": lambda: made("zero1", Mlp(16 + 16 * rank()))(batch()),
    "optimizers": lambda: made("zero1", optimizer=torch.optim.SGD if rank() else torch.optim.AdamW),
    "options": lambda: made("zero1", clip_grad_norm=1.0 + rank()),
    "none can capture": lambda: made("zero1", Branching())(batch()),
    "keys": other_keys,
    "shapes": other_shapes,
    "local for global": lambda: made("zero1")(batch(rank(), rows=4)),
    "global for local": lambda: made("zero1", batch="local")(batch()),
    "none can place": lambda: made("sp2")(batch()),
    "modes": lambda: made("zero1", Mlp().train(not rank()))(batch()),
    "lr": lambda: other_option("lr", (1e-3, 2e-3)),
    "lr, local rows": lambda: other_option("lr", (1e-3, 2e-3), local=True),
    "decay": lambda: other_option("weight_decay", (0.01, 0.02)),
    "nothing": lambda: float(made("zero1")(batch())),
    "one cannot capture": lambda: made("zero1", Branching() if rank() else Mlp())(batch()),
    "after that": lambda: made("zero1")(batch()),
}


def messages() -> dict[str, tuple[str, str, float]]:
    """Per mistake: the error's class, its message, and the seconds that it took; before the last two, a step that nothing is wrong with."""
    torch.set_num_threads(1)
    out: dict[str, tuple[str, str, float]] = {}
    for name, mistake in MISTAKES.items():
        started = time.monotonic()
        try:
            value = mistake()
        except Exception as error:
            out[name] = (type(error).__name__, str(error), time.monotonic() - started)
        else:
            out[name] = ("", repr(value), time.monotonic() - started)
    return out


# ranks that end ----------------------------------------------------------------------------------------------------------


def ends(kind: str) -> None:
    """One rank ends in the middle of training: the last one by a signal, by an error of the user's own, or while others compile.
    ``PLAN@RANK die`` and ``PLAN@RANK raise``: that rank of a pipeline, in its third step, between two microbatches."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if "@" in kind:
        where, how = kind.split()
        return in_mid_pipeline(where.partition("@")[0], int(where.partition("@")[2]), how)
    last = rank() == int(os.environ["WORLD_SIZE"]) - 1
    step = made("zero1")
    if kind == "compile" and last:
        os._exit(7)
    for number in range(4):
        if number == 2 and last and kind == "die":
            os._exit(7)
        if number == 2 and last and kind == "raise":
            raise ValueError("shard 3 of the data is unreadable")
        step(batch(number, rows=12))
    print("not reached", flush=True)


def in_mid_pipeline(plan: str, who: int, how: str) -> None:
    torch.manual_seed(0)
    model = Plain(4)
    step = deepseed.compile(model, plan, optimizer=torch.optim.AdamW(model.parameters()), loss_fn=squares, clip_grad_norm=1.0)
    for number in range(4):
        if number == 2 and rank() == who:
            end_at_message(2, how)
        step((torch.randn(16, 12), torch.randn(16, 5)))
    print("not reached", flush=True)


def end_at_message(number: int, how: str) -> None:
    """This rank ends where it would send the ``number``-th message from now on."""
    post, sent = DistributedRuntime.post, itertools.count(1)

    def counted(self: DistributedRuntime, x: Tensor, to: int) -> None:
        if next(sent) == number:
            if how == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            raise MemoryError("a microbatch does not fit")
        post(self, x, to)

    setattr(DistributedRuntime, "post", counted)  # noqa: B010


def child(folder: str, environment: dict[str, str], kind: str) -> None:
    """A forked process: ``ends`` with its output in files, and an exit code as a script would have."""
    os.environ.update(environment)
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{environment['RANK']}.{name}", os.O_CREAT | os.O_WRONLY), descriptor)
    ends(kind)


if __name__ == "__main__":
    ends(sys.argv[1])
    dist.destroy_process_group()
