"""How values lie in memory: strides, and which values share the storage of their operand.

Whether ``reshape`` is a view is decided as PyTorch decides it, from strides, which are tracked from op to op. Liveness
(deepseed.memory) counts storages by it, and plan_memory what it costs to keep a value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from deepseed.ir.collective import MEMORIES, Place, Step, arrives, sent, step
from deepseed.ir.layout import contiguous as contiguous
from deepseed.ir.program import Op, Program
from deepseed.rules.pointwise import POINTWISE

Strides = tuple[int, ...]
LAID_OUT = ("all_gather.start", "all_to_all.start")  # what they bring is joined from blocks
SMALL = 1024  # a tensor of less than this part of its bucket is copied out of it (deepseed.runtime.collectives)
UNROLLED = ("accumulate", "collect", "transfer")  # as deepseed.unroll writes them


class Lying:
    """How the values of a lowered program lie on one rank; ``strides`` by value, filled op by op by whoever walks the program."""

    def __init__(self, p: Program) -> None:
        self.p = p
        self.strides: dict[str, Strides] = {i.name: contiguous(i.type.local(p.mesh)) for i in p.inputs}
        self._exchanged: dict[str, list[tuple[int, int]]] = {}

    def view(self, op: Op) -> Strides | None:
        """The result's strides where it shares its first operand's storage, else None."""
        if op.target not in ("reshape", "permute", "expand", "slice", "cast", "sum", "amax", "shard", "wait", *UNROLLED):
            return None
        if op.target in UNROLLED:  # into what there was; the first sum takes its operand, the first of a whole makes it; from another rank: new
            return self.strides[op.refs[0].name] if len(op.refs) > (op.target == "collect") else None
        x = op.refs[0].name
        old, strides = self.p.types[x], self.strides[x]
        shape, out = old.local(self.p.mesh), op.type.local(self.p.mesh)
        if op.target == "reshape":
            return reshaped(shape, strides, out)
        if op.target == "permute":
            return tuple(strides[d] for d in _ints(op, "dims"))
        if op.target == "expand":
            lead = len(out) - len(shape)
            return (0,) * lead + tuple(0 if size != new else s for size, new, s in zip(shape, out[lead:], strides, strict=True))
        if op.target == "slice":
            ((dim,), (by,)) = _ints(op, "dim"), _ints(op, "step", 1)
            return tuple(s * by if d == dim else s for d, s in enumerate(strides))
        if op.target == "shard":
            place = self.step(op).take
            return strides if place is not None and place.outer == 1 else None
        if op.target == "wait":
            return self._joined(op)
        if op.target == "cast" or not _ints(op, "dims"):
            return strides if old.dtype == op.type.dtype else None
        return None

    def fresh(self, op: Op, shape: tuple[int, ...]) -> Strides:
        """Strides of a new tensor: pointwise ops keep a dense operand's order, attention lays heads inside rows."""
        if op.target in ("sdpa", "sdpa_backward") and len(shape) == 4:
            _, h, s, d = shape
            return (s * h * d, d, h * d, 1)
        if op.target == "cast" or op.target in POINTWISE:
            for ref in op.refs:
                if self.p.types[ref.name].local(self.p.mesh) == shape and _dense(shape, self.strides[ref.name]):
                    return self.strides[ref.name]
        return contiguous(shape)

    def step(self, op: Op, operand: int = 0) -> Step:
        before, after = self.p.types[op.refs[operand].name], op.types[operand]
        return step(before.shape, before.layout, after.layout, str(op.kw("axis")), self.p.mesh, len(op.refs) > len(op.results))

    def exchange(self, start: Op) -> list[tuple[int, int]]:
        """Of each operand of a collective, the elements that the rank brings and those that arrive, padding included."""
        if start.name not in self._exchanged:
            n, found = self.p.mesh.size(str(start.kw("axis"))), []
            for i, _ in enumerate(start.results):
                s, shape = self.step(start, i), self.p.types[start.refs[i].name].local(self.p.mesh)
                found.append((prod(sent(s, shape, n)), arrives(s, shape, n)))
            self._exchanged[start.name] = found
        return self._exchanged[start.name]

    def _joined(self, op: Op) -> Strides | None:
        """A gathered buffer is [n, ...]: joined at the front it is the result, elsewhere the result is a copy."""
        start, shape = self.p.producers[op.refs[0].name], op.type.local(self.p.mesh)
        if start.target in MEMORIES:
            return contiguous(shape)
        number = start.results.index(op.refs[0].name)
        s = self.step(start, number)
        if len(start.results) > 1:  # a packed buffer holds a gathered tensor in pieces
            arriving = [elements for _, elements in self.exchange(start)]
            if start.target in LAID_OUT or SMALL * arriving[number] < sum(arriving):
                return None
        elif s.put is not None and not in_front(shape, s.put):
            return None
        return contiguous(shape) if s.take is None else _own(s.take, shape, self.p.mesh.size(s.axis))


