"""Attention over repeated key and value heads becomes attention over the few there are, helper of ``canonicalize``.

Models with fewer key than query heads repeat them before the kernel: ``reshape(expand(reshape(k)))``. ``sdpa`` takes the few
heads as they are, so what is kept for the backward shrinks by the repetition, and dk, dv need no sum over it.
"""

from __future__ import annotations

from dataclasses import replace

from deepseed.ir.program import Op, Program, Ref, Type


def merge_repeated_heads(p: Program) -> Program:
    """before: %wide = expand(%k5) : f32[2, 2, 3, 8, 4], %kr = reshape(%wide) : f32[2, 6, 8, 4], %o, %l = sdpa(%q, %kr, %vr, ..)
    after:  %o, %l = sdpa(%q, %k, %v, ..)
    """
    ops: list[Op] = []
    types = dict(p.types)
    summed: dict[str, Op] = {}  # result of a sum over the repetition -> the op that stands for it
    gone: set[str] = set()

    def few(ref: Ref, name: str) -> Ref | None:
        """The heads that ``ref`` repeats."""
        last = p.producers.get(ref.name)
        wide = p.producers.get(last.refs[0].name) if last is not None and last.target == "reshape" else None
        if last is None or wide is None or wide.target != "expand" or len(wide.type.shape) != 5 or len(last.type.shape) != 4:
            return None
        b, heads, repeats, t, d = wide.type.shape
        source = wide.refs[0]
        if last.type.shape != (b, heads * repeats, t, d) or p.types[source.name].shape != (b, heads, 1, t, d):
            return None
        before = p.producers.get(source.name)
        if before is not None and before.target == "reshape" and p.types[before.refs[0].name].shape == (b, heads, t, d):
            return before.refs[0]
        while name in types:
            name += "_"
        types[name] = Type(last.type.dtype, (b, heads, t, d))
        ops.append(replace(last, results=(name,), args=(source,), types=(types[name],)))
        return Ref(name)

    def total(gradient: str, shape: tuple[int, ...]) -> tuple[Op, Op] | None:
        """reshape and sum over the repetition, if nothing else reads ``gradient``."""
        users = p.uses[gradient]
        split = users[0] if len(users) == 1 else None
        if not isinstance(split, Op) or split.target != "reshape":
            return None
        b, heads, t, d = shape
        users = p.uses[split.name]
        added = users[0] if len(users) == 1 else None
        whole = (b, heads, p.types[gradient].shape[1] // heads, t, d)
        if not isinstance(added, Op) or added.target != "sum" or added.kw("dims") != (2,) or split.type.shape != whole:
            return None
        return split, added

    for op in p.ops:
        if op.results[0] in gone:
            continue
        if op.results[0] in summed:
            ops.append(summed[op.results[0]])
        elif op.target == "sdpa" and (pair := _both(few(op.refs[1], f"{op.name}.k"), few(op.refs[2], f"{op.name}.v"))):
            ops.append(replace(op, args=(op.args[0], *pair, *op.args[3:])))
        elif op.target == "sdpa_backward" and (pair := _both(few(op.refs[2], f"{op.name}.k"), few(op.refs[3], f"{op.name}.v"))):
            kinds = [types[r.name] for r in pair]
            sums = [total(name, t.shape) for name, t in zip(op.results[1:], kinds, strict=True)]
            if None in sums:
                ops.append(op)
                continue
            ops.append(replace(op, args=(*op.args[:2], *pair, *op.args[4:]), types=(op.types[0], *kinds)))
            for name, found in zip(op.results[1:], sums, strict=True):
                assert found is not None
                split, added = found
                gone.add(split.name)
                summed[added.name] = replace(added, target="reshape", args=(Ref(name),), kwargs=())
        else:
            ops.append(op)
    return replace(p, ops=tuple(ops))


def _both(k: Ref | None, v: Ref | None) -> tuple[Ref, Ref] | None:
    return None if k is None or v is None else (k, v)
