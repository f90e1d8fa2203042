"""The same program in float64: every narrower float becomes f64, the model's own casts included.

Verification runs in float64 so that its tolerance can be 1e-10; a cast to float32 inside the model would stop agreement at 1e-7.
"""

from __future__ import annotations

from dataclasses import replace

from deepseed.ir.program import FLOATS, Arg, Op, Program, Ref, Type


def widen(p: Program) -> Program:
    """``p`` with every f32, bf16 and f16 made f64, c64 made c128; shapes, layouts and names stay."""
    return replace(
        p,
        inputs=tuple(replace(i, type=_type(i.type)) for i in p.inputs),
        ops=tuple(_op(op) for op in p.ops),
        origins=tuple((key, _op(op)) for key, op in p.origins),
    )


def _op(op: Op) -> Op:
    return replace(
        op,
        args=tuple(_arg(a) for a in op.args),
        kwargs=tuple((k, _arg(v)) for k, v in op.kwargs),
        types=tuple(_type(t) for t in op.types),
    )


def _type(t: Type) -> Type:
    return replace(t, dtype=_dtype(t.dtype))


def _dtype(name: str) -> str:
    return "f64" if name in FLOATS else "c128" if name == "c64" else name


def _arg(a: Arg) -> Arg:
    if isinstance(a, Ref):
        return a
    if isinstance(a, tuple):
        return tuple(_arg(x) for x in a)
    return _dtype(a) if isinstance(a, str) else a
