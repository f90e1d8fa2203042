"""A value that Python reads out of a tensor while tracing (``if mask.all():``) becomes a guard, not a baked constant.

The sub-graph that computes the value is cut out of the trace and run on the real example batch. The program is then right
for every batch on which that sub-graph gives the same value. Values that come from constants alone are folded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.utils._python_dispatch import _disable_current_modes

from deepseed.capture.errors import CaptureError
from deepseed.capture.metadata import Tracker, Where
from deepseed.ir.program import Program

_aten = torch.ops.aten


@dataclass(frozen=True)
class Guard:
    """``program`` (over batch and constant inputs, one output) must give ``value`` on every batch."""

    program: Program
    value: bool | int | float
    path: str
    line: str


@dataclass(frozen=True)
class Read:
    """A value that was read while tracing: the sub-graph of its tensor, the keys of its placeholders, and the value."""

    module: fx.GraphModule
    keys: tuple[str, ...]
    value: bool | int | float
    where: Where


class Reader:
    """Answers the reads of one trace. ``sources``: (role, key) of each placeholder; ``batch``: the example's real tensors."""

    def __init__(self, tracker: Tracker, sources: Sequence[tuple[str, str]], batch: Mapping[str, Tensor]) -> None:
        self.tracker, self.sources, self.batch = tracker, sources, batch
        self.reads: list[Read] = []

    def read(self, func: OpOverload, args: tuple[Any, ...]) -> Any:
        mode = get_proxy_mode()
        if mode is None or mode.tracer is None:
            raise CaptureError(f"{func} outside a trace")
        tensors = [a for a in args if isinstance(a, Tensor)]
        tracer: Any = mode.tracer
        slots: list[Any] = [get_proxy_slot(t, tracer, None) for t in tensors]
        where = self.tracker.here()
        if any(slot is None for slot in slots):  # a real tensor that the trace never saw: a constant
            if all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors):
                with _disable_current_modes():
                    return func(*args)
            raise CaptureError(f"{func} reads a tensor that is not part of the trace", path=where.path, line=where.line)
        nodes = [slot.proxy.node for slot in slots]
        needed = _closure(nodes, tracer.graph)
        names = {n: self.sources[i] for i, n in enumerate(n for n in tracer.graph.nodes if n.op == "placeholder")}
        used = [names[n] for n in needed if n.op == "placeholder"]
        random = next((n for n in needed if getattr(n.target, "namespace", "") == "deepseed"), None)
        bad = [f"{role} {key!r}" for role, key in used if role != "batch"]
        if bad or random is not None:
            cause = "random numbers" if random is not None else bad[0]
            raise CaptureError(
                f"Python reads the value of a tensor that depends on {cause}, so the program would differ from step to step",
                path=where.path, line=where.line, fix="use torch.where (or torch.clamp, multiplication by a mask) in place of the Python branch",
            )  # fmt: skip
        module, keys = _cut(nodes, needed, names, func, tracer.root)
        value = self._evaluate(module, keys, where)
        if keys:
            self.reads.append(Read(module, keys, value, where))
        return value

    def _evaluate(self, module: fx.GraphModule, keys: tuple[str, ...], where: Where) -> Any:
        for key in keys:
            t = self.batch[key]
            if t.is_meta or isinstance(t, FakeTensor):
                raise CaptureError(
                    f"Python reads a value computed from batch entry {key!r}, and the example batch holds no values there (meta or fake tensor)",
                    path=where.path, line=where.line, fix="capture with a real example batch",
                )  # fmt: skip
        with _disable_current_modes(), torch.no_grad():
            return module(*(self.batch[key].detach().cpu().clone() for key in keys)).item()


def read_value(func: OpOverload, read: Callable[[OpOverload, tuple[Any, ...]], Any], args: tuple[Any, ...]) -> Any:
    """``NotImplemented`` where ``func`` reads no value; else the value."""
    if torch.Tag.data_dependent_output not in func.tags:
        return NotImplemented
    if func in (_aten._local_scalar_dense.default, _aten.item.default):
        return read(func, args)
    if func is _aten.equal.default:
        return False if args[0].shape != args[1].shape else bool(read(func, args))
    raise CaptureError(f"{func} gives a Python value that depends on data", fix="compute it with torch ops that give tensors")


def _closure(targets: Sequence[fx.Node], graph: fx.Graph) -> list[fx.Node]:
    """The nodes that compute ``targets``, in order, with the in-place ops on any storage that they touch."""
    needed: set[fx.Node] = set()
    written: set[int] = set()
    todo = list(targets)
    order = list(graph.nodes)
    while todo:
        while todo:
            n = todo.pop()
            if n not in needed:
                needed.add(n)
                written.update(storages(n))
                todo += n.all_input_nodes
        todo = [n for n in order if n not in needed and _mutates(n) and written.intersection(storages(n.all_input_nodes[0]))]
    return [n for n in order if n in needed]


def _mutates(n: fx.Node) -> bool:
    return isinstance(n.target, OpOverload) and n.target._schema.is_mutable and bool(n.all_input_nodes)


def storages(n: fx.Node) -> list[int]:
    """The identities of the storages of a node's fake values: equal for views of one another."""
    value = n.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else [value]
    return [t.untyped_storage()._cdata for t in values if isinstance(t, Tensor) and t.layout is torch.strided]


def _cut(
    targets: Sequence[fx.Node], needed: Sequence[fx.Node], names: Mapping[fx.Node, tuple[str, str]], func: OpOverload, root: Any
) -> tuple[fx.GraphModule, tuple[str, ...]]:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    keys: list[str] = []
    for n in needed:
        copies[n] = graph.node_copy(n, lambda old: copies[old])
        if n.op == "placeholder":
            keys.append(names[n][1])
    result = copies[targets[0]]
    if func is _aten.equal.default:
        result = graph.call_function(_aten.all.default, (graph.call_function(_aten.eq.Tensor, (result, copies[targets[1]])),))
    graph.output(result)
    return fx.GraphModule(root, graph), tuple(keys)
