"""What a plan does to a program: what is split where, what is sent, what it costs, and what was left whole.

Everything is counted from the program itself, op by op, on local shapes; no tensor is made, so a model of any size can be
explained. Beside the counts stand the closed forms of deepseed.closed_forms, which share no code with them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

from deepseed import closed_forms as form
from deepseed import cost
from deepseed.ir.collective import KEYED
from deepseed.ir.layout import Partial, Split
from deepseed.ir.mesh import whole_axis
from deepseed.ir.program import FLOATS, Input, Op, Program, Type, params_only
from deepseed.ir.text import format_type
from deepseed.memory import memory
from deepseed.passes.canonicalize import DECOMPOSITIONS
from deepseed.rules import rule_of

EXPERT_AXIS = "ep"
DATA_AXIS, SEQUENCE_AXIS = "dp", "sp"
BATCH_AXES = (DATA_AXIS, SEQUENCE_AXIS)  # they split the batch and share the state; weights are used whole on them
MOVES = ("reshard", "shard", "summand", "wait")  # and *.start
CARRIERS = ("cast", "permute", "reshape", "expand", "slice", *MOVES)  # what leads from a weight to the op that uses it


@dataclass(frozen=True)
class RankBytes:
    """Bytes on one rank. ``grad_bytes``: gradients alive when they are clipped; ``peak_bytes``: the most alive at once."""

    rank: int
    coordinate: Mapping[str, int]
    param_bytes: int
    grad_bytes: int
    optimizer_bytes: int
    other_bytes: int  # buffers and constants
    peak_bytes: int


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
class ClosedForm:
    what: str
    formula: str
    expected: float | None  # None: the formula has a symbol that a program does not tell
    counted: float
    unit: str


@dataclass(frozen=True)
class Explanation:
    mesh: Mapping[str, int]
    zero: int
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

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def explain(p: Program, *, seconds: Mapping[str, float] | None = None, zero: int | None = None) -> Explanation:
    """Count a lowered program, best the one that ranks run (after group_kernels); ``seconds`` by pass.

    ``zero``: the stage of the closed forms; read from the layouts where it is not given (2 lays everything out as 1 does).
    Raises ValueError on a program that still has reshards."""
    if "lowered" not in p.facts:
        raise ValueError(f"explain needs a program after lower_reshards; this one is {', '.join(sorted(p.facts)) or 'bare'}")
    grads = [p.types[name] for name in gradients(p)]
    params, state = [i.type for i in p.by_role("param")], [i.type for i in p.by_role("state")]
    others = [i.type for role in ("buffer", "constant") for i in p.by_role(role)]
    live = memory(p)
    one = RankBytes(0, {}, _local(p, params), _local(p, grads), _local(p, state), _local(p, others), live.peak_bytes)
    ranks = tuple(replace(one, rank=rank, coordinate=p.mesh.coordinate(rank)) for rank in range(p.mesh.ranks))  # shards are equal
    stage = zero if zero is not None else _stage(p)
    collectives = count_collectives(p)
    flops, whole = matmul_flops(p), sum(cost.flops(op, [p.types[r.name] for r in op.refs]) for op in p.ops)
    return Explanation(
        dict(p.mesh.sizes), stage, ranks, live.peak_at, collectives, flops, whole, _weights(p), tuple(_unruled(p)), tuple(_replicated(p)),
        tuple(_closed(p, stage, ranks[0], collectives, grads, flops, whole)), dict(seconds or {}),
    )  # fmt: skip


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


def count_collectives(p: Program) -> tuple[CollectiveCount, ...]:
    count: Counter[tuple[str, str]] = Counter()
    sent: Counter[tuple[str, str]] = Counter()
    for op in p.ops:
        if op.target.endswith(".start"):
            key = (str(op.kw("axis")), op.target.removesuffix(".start"))
            count[key] += 1
            sent[key] += sent_bytes(p, op)
    order = {axis: n for n, name in enumerate(p.mesh.names) for axis in (name, whole_axis(name))}
    return tuple(CollectiveCount(*key, count[key], sent[key]) for key in sorted(count, key=lambda k: (order[k[0]], k[1])))


def sent_bytes(p: Program, op: Op) -> int:
    """Bytes that one rank sends for a started collective."""
    kind, axis = op.target.removesuffix(".start"), str(op.kw("axis"))
    return sum(cost.sent_bytes(kind, p.types[r.name], t, axis, p.mesh) for r, t in zip(op.refs, op.types, strict=False))


def matmul_flops(p: Program) -> int:
    """Of one rank: the same formula on local shapes."""
    return sum(local_flops(p, op) for op in p.ops)


def local_flops(p: Program, op: Op) -> int:
    """Matmul flops of one op on one rank."""
    local = [replace(t, shape=t.local(p.mesh)) for t in op.types]
    flops = cost.flops(replace(op, types=tuple(local)), [replace(t, shape=t.local(p.mesh)) for t in (p.types[r.name] for r in op.refs)])
    matrices = {"routed_mm": p.types[op.refs[1].name], "routed_outer": op.type}.get(op.target) if len(op.refs) > 1 else None
    if matrices is not None:  # a rank computes the rows of its matrices, on average
        flops = flops * matrices.local(p.mesh)[0] // matrices.shape[0]
    return flops


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
        if op.target.endswith(".start"):
            yield op
        value = op.refs[0].name


def _replicated(p: Program) -> Iterable[ReplicatedOp]:
    axes = [axis for axis, n in p.mesh.axes if n > 1]
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


# closed forms --------------------------------------------------------------------------------------------------------


def _closed(
    p: Program, stage: int, rank: RankBytes, collectives: Sequence[CollectiveCount], grads: Sequence[Type], flops: int, whole: int
) -> Iterable[ClosedForm]:
    params, state = _whole(i.type for i in p.by_role("param")), _whole(i.type for i in p.by_role("state"))
    axes = [axis for axis in dict.fromkeys(map(whole_axis, p.mesh.names))]
    shared = [axis for axis in axes if axis in BATCH_AXES and p.mesh.size(axis) > 1]
    n = prod(p.mesh.size(axis) for axis in shared)
    known = {"Psi": params, "G": _whole(grads), "Omega": state, "N": n, "t": p.mesh.ranks // n, "F": whole}
    sent = Counter[str]()
    for c in collectives:
        sent[whole_axis(c.axis)] += c.bytes
    rows: list[tuple[str, Any, float, str]] = [
        ("parameters", form.param_bytes(stage), rank.param_bytes, "bytes"),
        ("gradients", form.grad_bytes(stage), rank.grad_bytes, "bytes"),
        ("optimizer", form.optimizer_bytes(stage), rank.optimizer_bytes, "bytes"),
        ("matmuls", form.matmul_flops(), flops, "flops"),
    ]
    state_of = Counter[str]()  # what is sent over the sequence axis for weights and gradients, not for activations
    if SEQUENCE_AXIS in shared:
        state_of.update(_sent_for_state(p))
        rows.append((f"state, {', '.join(shared)}", form.data_volume(stage), sum(state_of[axis] for axis in shared), "bytes"))
    elif shared:
        rows.append((f"sent over {DATA_AXIS}", form.data_volume(stage), sent[DATA_AXIS], "bytes"))
    for what, expression, counted, unit in rows:
        yield ClosedForm(what, str(expression), form.value(expression, **known), counted, unit)
    if SEQUENCE_AXIS in shared:
        yield ClosedForm(f"activations, {SEQUENCE_AXIS}", f"{form.sequence_volume()} elements", None, sent[SEQUENCE_AXIS] - state_of[SEQUENCE_AXIS], "bytes")
    for axis in axes:
        if axis not in (*BATCH_AXES, EXPERT_AXIS):
            yield ClosedForm(f"sent over {axis}", f"{form.tensor_volume()} elements", None, sent[axis], "bytes")


def _sent_for_state(p: Program) -> Counter[str]:
    """Bytes by axis of the collectives that gather weights, reduce gradients or belong to the update."""
    weights, out = params_only(p), Counter[str]()
    for op in p.ops:
        if op.target.endswith(".start") and (op.phase == "update" or op.refs[0].name in weights):
            out[whole_axis(str(op.kw("axis")))] += sent_bytes(p, op)
    return out


# the table -----------------------------------------------------------------------------------------------------------


def _lines(e: Explanation) -> Iterable[str]:
    mesh = ", ".join(f"{axis}={n}" for axis, n in e.mesh.items()) or "one rank"
    yield f"zero{e.zero} on mesh({mesh}), {len(e.ranks)} rank{'s' if len(e.ranks) > 1 else ''}; all numbers are of one rank and one step"
    yield ""
    yield f"  {'':16}{'counted':>12}   {'closed form':32}{'':>12}"
    for c in e.closed_forms:
        expected = "" if c.expected is None else amount(c.expected, c.unit)
        ratio = f"  x{c.counted / c.expected:.3f}" if c.expected else ""
        yield f"  {c.what:16}{amount(c.counted, c.unit):>12}   {c.formula:32}{expected:>12}{ratio}"
    yield f"  {'peak':16}{amount(e.ranks[0].peak_bytes):>12}   at %{e.peak_at}"
    if e.collectives:
        yield ""
        yield f"  {'axis':6}{'collective':16}{'count':>7}{'sent':>12}"
        for k in e.collectives:
            yield f"  {k.axis:6}{k.op:16}{k.count:>7}{amount(k.bytes):>12}" + ("  expected, of ids that are uniform" if k.op in KEYED else "")
    yield ""
    width = max([len(w.key) for w in e.weights] + [6]) + 2
    yield f"  {'weight':{width}}{'count':>5}  {'stored as':30}split in use"
    for w in _longest_first(e.weights):
        yield f"  {w.key:{width}}{w.count:>5}  {w.layout:30}{w.use}"
    if len(e.weights) > _SHOWN:
        yield f"  and {len(e.weights) - _SHOWN} more: --json lists all"
    yield from _left_whole(e)
    if e.seconds:
        yield ""
        yield "  seconds: " + ", ".join(f"{name} {s:.2f}" for name, s in e.seconds.items())


_SHOWN = 16


def _longest_first(weights: Sequence[Weight]) -> Sequence[Weight]:
    """Those that are split in use first, so that one screen shows the decisions."""
    return [w for w in weights if w.use][:_SHOWN] + [w for w in weights if not w.use][: max(0, _SHOWN - sum(bool(w.use) for w in weights))]


def _left_whole(e: Explanation) -> Iterable[str]:
    computed = [r for r in e.replicated_ops if r.flops]
    held = [r for r in e.replicated_ops if r.target == "param"]
    for title, ops in (
        ("repeated by every rank of an axis", [(r.axis, f"%{r.name} = {r.target} at {r.path or 'top'}", amount(r.flops, "flops")) for r in computed]),
        ("held whole by every rank of an axis", [(r.axis, r.path, amount(r.bytes)) for r in held]),
        ("no rule, so replicated", [("", f"%{u.name} = {u.target} at {u.path or 'top'}", f"{amount(u.bytes)} gathered") for u in e.unruled_ops]),
    ):
        if ops:
            yield ""
            yield f"  {title}: {len(ops)}"
            yield from (f"    {axis:4}{what}  {size}" for axis, what, size in ops[:4])
            if len(ops) > 4:
                yield f"    and {len(ops) - 4} more: --json lists all"


def amount(n: float, unit: str = "bytes") -> str:
    """``1536`` -> ``1.5 KiB``; flops in powers of 1000.

    >>> amount(1536), amount(12), amount(2.5e9, "flops")
    ('1.5 KiB', '12 B', '2.50 GFLOP')
    """
    step, names, digits = (1000.0, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"), 2) if unit == "flops" else (1024.0, ("B", "KiB", "MiB", "GiB", "TiB"), 1)
    at = 0
    while abs(n) >= step and at < len(names) - 1:
        n, at = n / step, at + 1
    return f"{n:.0f} {names[0]}" if at == 0 else f"{n:.{digits}f} {names[at]}"
