"""Run a program on every rank of its mesh at once, op by op: the meaning of a program, shared with neither back end nor runtime.

Works on the program after any pass. One that has no mesh yet runs whole; a use that wants another layout is put together and
cut again; collectives follow ``deepseed.check.collectives``; once localized, every rank runs its own program.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from deepseed.check.collectives import perform
from deepseed.check.shards import ShardsError, assemble, coordinates, shards
from deepseed.check.typing import KEYED, MOVES, SAME, describe, operand_types
from deepseed.ir.layout import Layout, Owned
from deepseed.ir.program import Op, Program, Ref
from deepseed.ops import OpError, run
from deepseed.rules import localize_op

Values = dict[str, list[Tensor]]  # by value name: every rank's part, in rank order


class ExecutionError(ValueError):
    """An op that does not run on the parts that the ranks hold: ``op``, with the ``values`` computed before it."""

    def __init__(self, op: Op, message: str, values: Values) -> None:
        super().__init__(message)
        self.op, self.values = op, values


def execute(p: Program, inputs: Mapping[str, Tensor], *, ranks: Sequence[Program] = (), known: Mapping[str, list[Tensor]] | None = None) -> Values:
    """Every rank's part of every value of ``p``.

    ``inputs``: by value name, whole. ``ranks``: the program of each rank, where ``p`` is localized (``p`` is then any of them).
    ``known``: values that need not be computed again. Raises ExecutionError naming op and module path; nothing is freed, so a
    program is as large as all its values.
    """
    generator = torch.Generator().manual_seed(0)  # draws the summands of values that are cut into partial ones
    values: Values = dict(known or {})
    for i in p.inputs:
        if i.name not in values:
            values[i.name] = shards(inputs[i.name], i.type, p.mesh, generator)
    where = list(coordinates(p.mesh))
    defined, pending = {i.name for i in p.inputs}, set[str]()
    for n, op in enumerate(p.ops):
        early = next((r.name for r in op.refs if r.name not in defined or (r.name in pending and op.target != "wait")), None)
        if early is not None:
            raise ExecutionError(op, f"%{op.name} = {op.target} at {op.path or 'the top level'}, {op.phase}\n  reads %{early} before it is there", values)
        defined.update(op.results)
        pending.update(op.results if op.target.endswith(".start") else ())
        if all(r in values for r in op.results):
            continue
        try:
            results = _step(p, op, [r.ops[n] for r in ranks], [_read(p, ref, values, generator) for ref in op.refs], where, generator, values)
        except (OpError, ShardsError, RuntimeError, LookupError, TypeError, ValueError) as error:
            raise ExecutionError(op, f"{describe(op, operand_types(p, op), p.mesh)}\n  does not run: {error}", values) from error
        values.update(zip(op.results, results, strict=True))
    for o in p.outputs:
        if o.ref.name not in defined or o.ref.name in pending:
            raise ExecutionError(p.ops[-1], f"output {o.role} {o.key!r}\n  reads %{o.ref.name} before it is there", values)
    return values


def _read(p: Program, ref: Ref, values: Mapping[str, list[Tensor]], generator: torch.Generator) -> list[Tensor]:
    """The operand in the layout that the use wants."""
    t, parts = p.types[ref.name], values[ref.name]
    if ref.want is None or ref.want == t.layout:
        return parts
    return shards(assemble(parts, t, p.mesh), t.laid(ref.want), p.mesh, generator, _owners(p, ref.want, values))


def _owners(p: Program, layout: Layout, values: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
    """The ids that own rows in this layout, whole."""
    keys = {e.key for _, e in layout.elements if isinstance(e, Owned)}
    return {key: assemble(values[key], p.types[key], p.mesh) for key in keys}


def _step(
    p: Program, op: Op, local: Sequence[Op], operands: list[list[Tensor]], where: Sequence[Mapping[str, int]], generator: torch.Generator,
    values: Mapping[str, list[Tensor]],
) -> list[list[Tensor]]:
    types = operand_types(p, op)
    if op.target in SAME:
        return operands
    if op.target == "reshard":
        return [shards(assemble(operands[0], types[0], p.mesh), op.type, p.mesh, generator, _owners(p, op.type.layout, values))]
    if op.target in MOVES:
        axis = str(op.kw("axis"))
        if op.target in KEYED:
            return [perform(op.target, operands[0], types[0], op.type, axis, p.mesh, operands[1])]
        return [perform(op.target, x, s, t, axis, p.mesh) for x, s, t in zip(operands, types, op.types, strict=True)]
    if op.kw("states") is not None:
        _fits(op, operands)
    mine = local or [localize_op(op, types, p.mesh, c) for c in where]
    ranks = [run(each, [x[rank] for x in operands], p.mesh.seen_from(c)) for rank, (each, c) in enumerate(zip(mine, where, strict=True))]
    return [[results[k] for results in ranks] for k in range(len(op.results))]


def _fits(op: Op, operands: Sequence[Sequence[Tensor]]) -> None:
    """A fused update reads gradient and moments with the parameter's shape and dtype, whatever they have: past their end. A gradient may have fewer bits."""
    names = ("parameter", "gradient", *map(str, states if isinstance(states := op.kw("states"), tuple) else ()))
    for name, parts in zip(names, operands, strict=False):
        for rank, (x, parameter) in enumerate(zip(parts, operands[0], strict=True)):
            narrow = name == "gradient" and x.dtype.is_floating_point and x.dtype.itemsize < parameter.dtype.itemsize
            if name != "step" and (x.shape != parameter.shape or (x.dtype != parameter.dtype and not narrow)):
                raise OpError(f"rank {rank}: {name} is {x.dtype}{list(x.shape)}, the parameter {parameter.dtype}{list(parameter.shape)}")
            if name == "step" and x.numel() != 1:
                raise OpError(f"rank {rank}: step has {x.numel()} elements")
