"""Where the rows and the sequence of the batch lie in every value: what tells a sequence axis from a data axis.

While the batch has rows enough, the cheapest way to divide anything is by rows. That is data parallelism; an axis that is there
to split the sequence takes rows only where an op can be divided in no other way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deepseed.ir.contract import PassError
from deepseed.ir.layout import Split
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import FLOATS, Input, Op, Program
from deepseed.rules import Strategy, signature
from deepseed.rules.signature import Signature

Mark = tuple[str, int, int, int]  # "rows" or "sequence"; dimension, product of what lies left of it there, size
Marks = Mapping[str, frozenset[Mark]]  # of every value
ROWS, SEQUENCE = "rows", "sequence"


def tokens(p: Program, axis: str, mesh: Mesh) -> int:
    """The length of the batch's sequence: the most frequent size beside the rows, of ids [rows, tokens] or features [rows, tokens, width].

    Raises PassError where no entry of the batch has one, or it has fewer tokens than the axis has ranks."""
    n, batch = mesh.size(axis), p.by_role("batch")
    found = [i.type.shape[1] for i in batch if len(i.type.shape) == 2 and i.type.dtype not in FLOATS]
    found = [size for size in found or [i.type.shape[1] for i in batch if len(i.type.shape) == 3 and i.type.dtype in FLOATS] if size > 1]
    if not found:
        entries = ", ".join(f"{i.key} {i.type.dtype}{list(i.type.shape)}" for i in batch) or "no tensors"
        raise PassError(
            f"{axis}={n} splits the batch's sequence over {n} ranks, but 0 of its {len(batch)} entries have one: neither ids [rows, tokens] nor features "
            f"[rows, tokens, width]; the batch has {entries}\n  fix: a plan without {axis}: dp{n} splits the rows, tp{n} the weights"
        )
    length = max(set(found), key=found.count)
    if length < n:
        raise PassError(f"the batch's sequence has {length} tokens, fewer than the {n} ranks of {axis}={n}\n  fix: {axis}{length}, or a plan without {axis}")
    return length


def has_sequence(item: Input, length: int) -> bool:
    """Whether an input is an entry of the batch whose second dimension is the sequence."""
    return item.role == "batch" and len(item.type.shape) > 1 and item.type.shape[1] == length


def follow(p: Program, length: int) -> Marks:
    """Rows and sequence of the batch through all ops, by the factors that operands and results share. A window of a marked dimension
    (a slice, a shift, a padding) is marked too."""
    marks: dict[str, frozenset[Mark]] = {}
    for i in p.inputs:
        first = [(ROWS, 0, 1, i.type.shape[0])] if i.role == "batch" and i.type.shape else []
        marks[i.name] = frozenset([*first, *([(SEQUENCE, 1, 1, length)] if has_sequence(i, length) else [])])
    for op in p.ops:
        have = [marks[r.name] for r in op.refs]
        sig = signature(op, [p.types[r.name] for r in op.refs]) if any(have) else None
        for k, result in enumerate(op.results):
            marks[result] = frozenset() if sig is None else _through(op, sig, have, k)
    return marks


def _through(op: Op, sig: Signature, have: Sequence[frozenset[Mark]], result: int) -> frozenset[Mark]:
    slot = len(sig.operands) + result
    dims = sig.results[result]
    kept = {name for dim in dims for name in dim}
    read = {name for tensor in sig.operands for dim in tensor for name in dim}
    out: set[Mark] = set()
    for operand, marks in enumerate(have):
        for kind, dim, outer, size in marks:
            left = 1
            for name in sig.operands[operand][dim]:
                end = left * sig.sizes[name]
                low, high = max(left, outer), min(end, outer * size)
                if low < high and low % left == 0 and high % low == 0:
                    out.update((kind, at.dim, at.left * (low // left), high // low) for at in sig.places[name] if at.slot == slot)
                left = end
            before = sig.operands[operand]
            if outer == 1 and len(dims) == len(before) and before[dim] and dims[dim] and not kept & set(before[dim]) and not read & set(dims[dim]):
                out.add((kind, dim, 1, op.types[result].shape[dim]))  # the same dimension of another length
    return frozenset(out)


def without_rows(found: Sequence[Strategy], marks: Sequence[frozenset[Mark]]) -> list[Strategy]:
    """The strategies of one op that split no rows, if one of them splits anything; ``marks`` of its operands and results."""
    splits = [s for s in found if _splits(s)]
    rows = [s for s in splits if any(_in_rows(e, m) for (e, m) in zip((*s.operands, *s.results), marks, strict=True))]
    return list(found) if len(rows) == len(splits) else [s for s in found if s not in rows]


def whole_rows(found: Sequence[Strategy], marks: Sequence[frozenset[Mark]]) -> list[Strategy]:
    """The strategies of one op that split no rows."""
    return [s for s in found if not any(_in_rows(e, m) for (e, m) in zip((*s.operands, *s.results), marks, strict=True))]


def _splits(s: Strategy) -> bool:
    return any(isinstance(e, Split) for e in (*s.operands, *s.results))


def _in_rows(element: object, marks: frozenset[Mark]) -> bool:
    return isinstance(element, Split) and any(
        kind == ROWS and dim == element.dim and outer <= element.outer < outer * size for kind, dim, outer, size in marks
    )
