"""Optimizers' updates as one C++ function over all tensors: reads and writes each element once, in the tensors' own memory.

    update_adamw_3f2a91c0(threads, counts, sizes, tensors, shared)

A formula has ``counts`` tensors, each a row of addresses in the order of the formula's ``each``; those of the next formula follow. Threads share the elements of one evenly, whatever tensor they are of.
"""

from __future__ import annotations

from collections.abc import Sequence

from deepseed.codegen.cpp_ops import TYPES, computed, converted, expression, type_of
from deepseed.codegen.updates import Formula, name_of
from deepseed.ir.program import Op

LEAST = 1 << 15  # elements for which a further thread pays


def source(formulas: Sequence[Formula]) -> str:
    """Stands behind cpp_ops.LIBRARY. Raises CodegenError."""
    lines = [_function(f, n) for n, f in enumerate(formulas)]
    lines.append(f'extern "C" void {name_of(formulas)}(int threads, const int64_t *counts, const int64_t *sizes, void *const *tensors, void *const *shared) {{')
    for n, f in enumerate(formulas):
        lines += [f"    formula_{n}(threads, counts[{n}], sizes, tensors, shared);", f"    sizes += counts[{n}], tensors += counts[{n}] * {len(f.each)}, shared += {len(f.shared)};"]
    return "\n".join([*lines, "}"]) + "\n"


def _function(f: Formula, number: int) -> str:
    p, names, numbers, loop = f.program, dict[str, str](), list[str](), list[str]()
    for i in p.inputs:
        at = f"at[{f.each.index(i.name)}]" if i.name in f.each else f"shared[{f.shared.index(i.name)}]"
        kind, place, value = TYPES[i.type.dtype], f"at_{i.name}", f"{i.name}_"  # no word of C++ and none of this function's begins or ends so
        numbers.append(f"{kind} *__restrict {place} = ({kind} *){at};")
        names[i.name] = value
        (loop if i.type.shape else numbers).append(f"{type_of(i.type.dtype)} {value} = up({place}[{'i' if i.type.shape else '0'}]);")
    for op in p.ops:
        names[op.name] = op.name
        (loop if op.type.shape else numbers).append(f"{type_of(op.type.dtype)} {op.name} = {_text(f, op, names)};")
    for o, name in zip(p.outputs, f.updated, strict=True):
        loop.append(f"at_{name}[i] = down<{TYPES[p.types[name].dtype]}>::of({names[o.ref.name]});")
    lines = [
        f"static void formula_{number}(int threads, int64_t count, const int64_t *sizes, void *const *tensors, void *const *shared) {{",
        "    int64_t all = 0;",
        "    for (int64_t t = 0; t < count; ++t) all += sizes[t];",
        f"    #pragma omp parallel for num_threads(threads) if (threads > 1 && all > {LEAST})",
        "    for (int part = 0; part < threads; ++part) {",
        "        int64_t begin = all * part / threads, end = all * (part + 1) / threads, before = 0;",
        "        for (int64_t t = 0; t < count; before += sizes[t++]) {",
        "            int64_t first = begin > before ? begin - before : 0, last = end - before < sizes[t] ? end - before : sizes[t];",
        "            if (first >= last) continue;",
        f"            void *const *at = tensors + t * {len(f.each)};",
        *(f"            {line}" for line in numbers),
        "            #pragma omp simd",
        "            for (int64_t i = first; i < last; ++i) {",
        *(f"                {line}" for line in loop),
        "            }", "        }", "    }", "}",
    ]  # fmt: skip
    return "\n".join(lines)


def _text(f: Formula, op: Op, names: dict[str, str]) -> str:
    given = [names[r.name] for r in op.refs]
    if op.target == "cast":
        return converted(given[0], computed(f.program.types[op.refs[0].name].dtype), computed(op.type.dtype))
    return expression(f.program, op, given)
