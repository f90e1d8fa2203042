"""What a bound graph need not do: casts to the dtype that is there, and a copy of an expert's matrix for each row.

Captured with static numbers of experts a row, a model with experts gathers ``w[ids]``, [rows, k, n], and multiplies row by row. Rows are sorted by id instead
and each matrix meets its rows in one product (``deepseed.ops.routed_mm``), as ``canonicalize`` has it in a program.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from deepseed.ops import routed_mm

_aten = torch.ops.aten


def simplify(graph: fx.Graph) -> None:
    """Nodes have fake values in ``meta["val"]``, as export leaves them."""
    for node in list(graph.nodes):
        if node.target is _aten.to.dtype and _dtype(node.args[0]) is node.args[1] and len(node.args) == 2 and not node.kwargs:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is _aten.bmm.default and (found := _routed(node)) is not None:
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.call_function(routed, found))
            graph.erase_node(node)


def routed(x: Tensor, w: Tensor, ids: Tensor, dim: int) -> Tensor:
    """[t, 1, n] (``dim`` 1) of w [e, k, n], or [t, n, 1] (``dim`` 2) of w [e, n, k]: row t of x [t, k] and matrix ``ids[t]``."""
    return routed_mm(x, w if dim == 1 else w.transpose(1, 2), ids).unsqueeze(dim)


def _routed(node: fx.Node) -> tuple[Any, ...] | None:
    """The arguments of ``routed`` that a batched product of gathered matrices and single rows means."""
    for w, x, dim in ((node.args[1], node.args[0], 1), (node.args[0], node.args[1], 2)):
        if not isinstance(w, fx.Node) or not isinstance(x, fx.Node) or w.target is not _aten.index.Tensor or x.target is not _aten.unsqueeze.default:
            continue
        table, ids = w.args
        (row, at) = x.args
        if isinstance(ids, list | tuple) and len(ids) == 1 and _rank(ids[0]) == 1 and _rank(table) == 3 and _rank(row) == 2 and at % 3 == dim and _dtype(ids[0]) is torch.int64:  # type: ignore[operator]
            return row, table, ids[0], dim
    return None


def _rank(node: Any) -> int:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.dim() if isinstance(value, Tensor) else -1


def _dtype(node: Any) -> torch.dtype | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.dtype if isinstance(value, Tensor) else None
