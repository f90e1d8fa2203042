"""What one rank sends and holds in each part of a user's loop: a microbatch that is not the last, and the update."""

from __future__ import annotations

import gc
import time

import torch
import torch.distributed as dist
from cost_worker import Sent
from torch import Tensor, nn

from gloo import engine as shared
from gloo.engine import begin, config

WIDTH, LAYERS = 128, 3
BYTES = 4 * WIDTH * WIDTH * LAYERS  # of the parameters, which is that of their gradients


def alive() -> int:
    """Bytes of the floating tensors that Python sees, the least of five looks: a thread of gloo lets go of a collective's tensors a moment after the wait."""
    return min(_seen() for _ in range(5))


def _seen() -> int:
    time.sleep(0.02)
    gc.collect()
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter) and t.is_floating_point()}
    return sum(found.values())


def counted(stage: int, sent: Sent) -> dict[str, float]:
    """In units of ``BYTES``; the steps before were a warm-up."""
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)]
    engine = begin(config(stage, 3, optimizer={"type": "SGD", "params": {"lr": 0.01, "momentum": 0.9}}), nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2]))
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(shared.RANK))
    found: dict[str, float] = {}

    def noted(name: str) -> None:
        found[name] = sum(sent.bytes.values()) / BYTES
        sent.bytes.clear()

    for step in range(2):
        sent.on = step == 1
        before = alive()
        for micro in range(3):
            engine.backward(engine(x).square().mean())
            noted(f"microbatch {micro}")
            if micro == 1:
                found["held"] = (alive() - before) / BYTES
                found["waits"] = sum(t.untyped_storage().nbytes() for t in engine.compiled._pending[0].values()) / BYTES
            engine.step()
        noted("update")
        found["after"] = (alive() - before) / BYTES
    sent.on = False
    return found


def on_ranks(stages: tuple[int, ...]) -> list[dict[str, float]]:
    shared.on_ranks([])
    sent = Sent()
    found = [counted(stage, sent) for stage in stages]
    dist.barrier()
    return found
