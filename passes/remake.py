"""What kernels make again rather than read: helper of ``group_kernels`` for back ends that compile groups.

A pointwise value that the forward stores for the backward is made there again where that takes no more bytes: of what is narrower, as wide, or there anyway, and of rows. The kernel that made it
writes less, and no more is held in between; where microbatches run, the backward's part makes it for its own. And the sum of rows in each of which one element was put is what was put there.
"""

from __future__ import annotations

from dataclasses import replace

from deepseed.ir.kernels import COMPARE
from deepseed.ir.program import FLOATS, ITEMSIZE, Builder, Op, Program, Ref
from deepseed.ir.schedule import kind_of as kind_of_part
from deepseed.ir.schedule import loop_of
from deepseed.passes.fuse_kinds import POINT, kind_of
from deepseed.rules.strides import laid_out

LONGEST = 6  # ops that are done again for one value
FEW = 64  # times fewer elements than the value: rows, which cost nothing to keep
_VIEWS = ("reshape", "expand")


def remade(p: Program) -> Program:
    """Make in the backward what it reads of the forward and can have for as many bytes or fewer.

    before: %x32 = cast(%x) : f32[8, 64]               after: %x32 = cast(%x) : f32[8, 64]
            %y = aten.sub.Tensor(%x32, %m) : f32[8, 64]       %y = aten.sub.Tensor(%x32, %m) : f32[8, 64]
            ..                                                ..
            %e = aten.exp(%y) : f32[8, 64]                    %x32.again = cast(%x) : f32[8, 64]
                                                              %y.again = aten.sub.Tensor(%x32.again, %m) : f32[8, 64]
                                                              %e = aten.exp(%y.again) : f32[8, 64]
    """
    p = _sums_of_picks(p)
    at = {r: n for n, op in enumerate(p.ops) for r in op.results}
    last = _last_readers(p, at)
    out, parts = Builder(p), dict[str, dict[str, str]]()
    for op in p.ops:
        again = parts.setdefault(op.part, {})
        for name in dict.fromkeys(ref.name for ref in op.refs):
            if op.phase == "backward" and name not in again and (chain := _chain(p, name, op, at, last)):
                for each in (each for each in chain if each.name not in again):
                    again[each.name] = out.fresh(f"{each.name}.again")
                    anew = replace(each, results=(again[each.name],), phase=op.phase, origin="", part=op.part)
                    out.emit(anew if _compares(p, each) else _reading(anew, again))
        out.emit(_reading(op, again) if op.phase == "backward" else op)
    return out.program()


def _reading(op: Op, again: dict[str, str]) -> Op:
    return op.map_refs(lambda ref: Ref(again.get(ref.name, ref.name)))


def _last_readers(p: Program, at: dict[str, int]) -> dict[str, int]:
    """Value -> position of the last op that reads its memory, through views too."""
    last = {name: max((at[u.results[0]] if isinstance(u, Op) else len(p.ops) for u in uses), default=-1) for name, uses in p.uses.items()}
    _, views = laid_out(p)
    for op, view in zip(reversed(p.ops), reversed(views), strict=True):
        if view:
            last[op.refs[0].name] = max(last[op.refs[0].name], last[op.name])
    return last


