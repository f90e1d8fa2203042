"""Take apart the ops that hide a reduction, drop what does nothing, compute equal things once.

Placement sees reductions as ``sum`` and ``amax`` only: every norm, softmax, loss and mean is written with them, so one rule
shards them all. The group of ops that replaces an op remembers it (``origin``), and a later pass may emit it as it was.
What each op becomes is in the tables of ``decompose`` and the ``decompose_…`` beside it, what is dropped in ``simplify``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from deepseed.ir.contract import program_pass
from deepseed.ir.program import Builder, Op, Output, Program, Ref
from deepseed.passes.decompose import DECOMPOSITIONS as _REDUCTIONS
from deepseed.passes.decompose_bags import BAGS
from deepseed.passes.decompose_losses import LOSSES
from deepseed.passes.decompose_norms import NORMS, mixed
from deepseed.passes.decompose_products import PRODUCTS
from deepseed.passes.group import Decomposition, Group
from deepseed.passes.repeated_heads import merge_repeated_heads
from deepseed.passes.routed import route_products
from deepseed.passes.simplify import SIMPLIFICATIONS, functional_batch_norm
from deepseed.passes.weights_per_phase import per_phase

DECOMPOSITIONS: dict[str, Decomposition] = {**_REDUCTIONS, **LOSSES, **NORMS, **PRODUCTS, **BAGS}


@program_pass(requires={"captured"}, provides={"canonical"})
def canonicalize(p: Program) -> Program:
    """Decompose, simplify, drop dead code.

    before: %y = aten._softmax(%x, 1, false) : f32[4, 8] {phase="forward"}
    after:  %y.amax = amax(%x, dims=[1], keepdim=true) : f32[4, 1] {phase="forward", origin="y"}
            %y.sub = aten.sub.Tensor(%x, %y.amax) : f32[4, 8] {phase="forward", origin="y"}
            %y.exp = aten.exp(%y.sub) : f32[4, 8] {phase="forward", origin="y"}
            %y.sum = sum(%y.exp, dims=[1], keepdim=true) : f32[4, 1] {phase="forward", origin="y"}
            %y = aten.div.Tensor(%y.exp, %y.sum) : f32[4, 8] {phase="forward", origin="y"}
    """
    p = route_products(merge_repeated_heads(p))
    work = _Canonicalizer(p)
    for op in p.ops:
        work.put(op)
    return per_phase(_tidy(work.program()))


class _Canonicalizer:
    def __init__(self, p: Program) -> None:
        self.out = Builder(p)
        self.equal: dict[str, Ref] = {}  # a value that is gone -> the one that stands for it
        self.written: dict[str, Ref] = {}  # a buffer -> its new value, for whoever reads it from here on
        self.producers: dict[str, Op] = {}
        self.seen: dict[tuple[object, ...], Op] = {}

    def put(self, op: Op) -> None:
        """Emit ``op``, or what it becomes."""
        op = op.map_refs(self.current)
        functional = functional_batch_norm(op, self.out.types)
        if functional is not None:
            self.put(functional)
            for buffer, new in zip(op.refs[-2:], functional.results[len(op.results) :], strict=False):
                self.written[buffer.name] = Ref(new)
        elif not self._replace(op, SIMPLIFICATIONS) and not self._replace(op, DECOMPOSITIONS):
            self._emit(op)

    def _replace(self, op: Op, table: dict[str, Decomposition]) -> bool:
        rule = table.get(op.target)
        if rule is None:
            return False
        group = Group(op, self.out.types, self.out.fresh, self.producers)
        values = rule(group)
        if values is None:
            for unused in group.ops:
                del self.out.types[unused.name]
            return False
        elsewhere = group.close(values)
        ops = group.ops
        if table is DECOMPOSITIONS and len(ops) > 1 and not op.origin and not mixed(op, self.out.types):
            self.out.origins[op.name] = op
            ops = [replace(o, origin=op.name) for o in ops]
        for o in ops:
            self.put(o)
        self.equal.update(elsewhere)
        return True

    def _emit(self, op: Op) -> None:
        key = (op.target, op.args, op.kwargs, op.types, op.phase)
        if not op.origin and not (op.target == "full" and op.type.numel > 1):  # a full is born where it is used
            found = self.seen.setdefault(key, op)
            if found is not op:
                self.equal.update((r, Ref(same)) for r, same in zip(op.results, found.results, strict=True))
                return
        self.out.emit(op)
        self.producers.update(dict.fromkeys(op.results, op))

    def current(self, ref: Ref) -> Ref:
        ref = self.same(ref)
        while ref.name in self.written:
            ref = self.same(self.written[ref.name])
        return ref

    def same(self, ref: Ref) -> Ref:
        while ref.name in self.equal:
            ref = self.equal[ref.name]
        return ref

    def program(self) -> Program:
        outputs = [Output(self.current(o.ref), o.role, o.key) for o in self.out.base.outputs]
        returned = {(o.role, o.key) for o in outputs}
        for i in self.out.base.inputs:
            if i.name in self.written and (i.role, i.key) not in returned:
                outputs.append(Output(self.current(Ref(i.name)), i.role, i.key))
        self.out.origins = {key: op.map_refs(self.same) for key, op in self.out.origins.items()}
        return self.out.program(outputs=outputs)


def _tidy(p: Program) -> Program:
    """Without dead ops, and without origins that no longer say what their group computes."""
    needed = {o.ref.name for o in p.outputs}
    live: list[Op] = []
    for op in reversed(p.ops):
        if needed.intersection(op.results):
            live.append(op)
            needed.update(ref.name for ref in op.refs)
    p = replace(p, ops=tuple(reversed(live)))
    groups: dict[str, list[Op]] = {}
    for op in p.ops:
        groups.setdefault(op.origin, []).append(op)
    origins = {key: op for key, op in p.origins if key in groups and _faithful(p, op, groups[key])}
    ops = tuple(op if not op.origin or op.origin in origins else replace(op, origin="") for op in p.ops)
    return replace(p, ops=ops, origins=tuple(origins.items()))


def _faithful(p: Program, whole: Op, members: Sequence[Op]) -> bool:
    """Has the group all operands, and is nothing of it read elsewhere but the whole op's results?"""
    if any(ref.name not in p.types for ref in whole.refs):
        return False
    inner = {r for op in members for r in op.results} - set(whole.results)
    return all(isinstance(user, Op) and user.origin == members[0].origin for name in inner for user in p.uses[name])
