"""What depends on parameters alone follows its users: the backward has its own casts and transposes of a weight.

One cast for both phases would have to be gathered for forward and kept until backward: a whole model in memory. Two casts
let each phase gather its own; where nothing came between them after all (no reshard), ``once`` makes them one again.
"""

from __future__ import annotations

from dataclasses import replace

from deepseed.ir.program import Arg, Builder, Op, Program, Ref, params_only


def per_phase(p: Program) -> Program:
    """Give the backward its own copy of every forward op on parameters alone that it reads.

    before: %c = cast(%w) : bf16[8, 8] {phase="forward"}
            %y = aten.mm(%x, %c) : bf16[8, 8] {phase="forward"}
            %d = aten.mm(%g, %c) : bf16[8, 8] {phase="backward"}
    after:  %c = cast(%w) : bf16[8, 8] {phase="forward"}
            %y = aten.mm(%x, %c) : bf16[8, 8] {phase="forward"}
            %c.again = cast(%w) : bf16[8, 8] {phase="backward"}
            %d = aten.mm(%g, %c.again) : bf16[8, 8] {phase="backward"}
    """
    weights = params_only(p)
    out = Builder(p)
    again: dict[str, Ref] = {}

    def own(ref: Ref) -> Arg:
        made = p.producers.get(ref.name)
        if made is None or made.phase != "forward" or ref.name not in weights:
            return ref
        if ref.name not in again:
            copy = made.map_refs(own)
            names = tuple(out.fresh(f"{r}.again") for r in copy.results)
            out.emit(replace(copy, results=names, phase="backward", origin=""))
            again.update((r, Ref(n)) for r, n in zip(made.results, names, strict=True))
        return again[ref.name]

    backward = set()
    for op in p.ops:
        out.emit(op.map_refs(own) if op.phase == "backward" else op)
        backward |= {op.origin} if op.phase == "backward" else set()
    out.origins = {key: op.map_refs(lambda ref: again.get(ref.name, ref)) if key in backward else op for key, op in p.origins}
    return out.program()


def gathered_once(p: Program) -> Program:
    """What depends on parameters alone is made and gathered once for forward and backward, and gathered once for all microbatches.

    before: %c = cast(%w) : bf16[8@dp, 8] {phase="forward"}
            %f = all_gather.start(%c, axis="dp") : bf16[8, 8] {phase="forward"}
            %c.again = cast(%w) : bf16[8@dp, 8] {phase="backward"}
            %b = all_gather.start(%c.again, axis="dp") : bf16[8, 8] {phase="backward"}
    after:  %c = cast(%w) : bf16[8@dp, 8] {phase="forward"}
            %f = all_gather.start(%c, axis="dp", kept=true) : bf16[8, 8] {phase="forward"}
    """
    if not any(op.target == "all_gather.start" for op in p.ops):
        return p
    weights = params_only(p)
    out = Builder(p)
    number: dict[str, object] = {}  # of what depends on parameters alone: what it is, whatever its name
    first: dict[object, str] = {}
    same: dict[str, Ref] = {}
    for op in p.ops:
        if op.name in weights and op.phase != "update":
            number[op.name] = op.form, op.types, tuple(number.get(r.name, r.name) for r in op.refs)
            found = first.setdefault(number[op.name], op.name)
            if found != op.name and not op.origin and len(op.results) == 1:
                same[op.name] = Ref(found)
                continue
        op = op.map_refs(lambda ref: same.get(ref.name, ref))
        if op.target == "all_gather.start" and op.name in weights and op.phase != "update":
            op = replace(op, kwargs=(*op.kwargs, ("kept", True)))
        out.emit(op)
    out.origins = {key: op.map_refs(lambda ref: same.get(ref.name, ref)) for key, op in p.origins}
    return read(out.program(outputs=[replace(o, ref=same.get(o.ref.name, o.ref)) for o in p.outputs]))


def read(p: Program) -> Program:
    """Without what nothing reads."""
    used = {o.ref.name for o in p.outputs}
    ops: list[Op] = []
    for op in reversed(p.ops):
        if op.phase == "update" or any(r in used for r in op.results):
            ops.append(op)
            used.update(ref.name for ref in op.refs)
    return replace(p, ops=tuple(reversed(ops)))


def once(p: Program) -> Program:
    """Ops on parameters alone that have the same operands and layouts, whatever their phase, are computed once in each part and stage."""
    weights = params_only(p)
    out = Builder(p)
    seen: dict[tuple[object, ...], Op] = {}
    same: dict[str, Ref] = {}
    for op in p.ops:
        op = op.map_refs(lambda ref: same.get(ref.name, ref))
        if op.phase != "update" and op.name in weights and not op.origin and "." not in op.target.removeprefix("aten."):
            found = seen.setdefault((op.target, op.args, op.kwargs, op.types, op.part, op.stage), op)
            if found is not op:
                same.update((r, Ref(s)) for r, s in zip(op.results, found.results, strict=True))
                continue
        out.emit(op)
    out.origins = {key: op.map_refs(lambda ref: same.get(ref.name, ref)) for key, op in p.origins}
    return out.program(outputs=[replace(o, ref=same.get(o.ref.name, o.ref)) for o in p.outputs])
