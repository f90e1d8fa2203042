"""One Triton kernel: values evaluated at points of an iteration space, each once.

The kernel is written from what it stores backwards: a value at an index asks for its operands at the indices that the op says, and is kept, so that nothing is
loaded or computed twice. Axis ``x`` runs over programs, axis ``r`` along the row that is reduced. What varies along neither, or along one only, moves out of
the loops over the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import product
from math import prod

from deepseed.codegen.block_sizes import Blocks
from deepseed.codegen.expressions import CodegenError
from deepseed.codegen.index_maps import Atom, Index, Loaded, Quotient, Var, divided, flat, of, reshaped, within
from deepseed.codegen.spaces import REDUCTIONS, Indices, Space, reduced_dims
from deepseed.codegen.triton_ops import TYPES, Register, computed, converted, expression, literal
from deepseed.ir.program import FLOATS, Op, Program


@dataclass(frozen=True)
class Plan:
    """What a kernel computes. ``row``: the variables of the axis r. ``rows``: a block of two axes. ``partial``: reductions over x, one result a program."""

    space: Space
    row: frozenset[Var]
    rows: bool
    targets: tuple[str, ...]
    partial: tuple[str, ...]
    blocks: Blocks

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
class _Scope:
    lines: list[str] = field(default_factory=list)
    kept: list[object] = field(default_factory=list)  # keys of what was evaluated here


class Kernel:
    """Writes the body of one kernel. ``memory``: the values that lie in memory, and whether in row-major order for certain."""

    def __init__(self, p: Program, plan: Plan, memory: Mapping[str, bool], name: str) -> None:
        self.p, self.plan, self.memory, self.name = p, plan, memory, name
        self.scopes = [_Scope()]
        self.known: dict[object, Register] = {}
        self.level = {"x": 0, "r": 0}
        self.where: tuple[str, ...] = ()  # conditions under which what is evaluated now is used
        self.conditions: dict[str, Register] = {}
        self.registers: dict[str, Register] = {}  # that indices are made of
        self.called: set[str] = set()
        self.read: dict[str, None] = {}
        self.names: dict[str, int] = {}
        self.sizes = {"x": prod(v.size for v in plan.x), "r": prod(v.size for v in plan.r)}
        b = plan.blocks
        self.looped = plan.rows and bool(plan.row) and b.reduced and b.r < self.sizes["r"]
        self.columns = plan.rows and not b.reduced and b.r < self.sizes["r"]  # programs along r
        self.masks = {"x": self.sizes["x"] > 1 or b.x > 1, "r": self.sizes["r"] % b.r != 0}
        self.bound: dict[Var, Index] = {}

    # source -----------------------------------------------------------------------------------------------------------

    def write(self) -> list[str]:
        plan, b = self.plan, self.plan.blocks
        one = self.scopes[0].lines
        if plan.partial:
            one.append("pid = tl.program_id(0)")
            accumulators = self._accumulators()
            self._axis_r()
            self.scopes.append(_Scope())
            self.level["x"] = 1
            self.scopes[1].lines.append("x = start + tl.arange(0, XB)" + ("[:, None]" if plan.rows else ""))
        else:
            accumulators = {}
            one.append("x = tl.program_id(0)" + (".to(tl.int64)" if self.sizes["x"] * self.sizes["r"] >= 1 << 31 else "") + " * XB + tl.arange(0, XB)" + ("[:, None]" if plan.rows else ""))
            self._axis_r()
        if self.masks["x"]:
            self.scopes[-1].lines.append(f"x_in = x < {self.sizes['x']}")
        if self.looped:
            self._rows_in_blocks(accumulators)
        else:
            self._stores()
            self._accumulate(accumulators)
        if plan.partial:
            body = self._close()
            rows = b.rows
            one.append(f"for start in range(pid * {rows}, min(pid * {rows} + {rows}, {self.sizes['x']}), XB):")
            one += [f"    {line}" for line in body]
            self.level["x"] = 0
            self._store_partials(accumulators)
        return one

    def _axis_r(self) -> None:
        if not self.plan.rows or self.looped:
            return
        start = "tl.program_id(1) * RB + " if self.columns else ""
        self.scopes[-1].lines.append(f"r = {start}tl.arange(0, RB)[None, :]")
        if self.masks["r"]:
            self.scopes[-1].lines.append(f"r_in = r < {self.sizes['r']}")

    def _close(self) -> list[str]:
        scope = self.scopes.pop()
        for key in scope.kept:
            del self.known[key]
        return scope.lines

    def _rows_in_blocks(self, accumulators: Mapping[tuple[str, Indices], str]) -> None:
        """The row does not fit: one loop for each reduction that waits for another, one more for what is stored."""
        inner = [op for op in self.p.ops if op.target in REDUCTIONS and op.name in self.needed and self.plan.space.reduced(self.p, op) == self.plan.row]
        depth: dict[str, int] = {}
        for op in self.p.ops:
            at = max([depth.get(r.name, 0) for r in op.refs], default=0)
            for result in op.results:
                depth[result] = at + 1 if op in inner else at
        for n in sorted({depth[op.name] for op in inner}):
            now = [op for op in inner if depth[op.name] == n]
            outer = self.scopes[-1]
            names = {}
            for op, binding in product(now, self._bindings(self.plan.space.index[now[0].name])):
                names[op.name, tuple(binding.items())] = name = self._fresh(f"{_word(op.name)}_block")
                outer.lines.append(f"{name} = tl.full([XB, RB], {self._start(op)}, {TYPES[computed(op.type.dtype)]})")
            self._open_r()
            for (value, bound), name in names.items():
                op = self.p.producers[value]
                self.bound = dict(bound)
                self._take(op, name, self._operands(op, self.bound), at_level=len(self.scopes) - 1)
            self._close_r()
            for (value, bound), name in names.items():
                op = self.p.producers[value]
                key = (value, tuple(i.put(dict(bound)) for i in self.plan.space.index[value]), ())
                self.known[key] = self._emit(_word(value), self._reduced(op, name, 1), computed(op.type.dtype), frozenset("x"))
                self.scopes[-1].kept.append(key)
        self._stores(only_rows=True)
        if any("r" in self._axes(self.plan.space.index[t]) for t in self.plan.targets) or accumulators:
            self._open_r()
            self._stores(only_rows=False)
            self._accumulate(accumulators)
            self._close_r()

    def _open_r(self) -> None:
        self.scopes.append(_Scope())
        self.level["r"] = len(self.scopes) - 1
        self.scopes[-1].lines.append("r = first + tl.arange(0, RB)[None, :]")
        if self.masks["r"]:
            self.scopes[-1].lines.append(f"r_in = r < {self.sizes['r']}")

    def _close_r(self) -> None:
        body = self._close()
        self.scopes[-1].lines.append(f"for first in range(0, {self.sizes['r']}, RB):")
        self.scopes[-1].lines += [f"    {line}" for line in body]

    # what is stored ---------------------------------------------------------------------------------------------------

    def _stores(self, only_rows: bool | None = None) -> None:
        for target in self.plan.targets:
            index = self.plan.space.index[target]
            if only_rows is not None and ("r" not in self._axes(index)) != only_rows:
                continue
            for binding in self._bindings(index):
                self.bound = binding
                self._store(target, tuple(i.put(binding) for i in index))

    def _store(self, target: str, index: Indices) -> None:
        value = self.at(target, index)
        place, axes, level = self.place(flat(index, self.p.types[target].shape))
        self._emit_store(f"o_{_word(target)}", place, value, axes, max(level, value.level), self._only_once(index))

    def _emit_store(self, pointer: str, place: str, value: Register, axes: frozenset[str], level: int, conditions: Sequence[str]) -> None:
        masks = [f"{a}_in" for a in "xr" if a in axes and self.masks[a]] + list(conditions)
        if conditions and len(masks) == len(conditions) and axes:
            masks.insert(0, f"({max(axes)} >= 0)")  # a mask has the shape of what it masks
        mask = f", mask={_all(masks)}" if masks else ""
        level = max([level, *(self.level[a] for a in axes)])
        self.scopes[level].lines.append(f"tl.store({pointer}{'' if place == '0' else f' + {place}'}, {value.name}{mask})")

    def _only_once(self, index: Indices) -> list[str]:
        """Conditions that leave one of the points that make the same element."""
        used = frozenset[Var]().union(*(i.vars for i in index))
        out = []
        for axis, group in (("x", self.plan.x), ("r", self.plan.r)):
            missing = [v for v in group if v not in used]
            if len(missing) == len(group):
                if axis == "x" and self.sizes["x"] > (self.plan.blocks.rows if self.plan.partial else self.plan.blocks.x):
                    out.append("(tl.program_id(0) == 0)")
                if axis == "r" and self.columns:
                    out.append("(tl.program_id(1) == 0)")
            else:
                out += [f"({self.place(of(v))[0]} == 0)" for v in missing]
        return out

    def _bindings(self, index: Indices) -> list[dict[Var, Index]]:
        used = frozenset[Var]().union(*(i.vars for i in index))
        return self._values([v for v in self.plan.unrolled if v in used])

    @staticmethod
    def _values(unrolled: Sequence[Var]) -> list[dict[Var, Index]]:
        return [dict(zip(unrolled, map(Index, n), strict=True)) for n in product(*(range(v.size) for v in unrolled))]

    def _axes(self, index: Indices) -> frozenset[str]:
        used = frozenset[Var]().union(*(i.vars for i in index))
        return frozenset(a for a, group in (("x", self.plan.x), ("r", self.plan.r)) if used & set(group))

    # partial sums -----------------------------------------------------------------------------------------------------

    def _accumulators(self) -> dict[tuple[str, Indices], str]:
        out = {}
        for value in self.plan.partial:
            op = self.p.producers[value]
            index = self.plan.space.index[value]
            for binding in self._bindings(index):
                name = self._fresh(f"{_word(value)}_part")
                out[value, tuple(i.put(binding) for i in index)] = name
                shape = ("[XB, RB]" if "r" in self._axes(index) else "[XB, 1]") if self.plan.rows else "[XB]"
                self.scopes[0].lines.append(f"{name} = tl.full({shape}, {self._start(op)}, {TYPES[computed(op.type.dtype)]})")
        return out

    def _accumulate(self, accumulators: Mapping[tuple[str, Indices], str]) -> None:
        for (value, index), name in accumulators.items():
            op = self.p.producers[value]
            binding = next(b for b in self._bindings(self.plan.space.index[value]) if tuple(i.put(b) for i in self.plan.space.index[value]) == index)
            self.bound = binding
            self._take(op, name, self._operands(op, binding), at_level=len(self.scopes) - 1, whole="r" in self._axes(index) or not self.plan.rows)

    def _take(self, op: Op, name: str, registers: Sequence[Register], at_level: int, whole: bool = True) -> None:
        """Add operands to an accumulator of the block's shape; not ``whole``: of its rows."""
        lines = self.scopes[at_level].lines
        for register in registers:
            text = self._masked(op, register, frozenset("xr" if self.plan.rows and (whole or "r" in register.axes) else "x"))
            if not whole and "r" in register.axes:
                text = self._reduced(op, text, 1)
            lines.append(f"{name} = {self._joined(op, name, text)}")

    def _store_partials(self, accumulators: Mapping[tuple[str, Indices], str]) -> None:
        for (value, index), name in accumulators.items():
            op = self.p.producers[value]
            if self.plan.rows:
                text, axes = self._reduced(op, name, 0), self._axes(index)
                if not axes:
                    text = f"tl.reshape({text}, [1, 1])"
            else:
                text, axes = (f"tl.sum({name}, 0)" if op.target != "amax" else f"tl.reshape(amax({name}, 0), [])"), frozenset()
            place, _, _ = self.place(flat(index, op.type.shape))
            numel = op.type.numel
            program = "pid"
            if self.columns and "r" not in axes:
                program = f"(pid * {-(-self.sizes['r'] // self.plan.blocks.r)} + tl.program_id(1))"
            place = f"{program} * {numel} + {place}" if numel > 1 else program
            if self.plan.rows and not axes:
                place += " + tl.zeros([1, 1], tl.int32)"
            self._emit_store(f"o_{_word(value)}", place, Register(text, computed(op.type.dtype)), axes, 0, ())

    def programs(self, value: str) -> int:
        """How many parts of a partial result there are."""
        b = self.plan.blocks
        columns = -(-self.sizes["r"] // b.r) if self.columns and "r" not in self._axes(self.plan.space.index[value]) else 1
        return -(-self.sizes["x"] // b.rows) * columns

    # values -----------------------------------------------------------------------------------------------------------

    def at(self, value: str, index: Indices) -> Register:
        key = (value, index, self.where)
        if key not in self.known:
            self.known[key] = register = self._load(value, index) if value in self.memory else self._value(value, index)
            self.scopes[register.level].kept.append(key)
        return self.known[key]

    def _value(self, value: str, index: Indices) -> Register:
        op = self.p.producers[value]
        x = op.refs[0].name if op.refs else ""
        match op.target:
            case "cast":
                r = self.at(x, index)
                dtype = computed(op.type.dtype)
                return r if r.dtype == dtype else self._emit(_word(value), converted(r, dtype), dtype, r.axes, r.level)
            case "reshape":
                return self.at(x, reshaped(index, op.type.shape, self.p.types[x].shape))
            case "permute":
                dims = op.kw("dims")
                assert isinstance(dims, tuple)
                return self.at(x, tuple(index[dims.index(d)] for d in range(len(dims))))
            case "expand":
                return self.at(x, self._broadcast(x, index))
            case "full":
                return self._number(op, op.kw("value"))
            case "slice":
                dim, start, step = (int(str(op.kw(k, d))) for k, d in (("dim", 0), ("start", 0), ("step", 1)))
                return self.at(x, (*index[:dim], index[dim] * step + start, *index[dim + 1 :]))
            case "cat" | "pad" | "unslice":
                return self._pieces(op, index)
            case "iota":
                return self._iota(op, index)
            case "bernoulli" | "uniform":
                return self._drawn(op, index)
            case "embedding":
                row = self._loaded(op.refs[1].name, index[:-1], self.p.types[x].shape[0])
                return self.at(x, (row, index[-1]))
            case "gather":
                dim = int(str(op.kw("dim")))
                return self.at(x, (*index[:dim], self._loaded(op.refs[1].name, index, self.p.types[x].shape[dim]), *index[dim + 1 :]))
        if op.target in REDUCTIONS:
            return self._reduction(op, index)
        registers = [self.at(r.name, self._broadcast(r.name, index)) for r in op.refs]
        text, called = expression(self.p, op, registers)
        self._call(called)
        axes = frozenset[str]().union(*(r.axes for r in registers))
        return self._emit(_word(value), text, computed(op.type.dtype), axes, max([r.level for r in registers], default=0))

    def _broadcast(self, x: str, index: Indices) -> Indices:
        shape = self.p.types[x].shape
        return tuple(Index() if n == 1 else i for n, i in zip(shape, index[len(index) - len(shape) :], strict=True))

    def _load(self, value: str, index: Indices) -> Register:
        t, word = self.p.types[value], _word(value)
        self.read[value] = None
        place, axes, level = self.place(flat(index, t.shape))
        if not self.memory[value] and t.numel > 1 and len(t.shape) > 0:
            strided = [f"({self.place(i)[0]}) * {word}_s{d}" if " + " in self.place(i)[0] else f"{self.place(i)[0]} * {word}_s{d}" for d, i in enumerate(index) if i != Index()]
            if strided:
                place = f"({place} if {word}_dense else {' + '.join(strided)})"
        masks = [f"{a}_in" for a in "xr" if a in axes and self.masks[a]] + [c for c in self.where]
        level = max([level, *(self.conditions[c].level for c in self.where)])
        axes = axes.union(*(self.conditions[c].axes for c in self.where))
        text = f"tl.load({word}{'' if place == '0' else f' + {place}'}" + (f", mask={_all(masks)}, other=0)" if masks and place != "0" else ")")
        dtype = computed(t.dtype)
        if dtype != t.dtype:
            text += f".to({TYPES[dtype]})"
        elif t.dtype == "bool":
            text += ".to(tl.int1)"
        return self._emit(word, text, dtype, axes, level)

    def _loaded(self, value: str, index: Indices, size: int) -> Index:
        r = self.at(value, index)
        self.registers[r.name] = r
        return of(Loaded(r.name, size)) if size > 1 else Index()

    def _pieces(self, op: Op, index: Indices) -> Register:
        """What puts tensors side by side: the one that has the element, or the number that is there instead."""
        dims: list[tuple[str | None, tuple[tuple[int, int, int], ...]]] = []  # operand, then (dimension, first, end) of its place
        shape = op.type.shape
        number = 0.0
        if op.target == "cat":
            dim, at = int(str(op.kw("dim", 0))), 0
            for ref in op.refs:
                n = self.p.types[ref.name].shape[dim]
                dims.append((ref.name, ((dim, at, at + n),)))
                at += n
        elif op.target == "pad":
            pads, value = op.kw("pads"), op.kw("value", 0)
            assert isinstance(pads, tuple) and isinstance(value, int | float)
            number = value
            inner = self.p.types[op.refs[0].name].shape
            dims.append((op.refs[0].name, tuple((d, int(str(pads[2 * d])), int(str(pads[2 * d])) + n) for d, n in enumerate(inner) if n != shape[d])))
        else:
            dim, start, step = (int(str(op.kw(k, d))) for k, d in (("dim", 0), ("start", 0), ("step", 1)))
            if step != 1:
                raise CodegenError(f"%{op.name} = unslice with step {step}: no Triton expression for it\n  fix: leave it out of the group")
            dims.append((op.refs[0].name, ((dim, start, start + self.p.types[op.refs[0].name].shape[dim]),)))
        dtype = computed(op.type.dtype)
        found: list[tuple[Register, str]] = []  # the value and where it holds
        for name, places in dims:
            conditions, inside, moved = [], True, list(index)
            for d, first, end in places:
                cut = [n for _, others in dims for dd, *ends in others if dd == d for n in ends]
                there = within(index[d], first, end, cut)
                moved[d] = index[d] + -first
                if there is False:
                    inside = False
                elif there is None:
                    conditions.append(self._condition(index[d], first, end))
            if not inside or name is None:
                continue
            outer, self.where = self.where, (*self.where, *(c for c in conditions if c not in self.where))
            register = self.at(name, tuple(moved))
            self.where = outer
            if not conditions:
                return register
            found.append((register, _all(conditions)))
        out = self._number(op, number)
        for register, condition in found:
            names = condition.split(" & ")
            axes = register.axes.union(out.axes, *(self.conditions[c].axes for c in names))
            level = max(register.level, out.level, *(self.conditions[c].level for c in names))
            out = self._emit(_word(op.name), f"tl.where({condition}, {converted(register, dtype)}, {out.name})", dtype, axes, level)
        return out

    def _condition(self, e: Index, first: int, end: int) -> str:
        key = ("within", e, first, end)
        if key not in self.known:
            place, axes, level = self.place(e)
            low, high = e.range
            tests = ([f"({place} >= {first})"] if low < first else []) + ([f"({place} < {end})"] if high >= end else [])
            register = self._emit("there", " & ".join(tests), "bool", axes, level)
            self.known[key] = register
            self.conditions[register.name] = register
            self.scopes[register.level].kept.append(key)
        return self.known[key].name

    def _iota(self, op: Op, index: Indices) -> Register:
        if op.kw("index") is not None:
            index = (self._global(op, index),)
        place, axes, level = self.place(index[0])
        start, step, dtype = op.kw("start", 0), op.kw("step", 1), computed(op.type.dtype)
        text = f"({place})" if " " in place else place
        if not index[0].terms:
            text = f"tl.full([], {place}, tl.int32)"
        text = f"{text}.to({TYPES[dtype]})"
        text += "" if step == 1 else f" * {literal(step, dtype)}"
        text += "" if start == 0 else f" + {literal(start, dtype)}"
        return self._emit(_word(op.name), text, dtype, axes, level)

    def _global(self, op: Op, index: Indices) -> Index:
        """The row-major place in the whole tensor of the element at ``index`` of a rank's part."""
        held = op.kw("index")
        if held is None:
            return flat(index, op.type.shape)
        assert isinstance(held, tuple)
        parts: list[Index] = []
        sizes: list[int] = []
        for factors, i in zip(held, index, strict=True):
            assert isinstance(factors, tuple)
            numbers = [tuple(int(str(n)) for n in f) for f in factors if isinstance(f, tuple)]
            rest = i
            for k, (n, *here) in enumerate(numbers):
                minor = prod(m[2] if len(m) > 1 else m[0] for m in numbers[k + 1 :])
                q, rest = divided(rest, minor) if k + 1 < len(numbers) else (rest, Index())
                parts.append(q + (here[0] if here else 0))
                sizes.append(n)
        return flat(parts, sizes)

    def _drawn(self, op: Op, index: Indices) -> Register:
        rng = op.refs[0].name
        self.read[rng] = None
        dtype = computed(op.type.dtype)
        low, high = (op.kw("low", 0.0), op.kw("high", 1.0))
        p = op.kw("p", 0.5)
        assert isinstance(low, int | float) and isinstance(high, int | float) and isinstance(p, int | float)
        threshold = round(p * 2**32) - 2**31
        if op.target == "bernoulli" and abs(threshold) >= 2**31:
            return self._number(op, 1 if threshold > 0 else 0)
        place, axes, level = self.place(self._global(op, index))
        self._call({"mix", "lane"})
        element = f"({place})" if " " in place else place
        if not axes:
            element = f"tl.full([], {place}, tl.int64)"
        drawn = f"lane({_word(rng)}, {_site(str(op.kw('site')))}, {element}.to(tl.int64))"
        if op.target == "bernoulli":
            return self._emit(_word(op.name), f"({drawn} < {threshold}).to({TYPES[dtype]})", dtype, axes, level)
        if op.type.dtype != "f32":
            raise CodegenError(f"%{op.name} = uniform in {op.type.dtype}: no Triton expression for it\n  fix: leave it out of the group")
        return self._emit(_word(op.name), f"(({drawn} >> 8).to(tl.float32) + {2.0**23}) * {2.0**-24} * {float(high - low)!r} + {float(low)!r}", dtype, axes, level)

    # reductions -------------------------------------------------------------------------------------------------------

    def _reduction(self, op: Op, index: Indices) -> Register:
        x = op.refs[0].name
        dtype, shape, dims = computed(op.type.dtype), self.p.types[x].shape, reduced_dims(self.p, op)
        if all(shape[d] == 1 for d in dims):
            given = iter(index)
            r = self.at(x, index if len(index) == len(shape) else tuple(Index() if d in dims else next(given) for d in range(len(shape))))
            text = converted(r, dtype)
            return self._emit(_word(op.name), f"{text} * {text}" if op.target == "sum_of_squares" else text, dtype, r.axes, r.level)
        if x in self.memory and self.memory[x] and op.type.numel == 1 and x not in self.plan.space.index:
            return self._whole(op)
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
        return self._emit(_word(op.name), self._reduced(op, text, 1), dtype, axes, self.level["r"] if not axes else 0)

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
        masks = [f"{a}_in" for a in sorted(axes, reverse=True) if self.masks[a]]
        if masks:
            return f"tl.where({_all(masks)}, {r.name}, {self._start(op)})"
        return r.name if axes <= r.axes else f"({r.name} + tl.zeros([XB, RB], {TYPES[r.dtype]}))" if self.plan.rows else f"({r.name} + tl.zeros([XB], {TYPES[r.dtype]}))"

    def _reduced(self, op: Op, text: str, axis: int) -> str:
        if op.target != "amax":
            return f"tl.sum({text}, {axis}, keep_dims=True)"
        if op.type.dtype not in FLOATS:
            return f"tl.max({text}, {axis}, keep_dims=True)"
        self._call({"amax"})
        return f"amax({text}, {axis})"

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
        text = f"tl.load({_word(x)} + tl.arange(0, {size}){mask}).to({TYPES[dtype]})"
        if op.target == "amax":
            self._call({"amax"})
            return self._emit(_word(op.name), f"tl.reshape(amax({text}, 0), [])", dtype, frozenset())
        return self._emit(_word(op.name), f"tl.sum({text}, 0)", dtype, frozenset())

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
        pointers = {_word(v) for v in self.memory}
        base = f"{name}_" if name in pointers else name
        n = self.names[base] = self.names.get(base, -1) + 1
        return base if n == 0 else f"{base}{'' if base.endswith('_') else '_'}{n}"

    def _call(self, functions: frozenset[str] | set[str]) -> None:
        self.called |= functions

    @property
    def needed(self) -> set[str]:
        """What the kernel evaluates."""
        found: set[str] = set()
        todo = [*self.plan.targets, *(self.p.producers[v].refs[0].name for v in self.plan.partial)]
        while todo:
            value = todo.pop()
            if value not in found:
                found.add(value)
                if value not in self.memory:
                    todo += [r.name for r in self.p.producers[value].refs]
        return found


def _site(site: str) -> int:
    """A site's stable hash, as deepseed.ops.rng has it."""
    return int.from_bytes(blake2b(site.encode(), digest_size=8).digest(), "little")


def _word(value: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in value)


def _all(conditions: Sequence[str]) -> str:
    return " & ".join(conditions)

