"""One rank of a training run that counts what it really uses.

Shares nothing with deepseed.cost or deepseed.explain's counting: bytes are those of storages that the garbage collector and a
dispatch mode see, and of the tensors that torch.distributed's collectives and the groups of two ranks are given; flops are
torch.utils.flop_counter's.
"""

from __future__ import annotations

import gc
import json
import os
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.distributed_c10d import ProcessGroupGloo
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import deepseed
from deepseed.ir.mesh import STAGES, Mesh
from deepseed.target import load

_aten = torch.ops.aten


class Sent:
    """Counts bytes by the ring formulas from the tensors that each collective is given, per group of ranks; and those of messages to other
    pipeline ranks, which go out of rank 0 of a group of sender and receiver."""

    def __init__(self) -> None:
        os.environ["DEEPSEED_CMA"] = "0"  # what a rank reads from the memory of another is given to no collective
        self.bytes: Counter[tuple[int, ...]] = Counter()
        self.counts: Counter[str] = Counter()
        self.on = False
        for name, position, share in (
            ("all_gather_into_tensor", 1, lambda n: n - 1),
            ("all_gather_single", 1, lambda n: n - 1),
            ("all_reduce", 0, lambda n: 2 * (n - 1) / n),
            ("reduce_scatter_tensor", 1, lambda n: (n - 1) / n),
            ("reduce_scatter_single", 1, lambda n: (n - 1) / n),
            ("all_to_all_single", 1, lambda n: (n - 1) / n),
        ):
            if hasattr(dist, name):  # torch 2.13 renamed two of them
                setattr(dist, name, self._counting(name, getattr(dist, name), position, share))
        self.messages = self.message_bytes = 0
        broadcast: Any = ProcessGroupGloo.broadcast

        def sent(group: Any, xs: list[Tensor], options: Any) -> Any:
            if self.on and group.size() == 2 and group.rank() == 0:
                self.messages += 1
                self.message_bytes += sum(x.numel() * x.itemsize for x in xs)
            return broadcast(group, xs, options)

        setattr(ProcessGroupGloo, "broadcast", sent)  # noqa: B010

    def by_axis(self, mesh: Mesh, rank: int) -> dict[str, int]:
        """Bytes that this rank has sent over each axis of the ranks' mesh."""
        return {axis: self.message_bytes if axis == STAGES else self.bytes[mesh.group(axis, rank)] for axis in mesh.names}

    def _counting(self, name: str, call: Callable[..., Any], position: int, share: Callable[[int], float]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if self.on:
                group = kwargs.get("group") or next((a for a in args if isinstance(a, dist.ProcessGroup)), None)
                ranks = tuple(dist.get_process_group_ranks(group))
                given: Tensor = args[position]
                self.bytes[ranks] += int(given.numel() * given.itemsize * share(len(ranks)))
                self.counts[name] += 1
            return call(*args, **kwargs)

        return counted


class AtTheClip(TorchDispatchMode):
    """Bytes of the floating tensors made in this step that are alive when the global norm is taken: a square root of one number."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[weakref.ref[Tensor]] = []
        self.bytes: int | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _aten.sqrt.default and args[0].dim() == 0 and self.bytes is None:
            time.sleep(0.1)  # a thread of gloo may still hold the buffer of a collective that is over
            alive = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for ref in self.made if (t := ref()) is not None}
            self.bytes = sum(alive.values())
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.is_floating_point() and t.dim() and t.untyped_storage().data_ptr() not in given:
                self.made.append(weakref.ref(t))
        return out


class Peak(TorchDispatchMode):
    """The most bytes of storages made in this step that are alive at once, beside ``before``."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage._cdata)
        self.peak = max(self.peak, self.now)
        return out

    def _freed(self, storage: int) -> None:
        self.now -= self.alive.pop(storage, 0)


def here(t: Tensor) -> Tensor:
    """This rank's part."""
    return t.to_local() if isinstance(t, DTensor) else t.data


def storages() -> dict[int, int]:
    """Storages of all tensors that the garbage collector knows, DTensors by their local part."""
    found = [t for t in gc.get_objects() if isinstance(t, Tensor) and not isinstance(t, DTensor | FakeTensor)]  # a fake has no memory
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found if t.device.type == "cpu" and t.untyped_storage().nbytes()}


def flop_counter() -> FlopCounterMode:
    """torch's counter, told that its attention formulas hold for the CPU's kernels too, and that a product may be added in place."""
    forward = lambda q, k, v, *a, out_shape=None, **kw: sdpa_flop_count(q, k, v)  # noqa: E731
    backward = lambda g, q, k, v, *a, out_shape=None, **kw: sdpa_backward_flop_count(g, q, k, v)  # noqa: E731
    mapping = {
        _aten._scaled_dot_product_flash_attention_for_cpu: forward,
        _aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
        _aten.addmm_: lambda c, a, b, out_shape=None, **kw: 2 * a[0] * a[1] * b[1],
    }
    return FlopCounterMode(display=False, custom_mapping=mapping)


def main(target: str, plan: str) -> str:
    """What this rank counted, as JSON."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    sent = Sent()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = load(target)
    with flop_counter() as whole:
        found.model(**found.batch).loss.backward()
    found.model.zero_grad(set_to_none=True)
    step = deepseed.compile(found.model, plan, optimizer=torch.optim.AdamW(found.model.parameters()), clip_grad_norm=1.0)
    step(found.batch)
    gc.collect()
    param_storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in map(here, found.model.parameters())}
    batch = {here(t).untyped_storage().data_ptr() for t in (*found.batch.values(), *found.model.buffers())}
    rest = {ptr: n for ptr, n in storages().items() if ptr not in param_storages and ptr not in batch}
    counter = flop_counter()
    with counter:
        step(found.batch)  # the counter's hooks on modules are news to the step, which captures again
        captured = counter.get_total_flops()
        step(found.batch)
    sent.on = True
    with AtTheClip() as clip:
        step(found.batch)
    sent.on = False
    with Peak() as peak:
        step(found.batch)
    explained = step.explain().to_json() if rank == 0 else None
    result = {
        "params": sum(param_storages.values()), "rest": sum(rest.values()), "grads": clip.bytes, "peak": peak.peak,
        "sent": sent.by_axis(step.mesh, rank), "messages": sent.messages, "calls": dict(sent.counts),
        "flops": counter.get_total_flops() - captured, "whole_flops": whole.get_total_flops(), "explain": explained,
    }  # fmt: skip
    dist.barrier()
    dist.destroy_process_group()
    return json.dumps(result)
