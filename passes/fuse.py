"""Which ops one kernel can compute: groups found from iteration spaces, helper of ``group_kernels``.

A group has one space: ``size`` elements, and where something is reduced along trailing dimensions the ``rows`` that are left. Its values have
an element for each point of the space or for each row, so that a row's statistics stay in registers; a kernel without rows may also read itself
through index maps (slice, pad, cat, permute). What reduces leading dimensions goes with a group that has the rows at hand, or ends one of its
own, with the pointwise op before it that nothing else reads; what is made of the sum alone, as a cast, goes with it. An op joins the groups that
make its operands where the spaces agree and no other op would have to run in between; a group that is there never moves behind a wait for a sum.
Views of what comes from outside stay outside: they cost nothing. Names of ops decide what an op is, never what it is for.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heappush
from math import prod

from deepseed.ir.program import Op, Program, after_tangents
from deepseed.passes.fuse_kinds import (
    CREATE,
    FREE,
    INDEX,
    ONE_ROW,
    PICK,
    POINT,
    REDUCE,
    WIDEST,
    across_rows,
    behind_sum,
    in_rows,
    kind_of,
)
from deepseed.rules.strides import laid_out

REACH = 64  # ops between one of a group and the next: what is made far from its use would hold what it reads until then
SPAN = 4 * REACH  # ops from the first of a group to its last


@dataclass(frozen=True)
class Space:
    """``mapped``: read through index maps, so that rows mean nothing."""

    size: int
    rows: int | None = None
    mapped: bool = False

    def with_(self, other: Space) -> Space | None:
        """The space of both, or None."""
        small, large = sorted((self, other), key=lambda s: s.size)
        mapped = self.mapped or other.mapped
        if mapped:
            return Space(large.size, None, True) if self.rows is None and other.rows is None else None
        if small.size == large.size:
            if None not in (self.rows, other.rows) and self.rows != other.rows:
                return None
            return Space(large.size, self.rows if self.rows is not None else other.rows)
        return large if small.rows is None and large.rows == small.size else None


@dataclass
class _Group:
    space: Space
    ops: list[int] = field(default_factory=list)  # positions, in order

    @property
    def last(self) -> int:
        return self.ops[-1]


def fuse(p: Program, columns: bool = False) -> Program:
    """Mark the groups, and bring their ops side by side; the mark is the name of a group's last result. ``columns``: what columns are cast to is made with the rows, as it pays where a kernel
    keeps that for many rows; a loop over rows would cast it for each."""
    barred: set[int] = set()
    while odd := (found := _Fusion(p, barred, columns)).run():
        barred |= odd
    return found.program()


class _Fusion:
    def __init__(self, p: Program, barred: set[int], columns: bool) -> None:
        self.p, self.barred, self.columns = p, barred, columns
        self.at = {r: n for n, op in enumerate(p.ops) for r in op.results}
        self.kinds = [kind_of(op, p) for op in p.ops]
        _, self.views = laid_out(p)
        self.groups: dict[int, _Group] = {}
        self.recent: list[_Group] = []  # those that can still be in the way
        self.of: dict[int, int] = {}  # position -> group
        self.readers = [sorted({self.at[u.name] for r in op.results for u in p.uses[r] if isinstance(u, Op)}) for op in p.ops]
        self.readers_of = {name: [self.at[u.name] for u in uses if isinstance(u, Op)] for name, uses in p.uses.items()}
        self.waiting = after_tangents(p)
        self.returned = {o.ref.name for o in p.outputs}
        self.before: list[tuple[int, ...]] = []  # ops that an op has to follow
        last = -1
        for n, op in enumerate(p.ops):
            found = {self.at[r.name] for r in op.refs if r.name in self.at}
            if _in_order(op):
                found |= {last} - {-1}
                last = n
            self.before.append(tuple(found))

    def run(self) -> set[int]:
        """Ops that must not read a group through an index map: a value that is no part of its space is read outside."""
        for n in range(len(self.p.ops)):
            if self.kinds[n]:
                self.recent = [g for g in self.recent if g.ops and g.last >= n - 2 * SPAN]
                self._place(n)
        self.recent = list(self.groups.values())
        for n, kind in enumerate(self.kinds):
            if kind == REDUCE and n not in self.of:
                self._ending(n)
        for key in list(self.groups) if self.columns else ():
            self._of_columns(key)
        for g in list(self.groups.values()):
            self._trim(g)
        odd = [g for g in self.groups.values() if g.space.mapped and any(self._size(n) != g.space.size and self._read_outside(n, g) for n in g.ops)]
        again = {n for g in odd for n in g.ops if self.kinds[n] == INDEX} - self.barred
        if again:
            return again
        for g in list(self.groups.values()):
            self._take_views(g)
            if g in odd or not self._pays(g):
                self._drop(g)
        return set()

    # joining ----------------------------------------------------------------------------------------------------------

    def _place(self, n: int) -> None:
        op = self.p.ops[n]
        inside = sorted({self.of[self.at[r.name]] for r in op.refs if r.name in self.at and self.at[r.name] in self.of and self._alike(n, self.at[r.name])}, key=lambda g: -self.groups[g].last)
        if not inside:
            if self._begins(n):
                self._new(n)
            return
        joined: int | None = None
        for g in inside:
            group = self.groups[g]
            own = self._space(n, {g} if joined is None else {g, joined})
            space = own.with_(group.space) if own is not None else None
            if space is not None and joined is not None:
                space = space.with_(self.groups[joined].space)
            if space is None or n - group.last > REACH or n - group.ops[0] > SPAN or self._around({*group.ops, n, *(self.groups[joined].ops if joined is not None else ())}):
                continue
            if joined is None:
                group.ops.append(n)
                self.of[n] = joined = g
            else:
                self._merge(joined, g)
            self.groups[joined].space = space
        if joined is None and self._begins(n):
            self._new(n)

    def _new(self, n: int) -> None:
        space = self._space(n, set())
        if space is not None:
            self.groups[n], self.of[n] = _Group(space, [n]), n
            self.recent.append(self.groups[n])

    def _merge(self, into: int, other: int) -> None:
        gone = self.groups.pop(other)
        self.of.update(dict.fromkeys(gone.ops, into))
        self.groups[into].ops = sorted([*self.groups[into].ops, *gone.ops])
        gone.ops = []

    def _begins(self, n: int) -> bool:
        """A view of what comes from outside is no kernel's work."""
        return not self.views[n] and not (self.kinds[n] == REDUCE and not in_rows(self.p.ops[n], self.p))

    def _space(self, n: int, groups: set[int]) -> Space | None:
        """The space that an op has, given that ``groups`` make some of its operands; None where it fits into none with them."""
        op, kind, size = self.p.ops[n], self.kinds[n], self._size(n)
        shape = self._shape(op.name)
        made = [r.name for r in op.refs if r.name in self.at and self.of.get(self.at[r.name]) in groups]
        if kind == REDUCE:
            return Space(prod(self._shape(op.refs[0].name)), size) if in_rows(op, self.p) else None
        if kind == PICK:
            return Space(prod(self._shape(op.refs[0].name)), prod(self._shape(op.refs[1].name)))
        if kind == INDEX:
            if made and n in self.barred:
                return None
            if op.target == "permute" and _same_order(op, shape):
                return Space(size)
            return Space(max([size, *(prod(self._shape(r)) for r in made)]), None, True)
        smaller = {prod(self._shape(r)) for r in made if prod(self._shape(r)) != size}
        if not smaller:
            return Space(size)
        if len(smaller) > 1 or not all(_by_rows(self._shape(r), shape) for r in made):
            return None
        (rows,) = smaller
        return Space(size, rows) if rows > 1 or size <= ONE_ROW else None

    def _alike(self, a: int, b: int) -> bool:
        """Whether two ops run at the same time and place."""
        x, y = self.p.ops[a], self.p.ops[b]
        return (x.part, x.stage, x.phase, x.name in self.waiting) == (y.part, y.stage, y.phase, y.name in self.waiting)

    def _around(self, members: set[int]) -> bool:
        """Whether an op outside would have to run after one of ``members`` and before another."""
        low = min(members)
        spans = sorted(((g.ops[0], g.last) for g in self.recent if g.ops), reverse=True)
        for first, last in spans:  # other groups run as a whole
            if first < low <= last:
                low = first
        seen: set[int] = set()
        todo = [b for n in members for b in self.before[n] if b not in members]
        while todo:
            n = todo.pop()
            if n in seen or n < low:
                continue
            each = self.groups[self.of[n]].ops if n in self.of else (n,)
            seen.update(each)
            for m in each:
                for b in self.before[m]:
                    if b in members and not (set(each) <= members):
                        return True
                    if b not in seen:
                        todo.append(b)
        return False

    # ends -------------------------------------------------------------------------------------------------------------

    def _ending(self, n: int) -> None:
        """A reduction that is not along rows: of a group's rows if there is one that has them at hand, else with the pointwise op of its operand that only it reads. And the pointwise op behind it."""
        if not self._of_rows(n):
            self._apart(n)
        behind = behind_sum(self.p, self.p.ops[n]) if n in self.of else None
        if behind is not None and self._alike(n, u := self.at[behind.name]):
            self._behind(u, self.of[n])

    def _of_rows(self, n: int) -> bool:
        """Whether a group that makes or reads the operand reduces its rows too: then one pass over them makes both."""
        op = self.p.ops[n]
        x = op.refs[0].name
        near = {self.of[m] for m in (self.at.get(x, n), *self.readers_of[x]) if m in self.of}
        for key in sorted(near, key=lambda key: -self.groups[key].last):
            g = self.groups[key]
            rows = g.space.rows or 0
            if rows < 2 or g.space.mapped or prod(self._shape(x)) != g.space.size or rows * self._size(n) != g.space.size or not across_rows(op, self.p):
                continue
            if any(u in g.ops for u in self.readers[n]):  # rows wait for the sum: it is complete before the pass begins
                continue
            if self._alike(n, g.last) and self._near(n, g) and not self._around({*g.ops, n}):
                self._take(n, key)
                return True
        return False

    def _behind(self, u: int, key: int) -> None:
        """What is made of a sum alone goes with it, unless it has others to go with."""
        g, own = self.groups[key], self.of.get(u)
        if (own is None or self.groups[own].ops == [u]) and self._near(u, g) and not self._around({*g.ops, u}):
            if own is not None:
                self.groups.pop(own).ops = []
            self._take(u, key)

    def _of_columns(self, key: int) -> None:
        """A group that casts what has one element a column, for one group with rows, goes with that: no kernel for so little."""
        small = self.groups[key]
        for_others = {self.of.get(u) for n in small.ops for u in self.readers[n]} - {key}
        other = for_others.pop() if len(for_others) == 1 else None
        if other is None or any(self.kinds[n] != POINT or len(self.p.ops[n].refs) != 1 or self.p.ops[n].name in self.returned for n in small.ops):
            return
        g, size = self.groups[other], small.space.size
        if (g.space.rows or 0) < 2 or g.space.mapped or size * (g.space.rows or 0) != g.space.size or size > WIDEST:
            return
        if self._alike(small.last, g.last) and g.last - small.ops[0] <= SPAN and not self._around({*small.ops, *g.ops}):
            self._merge(other, key)

    def _near(self, n: int, g: _Group) -> bool:
        """Whether a group that runs where ``n`` stands holds up nothing: others may wait for what it makes."""
        return abs(n - g.last) <= REACH and n - g.ops[0] <= SPAN and not any(_in_order(self.p.ops[m]) for m in range(g.last + 1, n))

    def _take(self, n: int, key: int) -> None:
        self.groups[key].ops = sorted([*self.groups[key].ops, n])
        self.of[n] = key

    def _apart(self, n: int) -> None:
        op = self.p.ops[n]
        m = self.at.get(op.refs[0].name)
        if m is None or self.kinds[m] != POINT or self.readers[m] != [n] or op.refs[0].name in self.returned or not self._alike(n, m) or n - m > REACH:
            return
        g = self.groups[self.of[m]] if m in self.of else None
        if g is not None and (self._size(m) != g.space.size or g.space.mapped):
            return
        if g is not None:
            g.ops.remove(m)
            del self.of[m]
            if not g.ops:
                self.groups = {k: v for k, v in self.groups.items() if v is not g}
        if not self._around({m, n}):
            self.groups[n] = _Group(Space(self._size(m)), [m, n])
            self.recent.append(self.groups[n])
            self.of |= {m: n, n: n}

    # finishing --------------------------------------------------------------------------------------------------------

    def _trim(self, g: _Group) -> None:
        """Views that nothing inside reads are free outside."""
        while loose := [n for n in g.ops if self.views[n] and not any(self.of.get(u) == self.of[n] for u in self.readers[n])]:
            for n in loose:
                g.ops.remove(n)
                del self.of[n]
        if not g.ops:
            self.groups = {k: v for k, v in self.groups.items() if v is not g}

    def _take_views(self, g: _Group) -> None:
        """Several views of one value, or one beside the value itself, are read as that value: once."""
        read = {r.name for n in g.ops for r in self.p.ops[n].refs if self.at.get(r.name) not in g.ops}
        views: dict[str, list[int]] = {}
        for name in sorted(read):
            n = self.at.get(name)
            if n is None or n in self.of or not self.views[n] or self.p.ops[n].target not in FREE or not self._alike(n, g.ops[0]) or name in self.returned:
                continue
            if all(self.of.get(u) == self.of[g.ops[0]] for u in self.readers[n]):
                views.setdefault(self.p.ops[n].refs[0].name, []).append(n)
        key = self.of[g.ops[0]]
        for base, found in views.items():
            if base in read or len(found) > 1:
                g.ops = sorted([*g.ops, *found])
                self.of.update(dict.fromkeys(found, key))

    def _pays(self, g: _Group) -> bool:
        """One op alone is a kernel already; and a kernel reads something, on the device that it runs on."""
        reads = any(self.at.get(r.name) not in g.ops for n in g.ops for r in self.p.ops[n].refs)
        return reads and 0 not in self._shape(self.p.ops[g.last].name) and sum(not self.views[n] and self.kinds[n] != CREATE for n in g.ops) > 1

    def _drop(self, g: _Group) -> None:
        key = self.of[g.ops[0]]
        for n in g.ops:
            del self.of[n]
        del self.groups[key]

    def _read_outside(self, n: int, g: _Group) -> bool:
        return self.p.ops[n].name in self.returned or any(u not in g.ops for u in self.readers[n])

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.p.types[name].local(self.p.mesh)

    def _size(self, n: int) -> int:
        return prod(self._shape(self.p.ops[n].name))

    # order ------------------------------------------------------------------------------------------------------------

    def program(self) -> Program:
        while isinstance(order := self._order(), set):
            for key in order:
                self._drop(self.groups[key])
        ops = list(self.p.ops)
        for g in self.groups.values():
            for n in g.ops:
                ops[n] = replace(ops[n], kernel=self.p.ops[g.last].name, origin="")
        whole = {op.origin for op in ops if op.origin}
        origins = tuple((key, op) for key, op in self.p.origins if key in whole)
        return replace(self.p, ops=tuple(ops[n] for n in order), origins=origins)

    def _order(self) -> list[int] | set[int]:
        """Groups side by side, everything else where it was, or behind the group that it reads; or the groups that wait for each other."""
        unit = [self.groups[self.of[n]].last if n in self.of else n for n in range(len(self.p.ops))]
        members: dict[int, list[int]] = {}
        for n, u in enumerate(unit):
            members.setdefault(u, []).append(n)
        waits = {u: {unit[b] for n in ns for b in self.before[n]} - {u} for u, ns in members.items()}
        after: dict[int, list[int]] = {}
        for u, found in waits.items():
            for b in found:
                after.setdefault(b, []).append(u)
        missing = {u: len(found) for u, found in waits.items()}
        ready = [u for u, n in missing.items() if n == 0]
        heapify(ready)
        out: list[int] = []
        while ready:
            u = heappop(ready)
            out += members[u]
            for v in after.get(u, ()):
                missing[v] -= 1
                if missing[v] == 0:
                    heappush(ready, v)
        return out if len(out) == len(unit) else {self.of[u] for u, n in missing.items() if n and u in self.of}


def _in_order(op: Op) -> bool:
    """What ranks must do in one order, or what writes into what there is."""
    return op.target.endswith(".start") or op.target.startswith("optim.") or op.target in ("wait", "send", "transfer", "accumulate", "collect", "aten.native_batch_norm")


def _by_rows(small: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether broadcasting repeats a value along trailing dimensions only."""
    aligned = (1,) * (len(shape) - len(small)) + small
    if aligned == shape or prod(small) == prod(shape):
        return True
    whole = [d for d, size in enumerate(shape) if aligned[d] == size and size != 1]
    again = [d for d, size in enumerate(shape) if aligned[d] != size]
    return not whole or max(whole) < min(again)


def _same_order(op: Op, shape: tuple[int, ...]) -> bool:
    """A permutation that moves dimensions of size 1 only."""
    dims = op.kw("dims")
    assert isinstance(dims, tuple)
    moved = [d for d, size in zip(dims, shape, strict=True) if size != 1]
    return moved == sorted(moved)  # type: ignore[type-var]
