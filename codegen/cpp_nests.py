"""A fragment of fixed shapes as one C++ function: nests of loops over iteration spaces.

    source(fragment, name, strides) -> Function("extern "C" int kernel_..(int threads, const float *i0_, .., float *v6_)")

A nest has an outer loop over rows, which threads share, and loops along a row. What reduces rows takes a pass along the row each, as far as one waits for another; what a pass has made with
effort, or stored, later passes read again from where it lies in the nearest cache. Sums across rows are added up in blocks of rows, one after another, whatever the number of threads.
What no nest makes is refused: CodegenError, and the python back end runs it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import prod

from deepseed.codegen.cpp_ops import LIBRARY as EXPRESSIONS
from deepseed.codegen.cpp_ops import TYPES, computed, converted, type_of
from deepseed.codegen.cpp_points import Bound, Points, Register, Strides, accumulator, variables
from deepseed.codegen.expressions import CodegenError
from deepseed.codegen.index_maps import Index, Refine, Var, flat, of
from deepseed.codegen.lookups import numbered
from deepseed.codegen.spaces import REDUCTIONS, Indices, Space, add, ops_of, space_of
from deepseed.ir.program import Op, Program
from deepseed.rules.strides import Lying, contiguous

BLOCKS = 16  # in which sums across rows are added up
LEAST = 32  # rows of such a block
STRETCH = 4096  # elements of a row that are added up at a time
WORTH = 1 << 15  # elements for which a further thread pays
KEPT = 1 << 16  # elements of a row that are kept for later passes
EFFORT = ("exp", "log", "tanh", "sigmoid", "silu", "gelu", "erf", "sin", "cos", "pow", "sqrt", "rsqrt", "bernoulli", "softplus")
LARGEST = 1 << 31

LIBRARY = EXPRESSIONS + r"""
#include <memory>
template <class T> static inline int checked(T x, int size, int &wrong) {  // a number that something is picked by
    bool inside = x >= 0 && x < size;
    wrong |= !inside;
    return inside ? int(x) : 0;
}
static inline uint64_t drawn_mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}
static inline uint64_t drawn_key(int64_t seed, int64_t step, uint64_t site) { return drawn_mix(drawn_mix(uint64_t(seed) * 0x9E3779B97F4A7C15ull + site) + uint64_t(step) * 0x9E3779B97F4A7C15ull); }
static inline int32_t drawn_lane(uint64_t key, uint64_t element) { return int32_t(uint32_t(drawn_mix(((element >> 1) + 1) * 0x9E3779B97F4A7C15ull + key) >> ((element & 1) * 32))); }
#pragma omp declare reduction(highest : float, double, int64_t, int32_t, int16_t, int8_t, uint8_t, bool : omp_out = most(omp_out, omp_in)) initializer(omp_priv = omp_orig)
"""


@dataclass(frozen=True)
class Function:
    """``makes``: what it writes, each with shape, strides and dtype; ``outputs``: whether an output lies in an input's memory, the number of that or of what is written, strides and offset in there;
    ``reused``: inputs in whose memory a result may be written, if nothing else reads it: (input, number of the result)."""

    text: str
    makes: tuple[tuple[Strides, Strides, str], ...]
    outputs: tuple[tuple[bool, int, Strides, int], ...]
    reused: tuple[tuple[int, int], ...] = ()


def source(p: Program, name: str, strides: Sequence[Strides]) -> Function:
    """``strides``: of the inputs. Raises CodegenError."""
    return _Writer(numbered(p), name, strides).function()


class _Writer:
    def __init__(self, p: Program, name: str, strides: Sequence[Strides]) -> None:
        self.p, self.name = p, name
        for value, t in p.types.items():
            if t.dtype not in TYPES:
                raise CodegenError(f"%{value} is {t.dtype}: no C++ type for it")
            if not 0 < t.numel < LARGEST:
                raise CodegenError(f"%{value} has {t.numel} elements: a loop has 1 to {LARGEST - 1}")
        lying = Lying(p)
        lying.strides.update(zip([i.name for i in p.inputs], strides, strict=True))
        self.views: dict[str, tuple[str, Strides, int]] = {}  # value -> what it is a view of, strides, offset
        for op in p.ops:
            view = lying.view(op) if op.refs else None
            lying.strides.update((r, view if view is not None else lying.fresh(op, p.types[r].shape)) for r in op.results)
            if view is not None:
                base, _, offset = self.views.get(op.refs[0].name, (op.refs[0].name, (), 0))
                if op.target == "slice":
                    offset += lying.strides[op.refs[0].name][int(str(op.kw("dim", 0)))] * int(str(op.kw("start", 0)))
                self.views[op.name] = (base, view, offset)
        self.strides, self.inputs = lying.strides, {i.name: n for n, i in enumerate(p.inputs)}
        if any(sum((n - 1) * s for n, s in zip(i.type.shape, given, strict=True)) >= LARGEST for i, given in zip(p.inputs, strides, strict=True)):
            raise CodegenError(f"an operand of {name} reaches beyond {LARGEST} elements")
        self.memory: dict[str, Strides] = {i.name: s for i, s in zip(p.inputs, strides, strict=True)}
        self.own: dict[str, str] = {}  # what lies in memory of the function's own, with its declaration

    def function(self) -> Function:
        p, makes, outputs = self.p, dict[str, Strides](), list[tuple[bool, int, Strides, int]]()
        for o in p.outputs:
            base, strides, offset = self.views.get(o.ref.name, (o.ref.name, self.strides[o.ref.name], 0))
            if base not in self.inputs:
                makes[base] = self.strides[base]
            outputs.append((base in self.inputs, self.inputs[base] if base in self.inputs else list(makes).index(base), strides, offset))
        self.makes = makes
        pending, body, nests = list(makes), list[str](), list[_Nest]()
        while pending:
            nest, lines = self.nest(pending)
            body += lines
            nests.append(nest)
            pending = [t for t in pending if t not in nest.stored]
        inputs = [f"const {TYPES[i.type.dtype]} *__restrict {i.name}" for i in p.inputs]
        given = [f"{TYPES[p.types[value].dtype]} *__restrict {value}" for value in makes]
        head = f'extern "C" int {self.name}({", ".join(["int threads", *inputs, *given])}) {{'
        lines = [head, "    int wrong = 0;", *(f"    {line}" for line in (*self.own.values(), *body)), "    return wrong;", "}"]
        reused = [(n, m) for m, value in enumerate(makes) for i, n in self.inputs.items() if self.alike(i, value) and all(nest.over(i, value) if value in nest.stored else i not in nest.reads for nest in nests)]
        return Function("\n".join(lines) + "\n", tuple([(p.types[value].shape, strides, p.types[value].dtype) for value, strides in makes.items()]), tuple(outputs), tuple(reused))

    def alike(self, a: str, b: str) -> bool:
        """Whether two values fill the same memory."""
        t, u = self.p.types[a], self.p.types[b]
        return (t.dtype, t.numel) == (u.dtype, u.numel) and not self.shown(a)

    def shown(self, a: str) -> bool:
        """Whether an output is a view of an input."""
        return any(self.views.get(o.ref.name, (o.ref.name,))[0] == a for o in self.p.outputs)

    # nests ------------------------------------------------------------------------------------------------------------

    def nest(self, pending: Sequence[str]) -> tuple[_Nest, list[str]]:
        targets, split = list(pending), dict[tuple[str, int], bool]()
        while True:
            closure = self.closure(targets)
            try:
                space = space_of(self.p, self.root(closure, targets), closure, targets, split)
                plan = _plan(self.p, space, ops_of(self.p, closure - set(self.memory)), targets)
                if plan is None:
                    first = self.first(closure, targets)
                    if first in targets and len(targets) == 1:
                        raise CodegenError(f"%{first} = {self.p.producers[first].target}: no iteration space in which one nest makes it")
                    targets, split = [first], {}
                    continue
                for value in (*plan.targets, *plan.sums):
                    if value not in self.makes:
                        t = self.p.types[value]
                        self.own[value] = f"const std::unique_ptr<{type_of(t.dtype)}[]> {value}_own(new {type_of(t.dtype)}[{t.numel}]); {type_of(t.dtype)} *__restrict {value} = {value}_own.get();"
                nest = _Nest(self.p, space, self.memory, plan, {v: self.makes.get(v, contiguous(self.p.types[v].shape)) for v in (*plan.targets, *plan.sums)}, set(self.own))
                lines = nest.written()
                break
            except Refine as asked:
                add(split, asked)
        for value in nest.stored:
            t = self.p.types[value]
            if value in self.own or t.dtype == computed(t.dtype):  # what is rounded when it is stored is made again
                self.memory[value] = nest.lying[value]
        return nest, lines

    def closure(self, targets: Collection[str], tied: bool = False) -> set[str]:
        found, todo = set[str](), list(targets)
        while todo:
            value = todo.pop()
            if value not in found:
                found.add(value)
                if value not in self.memory:
                    todo += [r.name for r in self.p.producers[value].refs]
        return found

    def root(self, closure: Collection[str], targets: Sequence[str]) -> str:
        """The value whose elements are the points of the space: the largest one, a target if there is one."""
        reduced = [op.refs[0].name for op in self.p.ops if op.target in REDUCTIONS and op.name in closure]
        order = [v for v in (*targets, *reduced, *(r for op in self.p.ops for r in op.results), *self.inputs) if v in closure]
        return max(order, key=lambda v: self.p.types[v].numel)

    def first(self, closure: Collection[str], targets: Sequence[str]) -> str:
        """A reduction that waits for no other one; where there is none, the first target."""
        for op in ops_of(self.p, closure):
            if op.target in REDUCTIONS and op.name not in self.memory and not any(o.target in REDUCTIONS and o.name not in self.memory and o is not op for o in ops_of(self.p, self.closure([op.name]))):
                return op.name
        return targets[0]


@dataclass(frozen=True)
class _Plan:
    """``row``: the variables along a row; ``targets``: what is stored; ``sums``: what is added up across rows."""

    row: frozenset[Var]
    targets: tuple[str, ...]
    sums: tuple[str, ...]


def _plan(p: Program, space: Space, ops: Sequence[Op], targets: Sequence[str]) -> _Plan | None:
    """None where nothing can be made yet."""
    over = {op.name: space.reduced(p, op) for op in ops if op.target in REDUCTIONS}
    every = frozenset(space.vars)
    row = _row(p, space, ops, {name: s for name, s in over.items() if s})
    blocked, sums = set[str](), list[str]()
    for op in ops:
        s = over.get(op.name, row)
        if any(r.name in blocked for r in op.refs):
            blocked.update(op.results)
        elif op.name in over and s != frozenset() and (s != row or op.name not in space.index):
            blocked.add(op.name)
            if s is not None and s == every - row and op.name in space.index:
                sums.append(op.name)
    now = [t for t in targets if t not in blocked and t in space.index and _covered(p, space, t)]
    x = every - row - {v for v in space.vars if v.unrolled}
    now = [t for t in now if x <= variables(space.index[t])] or now
    wanted = [s for s in sums if s in targets] + [s for s in sums if s not in targets and _read(p, s, ops)]
    return _Plan(row, tuple(now), tuple(wanted)) if now or wanted else None


def _read(p: Program, value: str, ops: Sequence[Op]) -> bool:
    return any(isinstance(u, Op) and u in ops for u in p.uses[value])


def _covered(p: Program, space: Space, target: str) -> bool:
    return prod(v.size for v in variables(space.index[target])) == p.types[target].numel


def _row(p: Program, space: Space, ops: Sequence[Op], over: dict[str, frozenset[Var]]) -> frozenset[Var]:
    every = frozenset(space.vars)
    if not space.vars:
        return every
    for name, s in over.items():
        if s != every and (space.vars[-1] in s or _read_along(space, name, s, ops)):
            return s
    if columns := [s for s in over.values() if s != every]:
        return every - columns[0]
    if every in over.values():
        return every
    return frozenset(space.vars[-1:])


def _read_along(space: Space, name: str, over: frozenset[Var], ops: Sequence[Op]) -> bool:
    """Whether a reduction's result is used at each point of what it reduces."""
    after = {name}
    for op in ops:
        if any(r.name in after for r in op.refs):
            after.update(op.results)
            if any(i.vars & over for i in space.index.get(op.name, ())):
                return True
    return False


