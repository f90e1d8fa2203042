"""What an op is to a kernel: helper of ``fuse`` and of what marks groups besides.

Names of ops decide what an op is, never what it is for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from deepseed.ir.kernels import PRODUCT
from deepseed.ir.mesh import TIME
from deepseed.ir.program import FLOATS, Op, Program
from deepseed.rules.pointwise import POINTWISE

POINT, VIEW, INDEX, REDUCE, PICK, CREATE = "point", "view", "index", "reduce", "pick", "create"
KINDS: Mapping[str, str] = {
    **dict.fromkeys(POINTWISE, POINT), "cast": POINT, "expand": VIEW, "reshape": VIEW, "permute": INDEX, "slice": INDEX, "unslice": INDEX, "pad": INDEX, "cat": INDEX,
    "sum": REDUCE, "amax": REDUCE, "gather": PICK, "scatter_add": PICK, "full": CREATE, "iota": CREATE, "bernoulli": CREATE, "uniform": CREATE,
}  # fmt: skip
FREE = ("reshape", "permute", "expand", "slice")  # may be views
ONE_ROW = 4096  # elements of a space of one row, at most: one processor has all of it
WIDEST = 8192  # elements of a row, at most, whose sums across rows are made where it is at hand: a program holds them beside what it holds of the row
_NO_KERNEL = ("c64", "c128")


def kind_of(op: Op, p: Program) -> str:
    """What an op is to a kernel; "" where none computes it."""
    kind = KINDS.get(op.target, "")
    if not kind or len(op.results) > 1 or op.type.host or any(t.dtype in _NO_KERNEL for t in (op.type, *(p.types[r.name] for r in op.refs))):
        return ""
    if kind == CREATE and op.target != "full" and op.type.layout.on(TIME) is not None:
        return ""  # its numbers depend on the microbatch
    if kind == REDUCE and not op.kw("dims"):
        return POINT
    if kind == PICK and not _picks_one(op, p):
        return ""
    return kind


def leaves_apart(p: Program, members: Sequence[Op], products: bool = False) -> bool:
    """Whether kernels compute all of a group that was decomposed, so that it need not be one op again: what is reduced otherwise than along rows is not read in it, but by an op
    that goes with it (a cast of what was added up in more bits). ``products``: matrix products are kernels too."""
    made = {op.name for op in members}

    def read(op: Op) -> bool:
        return any(isinstance(u, Op) and u.name in made for u in p.uses[op.name])

    for op in members:
        if products and is_product(p, op):
            continue
        kind = kind_of(op, p)
        if not kind:
            return False
        if kind == REDUCE and not in_rows(op, p) and read(op):
            behind = behind_sum(p, op)
            if behind is None or read(behind) or not across_rows(op, p):
                return False
    return True


def is_product(p: Program, op: Op) -> bool:
    """Whether a kernel computes it: one float dtype, on the device, and something to compute."""
    types = [*op.types, *(p.types[r.name] for r in op.refs)]
    return op.target == PRODUCT and all(t.dtype == op.type.dtype and t.dtype in FLOATS and not t.host and 0 not in t.local(p.mesh) for t in types)


def behind_sum(p: Program, op: Op) -> Op | None:
    """The pointwise op that alone reads a reduction, and nothing else."""
    users = p.uses[op.name]
    u = users[0] if len(users) == 1 else None
    return u if isinstance(u, Op) and kind_of(u, p) == POINT and len(u.refs) == 1 and u.type.shape == op.type.shape else None


def in_rows(op: Op, p: Program) -> bool:
    """Whether trailing dimensions are reduced, and rows are left, or few elements in all: sizes of 1 aside."""
    shape, kept, gone = _dims(op, p)
    return (bool(kept) or prod(shape) <= ONE_ROW) and (not gone or max(kept, default=-1) < min(gone))


def across_rows(op: Op, p: Program) -> bool:
    """Whether leading dimensions are reduced, and trailing ones are left, sizes of 1 aside: rows are added up, and are not too long to be held beside the sums."""
    shape, kept, gone = _dims(op, p)
    return max(gone, default=-1) < min(kept, default=len(shape)) and prod(shape[d] for d in kept) <= WIDEST


def _dims(op: Op, p: Program) -> tuple[tuple[int, ...], list[int], list[int]]:
    """Of a reduction's operand: its shape, and the dimensions that stay and go, sizes of 1 aside."""
    dims, shape = op.kw("dims"), p.types[op.refs[0].name].local(p.mesh)
    assert isinstance(dims, tuple)
    long = [d for d, size in enumerate(shape) if size != 1]
    return shape, [d for d in long if d not in dims], [d for d in long if d in dims]


def _picks_one(op: Op, p: Program) -> bool:
    """gather and scatter_add that touch one element of each row: of the last dimension, and of no other."""
    x, index, dim = p.types[op.refs[0].name].local(p.mesh), p.types[op.refs[1].name].local(p.mesh), op.kw("dim")
    if op.target == "scatter_add" and p.types[op.refs[2].name].local(p.mesh) != index:
        return False
    return len(x) > 1 and dim == len(x) - 1 and x[:-1] == index[:-1] and index[-1] == 1