def _chain(p: Program, name: str, reader: Op, at: dict[str, int], last: dict[str, int]) -> list[Op]:
    """The forward's ops that make a value again, in order; none where that does not pay, or cannot be done."""
    made = p.producers.get(name)
    if made is None or made.phase != "forward" or not _side_by_side(made, reader):
        return []
    if _is_compared(p, name):
        return []
    if any(not isinstance(u, Op) or (u.phase != "forward" and (u.target in _VIEWS or not kind_of(u, p))) for u in p.uses[name]):
        return []  # it is there in any case
    size, whole = _elements(p, name), _bytes(p, name)
    chain: dict[str, Op] = {}
    leaves: set[str] = set()
    todo = [name]
    while todo:
        value = todo.pop()
        op = p.producers.get(value)
        if op is not None and value not in chain and op.phase == "forward" and (op.part, op.stage) == (made.part, made.stage) and len(chain) < LONGEST and _again(p, op, size, name):
            chain[value] = op
            if _compares(p, op):
                leaves.update(ref.name for ref in op.refs)
            else:
                todo += [ref.name for ref in op.refs]
        elif value not in chain:
            leaves.add(value)
    large = [leaf for leaf in leaves if _elements(p, leaf) * FEW > size]
    extra = sum(_bytes(p, leaf) for leaf in large if leaf in at and last[leaf] < last[name])
    stored = any(u.phase == "forward" and not kind_of(u, p) for u in p.uses[name] if isinstance(u, Op))  # whoever reads it in the backward
    if not any(kind_of(op, p) == POINT for op in chain.values()) or len(large) > 1 or extra > whole or (extra == whole and stored):
        return []
    return sorted(chain.values(), key=lambda op: at[op.name])


def _compares(p: Program, op: Op) -> bool:
    """Whether an op's result jumps where floats are alike: they must be the very numbers that the forward had, and what is made again may be rounded less."""
    return op.target.removeprefix("aten.").partition(".")[0] in COMPARE and any(p.types[ref.name].dtype in FLOATS for ref in op.refs)


def _is_compared(p: Program, name: str) -> bool:
    return any(isinstance(u, Op) and u.phase == "backward" and _compares(p, u) for u in p.uses[name])


def _side_by_side(made: Op, reader: Op) -> bool:
    """Whether two ops run on one stage, and for one microbatch where they run for each."""
    if made.part == reader.part or made.stage != reader.stage:
        return made.stage == reader.stage
    return "once" not in (kind_of_part(made.part), kind_of_part(reader.part)) and loop_of(made.part) == loop_of(reader.part)


def _again(p: Program, op: Op, size: int, name: str) -> bool:
    """Whether an op is done again: pointwise or a view, of the value's size, and not itself narrower than what is wanted."""
    if _is_compared(p, op.name):
        return False
    if op.target not in _VIEWS and (kind_of(op, p) != POINT or not op.refs):
        return False
    return _elements(p, op.name) == size and (op.name == name or _bytes(p, op.name) >= _bytes(p, name))


def _elements(p: Program, name: str) -> int:
    return p.types[name].local_bytes(p.mesh) // ITEMSIZE[p.types[name].dtype]


def _bytes(p: Program, name: str) -> int:
    return p.types[name].local_bytes(p.mesh)


def _sums_of_picks(p: Program) -> Program:
    """before: %z = full(value=0.0) : f32[8, 16]                        after: %z = full(value=0.0) : f32[8, 16]
               %u = scatter_add(%z, %i, %v, dim=1) : f32[8, 16]                %u = scatter_add(%z, %i, %v, dim=1) : f32[8, 16]
               %s = sum(%u, dims=[1], keepdim=true) : f32[8, 1]                ..of %s: %v"""
    out, instead = Builder(p), dict[str, str]()
    returned = {o.ref.name for o in p.outputs}
    for op in p.ops:
        put = p.producers.get(op.refs[0].name) if op.target == "sum" and op.name not in returned else None
        if put is not None and put.target == "scatter_add" and _one_of_each_row(p, op, put):
            instead[op.name] = put.refs[2].name
        else:
            out.emit(op.map_refs(lambda ref: Ref(instead.get(ref.name, ref.name))))
    return out.program()


def _one_of_each_row(p: Program, total: Op, put: Op) -> bool:
    zeros = p.producers.get(put.refs[0].name)
    whole = put.kw("start") is None and put.kw("start.mb") is None and total.kw("keepdim") and total.kw("dims") == (put.kw("dim"),)
    return bool(whole) and zeros is not None and zeros.target == "full" and zeros.kw("value") == 0 and p.types[put.refs[2].name] == total.type and kind_of(put, p) != ""