class _Nest(Points):
    """Writes one nest. ``lying``: of what it stores; ``own``: of these, what is kept in the precision of registers."""

    def __init__(self, p: Program, space: Space, memory: dict[str, Strides], plan: _Plan, lying: dict[str, Strides], own: set[str]) -> None:
        super().__init__(p, space, dict(memory))
        self.plan, self.lying, self.own = plan, lying, own
        self.stored = (*plan.targets, *plan.sums)
        self.x = [v for v in space.vars if v not in plan.row and not v.unrolled]
        self.r = sorted((v for v in space.vars if v in plan.row and not v.unrolled), key=self._stride, reverse=True)
        needed = self._needed()
        if len(self.r) == 1 and not plan.sums and not any(op.target in REDUCTIONS and op.name in needed and op.name not in memory for op in p.ops):
            self.x, self.r = self._by_stride()
        self.kept: dict[str, str] = {}  # made by an earlier pass -> the array along the row
        self.done: set[tuple[str, Indices]] = set()  # targets that an earlier pass stored
        self.writes: dict[str, list[tuple[str, int]]] = {}  # as ``reads``

    def _stride(self, v: Var) -> int:
        """How far apart two neighbours lie in what is stored, or read first."""
        for value in (*self.stored, *self.memory):
            if value in self.space.index:
                lying = self.lying[value] if value in self.lying else self.memory[value]
                place = Index()
                for i, s in zip(self.space.index[value], lying, strict=True):
                    place += i * s
                if (c := dict(place.terms).get(v)) is not None:
                    return abs(c)
        return 0

    def _by_stride(self) -> tuple[list[Var], list[Var]]:
        """Where nothing is reduced: as the result lies."""
        order = sorted([*self.x, *self.r], key=self._stride, reverse=True)
        return order[:-1], order[-1:]

    def over(self, read: str, value: str) -> bool:
        """Whether each element of what is read is read at one point, before ``value`` is written there."""
        writes, reads = self.writes.get(value, []), self.reads.get(read, [])
        points = prod(v.size for v in (*self.x, *self.r))
        return points == self.p.types[value].numel and len(writes) == 1 and all(place == writes[0][0] and n < writes[0][1] for place, n in reads)

    # source -----------------------------------------------------------------------------------------------------------

    def written(self) -> list[str]:
        rows, columns = prod(v.size for v in self.x), prod(v.size for v in self.r)
        if self.plan.sums:
            self._blocks(rows, columns)
        elif self.x:
            self.open(f"#pragma omp parallel for num_threads(threads) reduction(|:wrong) if (threads > 1 && {rows * columns} > {WORTH})\nfor (int64_t row = 0; row < {rows}; ++row)", *self.x)
            self._row()
            self.close()
        else:
            self._row()
        return ["{", *(f"    {line}" for line in self.scopes[0].lines), "}"]

    def _row(self) -> None:
        """All that a row's scope has: passes that reduce it, then what is stored."""
        if self.x:
            self.scopes[-1].lines += [f"const int {v.name} = {place};" for v, place in zip(self.x, _decoded("int(row)", [v.size for v in self.x]), strict=True)]
        base = len(self.scopes)
        inner = [op for op in self.p.ops if op.target in REDUCTIONS and op.name in self._needed() and self.space.reduced(self.p, op) == self.plan.row and self.plan.row]
        depth: dict[str, int] = {}
        for op in self.p.ops:
            at = max([depth.get(r.name, 0) for r in op.refs], default=0)
            depth.update(dict.fromkeys(op.results, at + 1 if op in inner else at))
        passes = [[op for op in inner if depth[op.name] == n] for n in sorted({depth[op.name] for op in inner})]
        keeping = self._keeping(passes)
        for n, now in enumerate(passes):
            self._reduce(now, keeping[n])
        self._store(self._along(False))
        along, sums = self._along(True), [(s, b) for s in self.plan.sums for b in self.of_index(self.space.index[s])]
        rows_only = [(s, b) for s, b in sums if not self._varies(self.p.producers[s].refs[0].name)]
        self._accumulate(rows_only)
        sums = [each for each in sums if each not in rows_only]
        if along or sums:
            self._open_row()
            self._store(along)
            self._accumulate(sums)
            while len(self.scopes) > base:
                self.close()

    def _open_row(self, before: str = "#pragma omp simd") -> None:
        for v in self.r:
            self.open((f"{before}\n" if v is self.r[-1] and before else "") + f"for (int {v.name} = 0; {v.name} < {v.size}; ++{v.name})", v)

    # passes -----------------------------------------------------------------------------------------------------------

    def _needed(self) -> set[str]:
        return self._reach([*self.plan.targets, *(self.p.producers[s].refs[0].name for s in self.plan.sums)], ())

    def _reach(self, values: Sequence[str], stop: Collection[str]) -> set[str]:
        """What is made for ``values``; what ``stop`` has is read."""
        found, todo = set[str](), list(values)
        while todo:
            value = todo.pop()
            if value not in found:
                found.add(value)
                if value not in self.memory and value not in stop:
                    todo += [r.name for r in self.p.producers[value].refs]
        return found

    def _keeping(self, passes: Sequence[Sequence[Op]]) -> list[list[str]]:
        """For each pass that reduces, what it keeps for later ones: what took effort, or is stored in any case."""
        roots = [[op.refs[0].name for op in now] for now in passes] + [[*self._targets(True), *(self.p.producers[s].refs[0].name for s in self.plan.sums)]]
        reduced = {op.name for now in passes for op in now}
        kept: list[list[str]] = [[] for _ in roots]
        there: dict[str, int] = {}  # value -> the first pass that makes it
        all_kept: set[str] = set()
        for n, values in enumerate(roots):
            todo, seen = list(values), set[str]()
            while todo:
                value = todo.pop()
                if value in seen or value in self.memory or value in reduced:
                    continue
                seen.add(value)
                if value in there and there[value] < n and value not in all_kept and self._worth_keeping(value):
                    kept[there[value]].append(value)
                    all_kept.add(value)
                if value not in all_kept or there.get(value, n) == n:
                    there.setdefault(value, n)
                    todo += [r.name for r in self.p.producers[value].refs]
        return kept

    def _worth_keeping(self, value: str) -> bool:
        op, size = self.p.producers[value], prod(v.size for v in self.plan.row)
        if value not in self.space.index or not self._varies(value) or not self.plan.row <= variables(self.space.index[value]):
            return False
        if self._read_back(value):
            return True
        return size <= KEPT and op.target.removeprefix("aten.").partition(".")[0].startswith(EFFORT)

    def _read_back(self, value: str) -> bool:
        """Whether what is stored is all of a value."""
        dtype = self.p.types[value].dtype
        return value in self.plan.targets and (value in self.own or dtype == computed(dtype))

    def _varies(self, value: str) -> bool:
        """Whether a value differs along the row."""
        return bool(self.plan.row & variables(self.space.index[value])) if value in self.space.index else True

    def _reduce(self, now: Sequence[Op], keep: Sequence[str]) -> None:
        """One pass along the row."""
        names: list[tuple[Op, dict[Var, Index], str, str, str]] = []
        outer = len(self.scopes) - 1
        for op in now:
            kind, start = accumulator(op)
            for bound in self.of_index(self.space.index[op.name]):
                self.count += 1
                names.append((op, bound, f"s{self.count}", kind, start))
                self.scopes[-1].lines.append(f"{kind} s{self.count} = {start};")
        for value in keep:
            if not self._read_back(value):
                size = prod(v.size for v in self.plan.row)
                self.scopes[-1].lines.append(f"alignas(64) {type_of(self.p.types[value].dtype)} {value}_row[{size}];")
        *slow, fast = self.r or [Var("one", 1)]
        for v in slow:
            self.open(f"for (int {v.name} = 0; {v.name} < {v.size}; ++{v.name})", v)
        stretch = fast.size > STRETCH
        if stretch:
            self.open(f"for (int first = 0; first < {fast.size}; first += {STRETCH})")
        local = slow or stretch
        if local:
            self.scopes[-1].lines += [f"{kind} {name}_part = {start};" for *_, name, kind, start in names]
        sums, highest = ([f"{n[2]}{'_part' if local else ''}" for n in names if (n[0].target == "amax") == most] for most in (False, True))
        words = ([f"reduction(+:{', '.join(sums)})"] if sums else []) + ([f"reduction(highest:{', '.join(highest)})"] if highest else [])
        loop = f"for (int {fast.name} = {'first' if stretch else 0}; {fast.name} < " + (f"(first + {STRETCH} < {fast.size} ? first + {STRETCH} : {fast.size})" if stretch else str(fast.size)) + f"; ++{fast.name})"
        self.open(f"#pragma omp simd {' '.join(words)}\n{loop}", fast)
        for op, bound, name, kind, _ in names:
            x = op.refs[0].name
            for values in self.bindings([*(self.space.reduced(self.p, op) or ())]):
                index = tuple(i.put({**bound, **values}) for i in self.space.index[x])
                r = self.at(x, index)
                text = converted(r.name, r.dtype, computed(op.type.dtype))
                total = f"{name}{'_part' if local else ''}"
                square = f"{text} * {text}" if op.target == "sum_of_squares" else text
                self.scopes[-1].lines.append(f"{total} = most({total}, {kind}({text}));" if op.target == "amax" else f"{total} += {square};")
        for value in keep:
            self._keep(value)
        self.close()
        if local:
            self.scopes[-1].lines += [f"{name} = most({name}, {name}_part);" if op.target == "amax" else f"{name} += {name}_part;" for op, _, name, _, _ in names]
        while len(self.scopes) - 1 > outer:
            self.close()
        for op, bound, name, _, _ in names:
            index = tuple(i.put(bound) for i in self.space.index[op.name])
            self.keep((op.name, index, ()), Register(name, computed(op.type.dtype), outer))
        self.kept.update((value, f"{value}_row") for value in keep)

    def _keep(self, value: str) -> None:
        for bound in self.of_index(self.space.index[value]):
            index = tuple(i.put(bound) for i in self.space.index[value])
            r = self.at(value, index)
            if self._read_back(value):
                self._put(value, index, r)
            else:
                self.scopes[-1].lines.append(f"{value}_row[{self._along_row(bound)}] = {r.name};")

    def _along_row(self, bound: Bound) -> str:
        row = [v for v in self.space.vars if v in self.plan.row]
        return self.place(flat([of(v).put(bound) for v in row], [v.size for v in row]))[0]

    def made(self, value: str, index: Indices) -> Register:
        """Read again what an earlier pass has kept."""
        if value in self.kept:
            for bound in self.of_index(self.space.index[value]):
                if index == tuple(i.put(bound) for i in self.space.index[value]) and all(v in self.levels for v in self.r):
                    dtype, level = computed(self.p.types[value].dtype), len(self.scopes) - 1
                    if self._read_back(value):
                        place, _ = self._address(value, index)
                        return self.emit(f"{value}[{place}]", dtype, level)
                    return self.emit(f"{value}_row[{self._along_row(bound)}]", dtype, level)
        return super().made(value, index)

    # what is stored ---------------------------------------------------------------------------------------------------

    def _targets(self, along: bool) -> list[str]:
        return [t for t in self.plan.targets if bool(self.plan.row & variables(self.space.index[t])) == along]

    def _along(self, along: bool) -> list[tuple[str, Indices]]:
        """What is stored inside the row's loops, or outside of them."""
        found = [(t, tuple(i.put(b) for i in self.space.index[t])) for t in self._targets_of(along) for b in self.of_index(self.space.index[t])]
        return [each for each in found if each not in self.done]

    def _targets_of(self, along: bool) -> list[str]:
        inside = set(self.r)
        return [t for t in self.plan.targets if bool(inside & variables(self.space.index[t])) == along]

    def _store(self, found: Sequence[tuple[str, Indices]]) -> None:
        for target, index in found:
            self._put(target, index, self.at(target, index))

    def _address(self, value: str, index: Indices) -> tuple[str, int]:
        out = Index()
        for i, s in zip(index, self.lying[value], strict=True):
            out += i * s
        return self.place(out)

    def _put(self, value: str, index: Indices, r: Register) -> None:
        self.done.add((value, index))
        place, level = self._address(value, index)
        self.writes.setdefault(value, []).append((place, self.count))
        dtype = self.p.types[value].dtype
        text = r.name if value in self.own else f"down<{TYPES[dtype]}>::of({r.name})"
        self.scopes[max(level, r.level, self._row_level(value))].lines.append(f"{value}[{place}] = {text};")

    def _row_level(self, value: str) -> int:
        """Where a target is stored: in the row's scope at least."""
        return len(self.scopes) - 1

    # sums across rows -------------------------------------------------------------------------------------------------

    def _blocks(self, rows: int, columns: int) -> None:
        block = max(LEAST, -(-rows // BLOCKS))
        blocks = -(-rows // block)
        top = self.scopes[0].lines
        for s in self.plan.sums:
            kind, _ = accumulator(self.p.producers[s])
            n = self.p.types[s].numel
            top.append(f"const std::unique_ptr<{kind}[]> {s}_parts(new {kind}[{blocks * n}]);")
        self.open(f"#pragma omp parallel for num_threads(threads) reduction(|:wrong) if (threads > 1 && {rows * columns} > {WORTH})\nfor (int64_t block = 0; block < {blocks}; ++block)")
        for s in self.plan.sums:
            (kind, start), n = accumulator(self.p.producers[s]), self.p.types[s].numel
            self.scopes[-1].lines += [f"{kind} *__restrict {s}_part = {s}_parts.get() + block * {n};", f"for (int j = 0; j < {n}; ++j) {s}_part[j] = {start};"]
        self.open(f"for (int64_t row = block * {block}; row < (block * {block} + {block} < {rows} ? block * {block} + {block} : {rows}); ++row)", *self.x)
        self._row()
        self.close()
        self.close()
        for s in self.plan.sums:
            op, n = self.p.producers[s], self.p.types[s].numel
            kind, start = accumulator(op)
            place = " + ".join(f"{i} * {stride}" for i, stride in zip(_decoded("j", op.type.shape), self.lying[s], strict=True)) or "0"
            more = f"total = most(total, {s}_parts[b * {n} + j])" if op.target == "amax" else f"total += {s}_parts[b * {n} + j]"
            stored = "total" if s in self.own else f"down<{TYPES[op.type.dtype]}>::of(total)"
            self.scopes[0].lines += [f"for (int j = 0; j < {n}; ++j) {{", f"    {kind} total = {start};", f"    for (int b = 0; b < {blocks}; ++b) {more};", f"    {s}[{place}] = {stored};", "}"]

    def _accumulate(self, sums: Sequence[tuple[str, Bound]]) -> None:
        for s, bound in sums:
            op = self.p.producers[s]
            x, kind = op.refs[0].name, accumulator(op)[0]
            for values in self.bindings([*(self.space.reduced(self.p, op) or ())]):
                r = self.at(x, tuple(i.put({**bound, **values}) for i in self.space.index[x]))
                text = converted(r.name, r.dtype, computed(op.type.dtype))
                place, _ = self.place(flat([i.put(bound) for i in self.space.index[s]], op.type.shape))
                target = f"{s}_part[{place}]"
                square = f"{text} * {text}" if op.target == "sum_of_squares" else text
                self.scopes[-1].lines.append(f"{target} = most({target}, {kind}({text}));" if op.target == "amax" else f"{target} += {square};")


def _decoded(name: str, sizes: Sequence[int]) -> list[str]:
    """The index in each dimension of the element at a row-major place."""
    out = []
    for d, size in enumerate(sizes):
        minor = prod(sizes[d + 1 :])
        text = f"({name} / {minor})" if minor > 1 else name
        out.append("0" if size == 1 else f"({text} % {size})" if d and prod(sizes[:d]) > 1 else text)
    return out
