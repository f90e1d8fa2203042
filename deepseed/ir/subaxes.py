"""Sub-axes of one mesh axis seen as the one axis that they are.

Where a value treats all sub-axes of an axis alike, it is laid out on the axis itself: ``12@(tp_0,tp_1)`` on ``tp_0=2, tp_1=2`` is
``12@tp`` on ``tp=4``, ``sum@tp_0 sum@tp_1`` is ``sum@tp``. A collective over all of them is then one, over a larger group.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from deepseed.ir.layout import Layout, Split
from deepseed.ir.mesh import Mesh, whole_axis


def joint(layout: Layout, axis: str, mesh: Mesh) -> Layout | None:
    """``layout`` on ``mesh.together(axis)``: the sub-axes of ``axis`` split side by side in their order, or do all the same; else None."""
    parts = mesh.parts(axis)
    elements = [layout.on(part) for part in parts]
    first = elements[0]
    for part, (one, after) in zip(parts, pairwise(elements), strict=False):
        if isinstance(one, Split):
            if after != Split(one.dim, one.outer * mesh.size(part)):
                return None
        elif after != one:
            return None
    for part in parts:
        layout = layout.with_(part, None)
    return layout.with_(axis, first)


def on_axes_of(coordinate: Mapping[str, int], mesh: Mesh) -> dict[str, int]:
    """A coordinate on the axes of ``mesh``, which may be sub-axes of those that it names."""
    out: dict[str, int] = {}
    rest: dict[str, int] = {}
    for name, n in reversed(mesh.axes):
        if name in coordinate:
            out[name] = coordinate[name]
        else:
            axis = whole_axis(name)
            rest[axis], out[name] = divmod(rest.get(axis, coordinate[axis]), n)
    return {name: out[name] for name in mesh.names}
