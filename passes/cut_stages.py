"""Cut a looped program into pipeline stages: which stage runs each op, what crosses, and when each rank runs what.

The forward is cut where the fewest bytes are live, in balance; the backward by one minimum cut a boundary; what depends on inputs or on
parameters alone each stage computes for itself. A weight is stored on the first stage that uses it; gradients of other stages' uses
cross once a step, as do the summands of the gradient norm. The schedule is an instruction list a rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from deepseed.ir.contract import PassError, program_pass
from deepseed.ir.mesh import TIME
from deepseed.ir.messages import messages_of
from deepseed.ir.program import Builder, Op, Program
from deepseed.ir.schedule import kind_of, loop_of
from deepseed.passes.cut_backward import Known, backward_stages
from deepseed.passes.cut_forward import earlier_stages, forward_stages
from deepseed.passes.cut_kinds import STORED, Kinds, kinds, owners
from deepseed.passes.cut_spread import split_weights, spread
from deepseed.passes.cut_tails import distribute, tails
from deepseed.solver.schedules import ScheduleError, check, lanes


@program_pass(requires={"looped"}, provides={"staged"})
def cut_stages(
    p: Program, stages: int = 1, schedule: str = "1f1b", chunks: int = 1, pins: Sequence[str] = (),
    stored: Mapping[tuple[str, str], int] | None = None,
) -> Program:  # fmt: skip
    """Give every op its stage, 0 .. ``stages`` x ``chunks`` - 1; values that another stage uses cross by ``transfer``.

    ``stages``: pipeline ranks. ``schedule``: gpipe, 1f1b, interleaved (with ``chunks`` stages a rank) or zb; a program with tangents
    has gpipe's order, and a schedule without stages too. ``pins``: module paths with
    which the stages after the first begin. ``stored``: by role and key the stages on which an earlier program stores its inputs: they stay
    there, and the cuts are made around them where that can be. Raises PassError where there are fewer cut points than cuts, or a pin cannot be met.

    before: %w1 : f32[8, 8] param "w1"
            %w2 : f32[8, 8] param "w2"
            %x : f32[8, 8] batch "x"
            %h = aten.mm(%x, %w1) : f32[8, 8] {part="forward.1"}
            %y = aten.mm(%h, %w2) : f32[8, 8] {part="forward.1"}
    after:  %w1 : f32[8, 8] param "w1"
            %w2 : f32[8, 8] param "w2" stage 1
            %x : f32[8, 8] batch "x"
            %h = aten.mm(%x, %w1) : f32[8, 8] {part="forward.1"}
            %h.s1 = transfer(%h, source=0) : f32[8, 8] {part="forward.1", stage=1}
            %y = aten.mm(%h.s1, %w2) : f32[8, 8] {part="forward.1", stage=1}
    """
    if p.by_role("tangent"):
        schedule = "gpipe"  # the caller comes between forward and backward
    elif stages == 1 and TIME not in p.mesh.sizes:
        return p
    k = kinds(p)
    if stages == 1:
        return _scheduled(p, schedule if schedule != "interleaved" else "1f1b", 1, 1, k.loops)
    placed, home = _place(k, stages * chunks, pins, stored or {})
    out = spread(placed, k.free, home)
    return _scheduled(split_weights(out, k.loops) if schedule == "zb" else out, schedule, stages, chunks, k.loops)


def _scheduled(p: Program, name: str, ranks: int, chunks: int, loops: int) -> Program:
    """``p`` with what each rank runs, proved to run to its end."""
    crossing = messages_of(p)
    parts = {(op.part, op.stage) for op in p.ops} | {place for message in crossing.values() for place in message}
    try:
        schedule = lanes(name, ranks, dict(p.mesh.axes).get(TIME, 1), chunks, loops, parts)
        check(schedule, crossing, parts)
    except ScheduleError as error:
        raise PassError(f"{error}, pass cut_stages") from None
    return replace(p, schedule=schedule)


def _place(k: Kinds, stages: int, pins: Sequence[str], stored: Mapping[tuple[str, str], int]) -> tuple[Program, dict[str, int]]:
    """Every bound op with its stage, sums over stages written out; and where each stored input is at home."""
    p = k.program
    fixed = {i.name: stored[i.role, i.key] for i in p.inputs if (i.role, i.key) in stored}
    main = forward_stages(k, stages, pins, fixed)
    used_on = _used_on(k, main)
    by_key = {i.key: fixed.get(i.name, min(used_on.get(i.name, {0}))) for i in p.inputs if i.role == "param"}
    home = {i.name: min(used_on.get(i.name, {0})) for i in p.inputs if i.role in STORED}
    home.update((i.name, by_key.get(i.key.partition("/")[2], 0)) for i in p.by_role("state"))
    home.update(fixed)
    stage_of: dict[str, int] = {}  # of values
    done: dict[str, list[Op]] = {}  # by op: what stands in its place
    builder = Builder(p)
    owner = {value: by_key[key] for value, key in owners(p, f"once.{k.loops}").items()}
    once = {r for op in p.ops if kind_of(op.part) == "once" for r in op.results}
    for part in k.parts:
        after = f"once.{loop_of(part)}"
        ops = [op for op in k.bound(part) if op.name not in done]
        if kind_of(part) == "forward":
            _settle(ops, main if loop_of(part) == k.loops else earlier_stages(k, part, main, stage_of), done, stage_of)
        elif kind_of(part) == "backward":
            t = tails(k, part)
            core = [op for op in ops if op.name not in t.ops]
            ends = {leaves[0]: owner[value] for value, leaves in t.leaves.items() if len(leaves) == 1 and value in owner}
            _settle(core, backward_stages(k, core, stages, Known(stage_of, _read_on(done), used_on, ends, once)), done, stage_of)
            for name, made in distribute(t, stage_of, owner, after, builder.fresh).items():
                done[name] = made
                stage_of.update((r, op.stage) for op in made for r in op.results)
        else:
            _settle(ops, _once(k, ops, stage_of, home, owner), done, stage_of)
    return replace(p, ops=tuple(made for op in p.ops for made in done.get(op.name, (op,)))), home


def _settle(ops: Iterable[Op], at: Mapping[str, int], done: dict[str, list[Op]], stage_of: dict[str, int]) -> None:
    for op in ops:
        done[op.name] = [replace(op, stage=at[op.name])]
        stage_of.update(dict.fromkeys(op.results, at[op.name]))


def _used_on(k: Kinds, main: Mapping[str, int]) -> dict[str, set[int]]:
    """The stages whose forward uses each parameter and buffer; of one that only runs once (running statistics), its module's stage."""
    out: dict[str, set[int]] = {}
    paths: dict[str, int] = {}
    for op in k.bound(f"forward.{k.loops}"):
        paths.setdefault(op.path, main[op.name])
        for ref in op.refs:
            for root in k.stored.get(ref.name, ()):
                out.setdefault(root, set()).add(main[op.name])
    for i in k.program.inputs:
        if i.role in STORED and i.name not in out:
            found = {paths[u.path] for u in k.program.uses[i.name] if isinstance(u, Op) and u.phase == "forward" and u.path in paths}
            out |= {i.name: found} if found else {}
    return out


