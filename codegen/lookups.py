"""A fragment made ready: values numbered, and elements that are looked up by number as pointwise ops: ``gather`` of one element a row is a sum over where the number is, ``scatter_add`` of one a choice.

Then the row that a kernel holds is read once, and nothing is read by address. What is looked up in a result of pointwise ops is looked up in their operands, so that the sum over a row waits for no
other: log-softmax's element is the logit's, less the maximum and the logarithm of the sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from deepseed.codegen.expressions import CodegenError
from deepseed.ir.program import Arg, Builder, Op, Program, Ref, Type


def numbered(p: Program) -> Program:
    """The same fragment with its inputs named i0, i1 …, what its ops make v0, v1 …: names that mean nothing else in a kernel."""
    new = {i.name: f"i{n}" for n, i in enumerate(p.inputs)}
    new |= {result: f"v{n}" for n, result in enumerate(r for op in p.ops for r in op.results)}
    ops = [replace(op.map_refs(lambda ref: Ref(new[ref.name])), results=tuple([new[r] for r in op.results])) for op in p.ops]
    inputs = tuple([replace(i, name=new[i.name]) for i in p.inputs])
    return replace(p, inputs=inputs, ops=tuple(ops), outputs=tuple([replace(o, ref=Ref(new[o.ref.name])) for o in p.outputs]))


def without_lookups(p: Program, pointwise: Callable[[Op], bool]) -> Program:
    """``pointwise``: which ops are, to the back end. The same fragment without ``scatter_add``, and without ``gather`` from what the fragment makes or reads elsewhere too."""
    inputs = {i.name for i in p.inputs}
    if not any(op.target in ("gather", "scatter_add") for op in p.ops):
        return p
    out = Builder(p)
    for op in p.ops:
        x = op.refs[0].name if op.refs else ""
        if op.target == "scatter_add":
            _one(p, op, 1)
            there = _there(out, p, op, 1)
            moved = _emit(out, op, "aten.where.self", (there, op.refs[2], _emit(out, op, "full", (), replace(op.type, shape=()), value=0)), op.type)
            out.emit(replace(op, target="aten.add.Tensor", args=(op.refs[0], moved), kwargs=()))
        elif op.target == "gather" and not (x in inputs and len(p.uses[x]) == 1):
            _one(p, op, 1)
            found = _looked_up(out, p, op, x, _there(out, p, op, 1, p.types[x].shape), pointwise, {})
            out.emit(replace(op, target="reshape", args=(found,), kwargs=()))
        else:
            out.emit(op)
    return out.program()


def _looked_up(out: Builder, p: Program, op: Op, value: str, there: Ref, pointwise: Callable[[Op], bool], found: dict[str, Ref]) -> Ref:
    """The element of each row of ``value`` that ``there`` says, one in the dimension of the row."""
    if value not in found:
        dim, shape = int(str(op.kw("dim"))), p.types[op.refs[0].name].shape
        made, one = p.producers.get(value), replace(p.types[value], shape=tuple(1 if d == dim else n for d, n in enumerate(shape)))
        along = {r.name for r in made.refs if p.types[r.name].shape[dim - len(shape) :][:1] not in ((), (1,))} if made is not None else set()
        if made is not None and (pointwise(made) or made.target == "cast") and along:
            operands = {r.name: _looked_up(out, p, op, r.name, there, pointwise, found) if r.name in along else r for r in made.refs}
            name = _fresh(out, f"{op.name}_of")
            out.emit(replace(made.map_refs(lambda r: operands[r.name]), results=(name,), types=(one,)))
            found[value] = Ref(name)
        else:
            zero = _emit(out, op, "full", (), replace(one, shape=()), value=0)
            held = _emit(out, op, "aten.where.self", (there, Ref(value), zero), replace(one, shape=shape))
            found[value] = _emit(out, op, "sum", (held,), one, dims=(dim,), keepdim=True)
    return found[value]


def _one(p: Program, op: Op, operand: int) -> None:
    dim, shape = int(str(op.kw("dim"))), p.types[op.refs[operand].name].shape
    whole = p.types[op.refs[0].name].shape
    if op.kw("start") is not None or shape[dim] != 1 or any(n != whole[d] for d, n in enumerate(shape) if d != dim):
        raise CodegenError(f"%{op.name} = {op.target} of {shape[dim]} elements a row: only one can be written\n  fix: none is needed, the group runs as Python")


def _there(out: Builder, p: Program, op: Op, operand: int, shape: tuple[int, ...] | None = None) -> Ref:
    """Where the number of a row is that of the element."""
    shape = op.type.shape if shape is None else shape
    dim, index = int(str(op.kw("dim"))), op.refs[operand]
    dtype = p.types[index.name].dtype
    counted = _emit(out, op, "iota", (), Type(dtype, (shape[dim],)), start=0, step=1)
    counted = _emit(out, op, "reshape", (counted,), Type(dtype, tuple(n if d == dim else 1 for d, n in enumerate(shape))))
    return _emit(out, op, "aten.eq.Tensor", (counted, index), Type("bool", shape))


def _emit(out: Builder, op: Op, target: str, args: tuple[Arg, ...], t: Type, **kwargs: Arg) -> Ref:
    name = _fresh(out, f"{op.name}_{target.split('.')[-2 if target.startswith('aten') else -1]}")
    out.emit(replace(op, results=(name,), target=target, args=args, kwargs=tuple(kwargs.items()), types=(t,)))
    return Ref(name)


def _fresh(out: Builder, name: str) -> str:
    """A name that a kernel's parameters can have."""
    new, n = out.fresh(name), 0
    while "." in new:
        n += 1
        new = out.fresh(f"{name}_{n}")
    return new
