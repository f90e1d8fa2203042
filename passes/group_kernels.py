"""Emit what was taken apart, and needed not be, as the op it came from; the updates of one optimizer side by side; and, for a back end that compiles them, groups of ops.

An origin group becomes its op again where nothing came between (no collective inside, no inner value read outside) and the
layouts are an instance of that op's own rule in deepseed.rules; an op without a rule only where everything is whole. So typing
and the instance checks judge the result like any other op. Decomposing then costs nothing where it was not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product

from deepseed.ir.collective import MEMORIES
from deepseed.ir.contract import program_pass
from deepseed.ir.layout import Element, Layout, Partial
from deepseed.ir.program import FLOATS, ITEMSIZE, Builder, Op, Program, Ref, Type
from deepseed.ir.updates import formula_of, place_of
from deepseed.passes.fuse import fuse
from deepseed.passes.fuse_alike import fuse_alike
from deepseed.passes.fuse_kinds import leaves_apart
from deepseed.passes.fuse_products import alone, fuse_products
from deepseed.passes.in_order import in_order
from deepseed.passes.pointwise_updates import pointwise_updates
from deepseed.passes.remake import remade
from deepseed.passes.weights_per_phase import once
from deepseed.rules import is_instance, rule_of

_MOVES = (
    "wait", "shard", "summand", "share", "transfer", "all_gather.start", "all_reduce.start", "reduce_scatter.start", "all_to_all.start", "dispatch.start", "combine.start",
    *MEMORIES,
)  # fmt: skip
OPTIMIZER = "optim."
WIDENED = 1 << 21  # bytes of gradients that are widened for one call of torch's optimizers: they stay in the cache, and are never held twice
ON_A_DEVICE = 1 << 30  # bytes that a group may make live longer where kernels are a device's: a launch costs more than what its caches hold
APART = {"aten._fused_rms_norm", "aten._fused_rms_norm_backward"}  # torch has these on some devices only


@program_pass(requires={"lowered"}, provides={"grouped"})
def group_kernels(p: Program, kernels: bool = False, products: str = "") -> Program:
    """Replace origin groups by their ops, then put the updates of equal options side by side. ``kernels``: updates of other optimizers too (deepseed.passes.pointwise_updates); what is pointwise or reduces rows stays apart, and is marked as groups for
    a back end that compiles them (deepseed.passes.fuse), attention as a group of its own; ``products``, "alone": large matrix products too, "joined": all, with what works on their results (deepseed.passes.fuse_products).

    before: %y.amax = amax(%x, dims=[1], keepdim=true) : f32[8@dp, 1] {origin="y"}
            %y.sub = aten.sub.Tensor(%x, %y.amax) : f32[8@dp, 16] {origin="y"}
            %y.exp = aten.exp(%y.sub) : f32[8@dp, 16] {origin="y"}
            %y.sum = sum(%y.exp, dims=[1], keepdim=true) : f32[8@dp, 1] {origin="y"}
            %y = aten.div.Tensor(%y.exp, %y.sum) : f32[8@dp, 16] {origin="y"}
    after:  %y = aten._softmax(%x, -1, false) : f32[8@dp, 16]
    """
    joined = products == "joined"
    p = _scale_in_update(_regroup(once(p), kernels, joined), kernels)
    if not kernels:
        return _gather_updates(p, WIDENED)
    p = fuse(remade(_gather_updates(pointwise_updates(_widened_in_update(p)))), columns=joined)
    return fuse_alike(fuse_products(p), sums=True, held=ON_A_DEVICE) if joined else fuse_alike(alone(p, products == "alone"))


# groups -------------------------------------------------------------------------------------------------------------


def _regroup(p: Program, kernels: bool = False, products: bool = False) -> Program:
    at = {op.name: n for n, op in enumerate(p.ops)}
    members: dict[str, list[int]] = {}
    for n, op in enumerate(p.ops):
        if op.origin:
            members.setdefault(op.origin, []).append(n)
    gone: set[int] = set()
    before: dict[int, list[Op]] = {}  # position -> whole ops to emit there
    for key, whole in p.origins:
        if kernels and not whole.target.startswith(OPTIMIZER) and leaves_apart(p, [p.ops[n] for n in members.get(key, ())], products):
            continue
        found = _whole_op(p, at, whole, members.get(key, ()))
        if found is not None:
            position, op, replaced = found
            gone.update(replaced)
            before.setdefault(position, []).append(op)
    done = {p.ops[n].origin for n in gone}
    out = Builder(p)
    out.origins = {key: op for key, op in p.origins if key in members and key not in done}
    for n, op in enumerate(p.ops):
        for whole in before.get(n, ()):
            out.emit(whole)
        if n not in gone:
            out.emit(replace(op, origin="") if op.origin in done else op)
    return out.program()


def _whole_op(p: Program, at: Mapping[str, int], whole: Op, members: Sequence[int]) -> tuple[int, Op, Sequence[int]] | None:
    """The op that its group amounts to, where it can stand, and what it replaces; None where the group must stay as it is."""
    if whole.target.startswith(OPTIMIZER):
        if not _fusable(p, whole):
            return None
        whole, members = _without_step(p, at, whole, members)
    if not members or whole.target in APART:
        return None
    ops = [p.ops[n] for n in members]
    made = {result for op in ops for result in op.results}
    if any(r in p.types and r not in made for r in whole.results):
        return None
    operands = {ref.name for ref in whole.refs}
    arrived: dict[str, str] = {}  # operand -> the value in which the group reads it, in the layout that it wants
    for op in ops:
        for ref in op.refs:
            if ref.name in made:
                continue
            source = _source(p, ref.name, operands)
            if source not in operands or arrived.setdefault(source, ref.name) != ref.name:
                return None
    if any(name not in p.types for name in operands):
        return None
    if len({(op.part, op.stage) for op in ops}) > 1:
        return None
    outside = [u for r in made for u in p.uses[r] if not isinstance(u, Op) or u.origin != ops[0].origin]
    inner = made - set(whole.results)
    if any(not isinstance(u, Op) or u.origin != ops[0].origin for r in inner for u in p.uses[r]):
        return None
    position = min([members[-1], *(at[u.name] for u in outside if isinstance(u, Op))])
    if not _unread(p, operands, arrived, ops[0]):
        return None
    op = whole.map_refs(lambda ref: Ref(arrived.get(ref.name, ref.name)))
    if any(ref.name in p.producers and at[p.producers[ref.name].name] >= position for ref in op.refs):
        return None
    typed = _typed(p, op)
    if typed is None:
        return None
    last = ops[-1]
    return position, replace(typed, phase=last.phase, path=last.path, line=last.line, part=last.part, stage=last.stage, origin=""), members


def _unread(p: Program, operands: set[str], arrived: dict[str, str], member: Op) -> bool:
    """Give the op a stand-in for each operand that no member of the group reads: what the op computes does not depend on it, so any value of its type
    that the group reads will do, and that one is there, in the op's memory and on its stage. False: there is none, and it lies elsewhere."""
    stages = {i.name: i.stage for i in p.inputs}
    for name in sorted(operands - arrived.keys()):
        t, made = p.types[name], p.producers.get(name)
        alike = [other for source, other in arrived.items() if source in operands and _alike(p.types[other], t)]
        if alike:
            arrived[name] = alike[0]
        elif t.host != member.type.host or (made.stage if made is not None else stages[name]) != member.stage:
            return False
    return True


