"""Readable Triton source of one fragment: its kernels, and ``launch``, which allocates the outputs and runs them.

    source(fragment) -> a Python file:   @triton.jit def kernel_0(..): ..      def launch(i0, i1, ..) -> (outputs in the fragment's order)

A fragment is one kernel where one pass over one iteration space makes all of it: pointwise ops, reductions along the row that programs hold in registers,
and sums over the rows, of which each program makes a part (a second, small kernel adds these up). What needs another space, or a sum to be complete, is a
kernel of its own behind it; values that cross are the parts of sums, everything else is computed again where it is needed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import prod

from deepseed.codegen.block_sizes import PROGRAMS, Blocks, block_sizes
from deepseed.codegen.expressions import DTYPES, CodegenError, listed
from deepseed.codegen.index_maps import Refine, Var
from deepseed.codegen.lookups import numbered, without_lookups
from deepseed.codegen.many_tensors import HELPERS, Part, alike_parts, write_many
from deepseed.codegen.spaces import LEAVES, REDUCTIONS, Space, add, ops_of, space_of
from deepseed.codegen.triton_kernel import Kernel, Plan
from deepseed.codegen.triton_ops import LIBRARY, TYPES, supported
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import ITEMSIZE, Op, Program, Ref, Type
from deepseed.ir.text import format_program

_MOVES = ("reshape", "permute", "expand", "cast", "slice", "unslice", "pad", "cat", "gather", "embedding")
_IN_PART = ("slice", "unslice", "pad", "cat", "gather", "embedding")
POINTERS = {"f64": "fp64", "f32": "fp32", "f16": "fp16", "bf16": "bf16", "i64": "i64", "i32": "i32", "i16": "i16", "i8": "i8", "u8": "u8", "bool": "i1"}
ALONE = 4096  # elements that one program reduces by itself
SHORT = 1 << 14  # elements of a buffer that every program may add up for itself


@lru_cache(maxsize=4096)
def source(fragment: Program, chosen: tuple[tuple[str, Blocks], ...] = ()) -> str:
    """The file of a fragment. ``chosen``: blocks of kernels, by name, that are not the model's. Raises CodegenError, naming the op, where it cannot be written."""
    return _Writer(fragment, dict(chosen)).file()


@dataclass(frozen=True)
class Launch:
    """A kernel of a fragment: its blocks, whether these may be others, and the bytes that it moves, of what many programs read once."""

    kernel: str
    blocks: Blocks
    free: bool
    bytes_read: int
    bytes_written: int


@lru_cache(maxsize=4096)
def launched(fragment: Program) -> tuple[Launch, ...]:
    """What a call of ``launch`` runs, with the model's blocks."""
    writer = _Writer(fragment, {})
    writer.file()
    return tuple(writer.launched)


def can_emit(fragment: Program) -> bool:
    """Whether ``source`` has one."""
    try:
        source(fragment)
    except CodegenError:
        return False
    return True


def launches(fragment: Program) -> int:
    """Kernels that a call of ``launch`` runs."""
    return len(launched(fragment))


