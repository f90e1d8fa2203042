"""Where the forward is cut: few bytes live across a cut, the work of the stages in balance.

Cut points are the valleys of the bytes that are live along the traced order, never inside a group that was one op. A stage costs its flops, the
bytes that it reads and writes, and the bytes that arrive. Of the cut points, those with the fewest bytes are taken that still keep the
dearest stage within ``SLACK`` of the best cut; dynamic programming over these balances the stages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches

import numpy as np
from numpy.typing import NDArray

from deepseed.cost import flops
from deepseed.ir.contract import PassError
from deepseed.ir.program import Op, Program
from deepseed.passes.cut_kinds import Kinds
from deepseed.solver.cuts import Floats, cut_points, live_bytes, open_places, places

TOUCH = 32.0  # flops that take as long as one byte read or written
SEND = 64.0  # flops that take as long as one byte sent to another stage
UNEVEN = 1.4  # of the dearest stage's cost with cuts anywhere: above it, valleys lie too far from where the work is divided
SLACK = 1.25  # of the dearest stage's cost: what cuts of fewer bytes may take


def forward_stages(k: Kinds, stages: int, pins: Sequence[str], homes: Mapping[str, int]) -> dict[str, int]:
    """The stage of each op of the last loop's forward, by name. ``homes``: the stages of inputs that are stored already, which are used
    there first where the order of the forward allows it. Raises PassError: too few cut points, a pin that cannot be met."""
    p = k.program
    ops = k.bound(f"forward.{k.loops}")
    at = places(ops, k.glued)
    live = live_bytes(p, ops, at)
    cost = _costs(p, ops, at)
    cuts = _pinned(ops, at, stages, pins) if pins else _cuts(_points(ops, at, live, cost, stages), cost, live, stages)
    if homes and not pins:
        cuts = _held(cuts, _first_uses(k, ops, at), homes, open_places(ops, at, live), live)
    return {op.name: int(np.searchsorted(cuts, n, side="right")) for op, n in zip(ops, at, strict=True)}


def _costs(p: Program, ops: Sequence[Op], at: Sequence[int]) -> Floats:
    """Cost of each op, in flops."""
    types = p.types
    out = np.zeros(len(ops))
    for op, n in zip(ops, at, strict=True):
        operands = [types[r.name] for r in op.refs]
        touched = sum(t.local_bytes(p.mesh) for t in (*operands, *op.types))
        whole, local = op.type.numel, op.type.local_bytes(p.mesh)
        share = local / op.type.nbytes if whole else 1.0
        out[n] += flops(op, operands) * share + TOUCH * touched
    return out


def _points(ops: Sequence[Op], at: Sequence[int], live: Floats, cost: Floats, stages: int) -> list[int]:
    """The cut points; where there are too few, or none near the middle of the work (a chain of equal widths has no valleys but at its end), every
    place where a cut may stand. Raises PassError: still too few."""
    points, anywhere = cut_points(ops, at, live), open_places(ops, at, live)
    least = max(float(cost.sum()) / stages, *map(float, cost))  # no cuts divide the work better
    if len(points) < stages - 1 or ((dearest := _dearest(points, cost, live, stages)) > UNEVEN * least and dearest > UNEVEN * _dearest(anywhere, cost, live, stages)):
        points = anywhere
    if len(points) < stages - 1:
        raise PassError(
            f"{stages} stages need {stages - 1} cut points, the forward has {len(points)}, pass cut_stages\n"
            f"  fix: use {len(points) + 1} stages or fewer" + ("" if points else ", that is, no pp")
        )
    return points


def _dearest(points: Sequence[int], cost: Floats, live: Floats, stages: int) -> float:
    """The cost of the dearest stage of the best cut at ``points``."""
    return _best(_loads(points, cost, live), np.maximum, stages)[0]


def _cuts(points: Sequence[int], cost: Floats, live: Floats, stages: int) -> NDArray[np.int64]:
    """Positions of the ``stages - 1`` cuts, of ``points``."""
    best = _dearest(points, cost, live, stages)
    bounds = sorted({float(live[i]) for i in points})
    low, high = 0, len(bounds) - 1
    while low < high:  # the least bytes with which the dearest stage is not much dearer
        middle = (low + high) // 2
        few = [i for i in points if live[i] <= bounds[middle]]
        if len(few) >= stages - 1 and _dearest(few, cost, live, stages) <= SLACK * best:
            high = middle
        else:
            low = middle + 1
    few = [i for i in points if live[i] <= bounds[low]]
    load = _loads(few, cost, live)
    dearest = _best(load, np.maximum, stages)[0]
    return np.array([0, *few])[_best(np.where(load <= dearest, (load / dearest) ** 2, np.inf), np.add, stages)[1]]


def _first_uses(k: Kinds, ops: Sequence[Op], at: Sequence[int]) -> dict[str, int]:
    """Where the forward first uses each stored input."""
    out: dict[str, int] = {}
    for op, n in zip(ops, at, strict=True):
        for ref in op.refs:
            for root in k.stored.get(ref.name, ()):
                out[root] = min(out.get(root, n), n)
    return out


def _held(cuts: NDArray[np.int64], uses: Mapping[str, int], homes: Mapping[str, int], points: Sequence[int], live: Floats) -> NDArray[np.int64]:
    """Each cut moved between the inputs stored before it and those stored after it, to where the fewest bytes are live; as they are where
    the forward uses them in another order, or leaves no place for a cut: weights then cross."""
    out: list[int] = []
    for stage, cut in enumerate(cuts.tolist(), 1):
        low = max([n + 1 for name, n in uses.items() if homes.get(name, stage) < stage], default=0)
        high = min([n for name, n in uses.items() if homes.get(name, -1) >= stage], default=len(live))
        between = [i for i in points if max(low, out[-1] + 1 if out else 0) <= i <= high]
        if not between:
            return cuts
        out.append(cut if cut in between else min(between, key=lambda i: (live[i], i)))
    return np.array(out)


def _loads(points: Sequence[int], cost: Floats, live: Floats) -> Floats:
    """[begin, end] what a stage costs that begins at the start or a point and ends at a point or the end; inf where it would be empty."""
    begins, ends = np.array([0, *points]), np.array([*points, len(live)])
    sums = np.concatenate([[0.0], np.cumsum(cost)])
    load: Floats = sums[ends][None, :] - sums[begins][:, None] + SEND * np.where(begins > 0, live[begins], 0.0)[:, None]
    load[ends[None, :] <= begins[:, None]] = np.inf
    return load


def _best(load: Floats, join: np.ufunc, stages: int) -> tuple[float, list[int]]:
    """The partition into ``stages`` runs whose loads, joined, are least: what they join to, and where the runs after the first begin."""
    total = load[0]
    came: list[NDArray[np.int64]] = []
    for _ in range(stages - 1):
        before = np.concatenate([[np.inf], total[:-1]])  # a run begins where one has ended
        through = join(before[:, None], load)
        came.append(np.argmin(through, axis=0))
        total = through[came[-1], np.arange(through.shape[1])]
    begins: list[int] = []
    end = len(total) - 1
    for choice in reversed(came):
        begins.append(int(choice[end]))
        end = begins[-1] - 1
    return float(total[-1]), begins[::-1]


def _pinned(ops: Sequence[Op], at: Sequence[int], stages: int, pins: Sequence[str]) -> NDArray[np.int64]:
    if len(pins) != stages - 1:
        given = f"{len(pins)} are given: {', '.join(pins)}"
        said = f"{stages} stages have {stages - 1} cuts, {given}, pass cut_stages"
        raise PassError(f"{said}\n  fix: name the module that each stage after the first begins with")
    first: dict[str, int] = {}
    for op, n in zip(ops, at, strict=True):
        path = op.path
        while path and path not in first:
            first[path] = n
            path = path.rpartition(".")[0]
    for pin in pins:
        if pin not in first:
            near = get_close_matches(pin, list(first), n=3, cutoff=0.4)
            fix = f"\n  fix: did you mean {' or '.join(near)}?" if near else ""
            raise PassError(f"cut={pin}: no forward op belongs to this module, pass cut_stages{fix}")
    for one, two in zip(("", *pins), pins, strict=False):
        if first[two] <= first.get(one, 0):
            raise PassError(
                f"cut={two}: its first op is forward op {first[two]}, which is not after "
                + (f"that of {one}, op {first[one]}" if one else "the first op")
                + ", pass cut_stages\n  fix: name modules in the order in which the forward runs them"
            )
    return np.array([first[pin] for pin in pins])


def earlier_stages(k: Kinds, part: str, main: Mapping[str, int], stage_of: Mapping[str, int]) -> dict[str, int]:
    """The stage of each forward op of an earlier loop: that of its like in the last loop, and none before its operands'."""
    like: dict[tuple[object, ...], int] = {}
    path: dict[str, int] = {}
    for op in k.bound(f"forward.{k.loops}"):
        like.setdefault(_likeness(op), main[op.name])
        path.setdefault(op.path, main[op.name])
    out: dict[str, int] = {}
    known = dict(stage_of)
    for op in k.bound(part):
        glued = k.glued.get(op.name)
        least = max((known[r.name] for r in op.refs if r.name in known), default=0)
        here = out[glued] if glued in out else max(least, like.get(_likeness(op), path.get(op.path, 0)))
        out[op.name] = here
        known.update(dict.fromkeys(op.results, here))
    return out


def _likeness(op: Op) -> tuple[object, ...]:
    return op.path, op.line, op.form, op.types
