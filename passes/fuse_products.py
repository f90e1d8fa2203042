"""Matrix products and attention as kernels, for a back end that writes them too; helper of ``group_kernels``.

A product joins the group that works on its result element by element, if nothing reads that before the group ends: then the group does not read it from memory,
and it is not even there if nothing else reads it. Any other product, and attention, is a group of its own. A product may move down to its first reader: nothing
in between depends on it. A bias is added by what follows: a product that has one is not made one op again (``group_kernels``).

    before: %h = aten.mm(%x, %w) : f32[8, 16]
            %a = aten.add.Tensor(%h, %b) : f32[8, 16]  {kernel="y"}
            %y = aten.gelu(%a) : f32[8, 16]            {kernel="y"}
    after:  %h = aten.mm(%x, %w) : f32[8, 16]          {kernel="y"}
            %a = ..                                    {kernel="y"}
            %y = ..                                    {kernel="y"}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from deepseed.ir.fragment import groups
from deepseed.ir.kernels import BIASED, LEAST_ROWS, PRODUCT, UNMASKED
from deepseed.ir.program import FLOATS, Op, Program, Ref, after_tangents
from deepseed.passes.fuse import REACH
from deepseed.passes.fuse_kinds import CREATE, POINT, VIEW, is_product, kind_of

LEAST = 1 << 22  # multiplications of a product that a back end for CPUs writes (deepseed.codegen.cpp_products),
LEAST_DEPTH, LEAST_COLUMNS = 64, 64  # with less of either, copying operands or writing results takes the time


@dataclass(frozen=True)
class _Joined:
    """A product in front of a group: positions of it, of the reshapes through which the group reads it, and of those that others read, maybe the same."""

    mark: str
    product: int
    views: tuple[int, ...]
    behind: tuple[int, ...]
    last: int  # of the group


def fuse_products(p: Program) -> Program:
    """``p`` has its groups marked, each side by side."""
    at = {r: n for n, op in enumerate(p.ops) for r in op.results}
    marked = [(g.kernel, range(g.first, g.last)) for g in groups(p)]
    single = [(op.name, range(n, n + 1)) for n, op in enumerate(p.ops) if not op.kernel and kind_of(op, p) == POINT]
    joined: dict[int, _Joined] = {}  # by the first op of the group
    waiting = after_tangents(p)
    for mark, members in sorted([*marked, *single], key=lambda unit: unit[1].start):
        taken = {n for j in joined.values() for n in (j.product, *j.views, *j.behind)}
        found = _product(p, at, mark, members, waiting)
        if found is not None and not taken.intersection((found.product, *found.views, *found.behind)):
            joined[members.start] = found
    return _moved(p, joined)


def alone(p: Program, products: bool = False) -> Program:
    """Attention without a mask is a group of its own, for back ends that write it; with ``products`` so is a large product of float32.

    before: %o, %l = sdpa(%q, %k, %v, scale=0.5) : f32[2, 4, 8, 4], f32[2, 4, 8]
    after:  %o, %l = sdpa(%q, %k, %v, scale=0.5) : f32[2, 4, 8, 4], f32[2, 4, 8] {kernel="o"}
    """
    return replace(p, ops=tuple(replace(op, kernel=op.name) if not op.origin and (UNMASKED.get(op.target) == len(op.refs) or (products and _large(p, op))) else op for op in p.ops))


def _large(p: Program, op: Op) -> bool:
    if op.target not in (PRODUCT, BIASED) or op.kernel or op.kwargs or op.type.dtype != "f32" or op.type.host:
        return False
    *row, (rows, depth), (_, columns) = (p.types[r.name].local(p.mesh) for r in op.refs)
    return rows >= LEAST_ROWS and depth >= LEAST_DEPTH and columns >= LEAST_COLUMNS and rows * depth * columns >= LEAST and row in ([], [(columns,)])


def _moved(p: Program, joined: Mapping[int, _Joined]) -> Program:
    gone = {n for j in joined.values() for n in (j.product, *j.views, *j.behind)}
    behind = {j.last: j for j in joined.values()}
    names: dict[str, str] = {}  # of a shared reshape: the group has one of its own
    out: list[Op] = []
    for n, op in enumerate(p.ops):
        if n in joined:
            j = joined[n]
            for m in (j.product, *j.views):
                own = {} if m not in j.behind else {p.ops[m].name: f"{p.ops[m].name}.{j.mark.rpartition('.')[2]}"}
                names |= own
                out.append(_in_group(p.ops[m], j.mark, names))
                if own:
                    out[-1] = replace(out[-1], results=(own[p.ops[m].name],))
        if n not in gone:
            mark = joined[n].mark if n in joined else op.kernel
            if not mark and (is_product(p, op) or _is_attention(p, op)):
                mark = op.name
            out.append(_in_group(op, mark, names) if mark else op)
        if n in behind:
            out += [p.ops[m] for m in behind[n].behind]
            names = {}
    whole = {op.origin for op in out if op.origin}
    return replace(p, ops=tuple(out), origins=tuple((key, op) for key, op in p.origins if key in whole))


def _in_group(op: Op, mark: str, names: Mapping[str, str]) -> Op:
    return replace(op.map_refs(lambda r: Ref(names.get(r.name, r.name))), kernel=mark, origin="")


def _product(p: Program, at: Mapping[str, int], mark: str, members: range, waiting: set[str]) -> _Joined | None:
    """The last product that a group reads, element by element, and that nothing reads before the group ends."""
    first = p.ops[members.start]
    if any(kind_of(p.ops[n], p) not in (POINT, VIEW, CREATE) for n in members):
        return None
    size = max(_size(p, p.ops[n]) for n in members)
    best: _Joined | None = None
    for name in {r.name: None for n in members for r in p.ops[n].refs if at.get(r.name) not in members}:
        made = p.producers.get(name)
        while made is not None and made.target == "reshape" and not made.kernel:
            made = p.producers.get(made.refs[0].name)
        if made is None or made.kernel or not is_product(p, made) or _size(p, made) != size or members.start - at[made.name] > REACH:
            continue
        if (made.part, made.stage, made.phase, made.name in waiting) != (first.part, first.stage, first.phase, first.name in waiting):
            continue
        found = _chain(p, at, mark, made, members)
        if found is not None and (best is None or found.product > best.product):
            best = found
    return best


def _chain(p: Program, at: Mapping[str, int], mark: str, product: Op, members: range) -> _Joined | None:
    """The reshapes between; None where something reads the product before the group ends."""
    within, behind = set[int](), set[int]()

    def follow(op: Op) -> tuple[bool, bool]:
        """Whether the group reads it, and whether others do; of reshapes of it the same."""
        inner = outer = False
        for user in p.uses[op.name]:
            n = at[user.name] if isinstance(user, Op) else len(p.ops)
            if n in members:
                inner = True
            elif isinstance(user, Op) and user.target == "reshape" and not user.kernel and n < members.start:
                a, b = follow(user)
                within.update({n} if a else ())
                behind.update({n} if b else ())
                inner, outer = inner or a, outer or b
            else:
                outer = True
                early.extend([n] if n < members.stop else [])
        return inner, outer

    early: list[int] = []
    follow(product)
    return None if early else _Joined(mark, at[product.name], tuple(sorted(within)), tuple(sorted(behind)), members.stop - 1)


def _is_attention(p: Program, op: Op) -> bool:
    """On the device, of floats, and something to compute."""
    return op.target in UNMASKED and not op.type.host and op.type.dtype in FLOATS and all(0 not in t.local(p.mesh) for t in op.types)


def _size(p: Program, op: Op) -> int:
    out = 1
    for n in op.type.local(p.mesh):
        out *= n
    return out
