"""Is every op of a program an instance of its rule? Layouts of operands and results against the factors of the op.

What moves data has no rule and a form of its own: ``reshard`` may change any element, a collective only the element of its
axis, in the way of its kind (MOVES). Operands and results of an op lie in one memory, the host's or the device's; ``to_host.start`` and
``to_device.start`` alone bring a value from one to the other, and what ranks exchange lies on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from deepseed.ir.collective import IN_TIME, LOCAL, MEMORIES, TO_DEVICE, TO_HOST
from deepseed.ir.layout import Element, Layout, Owned, Partial, Split, routes
from deepseed.ir.mesh import TIME, Mesh, whole_axis
from deepseed.ir.program import Op, Program, Type
from deepseed.ir.subaxes import joint
from deepseed.ir.text import format_type
from deepseed.rules import is_instance, show
from deepseed.rules.owned import GRADIENTS, TABLES

# kind -> what the operand is on the axis, what the result is
MOVES = {
    "all_gather.start": ("split", "whole"),
    "all_reduce.start": ("partial", "whole"),
    "reduce_scatter.start": ("partial", "split"),
    "all_to_all.start": ("split", "split"),
    "dispatch.start": ("split", "owned"),
    "combine.start": ("owned", "split"),
    "shard": ("whole", "split"),
    "summand": ("whole", "sum"),
    "share": ("whole", "sum"),
    "accumulate": ("partial", "whole"),
    "collect": ("split", "whole"),
}
SAME = ("wait", "transfer", *MEMORIES)  # what brings a value as it lies
KEYED = ("dispatch.start", "combine.start")  # the second operand are the ids that own the rows
_KINDS = {"whole": ("whole",), "split": ("split",), "partial": ("sum", "max", "owned"), "sum": ("sum",), "owned": ("owned",)}


class TypingError(ValueError):
    """An op whose layouts are no instance of its rule: names node, module path, line, layouts, and why."""


@dataclass
class Typed:
    """What was found well typed on one mesh. Programs after one another share most of their ops, and of these the operands' types."""

    mesh: Mesh = field(default_factory=Mesh)
    types: dict[str, Type] = field(default_factory=dict)  # of the values that the ops read
    ops: dict[int, Op] = field(default_factory=dict)  # these very ops, by id
    keys: set[tuple[object, ...]] = field(default_factory=set)  # of instances
    owned: bool = False  # whether any of them has rows that ids own

    def onward(self, p: Program) -> None:
        """Forget what does not hold of ``p``: all on another mesh, the ops where a value has another type now."""
        if self.mesh != p.mesh:
            self.mesh, self.types, self.keys, self.owned = p.mesh, {}, set(), False
        known = self.types
        if any([known.get(name, t) is not t and known[name] != t for name, t in p.types.items()]) or not known:
            self.ops = {}
        known.update(p.types)


def check_types(p: Program, known: Typed | None = None) -> None:
    """Raise TypingError at the first op whose operand and result layouts are no instance of its rule. ``known``: what earlier programs
    have shown; what this one shows is added."""
    known = Typed() if known is None else known
    known.onward(p)
    ops, keys = known.ops, known.keys
    for op in p.ops:
        if id(op) in ops:
            continue
        operands = operand_types(p, op)
        key = instance_key(op, operands)
        if key not in keys:
            why = why_not(op, operands, p.mesh)
            if why is not None:
                raise TypingError(f"{describe(op, operands, p.mesh)}\n  {why}")
            keys.add(key)
            known.owned = known.owned or any(isinstance(e, Owned) for t in (*operands, *op.types) for _, e in t.layout.elements)
        ops[id(op)] = op
    if known.owned:
        _check_keys(p)


