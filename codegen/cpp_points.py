"""Values at points of an iteration space as C++: each asks for its operands at the indices that its op says, is made in the outermost loop that it depends on, and is kept there.

What a value is at an index follows from its op (deepseed.codegen.spaces, index_maps); what is read by number is checked against the size of what it picks from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

from deepseed.codegen.cpp_ops import TYPES, computed, converted, expression, literal, squared, type_of, wrapping
from deepseed.codegen.expressions import CodegenError
from deepseed.codegen.index_maps import Atom, Index, Loaded, Quotient, Var, of, within, write
from deepseed.codegen.operands import broadcast, cuts, moved, overall, parts, site
from deepseed.codegen.spaces import REDUCTIONS, Indices, Space, reduced_dims
from deepseed.ir.program import FLOATS, Op, Program

LARGEST = 1 << 31  # elements that an operand may span, and the numbers that an int does not hold
Strides = tuple[int, ...]
Bound = Mapping[Var, Index]


@dataclass(frozen=True)
class Register:
    """``level``: of the scope that it is made in."""

    name: str
    dtype: str
    level: int


@dataclass
class Scope:
    """A loop's body. ``known``: keys of what was made in it."""

    head: str = ""
    scalar: bool = False  # one element after another: a number is checked in it
    lines: list[str] = field(default_factory=list)
    known: list[object] = field(default_factory=list)