def _read_on(done: Mapping[str, Sequence[Op]]) -> dict[str, set[int]]:
    """The stages that read each value."""
    out: dict[str, set[int]] = {}
    for ops in done.values():
        for op in ops:
            for ref in op.refs:
                out.setdefault(ref.name, set()).add(op.stage)
    return out


def _once(k: Kinds, ops: Sequence[Op], stage_of: Mapping[str, int], home: Mapping[str, int], owner: Mapping[str, int]) -> dict[str, int]:
    """The stage of each op of a part that runs once: the home of the parameter that it updates, else where most of what it reads lies, of
    two equal ones the later: a sum over parameters then walks through the stages in their order."""
    types, mesh = k.program.types, k.program.mesh
    known = {**home, **stage_of}
    out: dict[str, int] = {}
    for op in ops:
        lies: Counter[int] = Counter()
        for name in {r.name for r in op.refs if r.name in known}:
            lies[known[name]] += max(1, types[name].local_bytes(mesh))
        here = out.get(k.glued.get(op.name, ""), owner.get(op.name, max(lies, key=lambda s: (lies[s], s), default=0)))
        if k.glued.get(op.name) is not None and op.refs[0].name in stage_of:
            here = stage_of[op.refs[0].name]
        out[op.name] = here
        known.update(dict.fromkeys(op.results, here))
    return out
