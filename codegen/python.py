"""Readable straight-line Python of one rank's program: the default back end, and the one to debug with.

One line an op, calling torch's C bindings; each value is deleted after its last use; new parameters and state are written
into the stored tensors after the last reader of the old value. The source defines ``step(rt, inputs)``: ``inputs`` is a
list of local tensors in the program's order (emptied at once, so that nothing else keeps them alive), ``rt`` the runtime
whose collectives it calls; it returns the outputs other than new parameters and state, in the program's order. A scheduled program is
several functions: see deepseed/codegen/parts.py.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from deepseed.codegen.chains import Chaining, chains, write
from deepseed.codegen.expressions import Source, assignment, listed
from deepseed.codegen.kernels import NONE, call, starts
from deepseed.codegen.optim import UPDATES, Update
from deepseed.codegen.parts import generate_parts
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Op, Program
from deepseed.ir.text import format_type


def generate(p: Program, lane: int = 0, looked: bool = False, kernels: Mapping[str, str] = NONE, chaining: Chaining | None = None) -> str:
    """The source of ``step(rt, inputs)`` for a localized program, of pipeline rank ``lane``. ``looked``: each value is shown to ``rt.look`` as it is made.
    ``kernels``: the function that computes a group, by its mark: one line calls it; ``chaining``: what is needed to call several at once. Raises CodegenError for an unknown own op."""
    if p.schedule is not None:
        return generate_parts(p, lane, looked, kernels, chaining)
    out = Source(p, looked=looked)
    donation = out.donation
    update = Update(donation, out.name, out.emit, kernels)
    _prologue(out)
    _close(out, update, (-1,), [i.name for i in p.inputs])
    place = ("", "")
    grouped = starts(p, kernels)
    returned = {o.ref.name for o in p.outputs}
    found = chains(out, list(enumerate(p.ops)), chaining, grouped, kernels, {}, lambda n, op: True, returned.__contains__)
    whole, ends = out.lines, {chain.ops[-1][0]: chain for chain in found.values()}
    n = 0
    while n < len(p.ops):
        op = p.ops[n]
        if n in found:
            out.lines = []
        if (op.path, op.phase) != place:
            place = (op.path, op.phase)
            out.lines.append(f"    # {op.path or '(top)'}, {op.phase}" + (f" ({op.line})" if op.line else ""))
        together: Sequence[Op] = (op,)
        if n in grouped:
            g = grouped[n]
            call(out, p, g, kernels[g.kernel])
            inner = {r for each in p.ops[n : g.last] for r in each.results}.difference(g.makes)
            _close(out, update, range(n, g.last), g.makes, inner)
            n = g.last
            if n - 1 in ends:
                lines, out.lines = out.lines, whole
                write(out, ends[n - 1], lines, (), lambda value: True)
            continue
        if op.target in UPDATES:
            together = update.together(n)
            update.optimizer(n)
        elif not update.waited(n, op):
            types = ", ".join(format_type(t, p.mesh) for t in op.types)
            out.emit(assignment(out, op), types)
        for each in together:
            _close(out, update, (n,), each.results)
            n += 1
    shown = [out.name(o.ref.name + (".copy" if o.ref.name in donation.copied else "")) for o in donation.returned]
    out.emit(f"return {listed(shown)}")
    return "\n".join([*out.lines, *(line for chain in found.values() for line in ("", "", *chain.text))]) + "\n"


def _prologue(out: Source) -> None:
    p = out.p
    out.lines += [
        f'"""Generated from program {p.name} on {Mesh(p.mesh.axes)}: one rank\'s step on local tensors, see deepseed/codegen/python.py."""',
        "",
        "import torch",
        "",
        "from deepseed import ops",
        "",
        "",
        "def step(rt, inputs):",
        "    (",
    ]
    out.lines += [f"        {out.name(i.name)},  # {i.role} {i.key}: {format_type(i.type, p.mesh)}" for i in p.inputs]
    out.lines += ["    ) = inputs" if p.inputs else "    _) = inputs, None", "    inputs.clear()", "    device = rt.device"]


def _close(out: Source, update: Update, at: Sequence[int], made: Sequence[str], inner: Collection[str] = ()) -> None:
    """What follows the ops ``at``: writes into stored tensors, and the end of values that nothing reads any more; ``inner``: those that a kernel kept to itself."""
    donation = update.donation
    out.look(made)
    for value in made:
        if value in donation.copied:
            out.emit(f"{out.name(value + '.copy')} = {out.name(value)}.clone()")
    for n in at:
        update.after(n)
    if dead := [out.name(v) for n in at for v in donation.dies.get(n, ()) if v not in inner]:
        out.emit(f"del {', '.join(dead)}")
