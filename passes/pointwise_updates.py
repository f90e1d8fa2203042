"""Optimizers of any kind as one op a tensor, where they work element by element: ``optim.pointwise`` with the ops that were captured; helper of ``group_kernels``.

What makes a parameter's new value and those of its states from the gradient on, in the update, is taken together, numbers among it, as far as nothing else reads them: the gradient's cast and its
clipping too. What other parameters read as well (one of the learning rate's) stays apart, as do new values that are numbers, a step count's. An optimizer is left as it is where something else
reads a new value and comes back (a norm of the new momentum), where two tensors have one new value, or states another dtype than the parameter.

    before: %m = aten.mul.Tensor(%state.m/w, 0.9) : f32[8, 4]              after: %w.new, %m.new = optim.pointwise(%w, %state.m/w, %g, %rate, operands=["param", "s0", "grad", "n0"], ..)
            %m.new = aten.add.Tensor(%m, %g, alpha=0.1) : f32[8, 4]
            %s = aten.mul.Tensor(%m.new, %rate) : f32[8, 4]
            %w.new = aten.sub.Tensor(%w, %s) : f32[8, 4]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from deepseed.ir.mesh import Mesh
from deepseed.ir.program import FLOATS, ITEMSIZE, Arg, Input, Op, Output, Program, Ref, Type
from deepseed.ir.updates import POINTWISE, SIZE, body_of
from deepseed.passes.fuse_kinds import POINT, kind_of
from deepseed.passes.in_order import in_order


@dataclass
class _Update:
    """``old``: what is replaced, and how the body calls it, by the new value."""

    old: Mapping[str, tuple[str, str]]
    ops: list[Op]


def pointwise_updates(p: Program) -> Program:
    at = {op.name: n for n, op in enumerate(p.ops)}
    found = [u for u in _updates(p, at) if len(u.ops) > 1]
    gone = {op.name for u in found for op in u.ops}
    last: dict[str, Op] = {}
    for u in found:
        last[max((op.name for op in u.ops), key=at.__getitem__)] = _op(p, u)
    return replace(p, ops=tuple(in_order(p, [[last.get(op.name, op)] for op in p.ops if op.name in last or op.name not in gone])))


def _updates(p: Program, at: Mapping[str, int]) -> Iterator[_Update]:
    stored = {(i.role, i.key): i.name for i in p.inputs}
    for o in p.outputs:
        if o.role != "param" or (o.role, o.key) not in stored:
            continue
        root, old = _block(p, o.ref.name, stored[o.role, o.key])
        if not old or not _makes(p, root) or not p.types[root].shape:
            continue
        t, new = p.types[root], [(root, old)]
        new += [(s.ref.name, stored[s.role, s.key]) for s in p.outputs if s.role == "state" and s.key.partition("/")[2] == o.key and (s.role, s.key) in stored and _makes(p, s.ref.name) and _alike(p.types[s.ref.name], t)]
        values = [value for value, _ in new]
        if not all(_alike(p.types[name], t) for each in new for name in each) or any(values.count(value) + sum(not isinstance(u, Op) for u in p.uses[value]) > 2 for value in values):
            continue
        ops = _slice(p, values, t, at)
        if ops and not _comes_back(p, values, ops):
            yield _Update({value: (old, f"s{n - 1}" if n else "param") for n, (value, old) in enumerate(new)}, ops)


def _comes_back(p: Program, new: Sequence[str], ops: Sequence[Op]) -> bool:
    """Whether what the ops read depends on what they make, by ops that are not of them."""
    inside, behind = {op.name for op in ops}, set(new)
    for op in p.ops:
        if op.name not in inside and any(r.name in behind for r in op.refs):
            behind.update(op.results)
    return any(r.name in behind and r.name not in inside for op in ops for r in op.refs)


def _block(p: Program, new: str, old: str) -> tuple[str, str]:
    """The new value and the old one that a rank works on: its blocks, where it gathers the others'. No old one: something else is done to them."""
    made = p.producers.get(new)
    if made is None or made.target != "wait":
        return new, old
    gather = p.producers[made.refs[0].name]
    if gather.target != "all_gather.start":
        return new, ""
    block = gather.refs[gather.results.index(made.refs[0].name)].name
    cut = [u.name for u in p.uses[old] if isinstance(u, Op) and u.target == "shard" and u.phase == "update" and u.type == p.types[block]]
    return block, cut[0] if len(cut) == 1 else ""


