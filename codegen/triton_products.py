"""A matrix product and what follows it element by element, as one kernel: the block of the product that a program has is a value at each point like any other.

Programs are numbered so that GROUP rows of blocks go down each column of blocks: what runs at the same time reads the same parts of both operands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

from deepseed.codegen.any_rows import NONE, Free, stands_for
from deepseed.codegen.block_sizes import Blocks, product_sizes
from deepseed.codegen.expressions import CodegenError
from deepseed.codegen.index_maps import Var
from deepseed.codegen.spaces import VIEWS, Indices, Space
from deepseed.codegen.triton_kernel import Kernel
from deepseed.codegen.triton_ops import TYPES, Register, computed
from deepseed.codegen.triton_places import Plan, every
from deepseed.ir.program import FLOATS, ITEMSIZE, Op, Program

GROUP = 8


def as_leaf(p: Program, product: Op) -> Program:
    """The program in which the product is there at each point, so that nothing else follows from its operands."""
    leaf = replace(product, target="full", args=(), kwargs=(("value", 0.0),))
    return replace(p, ops=tuple([leaf if op is product else op for op in p.ops]))


def plan_of(p: Program, product: Op, space: Space, targets: Sequence[str], chosen: Blocks | None) -> Plan:
    a, b = (p.types[r.name] for r in product.refs)
    if a.dtype != b.dtype or a.dtype not in FLOATS:
        raise CodegenError(f"%{product.name} = {product.target} of {a.dtype} and {b.dtype}: no Triton product of them\n  fix: none is needed, the group runs as Python")
    columns: frozenset[Var] = space.index[product.name][1].vars
    return Plan(space, columns, True, tuple(targets), (), chosen or product_sizes(a.shape[0], b.shape[1], a.shape[1], ITEMSIZE[a.dtype], held(p, product, targets)))


def held(p: Program, product: Op, targets: Sequence[str]) -> int:
    """Values of the product's size that a kernel holds at once, at most, as it is written: each value when it is first asked for, backwards from what is stored."""
    times: dict[str, list[int]] = {product.name: [0]}  # when each is made, and used

    def ask(value: str) -> str:
        """What is in its register."""
        op = p.producers.get(value)
        if op is not None and op.target in VIEWS:
            return ask(op.refs[0].name)
        if value not in times:
            reads = [ask(r.name) for r in op.refs] if op is not None else []
            now = 1 + max(n for each in times.values() for n in each)
            for each in (value, *reads):
                times.setdefault(each, []).append(now)
        return value

    for t in targets:
        ask(t)
    wide = [times[v] for v in times if p.types[v].numel == product.type.numel]
    return max(1, *(sum(each[0] <= n < each[-1] for each in wide) for n in range(max(each[-1] for each in wide) + 1)))


class Product(Kernel):
    """``product``: the op, which ``p`` has as a leaf."""

    def __init__(self, p: Program, product: Op, plan: Plan, memory: Mapping[str, bool], name: str, free: Free = NONE) -> None:
        super().__init__(p, plan, memory, name, free)
        self.product = product
        self.columns, self.looped = True, False
        self.masks = {axis: self.sizes[axis] % block != 0 for axis, block in (("x", plan.blocks.x), ("r", plan.blocks.r))}
        self.first, self.first_r = "pid_x", "pid_r"

    def grid(self) -> tuple[str, ...]:
        down, across = self._blocks(self.sizes["x"], self.plan.blocks.x), -(-self.sizes["r"] // self.plan.blocks.r)
        return (str(int(down) * across) if down.isdigit() else f"{down} * {across}",)

    def write(self) -> list[str]:
        lines, b = self.scopes[0].lines, self.plan.blocks
        down, across = self._blocks(self.sizes["x"], b.x), -(-self.sizes["r"] // b.r)
        if stands_for(self.sizes["r"], self.free)[0] or stands_for(self.p.types[self.product.refs[0].name].shape[1], self.free)[0]:
            raise CodegenError(f"%{self.product.name} = {self.product.target} has any number of columns, or contracts any number\n  fix: none is needed, the group runs as Python")
        if down != "1" and across > 1:
            lines += [
                "pid = tl.program_id(0)", f"first_x = pid // {GROUP * across} * {GROUP}", f"high = min({down} - first_x, {GROUP})",
                f"pid_x = first_x + pid % {GROUP * across} % high", f"pid_r = pid % {GROUP * across} // high",
            ]  # fmt: skip
        else:
            lines += [f"pid_x = {'tl.program_id(0)' if across == 1 else 'tl.program_id(0) * 0'}", f"pid_r = {'tl.program_id(0)' if across > 1 else 'tl.program_id(0) * 0'}"]
        lines += ["x = pid_x * XB + tl.arange(0, XB)[:, None]", "r = pid_r * RB + tl.arange(0, RB)[None, :]"]
        lines += [f"{axis}_in = {axis} < {self.sizes[axis]}" for axis in "xr" if self.masks[axis]]
        self._contract(lines)
        self._stores(self.plan.targets)
        return lines

    def _contract(self, lines: list[str]) -> None:
        """The block of the product in float32, or float64."""
        a, b = (r.name for r in self.product.refs)
        k, blocks = self.p.types[a].shape[1], self.plan.blocks
        for value in (a, b):
            t = self.p.types[value]
            self.read[value] = None
            self._count(value, t.numel)
            self.strides |= {f"{value}_s0": t.shape[1], f"{value}_s1": 1}
        self._call({"product"})
        tail = k % blocks.k != 0
        wide = [".to(tl.int64)" if prod(map(self._most, self.p.types[v].shape)) >= 1 << 31 else "" for v in (a, b)]
        lines += [
            "k = tl.arange(0, KB)", f"left = {a} + x{wide[0]} * {a}_s0 + k[None, :] * {a}_s1", f"right = {b} + k[:, None] * {b}_s0 + r{wide[1]} * {b}_s1",
            f"acc = tl.zeros([XB, RB], {TYPES[computed(self.product.type.dtype)]})", f"for first in range(0, {k}, KB):",
        ]  # fmt: skip
        for name, axis, along in (("left", "x", "k[None, :]"), ("right", "r", "k[:, None]")):
            masks = ([f"{axis}_in"] if self.masks[axis] else []) + ([f"({along} < {k} - first)"] if tail else [])
            lines.append(f"    {name}_ = tl.load({name}" + (f", mask={every(masks)}, other=0)" if masks else ")"))
        lines += ["    acc = product(left_, right_, acc)", f"    left += KB * {a}_s1", f"    right += KB * {b}_s0"]

    def _value(self, value: str, index: Indices) -> Register:
        if value != self.product.name:
            return super()._value(value, index)
        if index != self.plan.space.index[value]:
            raise CodegenError(f"%{value} = {self.product.target} is read at another place than it is made at\n  fix: none is needed, the group runs as Python")
        return Register("acc", computed(self.product.type.dtype), frozenset("xr"))

    def _emit_store(self, pointer: str, place: str, value: Register, axes: frozenset[str], level: int, conditions: Sequence[str]) -> None:
        for axis in "xr":
            if self.sizes[axis] == 1:  # no index has it, the block does
                place, axes = f"{place} + {axis} * 0", axes | {axis}
        super()._emit_store(pointer, place, value, axes, level, conditions)
