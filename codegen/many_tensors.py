"""One kernel over many tensors: parts of a fragment that do the same to tensors of different sizes, as an optimizer does to its parameters.

Two parts are alike where their ops are the same line by line, shapes left out. The kernel finds its tensors in a table of addresses; a program has one chunk
of one tensor. What all parts read, the learning rate, stays an operand.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from deepseed.codegen.block_sizes import Blocks, chunk_size
from deepseed.codegen.spaces import REDUCTIONS, adds_parts, space_of
from deepseed.codegen.triton_kernel import Kernel, Plan
from deepseed.codegen.triton_ops import TYPES, supported
from deepseed.ir.program import Op, Program, Ref

HELPERS = '''@cache
def chunks(sizes, size, device):
    """Which tensor, and which chunk of it, each program has."""
    return torch.tensor([(t, c) for t, n in enumerate(sizes) for c in range(-(-n // size))], dtype=torch.int32, device=device)


@cache
def lengths(sizes, device):
    return torch.tensor(sizes, dtype=torch.int64, device=device)


@lru_cache(maxsize=256)
def table(pointers, device):
    """Copied to the device once: tensors of a training stay where they are."""
    return torch.tensor(pointers, dtype=torch.int64, device=device)


def addresses(tensors, device):
    return table(tuple(x.data_ptr() for row in tensors for x in row), device)


def aligned(tensors):
    return all(x.data_ptr() % 16 == 0 for row in tensors for x in row)'''


@dataclass
class Part:
    """The ops on tensors of one shape. ``reads``: what lies in memory, in the order of its use; ``targets`` and ``partial`` as in ``Plan``."""

    shape: tuple[int, ...]
    ops: list[Op]
    reads: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    partial: list[str] = field(default_factory=list)
    form: tuple[object, ...] = ()


def alike_parts(p: Program, memory: Collection[str], pending: Sequence[str], closure: Callable[[Sequence[str]], set[str]]) -> list[Part]:
    """Two or more parts that are alike, with most tensors; none where there are none."""
    needed = closure(pending)
    sums = [op.name for op in p.ops if op.name in needed and op.name not in memory and _whole_sum(p, op, memory)]
    sums = [name for name in sums if not any(op.target in REDUCTIONS for op in p.ops if op.name in closure([p.producers[name].refs[0].name]) and op.name not in memory)]
    groups: dict[tuple[object, ...], list[Part]] = {}
    for part in _parts(p, memory, sums or [t for t in pending if p.types[t].numel > 1], closure):
        for t in pending:
            if not sums and p.types[t].numel == 1 and any(t in op.results for op in part.ops):
                part.targets.append(t)
        form = _form(p, part, memory)
        if form is not None:
            part.form = form
            groups.setdefault(form, []).append(part)
    best = max(groups.values(), key=len, default=[])
    return best if len(best) > 1 else []


def _whole_sum(p: Program, op: Op, memory: Collection[str]) -> bool:
    return op.target in REDUCTIONS and op.type.numel == 1 and p.types[op.refs[0].name].numel > 1 and not adds_parts(op)


def _parts(p: Program, memory: Collection[str], targets: Sequence[str], closure: Callable[[Sequence[str]], set[str]]) -> list[Part]:
    """Targets that read no tensor in common are in different parts."""
    parts: list[tuple[set[str], list[str]]] = []
    for target in targets:
        values = {v for v in closure([target]) if p.types[v].numel > 1}
        mine: tuple[set[str], list[str]] = (values, [target])
        for other in [o for o in parts if o[0] & values]:
            parts.remove(other)
            mine = (mine[0] | other[0], other[1] + mine[1])
        parts.append(mine)
    out = []
    for _, names in parts:
        found = closure(names)
        ops = [op for op in p.ops if op.name in found and op.name not in memory]
        sums = [n for n in names if p.producers[n].target in REDUCTIONS]
        shape = p.types[p.producers[names[0]].refs[0].name if sums else names[0]].shape
        reads = dict.fromkeys(r.name for op in ops for r in op.refs if r.name in memory)
        out.append(Part(shape, ops, list(reads), [n for n in names if n not in sums], sums))
    return out


def _form(p: Program, part: Part, memory: Collection[str]) -> tuple[object, ...] | None:
    """The part's ops with values numbered; None where they are not all pointwise on one shape."""
    numbers: dict[str, int] = {}
    lines: list[object] = []
    for op in part.ops:
        for name in (*(r.name for r in op.refs), *op.results):
            t = p.types[name]
            numbers.setdefault(name, len(numbers))
            if t.numel > 1 and t.shape != part.shape:
                return None
        if not (op.name in part.partial or op.target in ("cast", "full") or supported(op)) or (op.target in REDUCTIONS and op.name not in part.partial):
            return None
        types = tuple((p.types[name].dtype, p.types[name].numel > 1, name in memory) for name in (*(r.name for r in op.refs), *op.results))
        kept = tuple((k, v) for k, v in op.kwargs if op.target not in REDUCTIONS)
        lines.append((op.target, tuple(numbers[a.name] if isinstance(a, Ref) else repr(a) for a in op.args), repr(kept), types))
    return (*lines, tuple(numbers[t] for t in part.targets), tuple(numbers[t] for t in part.partial))