def _check_keys(p: Program) -> None:
    """Rows owned by ids meet a table that is looked up by those ids, and travel by those ids: the same value, however it was moved since."""
    moved: dict[str, str] = {}
    for op in p.ops:
        if op.target in MOVES or op.target in SAME or op.target == "reshard":
            moved.update((result, moved.get(r.name, r.name)) for result, r in zip(op.results, op.refs, strict=False))
            own = _travels(op, operand_types(p, op)) if len(op.refs) == 2 and len(op.results) == 1 else None
            if own is not None and own.key != (by := moved.get(op.refs[1].name, op.refs[1].name)):
                raise TypingError(f"{describe(op, operand_types(p, op), p.mesh)}\n  rows are owned by %{own.key}, they travel by %{by}")
        elif op.target in TABLES or op.target in GRADIENTS:
            ids, types = op.refs[-1].name, (*operand_types(p, op), *op.types)
            split = {axis for t in types for axis, e in t.layout.elements if isinstance(e, Split)}
            for t in types:
                for axis, e in t.layout.elements:
                    if isinstance(e, Owned) and axis in split and e.key != moved.get(ids, ids):
                        raise TypingError(f"{describe(op, operand_types(p, op), p.mesh)}\n  rows on {axis} are owned by %{e.key}, the table is looked up by %{moved.get(ids, ids)}")


def operand_types(p: Program, op: Op) -> tuple[Type, ...]:
    """The types of an op's operands, in the layouts that it wants."""
    types = p.types
    return tuple([types[r.name] if r.want is None else types[r.name].laid(r.want) for r in op.refs])


def instance_key(op: Op, operands: Sequence[Type]) -> tuple[object, ...]:
    """Equal for ops that differ in names, module path and site only."""
    return *op.form, tuple(operands), op.types


def why_not(op: Op, operands: Sequence[Type], mesh: Mesh) -> str | None:
    """None where the op is well typed; else the reason, which names axis, dimension and the elements that disagree."""
    why = _memory(op, operands)
    if why is not None:
        return why
    layouts = [t.layout for t in operands]
    for name, layout in zip([*(f"%{r.name}" for r in op.refs), *(f"%{r}" for r in op.results)], [*layouts, *(t.layout for t in op.types)], strict=True):
        if len({kind for _, kind in layout.partials}) > 1:
            return f"{name} is a sum over one axis and a maximum over another: their order would matter"
    if op.target == "reshard" or op.target in SAME or op.target in MOVES:
        return _moves(op, operands, mesh)
    return is_instance(op, layouts, operands, mesh)


def describe(op: Op, operands: Sequence[Type], mesh: Mesh) -> str:
    """``%y = aten.mm(f32[8@dp, 4], f32[4, 6]) : f32[8@dp, 6] at mlp.up (train.py:12), mesh(dp=2)``."""
    names = ", ".join(f"%{r}" for r in op.results)
    args = ", ".join(f"%{r.name} {format_type(t, mesh)}" for r, t in zip(op.refs, operands, strict=True))
    kwargs = "".join(f", {k}={v!r}" for k, v in op.kwargs)
    where = (f"\n  at {op.path or 'the top level'}" + (f" ({op.line})" if op.line else "")) + f", {op.phase}, {mesh}"
    return f"{names} = {op.target}({args}{kwargs}) : {', '.join(format_type(t, mesh) for t in op.types)}{where}"


def _memory(op: Op, operands: Sequence[Type]) -> str | None:
    """Why an op may not have its operands and results where they lie."""
    sides = [(f"%{r.name}", t.host) for r, t in zip(op.refs, operands, strict=True)]
    if op.target not in MEMORIES:
        sides += [(f"%{r}", t.host) for r, t in zip(op.results, op.types, strict=True)]
    elif odd := next((r for r, t in zip(op.results, op.types, strict=True) if t.host is not (op.target == TO_HOST)), None):
        return f"{op.target} makes %{odd} {'on the device' if op.target == TO_HOST else 'on the host'}; it brings a value to the other memory"
    want = op.target == TO_DEVICE if op.target in MEMORIES else sides[0][1] if sides else False
    if (op.target in MOVES and op.target.endswith(".start")) or op.target == "transfer":
        want = False
    wrong = next((name for name, host in sides if host is not want), None)
    if wrong is None:
        return None
    here, there = ("host", "device") if want else ("device", "host")
    return f"{op.target} runs on the {here}, and {wrong} lies on the {there}; to_{here}.start and wait bring it"


