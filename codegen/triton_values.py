"""Values at points of the iteration space: each asks for its operands at the indices that its op says, and is kept, so that nothing is loaded twice."""

from __future__ import annotations

import struct
from math import prod

from deepseed.codegen.expressions import CodegenError
from deepseed.codegen.index_maps import Index, Loaded, Var, flat, of, within
from deepseed.codegen.operands import broadcast, cuts, moved, overall, parts, site
from deepseed.codegen.spaces import REDUCTIONS, Indices
from deepseed.codegen.triton_ops import TYPES, Register, computed, converted, expression, literal
from deepseed.codegen.triton_places import Places, every, word
from deepseed.ir.program import Op


class Values(Places):
    """Everything but reductions."""

    def _reduction(self, op: Op, index: Indices) -> Register:
        raise NotImplementedError

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
        if (there := moved(self.p, op, index)) is not None:
            return self.at(x, there)
        match op.target:
            case "cast":
                r = self.at(x, index)
                dtype = computed(op.type.dtype)
                if dtype != op.type.dtype and self.p.types[x].dtype != op.type.dtype:
                    self._call({f"as_{op.type.dtype}"})
                    return self._emit(word(value), f"as_{op.type.dtype}({converted(r, dtype)})", dtype, r.axes, r.level)
                return r if r.dtype == dtype else self._emit(word(value), converted(r, dtype), dtype, r.axes, r.level)
            case "full":
                return self._number(op, op.kw("value"))
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
        registers = [self.at(r.name, broadcast(self.p, r.name, index)) for r in op.refs]
        text, called = expression(self.p, op, registers)
        self._call(called)
        axes = frozenset[str]().union(*(r.axes for r in registers))
        return self._emit(word(value), text, computed(op.type.dtype), axes, max([r.level for r in registers], default=0))

    def _load(self, value: str, index: Indices) -> Register:
        t, name = self.p.types[value], word(value)
        self.read[value] = None
        place, axes, level = self.place(flat(index, t.shape))
        if not self.memory[value] and t.numel > 1 and len(t.shape) > 0:
            strided = [f"({self.place(i)[0]}) * {name}_s{d}" if " " in self.place(i)[0] else f"{self.place(i)[0]} * {name}_s{d}" for d, i in enumerate(index) if i != Index()]
            if strided:
                place = f"({place} if {name}_dense else {' + '.join(strided)})"
        masks = [f"{a}_in" for a in "xr" if a in axes and self.masks[a]] + [c for c in self.where]
        level = max([level, *(self.conditions[c].level for c in self.where)])
        axes = axes.union(*(self.conditions[c].axes for c in self.where))
        text = f"tl.load({name}{'' if place == '0' else f' + {place}'}" + (f", mask={every(masks)}, other=0)" if masks and place != "0" else ")")
        points = prod(v.size for v in frozenset[Var]().union(*(i.vars for i in index)) if not v.unrolled)
        self._count(value, min(points, prod(high - low + 1 for low, high in (i.range for i in index))))
        dtype = computed(t.dtype)
        if dtype != t.dtype:
            text += f".to({TYPES[dtype]})"
        elif t.dtype == "bool":
            text += ".to(tl.int1)"
        return self._emit(name, text, dtype, axes, level)

    def _loaded(self, value: str, index: Indices, size: int) -> Index:
        r = self.at(value, index)
        self.registers[r.name] = r
        return of(Loaded(r.name, size)) if size > 1 else Index()

    def _pieces(self, op: Op, index: Indices) -> Register:
        """What puts tensors side by side: the one that has the element, or the number that is there instead."""
        dims, number = parts(self.p, op)
        dtype = computed(op.type.dtype)
        found: list[tuple[Register, str]] = []  # the value and where it holds
        for name, places in dims:
            conditions, inside, place = [], True, list(index)
            for d, first, end in places:
                there = within(index[d], first, end, cuts(dims, d))
                place[d] = index[d] + -first
                if there is False:
                    inside = False
                elif there is None:
                    conditions.append(self._condition(index[d], first, end))
            if not inside:
                continue
            outer, self.where = self.where, (*self.where, *(c for c in conditions if c not in self.where))
            register = self.at(name, tuple(place))
            self.where = outer
            if not conditions:
                return register
            found.append((register, every(conditions)))
        out = self._number(op, number)
        for register, condition in found:
            names = condition.split(" & ")
            axes = register.axes.union(out.axes, *(self.conditions[c].axes for c in names))
            level = max(register.level, out.level, *(self.conditions[c].level for c in names))
            out = self._emit(word(op.name), f"tl.where({condition}, {converted(register, dtype)}, {out.name})", dtype, axes, level)
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
            index = (overall(op, index),)
        place, axes, level = self.place(index[0])
        start, step, dtype = op.kw("start", 0), op.kw("step", 1), computed(op.type.dtype)
        text = f"({place})" if " " in place else place
        if not index[0].terms:
            text = f"tl.full([], {place}, tl.int32)"
        text = f"{text}.to({TYPES[dtype]})"
        text += "" if step == 1 else f" * {literal(step, dtype)}"
        text += "" if start == 0 else f" + {literal(start, dtype)}"
        return self._emit(word(op.name), text, dtype, axes, level)

    def _drawn(self, op: Op, index: Indices) -> Register:
        rng = op.refs[0].name
        self.read[rng] = None
        self.rows_only.add(rng)
        dtype = computed(op.type.dtype)
        low, high = (op.kw("low", 0.0), op.kw("high", 1.0))
        p = op.kw("p", 0.5)
        assert isinstance(low, int | float) and isinstance(high, int | float) and isinstance(p, int | float)
        threshold = round(p * 2**32) - 2**31
        if op.target == "bernoulli" and abs(threshold) >= 2**31:
            return self._number(op, 1 if threshold > 0 else 0)
        place, axes, level = self.place(overall(op, index))
        self._call({"mix", "lane"})
        element = f"({place})" if " " in place else place
        if not axes:
            element = f"tl.full([], {place}, tl.int64)"
        seed, step = self._seed(rng)
        drawn = f"lane({seed}, {step}, {site(op)}, {element}.to(tl.int64))"
        if op.target == "bernoulli":
            return self._emit(word(op.name), f"({drawn} < {threshold}).to({TYPES[dtype]})", dtype, axes, level)
        if op.type.dtype != "f32":
            raise CodegenError(f"%{op.name} = uniform in {op.type.dtype}: no Triton expression for it\n  fix: none is needed, the group runs as Python")
        made = f"(({drawn} >> 8).to(tl.float32) + {2.0**23}) * {2.0**-24} * {float(high - low)!r} + {float(low)!r}"
        return self._emit(word(op.name), f"tl.minimum({made}, {_below(high)!r})", dtype, axes, level)

    def _seed(self, rng: str) -> tuple[str, str]:
        names = []
        for n in range(2):
            key = ("seed", rng, n)
            if key not in self.known:
                self._count(rng, 1)
                self.known[key] = self._emit(("seed", "step")[n], f"tl.load({word(rng)}{' + 1' * n}).to(tl.uint64)", "i64", frozenset())
                self.scopes[0].kept.append(key)
            names.append(self.known[key].name)
        return names[0], names[1]


def _below(high: float) -> float:
    """The largest float32 below ``high``, as deepseed.ops.rng has it for each dtype."""
    value: float = struct.unpack("<f", struct.pack("<f", high))[0]
    if value < high:
        return value
    if value == 0:
        return -(2.0**-126)
    bits: int = struct.unpack("<i", struct.pack("<f", value))[0]
    return float(struct.unpack("<f", struct.pack("<i", bits + (-1 if value > 0 else 1)))[0])
