"""What one Triton kernel of a fragment makes: its iteration space, the axis along which it reduces rows, what it stores, and which sums it leaves parts of."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from math import prod

from deepseed.codegen.block_sizes import PROGRAMS, Blocks, block_sizes
from deepseed.codegen.expressions import CodegenError
from deepseed.codegen.index_maps import Var, covers
from deepseed.codegen.pointwise import computed
from deepseed.codegen.spaces import REDUCTIONS, VIEWS, Space, adds_parts, depths, ops_of, read_along
from deepseed.codegen.triton_kernel import Plan
from deepseed.ir.program import Op, Program

_IN_PART = ("slice", "unslice", "pad", "cat", "gather", "embedding")
ALONE = SHORT = 1 << 14  # elements that one program reduces by itself, and of a buffer that every program may add up for itself


class Plans:
    """``memory``: the values that lie in memory, and whether in row-major order for certain; ``chosen``: blocks of kernels, by name, that are not the model's."""

    p: Program
    memory: dict[str, bool]
    chosen: Mapping[str, Blocks]
    kernels: list[str]

    def _closure(self, targets: Collection[str], tied: bool = False) -> set[str]:
        """What a kernel that makes ``targets`` evaluates, up to what lies in memory; ``tied``: up to what is read in part."""
        found: set[str] = set()
        todo = list(targets)
        while todo:
            value = todo.pop()
            if value in found:
                continue
            found.add(value)
            op = self.p.producers.get(value)
            if op is not None and value not in self.memory and not self._short(op) and not (tied and op.target in _IN_PART):
                todo += [r.name for r in op.refs]
        return found

    def _short(self, op: Op) -> bool:
        """A sum over a short buffer: any program can make it."""
        x = op.refs[0].name if op.refs else ""
        return op.target in REDUCTIONS and op.type.numel == 1 and self.memory.get(x, False) and self.p.types[x].numel <= SHORT

    def _scalars_first(self, pending: Sequence[str]) -> list[str]:
        """Numbers that follow from complete sums, where larger values wait for them: made once, not by each program. Sums of little come first themselves, so that what waits for
        them is made with all else that reads the same rows."""
        closure = self._closure(pending)
        ops = ops_of(self.p, closure)
        if little := [op.name for op in ops if self._of_little(op) and self._waits(op, ops)]:
            return little
        shorts = {op.name for op in ops if self._short(op) and op.name not in self.memory}
        after = set(shorts)
        for op in ops:
            if op.type.numel == 1 and any(r.name in after for r in op.refs):
                after.add(op.name)
        wanted = [op.name for op in ops if op.name in after and op.name not in self.memory and any(isinstance(u, Op) and u.name in closure and u.type.numel > 1 for u in self.p.uses[op.name])]
        if not wanted:
            return []
        return wanted + [t for t in pending if t in after and t not in wanted]

    def _of_little(self, op: Op) -> bool:
        """A complete sum that is not made yet, and that one program can make."""
        if op.target not in REDUCTIONS or op.type.numel > 1 or op.name in self.memory or self._short(op):
            return False
        return max(self.p.types[v].numel for v in self._closure([op.name])) <= SHORT

    @staticmethod
    def _waits(op: Op, ops: Sequence[Op]) -> bool:
        """Whether something larger than one program adds up is made of it."""
        after = set(op.results)
        for user in ops:
            if any(r.name in after for r in user.refs):
                after.update(user.results)
                if user.type.numel > SHORT:
                    return True
        return False

    def _root(self, closure: Collection[str], targets: Sequence[str]) -> str:
        """The value whose elements are the points of the space: the largest one, a target if there is one."""
        each = [self._closure([t], tied=True) for t in targets]
        mine = max(each, key=lambda found: max(self.p.types[v].numel for v in found))
        order = [*targets, *(op.refs[0].name for op in self.p.ops if op.target in REDUCTIONS and op.name in closure and not self._short(op)), *(r for op in self.p.ops for r in op.results), *(i.name for i in self.p.inputs)]
        candidates = [v for v in order if v in mine]
        return max(candidates, key=lambda v: self.p.types[v].numel)

    def _plan(self, space: Space, closure: Collection[str], targets: Sequence[str]) -> tuple[Plan, list[str]]:
        """What the kernel makes of ``targets`` now, and the sums that are left for others."""
        ops = [op for op in ops_of(self.p, closure) if op.name not in self.memory]
        reductions = {op.name: space.reduced(self.p, op) for op in ops if op.target in REDUCTIONS and not self._short(op)}
        row, rows = self._row(space, ops, {name: s for name, s in reductions.items() if s is not None and s <= set(space.vars) and s})
        x = frozenset(space.vars) - row
        partial: list[str] = []
        blocked: set[str] = set()
        along: set[str] = set()  # what a reduced row is needed for
        wide = frozenset(v for v in space.vars)
        for op in ops:
            over = reductions.get(op.name, row)
            if any(r.name in blocked or (op.target in _IN_PART and r.name in along) for r in op.refs):
                blocked.update(op.results)
            elif op.name in reductions and over != frozenset() and (over != row or not rows or op.name not in space.index):
                blocked.add(op.name)
                if over is not None and over in (x, wide) and x and op.name in space.index:
                    partial.append(op.name)
            elif (op.name in reductions and over) or any(r.name in along for r in op.refs):
                along.update(op.results)
        now = [t for t in targets if t not in blocked and t in space.index and covers(space.index[t], self.p.types[t].shape)]
        now += [v for v in self._shared(ops, blocked, partial, space, along) if v not in now]
        sizes = prod(v.size for v in space.vars if v not in row and not v.unrolled), prod(v.size for v in row if not v.unrolled)
        reduced = rows and bool(row) and any(s == row for s in reductions.values())
        early = frozenset(f for f in partial if not any(reductions.get(v) == row for v in self._closure([f]) if v != f))
        live = self._live(space, ops_of(self.p, self._closure([*now, *(f for f in partial if f not in early)])), row, partial) * prod(v.size for v in space.vars if v.unrolled)
        blocks = block_sizes(*sizes, live, rows=rows, reduced=reduced, partial=bool(partial))
        blocks = self.chosen.get(f"kernel_{len(self.kernels)}", blocks)
        wide_sums = [f for f in partial if reductions[f] == x and any(i.vars & row for i in space.index[self.p.producers[f].refs[0].name])]
        if reduced and blocks.r < sizes[1] and wide_sums:  # a kernel of their own behind this one, over columns
            partial = [f for f in partial if f not in wide_sums]
            now += [v for v in self._statistics(wide_sums, now, {f for f, over in reductions.items() if over == row}) if v not in now]
        if not partial:
            blocks = replace(blocks, rows=0)
        return Plan(space, row, rows, tuple(now), tuple(partial), blocks, early), [t for t in targets if t not in now]

    def _shared(self, ops: Sequence[Op], blocked: Collection[str], partial: Collection[str], space: Space, along: Collection[str]) -> list[str]:
        """What later kernels read along other variables, or in part: stored where rows would have to be reduced again to make it."""
        out = []
        for op in ops:
            unfit = op.target in REDUCTIONS and op.name in blocked and op.name not in partial
            if unfit or op.target in _IN_PART:
                out += [r.name for r in op.refs if r.name in along and r.name not in blocked and r.name in space.index and covers(space.index[r.name], self.p.types[r.name].shape)]
        return list(dict.fromkeys(out))

    def _statistics(self, sums: Sequence[str], now: Collection[str], rows: Collection[str]) -> list[str]:
        """What rows are reduced to for sums over them: stored, so that the sums' kernel reduces no row."""
        found: dict[str, None] = {}
        todo = [self.p.producers[f].refs[0].name for f in sums]
        while todo:
            value = todo.pop()
            if value in rows:
                found[value] = None
            elif value not in self.memory and value not in now:
                todo += [r.name for r in self.p.producers[value].refs]
        return list(found)

    def _row(self, space: Space, ops: Sequence[Op], reductions: dict[str, frozenset[Var]]) -> tuple[frozenset[Var], bool]:
        """The variables along which programs hold rows, and whether blocks have two axes."""
        if not space.vars:
            return frozenset(), False
        everything, last = frozenset(space.vars), space.vars[-1]
        for name, over in reductions.items():  # parts become complete before anything is made of them
            if adds_parts(self.p.producers[name]) and over != everything:
                return over, True
        for name, over in reductions.items():
            if over != everything and (last in over or read_along(space, name, over, ops)):
                return over, True
        for name, over in reductions.items():
            if over == everything and (read_along(space, name, over, ops) or prod(v.size for v in over) <= ALONE):
                return over, True
        columns = [over for over in reductions.values() if over != everything and space.vars[0] in over]
        if columns:
            short = prod(v.size for v in columns[0]) <= 2 * PROGRAMS
            return columns[0] if short else everything - columns[0], True
        if reductions and not any(over == everything for over in reductions.values()):
            return next(iter(reductions.values())), True
        if not reductions:
            return self._broadcast_row(space, ops)
        return frozenset(), False

    def _broadcast_row(self, space: Space, ops: Sequence[Op]) -> tuple[frozenset[Var], bool]:
        """Pointwise ops: two axes where operands vary along a part of the variables only, so that a block reads these once."""
        size = prod(v.size for v in space.vars)
        for name in self.memory:
            index = space.index.get(name)
            if index is None or self.p.types[name].numel in (1, size):
                continue
            used = frozenset[Var]().union(*(i.vars for i in index))
            for n in range(1, len(space.vars)):
                if used in (frozenset(space.vars[n:]), frozenset(space.vars[:n])):
                    return frozenset(space.vars[n:]), True
        return frozenset(), False

    def _live(self, space: Space, ops: Sequence[Op], row: frozenset[Var], partial: Sequence[str]) -> int:
        """Values of a row's length that are held at once, in 32 bits, at least one: of ``ops`` those that a reduction along the row lies between, sums over rows, and what is read once for
        all rows. What is made and used between two reductions is held an element at a time."""
        long = {v for v, index in space.index.items() if any(i.vars & row for i in index)}
        along = [op.name for op in ops if op.target in REDUCTIONS and op.refs[0].name in long and op.name not in long]
        rank = {name: n for n, name in enumerate(sorted(along, key=depths(self.p, along).__getitem__))}
        same: dict[str, str] = {}  # what a register of another value is
        for op in ops:
            if op.target in (*VIEWS, "expand") or (op.target == "cast" and computed(op.type.dtype) == computed(self.p.types[op.refs[0].name].dtype)):
                same[op.name] = same.get(op.refs[0].name, op.refs[0].name)
        when: dict[str, list[int]] = {}  # the reductions for which a value is used first and last, as they are made one after another
        for op in reversed(ops):
            needed = rank.get(op.name, min([n for r in op.results for n in when.get(r, ())], default=len(rank)))
            if op.name not in self.memory and op.name not in same:
                for r in op.refs:
                    when.setdefault(same.get(r.name, r.name), []).append(needed)
        held = [[v for v in long if v in when and min(when[v]) <= n < max(when[v])] for n in range(len(rank))]
        once = [v for v in long if v in self.memory and not any(i.vars - row for i in space.index[v])] if partial else []
        return max([1, *(sum(2 if self.p.types[v].dtype in ("f64", "i64") else 1 for v in (*each, *once, *(f for f in partial if f in long))) for each in held or [[]])])

    def _first_blocked(self, space: Space, closure: Collection[str], plan: Plan) -> str:
        """A reduction in the way that waits for no other: a target of its own."""
        for op in ops_of(self.p, closure):
            if op.target in REDUCTIONS and op.name not in self.memory and not self._short(op):
                inside = self._closure([op.refs[0].name])
                if not any(o.target in REDUCTIONS and o.name not in self.memory and not self._short(o) and o.name not in space.index for o in ops_of(self.p, inside)):
                    if len(closure) == len(self._closure([op.name])):
                        break
                    return op.name
        op = next((op for op in ops_of(self.p, closure) if op.target in REDUCTIONS), self.p.ops[-1])
        raise CodegenError(f"%{op.name} = {op.target}: no iteration space in which one kernel makes it\n  fix: none is needed, the group runs as Python")
