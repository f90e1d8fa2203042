"""What a plan does to a program: what is split where, what is sent, what it costs, and what was left whole.

Everything is counted from the program itself, op by op, on local shapes; no tensor is made, so a model of any size can be
explained. Beside the counts stand the closed forms of deepseed.closed_forms, which share no code with them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from deepseed import cost
from deepseed.counts import is_collective, local_flops, matmul_flops, repeated, sent_bytes
from deepseed.explain_forms import BATCH_AXES, ClosedForm, Sums, closed
from deepseed.explain_moves import hidden, moved
from deepseed.explain_text import lines
from deepseed.ir.layout import Partial, Split
from deepseed.ir.mesh import STAGES, TIME, Mesh, whole_axis
from deepseed.ir.messages import TRANSFER, messages_of, runs_once, sends
from deepseed.ir.program import FLOATS, Input, Op, Program, Type, params_only, shortens
from deepseed.ir.text import format_type
from deepseed.memory import memory
from deepseed.meshes import ranks_of
from deepseed.passes.canonicalize import DECOMPOSITIONS
from deepseed.rules import rule_of
from deepseed.speed import Machine
from deepseed.timing import Timing, timing
from deepseed.unroll import unroll

MOVES = ("reshard", "shard", "summand", "share", "wait", "accumulate", "collect", TRANSFER)  # and *.start
CARRIERS = ("cast", "permute", "reshape", "expand", "slice", *MOVES)  # what leads from a weight to the op that uses it


@dataclass(frozen=True)
class RankBytes:
    """Bytes on one rank. ``gathered_bytes``: of the casts of parameters that are gathered once and stay for the step; ``grad_bytes``: gradients alive when they are clipped; ``peak_bytes``: the most alive at once on the device,
    ``host_bytes``: on the host; ``moved_bytes``: what a step moves between them, by kind; ``moved_hidden``: the part of the time of that, from 0 to 1, in which
    the rank computes, by kind, estimated."""

    rank: int
    coordinate: Mapping[str, int]
    param_bytes: int
    grad_bytes: int
    optimizer_bytes: int
    other_bytes: int  # buffers and constants
    peak_bytes: int
    host_bytes: int
    moved_bytes: Mapping[str, int]
    moved_hidden: Mapping[str, float]
    gathered_bytes: int = 0


@dataclass(frozen=True)
class CollectiveCount:
    """``bytes``: what one rank sends in a step by all ``count`` of them."""

    axis: str
    op: str
    count: int
    bytes: int


@dataclass(frozen=True)
class UnruledOp:
    """An op without a rule: every rank computes all of it. ``bytes``: what a rank sends to make its operands whole."""

    name: str
    target: str
    path: str
    bytes: int


@dataclass(frozen=True)
class ReplicatedOp:
    """A matmul that every rank of ``axis`` repeats, or (target "param") a weight that each of them holds whole."""

    name: str
    target: str
    path: str
    axis: str
    flops: int
    bytes: int


@dataclass(frozen=True)
class Weight:
    """Weights of repeated layers, by their common name (indices as ``*``). ``layout`` is as stored; ``use`` says, for each
    axis that splits a weight in use, what that does: ``tp: column`` (output features) or ``tp: row`` (contracted, partial sums)."""

    key: str
    count: int
    layout: str
    use: str


@dataclass(frozen=True)
class Explanation:
    """Of a pipeline, ``collectives``, ``peak_at`` and ``matmul_flops`` are those of the rank that has most of them, ``closed_forms`` of the mean rank."""

    mesh: Mapping[str, int]  # of the ranks
    zero: int
    schedule: Timing | None  # None: no microbatches, no stages
    ranks: tuple[RankBytes, ...]
    peak_at: str
    collectives: tuple[CollectiveCount, ...]
    matmul_flops: int  # of one rank
    matmul_flops_one_device: int
    weights: tuple[Weight, ...]
    unruled_ops: tuple[UnruledOp, ...]
    replicated_ops: tuple[ReplicatedOp, ...]
    closed_forms: tuple[ClosedForm, ...]
    seconds: Mapping[str, float]
    cuda_graphs: str | None = None  # whether a rank's step is replayed as one; None: not asked for

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join(lines(self))


def explain(
    p: Program, *, seconds: Mapping[str, float] | None = None, zero: int | None = None, ranks: Mesh | None = None, machine: Machine | None = None, graphs: str | None = None
) -> Explanation:
    """Count a lowered program, best the one that ranks run (after group_kernels); ``seconds`` by pass.

    ``zero``: the stage of the closed forms; read from the layouts where it is not given (2 lays everything out as 1 does). ``ranks``: their
    mesh, where the pipeline is not its first axis. ``machine``: what the times of a schedule assume. ``graphs``: whether a step is captured (deepseed.graphs).
    Raises ValueError on a program that still has reshards."""
    if "lowered" not in p.facts:
        raise ValueError(f"explain needs a program after lower_reshards; this one is {', '.join(sorted(p.facts)) or 'bare'}")
    steps = [unroll(p, lane).program for lane in range(len(p.schedule.lanes))] if p.schedule is not None else [p]
    where = ranks or ranks_of(p)
    counted = [replace(_rank_bytes(step), moved_hidden=said) for step, said in zip(steps, hidden(p, steps, machine or Machine()), strict=True)]
    full = max(range(len(steps)), key=lambda n: counted[n].peak_bytes)
    each = [replace(rank, moved_hidden=counted[rank.coordinate.get(STAGES, 0)].moved_hidden) for rank in _ranks(steps, where)]
    stage = zero if zero is not None else _stage(p)
    collectives = [count_collectives(step) + _count_sends(p, n) for n, step in enumerate(steps)]
    flops, again = [matmul_flops(step) for step in steps], repeated(p)
    whole = sum(cost.flops(op, [p.types[r.name] for r in op.refs]) for op in p.ops if op.name not in again)
    sums = _means(p, steps, where, counted, collectives, flops, whole)
    return Explanation(
        dict(where.sizes), stage, None if p.schedule is None else timing(p, machine or Machine()), tuple(each), memory(steps[full]).peak_at, max(collectives, key=lambda c: sum(k.bytes for k in c)), max(flops),
        whole, _weights(p), tuple(_unruled(p)), tuple(_replicated(p)), tuple(closed(sums, stage)), dict(seconds or {}), graphs,
    )  # fmt: skip


def _rank_bytes(step: Program) -> RankBytes:
    grads = [step.types[name] for name in gradients(step)]
    params, state = [i.type for i in step.by_role("param")], [i.type for i in step.by_role("state")]
    found = memory(step)
    others = [i.type for role in ("buffer", "constant") for i in step.by_role(role)]
    return RankBytes(0, {}, _local(step, params), _local(step, grads), _local(step, state), _local(step, others), found.peak_bytes, found.host_bytes, moved(step), {}, _local(step, _gathered(step)))


def _gathered(step: Program) -> list[Type]:
    """What is gathered of parameters once a step, as it is used."""
    out = []
    for op in step.ops:
        start = step.producers.get(op.refs[0].name) if op.target == "wait" else None
        if start is not None and start.target == "all_gather.start" and start.kw("kept") and not all(isinstance(u, Op) and u.kw("kept") for u in step.uses[op.name]):
            out.append(op.type)
    return out


def _ranks(steps: Sequence[Program], where: Mesh) -> Iterable[RankBytes]:
    """Of every rank. What ranks hold differs by their stage, and where shards are uneven by their coordinate: ranks whose parts of all uneven values have
    one size are counted once."""
    uneven = [{t for t in step.types.values() if any(isinstance(e, Split) and e.of for _, e in t.layout.elements)} for step in steps]
    known: dict[object, RankBytes] = {}
    for rank in range(where.ranks):
        at = where.coordinate(rank)
        stage = at.get(STAGES, 0)
        step = steps[stage]
        seen = step.mesh.seen_from({**dict.fromkeys(step.mesh.names, 0), **at}) if uneven[stage] else step.mesh
        key = stage, tuple([t.local(seen) for t in uneven[stage]])
        if key not in known:
            known[key] = _rank_bytes(replace(step, mesh=seen))
        yield replace(known[key], rank=rank, coordinate=at)


def _count_sends(p: Program, lane: int) -> tuple[CollectiveCount, ...]:
    """What a pipeline rank sends to others in a step."""
    s = p.schedule
    if s is None or len(s.lanes) == 1:
        return ()
    out = [name for items in sends(s, lane, messages_of(p)) for name, _ in items]
    return (CollectiveCount(STAGES, "send", len(out), sum(p.types[name].local_bytes(p.mesh) for name in out)),)


def _means(
    p: Program, steps: Sequence[Program], where: Mesh, counted: Sequence[RankBytes], collectives: Sequence[Sequence[CollectiveCount]], flops: Sequence[int], whole: int
) -> Sums:
    """What the closed forms are held against: of the mean rank of a pipeline."""
    n = len(steps)
    sent, state_of = Counter[str](), Counter[str]()
    for c in (c for found in collectives for c in found):
        sent[whole_axis(c.axis)] += c.bytes
    for step in steps:
        state_of.update(_sent_for_state(step))
    grads = sum(step.types[name].nbytes for step in steps for name in gradients(step))
    return Sums(
        where, p.mesh.sizes.get(TIME, 1), p.schedule.stages if p.schedule is not None else 1, _whole(i.type for i in p.by_role("param")), grads,
        _whole(i.type for i in p.by_role("state")), _used(p), _cast(p), whole, sum(c.param_bytes for c in counted) / n, sum(c.gathered_bytes for c in counted) / n, sum(c.grad_bytes for c in counted) / n,
        sum(c.optimizer_bytes for c in counted) / n, sum(flops) / n, {a: b / n for a, b in sent.items()}, {a: b / n for a, b in state_of.items()},
    )  # fmt: skip


def _readers(p: Program, value: str) -> list[Op]:
    """What forward and backward do with a parameter, on whatever stage."""
    users = [u for u in p.uses[value] if isinstance(u, Op) and u.phase != "update"]
    return [r for u in users for r in (_readers(p, u.name) if u.target == TRANSFER else [u])]


def _used(p: Program) -> int:
    """Bytes of the parameters in the dtypes in which forward and backward read them."""
    total = 0
    for i in p.by_role("param"):
        users = _readers(p, i.name)
        cast = all(u.target == "cast" for u in users) and bool(users)
        total += min([i.type.nbytes, *(u.type.nbytes for u in users if cast)])
    return total


def _cast(p: Program) -> tuple[int, int]:
    """Bytes of the parameters that forward and backward read as a shorter cast only, and of the casts."""
    found = [(i.type, _readers(p, i.name)) for i in p.by_role("param")]
    short = [(t.nbytes, users[0].type.nbytes) for t, users in found if users and all(shortens(u, p) for u in users)]
    return sum(whole for whole, _ in short), sum(cast for _, cast in short)


def _sent_for_state(p: Program) -> Counter[str]:
    """Bytes by axis of the collectives that gather weights, reduce gradients or belong to the update."""
    weights, out = params_only(p), Counter[str]()
    for op in p.ops:
        if is_collective(op) and (op.phase == "update" or op.refs[0].name in weights):
            out[whole_axis(str(op.kw("axis")))] += sent_bytes(p, op)
    return out


# counting ------------------------------------------------------------------------------------------------------------


def gradients(p: Program) -> tuple[str, ...]:
    """The gradients as the update reads them: values that cross from backward into update, after the collectives that they
    cross by."""
    update = {result for op in p.ops if op.phase == "update" for result in op.results}
    moved = {result for op in p.ops if op.phase == "update" and _moves(op) for result in op.results}
    backward = {result for op in p.ops if op.phase == "backward" for result in op.results}
    source: dict[str, str] = {}  # a value that only moved -> where it came from
    for op in p.ops:
        if op.name in moved:
            source |= {result: source.get(ref.name, ref.name) for result, ref in zip(op.results, op.refs, strict=False)}  # of a bucket, each
    found: dict[str, None] = {}
    for op in p.ops:
        if op.phase != "update" or op.name in moved:
            continue
        for ref in op.refs:
            origin = source.get(ref.name, ref.name)
            if origin in backward and origin not in update and p.types[ref.name].dtype in FLOATS and p.types[ref.name].shape:
                found[ref.name] = None
    return tuple(found)


def count_collectives(p: Program, microbatches: int = 1) -> tuple[CollectiveCount, ...]:
    """Of a whole step; ``microbatches``: how often what stands in a loop runs. Messages between stages are no collectives."""
    count: Counter[tuple[str, str]] = Counter()
    sent: Counter[tuple[str, str]] = Counter()
    for op in p.ops:
        if is_collective(op):
            key = (str(op.kw("axis")), op.target.removesuffix(".start"))
            times = 1 if not op.part or runs_once(op.part) else microbatches
            count[key] += times
            sent[key] += times * sent_bytes(p, op)
    order = {axis: n for n, name in enumerate(p.mesh.names) for axis in (name, whole_axis(name))}
    return tuple(CollectiveCount(*key, count[key], sent[key]) for key in sorted(count, key=lambda k: (order[k[0]], k[1])))


def _local(p: Program, types: Iterable[Type]) -> int:
    return sum(t.local_bytes(p.mesh) for t in types)


def _whole(types: Iterable[Type]) -> int:
    return sum(t.nbytes for t in types)


def _moves(op: Op) -> bool:
    return op.target in MOVES or op.target.endswith(".start")


def _stage(p: Program) -> int:
    def split(role: str) -> bool:
        return any(isinstance(e, Split) and whole_axis(axis) in BATCH_AXES for i in p.by_role(role) for axis, e in i.type.layout.elements)

    return 3 if split("param") else 1 if split("state") else 0


def _unruled(p: Program) -> Iterable[UnruledOp]:
    for op in p.ops:
        if _moves(op) or op.target == "fused" or op.target.startswith("optim.") or op.target in DECOMPOSITIONS:
            continue  # what stands whole again was placed by its parts
        if rule_of(op.target) is None:
            starts = [s for r in op.refs for s in _arrived_by(p, r.name)]
            yield UnruledOp(op.name, op.target, op.path, sum(sent_bytes(p, s) for s in starts))


def _arrived_by(p: Program, value: str) -> Iterable[Op]:
    """The collectives that brought a value into the layout in which it is used."""
    while (op := p.producers.get(value)) is not None and _moves(op):
        if is_collective(op):
            yield op
        value = op.refs[0].name


def _replicated(p: Program) -> Iterable[ReplicatedOp]:
    axes = [axis for axis, n in p.mesh.axes if n > 1 and axis != TIME]
    for op in p.ops:
        if not (flops := local_flops(p, op)):
            continue
        layouts = [p.types[r.name].layout for r in op.refs] + [t.layout for t in op.types]
        for axis in axes:
            if not any(isinstance(layout.on(axis), Split) for layout in layouts):
                yield ReplicatedOp(op.name, op.target, op.path, axis, flops, sum(t.local_bytes(p.mesh) for t in op.types))
    matrices = {i.name: i for _, i, _ in _matrix_uses(p)}
    for axis in axes:
        stored = [i for i in p.by_role("param") if i.type.layout.on(axis) is None]
        split = len(stored) < len(p.by_role("param"))
        for i in stored:
            batch = whole_axis(axis) in BATCH_AXES
            if (i.name in matrices and not batch) or (split and batch):
                yield ReplicatedOp(i.name, "param", i.key, axis, 0, i.type.local_bytes(p.mesh))


# weights -------------------------------------------------------------------------------------------------------------


def _matrix_uses(p: Program) -> list[tuple[Op, Input, Type]]:
    """(op, weight, as the op reads it) for each product or lookup of the forward that reads a parameter, be it cast, transposed or gathered."""
    root = {i.name: i for i in p.by_role("param")}
    out = []
    for op in p.ops:
        if op.target in CARRIERS or op.target.endswith(".start"):
            if op.refs[0].name in root:
                root[op.name] = root[op.refs[0].name]
        elif op.phase == "forward" and (op.target == "embedding" or cost.flops(op, [p.types[r.name] for r in op.refs])):
            out += [(op, root[r.name], p.types[r.name]) for r in op.refs if r.name in root]
    return out


def _weights(p: Program) -> tuple[Weight, ...]:
    uses: dict[str, set[str]] = {}
    for op, weight, read in _matrix_uses(p):
        for axis in p.mesh.names:
            split = read.layout.on(axis)
            if whole_axis(axis) in BATCH_AXES or not isinstance(split, Split):
                continue
            contracted = isinstance(op.type.layout.on(axis), Partial)
            word = ("vocabulary" if contracted else "column") if op.target == "embedding" else "row" if contracted else "column"
            word = "expert" if op.target == "routed_mm" and split.dim == 0 else word
            uses.setdefault(weight.name, set()).add(f"{whole_axis(axis)}: {word}")
    grouped: Counter[tuple[str, str, str]] = Counter()
    for i in p.by_role("param"):
        key = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", i.key)
        grouped[key, format_type(i.type, p.mesh), ", ".join(sorted(uses.get(i.name, ())))] += 1
    return tuple(Weight(key, n, layout, use) for (key, layout, use), n in grouped.items())
