"""A traced update that is pointwise says the same of a parameter of another shape: its graph again, with that shape in the place of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from deepseed.capture.convert import reachable
from deepseed.capture.functional import Flat

_aten = torch.ops.aten
_SAME = (_aten._to_copy.default, _aten.copy.default)  # pointwise, and not marked so
Shape = tuple[int, ...]


def pointwise(flat: Flat, shape: Shape) -> bool:
    """Whether each value of the graph has ``shape`` or is a number, and each op computes an element from the elements at its place."""
    for n in reachable(flat.outputs):
        val = n.meta.get("val")
        if not isinstance(val, Tensor) or tuple(val.shape) not in (shape, ()):
            return False
        if n.op == "placeholder":
            continue
        if not isinstance(n.target, OpOverload) or not (torch.Tag.pointwise in n.target.tags or n.target in _SAME):  # none of these takes a list of sizes
            return False
    return True


def reshaped(flat: Flat, shape: Shape, to: Shape) -> Flat:
    """The same for a parameter of shape ``to``; ``flat``: pointwise."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    needed = reachable(flat.outputs)
    for n in flat.graph.nodes:
        if n in needed or n.op == "placeholder":
            copies[n] = made = graph.node_copy(n, lambda each: copies[each])
            val: Any = n.meta.get("val")
            if isinstance(val, Tensor) and tuple(val.shape) == shape:
                made.meta["val"] = torch.empty(to, dtype=val.dtype, device="meta")
    return Flat(graph, flat.constants, tuple(copies[o] if isinstance(o, fx.Node) else o for o in flat.outputs))
