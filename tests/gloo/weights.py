"""One rank of the tests of weights in safetensors files, and what it reads and holds meanwhile."""

from __future__ import annotations

import os
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import deepseed
from deepseed.api import TrainStep
from deepseed.pieces import Piece
from deepseed.runtime import channels
from deepseed.weights import Weights
from gloo.checkpoint import Tagger, batches, made, packed, trained
from gloo.tried import Tried

REPEATED = 5  # times that a rank saves, the least it holds counts: a thread of gloo may hold a message that is over


def empty(width: int = 16) -> nn.Module:
    with deepseed.meta():
        return Tagger(width)


def filed(folder: Path, dtype: torch.dtype = torch.float64, width: int = 16) -> dict[str, Tensor]:
    """A Tagger's values in a file that the safetensors library writes, and by name."""
    torch.manual_seed(7)
    values = {name: t.to(dtype) if t.is_floating_point() else t for name, t in Tagger(width).state_dict().items()}
    folder.mkdir(exist_ok=True)
    save_file({name: t for name, t in values.items() if name != "head.weight"}, folder / "model.safetensors", {"format": "pt"})
    return values


@contextmanager
def read_by_rank() -> Iterator[Counter[int]]:
    """Bytes that are read of files, by rank."""
    counted: Counter[int] = Counter()
    now: list[int] = []
    fill, part = Weights._fill, Piece.part

    def filling(self: Weights, state: Any, *args: Any) -> None:
        now[:] = [state.mesh.rank(state.coordinate)]
        fill(self, state, *args)

    def reading(self: Piece, file: Tensor, box: Any) -> Tensor:
        got = part(self, file, box)
        counted[now[0]] += got.nbytes
        return got

    Weights._fill, Piece.part = filling, reading  # type: ignore[method-assign]
    try:
        yield counted
    finally:
        Weights._fill, Piece.part = fill, part  # type: ignore[method-assign]


class Living(TorchDispatchMode):
    """The most bytes that tensors made here had at once; a mapped file has none."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = self.peak = 0
        self._users: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.from_file.default:
            self._users[out.untyped_storage().data_ptr()] += 1 << 30  # never counted
            return out
        for t in out if isinstance(out, tuple | list) else [out]:
            if type(t) is Tensor and t.device.type == "cpu":
                where, size = t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()
                if not self._users[where] and any(t.untyped_storage().data_ptr() == a.untyped_storage().data_ptr() for a in args if type(a) is Tensor):
                    continue  # a view of what was there before
                if not self._users[where]:
                    self.alive += size
                    self.peak = max(self.peak, self.alive)
                self._users[where] += 1
                weakref.finalize(t, self._gone, where, size)
        return out

    def _gone(self, where: int, size: int) -> None:
        self._users[where] -= 1
        if not self._users[where]:
            self.alive -= size


def watched(step: TrainStep, batch: Any) -> int:
    """Compile; the most bytes that were held at once while state was made and filled."""
    living, adopt = Living(), step._adopt

    def adopting(built: Any) -> None:
        with living:
            adopt(built)

    step._adopt = adopting  # type: ignore[method-assign]
    step.compile(batch)
    del step._adopt  # type: ignore[method-assign]
    return living.peak


# ranks ------------------------------------------------------------------------------------------------------------------


def begins(plan: str, source: str, target: str, width: int) -> dict[str, Any]:
    """From files to a trained model in files, on the meta device at first; what this rank read and held."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    step, data = made(plan, backend="gloo", model=empty(width), weights=source, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.1)), batches()
    whole = sum(p.nbytes for p in step.model.parameters())
    with read_by_rank() as counted:
        held = watched(step, data[0])
    out: dict[str, Any] = {"whole": whole, "read": sum(counted.values()), "held": held, "begun": packed(step.state_dict())}
    out["losses"], values = trained(step, data[:2])
    sent, hand = [0], channels.hand

    def handing(world: Any, x: Any, shape: Any, dtype: torch.dtype, source: int, to: int) -> Any:
        sent[0] += x.nbytes if x is not None and source != to else 0
        return hand(world, x, shape, dtype, source, to)

    peaks: list[int] = []
    for _ in range(REPEATED):
        sent[0] = 0
        with Living() as living, pytest.MonkeyPatch.context() as patch:
            patch.setattr(channels, "hand", handing)
            step.save_pretrained(target, max_shard_size=whole // 3)
        peaks.append(living.peak)
    out["sent"], out["held by saving"] = sent[0], min(peaks)
    out["values"] = packed(values)
    step.save(f"{target}.checkpoint")
    again = made(plan, backend="gloo", model=empty(width), optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    again.load(f"{target}.checkpoint")
    held = watched(again, data[0])
    out["resumed"], out["held by resuming"] = packed(again.state_dict()), held
    out["on"] = [float(each(data[2])) for each in (step, again)]
    return out


def troubles(folder: str) -> dict[str, Any]:
    """What goes wrong on one rank of two: every rank says it, none hangs, and training goes on."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rank, data = int(os.environ["RANK"]), batches()
    out = tried = Tried()

    def compiled(path: str) -> TrainStep:
        return made("zero3", backend="gloo", model=empty(), weights=path)

    step = compiled(folder)
    tried("torn", lambda: compiled(f"{folder}-torn"))
    tried("missing", lambda: compiled(f"{folder}-none"))
    tried("other folders", lambda: compiled(folder if rank else f"{folder}-torn"))
    part = Piece.part
    if rank == 1:
        def gone(*_: Any) -> Any:
            raise OSError(5, "Input/output error")

        Piece.part = gone  # type: ignore[method-assign]
    tried("unreadable", lambda: step(data[0]))
    Piece.part = part  # type: ignore[method-assign]
    out["goes on"] = [float(step(batch)) for batch in data[:2]]
    target = f"{folder}-saved"
    step.save_pretrained(target)
    fallocate = os.posix_fallocate
    if rank == 1:
        def full(*_: Any) -> Any:
            raise OSError(28, "No space left on device")

        os.posix_fallocate = full  # type: ignore[assignment]
    tried("disk full", lambda: step.save_pretrained(target, max_shard_size=1000))
    os.posix_fallocate = fallocate
    tried("other shards", lambda: step.save_pretrained(target, max_shard_size=1000 + rank))
    out["still"] = sorted(os.listdir(target))
    out["and on"] = float(step(data[2]))
    return out