class Points:
    """``memory``: what lies in memory, with its strides; ``levels``: the scope of each variable that has one by now."""

    def __init__(self, p: Program, space: Space, memory: Mapping[str, Strides]) -> None:
        self.p, self.space, self.memory = p, space, memory
        self.scopes = [Scope()]
        self.levels: dict[Var, int] = {}
        self.known: dict[object, Register] = {}
        self.where: tuple[str, ...] = ()  # conditions under which what is made now is used
        self.numbers: dict[str, Register] = {}  # that indices and conditions are made of
        self.rounded: dict[str, str] = {}  # a register -> the 16 bits that it was made of
        self.count = 0
        self.reads: dict[str, list[tuple[str, int]]] = {}  # what was read from memory: where, and as which of all values

    # scopes -----------------------------------------------------------------------------------------------------------

    def open(self, head: str, *names: Var) -> None:
        self.scopes.append(Scope(head))
        self.levels.update((v, len(self.scopes) - 1) for v in names)

    def close(self) -> None:
        scope = self.scopes.pop()
        for key in scope.known:
            del self.known[key]
        self.levels = {v: level for v, level in self.levels.items() if level < len(self.scopes)}
        *before, loop = scope.head.split("\n")
        before = [line for line in before if not (scope.scalar and line.startswith("#pragma omp simd"))]
        self.scopes[-1].lines += [*before, f"{loop} {{", *(f"    {line}" for line in scope.lines), "}"]

    def emit(self, text: str, dtype: str, level: int, kind: str = "") -> Register:
        self.count += 1
        r = Register(f"t{self.count}", dtype, level)
        self.scopes[level].lines.append(f"const {kind or TYPES[dtype]} {r.name} = {text};")
        return r

    def keep(self, key: object, r: Register) -> Register:
        self.known[key] = r
        self.scopes[r.level].known.append(key)
        return r

    def place(self, e: Index) -> tuple[str, int]:
        """An index as source, and the level that it needs."""
        level, wide = 0, e.range[1] >= LARGEST

        def name(a: Atom) -> str:
            nonlocal level
            if isinstance(a, Var):
                level = max(level, self.levels[a])
                return f"int64_t({a.name})" if wide else a.name
            if isinstance(a, Loaded):
                level = max(level, self.numbers[a.name].level)
                return a.name
            return f"(({write(a.of, name)}) {'/' if a.kind == '//' else '%'} {a.by})"

        return write(e, name), level

    def bindings(self, names: Sequence[Var]) -> list[dict[Var, Index]]:
        """The values of unrolled variables."""
        names = [v for v in self.space.vars if v.unrolled and v in names]
        return [dict(zip(names, map(Index, n), strict=True)) for n in product(*(range(v.size) for v in names))]

    def of_index(self, index: Indices) -> list[dict[Var, Index]]:
        return self.bindings([*variables(index)])

    # values -----------------------------------------------------------------------------------------------------------

    def at(self, value: str, index: Indices) -> Register:
        key = (value, index, self.where)
        return self.known[key] if key in self.known else self.keep(key, self.load(value, index) if value in self.memory else self.made(value, index))

    def address(self, value: str, index: Indices) -> tuple[str, int]:
        out = Index()
        for i, s in zip(index, self.memory[value], strict=True):
            out += i * s
        return self.place(out)

    def load(self, value: str, index: Indices) -> Register:
        place, level = self.address(value, index)
        self.reads.setdefault(value, []).append((place, self.count))
        dtype = computed(self.p.types[value].dtype)
        text = f"up({value}[{place}])"
        if self.where:
            level = max([level, *(self.numbers[c].level for c in self.where)])
            text = f"{' && '.join(self.where)} ? {text} : {TYPES[dtype]}(0)"
        return self.emit(text, dtype, level)

    def made(self, value: str, index: Indices) -> Register:
        op = self.p.producers[value]
        x, dtype = op.refs[0].name if op.refs else "", computed(op.type.dtype)
        if (there := moved(self.p, op, index)) is not None:
            return self.at(x, there)
        match op.target:
            case "cast":
                r = self.at(x, index)
                if op.type.dtype not in ("bf16", "f16"):
                    return r if r.dtype == dtype else self.emit(converted(r.name, r.dtype, dtype), dtype, r.level)
                self.count += 1
                self.scopes[r.level].lines.append(f"const {TYPES[op.type.dtype]} r{self.count} = down<{TYPES[op.type.dtype]}>::of({converted(r.name, r.dtype, dtype)});")
                rounded = f"r{self.count}"
                r = self.emit(f"up({rounded})", dtype, r.level)
                self.rounded[r.name] = rounded
                return r
            case "full":
                return self.emit(literal(op.kw("value"), dtype), dtype, 0)
            case "cat" | "pad" | "unslice":
                return self.pieces(op, index)
            case "iota":
                return self.iota(op, index)
            case "bernoulli" | "uniform":
                return self.drawn(op, index)
            case "gather" if op.kw("start") is None:
                dim = int(str(op.kw("dim")))
                return self.at(x, (*index[:dim], self.number(op.refs[1].name, index, self.p.types[x].shape[dim]), *index[dim + 1 :]))
            case "scatter_add" if op.kw("start") is None:
                return self.put(op, index)
        if op.target in REDUCTIONS:
            return self.reduction(op, index)
        registers = [self.at(r.name, broadcast(self.p, r.name, index)) for r in op.refs]
        return self.emit(expression(self.p, op, [r.name for r in registers]), dtype, max([r.level for r in registers], default=0))

    def reduction(self, op: Op, index: Indices) -> Register:
        x = op.refs[0].name
        shape, dims, given = self.p.types[x].shape, reduced_dims(self.p, op), iter(index)
        if all(shape[d] == 1 for d in dims):
            r, dtype = self.at(x, index if len(index) == len(shape) else tuple(Index() if d in dims else next(given) for d in range(len(shape)))), computed(op.type.dtype)
            text = converted(r.name, r.dtype, dtype)
            return self.emit(squared(text, TYPES[dtype]) if op.target == "sum_of_squares" else text, dtype, r.level)
        raise CodegenError(f"%{op.name} = {op.target} is read before it is made, or elsewhere")

    def number(self, value: str, index: Indices, size: int) -> Index:
        """A number that was read, as an index below ``size``."""
        r = self.at(value, index)
        key = ("number", r.name, size)
        if key not in self.known:
            self.keep(key, self.emit(f"checked({r.name}, {size}, wrong)", r.dtype, r.level, "int"))
            self.scopes[r.level].scalar = True
        made = self.known[key]
        self.numbers[made.name] = made
        return of(Loaded(made.name, size)) if size > 1 else Index()

    def put(self, op: Op, index: Indices) -> Register:
        """``scatter_add`` of one element a row: the row's element, with what is added where the number says so."""
        x, number, added = (r.name for r in op.refs)
        dim, dtype = int(str(op.kw("dim"))), computed(op.type.dtype)
        if self.p.types[number].shape[dim] != 1 or self.p.types[added].shape != self.p.types[number].shape:
            raise CodegenError(f"%{op.name} = {op.target} of {self.p.types[number].shape[dim]} elements a row")
        row = (*index[:dim], Index(), *index[dim + 1 :])
        there, base, more = self.number(number, row, op.type.shape[dim]), self.at(x, index), self.at(added, row)
        (a, level_a), (b, level_b) = self.place(index[dim]), self.place(there)
        held = wrapping(TYPES[dtype])
        text = f"{base.name} + ({a} == {b} ? {converted(more.name, more.dtype, dtype)} : {TYPES[dtype]}(0))"
        if held != TYPES[dtype]:
            text = f"{TYPES[dtype]}({held}({base.name}) + ({a} == {b} ? {held}({more.name}) : {held}(0)))"
        return self.emit(text, dtype, max(level_a, level_b, base.level, more.level))

    def pieces(self, op: Op, index: Indices) -> Register:
        """What puts tensors side by side: the one that has the element, or the number that is there instead."""
        dtype, found = computed(op.type.dtype), list[tuple[Register, list[str]]]()
        operands, number = parts(self.p, op)
        for name, places in operands:
            conditions, inside, place = list[str](), True, list(index)
            for d, first, end in places:
                there = within(index[d], first, end, cuts(operands, d))
                place[d] = index[d] + -first
                inside = inside and there is not False
                if there is None:
                    conditions.append(self.condition(index[d], first, end))
            if inside:
                outer, self.where = self.where, (*self.where, *(c for c in conditions if c not in self.where))
                r = self.at(name, tuple(place))
                self.where = outer
                if not conditions:
                    return r
                found.append((r, conditions))
        out = self.emit(literal(number, dtype), dtype, 0)
        for r, conditions in found:
            level = max(r.level, out.level, *(self.numbers[c].level for c in conditions))
            out = self.emit(f"{' && '.join(conditions)} ? {converted(r.name, r.dtype, dtype)} : {out.name}", dtype, level)
        return out

    def condition(self, e: Index, first: int, end: int) -> str:
        key = ("within", e, first, end)
        if key not in self.known:
            (place, level), (low, high) = self.place(e), e.range
            tests = ([f"{place} >= {first}"] if low < first else []) + ([f"{place} < {end}"] if high >= end else [])
            r = self.keep(key, self.emit(" && ".join(tests), "bool", level))
            self.numbers[r.name] = r
        return self.known[key].name

    # leaves -----------------------------------------------------------------------------------------------------------

    def iota(self, op: Op, index: Indices) -> Register:
        place, level = self.place(overall(op, index) if op.kw("index") is not None else index[0])
        start, step, dtype = op.kw("start", 0), op.kw("step", 1), computed(op.type.dtype)
        return self.emit(f"{TYPES[dtype]}({place}) * {literal(step, dtype)} + {literal(start, dtype)}", dtype, level)

    def drawn(self, op: Op, index: Indices) -> Register:
        rng, dtype = op.refs[0].name, computed(op.type.dtype)
        if self.memory.get(rng) != (1,):
            raise CodegenError(f"%{op.name}: a seed that is made here, or lies otherwise")
        p = op.kw("p", 0.5)
        assert isinstance(p, int | float)
        threshold = round(p * 2**32) - 2**31
        if op.target == "bernoulli" and abs(threshold) >= 2**31:
            return self.emit(literal(1 if threshold > 0 else 0, dtype), dtype, 0)
        key = ("key", rng, op.kw("site"))
        if key not in self.known:
            self.keep(key, self.emit(f"drawn_key({rng}[0], {rng}[1], {site(op)}ull)", "i64", 0, "uint64_t"))
        place, level = self.place(overall(op, index))
        lane = f"drawn_lane({self.known[key].name}, uint64_t({place}))"
        if op.target == "bernoulli":
            return self.emit(f"{TYPES[dtype]}({lane} < {threshold})", dtype, level)
        raise CodegenError(f"%{op.name} = {op.target}: no C++ expression for it\n  fix: none is needed, the group runs as Python")


def variables(index: Indices) -> frozenset[Var]:
    return frozenset[Var]().union(*(i.vars for i in index))


def accumulator(op: Op) -> tuple[str, str]:
    """The type in which a reduction is computed, and what it begins with."""
    dtype = computed(op.type.dtype)
    if op.target != "amax":
        return type_of(op.type.dtype), literal(0, dtype)
    return type_of(op.type.dtype), literal(float("-inf"), dtype) if dtype in FLOATS else f"std::numeric_limits<{TYPES[dtype]}>::lowest()"


__all__ = ["LARGEST", "Bound", "Points", "Quotient", "Register", "Scope", "Strides", "accumulator", "variables"]