def _alike(a: Type, b: Type) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape)


def _source(p: Program, name: str, operands: set[str]) -> str:
    """The operand that a value brings, in another layout maybe."""
    while name not in operands and name in p.producers and p.producers[name].target in _MOVES:
        moved = p.producers[name]
        name = moved.refs[moved.results.index(name)].name  # of a bucket, its own
    return name


def _typed(p: Program, op: Op) -> Op | None:
    """The op with the layouts that its results have in the program, if these are an instance of its rule. A result that nothing
    reads (and that the group does not make) gets whatever layout makes it one."""
    operands = [p.types[ref.name] for ref in op.refs]
    host = bool(operands) and operands[0].host
    if any(t.host != host for t in operands):
        return None
    types = [p.types.get(r, t.on(host)) for r, t in zip(op.results, op.types, strict=True)]
    if not all(_alike(a, b) for a, b in zip(types, op.types, strict=True)):
        return None
    free = [n for n, r in enumerate(op.results) if r not in p.types]
    for axis in p.mesh.names if free else ():
        elements = _elements_on(axis, [*operands, *types])
        one = [t.laid(Layout.of(**{axis: t.layout.on(axis)})) for t in (*operands, *types)]
        for choice in product(elements, repeat=len(free)):
            tried = list(one[len(operands) :])
            for n, element in zip(free, choice, strict=True):
                tried[n] = tried[n].laid(Layout.of(**{axis: element}))
            if _instance(p, replace(op, types=tuple(tried)), one[: len(operands)]):
                for n, element in zip(free, choice, strict=True):
                    types[n] = types[n].laid(types[n].layout.with_(axis, element))
                break
        else:
            return None
    op = replace(op, types=tuple(types))
    return op if _instance(p, op, operands) else None


