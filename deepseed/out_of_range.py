"""Which number of the batch picks from a table that does not have it? Asked after an op has met one, whose own words name neither the batch entry nor the module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor

from deepseed import ops
from deepseed.build import Built
from deepseed.capture.convert import live
from deepseed.ir.program import Op, Output, Program
from deepseed.runtime.errors import RankError

_PICKS = ("embedding", "gather", "scatter_add", "aten.nll_loss_forward", "aten.nll_loss2d_forward")  # from their first operand, by their second
_IGNORED = ", or the loss's ignore_index, which is -100 where nothing is said"
_WORDS = ("out of range", "out of bounds")


@contextmanager
def named(built: Built, batch: Mapping[str, Tensor]) -> Iterator[None]:
    """What a run of ``built`` raises, with what and where if it is about such a number and ``batch`` has one."""
    try:
        yield
    except Exception as error:
        if not any(word in str(error) for word in _WORDS):
            raise
        found = found_in(built.captured.program, {("batch", k): x for k, x in batch.items()} | {("constant", k): x for k, x in built.constants.items()})
        if not found:
            raise
        raise (RankError(error.rank, f"{str(error).splitlines()[0]}: {found}") if isinstance(error, RankError) else IndexError(found)) from error


def found_in(p: Program, given: Mapping[tuple[str, str], Tensor]) -> str:
    """The first index, in the program's order, that is made of ``given`` (by role and key) and names nothing; nothing where there is none, or where the batch has other sizes than the program."""
    for op in p.ops:
        if op.target not in _PICKS:
            continue
        index = op.refs[1]
        made = live(p.ops, [index])
        reads = {ref.name for each in made for ref in each.refs} | {index.name}
        inputs = tuple([i for i in p.inputs if i.name in reads])
        if any((i.role, i.key) not in given or given[i.role, i.key].shape != i.type.shape for i in inputs):
            continue
        part = replace(p, inputs=inputs, ops=tuple(made), outputs=(Output(index, "output", "index"),))
        try:
            (found,) = ops.evaluate(part, {i.name: given[i.role, i.key].detach().cpu() for i in inputs}).values()
        except ops.OpError:  # made with an index of its own, which is not there
            continue
        shape, loss = p.types[op.refs[0].name].shape, op.target.startswith("aten.nll")
        size = shape[min(1, len(shape) - 1)] if loss else shape[int(str(op.kw("dim", 0)))]
        wrong = found[(found < 0) | (found >= size)]
        if loss:
            wrong = wrong[wrong != op.args[4]]  # those that do not count
        if wrong.numel():
            return _text(op, int(wrong[0]), size, {i.key: given[i.role, i.key] for i in inputs if i.role == "batch"})
    return ""


def _text(op: Op, value: int, size: int, entries: Mapping[str, Tensor]) -> str:
    where = f"{op.path or 'the top'}{f' ({op.line})' * bool(op.line)}"
    for key, x in entries.items():
        if (at := (x == value).nonzero()).numel():
            has = f'batch entry "{key}" has {value} at {at[0].tolist()}'
            break
    else:
        has = f"{value} comes of batch entries {', '.join(entries)}"
    return (
        f"{has}, and {op.target} at {where} picks one of {size}\n"
        f"  fix: it must be 0 to {size - 1}{_IGNORED if 'loss' in op.target else ''}; look at the data, or give the model more rows"
    )
