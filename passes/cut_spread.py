"""Write the program of all stages: free ops on each stage that uses them, one ``transfer`` for each other stage that reads a value.

A value is sent when it is made, to each stage that uses it; what a loop accumulates is sent once, after the loop, and a stored parameter
once, before all loops. What lies on the host crosses from device to device. A gradient that is returned to a caller who steps the optimizer
is sent to where its parameter is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from deepseed.ir.collective import IN_TIME, TO_DEVICE, TO_HOST
from deepseed.ir.program import Builder, Op, Program, Ref
from deepseed.ir.schedule import loop_of, order_of
from deepseed.passes.cut_kinds import STORED


def needs(p: Program, free: frozenset[str] | set[str], home: Mapping[str, int]) -> dict[str, set[int]]:
    """The stages that use each value. ``op.stage`` counts where the op is not free."""
    need: dict[str, set[int]] = {name: set() for name in p.types}
    homes = _ends(p, home)
    for o in p.outputs:
        if (o.role, o.key) in homes:
            need[o.ref.name].add(homes[o.role, o.key])
        elif o.ref.name in free:
            need[o.ref.name].add(0)
    for op in reversed(p.ops):
        on = {stage for r in op.results for stage in need[r]} if op.name in free else {op.stage}
        for ref in op.refs:
            need[ref.name] |= on
    return need


def spread(p: Program, free: frozenset[str] | set[str], home: Mapping[str, int]) -> Program:
    """``p``, whose bound ops have their stages, with transfers and copies; inputs say where they are stored.

    before: %w : f32[8, 8] param "w"                                      used by %h on stage 0 and by %y on stage 1
            %h = aten.mm(%x, %w) : f32[8@mb, 8] {part="forward.1"}
            %y = aten.mm(%h, %w) : f32[8@mb, 8] {part="forward.1", stage=1}
    after:  %w.s1 = transfer(%w, source=0) : f32[8, 8] {part="once.0", stage=1}
            %h = aten.mm(%x, %w) : f32[8@mb, 8] {part="forward.1"}
            %h.s1 = transfer(%h, source=0) : f32[8@mb, 8] {part="forward.1", stage=1}
            %y = aten.mm(%h.s1, %w.s1) : f32[8@mb, 8] {part="forward.1", stage=1}
    """
    need = needs(p, free, home)
    out = Builder(p)
    on: dict[tuple[str, int], str] = {}  # (value, stage) -> its name there

    def send(op_phase: tuple[str, str, str], value: str, source: int, part: str) -> None:
        stages, host = sorted(need[value] - {source}), out.types[value].host
        sent = moved(op_phase, value, TO_DEVICE, part, source) if stages and host else value
        for stage in stages:
            name = out.fresh(f"{value}.s{stage}")
            phase, path, line = op_phase
            out.emit(Op((name,), "transfer", (Ref(sent),), (out.types[sent],), (("source", source),), phase, path, line, "", part, stage))
            on[value, stage] = moved(op_phase, name, TO_HOST, part, stage) if host else name

    def moved(op_phase: tuple[str, str, str], value: str, target: str, part: str, stage: int) -> str:
        t, name = out.types[value].on(target == TO_HOST), out.fresh(f"{value}.{'host' if target == TO_HOST else 'device'}")
        start = out.fresh(f"{name}.start")
        out.emit(Op((start,), target, (Ref(value),), (t,), (), *op_phase, "", part, stage))
        out.emit(Op((name,), "wait", (Ref(start),), (t,), (), *op_phase, "", part, stage))
        return name

    for i in p.inputs:
        if i.role in STORED:
            on[i.name, home.get(i.name, 0)] = i.name
            send(("forward", "", ""), i.name, home.get(i.name, 0), "once.0")
        else:
            on.update(((i.name, stage), i.name) for stage in need[i.name])
    for op in p.ops:
        stages = sorted({s for r in op.results for s in need[r]}) if op.name in free else [op.stage]
        for n, stage in enumerate(stages):
            names = op.results if n == 0 else tuple(out.fresh(f"{r}.s{stage}") for r in op.results)
            on.update(((r, stage), name) for r, name in zip(op.results, names, strict=True))
            local = op.map_refs(lambda ref, stage=stage: replace(ref, name=on[ref.name, stage]))  # type: ignore[misc]
            out.emit(replace(local, results=names, stage=stage, origin=op.origin if n == 0 else ""))
        if op.name not in free:
            part = f"once.{loop_of(op.part)}" if op.target in IN_TIME else op.part
            for r in op.results:
                send((op.phase, op.path, op.line), r, op.stage, part)
    homes = _ends(p, home)
    outputs = [replace(o, ref=replace(o.ref, name=on[o.ref.name, homes[o.role, o.key]])) if (o.role, o.key) in homes else o for o in p.outputs]
    done = out.program(outputs=outputs)
    inputs = tuple(replace(i, stage=home.get(i.name, 0)) if i.role in STORED else i for i in p.inputs)
    return replace(done, inputs=inputs, ops=tuple(sorted(done.ops, key=lambda op: order_of(op.part))))


def _ends(p: Program, home: Mapping[str, int]) -> dict[tuple[str, str], int]:
    """The stage on which each output of a stored input's, or its gradient where the caller gives tangents, is wanted."""
    stored = {(i.role, i.key): home.get(i.name, 0) for i in p.inputs if i.role in STORED}
    return stored | ({("grad", key): stage for (role, key), stage in stored.items() if role == "param"} if p.by_role("tangent") else {})


def split_weights(p: Program, loop: int) -> Program:
    """The backward of the last loop in two: ``backward.Q`` is what another stage waits for, ``weights.Q`` the rest (Qi et al. 2023).

    On a stage that sends nothing back, the ancestors of its last gradient count as waited for: the chain of activations' gradients.
    """
    part = f"backward.{loop}"
    ops = [op for op in p.ops if op.part == part]
    wanted = {op.refs[0].name for op in ops if op.target == "transfer" and op.stage < int(str(op.kw("source")))}
    made = {r: op for op in ops for r in op.results}
    sending = {made[w].stage for w in wanted if w in made}
    for stage in {op.stage for op in ops} - sending:
        wanted.update(r.name for r in _deepest([op for op in ops if op.stage == stage and op.target != "transfer"]).refs)
    waited = set[str]()
    for op in reversed(ops):
        if (op.target == "transfer" and op.stage < int(str(op.kw("source")))) or not wanted.isdisjoint(op.results):
            waited.add(op.name)
            wanted.update(r.name for r in op.refs)
    new = [replace(op, part=f"weights.{loop}") if op.part == part and op.name not in waited else op for op in p.ops]
    return replace(p, ops=tuple(sorted(new, key=lambda op: order_of(op.part))))


def _deepest(ops: list[Op]) -> Op:
    """The op with the longest chain of ops before it."""
    depth: dict[str, int] = {}
    for op in ops:
        depth.update(dict.fromkeys(op.results, 1 + max((depth.get(r.name, 0) for r in op.refs), default=0)))
    return max(ops, key=lambda op: depth[op.name])

