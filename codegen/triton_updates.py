"""Optimizers' updates as one Triton kernel over all tensors, in their own memory: the kernel of many tensors (deepseed.codegen.many_tensors), and ``launch``, which takes of each formula a list for each of its
``each``, then its ``shared``. Of several formulas a tensor has one: that of its parameter group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from deepseed.codegen.block_sizes import PROGRAMS
from deepseed.codegen.expressions import CodegenError
from deepseed.codegen.many_tensors import HELPERS, Part, Text, chunk_blocks, kernel_of, signature_of, text_of
from deepseed.codegen.triton_ops import LIBRARY, TYPES, supported
from deepseed.codegen.triton_writer import POINTERS
from deepseed.codegen.updates import Formula, name_of
from deepseed.ir.program import Program, Ref
from deepseed.ir.text import format_program
from deepseed.ir.updates import SIZE

LAUNCH = """def launch({parameters}):
    params = [{params}]
    sizes = tuple([x.numel() for x in params])
    if not any(sizes):
        return
    device, size = params[0].device, max(1024, min(65536, triton.next_power_of_2(sum(sizes) // {programs})))
    tensors = [{rows}]
    programs = sum([-(-n // size) for n in sizes])
    whole = {whole}
    {name}[(programs,)](chunks(sizes, size, device), lengths(sizes, device), addresses(tensors, device), {arguments}aligned=whole, XB={x}, CHUNK=size, num_warps={warps})
"""


def source(formulas: Sequence[Formula]) -> str:
    """Raises CodegenError."""
    for f in formulas:
        for op in f.program.ops:
            if not (op.target == "cast" or supported(op)) or any(t.dtype not in TYPES for t in op.types):
                raise CodegenError(f"%{op.name} = {op.target} of {f.name}: no Triton expression for it\n  fix: none is needed, torch's kernels run")
    called, blocks, several = set[str](), chunk_blocks(1 << 16), len(formulas) > 1
    named = [_named(f, f"_{n}") for n, f in enumerate(formulas)]
    width = max(len(f.each) + len(f.updated) for f in formulas) if several else 0
    texts, types = list[Text](), dict[str, str]()
    for f in named:
        p, targets = f.program, [o.ref.name for o in f.program.outputs]
        dtypes = {i.name: i.type.dtype for i in p.inputs} | {t: p.types[t].dtype for t in targets}
        texts.append(text_of(p, Part((SIZE,), list(p.ops), [*f.each, *f.shared], targets), f.shared, dict.fromkeys((*f.each, *f.shared), True), dtypes, called, blocks, width))
        types |= {v: f'"*{POINTERS[dtypes[v]]}"' for v in f.shared}
    name = name_of(formulas)
    said = "\n".join(line for f in formulas for line in ["", *format_program(f.program).splitlines()])
    lines = ['"""' + f"Generated, see deepseed/codegen/triton_updates.py.\n{said}".replace('"""', "'''") + '\n"""', "", "import triton", "import triton.language as tl", "", HELPERS + (", forms" if several else "")]
    lines += [f"\n\n{LIBRARY[f]}" for f in LIBRARY if f in called]
    lines += [f"\n\n{kernel_of(name, texts)}", "\n\nKERNELS = {  # types of the parameters, block sizes, warps", f"    {signature_of(name, texts, blocks).format(**types)}", "}", "", "", ""]
    rows = [f"zip({', '.join([*f.each, *f.updated])})" for f in named]
    counts = f"forms(({', '.join(f'len({f.each[0]})' for f in named)}), device), " if several else ""
    aligned = [f"aligned({row if several else 'tensors'}, {text.tensors})" for row, text in zip(rows, texts, strict=True)]
    return "\n".join(lines) + LAUNCH.format(
        parameters=", ".join(v for f in named for v in (*f.each, *f.shared)), params=", ".join(f"*{f.each[0]}" for f in named), programs=2 * PROGRAMS, rows=", ".join(f"*{row}" for row in rows),
        whole=" and ".join(aligned), name=name, arguments=counts + "".join(f"{v}, " for f in named for v in f.shared), x=blocks.x, warps=blocks.warps,
    )  # fmt: skip


def _named(f: Formula, suffix: str) -> Formula:
    """With operands that nothing else is named like."""
    names = {i.name: f"{i.name}{suffix}" for i in f.program.inputs}

    def renamed(p: Program) -> Program:
        ops = tuple([op.map_refs(lambda r: Ref(names.get(r.name, r.name))) for op in p.ops])
        return replace(p, inputs=tuple([replace(i, name=names[i.name], key=names[i.name]) for i in p.inputs]), ops=ops)

    return replace(f, program=renamed(f.program), each=tuple(names[v] for v in f.each), shared=tuple(names[v] for v in f.shared), updated=tuple(names[v] for v in f.updated))