@dataclass
class Written:
    """The kernel's text, and how ``launch`` runs it."""

    kernel: str
    calls: list[str]
    signature: str
    programs: list[int]  # of each part
    table_bytes: int


def write_many(p: Program, parts: Sequence[Part], memory: Mapping[str, bool], name: str, outputs: Callable[[str], str], dtypes: Mapping[str, str], called: set[str]) -> Written:
    """``outputs``: the tensor of a value in ``launch``; ``dtypes``: in memory, of what is read and stored."""
    first = parts[0]
    root = first.reads[0] if not first.targets else first.targets[0]
    root = next(v for v in (root, *first.reads, *first.targets) if p.types[v].shape == first.shape and p.types[v].numel > 1)
    values = {v for op in first.ops for v in (*op.results, *(r.name for r in op.refs))}
    sizes = [_numel(part.shape) for part in parts]
    size = chunk_size(sum(sizes))
    blocks = Blocks(min(size, 1024), 1, 4, size)
    kernel = Kernel(p, Plan(space_of(p, root, values, [], {}), frozenset(), False, tuple(first.targets), tuple(first.partial), blocks), memory, name)
    before, body = kernel.write_many()
    called |= kernel.called
    shared = [v for n, v in enumerate(first.reads) if all(part.reads[n] == v for part in parts)]
    columns = [n for n, v in enumerate(first.reads) if v not in shared]
    count = len(columns) + len(first.targets)
    pointers = [(first.reads[n], dtypes[first.reads[n]]) for n in columns] + [(f"o_{t}", dtypes[t]) for t in first.targets]
    words = [*(f"{v}" for v in shared), *(f"o_{v}" for v in first.partial)]
    lines = ["@triton.jit", f"def {name}(chunks, lengths, table, {', '.join([*words, ''])}aligned: tl.constexpr, XB: tl.constexpr, CHUNK: tl.constexpr):"]
    text = ["chunk = tl.program_id(0)", "t = tl.load(chunks + chunk * 2)", "first = tl.load(chunks + chunk * 2 + 1).to(tl.int64) * CHUNK", "n = tl.load(lengths + t)"]
    for k, (pointer, dtype) in enumerate(pointers):
        text.append(f"{pointer} = tl.load(table + t * {count} + {k}).to(tl.pointer_type({TYPES[dtype]}))")
    if pointers:
        text += ["if aligned:", *(f"    {pointer} = tl.multiple_of({pointer}, 16)" for pointer, _ in pointers)]
    text += [*before, "for start in range(first, min(first + CHUNK, n), XB):", *(f"    {line}" for line in body), *kernel.after]
    lines += [f"    {line}" for line in text]
    device = f"device={p.inputs[0].name}.device"
    rows = ", ".join("(" + ", ".join([*(f"{outputs(part.reads[n])}.contiguous()" for n in columns), *(f"o_{t}" for t in part.targets), ""]) + ")" for part in parts)
    programs = [-(-n // size) for n in sizes]
    where = device.removeprefix("device=")
    arguments = [f"chunks({tuple(sizes)}, {size}, {where})", f"lengths({tuple(sizes)}, {where})", f"addresses(tensors, {where})", *(outputs(v) for v in shared), *(f"{name}_parts_{n}" for n in range(len(first.partial)))]
    calls = [f"tensors = [{rows}]"]
    for n, value in enumerate(first.partial):
        calls.append(f"{name}_parts_{n} = torch.empty(({sum(programs)},), dtype={{{value}}}, {device})")
    calls.append(f"{name}[({sum(programs)},)]({', '.join(arguments)}, aligned=aligned(tensors), XB={blocks.x}, CHUNK={size}, num_warps={blocks.warps})")
    described = {"chunks": "*i32", "lengths": "*i64", "table": "*i64"}
    types = [*(f'"{k}": "{v}"' for k, v in described.items()), *(f'"{w}": {{{w}}}' for w in words), '"aligned": True', f'"XB": {blocks.x}', f'"CHUNK": {size}']
    return Written("\n".join(lines), calls, f'"{name}": ({{{{{", ".join(types)}}}}}, {blocks.warps}),', programs, 8 * (sum(programs) + len(parts) * (1 + count)))


def _numel(shape: Sequence[int]) -> int:
    out = 1
    for n in shape:
        out *= n
    return out
