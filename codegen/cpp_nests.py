"""A fragment of fixed shapes as one C++ function: nests of loops over iteration spaces.

    source(fragment, name, strides) -> Function("extern "C" int kernel_..(int threads, const float *i0_, .., float *v6_)")

A nest has an outer loop over rows, which threads share, and loops along a row. What reduces rows takes a pass along the row each, as far as one waits for another; what a pass has made with
effort, or stored, later passes read again from where it lies in the nearest cache. Sums across rows are added up in blocks of rows, one after another, whatever the number of threads.
What no nest makes is refused: CodegenError, and the python back end runs it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from deepseed.codegen.cpp_loops import KEPT, Nest, Plan
from deepseed.codegen.cpp_ops import LIBRARY as EXPRESSIONS
from deepseed.codegen.cpp_ops import TYPES, computed, type_of
from deepseed.codegen.cpp_points import LARGEST, Strides, variables
from deepseed.codegen.expressions import CodegenError
from deepseed.codegen.index_maps import Refine, Var, covers
from deepseed.codegen.kernels import Kernel
from deepseed.codegen.lookups import numbered
from deepseed.codegen.places import extent, offset
from deepseed.codegen.spaces import REDUCTIONS, Space, add, closure_of, ops_of, read_along, space_of
from deepseed.ir.layout import contiguous
from deepseed.ir.program import Op, Program

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
"""


@dataclass(frozen=True)
class Function:
    """``makes``: what it writes, each with shape, strides and dtype; ``outputs``: whether an output lies in an input's memory, the number of that or of what is written, strides and offset in there;
    ``reused``: inputs in whose memory a result may be written, if nothing else reads it: (input, number of the result)."""

    text: str
    makes: tuple[tuple[Strides, Strides, str], ...]
    outputs: tuple[tuple[bool, int, Strides, int], ...]
    reused: tuple[tuple[int, int], ...] = ()


def source(k: Kernel) -> Function:
    """Raises CodegenError."""
    return _Writer(numbered(k.fragment), k.name, k.strides, k.lying).function()


