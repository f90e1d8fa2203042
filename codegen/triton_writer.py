"""Writes the Triton file of one fragment: its kernels one after another, and ``launch``, which allocates what they make and runs them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from deepseed.codegen.any_rows import NONE, Free, general, heads, stands_for
from deepseed.codegen.block_sizes import Blocks
from deepseed.codegen.expressions import DTYPES, CodegenError, listed
from deepseed.codegen.index_maps import Refine, covers
from deepseed.codegen.lookups import numbered, without_lookups
from deepseed.codegen.many_tensors import HELPERS, Part, alike_parts, write_many
from deepseed.codegen.spaces import LEAVES, REDUCTIONS, add, parts_of, reduced_dims, space_of
from deepseed.codegen.triton_kernel import Kernel
from deepseed.codegen.triton_ops import LIBRARY, TYPES, supported
from deepseed.codegen.triton_plans import Plans
from deepseed.codegen.triton_products import Product, as_leaf, plan_of
from deepseed.ir.kernels import PRODUCT
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import ITEMSIZE, Op, Program, Ref, Type
from deepseed.ir.text import format_program

_MOVES = ("reshape", "permute", "expand", "cast", "slice", "unslice", "pad", "cat", "gather", "embedding")
POINTERS = {"f64": "fp64", "f32": "fp32", "f16": "fp16", "bf16": "bf16", "i64": "i64", "i32": "i32", "i16": "i16", "i8": "i8", "u8": "u8", "bool": "i1"}


@dataclass(frozen=True)
class Launch:
    """A kernel of a fragment: its blocks, whether these may be others, and the bytes that it moves: of what many programs read each address once, and once more for each further load
    that reads it (a row that is read in two loops counts twice)."""

    kernel: str
    blocks: Blocks
    free: bool
    bytes_read: int
    bytes_written: int


@dataclass
class Writer(Plans):
    fragment: Program
    chosen: Mapping[str, Blocks]
    free: Free = NONE
    launched: list[Launch] = field(default_factory=list)
    kernels: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    signatures: list[str] = field(default_factory=list)
    called: set[str] = field(default_factory=set)
    views: dict[str, tuple[str, int]] = field(default_factory=dict)  # parts of sums that lie in one buffer with others

    def __post_init__(self) -> None:
        for op in self.fragment.ops:
            known = op.target in (*_MOVES, *LEAVES, *REDUCTIONS, "scatter_add", PRODUCT) or supported(op)
            if not known or any(t.dtype not in TYPES for t in (*op.types, *(self.fragment.types[r.name] for r in op.refs))):
                raise CodegenError(f"%{op.name} = {op.target}" + (f" at {op.path}" if op.path else "") + f" on {', '.join(t.dtype for t in op.types)}: no Triton expression for it\n  fix: none is needed, the group runs as Python")
        self.names = dict(self.free)  # of what may have any size
        self.p = without_lookups(numbered(self.fragment), supported)
        self.heads = [f"{name} = {text}" for name, text in heads(self.p, self.names).items()]
        for op in self.p.ops if self.free else ():
            if op.target in ("bernoulli", "uniform") or (op.target in REDUCTIONS and any(stands_for(self.p.types[op.refs[0].name].shape[d], self.names)[0] for d in reduced_dims(self.p, op))):
                raise CodegenError(f"%{op.name} = {op.target} depends on how many rows there are\n  fix: none is needed, the group runs as Python")
        self.memory = {i.name: False for i in self.p.inputs}  # values in memory, and whether their layout is known

    def file(self) -> str:
        outputs = list(dict.fromkeys(o.ref.name for o in self.p.outputs))
        self.empty = {o for o in outputs if self.p.types[o].numel == 0}
        pending = [o for o in outputs if o not in self.memory and o not in self.empty]
        for value in self._closure(pending):
            if self.p.types[value].numel == 0:
                raise CodegenError(f"%{value} is empty and %{pending[0]} is not\n  fix: none is needed, the group runs as Python")
        if products := [op for op in self.p.ops if op.target == PRODUCT]:
            pending = self._product(products, pending)
        while pending:
            parts = alike_parts(self.p, self.memory, pending, self._closure) if not self.free else []
            pending = self._many(parts, pending) if parts else self._kernel(pending)
        lines = ['"""' + "\n".join(["Generated, see deepseed/codegen/triton.py.", "", *general(format_program(self.fragment), self.names).splitlines()]).replace('"""', "'''") + '\n"""', "", "import torch", "import triton", "import triton.language as tl"]
        order = [f for f in LIBRARY if f in self.called]
        lines += ["", HELPERS] if "many" in self.called else []
        lines += [f"\n\n{LIBRARY[f]}" for f in order]
        lines += [f"\n\n{k}" for k in self.kernels]
        lines += ["", "", "KERNELS = {  # types of the parameters, block sizes, warps", *(f"    {line}" for line in self.signatures), "}"]
        lines += ["", "", f"def launch({', '.join(i.name for i in self.p.inputs)}):", *(f"    {c}" for c in self.heads + [general(c, self.names) for c in self._allocated(outputs) + self.calls])]
        returned = [f"o_{o.ref.name}" if o.ref.name not in {i.name for i in self.p.inputs} else o.ref.name for o in self.p.outputs]
        return "\n".join([*lines, f"    return {listed(returned)}"]) + "\n"

    def _allocated(self, outputs: Sequence[str]) -> list[str]:
        names = {i.name for i in self.p.inputs}
        device = f"device={self.p.inputs[0].name}.device" if self.p.inputs else "device=torch.accelerator.current_accelerator()"
        return [f"o_{o} = torch.empty({listed(self.p.types[o].shape)}, dtype={DTYPES[self.p.types[o].dtype]}, {device})" for o in outputs if o not in names]

    # one kernel -------------------------------------------------------------------------------------------------------

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
                kernel = Kernel(self.p, plan, self.memory, f"kernel_{len(self.kernels)}", self.free)
                kernel.views, kernel.stored = self.views, {v: self._in_memory(v) for v in self.memory}
                body = kernel.write()
                break
            except Refine as asked:
                add(split, asked)
        self._finish(kernel, body)
        return [t for t in dict.fromkeys([*pending, *later]) if t not in plan.targets]

    def _product(self, products: Sequence[Op], pending: Sequence[str]) -> list[str]:
        """The kernel of a matrix product and of all that is made of it, element by element."""
        op = products[0]
        if len(products) > 1 or any(o.target in REDUCTIONS for o in self.p.ops) or any(r.name not in self.memory for r in op.refs):
            raise CodegenError(f"%{op.name} = {op.target} among {len(self.p.ops)} ops: a kernel has one product, of tensors in memory, and reduces nothing else\n  fix: none is needed, the group runs as Python")
        self.p = as_leaf(self.p, op)
        split: dict[tuple[str, int], bool] = {}
        while True:
            try:
                space = space_of(self.p, op.name, self._closure(pending), pending, split)
                if any(t not in space.index or not covers(space.index[t], self.p.types[t].shape) for t in pending):
                    raise CodegenError(f"%{pending[0]} is not made of %{op.name} = {op.target} element by element\n  fix: none is needed, the group runs as Python")
                kernel = Product(self.p, op, plan_of(self.p, op, space, pending, self.chosen.get("kernel_0")), self.memory, "kernel_0", self.free)
                body = kernel.write()
                break
            except Refine as asked:
                add(split, asked)
        self._finish(kernel, body)
        return []

    def _many(self, parts: Sequence[Part], pending: Sequence[str]) -> list[str]:
        """One kernel over parts that are alike."""
        name = f"kernel_{len(self.kernels)}"
        made = [t for part in parts for t in part.targets]
        returned, inputs = {o.ref.name for o in self.p.outputs}, {i.name for i in self.p.inputs}
        dtypes = {t: self._stored(t) for t in made} | {v: self._in_memory(v) for part in parts for v in part.reads}
        written = write_many(self.p, parts, self.memory, name, lambda v: v if v in inputs else f"o_{v}", dtypes, self.called)
        read = sum(self.p.types[v].numel * ITEMSIZE[dtypes[v]] for v in dict.fromkeys(v for part in parts for v in part.reads)) + written.table_bytes
        stored = sum(self.p.types[t].numel * ITEMSIZE[dtypes[t]] for t in made) + sum(sum(written.programs) * ITEMSIZE[_accumulated(self.p.types[v].dtype)] for v in parts[0].partial)
        self.launched.append(Launch(name, Blocks(1024, 1, 4), False, read, stored))
        first, device = parts[0], f"device={self.p.inputs[0].name}.device"
        self.called.add("many")
        self.calls += [f"o_{t} = torch.empty({listed(self.p.types[t].shape)}, dtype={DTYPES[dtypes[t]]}, {device})" for t in made if t not in returned]
        sums = {v: _accumulated(self.p.types[v].dtype) for v in first.partial}
        self.calls += [line.format(**{v: DTYPES[d] for v, d in sums.items()}) if "{" in line else line for line in written.calls]
        self.kernels.append(written.kernel)
        words = {w: _described(w, {v: dtypes[v] for v in first.reads} | sums).partition(": ")[2] for w in (*first.reads, *(f"o_{v}" for v in first.partial))}
        self.signatures.append(written.signature.format(**words))
        for n, value in enumerate(first.partial):
            at = 0
            for part, programs in zip(parts, written.programs, strict=True):
                self.views[parts_of(part.partial[n])] = (f"{name}_parts_{n}", at)
                self._replace(part.partial[n], programs, sums[value])
                at += programs
        for t in made:
            self.memory[t] = True
        return [t for t in pending if t not in made]

    def _stored(self, value: str) -> str:
        """The dtype in memory: what is no output keeps the precision of registers."""
        dtype = self.p.types[value].dtype
        return dtype if value in {o.ref.name for o in self.p.outputs} else _accumulated(dtype)

    def _in_memory(self, value: str) -> str:
        """The dtype of what lies in memory, an input or not."""
        return self.p.types[value].dtype if value in {i.name for i in self.p.inputs} else self._stored(value)

    # source of one kernel ---------------------------------------------------------------------------------------------

    def _finish(self, kernel: Kernel, body: Sequence[str]) -> None:
        plan, b = kernel.plan, kernel.plan.blocks
        if plan.partial and self.free:
            raise CodegenError(f"%{plan.partial[0]}: a sum over any number of rows\n  fix: none is needed, the group runs as Python")
        body = [general(line, self.names) for line in body]
        any_sizes = [name for name in self.names.values() if any(re.search(rf"\b{name}\b", line) for line in body)]
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
                used = [d for d in range(len(t.shape)) if any(f"{value}_s{d}" in line for line in body) and f"{value}_s{d}" not in kernel.strides]
                parameters += [f"{value}_s{d}" for d in used] + [f"{value}_dense: tl.constexpr"]
                arguments += [f"{value}.stride({d})" for d in used] + [f"{value}.is_contiguous()"]
        for value in (*plan.targets, *plan.partial):
            parameters.append(f"o_{value}")
            arguments.append(f"o_{value}" if value in plan.targets else f"o_{parts_of(value)}")
        parameters += kernel.strides
        arguments += [f"{stride.rpartition('_s')[0]}.stride({stride.rpartition('_s')[2]})" for stride in kernel.strides]
        name = kernel.name
        types = {value: self._in_memory(value) for value in kernel.read if value in self.p.types} | {value: self._stored(value) for value in plan.targets}
        types |= {base: self.p.types[value].dtype for value, (base, _) in self.views.items() if value in self.p.types}
        types |= {value: _accumulated(self.p.types[value].dtype) for value in plan.partial}
        parameters += any_sizes
        arguments += any_sizes
        described = [f'"{parameter}": "i32"' if parameter in any_sizes else f'"{parameter}": {kernel.strides[parameter]}' if parameter in kernel.strides else _described(parameter, types) for parameter in parameters]
        sizes = {"XB": b.x, "RB": b.r, **({"KB": b.k} if b.k else {})}
        self.signatures.append(f'"{name}": ({{{", ".join([*described, *(f"{chr(34)}{k}{chr(34)}: {n}" for k, n in sizes.items())])}}}, {b.warps}),')
        signature = ", ".join([*parameters, *(f"{k}: tl.constexpr" for k in sizes)])
        head = f"@triton.jit(do_not_specialize={any_sizes})".replace("'", '"') if any_sizes else "@triton.jit"
        self.kernels.append("\n".join([head, f"def {name}({signature}):", *(f"    {line}" for line in body)]))
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
        given = [*arguments, *(f"{k}={n}" for k, n in sizes.items()), f"num_warps={b.warps}"]
        self.calls.append(f"{name}[{listed(list(kernel.grid()))}]({', '.join(given)})")
        for value in plan.targets:
            self.memory[value] = True

    def _replace(self, value: str, n: int, dtype: str) -> None:
        """From now on a value is the sum of its parts in memory."""
        op, parts = self.p.producers[value], parts_of(value)
        if parts in self.memory:
            raise CodegenError(f"%{value} = {op.target}: parts of it are added up to parts again\n  fix: none is needed, the group runs as Python")
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
