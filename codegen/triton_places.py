"""What a kernel's source is made of: lines in the loop that they depend on, registers, and places in memory as expressions of the block's axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod

from deepseed.codegen.any_rows import MOST, NONE, Free, stands_for
from deepseed.codegen.block_sizes import Blocks
from deepseed.codegen.index_maps import Atom, Index, Loaded, Quotient, Var
from deepseed.codegen.spaces import Indices, Space
from deepseed.codegen.triton_ops import TYPES, Register, computed, literal
from deepseed.ir.program import ITEMSIZE, Op, Program


@dataclass(frozen=True)
class Plan:
    """What a kernel computes. ``row``: the variables of the axis r. ``rows``: a block of two axes. ``partial``: reductions over x, one result a program; ``early``: those of them that
    wait for no reduction of a row, so that what they add up is not held across one."""

    space: Space
    row: frozenset[Var]
    rows: bool
    targets: tuple[str, ...]
    partial: tuple[str, ...]
    blocks: Blocks
    early: frozenset[str] = frozenset()

    @property
    def x(self) -> tuple[Var, ...]:
        return tuple(v for v in self.space.vars if v not in self.row and not v.unrolled)

    @property
    def r(self) -> tuple[Var, ...]:
        return tuple(v for v in self.space.vars if v in self.row and not v.unrolled)

    @property
    def unrolled(self) -> tuple[Var, ...]:
        return tuple(v for v in self.space.vars if v.unrolled)


@dataclass
class Scope:
    lines: list[str] = field(default_factory=list)
    kept: list[object] = field(default_factory=list)  # keys of what was evaluated here


class Places:
    """The kernel under construction. ``memory``: the values that lie in memory, and whether in row-major order for certain."""

    def __init__(self, p: Program, plan: Plan, memory: Mapping[str, bool], name: str, free: Free = NONE) -> None:
        """``free``: deepseed.codegen.any_rows."""
        self.p, self.plan, self.memory, self.name, self.free = p, plan, memory, name, dict(free)
        self.scopes = [Scope()]
        self.known: dict[object, Register] = {}
        self.level = {"x": 0, "r": 0}
        self.where: tuple[str, ...] = ()  # conditions under which what is evaluated now is used
        self.conditions: dict[str, Register] = {}
        self.registers: dict[str, Register] = {}  # that indices are made of
        self.called: set[str] = set()
        self.read: dict[str, None] = {}
        self.rows_only: set[str] = set()  # values that are read as if they lay in row-major order
        self.loaded_bytes = 0  # of all loads, each address once a load: what is read in two loops counts twice
        self.names: dict[str, int] = {}  # how many registers a word has
        self.given: set[str] = set()  # names of registers
        self.sizes = {"x": prod(v.size for v in plan.x), "r": prod(v.size for v in plan.r)}
        b = plan.blocks
        self.looped = plan.rows and bool(plan.row) and b.reduced and b.r < self.sizes["r"]
        self.columns = plan.rows and not b.reduced and self._several("r")  # programs along r
        self.masks = {"x": self.sizes["x"] > 1 or b.x > 1, "r": self.sizes["r"] % b.r != 0}
        self.bound: dict[Var, Index] = {}
        self.first = "tl.program_id(0)"  # 0 in the program that stores what is the same in all
        self.first_r = "tl.program_id(1)"
        self.strides: dict[str, int] = {}  # parameters that are strides whatever the layout, and what they are where rows lie in order
        self.views: Mapping[str, tuple[str, int]] = {}  # values that lie in a buffer of several, and where
        self.stored: Mapping[str, str] = {}  # dtypes in memory that are not the values' own

    def _several(self, axis: str) -> bool:
        """Whether an axis may have more than one block."""
        b = self.plan.blocks
        block = b.r if axis == "r" else b.rows if self.plan.partial else b.x
        return self.sizes[axis] > block or bool(stands_for(self.sizes[axis], self.free)[0])

    def _blocks(self, size: int, block: int) -> str:
        """How many there are."""
        return f"({size} + {block - 1}) // {block}" if stands_for(size, self.free)[0] else str(-(-size // block))

    def _most(self, size: int) -> int:
        """A size, or what it may be."""
        name, k = stands_for(size, self.free)
        return k * MOST if name else size

    def _count(self, value: str, elements: int) -> None:
        """A load of so many elements, or of all that there are where that is less: several points read the same, or a condition leaves some out."""
        t = self.p.types[value]
        self.loaded_bytes += min(elements, t.numel) * ITEMSIZE[self.stored.get(value, t.dtype)]

    def _bindings(self, index: Indices) -> list[dict[Var, Index]]:
        used = frozenset[Var]().union(*(i.vars for i in index))
        return self._values([v for v in self.plan.unrolled if v in used])

    @staticmethod
    def _values(unrolled: Sequence[Var]) -> list[dict[Var, Index]]:
        return [dict(zip(unrolled, map(Index, n), strict=True)) for n in product(*(range(v.size) for v in unrolled))]

    def _axes(self, index: Indices) -> frozenset[str]:
        used = frozenset[Var]().union(*(i.vars for i in index))
        return frozenset(a for a, group in (("x", self.plan.x), ("r", self.plan.r)) if used & set(group))

    # places -----------------------------------------------------------------------------------------------------------

    def place(self, e: Index) -> tuple[str, frozenset[str], int]:
        """An index as source, the axes it varies along, and the depth of the loop that it needs. Neighbouring variables are written as one."""
        words: list[str] = []
        axes: set[str] = set()
        level = 0
        terms = dict(e.terms)
        for axis, group in (("x", self.plan.x), ("r", self.plan.r)):
            n = 0
            while n < len(group):
                c = terms.pop(group[n], 0)
                if c:
                    end = n + 1
                    while end < len(group) and terms.get(group[end], 0) * group[end].size == c:
                        c = terms.pop(group[end])
                        end += 1
                    register = self._run(axis, group, n, end)
                    words.append(register.name if c == 1 else f"{register.name} * {c}")
                    axes.add(axis)
                    level = max(level, register.level)
                    n = end
                else:
                    n += 1
        for atom, c in terms.items():
            name, more, deep = self._atom(atom)
            words.append(name if c == 1 else f"{name} * {c}")
            axes |= more
            level = max(level, deep)
        if e.const or not words:
            words.append(str(e.const))
        return " + ".join(words).replace("+ -", "- "), frozenset(axes), level

    def _run(self, axis: str, group: Sequence[Var], n: int, end: int) -> Register:
        minor, size = prod(v.size for v in group[end:]), prod(v.size for v in group[n:end])
        if n == 0 and end == len(group):
            return Register(axis, "i32", frozenset(axis), self.level[axis])
        key = (axis, n, end)
        if key not in self.known:
            text = axis if minor == 1 else f"{axis} // {minor}"
            text = text if n == 0 else f"{text} % {size}"
            self.known[key] = register = self._emit(f"{axis}_{''.join(v.name for v in group[n:end])}", text, "i32", frozenset(axis))
            self.scopes[register.level].kept.append(key)
        return self.known[key]

    def _atom(self, atom: Atom) -> tuple[str, frozenset[str], int]:
        if isinstance(atom, Loaded):
            r = self.registers[atom.name]
            return atom.name, r.axes, r.level
        assert isinstance(atom, Quotient), atom
        key = ("atom", atom)
        if key not in self.known:
            inner, axes, level = self.place(atom.of)
            self.known[key] = register = self._emit("q", f"({inner}) {atom.kind} {atom.by}", "i32", axes, level)
            self.scopes[register.level].kept.append(key)
        return self.known[key].name, self.known[key].axes, self.known[key].level

    def _number(self, op: Op, value: object) -> Register:
        dtype = computed(op.type.dtype)
        key = ("number", repr(value), dtype)
        if key not in self.known:
            plain = literal(value, "f32") if dtype == "f64" else literal(value, dtype)
            self.known[key] = register = self._emit("c", f"tl.full([], {plain}, {TYPES[dtype]})", dtype, frozenset())
            self.scopes[register.level].kept.append(key)
        return self.known[key]

    # lines ------------------------------------------------------------------------------------------------------------

    def _emit(self, name: str, text: str, dtype: str, axes: frozenset[str], level: int = 0) -> Register:
        level = max([level, *(self.level[a] for a in axes)])
        register = Register(self._fresh(name), dtype, axes, level)
        self.scopes[level].lines.append(f"{register.name} = {text}")
        return register

    def _fresh(self, name: str) -> str:
        """``name``, or numbered so that it is no other's: lookups may make a value ``v6_sum_1`` beside the second register of ``v6_sum``."""
        pointers = {word(v) for v in self.memory}
        base = f"{name}_" if name in pointers else name
        while True:
            n = self.names[base] = self.names.get(base, -1) + 1
            found = base if n == 0 else f"{base}{'' if base.endswith('_') else '_'}{n}"
            if found not in self.given and found not in pointers:
                self.given.add(found)
                return found

    def _call(self, functions: frozenset[str] | set[str]) -> None:
        self.called |= functions


def word(value: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in value)


def every(conditions: Sequence[str]) -> str:
    return " & ".join(conditions)

