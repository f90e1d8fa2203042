"""Turn each reshard into the cheapest sequence of one-axis steps; collectives become start/wait pairs.

The cheapest path is found by Dijkstra over the few layouts between the two: on each axis that changes, the element
before, the element after, or whole. Local steps cost nothing, so shards come first, reductions before gathers.
Over all sub-axes of an axis (``tp_0, tp_1`` of ``tp``) one step is one collective where they lie side by side.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from functools import lru_cache

from deepseed.cost import sent_bytes
from deepseed.ir.collective import COLLECTIVES, KEYED, step
from deepseed.ir.contract import PassError, program_pass
from deepseed.ir.layout import Layout, LayoutError, Partial, Split, valid
from deepseed.ir.mesh import TIME, Mesh, whole_axis
from deepseed.ir.program import Builder, Op, Output, Program, Ref, Type


@program_pass(requires={"explicit"}, provides={"lowered"})
def lower_reshards(p: Program, zero: int = 0) -> Program:
    """Replace every ``reshard`` by collectives and local steps. ``zero``: from stage 2 on what is summed over microbatches is first
    reduced to the ranks' shards, in each; below, it is summed whole and reduced once.

    A collective starts where the reshard stood; its ``wait`` (and local steps after it) stand just before the first use. What
    only leaves the program is waited for when the next such collective starts: overlap, without holding them all.

    before: %y.whole_tp = reshard(%y) : f32[8@dp, 16]
    after:  %y.whole_tp.start = all_reduce.start(%y, axis="tp") : f32[8@dp, 16]
            %y.whole_tp = wait(%y.whole_tp.start) : f32[8@dp, 16]
    """
    out = Builder(p)
    late: dict[str, list[Op]] = {}  # value -> the ops that finish it, due before its first use
    same: dict[str, str] = {}  # a reshard that changes nothing -> its operand
    leaving = ""  # the reshard last begun of those that only outputs read

    def due(ref: Ref) -> Ref:
        ref = Ref(same.get(ref.name, ref.name), ref.want)
        for op in late.pop(ref.name, ()):
            out.emit(op)
        return ref

    for op in p.ops:
        op = op.map_refs(due)
        if op.target != "reshard":
            out.emit(op)
            continue
        chain = list(_chain(op, out, p.mesh, zero >= 2))
        if not chain:
            same[op.name] = op.refs[0].name
        started = max((i + 1 for i, c in enumerate(chain) if c.target.endswith(".start")), default=0)
        for early in chain[:started]:
            out.emit(early)
        late[op.name] = chain[started:]
        if all(isinstance(user, Output) for user in p.uses[op.name]):
            due(Ref(leaving))
            leaving = op.name
    outputs = [type(o)(due(o.ref), o.role, o.key) for o in p.outputs]
    return out.program(outputs=outputs)


def _chain(op: Op, out: Builder, mesh: Mesh, shards: bool) -> Iterator[Op]:
    """The ops that replace one reshard; the last one defines its result."""
    value = op.refs[0].name
    before = out.types[value]
    try:
        path = steps(before, op.type.layout, mesh, len(op.refs) > 1, shards)
    except LayoutError as error:
        raise PassError(f"%{op.name} = reshard(%{value}) at {op.path or 'top'}, pass lower_reshards: {error}") from None
    for i, (kind, axis, after) in enumerate(path):
        name = op.name if i == len(path) - 1 else out.fresh(f"{op.name}.{kind}_{axis}")
        arg: tuple[tuple[str, str], ...] = (("axis", axis),)
        if kind in COLLECTIVES:
            start = out.fresh(f"{name}.start")
            ids = op.refs[1:] if kind in KEYED else ()
            yield Op((start,), f"{kind}.start", (Ref(value), *ids), (after,), arg, op.phase, op.path, op.line)
            yield Op((name,), "wait", (Ref(start),), (after,), (), op.phase, op.path, op.line)
        else:
            yield Op((name,), kind, (Ref(value),), (after,), arg, op.phase, op.path, op.line)
        value = name


@lru_cache(maxsize=65536)
def steps(before: Type, to: Layout, mesh: Mesh, keyed: bool = False, shards: bool = False) -> tuple[tuple[str, str, Type], ...]:
    """The cheapest steps ``(kind, axis, type after)`` from ``before`` to layout ``to``: least bytes sent, then fewest collectives.
    ``keyed``: the ids that own rows are at hand, so that these may go to their owners and back. What is sent before a sum over
    microbatches is sent in each of them; ``shards``: it is reduced to its shards before it, so that only these are held.

    Raises LayoutError where there is no way (``max`` cannot be made from another layout).
    """
    changed = [axis for axis in mesh.names if before.layout.on(axis) != to.on(axis)]
    for axis in changed:
        if to.on(axis) == Partial("max"):
            raise LayoutError(f"over {axis} candidates of a maximum are wanted, which only an amax makes; want it whole instead")
    together: list[tuple[str, tuple[str, ...]]] = [(axis, (axis,)) for axis in changed]
    together += [(axis, parts) for axis in dict.fromkeys(map(whole_axis, changed)) if len(parts := mesh.parts(axis)) > 1 and set(parts) <= set(changed)]
    best: dict[Layout, tuple[int, int, int]] = {before.layout: (0, 0, 0)}
    came: dict[Layout, tuple[Layout, str, str]] = {}
    queue: list[tuple[tuple[int, int, int], int, Layout]] = [((0, 0, 0), 0, before.layout)]
    order = 0
    while queue:
        cost, _, layout = heapq.heappop(queue)
        if layout == to:
            break
        if cost > best[layout]:
            continue
        for axis, after in _nearby(layout, before.layout, to, together):
            if after == layout or not valid(before.shape, after, mesh):
                continue
            try:
                kind = step(before.shape, layout, after, axis, mesh, keyed).kind
            except LayoutError:
                continue
            if axis not in mesh.sizes and kind not in COLLECTIVES:
                continue
            sent = sent_bytes(kind, before.laid(layout), before.laid(after), axis, mesh)
            if kind == "accumulate" and shards and any(isinstance(layout.on(a), Partial) and isinstance(to.on(a), Split) for a in mesh.names):
                continue
            sent *= mesh.size(TIME) if layout.on(TIME) is not None else 1
            total = (cost[0] + sent, cost[1] + (kind in COLLECTIVES), cost[2] + 1)
            if after not in best or total < best[after]:
                best[after], came[after] = total, (layout, kind, axis)
                order += 1
                heapq.heappush(queue, (total, order, after))
    else:
        raise LayoutError(f"no way from {before.layout.elements} to {to.elements} for {list(before.shape)} on {mesh}")
    path: list[tuple[str, str, Type]] = []
    at = to
    while at != before.layout:
        source, kind, axis = came[at]
        path.append((kind, axis, before.laid(at)))
        at = source
    return tuple(reversed(path))


def _nearby(layout: Layout, before: Layout, to: Layout, together: Sequence[tuple[str, tuple[str, ...]]]) -> Iterator[tuple[str, Layout]]:
    """Layouts that one step may reach: over an axis, or over all sub-axes of one at once."""
    for axis, parts in together:
        for source in (before, to, Layout()):
            after = layout
            for part in parts:
                after = after.with_(part, source.on(part))
            yield axis, after
