"""Sums and maxima: of a row that the program holds, into an accumulator over rows, and of a short buffer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deepseed.codegen.expressions import CodegenError
from deepseed.codegen.index_maps import Index, Var
from deepseed.codegen.spaces import Indices, reduced_dims
from deepseed.codegen.triton_ops import TYPES, Register, computed, converted
from deepseed.codegen.triton_places import every, word
from deepseed.codegen.triton_values import Values
from deepseed.ir.program import FLOATS, Op


class Reductions(Values):
    """A reduction at a point: of what its operand is along the row."""

    # reductions -------------------------------------------------------------------------------------------------------

    def _reduction(self, op: Op, index: Indices) -> Register:
        x = op.refs[0].name
        dtype, shape, dims = computed(op.type.dtype), self.p.types[x].shape, reduced_dims(self.p, op)
        if x in self.memory and self.memory[x] and op.type.numel == 1 and (x in self.views or x not in self.plan.space.index):
            return self._whole(op)
        if all(shape[d] == 1 for d in dims):
            given = iter(index)
            r = self.at(x, index if len(index) == len(shape) else tuple(Index() if d in dims else next(given) for d in range(len(shape))))
            text = converted(r, dtype)
            return self._emit(word(op.name), f"{text} * {text}" if op.target == "sum_of_squares" else text, dtype, r.axes, r.level)
        made = self.plan.space.index.get(op.name)
        if made is None or self.plan.space.reduced(self.p, op) != self.plan.row or not self.plan.rows:
            raise CodegenError(f"%{op.name} = {op.target}: its dimensions are not the row of this kernel")
        binding = next((b for b in self._values(self.plan.unrolled) if tuple(i.put(b) for i in made) == index), None)
        if binding is None:
            raise CodegenError(f"%{op.name} = {op.target} is read at another place than it is made at")
        if self.looped:
            raise CodegenError(f"%{op.name} = {op.target} was not made before it is read")
        binding = {v: i for v, i in binding.items() if v not in self.plan.row}
        parts = [self._masked(op, r, frozenset("r")) for r in self._operands(op, binding)]
        text = parts[0]
        for part in parts[1:]:
            text = self._joined(op, text, part)
        axes = frozenset[str]().union(*(r.axes for r in self._operands(op, binding))) - {"r"}
        return self._emit(word(op.name), self._reduced(op, text, 1), dtype, axes, self.level["r"] if not axes else 0)

    def _operands(self, op: Op, binding: Mapping[Var, Index]) -> list[Register]:
        """What a reduction adds up, once for each value of the unrolled variables that it adds up over."""
        index = self.plan.space.index[op.refs[0].name]
        reduced = self.plan.space.reduced(self.p, op) or frozenset()
        out = []
        for values in self._values([v for v in self.plan.unrolled if v in reduced]):
            both = {**binding, **values}
            r = self.at(op.refs[0].name, tuple(i.put(both) for i in index))
            dtype = computed(op.type.dtype)
            if r.dtype != dtype:
                r = self._emit(f"{r.name}_wide", converted(r, dtype), dtype, r.axes, r.level)
            out.append(self._emit(f"{r.name}_square", f"{r.name} * {r.name}", dtype, r.axes, r.level) if op.target == "sum_of_squares" else r)
        return out

    def _masked(self, op: Op, r: Register, axes: frozenset[str]) -> str:
        """With the elements outside of the tensor, and those that a register stands for, as a reduction must see them."""
        masked = {a for a in axes if self.masks[a]}
        text = f"tl.where({every([f'{a}_in' for a in sorted(masked, reverse=True)])}, {r.name}, {self._start(op)})" if masked else r.name
        block = ("[XB, RB]" if "r" in axes else "[XB, 1]") if self.plan.rows else "[XB]"
        return text if axes <= r.axes | masked else f"({text} + tl.zeros({block}, {TYPES[r.dtype]}))"

    def _reduced(self, op: Op, text: str, axis: int, keep: bool = True) -> str:
        """Of a block along an axis; not ``keep``: a number, of a block that has no other axis."""
        kept = ", keep_dims=True" if keep else ""
        if op.target != "amax":
            return f"tl.sum({text}, {axis}{kept})"
        if op.type.dtype not in FLOATS:
            return f"tl.max({text}, {axis}{kept})"
        self._call({"amax"})
        return f"amax({text}, {axis})" if keep else f"tl.sum(amax({text}, {axis}), {axis})"

    def _joined(self, op: Op, a: str, b: str) -> str:
        if op.target != "amax":
            return f"{a} + {b}"
        return f"tl.maximum({a}, {b}, propagate_nan=tl.PropagateNan.ALL)" if op.type.dtype in FLOATS else f"tl.maximum({a}, {b})"

    @staticmethod
    def _start(op: Op) -> str:
        if op.target == "amax" and op.type.dtype not in FLOATS:
            return {"bool": "False", "u8": "0"}.get(op.type.dtype, str(-(2 ** ({"i8": 8, "i16": 16, "i32": 32}.get(op.type.dtype, 64) - 1))))
        return 'float("-inf")' if op.target == "amax" else "0"

    def _whole(self, op: Op) -> Register:
        """Of a short buffer, by every program that asks."""
        x = op.refs[0].name
        n = self.p.types[x].numel
        self.read[x] = None
        size = 1 << (n - 1).bit_length()
        dtype = computed(op.type.dtype)
        mask = f", mask=tl.arange(0, {size}) < {n}, other={self._start(op)}" if size != n else ""
        base, offset = self.views.get(x, (x, 0))
        self.read.pop(x)
        self.read[base] = None
        self._count(x, n)
        text = f"tl.load({word(base)} + {f'{offset} + ' if offset else ''}tl.arange(0, {size}){mask}).to({TYPES[dtype]})"
        if op.target == "sum_of_squares":
            r = self._emit(f"{word(x)}_all", text, dtype, frozenset())
            text = f"{r.name} * {r.name}"
        return self._emit(word(op.name), self._reduced(op, text, 0, keep=False), dtype, frozenset())

    def _take(self, op: Op, name: str, registers: Sequence[Register], at_level: int, whole: bool = True) -> None:
        """Add operands to an accumulator of the block's shape; not ``whole``: of its rows."""
        lines = self.scopes[at_level].lines
        along = self.plan.rows and "r" in self._axes(self.plan.space.index[op.refs[0].name])  # a register may be one number for the row, of a value that has it many times
        for register in registers:
            text = self._masked(op, register, frozenset("xr" if (whole and self.plan.rows) or along else "x"))
            if not whole and along:
                text = self._reduced(op, text, 1)
            lines.append(f"{name} = {self._joined(op, name, text)}")

    # softmax of a row that does not fit ------------------------------------------------------------------------------------

    def _rescaled(self, op: Op) -> Op | None:
        """The maximum of x where ``op`` is the sum of exp(x - maximum): both can be made in one pass."""
        power = self._plain(op.refs[0].name)
        if op.target != "sum" or power is None or power.target != "aten.exp":
            return None
        difference = self._plain(power.refs[0].name)
        if difference is None or difference.target != "aten.sub.Tensor" or len(difference.refs) != 2 or difference.kwargs:
            return None
        x, most = difference.refs
        maximum = self._plain(most.name)
        if maximum is None or maximum.target != "amax" or maximum.refs[0] != x or maximum.type.dtype != op.type.dtype:
            return None
        return maximum

    def _plain(self, value: str) -> Op | None:
        """What makes a value, but for its shape."""
        op = self.p.producers.get(value)
        while op is not None and op.target in ("reshape", "expand") and value not in self.memory:
            value = op.refs[0].name
            op = self.p.producers.get(value)
        return None if value in self.memory else op

    def _take_online(self, op: Op, name: str, sums: Sequence[str], registers: Sequence[Register], at_level: int) -> None:
        """Each lane of the block has its own maximum so far; the lane's sum is rescaled where that grows."""
        lines = self.scopes[at_level].lines
        for register in registers:
            lines.append(f"{name}_more = {self._joined(op, name, self._masked(op, register, frozenset('xr')))}")
            for total in sums:
                masks = [f"{a}_in" for a in "xr" if self.masks[a]]
                there = every([*masks, f'({register.name} != float("-inf"))'])
                lines.append(f"{total} = {total} * tl.where({name} == {name}_more, 1.0, tl.exp({name} - {name}_more)) + tl.where({there}, tl.exp({register.name} - {name}_more), 0.0)")
            lines.append(f"{name} = {name}_more")
