"""A captured forward that runs: the paged op bound to this device's attention, parameters to their tensors, caches made.

``logits = executable.run(step)`` computes a packed step. The graph runs as generated straight-line Python that lets go of each value after its last use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from deepseed.inference.attention import attend
from deepseed.inference.capture import INPUTS, CapturedForward
from deepseed.inference.packing import Plain, pack
from deepseed.inference.scheduler import Step
from deepseed.inference.simplify import simplify

T = TypeVar("T")
_KEPT = ("ids", "positions", "last")  # what the bound graph still takes, the packing beside


class Executable:
    """On one rank. ``blocks`` pages of ``size`` tokens in each layer's cache."""

    leads = True  # whether requests come here

    def __init__(self, captured: CapturedForward, state: Mapping[str, Tensor], blocks: int, size: int, dtype: torch.dtype, device: torch.device, own: bool = False) -> None:
        """``own``: nobody else reads the values of ``state``, which may lie in memory as they are used."""
        self.size, self.device = size, device
        self.caches = [
            (torch.zeros(la.heads, blocks, size, la.width, dtype=dtype, device=device), torch.zeros(la.heads, blocks, size, la.value_width, dtype=dtype, device=device))
            for la in captured.layers
        ]
        self.module = bound(captured)
        if own and device.type == "cpu":
            for name in multiplied(captured):
                state[name].data = state[name].data.t().contiguous().t()
        self._state: list[Any] = [state[n] if n in state else captured.constants[n].to(device) for n in captured.names]
        self._state += [x for pair in self.caches for x in pair]

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for pair in self.caches for x in pair)

    @torch.inference_mode()
    def run(self, step: Step) -> Tensor:
        """Logits [wanted pieces, vocabulary]; the caches then hold the step's tokens."""
        plain = Plain.of(step, self.size)
        plain.copy([x for pair in self.caches for x in pair], self.device)
        made = pack(plain, self.size, self.device)
        logits: Tensor = self.module(*self._state, made.ids, made.positions, made.last, made.packing)
        return logits


    def together(self) -> AbstractContextManager[None]:
        """Around what all ranks do: where one fails the others are told."""
        return nullcontext()

    def follow(self) -> None:
        """Run the steps of the rank that leads until it ``release``s the others."""

    def beat(self) -> None:
        """Nothing to compute for now: ranks that wait for a step go on waiting."""

    def release(self) -> None:
        """No more steps for now."""

    def everyone(self, value: T) -> T:
        """What the rank that leads has, on every rank."""
        return value


def multiplied(captured: CapturedForward) -> list[str]:
    """Matrices that are read by products alone. Few rows times a matrix that lies by columns take a sixth less time on a CPU, be it one row or 32."""
    linear = torch.ops.aten.linear.default
    inputs = [n for n in captured.graph.graph.nodes if n.op == "placeholder"]
    return [
        name for name, node in zip(captured.names, inputs, strict=False)
        if node.users and name not in captured.constants and all(user.target is linear and user.args[1] is node and user.args[0] is not node for user in node.users)
    ]  # fmt: skip


def bound(captured: CapturedForward) -> torch.fx.GraphModule:
    """Takes state, keys and values of each layer, then ids, positions, last and a Packing. What shapes asserted while tracing goes."""
    graph = torch.fx.Graph()
    old = list(captured.graph.graph.nodes)
    inputs = [n for n in old if n.op == "placeholder"]
    first = len(captured.names)
    steps = dict(zip(INPUTS, inputs[first : first + len(INPUTS)], strict=True))
    made: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in (*inputs[:first], *inputs[first + len(INPUTS) :], *(steps[n] for n in _KEPT)):
        made[node] = graph.placeholder(node.name)
        made[node].meta = node.meta
    packing = graph.placeholder("packing")
    for node in old:
        if node.op == "placeholder":
            continue
        if node.op == "output":
            graph.output(torch.fx.node.map_arg(node.args[0][0], made.__getitem__))
        elif node.target is torch.ops.deepseed.paged_attention.default:
            args: Sequence[Any] = node.args
            made[node] = graph.call_function(attend, torch.fx.node.map_arg((*args[:5], "packing", *args[9:]), made.__getitem__))
            made[node].args = (*made[node].args[:5], packing, *made[node].args[6:])
        else:
            made[node] = graph.node_copy(node, made.__getitem__)
    simplify(graph)
    graph.eliminate_dead_code(_impure)
    return torch.fx.GraphModule(torch.nn.Module(), graph)


def _impure(node: torch.fx.Node) -> bool:
    """What stays though nothing reads it: placeholders, the result, and what writes."""
    if node.op in ("placeholder", "output") or node.target is attend:
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable
