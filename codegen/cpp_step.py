"""A whole packed step of few rows as one C++ function: what is between two decoded tokens costs no Python.

    step(T, L, threads, in, caches, arena, out, slots, table, lengths, news, rows, sequences, longest, pages, size) -> whether an id names no row of what it picks from

One line an op: groups are calls of their functions (deepseed.codegen.cpp), products, gathers and attention of the templates (deepseed.codegen.cpp_native), views cost
nothing. Values lie in one arena at places that are fixed when the source is written, for at most ``most`` rows: a value's place is free again after its last use.
An op without C++ is refused: CodegenError, and the step stays Python.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

from deepseed.codegen.cpp import Function, Shape, source
from deepseed.codegen.cpp_ops import TYPES, computed
from deepseed.codegen.expressions import CodegenError
from deepseed.codegen.kernels import Kernel
from deepseed.codegen.places import Places, offset
from deepseed.ir.fragment import Group, fragment, groups
from deepseed.ir.layout import contiguous
from deepseed.ir.program import ITEMSIZE, Op, Program, Ref

EIGHT = {"int8": "int8_t", "fp8": "e4m3"}  # weights in eight bits, as they are stored
HEAD = (
    'extern "C" int step(int64_t T, int64_t L, int threads, void *const *in, void *const *caches, char *arena, void *out, const int64_t *slots, const int64_t *table, '
    "const int64_t *lengths, const int64_t *news, const int64_t *rows, int64_t sequences, int64_t longest, int64_t pages, int64_t size) {"
)


@dataclass(frozen=True)
class Step:
    """``arena``: bytes; ``calls``: functions that a step runs."""

    text: str
    arena: int
    calls: int


@dataclass
class Lies:
    """How the values of a localized program lie (deepseed.rules.strides)."""

    strides: Mapping[str, Shape]
    views: Sequence[bool]
    kernels: Mapping[str, Kernel]  # by mark
    functions: Mapping[str, Function]  # by name
    outputs: Mapping[str, Sequence[Shape]]  # of each kernel, by name


def side_by_side(p: Program) -> Program:
    """Products of the same operand one after another, so that one function computes them: what they read beside it is stored, or a view of what is.

    before: %a = aten.mm(%x, %wa.t) .. %b.t = permute(%wb) .. %b = aten.mm(%x, %b.t)
    after:  %a = aten.mm(%x, %wa.t)  %b.t = permute(%wb)  %b = aten.mm(%x, %b.t) ..
    """
    stored = {i.name for i in p.inputs}
    early: set[str] = set()
    for op in p.ops:
        if op.target == "permute" and op.refs[0].name in stored and not op.kernel:
            early.update(op.results)
    views = {op.name: op for op in p.ops if op.name in early}
    first: dict[str, str] = {}
    follow: dict[str, list[Op]] = {}
    for op in p.ops:
        if op.target in ("aten.mm", "eight_bits.mm") and not op.kernel and all(r.name in stored | early for r in op.refs[1:]):
            lead = first.setdefault(op.refs[0].name, op.name)
            if lead != op.name:
                follow.setdefault(lead, []).append(op)
    moved = {op.name for ops in follow.values() for op in ops}
    moved |= {op.refs[1].name for ops in follow.values() for op in ops if op.refs[1].name in early}
    out: list[Op] = []
    for op in p.ops:
        if op.name in moved:
            continue
        out.append(op)
        for other in follow.get(op.name, ()):
            if (view := views.get(other.refs[1].name)) is not None and view not in out[-2 * len(follow[op.name]) :]:
                out.append(view)
            out.append(other)
    return replace(p, ops=tuple(out))


def step(p: Program, lies: Lies, free: Mapping[int, str], most: int) -> Step:
    return _Step(p, lies, free, most).written()


@dataclass
class _Step:
    p: Program
    lies: Lies
    free: Mapping[int, str]
    most: int
    lines: list[str] = field(default_factory=list)
    alone: dict[str, str] = field(default_factory=dict)  # functions of single ops, by text
    places: Places = field(default_factory=Places)
    calls: int = 0
    joined: tuple[tuple[str, str], int, list[tuple[str, str, str, str]]] = field(default_factory=lambda: (("", ""), 0, []))  # the last products: their operand and how weights are stored, how many lines there were, weights, scales, results and sizes

    def __post_init__(self) -> None:
        self.at: dict[str, str] = {i.name: f"(char *)in[{n}]" for n, i in enumerate(self.p.inputs)}  # where a value begins
        self.block: dict[str, tuple[int, int, str]] = {}  # of the arena: begin, end, the value that was made there
        self.left: dict[str, int] = {}  # uses of a block's value and its views
        (output,) = (o for o in self.p.outputs if o.role == "output")
        self.returned = output.ref.name
        views = {op.name: op.refs[0].name for op, view in zip(self.p.ops, self.lies.views, strict=True) if view}
        while self.returned in views:
            self.returned = views[self.returned]
        if self.returned not in self.p.producers or self._lying(output.ref.name) != contiguous(self.p.types[output.ref.name].local(self.p.mesh)):
            raise CodegenError(f"%{output.ref.name}: a result that is no new tensor")

    def written(self) -> Step:
        p, grouped = self.p, {g.first: g for g in groups(self.p)}
        n = 0
        while n < len(p.ops):
            op = p.ops[n]
            if n in grouped:
                g = grouped[n]
                k = self.lies.kernels[g.kernel]
                if k.name not in self.lies.functions or any(tuple(s) != self._lying(v) for v, s in zip(g.makes, self.lies.outputs[k.name], strict=True)):
                    raise CodegenError(f"{k.name} has no C++, or what it makes does not lie as it is read")
                self._make(g.makes)
                self._call(k.name, self.lies.functions[k.name], g.reads, g.makes)
                self._used([r.name for each in p.ops[g.first : g.last] for r in each.refs if r.name in g.reads], g.makes)
                n = g.last
                continue
            self._op(n, op)
            self._used([r.name for r in op.refs], op.results)
            n += 1
        head = [*self.alone.values(), HEAD]
        return Step("\n".join([*head, *(f"    {line}" for line in self.lines), "    return 0;", "}"]) + "\n", self.places.top, self.calls)

    # ops --------------------------------------------------------------------------------------------------------------

    def _op(self, n: int, op: Op) -> None:
        p = self.p
        if self.lies.views[n]:
            base = op.refs[0].name
            before = offset(op, self.lies.strides[base])
            self.at[op.name] = self.at[base] + (f" + {self._number(before)} * {ITEMSIZE[op.type.dtype]}" if before else "")
            if base in self.block:
                self.block[op.name] = self.block[base]
            return
        self._make(op.results)
        kind = f"{TYPES[computed(op.type.dtype)]}, {TYPES[op.type.dtype]}"
        y, x = self._pointer(op.name), [self._pointer(r.name) for r in op.refs]
        if op.target in ("aten.mm", "aten.addmm"):
            a, w = (r.name for r in op.refs[-2:])
            (rows, width), outputs = p.types[a].local(p.mesh), op.type.local(p.mesh)[1]
            lying = self._lying(w)
            if self._lying(a) != (width, 1) or lying not in ((1, width), (outputs, 1)) or (op.target == "aten.addmm" and (op.kwargs or p.types[op.refs[0].name].shape != (outputs,))):
                raise CodegenError(f"%{op.name}: operands of a product that lie otherwise")
            if lying == (1, width):
                self._product(op, x[-2], x[-1], "nullptr", y, TYPES[op.type.dtype], rows, width, outputs)
            else:
                self._line(f"product_flat<{kind}>({x[-2]}, {x[-1]}, {y}, {self._number(rows)}, {width}, {outputs}, threads);", op)
            if op.target == "aten.addmm":
                self._line(f"add_bias<{TYPES[op.type.dtype]}>({y}, {x[0]}, {self._number(rows)}, {outputs});", op)
        elif op.target == "eight_bits.mm":
            (rows, width), outputs, stored = self._shape(op.refs[0].name), self._shape(op.name)[1], EIGHT[str(op.kw("kind"))]
            if self._lying(op.refs[0].name) != (width, 1):
                raise CodegenError(f"%{op.name}: operands of a product that lie otherwise")
            self._product(op, x[0], f"({stored} *)({self.at[op.refs[1].name]})", x[2], y, stored, rows, width, outputs)
            if len(x) > 3:
                self._line(f"add_bias<{TYPES[op.type.dtype]}>({y}, {x[3]}, {self._number(rows)}, {outputs});", op)
        elif op.target == "eight_bits.rows":
            ids, (size, width), stored = op.refs[2].name, self._shape(op.refs[0].name), EIGHT[str(op.kw("kind"))]
            if self._lying(ids) != contiguous(self._shape(ids)):
                raise CodegenError(f"%{op.name}: ids that lie otherwise")
            self._line(f"if (!gather_eight<{kind}, {stored}>(({stored} *)({self.at[op.refs[0].name]}), {size}, {x[1]}, {x[2]}, {y}, {self._number(prod(self._shape(ids)))}, {width})) return 1;", op)
        elif op.target == "embedding" and len(op.args) == 2 and p.types[op.refs[1].name].dtype == "i64":
            self._gather(op, y, op.refs[0].name, op.refs[1].name, p.types[op.refs[0].name].local(p.mesh))
        elif op.target == "aten.index.Tensor" and self._picks_rows(op):
            table, ids = op.refs[0].name, op.refs[1].name
            _, dims = op.args
            assert isinstance(dims, tuple)
            self._gather(op, y, table, ids, p.types[table].local(p.mesh)[len(dims) - 1 :], from_end=True)
        elif op.target == "paged_attention":
            self._attend(op, y, x, kind)
        else:
            g = Group(op.name, n, n + 1, tuple(dict.fromkeys(r.name for r in op.refs)), op.results)
            self._alone(op, g)

    def _product(self, op: Op, x: str, w: str, scale: str, y: str, stored: str, rows: int, width: int, outputs: int) -> None:
        """Joined to the line before, where that multiplies the same operand by weights that are ``stored`` alike."""
        if self.joined[:2] == ((x, stored), len(self.lines)):
            self.lines.pop()
            self.calls -= 1
        else:
            self.joined = (("", ""), 0, [])
        each = [*self.joined[2], (w, scale, y, str(outputs))]
        ws, scales, ys, ns = (", ".join(e[i] for e in each) for i in range(4))
        wide, storage = TYPES[computed(op.type.dtype)], TYPES[op.type.dtype]
        self._line(
            f"{{ const {stored} *w[] = {{{ws}}}; const {wide} *s[] = {{{scales}}}; {storage} *y[] = {{{ys}}}; const int64_t o[] = {{{ns}}}; "
            f"products<{wide}, {storage}, {stored}>({x}, {len(each)}, w, s, y, o, {self._number(rows)}, {width}, threads); }}", op,
        )  # fmt: skip
        self.joined = ((x, stored), len(self.lines), each)

    def _gather(self, op: Op, y: str, table: str, ids: str, shape: Shape, from_end: bool = False) -> None:
        """``shape``: of the table, from the dimension that rows are picked of; ``from_end``: an id below zero counts from its end."""
        size, *width = shape
        if self._lying(table)[-len(width) - 1 :] != contiguous(shape) or self._lying(ids) != contiguous(self._shape(ids)):
            raise CodegenError(f"%{op.name}: a table that lies otherwise")
        said = f"{self._pointer(table)}, {self._number(size)}, (const int64_t *)({self.at[ids]}), {y}, {self._number(prod(self._shape(ids)))}, {prod(width)}, {str(from_end).lower()}"
        self._line(f"if (!gather<{TYPES[op.type.dtype]}>({said})) return 1;", op)

    def _picks_rows(self, op: Op) -> bool:
        """Whether one list of rows is picked from a tensor of one such dimension, those before it having one element."""
        if len(op.args) != 2 or len(op.refs) != 2 or not isinstance(op.args[1], tuple):
            return False
        *before, ids = op.args[1]
        shape = self._shape(op.refs[0].name)
        return isinstance(ids, Ref) and all(b is None for b in before) and prod(shape[: len(before)]) == 1 and self.p.types[ids.name].dtype == "i64" and len(self._shape(ids.name)) == 1

    def _attend(self, op: Op, y: str, operands: Sequence[str], kind: str) -> None:
        shapes = [self._shape(r.name) for r in op.refs[:3]]
        if any(self.p.types[r.name].dtype != op.type.dtype for r in op.refs):
            raise CodegenError(f"%{op.name}: attention in several dtypes")
        x, places = list(operands), list[tuple[int, int]]()
        for n, (r, shape) in enumerate(zip(op.refs[:3], shapes, strict=True)):
            if self._lying(r.name) != contiguous(shape):
                begin, end = self.places.take(prod(shape[1:]) * self.most * ITEMSIZE[op.type.dtype])
                places.append((begin, end))
                laid = f"({TYPES[op.type.dtype]} *)(arena + {begin})"
                self._line(f"lay<{TYPES[op.type.dtype]}>({x[n]}, {laid}, {', '.join(map(self._number, (*shape, *self._lying(r.name))))});", op)
                x[n] = laid
        layer, storage = self._int(op, "layer"), TYPES[op.type.dtype]
        (tokens, heads, width), (_, held, _), (_, _, value_width) = shapes
        keys, values = (f"({storage} *)caches[{2 * layer + i}]" for i in (0, 1))
        for name, cache, wide in ((x[1], keys, width), (x[2], values, value_width)):
            self._line(f"put<{storage}>({name}, {cache}, slots, {self._number(tokens)}, {held}, pages * size, {wide});", op)
        self.calls -= 1
        sinks = x[3] if len(x) > 3 else f"(const {storage} *)nullptr"
        said = f"{op.kw('scale')!r}, {self._int(op, 'window')}, {op.kw('softcap')!r}"
        for place in places:
            self.places.free(*place)
        self._line(f"attend<{kind}>({x[0]}, {keys}, {values}, {y}, {sinks}, table, lengths, news, rows, sequences, longest, {held}, {heads // held}, pages, size, {width}, {value_width}, {said}, threads);", op)

    def _alone(self, op: Op, g: Group) -> None:
        """An op outside of groups, such as a copy."""
        part = fragment(self.p, g)
        strides = [self.lies.strides[r] for r in g.reads]
        text = f"{part}{strides}{[self._lying(r) for r in g.makes]}"
        name = self.alone.get(text, "")
        known = source(part, f"alone_{len(self.alone)}", strides, [self._lying(r) for r in g.makes], self.free)
        if not name:
            self.alone[text] = known.text
        self._call(f"alone_{list(self.alone).index(text)}", known, g.reads, g.makes)

    def _call(self, name: str, f: Function, reads: Sequence[str], makes: Sequence[str]) -> None:
        rows = self.free[f.free] if f.free else "1"
        pointers = [f"({kind})({self.at[v]})" for kind, v in zip(f.pointers, [*reads, *makes], strict=True)]
        self.lines.append(f"{name}({', '.join([rows, 'threads', *pointers])});")
        self.calls += 1

    # places -----------------------------------------------------------------------------------------------------------

    def _make(self, values: Sequence[str]) -> None:
        for value in values:
            if value == self.returned:
                self.at[value] = "(char *)out"
                continue
            size = prod(n // s * self.most if (s := next((s for s in self.free if n and n % s == 0), 0)) else n for n in self._shape(value)) * ITEMSIZE[self.p.types[value].dtype]
            begin, end = self.places.take(size)
            self.at[value] = f"arena + {begin}"
            self.block[value] = (begin, end, value)

    def _used(self, reads: Sequence[str], makes: Sequence[str]) -> None:
        """Uses are counted for a block and all its views together: the last one frees it."""
        for value in makes:
            if value in self.block:
                base = self.block[value][2]
                self.left[base] = self.left.get(base, 0) + sum(isinstance(u, Op) for u in self.p.uses[value])
        for value in reads:
            if value in self.block:
                self.left[self.block[value][2]] -= 1
        for value in dict.fromkeys([*reads, *makes]):
            if value in self.block and self.left[self.block[value][2]] == 0:
                begin, end, base = self.block[value]
                self.left[base] = -1
                self.places.free(begin, end)

    def _line(self, text: str, op: Op) -> None:
        self.lines.append(text + (f"  // {op.path}" if op.path else ""))
        self.calls += 1

    def _shape(self, value: str) -> Shape:
        return self.p.types[value].local(self.p.mesh)

    def _lying(self, value: str) -> Shape:
        return self.lies.strides[value]

    def _pointer(self, value: str) -> str:
        return f"({TYPES[self.p.types[value].dtype]} *)({self.at[value]})"

    def _number(self, n: int) -> str:
        name, k = next(((name, n // s) for s, name in self.free.items() if n and n % s == 0), ("", n))
        return f"{name} * {k}" if name and k > 1 else name or str(n)

    def _int(self, op: Op, key: str) -> int:
        value = op.kw(key, 0)
        assert isinstance(value, int)
        return value
