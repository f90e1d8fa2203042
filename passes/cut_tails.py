"""What is left of a gradient when its summands are computed: linear ops that may run after the sum over microbatches.

Gradients of one weight that two stages use are added up (``add``), brought to the layout in which they are stored (reduce_scatter,
permute, cast) and accumulated. All of that is linear: each stage does it with its own summands, and the sum over stages runs in the
epilogue, so that a tied weight's gradient crosses once a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from deepseed.ir.program import Op, Output, Ref
from deepseed.ir.schedule import kind_of
from deepseed.passes.cut_kinds import Kinds

UNARY = frozenset(
    ("wait", "all_reduce.start", "reduce_scatter.start", "all_gather.start", "all_to_all.start", "shard", "summand", "share", "accumulate", "collect",
     "reshape", "permute", "cast", "aten.neg", "aten.mul.Scalar")
)  # fmt: skip
ADD = "aten.add.Tensor"


@dataclass(frozen=True)
class Tails:
    """``ops``: the tail ops of a backward part, by name, in order. ``leaves``: by value that leaves the backward, the values of which it
    is a linear function: itself where no tail op made it."""

    ops: Mapping[str, Op]
    leaves: Mapping[str, tuple[str, ...]]


def tails(k: Kinds, part: str) -> Tails:
    """The tail ops of ``part``; waits after the loop for what was started in it are among them."""
    p = k.program
    starts = {r for op in p.ops if op.part == part and op.target.endswith(".start") for r in op.results}
    late = {op.name for op in p.ops if kind_of(op.part) == "once" and op.target == "wait" and op.refs[0].name in starts}
    ops = [op for op in p.ops if op.name not in k.free and (op.part == part or op.name in late)]
    mine = {r for op in ops for r in op.results}
    inside: dict[str, Op] = {}
    leaving: dict[str, None] = {}
    for op in reversed(ops):
        leaves_by = {r: [isinstance(u, Output) or (kind_of(u.part) == "once" and u.name not in inside) for u in p.uses[r]] for r in op.results}
        leaving.update((r, None) for r, out in leaves_by.items() if any(out))
        users = [u for r in op.results for u in p.uses[r]]
        if _linear(op, mine, k) and users and all(isinstance(u, Output) or u.name in inside or kind_of(u.part) == "once" for u in users):
            inside[op.name] = op
    inside = dict(reversed(inside.items()))
    leaves: dict[str, tuple[str, ...]] = {}
    for op in inside.values():
        leaves[op.name] = tuple(dict.fromkeys(leaf for r in op.refs for leaf in leaves.get(r.name, (r.name,))))
    return Tails(inside, {value: leaves.get(value, (value,)) for value in reversed(leaving)})


def _linear(op: Op, mine: set[str], k: Kinds) -> bool:
    """Linear in backward values, which all its operands are."""
    if len(op.results) != 1 or not all(r.name in mine for r in op.refs):
        return False
    if op.target == ADD:
        return len(op.refs) == 2 and len(op.args) == 2 and not op.kwargs
    return op.target in UNARY and len(op.refs) == 1


def distribute(t: Tails, stage_of: Mapping[str, int], home: Mapping[str, int], epilogue: str, fresh: Callable[[str], str]) -> Mapping[str, list[Op]]:
    """What stands in the place of each tail op, with its stage; sums over stages stand in the epilogue, where the value is at home.

    before: %g = aten.add.Tensor(%a, %b)      %a on stage 1, %b on stage 0, %w at home on stage 0
            %g.sum = accumulate(%g)
    after:  %g.sum.s1 = accumulate(%a)        on stage 1, in the loop
            %g.sum.s0 = accumulate(%b)        on stage 0, in the loop
            %g.sum = aten.add.Tensor(%g.sum.s1, %g.sum.s0)     on stage 0, in the epilogue
    """
    parts: dict[str, dict[int, str]] = {}  # value -> its summand on each stage
    out: dict[str, list[Op]] = {}
    for op in t.ops.values():
        of = [parts.get(r.name) or {stage_of[r.name]: r.name} for r in op.refs]
        on = list(dict.fromkeys(stage for summands in of for stage in summands))
        split = len(on) > 1
        made: list[Op] = []
        parts[op.name] = {}
        for stage in on:
            mine = [summands[stage] for summands in of if stage in summands]
            if op.target == ADD and len(mine) == 1:
                parts[op.name][stage] = mine[0]
                continue
            names = iter(mine)
            name = fresh(f"{op.name}.s{stage}") if split else op.name
            made.append(replace(op.map_refs(lambda _, names=names: Ref(next(names))), results=(name,), stage=stage))  # type: ignore[misc]
            parts[op.name][stage] = name
        if split and op.name in t.leaves:
            total, *rest = parts[op.name].values()
            here = home.get(op.name, min(on))
            for n, other in enumerate(rest, 1):
                name = op.name if n == len(rest) else fresh(f"{op.name}.sum")
                made.append(Op((name,), ADD, (Ref(total), Ref(other)), op.types, (), op.phase, op.path, op.line, "", epilogue, here))
                total = name
        out[op.name] = made
    return out
