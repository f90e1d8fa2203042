"""A fragment of a packed step as one C++ function, for any number of rows.

    source(fragment, strides, lying, {503: "T", 509: "L"}) -> Function("extern "C" void kernel_..(int64_t n, int threads, const float *i0, .., float *v6)")

A packed step treats its rows alike, so a fragment whose values have rows in one dimension, a multiple of a free size, is a loop over rows. What one row
makes has a fixed shape and stays in the nearest cache: values that are read once are expressions, others are small arrays. Views are maps of indices.
What mixes rows is refused: CodegenError, and the python back end runs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from math import prod

from deepseed.codegen.cpp_ops import TYPES, computed, converted, expression, literal, type_of, wrapping
from deepseed.codegen.expressions import CodegenError
from deepseed.ir.program import Op, Program, Type

Shape = tuple[int, ...]
_INDEXED = ("cast", "expand", "reshape", "permute", "slice", "full")  # cost nothing where they are read
_REDUCE = ("sum", "amax")
LARGEST = 1 << 18  # elements that a row may hold in arrays
WORTH = 1 << 15  # elements for which a further thread pays


@dataclass(frozen=True)
class Function:
    """``rows``: the free size that ``n`` counts, and where it stands: (input, dimension, multiple); None where there is none. ``pointers``: types of its parameters behind ``threads``."""

    text: str
    free: int | None
    rows: tuple[int, int, int] | None
    pointers: tuple[str, ...]


def source(p: Program, name: str, strides: Sequence[Shape], lying: Sequence[Shape], free: Mapping[int, str]) -> Function:
    """``strides`` of the inputs and ``lying`` of the outputs, as of the stand-in sizes ``free``. Raises CodegenError."""
    return _Writer(p, name, free).function(strides, lying)


@dataclass
class _Writer:
    p: Program
    name: str
    sizes: Mapping[int, str]
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        p = self.p
        self.free = next((s for s in self.sizes for t in p.types.values() for d in t.shape if d and d % s == 0), None)
        self.row: dict[str, int | None] = {}  # the dimension of the rows
        self.shape: dict[str, Shape] = {}  # of what one row has
        for value, t in p.types.items():
            if t.dtype not in TYPES:
                raise CodegenError(f"%{value} is {t.dtype}: no C++ type for it")
            here = [d for d, size in enumerate(t.shape) if size and any(size % s == 0 for s in self.sizes)]
            if len(here) > 1 or any(t.shape[d] % (self.free or 1) for d in here):
                raise CodegenError(f"%{value} is {list(t.shape)}: rows in more than one dimension")
            self.row[value] = here[0] if here else None
            self.shape[value] = tuple(size // self.free if self.free and d in here else size for d, size in enumerate(t.shape))
        self.outputs = {o.ref.name: n for n, o in enumerate(p.outputs)}
        self.names = (f"a{n}" for n in count())
        self.at: dict[str, str] = {}  # array of a value -> how it is read
        self.place: dict[str, Shape] = {}  # strides of what lies in memory
        self.kept = self._kept()

    def function(self, strides: Sequence[Shape], lying: Sequence[Shape]) -> Function:
        p, parameters, bases = self.p, ["int64_t n", "int threads"], list[str]()
        memory = [(i.name, s, "const ") for i, s in zip(p.inputs, strides, strict=True)] + [(o.ref.name, s, "") for o, s in zip(p.outputs, lying, strict=True)]
        if len({name for name, *_ in memory}) < len(memory):
            raise CodegenError("an output is an input, or is returned twice")
        for value, stride, const in memory:
            kind, row = TYPES[p.types[value].dtype], self.row[value]
            parameters.append(f"{const}{kind} *{value}_")
            self.place[value] = stride
            step = f" + row * {self._size(stride[row] * (p.types[value].shape[row] // (self.free or 1)))}" if row is not None else ""
            bases.append(f"{const}{kind} *__restrict {value} = {value}_{step};")
        for value in self.kept:
            self._store(value)
        work = sum(prod(self.shape[r]) for op in p.ops for r in op.results)
        arrays = sum(prod(self.shape[v]) for v in self.kept if v not in self.outputs)
        if arrays > LARGEST:
            raise CodegenError(f"{arrays} elements a row: at most {LARGEST} stay near")
        where = next(((n, d, p.types[i.name].shape[d] // self.free) for n, i in enumerate(p.inputs) if (d := self.row[i.name]) is not None), None) if self.free else None
        if self.free and where is None:
            raise CodegenError("no input has the rows")
        body = [
            f'extern "C" void {self.name}({", ".join(parameters)}) {{',
            f"    #pragma omp parallel for num_threads(threads) if (threads > 1 && n * {work} > {WORTH})",
            f"    for (int64_t row = 0; row < {'n' if self.free else '1'}; ++row) {{",
            *[f"        {line}" for line in [*bases, *self.lines]],
            "    }", "}",
        ]  # fmt: skip
        return Function("\n".join(body) + "\n", self.free, where, tuple(x.rpartition("*")[0] + "*" for x in parameters[2:]))

    def _size(self, n: int) -> str:
        """A stride, whatever the number of rows is."""
        return f"(n * {n // self.free})" if self.free and n and n % self.free == 0 else str(n)

    # what is kept -----------------------------------------------------------------------------------------------------

    def _kept(self) -> list[str]:
        """Values that lie in arrays, in order: outputs, sums, joins, what is read twice or by more elements than it has, and what a reshape takes apart."""
        p, out = self.p, list[str]()
        flat = {op.refs[0].name for op in p.ops if op.target == "reshape" and not self._same(op)}
        for value in (*(i.name for i in p.inputs), *(r for op in p.ops for r in op.results)):
            op = p.producers.get(value)
            users = [u for u in p.uses[value] if isinstance(u, Op)]
            wider = any(prod(self.shape[u.name]) > prod(self.shape[value]) and u.target not in ("cat",) for u in users)
            heavy = op is not None and op.target not in _INDEXED and (len(users) > 1 or wider)
            if (op is not None and (value in self.outputs or heavy or op.target in (*_REDUCE, "cat") or value in flat)) or (op is None and value in flat):
                out.append(value)
        return out

    def _same(self, op: Op) -> bool:
        """Whether a reshape only adds or takes dimensions of one."""
        return [n for n in self.shape[op.refs[0].name] if n != 1] == [n for n in self.shape[op.name] if n != 1]

    def _store(self, value: str) -> None:
        op, shape = self.p.producers.get(value), self.shape[value]
        t = self.p.types[value]
        array = value if value in self.outputs else f"{value}_row"
        if value not in self.outputs:
            self.lines.append(f"alignas(64) {type_of(t.dtype)} {array}[{max(1, prod(shape))}];")
        if op is not None and op.target == "cat":
            at, dim = 0, self._int(op, "dim", 0)
            if self.row[value] == dim:
                raise CodegenError(f"%{value}: rows are joined")
            for ref in op.refs:
                part = self.shape[ref.name]
                index = self._loops(part)
                moved = tuple(_plus(i, at) if d == dim else i for d, i in enumerate(index))
                self._assign(value, array, moved, converted(self.read(ref.name, index), self._kind(ref.name), self._kind(value)), part)
                at += part[dim]
        elif op is not None and op.target in _REDUCE:
            self._reduce(op, array)
        else:
            index = self._loops(shape)
            text = self._element(op, index) if op is not None else self.read(value, index)
            self._assign(value, array, index, text, shape)
        if value not in self.outputs:
            self.at[value] = array

    def _reduce(self, op: Op, array: str) -> None:
        x = op.refs[0].name
        given = op.kw("dims", ())
        assert isinstance(given, tuple)
        dims = {int(d) for d in given if isinstance(d, int)}
        if self.row[x] in dims:
            raise CodegenError(f"%{op.name}: rows are added up")
        shape, kind = self.shape[x], self._kind(op.name)
        outer = self._loops(tuple(1 if d in dims else n for d, n in enumerate(shape)))
        first = literal(0, kind) if op.target == "sum" else literal(float("-inf"), kind) if kind in ("f32", "f64") else f"std::numeric_limits<{TYPES[kind]}>::lowest()"
        deep = sum(i != "0" for i in outer)
        total, held = f"{op.name}_total", wrapping(TYPES[kind]) if op.target == "sum" else TYPES[kind]
        self._line(f"{held} {total} = {first};", deep)
        inner = [d for d in sorted(dims) if shape[d] != 1]
        names = {d: next(self.names) for d in inner}
        for n, d in enumerate(inner):
            if d == inner[-1]:
                self._line(f"#pragma omp simd reduction({'+' if op.target == 'sum' else 'highest'}:{total})", deep + n)
            self._line(f"for (int {names[d]} = 0; {names[d]} < {shape[d]}; ++{names[d]})", deep + n)
        index = tuple(names.get(d, i) for d, i in enumerate(outer))
        element = converted(self.read(x, index), self._kind(x), kind)
        self._line(f"{total} += {element};" if op.target == "sum" else f"{total} = most({total}, {held}({element}));", deep + len(inner))
        keep = bool(op.kw("keepdim", False))
        at = tuple(i for d, i in enumerate(outer) if keep or d not in dims)
        self._line(f"{self._target(op.name, array, at)} = {self._stored(op.name, total if held == TYPES[kind] else f'{TYPES[kind]}({total})')};", deep)
        self._close(deep)

    def _loops(self, shape: Shape) -> tuple[str, ...]:
        """Open a loop for each dimension. The caller closes them."""
        index, deep = list[str](), 0
        for size in shape:
            if size == 1:
                index.append("0")
            else:
                index.append(next(self.names))
                self._line(f"for (int {index[-1]} = 0; {index[-1]} < {size}; ++{index[-1]}) {{", deep)
                deep += 1
        return tuple(index)

    def _assign(self, value: str, array: str, index: Sequence[str], text: str, looped: Shape) -> None:
        deep = sum(n != 1 for n in looped)
        self._line(f"{self._target(value, array, index)} = {self._stored(value, text)};", deep)
        self._close(deep)

    def _close(self, deep: int) -> None:
        for n in reversed(range(deep)):
            self._line("}", n)

    def _line(self, text: str, deep: int) -> None:
        self.lines.append("    " * deep + text)

    def _target(self, value: str, array: str, index: Sequence[str]) -> str:
        return f"{array}[{self._offset(value, index) if value in self.outputs else _flat(index, self.shape[value])}]"

    def _stored(self, value: str, text: str) -> str:
        return f"down<{TYPES[self.p.types[value].dtype]}>::of({text})" if value in self.outputs else text

    # what is read -----------------------------------------------------------------------------------------------------

    def read(self, value: str, index: Sequence[str]) -> str:
        """An element of one row's value, as it is computed."""
        if value in self.at:
            return f"{self.at[value]}[{_flat(index, self.shape[value])}]"
        op = self.p.producers.get(value)
        if op is None or value in self.outputs:
            return f"up({value}[{self._offset(value, index)}])"
        return f"({self._element(op, index)})"

    def _offset(self, value: str, index: Sequence[str]) -> str:
        return _sum([(i, self._size(s)) for i, s in zip(index, self.place[value], strict=True)])

    def _element(self, op: Op, index: Sequence[str]) -> str:
        """The op's own text, where it is no sum and no join."""
        p = self.p
        if op.target == "full":
            return literal(op.kw("value"), self._kind(op.name))
        if not op.refs or not (op.target.startswith("aten.") or op.target in _INDEXED):
            raise CodegenError(f"%{op.name} = {op.target}: no C++ expression for it")
        x = op.refs[0].name
        if op.target == "cast":
            text = converted(self.read(x, index), self._kind(x), self._kind(op.name))
            return f"up(down<{TYPES[op.type.dtype]}>::of({text}))" if op.type.dtype in ("bf16", "f16") else text
        if op.target == "expand":
            return self.read(x, self._spread(p.types[x], x, index))
        if op.target == "permute":
            dims = op.kw("dims")
            assert isinstance(dims, tuple)
            at = ["0"] * len(dims)
            for d, source_dim in enumerate(dims):
                assert isinstance(source_dim, int)
                at[source_dim] = index[d]
            return self.read(x, at)
        if op.target == "slice":
            dim, start, by = self._int(op, "dim", 0), self._int(op, "start", 0), self._int(op, "step", 1)
            if self.row[x] == dim:
                raise CodegenError(f"%{op.name}: some of the rows")
            return self.read(x, [_plus(i if by == 1 else f"({i}) * {by}" if i != "0" else "0", start) if d == dim else i for d, i in enumerate(index)])
        if op.target == "reshape":
            self._rows_stay(op)
            if not self._same(op):
                if x not in self.at:
                    raise CodegenError(f"%{op.name}: a reshape of a value that leaves the kernel")
                return f"{self.at[x]}[{_flat(index, self.shape[op.name])}]"
            left = [i for i, n in zip(index, self.shape[op.name], strict=True) if n != 1]
            return self.read(x, [left.pop(0) if n != 1 else "0" for n in self.shape[x]])
        return expression(p, op, [self.read(r.name, self._spread(p.types[r.name], r.name, index)) for r in op.refs])

    def _spread(self, t: Type, x: str, index: Sequence[str]) -> list[str]:
        """Where an operand has the element of the result at ``index``."""
        return ["0" if n == 1 else i for n, i in zip(self.shape[x], index[len(index) - len(t.shape) :], strict=True)]

    def _rows_stay(self, op: Op) -> None:
        """Before the rows a reshape must have as many elements as after it."""
        x, y = op.refs[0].name, op.name
        a, b = self.row[x], self.row[y]
        if a is not None and b is not None and prod(self.shape[x][:a]) != prod(self.shape[y][:b]):
            raise CodegenError(f"%{op.name}: a reshape that mixes rows")

    def _kind(self, value: str) -> str:
        return computed(self.p.types[value].dtype)

    def _int(self, op: Op, key: str, default: int) -> int:
        value = op.kw(key, default)
        assert isinstance(value, int)
        return value


def _plus(index: str, n: int) -> str:
    return index if not n else str(n) if index == "0" else f"{index} + {n}"


def _flat(index: Sequence[str], shape: Shape) -> str:
    return _sum([(i, str(prod(shape[d + 1 :]))) for d, i in enumerate(index)])


def _sum(terms: Sequence[tuple[str, str]]) -> str:
    words = [(i if i.isidentifier() or i.isdigit() else f"({i})") + (f" * {s}" if s != "1" else "") for i, s in terms if i != "0" and s != "0"]
    return " + ".join(words) or "0"