def laid_out(p: Program, given: Mapping[str, Strides] | None = None) -> tuple[dict[str, Strides], list[bool]]:
    """The strides of every value on one rank as far as they can be told, and for each op whether it makes a view. ``given``: of inputs that are not contiguous."""
    lying, views = Lying(p), []
    lying.strides.update(given or {})
    for op in p.ops:
        received = op.target == "wait" and p.producers[op.refs[0].name].target == "receive.start"
        view = None if received or not op.refs else lying.view(op)
        views.append(view is not None)
        for r, t in zip(op.results, op.types, strict=True):
            lying.strides[r] = view if view is not None else lying.fresh(op, t.local(p.mesh))
    return lying.strides, views


def _own(take: Place, shape: tuple[int, ...], n: int) -> Strides | None:
    """How a rank's part of a block lies, whose end is padding where the block is another rank's too: a copy where it is in pieces."""
    block = take.outer * -(-take.of // n) * take.rest
    if not take.of or shape[take.dim] == block:
        return contiguous(shape)
    return None if take.outer > 1 else contiguous((*shape[: take.dim], block, *shape[take.dim + 1 :]))


def reshaped(shape: Sequence[int], strides: Strides, new: Sequence[int]) -> Strides | None:
    """The strides of a reshape that is a view; None where it must copy (ATen's computeStride).

    >>> reshaped((4, 6), (6, 1), (2, 2, 6)), reshaped((4, 6), (1, 4), (24,))
    ((12, 6, 1), None)
    """
    if prod(shape) == 0:
        return contiguous(new)
    out: list[int] = [1] * len(new)
    d = len(new) - 1
    have = want = 1
    base = strides[-1] if shape else 1
    for i in reversed(range(len(shape))):
        have *= shape[i]
        if i == 0 or (shape[i - 1] != 1 and strides[i - 1] != have * base):  # the end of a stretch that lies in order
            while d >= 0 and (want < have or new[d] == 1):
                out[d] = want * base
                want *= new[d]
                d -= 1
            if want != have:
                return None
            if i > 0:
                base, have, want = strides[i - 1], 1, 1
    return tuple(out)


def _dense(shape: Sequence[int], strides: Strides) -> bool:
    """Every element once, without gaps, in some order of the dimensions."""
    n = 1
    for stride, size in sorted((s, size) for s, size in zip(strides, shape, strict=True) if size > 1):
        if stride != n:
            return False
        n *= size
    return True


def in_front(shape: Sequence[int], place: Place) -> bool:
    return place.outer * prod(shape[: place.dim]) == 1


def _ints(op: Op, name: str, default: int | None = None) -> tuple[int, ...]:
    value = op.kw(name, default)
    items = value if isinstance(value, tuple) else (value,)
    return tuple(i for i in items if isinstance(i, int))
