"""What a pass did: two programs compared in ops, layouts and collectives, on one screen.

Ops are counted by target; values are matched by name, which passes keep. Nothing is compared as text, so a renamed value
shows as one op gone and one come.

    step mesh(dp=2, tp=2): 31 -> 35 ops, 40 -> 44 values, facts +explicit
    ops
      +    4  reshard   (0 -> 4)
    uses that want another layout than the value has: 5 -> 0
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from deepseed.ir.program import Program
from deepseed.ir.text import format_op, format_type

_WIDTH = 120


def diff(a: Program, b: Program, *, limit: int | None = 12) -> str:
    """What changed from ``a`` to ``b``; at most ``limit`` lines a section (None: all). Empty sections are left out.

    Sections: facts and sizes; ops removed and added by target; collectives added and removed by kind and axis; origins by
    target; values whose type or layout changed; inputs and outputs that came or went.
    """
    if a == b:
        return f"{a.name}: no change ({len(a.ops)} ops)\n"
    out = [_headline(a, b)]
    out += _section("ops", _counts(Counter(o.target for o in a.ops), Counter(o.target for o in b.ops)), limit)
    out += _section("collectives", _counts(_collectives(a), _collectives(b)), limit)
    out += _section("origins", _counts(Counter(o.target for _, o in a.origins), Counter(o.target for _, o in b.origins)), limit)
    wanted = [sum(r.want is not None for op in p.ops for r in op.refs) for p in (a, b)]
    if wanted[0] != wanted[1]:
        out.append(f"uses that want another layout than the value has: {wanted[0]} -> {wanted[1]}")
    out += _section("values that changed", _changed(a, b), limit)
    out += _section("inputs", _ends(_inputs(a), _inputs(b)), limit)
    out += _section("outputs", _ends(_outputs(a), _outputs(b)), limit)
    if len(out) == 1:
        out += _section("the same ops on other operands, in another order or with other arguments", _lines(a, b), limit)
    return "\n".join(out) + "\n"


def _headline(a: Program, b: Program) -> str:
    facts = [f"+{f}" for f in sorted(b.facts - a.facts)] + [f"-{f}" for f in sorted(a.facts - b.facts)]
    mesh = str(a.mesh) if a.mesh == b.mesh else f"{a.mesh} -> {b.mesh}"
    name = a.name if a.name == b.name else f"{a.name} -> {b.name}"
    return f"{name} {mesh}: {len(a.ops)} -> {len(b.ops)} ops, {len(a.types)} -> {len(b.types)} values" + (f", facts {' '.join(facts)}" if facts else "")


def _counts(before: Mapping[str, int], after: Mapping[str, int]) -> list[str]:
    """``+ 132  reshard   (0 -> 132)``: the largest change first."""
    changes = {k: after.get(k, 0) - before.get(k, 0) for k in {*before, *after}}
    ordered = sorted((k for k, n in changes.items() if n), key=lambda k: (-abs(changes[k]), k))
    return [f"{'+' if changes[k] > 0 else '-'}{abs(changes[k]):>5}  {k}   ({before.get(k, 0)} -> {after.get(k, 0)})" for k in ordered]


def _collectives(p: Program) -> Counter[str]:
    return Counter(op.target.removesuffix(".start") + (f" over {op.kw('axis')}" if op.kw("axis") else "") for op in p.ops if op.target.endswith(".start"))


def _changed(a: Program, b: Program) -> list[str]:
    """Values with the same name and another type, grouped by what they were and are."""
    groups: dict[str, list[str]] = {}
    for name, t in b.types.items():
        old = a.types.get(name)
        if old is not None and (old != t or a.mesh != b.mesh):
            was, now = format_type(old, a.mesh), format_type(t, b.mesh)
            if was != now:
                groups.setdefault(f"{was} -> {now}", []).append(f"%{name}")
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return [_clip(f"{change}   {_plural(len(names), 'value')}: {', '.join(names)}") for change, names in ordered]


def _inputs(p: Program) -> dict[str, str]:
    return {f"{i.role} {i.key!r}": f"%{i.name}" for i in p.inputs}


def _outputs(p: Program) -> dict[str, str]:
    return {f"{o.role} {o.key!r}": f"%{o.ref.name}" for o in p.outputs}


def _ends(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    gone = [f"- {k} {before[k]}" for k in before if k not in after]
    come = [f"+ {k} {after[k]}" for k in after if k not in before]
    other = [f"{k}: {before[k]} -> {after[k]}" for k in after if k in before and before[k] != after[k]]
    return [_clip(line) for line in gone + come + other]


def _lines(a: Program, b: Program) -> list[str]:
    """Ops that differ though every count is the same, before and after."""
    before = {op.name: (i, op) for i, op in enumerate(a.ops)}
    out = []
    moved = 0
    for i, op in enumerate(b.ops):
        at, old = before.get(op.name, (i, None))
        moved += at != i
        if old is not None and old != op:
            out += [f"- {format_op(old, a.types, a.mesh)}"[:_WIDTH], f"+ {format_op(op, b.types, b.mesh)}"[:_WIDTH]]
    return out + ([f"moved: {_plural(moved, 'op')}"] if moved else [])


def _section(title: str, lines: list[str], limit: int | None) -> list[str]:
    if not lines:
        return []
    shown = lines if limit is None else lines[:limit]
    rest = [f"  … {len(lines) - len(shown)} more"] if len(shown) < len(lines) else []
    return [title, *(f"  {line}" for line in shown), *rest]


def _clip(line: str) -> str:
    return line if len(line) <= _WIDTH else line[: _WIDTH - 1] + "…"


def _plural(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