class _Writer:
    def __init__(self, p: Program, name: str, strides: Sequence[Strides], lying: Sequence[tuple[Sequence[Strides], bool]]) -> None:
        self.p, self.name = p, name
        for value, t in p.types.items():
            if t.dtype not in TYPES:
                raise CodegenError(f"%{value} is {t.dtype}: no C++ type for it")
            if not 0 < t.numel < LARGEST:
                raise CodegenError(f"%{value} has {t.numel} elements: a loop has 1 to {LARGEST - 1}")
        self.strides, self.inputs = {i.name: s for i, s in zip(p.inputs, strides, strict=True)}, {i.name: n for n, i in enumerate(p.inputs)}
        self.views: dict[str, tuple[str, Strides, int]] = {}  # value -> what it is a view of, strides, offset
        for op, (made, view) in zip(p.ops, lying, strict=True):
            self.strides.update(zip(op.results, made, strict=True))
            if view:
                base, _, before = self.views.get(op.refs[0].name, (op.refs[0].name, (), 0))
                self.views[op.name] = (base, made[0], before + offset(op, self.strides[op.refs[0].name]))
        if any(extent(i.type.shape, given) > LARGEST for i, given in zip(p.inputs, strides, strict=True)):
            raise CodegenError(f"an operand of {name} reaches beyond {LARGEST} elements")
        self.memory: dict[str, Strides] = {i.name: s for i, s in zip(p.inputs, strides, strict=True)}
        self.own: dict[str, str] = {}  # what lies in memory of the function's own, with its declaration
        self.room = KEPT

    def function(self) -> Function:
        p, makes, outputs = self.p, dict[str, Strides](), list[tuple[bool, int, Strides, int]]()
        for o in p.outputs:
            base, strides, offset = self.views.get(o.ref.name, (o.ref.name, self.strides[o.ref.name], 0))
            if base not in self.inputs:
                makes[base] = self.strides[base]
            outputs.append((base in self.inputs, self.inputs[base] if base in self.inputs else list(makes).index(base), strides, offset))
        self.makes = makes
        pending, body, nests = list(makes), list[str](), list[Nest]()
        while pending:
            nest, lines = self.nest(pending)
            body += lines
            nests.append(nest)
            pending = [t for t in pending if t not in nest.stored]
        reused = [(n, m) for m, value in enumerate(makes) for i, n in self.inputs.items() if self.alike(i, value) and all(nest.over(i, value) if value in nest.stored else i not in nest.reads for nest in nests)]
        over = {p.inputs[n].name for n, _ in reused} | {list(makes)[m] for _, m in reused}  # may be one memory: the compiler must not think that they are not
        inputs = [f"const {TYPES[i.type.dtype]} *{'' if i.name in over else '__restrict '}{i.name}" for i in p.inputs]
        given = [f"{TYPES[p.types[value].dtype]} *{'' if value in over else '__restrict '}{value}" for value in makes]
        head = f'extern "C" int {self.name}({", ".join(["int threads", *inputs, *given])}) {{'
        lines = [head, "    int wrong = 0;", *(f"    {line}" for line in (*self.own.values(), *body)), "    return wrong;", "}"]
        return Function("\n".join(lines) + "\n", tuple([(p.types[value].shape, strides, p.types[value].dtype) for value, strides in makes.items()]), tuple(outputs), tuple(reused))

    def alike(self, a: str, b: str) -> bool:
        """Whether two values fill the same memory."""
        t, u = self.p.types[a], self.p.types[b]
        return (t.dtype, t.numel) == (u.dtype, u.numel) and not self.shown(a)

    def shown(self, a: str) -> bool:
        """Whether an output is a view of an input."""
        return any(self.views.get(o.ref.name, (o.ref.name,))[0] == a for o in self.p.outputs)

    # nests ------------------------------------------------------------------------------------------------------------

    def nest(self, pending: Sequence[str]) -> tuple[Nest, list[str]]:
        targets, split, operand = list(pending), dict[tuple[str, int], bool](), ""
        while True:
            closure = closure_of(self.p, self.memory, targets)
            try:
                space = space_of(self.p, operand or self.root(closure, targets), closure, targets, split)
                plan = _plan(self.p, space, ops_of(self.p, closure - set(self.memory)), targets)
                if plan is None:
                    first = self.first(closure, targets)
                    if first in targets and len(targets) == 1:
                        if not operand and self.p.producers[first].target in REDUCTIONS:
                            operand, split = self.p.producers[first].refs[0].name, {}
                            continue
                        raise CodegenError(f"%{first} = {self.p.producers[first].target}: no iteration space in which one nest makes it")
                    targets, split = [first], {}
                    continue
                for value in (*plan.targets, *plan.sums):
                    if value not in self.makes:
                        t = self.p.types[value]
                        self.own[value] = f"const std::unique_ptr<{type_of(t.dtype)}[]> {value}_own(new {type_of(t.dtype)}[{t.numel}]); {type_of(t.dtype)} *__restrict {value} = {value}_own.get();"
                nest = Nest(self.p, space, self.memory, plan, {v: self.makes.get(v, contiguous(self.p.types[v].shape)) for v in (*plan.targets, *plan.sums)}, set(self.own), self.room)
                lines = nest.written()
                break
            except Refine as asked:
                add(split, asked)
        self.room = nest.room
        for value in nest.stored:
            t = self.p.types[value]
            if value in self.own or t.dtype == computed(t.dtype):  # what is rounded when it is stored is made again
                self.memory[value] = nest.lying[value]
        return nest, lines

    def root(self, closure: Collection[str], targets: Sequence[str]) -> str:
        """The value whose elements are the points of the space: the largest one, a target if there is one."""
        reduced = [op.refs[0].name for op in self.p.ops if op.target in REDUCTIONS and op.name in closure]
        order = [v for v in (*targets, *reduced, *(r for op in self.p.ops for r in op.results), *self.inputs) if v in closure]
        return max(order, key=lambda v: self.p.types[v].numel)

    def first(self, closure: Collection[str], targets: Sequence[str]) -> str:
        """A reduction that waits for no other one; where there is none, the first target."""
        for op in ops_of(self.p, closure):
            if op.target in REDUCTIONS and op.name not in self.memory and not any(o.target in REDUCTIONS and o.name not in self.memory and o is not op for o in ops_of(self.p, closure_of(self.p, self.memory, [op.name]))):
                return op.name
        return targets[0]


def _plan(p: Program, space: Space, ops: Sequence[Op], targets: Sequence[str]) -> Plan | None:
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
            if s is not None and s == every - row and op.name in space.index and covers(space.index[op.name], op.type.shape) and _once(space, op.refs[0].name, row):
                sums.append(op.name)
    now = [t for t in targets if t not in blocked and t in space.index and covers(space.index[t], p.types[t].shape)]
    x = every - row - {v for v in space.vars if v.unrolled}
    now = [t for t in now if x <= variables(space.index[t])] or now
    wanted = [s for s in sums if s in targets] + [s for s in sums if s not in targets and _read(p, s, ops)]
    return Plan(row, tuple(now), tuple(wanted)) if now or wanted else None


def _once(space: Space, x: str, row: frozenset[Var]) -> bool:
    """Whether the loops that a value needs, a row's or none of these, come to each of its elements once."""
    along = variables(space.index[x]) & row
    return not along or all(v in along for v in row if not v.unrolled)


def _read(p: Program, value: str, ops: Sequence[Op]) -> bool:
    return any(isinstance(u, Op) and u in ops for u in p.uses[value])


def _row(p: Program, space: Space, ops: Sequence[Op], over: dict[str, frozenset[Var]]) -> frozenset[Var]:
    every = frozenset(space.vars)
    if not space.vars:
        return every
    for name, s in over.items():
        if s != every and (space.vars[-1] in s or read_along(space, name, s, ops)):
            return s
    if columns := [s for s in over.values() if s != every]:
        return every - columns[0]
    if every in over.values():
        return every
    return frozenset(space.vars[-1:])