def _elements_on(axis: str, types: Sequence[Type]) -> list[Element]:
    found: list[Element] = [None, Partial("sum")]
    for t in types:
        if t.layout.on(axis) not in found:
            found.append(t.layout.on(axis))
    return found


def _instance(p: Program, op: Op, operands: Sequence[Type]) -> bool:
    try:
        return is_instance(op, [t.layout for t in operands], operands, p.mesh) is None
    except ValueError:
        return False


# optimizers ---------------------------------------------------------------------------------------------------------


def _fusable(p: Program, op: Op) -> bool:
    """A fused update needs a rule to be judged by, one float dtype for parameter, gradient and moments, and known states."""
    dtypes = {t.dtype for t in (p.types.get(r.name) for r in op.refs[:-1]) if t is not None and t.shape}
    floating = not dtypes or (len(dtypes) == 1 and dtypes <= set(FLOATS))
    return rule_of(op.target) is not None and floating


def _without_step(p: Program, at: Mapping[str, int], whole: Op, members: Sequence[int]) -> tuple[Op, Sequence[int]]:
    """The update without its step count: the kernel reads the count of this step, ops that make the stored one stay on their own.

    before: %w.new, %step.new, %m.new = optim.x(%w, %g, %step, %m, %lr, states=["step", "m"])
    after:  %w.new, %m.new = optim.x(%w, %g, %step.new, %m, %lr, states=["step", "m"])
    """
    states = whole.kw("states")
    if not isinstance(states, tuple) or "step" not in states:
        return whole, members
    i = states.index("step")
    new = whole.results[1 + i]
    alone: set[int] = set()
    pending = [new]
    while pending:
        op = p.producers.get(pending.pop())
        if op is not None and op.origin and at[op.name] in members and at[op.name] not in alone:
            alone.add(at[op.name])
            pending += [ref.name for ref in op.refs]
    made = p.producers.get(new)
    counted = made.args[2] if made is not None and made.target == "aten.where.self" and whole.kw("skip") == made.args[0] else Ref(new)
    whole = replace(
        whole,
        args=(*whole.args[: 2 + i], counted, *whole.args[3 + i :]),
        results=(*whole.results[: 1 + i], *whole.results[2 + i :]),
        types=(*whole.types[: 1 + i], *whole.types[2 + i :]),
    )
    return whole, [n for n in members if n not in alone]


def _scale_in_update(p: Program, kernels: bool) -> Program:
    """A gradient that is scaled for updates only is scaled by these: no scaled copy is made. Without ``kernels`` torch's update scales it in place.

    before: %c = aten.mul.Tensor(%g, %factor) : f32[8]
            %w.new = optim.x(%w, %c, %lr) : f32[8]
    after:  %w.new = optim.x(%w, %g, %lr, scale=%factor) : f32[8]
    """
    order = {op.name: n for n, op in enumerate(p.ops)}
    scaled = {
        op.name: op for op in p.ops
        if op.target == "aten.mul.Tensor" and len(op.refs) == len(op.args) == 2 and _for_updates(p, op.name)
        and not p.types[op.refs[1].name].shape and p.types[op.refs[1].name].dtype == op.type.dtype and (kernels or (len(p.uses[op.name]) == 1 and _last_read_by(p, op, order)))
    }  # fmt: skip
    out = Builder(p)
    for op in p.ops:
        grad = op.args[1] if _updates(op) else None
        if isinstance(grad, Ref) and grad.name in scaled:
            g, factor = scaled[grad.name].refs
            out.emit(replace(op, args=(op.args[0], g, *op.args[2:]), kwargs=(*op.kwargs, ("scale", factor))))
        elif op.name not in scaled:
            out.emit(op)
    return out.program()