@dataclass
class _Writer:
    fragment: Program
    chosen: Mapping[str, Blocks]
    launched: list[Launch] = field(default_factory=list)
    kernels: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    signatures: list[str] = field(default_factory=list)
    called: set[str] = field(default_factory=set)
    views: dict[str, tuple[str, int]] = field(default_factory=dict)  # parts of sums that lie in one buffer with others

    def __post_init__(self) -> None:
        for op in self.fragment.ops:
            known = op.target in (*_MOVES, *LEAVES, *REDUCTIONS, "scatter_add") or supported(op)
            if not known or any(t.dtype not in TYPES for t in (*op.types, *(self.fragment.types[r.name] for r in op.refs))):
                raise CodegenError(f"%{op.name} = {op.target}" + (f" at {op.path}" if op.path else "") + f" on {', '.join(t.dtype for t in op.types)}: no Triton expression for it\n  fix: leave it out of the group, the python back end runs it")
        self.p = without_lookups(numbered(self.fragment))
        self.memory = {i.name: False for i in self.p.inputs}  # values in memory, and whether their layout is known

    def file(self) -> str:
        outputs = list(dict.fromkeys(o.ref.name for o in self.p.outputs))
        self.empty = {o for o in outputs if self.p.types[o].numel == 0}
        pending = [o for o in outputs if o not in self.memory and o not in self.empty]
        for value in self._closure(pending):
            if self.p.types[value].numel == 0:
                raise CodegenError(f"%{value} is empty and %{pending[0]} is not\n  fix: leave it out of the group, the python back end runs it")
        while pending:
            parts = alike_parts(self.p, self.memory, pending, self._closure)
            pending = self._many(parts, pending) if parts else self._kernel(pending)
        lines = ['"""' + "\n".join(["Generated, see deepseed/codegen/triton.py.", "", *format_program(self.fragment).splitlines()]).replace('"""', "'''") + '\n"""', "", "import torch", "import triton", "import triton.language as tl"]
        order = [f for f in LIBRARY if f in self.called]
        lines[-2:-2] = ["from functools import cache", ""] if "many" in self.called else []
        lines += [f"\n\n{LIBRARY[f]}" for f in order] + ([f"\n\n{HELPERS}"] if "many" in self.called else [])
        lines += [f"\n\n{k}" for k in self.kernels]
        lines += ["", "", "KERNELS = {  # types of the parameters, block sizes, warps", *(f"    {line}" for line in self.signatures), "}"]
        lines += ["", "", f"def launch({', '.join(i.name for i in self.p.inputs)}):", *(f"    {c}" for c in self._allocated(outputs) + self.calls)]
        returned = [f"o_{o.ref.name}" if o.ref.name not in {i.name for i in self.p.inputs} else o.ref.name for o in self.p.outputs]
        return "\n".join([*lines, f"    return {listed(returned)}"]) + "\n"

    def _allocated(self, outputs: Sequence[str]) -> list[str]:
        names = {i.name for i in self.p.inputs}
        device = f"device={self.p.inputs[0].name}.device" if self.p.inputs else "device=torch.accelerator.current_accelerator()"
        return [f"o_{o} = torch.empty({listed(self.p.types[o].shape)}, dtype={DTYPES[self.p.types[o].dtype]}, {device})" for o in outputs if o not in names]

    # one kernel -------------------------------------------------------------------------------------------------------

    def _closure(self, targets: Collection[str], tied: bool = False) -> set[str]:
        """What a kernel that makes ``targets`` evaluates, up to what lies in memory; ``tied``: up to what is read in part."""
        found: set[str] = set()
        todo = list(targets)
        while todo:
            value = todo.pop()
            if value in found:
                continue
            found.add(value)
            op = self.p.producers.get(value)
            if op is not None and value not in self.memory and not self._short(op) and not (tied and op.target in _IN_PART):
                todo += [r.name for r in op.refs]
        return found

    def _short(self, op: Op) -> bool:
        """A sum over a short buffer: any program can make it."""
        x = op.refs[0].name if op.refs else ""
        return op.target in REDUCTIONS and op.type.numel == 1 and self.memory.get(x, False) and self.p.types[x].numel <= SHORT

    def _kernel(self, pending: Sequence[str]) -> list[str]:
        """Write the next kernel. Returns what is left to make."""
        first = self._scalars_first(pending)
        closure = self._closure(first or pending)
        targets: Sequence[str] = first or pending
        split: dict[tuple[str, int], bool] = {}
        while True:
            root = self._root(closure, targets)
            try:
                space = space_of(self.p, root, closure, targets, split)
                plan, later = self._plan(space, closure, targets)
                if not plan.targets and not plan.partial:
                    targets = [self._first_blocked(space, closure, plan)]
                    closure, split = self._closure(targets), {}
                    continue
                kernel = Kernel(self.p, plan, self.memory, f"kernel_{len(self.kernels)}")
                kernel.views = self.views
                body = kernel.write()
                break
            except Refine as asked:
                add(split, asked)
        self._finish(kernel, body)
        return [t for t in dict.fromkeys([*pending, *later]) if t not in plan.targets]

    def _scalars_first(self, pending: Sequence[str]) -> list[str]:
        """Numbers that follow from complete sums, where larger values wait for them: made once, not by each program."""
        closure = self._closure(pending)
        ops = ops_of(self.p, closure)
        shorts = {op.name for op in ops if self._short(op) and op.name not in self.memory}
        after = set(shorts)
        for op in ops:
            if op.type.numel == 1 and any(r.name in after for r in op.refs):
                after.add(op.name)
        wanted = [v for v in after if v not in self.memory and any(isinstance(u, Op) and u.name in closure and u.type.numel > 1 for u in self.p.uses[v])]
        if not wanted:
            return []
        return wanted + [t for t in pending if t in after and t not in wanted]

    def _root(self, closure: Collection[str], targets: Sequence[str]) -> str:
        """The value whose elements are the points of the space: the largest one, a target if there is one."""
        mine = self._closure([targets[0]], tied=True)
        order = [*targets, *(op.refs[0].name for op in self.p.ops if op.target in REDUCTIONS and op.name in closure and not self._short(op)), *(r for op in self.p.ops for r in op.results), *(i.name for i in self.p.inputs)]
        candidates = [v for v in order if v in mine]
        return max(candidates, key=lambda v: self.p.types[v].numel)

    def _plan(self, space: Space, closure: Collection[str], targets: Sequence[str]) -> tuple[Plan, list[str]]:
        """What the kernel makes of ``targets`` now, and the sums that are left for others."""
        ops = [op for op in ops_of(self.p, closure) if op.name not in self.memory]
        reductions = {op.name: space.reduced(self.p, op) for op in ops if op.target in REDUCTIONS and not self._short(op)}
        row, rows = self._row(space, ops, {name: s for name, s in reductions.items() if s is not None and s <= set(space.vars) and s})
        x = frozenset(space.vars) - row
        partial: list[str] = []
        blocked: set[str] = set()
        along: set[str] = set()  # what a reduced row is needed for
        wide = frozenset(v for v in space.vars)
        for op in ops:
            over = reductions.get(op.name, row)
            if any(r.name in blocked or (op.target in _IN_PART and r.name in along) for r in op.refs):
                blocked.update(op.results)
            elif op.name in reductions and over != frozenset() and (over != row or not rows or op.name not in space.index):
                blocked.add(op.name)
                if over is not None and over in (x, wide) and x and op.name in space.index:
                    partial.append(op.name)
            elif (op.name in reductions and over) or any(r.name in along for r in op.refs):
                along.update(op.results)
        now = [t for t in targets if t not in blocked and t in space.index and self._covered(space, t)]
        now += [v for v in self._shared(ops, blocked, partial, space, along) if v not in now]
        sizes = prod(v.size for v in space.vars if v not in row and not v.unrolled), prod(v.size for v in row if not v.unrolled)
        reduced = rows and bool(row) and any(s == row for s in reductions.values())
        live = self._live(ops, [*now, *partial]) * prod(v.size for v in space.vars if v.unrolled)
        blocks = block_sizes(*sizes, live, rows=rows, reduced=reduced, partial=bool(partial))
        blocks = self.chosen.get(f"kernel_{len(self.kernels)}", blocks)
        wide_sums = [f for f in partial if reductions[f] == x and any(i.vars & row for i in space.index[self.p.producers[f].refs[0].name])]
        if reduced and blocks.r < sizes[1] and wide_sums:  # a kernel of their own behind this one, over columns
            partial = [f for f in partial if f not in wide_sums]
            now += [v for v in self._statistics(wide_sums, now, {f for f, over in reductions.items() if over == row}) if v not in now]
        if not partial:
            blocks = replace(blocks, rows=0)
        return Plan(space, row, rows, tuple(now), tuple(partial), blocks), [t for t in targets if t not in now]

    def _shared(self, ops: Sequence[Op], blocked: Collection[str], partial: Collection[str], space: Space, along: Collection[str]) -> list[str]:
        """What later kernels read along other variables, or in part: stored where rows would have to be reduced again to make it."""
        out = []
        for op in ops:
            unfit = op.target in REDUCTIONS and op.name in blocked and op.name not in partial
            if unfit or op.target in _IN_PART:
                out += [r.name for r in op.refs if r.name in along and r.name not in blocked and r.name in space.index and self._covered(space, r.name)]
        return list(dict.fromkeys(out))

    def _statistics(self, sums: Sequence[str], now: Collection[str], rows: Collection[str]) -> list[str]:
        """What rows are reduced to for sums over them: stored, so that the sums' kernel reduces no row."""
        found: dict[str, None] = {}
        todo = [self.p.producers[f].refs[0].name for f in sums]
        while todo:
            value = todo.pop()
            if value in rows:
                found[value] = None
            elif value not in self.memory and value not in now:
                todo += [r.name for r in self.p.producers[value].refs]
        return list(found)

    def _covered(self, space: Space, target: str) -> bool:
        """Whether the points of the space make each element of a target."""
        used = frozenset[Var]().union(*(i.vars for i in space.index[target]))
        return prod(v.size for v in used) == self.p.types[target].numel

    def _row(self, space: Space, ops: Sequence[Op], reductions: dict[str, frozenset[Var]]) -> tuple[frozenset[Var], bool]:
        """The variables along which programs hold rows, and whether blocks have two axes."""
        if not space.vars:
            return frozenset(), False
        everything, last = frozenset(space.vars), space.vars[-1]
        for name, over in reductions.items():
            if over != everything and (last in over or self._read_along(space, name, over, ops)):
                return over, True
        for name, over in reductions.items():
            if over == everything and (self._read_along(space, name, over, ops) or prod(v.size for v in over) <= ALONE):
                return over, True
        columns = [over for over in reductions.values() if over != everything and space.vars[0] in over]
        if columns:
            short = prod(v.size for v in columns[0]) <= 2 * PROGRAMS
            return columns[0] if short else everything - columns[0], True
        if reductions and not any(over == everything for over in reductions.values()):
            return next(iter(reductions.values())), True
        if not reductions:
            return self._broadcast_row(space, ops)
        return frozenset(), False

    def _read_along(self, space: Space, name: str, over: frozenset[Var], ops: Sequence[Op]) -> bool:
        """Whether a reduction's result is used at each point of what it reduces."""
        after = {name}
        for op in ops:
            if any(r.name in after for r in op.refs):
                after.update(op.results)
                if any(i.vars & over for i in space.index.get(op.name, ())):
                    return True
        return False

    def _broadcast_row(self, space: Space, ops: Sequence[Op]) -> tuple[frozenset[Var], bool]:
        """Pointwise ops: two axes where operands vary along a part of the variables only, so that a block reads these once."""
        size = prod(v.size for v in space.vars)
        for name in self.memory:
            index = space.index.get(name)
            if index is None or self.p.types[name].numel in (1, size):
                continue
            used = frozenset[Var]().union(*(i.vars for i in index))
            for n in range(1, len(space.vars)):
                if used in (frozenset(space.vars[n:]), frozenset(space.vars[:n])):
                    return frozenset(space.vars[n:]), True
        return frozenset(), False

    def _live(self, ops: Sequence[Op], targets: Sequence[str]) -> int:
        """About how many values of the whole space are held at once."""
        largest = max([op.type.numel for op in ops], default=1)
        last: dict[str, int] = {}
        for n, op in enumerate(ops):
            for r in op.refs:
                last[r.name] = n
        most, now = 1, set[str]()
        for n, op in enumerate(ops):
            now |= {v for v in (*op.results, *(r.name for r in op.refs if r.name in self.memory)) if self.p.types[v].numel == largest}
            most = max(most, len(now))
            now -= {v for v in now if last.get(v, -1) <= n}
        return most + sum(1 for t in targets if self.p.producers[t].target in REDUCTIONS)

    def _first_blocked(self, space: Space, closure: Collection[str], plan: Plan) -> str:
        """A reduction in the way that waits for no other: a target of its own."""
        for op in ops_of(self.p, closure):
            if op.target in REDUCTIONS and op.name not in self.memory and not self._short(op):
                inside = self._closure([op.refs[0].name])
                if not any(o.target in REDUCTIONS and o.name not in self.memory and not self._short(o) and o.name not in space.index for o in ops_of(self.p, inside)):
                    if len(closure) == len(self._closure([op.name])):
                        break
                    return op.name
        op = next((op for op in ops_of(self.p, closure) if op.target in REDUCTIONS), self.p.ops[-1])
        raise CodegenError(f"%{op.name} = {op.target}: no iteration space in which one kernel makes it\n  fix: leave it out of the group, the python back end runs it")

    def _many(self, parts: Sequence[Part], pending: Sequence[str]) -> list[str]:
        """One kernel over parts that are alike."""
        name = f"kernel_{len(self.kernels)}"
        made = [t for part in parts for t in part.targets]
        returned, inputs = {o.ref.name for o in self.p.outputs}, {i.name for i in self.p.inputs}
        dtypes = {t: self._stored(t) for t in made}
        written = write_many(self.p, parts, self.memory, name, lambda v: v if v in inputs else f"o_{v}", dtypes, self.called)
        read = sum(self.p.types[v].nbytes for v in dict.fromkeys(v for part in parts for v in part.reads))
        stored = sum(self.p.types[t].numel * ITEMSIZE[dtypes[t]] for t in made) + sum(sum(written.programs) * ITEMSIZE[_accumulated(self.p.types[v].dtype)] for v in parts[0].partial)
        self.launched.append(Launch(name, Blocks(1024, 1, 4), False, read, stored))
        first, device = parts[0], f"device={self.p.inputs[0].name}.device"
        self.called.add("many")
        self.calls += [f"o_{t} = torch.empty({listed(self.p.types[t].shape)}, dtype={DTYPES[dtypes[t]]}, {device})" for t in made if t not in returned]
        sums = {v: _accumulated(self.p.types[v].dtype) for v in first.partial}
        self.calls += [line.format(**{v: DTYPES[d] for v, d in sums.items()}) if "{" in line else line for line in written.calls]
        self.kernels.append(written.kernel)
        words = {w: _described(w, {v: self.p.types[v].dtype for v in first.reads} | sums).partition(": ")[2] for w in (*first.reads, *(f"o_{v}" for v in first.partial))}
        self.signatures.append(written.signature.format(**words))
        for n, value in enumerate(first.partial):
            at = 0
            for part, programs in zip(parts, written.programs, strict=True):
                self.views[f"{part.partial[n]}_parts"] = (f"{name}_parts_{n}", at)
                self._replace(part.partial[n], programs, sums[value])
                at += programs
        for t in made:
            self.memory[t] = True
        return [t for t in pending if t not in made]

    def _stored(self, value: str) -> str:
        """The dtype in memory: what is no output keeps the precision of registers."""
        dtype = self.p.types[value].dtype
        return dtype if value in {o.ref.name for o in self.p.outputs} else _accumulated(dtype)

    # source of one kernel ---------------------------------------------------------------------------------------------

    def _finish(self, kernel: Kernel, body: Sequence[str]) -> None:
        plan, b = kernel.plan, kernel.plan.blocks
        written = sum(self.p.types[t].numel * ITEMSIZE[self._stored(t)] for t in plan.targets)
        written += sum(kernel.programs(v) * self.p.types[v].numel * ITEMSIZE[_accumulated(self.p.types[v].dtype)] for v in plan.partial)
        self.launched.append(Launch(kernel.name, b, True, kernel.loaded_bytes, written))
        self.called |= kernel.called
        parameters, arguments = [], []
        for value in kernel.read:
            if value not in self.p.types:
                parameters.append(value)
                arguments.append(value)
                continue
            t = self.p.types[value]
            made = value not in {i.name for i in self.p.inputs} or self.memory[value]
            parameters.append(value)
            arguments.append(f"o_{value}" if made and value not in {i.name for i in self.p.inputs} else f"{value}.contiguous()" if value in kernel.rows_only else value)
            if not self.memory[value] and any(f"{value}_dense" in line for line in body):
                used = [d for d in range(len(t.shape)) if any(f"{value}_s{d}" in line for line in body)]
                parameters += [f"{value}_s{d}" for d in used] + [f"{value}_dense: tl.constexpr"]
                arguments += [f"{value}.stride({d})" for d in used] + [f"{value}.is_contiguous()"]
        for value in (*plan.targets, *plan.partial):
            parameters.append(f"o_{value}")
            arguments.append(f"o_{value}" if value in plan.targets else f"o_{value}_parts")
        name = kernel.name
        types = {value: self.p.types[value].dtype for value in kernel.read if value in self.p.types} | {value: self._stored(value) for value in plan.targets}
        types |= {base: self.p.types[value].dtype for value, (base, _) in self.views.items() if value in self.p.types}
        types |= {value: _accumulated(self.p.types[value].dtype) for value in plan.partial}
        described = [_described(parameter, types) for parameter in parameters]
        self.signatures.append(f'"{name}": ({{{", ".join(described)}, "XB": {b.x}, "RB": {b.r}}}, {b.warps}),')
        signature = ", ".join([*parameters, "XB: tl.constexpr", "RB: tl.constexpr"])
        self.kernels.append("\n".join(["@triton.jit", f"def {name}({signature}):", *(f"    {line}" for line in body)]))
        returned = {o.ref.name for o in self.p.outputs}
        device = f"device={self.p.inputs[0].name}.device"
        for value in plan.targets:
            if value not in returned:
                self.calls.append(f"o_{value} = torch.empty({listed(self.p.types[value].shape)}, dtype={DTYPES[self._stored(value)]}, {device})")
        for value in plan.partial:
            t, n = self.p.types[value], kernel.programs(value)
            dtype = _accumulated(t.dtype)
            self.calls.append(f"o_{value}_parts = torch.empty({listed((n, *t.shape))}, dtype={DTYPES[dtype]}, {device})")
            self._replace(value, n, dtype)
        grid = [-(-kernel.sizes["x"] // (b.rows or b.x))] + ([-(-kernel.sizes["r"] // b.r)] if kernel.columns else [])
        self.calls.append(f"{name}[{listed(tuple(grid))}]({', '.join([*arguments, f'XB={b.x}', f'RB={b.r}', f'num_warps={b.warps}'])})")
        for value in plan.targets:
            self.memory[value] = True

    def _replace(self, value: str, n: int, dtype: str) -> None:
        """From now on a value is the sum of its parts in memory."""
        op, parts = self.p.producers[value], f"{value}_parts"
        t = Type(dtype, (n, *op.type.shape))
        made = replace(op, target="reshape" if n == 1 and parts not in self.views else "amax" if op.target == "amax" else "sum", args=(Ref(parts),), kwargs=() if n == 1 and parts not in self.views else (("dims", (0,)), ("keepdim", False)))
        leaf = Op((parts,), "full", (), (t,), (("value", 0.0),))
        self.p = replace(self.p, ops=tuple([o for old in self.p.ops for o in ((leaf, made) if old is op else (old,))]), mesh=Mesh(()))
        self.memory[parts] = True


def _accumulated(dtype: str) -> str:
    return "f32" if dtype in ("f16", "bf16") else dtype


def _described(parameter: str, types: Mapping[str, str]) -> str:
    """A parameter and its type, as Triton names it; tensors that may lie anyhow are taken as contiguous."""
    name, constant, _ = parameter.partition(": ")
    value = name.removeprefix("o_")
    if constant:
        return f'"{name}": True'
    return f'"{name}": "i64"' if value not in types else f'"{name}": "*{POINTERS[types[value]]}"'
