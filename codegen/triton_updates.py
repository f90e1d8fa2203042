"""An optimizer's update as one Triton kernel over all tensors, in their own memory: the kernel of many tensors (deepseed.codegen.many_tensors), and ``launch``, which takes a list for each of the
formula's ``each``, then ``shared``."""

from __future__ import annotations

from deepseed.codegen.block_sizes import PROGRAMS
from deepseed.codegen.expressions import CodegenError
from deepseed.codegen.many_tensors import HELPERS, Part, text_of
from deepseed.codegen.triton_ops import LIBRARY, TYPES, supported
from deepseed.codegen.triton_writer import POINTERS
from deepseed.codegen.updates import SIZE, Formula
from deepseed.ir.text import format_program

LAUNCH = '''def launch({parameters}):
    sizes = tuple([x.numel() for x in param])
    if not any(sizes):
        return
    device, size = param[0].device, max(1024, min(65536, triton.next_power_of_2(sum(sizes) // {programs})))
    tensors = list(zip({columns}))
    programs = sum([-(-n // size) for n in sizes])
    {name}[(programs,)](chunks(sizes, size, device), lengths(sizes, device), addresses(tensors, device), {shared}, aligned=aligned(tensors, {tensors}), XB={x}, CHUNK=size, num_warps={warps})
'''


def source(f: Formula) -> str:
    """Raises CodegenError."""
    p = f.program
    for op in p.ops:
        if not (op.target == "cast" or supported(op)) or any(t.dtype not in TYPES for t in op.types):
            raise CodegenError(f"%{op.name} = {op.target} of {f.name}: no Triton expression for it\n  fix: none is needed, torch's kernels run")
    targets, called = [o.ref.name for o in p.outputs], set[str]()
    part = Part((SIZE,), list(p.ops), [*f.each, *f.shared], targets)
    dtypes = {i.name: i.type.dtype for i in p.inputs} | {t: p.types[t].dtype for t in targets}
    text = text_of(p, part, f.shared, dict.fromkeys((*f.each, *f.shared), True), f.name, dtypes, called, 1 << 16)
    signature = text.signature.format(**{v: f'"*{POINTERS[dtypes[v]]}"' for v in f.shared})
    lines = ['"""' + "\n".join(["Generated, see deepseed/codegen/triton_updates.py.", "", *format_program(p).splitlines()]).replace('"""', "'''") + '\n"""', ""]
    lines += ["import triton", "import triton.language as tl", "", HELPERS]
    lines += [f"\n\n{LIBRARY[f]}" for f in LIBRARY if f in called]
    lines += [f"\n\n{text.kernel}", "\n\nKERNELS = {  # types of the parameters, block sizes, warps", f"    {signature}", "}", "", "", ""]
    launch = LAUNCH.format(
        parameters=", ".join([*f.each, *f.shared]), programs=2 * PROGRAMS, columns=", ".join([*f.each, *f.updated]), name=f.name, shared=", ".join(f.shared), tensors=text.tensors, x=text.blocks.x, warps=text.blocks.warps,
    )  # fmt: skip
    return "\n".join(lines) + launch