def _makes(p: Program, value: str) -> bool:
    op = p.producers.get(value)
    return op is not None and op.phase == "update" and kind_of(op, p) == POINT


def _alike(a: Type, b: Type) -> bool:
    return (a.dtype, a.shape, a.layout, a.host) == (b.dtype, b.shape, b.layout, b.host) and a.dtype in FLOATS


def _slice(p: Program, new: Sequence[str], t: Type, at: Mapping[str, int]) -> list[Op]:
    """The ops behind the new values that nothing else needs, in order; none where a new value is not of them."""
    place = (p.producers[new[0]].part, p.producers[new[0]].stage)
    inside: dict[str, Op] = {}
    pending = list(new)
    while pending:
        op = p.producers.get(pending.pop())
        if op is None or op.name in inside or op.phase != "update" or kind_of(op, p) != POINT or (op.part, op.stage) != place or op.type.host != t.host or _rounds(p, op):
            continue
        if op.type.shape and (op.type.shape, op.type.layout) != (t.shape, t.layout):
            continue
        if any(p.types[r.name].shape and (p.types[r.name].shape, p.types[r.name].layout) != (t.shape, t.layout) for r in op.refs):
            continue
        inside[op.name] = op
        pending += [r.name for r in op.refs]
    for name in sorted(inside, key=at.__getitem__, reverse=True):
        if name not in new and any(not isinstance(u, Op) or u.name not in inside for u in p.uses[name]):
            del inside[name]
    needed, pending = set[str](), [name for name in new if name in inside]
    while pending:
        name = pending.pop()
        if name in inside and name not in needed:
            needed.add(name)
            pending += [r.name for r in inside[name].refs]
    return [inside[name] for name in sorted(needed, key=at.__getitem__)] if all(name in needed for name in new) else []


def _rounds(p: Program, op: Op) -> bool:
    """Whether it is a cast to fewer bits, which a kernel that keeps more in its registers would not make: of elements, or of a number to 16."""
    x = p.types[op.refs[0].name].dtype if op.refs else ""
    return op.target == "cast" and x in FLOATS and op.type.dtype in FLOATS and ITEMSIZE[op.type.dtype] < ITEMSIZE[x] and (bool(op.type.shape) or ITEMSIZE[op.type.dtype] == 2)


def _op(p: Program, u: _Update) -> Op:
    made, olds = {op.name for op in u.ops}, [old for old, _ in u.old.values()]
    read = [name for name in dict.fromkeys(r.name for op in u.ops for r in op.refs) if name not in made and name not in olds]
    tensors, numbers = [name for name in read if p.types[name].shape], [name for name in read if not p.types[name].shape]
    words = {**dict(u.old.values()), **{name: "grad" if not n else f"x{n}" for n, name in enumerate(tensors)}, **{name: f"n{n}" for n, name in enumerate(numbers)}}
    names = {**words, **{op.name: f"v{n}" for n, op in enumerate(u.ops)}}
    operands = [*olds, *tensors, *numbers]
    inputs = tuple([Input(words[name], _sized(p.types[name]), "batch", words[name]) for name in operands])
    inner = tuple([_bare(op, names) for op in u.ops])
    body = body_of(Program("update", Mesh(()), inputs, inner, tuple([Output(Ref(names[new]), "output", new) for new in u.old])))
    kwargs: tuple[tuple[str, Arg], ...] = (
        ("operands", tuple(words[name] for name in operands)), ("numbers", tuple(words[name] for name in numbers)), ("body", body), ("results", tuple(names[new] for new in u.old)),
    )  # fmt: skip
    like = u.ops[-1]
    return Op(tuple(u.old), POINTWISE, tuple([Ref(name) for name in operands]), tuple([p.types[new] for new in u.old]), kwargs, "update", like.path, like.line, "", like.part, like.stage)


def _sized(t: Type) -> Type:
    return Type(t.dtype, (SIZE,) if t.shape else ())


def _bare(op: Op, names: Mapping[str, str]) -> Op:
    op = op.map_refs(lambda r: Ref(names[r.name]))
    return replace(op, results=(names[op.name],), types=(_sized(op.type),), path="", line="", origin="", part="", stage=0, kernel="")
