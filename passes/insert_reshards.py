"""Where a use wants another layout than its value has, put a ``reshard`` before it. How that is done is lower_reshards' choice."""

from __future__ import annotations

from dataclasses import replace

from deepseed.ir.contract import program_pass
from deepseed.ir.layout import Layout, Owned, Partial, Split, routes, weaker
from deepseed.ir.program import Builder, Op, Program, Ref, params_only


@program_pass(requires={"placed"}, provides={"explicit"})
def insert_reshards(p: Program) -> Program:
    """Make every operand arrive in the layout its use wants.

    One reshard for each (value, layout, phase), just before the first use: a parameter stored in pieces is gathered once
    for forward and once more for backward, and dropped in between. An output's reshard stands right after its producer. Rows on their way from a
    split to their owners, or back, take the ids that own them along, as a second operand.

    before: %y : f32[8@dp, 16] sum@tp
            %z = aten.relu(%y as [8@dp, 16]) : f32[8@dp, 16]
    after:  %y : f32[8@dp, 16] sum@tp
            %y.whole_tp = reshard(%y) : f32[8@dp, 16]
            %z = aten.relu(%y.whole_tp) : f32[8@dp, 16]
    """
    out = Builder(p)
    weights = params_only(p)
    made: dict[tuple[str, Layout, str], Ref] = {}

    def arrive(ref: Ref, phase: str, path: str, line: str) -> Ref:
        type_ = out.types[ref.name]
        want = type_.layout if ref.want is None else ref.want
        for axis, element in type_.layout.elements:
            if weaker(element, want.on(axis)):  # as it lies
                want = want.with_(axis, element)
        if want == type_.layout:
            return Ref(ref.name)
        key = (ref.name, want, phase if ref.name in weights else "")
        if key not in made:
            args: tuple[Ref, ...] = (Ref(ref.name),)
            axis, own = next(((a, own) for a in p.mesh.names if (own := routes(type_.layout.on(a), want.on(a))) is not None), ("", None))
            if own is not None:
                rows, there = ({a: e for a, e in layout.splits(own.dim) if a != axis} for layout in (type_.layout, want))
                if rows != there:  # on the other axes first: ids lie as the rows do
                    between = want.with_(axis, type_.layout.on(axis))
                    return arrive(Ref(arrive(Ref(ref.name, between), phase, path, line).name, want), phase, path, line)
                ids = Layout.of(**{a: Split(0, e.outer, e.of) for a, e in rows.items()})
                args = (*args, arrive(Ref(own.key, ids), phase, path, line))
            name = out.fresh(f"{ref.name}.{_short(type_.layout, want)}")
            out.emit(Op((name,), "reshard", args, (type_.laid(want),), phase=phase, path=path, line=line))
            made[key] = Ref(name)
        return made[key]

    returned: dict[str, list[Ref]] = {}
    for o in p.outputs:
        returned.setdefault(o.ref.name, []).append(o.ref)
    for op in p.ops:
        out.emit(op.map_refs(lambda ref, op=op: arrive(ref, op.phase, op.path, op.line)))  # type: ignore[misc]
        for result in op.results:
            for ref in returned.get(result, ()):  # outputs set off at once: their collectives end with the step
                arrive(ref, op.phase, op.path, op.line)
    outputs = []
    for o in p.outputs:
        producer = p.producers.get(o.ref.name)
        phase = producer.phase if producer else "update" if o.role in ("param", "buffer", "state") else "forward"
        outputs.append(replace(o, ref=arrive(o.ref, phase, "", "")))
    return out.program(outputs=outputs)


def _short(before: Layout, after: Layout) -> str:
    """What changes, as a word: ``whole_dp``, ``tp1`` (dimension 1 over tp), ``sum_tp``."""
    words = []
    for axis in sorted({a for a, _ in before.elements + after.elements}):
        element = after.on(axis)
        if element == before.on(axis):
            continue
        if isinstance(element, Split):
            words.append(f"{axis}{element.dim}")
        else:
            words.append(f"{'owned' if isinstance(element, Owned) else element.op if isinstance(element, Partial) else 'whole'}_{axis}")
    return ".".join(words)
