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

HELPERS = "from deepseed.ops.many import addresses, aligned, chunks, lengths"  # of the files that have such kernels


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
class Text:
    """What a kernel does to a tensor of a table of addresses. ``columns``: of a row, values that are read, then those that are stored; ``tensors``: the numbers of the columns whose tensors have more
    than one element; ``words``: parameters of the kernel."""

    lines: list[str]
    columns: tuple[str, ...]
    tensors: tuple[int, ...]
    words: tuple[str, ...]


@dataclass
class Written:
    """The kernel's text, and how ``launch`` runs it."""

    kernel: str
    calls: list[str]
    signature: str
    programs: list[int]  # of each part
    table_bytes: int


def text_of(p: Program, part: Part, shared: Sequence[str], memory: Mapping[str, bool], dtypes: Mapping[str, str], called: set[str], blocks: Blocks, width: int = 0) -> Text:
    """Of parts that are like ``part``. ``shared``: what they all read, operands of the kernel; ``dtypes``: in memory, of what is read and stored; ``width``: of a row of the table, 0: what it needs."""
    root = part.reads[0] if not part.targets else part.targets[0]
    root = next(v for v in (root, *part.reads, *part.targets) if p.types[v].shape == part.shape and p.types[v].numel > 1)
    values = {v for op in part.ops for v in (*op.results, *(r.name for r in op.refs))}
    kernel = Kernel(p, Plan(space_of(p, root, values, [], {}), frozenset(), False, tuple(part.targets), tuple(part.partial), blocks), memory, "many")
    before, body = kernel.write_many()
    called |= kernel.called
    columns = [*(v for v in part.reads if v not in shared), *(f"o_{t}" for t in part.targets)]
    lines = []
    for k, column in enumerate(columns):
        lines.append(f"{column} = tl.load(table + t * {width or len(columns)} + {k}).to(tl.pointer_type({TYPES[dtypes[column.removeprefix('o_')]]}))")
    tensors = tuple([k for k, column in enumerate(columns) if p.types[column.removeprefix("o_")].numel > 1])
    if tensors:
        lines += ["if aligned:", *(f"    {columns[k]} = tl.multiple_of({columns[k]}, 16)" for k in tensors)]
    lines += [*before, "for start in range(first, min(first + CHUNK, n), XB):", *(f"    {line}" for line in body), *kernel.after]
    return Text(lines, tuple(columns), tensors, (*shared, *(f"o_{v}" for v in part.partial)))


def kernel_of(name: str, texts: Sequence[Text]) -> str:
    """A kernel of one text, or of several, of which each tensor has one."""
    several = len(texts) > 1
    words = [w for text in texts for w in text.words]
    lines = ["chunk = tl.program_id(0)", "t = tl.load(chunks + chunk * 2)", "first = tl.load(chunks + chunk * 2 + 1).to(tl.int64) * CHUNK", "n = tl.load(lengths + t)", *(["form = tl.load(forms + t)"] if several else [])]
    for k, text in enumerate(texts):
        lines += [f"if form == {k}:", *(f"    {line}" for line in text.lines)] if several else text.lines
    head = f"def {name}(chunks, lengths, table, {'forms, ' if several else ''}{', '.join([*words, ''])}aligned: tl.constexpr, XB: tl.constexpr, CHUNK: tl.constexpr):"
    return "\n".join(["@triton.jit", head, *(f"    {line}" for line in lines)])


def signature_of(name: str, texts: Sequence[Text], blocks: Blocks) -> str:
    """Types of the parameters, with ``{}`` for those of words."""
    types = {"chunks": "*i32", "lengths": "*i64", "table": "*i64", **({"forms": "*i32"} if len(texts) > 1 else {})}
    described = [*(f'"{k}": "{v}"' for k, v in types.items()), *(f'"{w}": {{{w}}}' for text in texts for w in text.words), '"aligned": True', f'"XB": {blocks.x}', f'"CHUNK": {blocks.rows}']
    return f'"{name}": ({{{{{", ".join(described)}}}}}, {blocks.warps}),'


def write_many(p: Program, parts: Sequence[Part], memory: Mapping[str, bool], name: str, outputs: Callable[[str], str], dtypes: Mapping[str, str], called: set[str]) -> Written:
    """``outputs``: the tensor of a value in ``launch``; ``dtypes``: in memory, of what is read and stored."""
    first, sizes = parts[0], [_numel(part.shape) for part in parts]
    shared = [v for n, v in enumerate(first.reads) if all(part.reads[n] == v for part in parts)]
    size = chunk_size(sum(sizes))
    blocks = chunk_blocks(size)
    text = text_of(p, first, shared, memory, dtypes, called, blocks)
    columns = [n for n, v in enumerate(first.reads) if v not in shared]
    device = f"{p.inputs[0].name}.device"
    rows = ", ".join("(" + ", ".join([*(f"{outputs(part.reads[n])}.contiguous()" for n in columns), *(f"o_{t}" for t in part.targets), ""]) + ")" for part in parts)
    programs = [-(-n // size) for n in sizes]
    arguments = [f"chunks({tuple(sizes)}, {size}, {device})", f"lengths({tuple(sizes)}, {device})", f"addresses(tensors, {device})", *(outputs(v) for v in shared), *(f"{name}_parts_{n}" for n in range(len(first.partial)))]
    calls = [f"tensors = [{rows}]"]
    for n, value in enumerate(first.partial):
        calls.append(f"{name}_parts_{n} = torch.empty(({sum(programs)},), dtype={{{value}}}, device={device})")
    calls.append(f"{name}[({sum(programs)},)]({', '.join(arguments)}, aligned=aligned(tensors, {text.tensors}), XB={blocks.x}, CHUNK={size}, num_warps={blocks.warps})")
    return Written(kernel_of(name, [text]), calls, signature_of(name, [text], blocks), programs, 8 * (sum(programs) + len(parts) * (1 + len(text.columns))))


def chunk_blocks(size: int) -> Blocks:
    """Of a program that has a chunk of ``size`` elements of one tensor."""
    return Blocks(min(size, 1024), 1, 4, size)


def _numel(shape: Sequence[int]) -> int:
    out = 1
    for n in shape:
        out *= n
    return out
