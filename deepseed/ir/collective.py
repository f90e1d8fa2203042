"""What one step of a reshard does: read from the layouts before and after, which differ on one axis.

| before -> after      | step           | sends |
|---|---|---|
| split -> replicate   | all_gather     | yes |
| sum, max -> replicate| all_reduce     | yes |
| sum, max -> split    | reduce_scatter | yes |
| split -> split elsewhere | all_to_all | yes |
| split rows -> owned  | dispatch       | yes |
| owned -> split rows  | combine        | yes |
| replicate -> split   | shard          | no  |
| replicate -> sum     | summand        | no  |
| own -> sum           | share          | no  |
| over ``mb``, in time: sum, max -> replicate | accumulate | no  |
| over ``mb``, in time: split -> replicate    | collect    | no  |

A local tensor is cut into the axis's n blocks at ``take`` and joined from them at ``put``; a ``Place(dim, outer)`` sees
local dimension ``dim`` as (outer, n, rest) and the blocks are its n slices. Where n does not divide it the place says so, ``of`` > 0:
the dimension is (outer, of, rest), cut as ``torch.chunk`` cuts ``of``; the back ends pad each part to the largest while it travels.

``share`` is no reshard but an op of the program: what each rank along the axis computed of its own rows, divided by their number, so that the sum is
the mean (``deepseed.own_rows``). Of a value that is the same on all of them that is the value itself.

``dispatch`` and ``combine`` have a second operand, the ids that own the rows, whole on the axis: each row travels once, from the rank
that has it in the split to the one that owns it, and back. Without the ids, owned rows are a sum like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from deepseed.ir.layout import Layout, LayoutError, Partial, Split, check, factors, part, routes
from deepseed.ir.mesh import TIME, Mesh
from deepseed.ir.subaxes import joint

KEYED = ("dispatch", "combine")
COLLECTIVES = ("all_gather", "all_reduce", "reduce_scatter", "all_to_all", *KEYED)
LOCAL = ("shard", "summand", "share")
TO_HOST, TO_DEVICE = "to_host.start", "to_device.start"  # between the two memories of a rank; ``wait`` gives what arrived
MEMORIES = (TO_HOST, TO_DEVICE)
IN_TIME = ("accumulate", "collect")  # over microbatches: add up as they come; keep each, for the user


@dataclass(frozen=True)
class Place:
    dim: int
    outer: int
    of: int = 0  # the factor that is cut unevenly; 0: an even cut
    rest: int = 1  # local size of what lies behind ``of``

    @property
    def numbers(self) -> tuple[int, int] | tuple[int, int, int, int]:
        """As the runtime's calls take it: (dim, outer), uneven (dim, outer, of, rest)."""
        return (self.dim, self.outer, self.of, self.rest) if self.of else (self.dim, self.outer)


@dataclass(frozen=True)
class Step:
    kind: str
    axis: str
    take: Place | None = None  # where the operand is cut into n blocks
    put: Place | None = None  # where n blocks are joined to the result
    reduce: str = "sum"  # of all_reduce and reduce_scatter
    of: int = 0  # of dispatch and combine: how many ids the ranks share


@lru_cache(maxsize=65536)
def step(shape: tuple[int, ...], before: Layout, after: Layout, axis: str, mesh: Mesh, keyed: bool = False) -> Step:
    """The step that turns ``before`` into ``after``; raises LayoutError where one step over ``axis`` cannot. ``keyed``: the ids that own
    the rows are at hand."""
    if axis not in mesh.sizes:  # all sub-axes of it
        joined, wanted = joint(before, axis, mesh), joint(after, axis, mesh)
        if joined is None or wanted is None:
            raise LayoutError(f"no one step over {axis} = {', '.join(mesh.parts(axis))}: its sub-axes do not split side by side")
        return step(shape, joined, wanted, axis, mesh.together(axis))
    here, there = before.on(axis), after.on(axis)
    if before.with_(axis, None) != after.with_(axis, None):
        raise LayoutError(f"a step over {axis} changes another axis: {before.elements} -> {after.elements}")
    if axis == TIME and there is None and isinstance(here, Partial):
        return Step("accumulate", axis, reduce=here.op)
    if axis == TIME and there is None and isinstance(here, Split):
        return Step("collect", axis, put=_place(shape, before, here, axis, mesh))
    if axis == TIME and here is not None:
        raise LayoutError(f"no step over {axis} goes from {here} to {there}: microbatches run one after another")
    own = routes(here, there) if keyed else None
    if own is not None and isinstance(there, Split):
        return Step("combine", axis, take=_place(shape, after, there, axis, mesh), of=own.of)
    if own is not None and isinstance(here, Split):
        return Step("dispatch", axis, put=_place(shape, before, here, axis, mesh), of=own.of)
    if isinstance(here, Split) and there is None:
        return Step("all_gather", axis, put=_place(shape, before, here, axis, mesh))
    if isinstance(here, Partial) and there is None:
        return Step("all_reduce", axis, reduce=here.op)
    if isinstance(here, Partial) and isinstance(there, Split):
        return Step("reduce_scatter", axis, take=_place(shape, after, there, axis, mesh), reduce=here.op)
    if here is None and isinstance(there, Split):
        return Step("shard", axis, take=_place(shape, after, there, axis, mesh))
    if here is None and there == Partial("sum"):
        return Step("summand", axis)
    if isinstance(here, Split) and isinstance(there, Split) and here != there:
        twin = f"{axis}_after"  # both splits side by side: blocks of equal size exist only where that is a layout
        n = mesh.size(axis)
        both, wider = before.with_(twin, there), Mesh((*mesh.axes, (twin, n)), (*mesh.at, (twin, dict(mesh.at)[axis])) if mesh.at else ())
        check(shape, both, wider)
        if here.dim == there.dim and (here.of or there.of):
            raise LayoutError(f"a step over {axis} cannot move an uneven split inside dimension {here.dim} of {list(shape)}")
        return Step("all_to_all", axis, take=_place(shape, both, there, twin, wider), put=_place(shape, both, here, axis, wider))
    raise LayoutError(f"no step over {axis} goes from {here} to {there}")


def sent(s: Step, shape: Sequence[int], n: int) -> tuple[int, ...]:
    """What a rank brings of a local operand of ``shape``: where parts are uneven, padded to blocks of the largest."""
    out = list(shape)
    if s.put is not None and s.put.of:
        out[s.put.dim] = s.put.outer * -(-s.put.of // n) * s.put.rest
    if s.take is not None and s.take.of:
        out[s.take.dim] = s.take.outer * n * -(-s.take.of // n) * s.take.rest
    return tuple(out)


def arrives(s: Step, shape: Sequence[int], n: int) -> int:
    """Elements that the exchange gives a rank, padding included."""
    mine = prod(sent(s, shape, n))
    return mine * n if s.kind == "all_gather" else mine // n if s.kind == "reduce_scatter" else mine


def _place(shape: Sequence[int], layout: Layout, split: Split, axis: str, mesh: Mesh) -> Place:
    """Where ``axis`` cuts the local tensor of a layout in which all other axes are taken already."""
    parts = factors(shape[split.dim], split.dim, layout, mesh)
    at = next(i for i, (_, name) in enumerate(parts) if name == axis)
    outer, rest = (prod(part(n, name, mesh) for n, name in some) for some in (parts[:at], parts[at + 1 :]))
    return Place(split.dim, outer, split.of, rest) if split.of else Place(split.dim, outer)