def _widened_in_update(p: Program) -> Program:
    """A gradient with fewer bits than its parameter is widened by the update, element by element: no wide copy is made for it.

    before: %g.wide = cast(%g) : f32[8]                 after: %w.new = optim.x(%w, %g, %lr) : f32[8]
            %w.new = optim.x(%w, %g.wide, %lr) : f32[8]
    """
    widened = {op.name: op.refs[0] for op in p.ops if op.target == "cast" and op.type.dtype in FLOATS and (x := p.types[op.refs[0].name]).dtype in FLOATS and ITEMSIZE[x.dtype] < ITEMSIZE[op.type.dtype]}
    gone = {name for name in widened if _for_updates(p, name)}
    out = Builder(p)
    for op in p.ops:
        grad = op.args[1] if _updates(op) else None
        if isinstance(grad, Ref) and grad.name in widened:
            op = replace(op, args=(op.args[0], widened[grad.name], *op.args[2:]))
        if op.name not in gone:
            out.emit(op)
    return out.program()


def _for_updates(p: Program, value: str) -> bool:
    """Whether updates read a value as their gradient, and nothing else reads it."""
    return bool(p.uses[value]) and all(isinstance(u, Op) and _updates(u) and [r.name for r in u.refs].count(value) == 1 and u.args[1] == Ref(value) for u in p.uses[value])


def _updates(user: object) -> bool:
    return isinstance(user, Op) and user.target.startswith(OPTIMIZER)


def _last_read_by(p: Program, scaling: Op, order: Mapping[str, int]) -> bool:
    """Whether the gradient's memory may be overwritten: it is a collective's or a matmul's own result, nothing reads it later, and
    it is no other parameter's gradient too."""
    g = scaling.refs[0].name
    made = p.producers.get(g)
    while made is not None and made.target == "reshape" and len(p.uses[made.refs[0].name]) == 1:  # another view of memory that nothing else reads
        made = p.producers.get(made.refs[0].name)
    if made is None or made.target not in ("wait", "aten.mm", "embedding_backward", "sum", "cast", "accumulate"):
        return False
    return sum(isinstance(u, Op) and u.target == "aten.mul.Tensor" for u in p.uses[g]) == 1 and all(isinstance(u, Op) and order[u.name] <= order[scaling.name] and u.target in ("aten.mul.Tensor", "sum_of_squares") for u in p.uses[g])


def _gather_updates(p: Program, room: int = 0) -> Program:
    """All updates of parameters of one dtype side by side, where the last one stood, those with the same options first, so that a back end can make one
    call of them; with ``room`` those with the same options, and as many as that many bytes of gradients were widened for. What reads a result earlier follows them.

    before: %a.new = optim.sgd(%a, %a.g, %lr)           after: %b.g = ..
            %a.out.start = all_gather.start(%a.new)            %a.new = optim.sgd(%a, %a.g, %lr)
            %b.g = ..                                          %b.new = optim.sgd(%b, %b.g, %lr)
            %b.new = optim.sgd(%b, %b.g, %lr)                  %a.out.start = all_gather.start(%a.new)
    """
    groups: dict[tuple[object, ...], list[Op]] = {}
    widened: dict[tuple[object, ...], int] = {}  # bytes of the gradients that were cast for it
    behind, waits = set[str](), 0  # what depends on updates; after how many of these that do themselves
    for op in p.ops:
        depends = any(r.name in behind for r in op.refs)
        if op.target.startswith(OPTIMIZER):
            if depends:
                behind, waits = set(), waits + 1
            depends = True
            key: tuple[object, ...] = (*place_of(op), waits)
            if room:
                key, cast = (*key, formula_of(p, op)), p.producers.get(op.refs[1].name)
                if cast is not None and cast.target == "cast" and cast.phase == "update":
                    widened[key] = widened.get(key, 0) + cast.type.local_bytes(p.mesh)
                key = (*key, widened.get(key, 0) // room)
            groups.setdefault(key, []).append(op)
        if depends:
            behind.update(op.results)
    last = {ops[-1].name: sorted(ops, key=_first_alike(p, ops)) for ops in groups.values()}
    early = {op.name for ops in groups.values() for op in ops[:-1]}
    return replace(p, ops=tuple(in_order(p, [last.get(op.name, [op]) for op in p.ops if op.name not in early])))


def _first_alike(p: Program, ops: Sequence[Op]) -> Callable[[Op], int]:
    """Where the first of those stands that a kernel treats alike."""
    first: dict[tuple[object, ...], int] = {}
    for n, op in enumerate(ops):
        first.setdefault(formula_of(p, op), n)
    return lambda op: first[formula_of(p, op)]
