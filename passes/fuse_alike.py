"""What does the same to many tensors is one group: casts of all weights, of gradients, step counts; helper of ``group_kernels``.

Found in a stretch of ops that each read one tensor, and none what another of them makes: any order of these computes the same. A group's operands live until it ends, so
operands that were made for it are few bytes: the rest would be held twice.

    before: %a = cast(%v) : bf16[8, 4]                            after: %a = cast(%v) : bf16[8, 4]                {kernel="b"}
            %s = aten.add.Tensor(%t, 1) : f32[]                          %b = cast(%w) : bf16[4]                   {kernel="b"}
            %b = cast(%w) : bf16[4]                                      %s = aten.add.Tensor(%t, 1) : f32[]       {kernel="r"}
            %r = aten.add.Tensor(%u, 1) : f32[]                          %r = aten.add.Tensor(%u, 1) : f32[]       {kernel="r"}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

from deepseed.ir.program import Op, Program, Ref, after_tangents
from deepseed.passes.fuse import REACH
from deepseed.passes.fuse_kinds import POINT, kind_of

HELD = 1 << 21  # bytes of operands that a group makes live longer: they stay in the cache


def fuse_alike(p: Program, sums: bool = False, held: int = HELD) -> Program:
    """``p`` has its groups marked. ``sums``: the back end adds up many tensors at once; ``held``: bytes of operands that a group may make live longer."""
    waiting, inputs = after_tangents(p), {i.name for i in p.inputs}
    out: list[Op] = []
    stretch: dict[tuple[object, ...], list[Op]] = {}
    made: set[str] = set()

    def end() -> None:
        for ops in stretch.values():
            for run in _runs(p, ops, inputs, held):
                out.extend(replace(op, kernel=run[-1].name, origin="") if len(run) > 1 else op for op in run)
        stretch.clear()
        made.clear()

    for op in p.ops:
        form = _form(p, op, waiting, sums)
        if form is None or any(r.name in made for r in op.refs):
            end()
        if form is None:
            out.append(op)
        else:
            stretch.setdefault(form, []).append(op)
            made.update(op.results)
    end()
    whole = {op.origin for op in out if op.origin}
    return replace(p, ops=tuple(out), origins=tuple((key, op) for key, op in p.origins if key in whole))


def _runs(p: Program, ops: Sequence[Op], inputs: set[str], most: int) -> list[list[Op]]:
    runs: list[list[Op]] = []
    room = 0
    for op in ops:
        (x,) = op.refs
        held = 0 if x.name in inputs else p.types[x.name].local_bytes(p.mesh)
        if not runs or held > room or (len(runs[-1]) == REACH and not op.type.shape):  # each number is an argument
            runs.append([])
            room = most
        runs[-1].append(op)
        room -= held
    return runs


def _form(p: Program, op: Op, waiting: set[str], sums: bool) -> tuple[object, ...] | None:
    """What must be the same; None for an op that no such kernel has."""
    summed = sums and op.target == "sum_of_squares"
    if op.kernel or len(op.refs) != 1 or len(op.results) != 1 or not (summed or kind_of(op, p) == POINT):
        return None
    x = p.types[op.refs[0].name]
    if x.host or op.type.host or 0 in x.local(p.mesh) or (not summed and (x.shape != op.type.shape or x.local(p.mesh) != op.type.local(p.mesh))):
        return None
    rest = tuple(repr(a) for a in op.args if not isinstance(a, Ref))
    many = prod(x.local(p.mesh)) > 1
    return op.target, rest, repr(op.kwargs), x.dtype, op.type.dtype, many, op.part, op.stage, op.phase, op.name in waiting