def _moves(op: Op, operands: Sequence[Type], mesh: Mesh) -> str | None:
    if op.target in KEYED or (op.target == "reshard" and len(operands) == 2 and len(op.types) == 1):
        why = _key(op, operands, mesh)
        if why is not None:
            return why
        operands = operands[:1]
    if len(operands) != len(op.types):
        return f"{op.target} has {len(operands)} operands and {len(op.types)} results"
    for a, b in zip(operands, op.types, strict=True):
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return f"{op.target} changes {a.dtype}{list(a.shape)} to {b.dtype}{list(b.shape)}; it may change the layout only"
        if op.target in SAME and a.layout != b.layout:
            return f"{op.target} changes the layout from {_elements(a.layout)} to {_elements(b.layout)}; it may not"
        if op.target in MOVES:
            why = _collective(op, a.layout, b.layout, mesh)
            if why is not None:
                return why
    return None


def _travels(op: Op, operands: Sequence[Type]) -> Owned | None:
    """How the rows are owned that a move with ids takes to their owners or back."""
    found = [routes(operands[0].layout.on(axis), op.type.layout.on(axis)) for axis, _ in (*operands[0].layout.elements, *op.type.layout.elements)]
    return next((own for own in found if own is not None), None)


def _key(op: Op, operands: Sequence[Type], mesh: Mesh) -> str | None:
    """The ids of a move to the owners of rows, or back: one a row, whole on the axis, elsewhere split as the rows are."""
    if len(operands) != 2 or len(op.types) != 1:
        return f"{op.target} has {len(operands)} operands and {len(op.types)} results; it takes the rows and their ids, and has one result"
    (x, ids), own = operands, _travels(op, operands)
    if own is None:
        return f"{op.target} moves no rows between their split and their owners: from {_elements(x.layout)} to {_elements(op.type.layout)}"
    if ids.dtype not in ("i64", "i32") or ids.shape != x.shape[own.dim : own.dim + 1]:
        return f"rows of dimension {own.dim} of {list(x.shape)} need {x.shape[own.dim]} ids; they are {ids.dtype}{list(ids.shape)}"
    axis = next(a for a, _ in (*x.layout.elements, *op.type.layout.elements) if routes(x.layout.on(a), op.type.layout.on(a)) is not None)
    if own.of % mesh.size(axis):
        return f"{mesh.size(axis)} ranks of {axis} cannot share {own.of} ids evenly"
    for side in (x, op.type):
        rows = Layout.of(**{a: Split(0, e.outer, e.of) for a, e in side.layout.splits(own.dim) if a != axis})
        if ids.layout != rows:
            return f"ids lie as {_elements(ids.layout)}, the rows as {_elements(rows)}; they differ, or the ids are not whole on {axis}"
    return None


def _collective(op: Op, source: Layout, target: Layout, mesh: Mesh) -> str | None:
    axis = op.kw("axis")
    if not isinstance(axis, str):
        return f"{op.target} needs axis=, the mesh axis over which it runs"
    if axis not in mesh.sizes and axis in map(whole_axis, mesh.names):
        joined, wanted = joint(source, axis, mesh), joint(target, axis, mesh)
        if joined is None or wanted is None:
            return f"{op.target} over all of {', '.join(mesh.parts(axis))}, which do not split side by side"
        source, target = joined, wanted
    for other in sorted({a for layout in (source, target) for a, _ in layout.elements} - {axis}):
        if source.on(other) != target.on(other):
            return f"{op.target} over {axis} changes {other} from {show(source.on(other))} to {show(target.on(other))}; it may change {axis} only"
    if (op.target in IN_TIME) != (axis == TIME) and op.target not in LOCAL:
        return f"{op.target} over {axis}: {'microbatches follow one another, accumulate and collect are for them' if axis == TIME else 'accumulate and collect are for microbatches'}"
    a, b = source.on(axis), target.on(axis)
    want_a, want_b = MOVES[op.target]
    if _kind(a) not in _KINDS[want_a] or _kind(b) not in _KINDS[want_b]:
        return f"{op.target} makes {want_b} of {want_a} over {axis}; here it makes {show(b)} of {show(a)}"
    if op.target == "all_to_all.start" and a == b:
        return f"{op.target} over {axis} changes nothing: both sides are {show(a)}"
    return None


def _kind(element: Element) -> str:
    if isinstance(element, Owned):
        return "owned"
    return "whole" if element is None else element.op if isinstance(element, Partial) else "split"


def _elements(layout: Layout) -> str:
    return ", ".join(f"{axis}: {show(e)}" for axis, e in layout.elements) or "whole"
