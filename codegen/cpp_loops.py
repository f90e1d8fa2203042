"""One nest of loops as C++: passes along a row that reduce it, what they keep for later passes, what is stored, and sums across rows in blocks of these."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import prod

from deepseed.codegen.cpp_ops import TYPES, computed, converted, squared, type_of, wrapping
from deepseed.codegen.cpp_points import Bound, Points, Register, Strides, accumulator, variables
from deepseed.codegen.index_maps import Index, Var, flat, of
from deepseed.codegen.spaces import REDUCTIONS, Indices, Space, depths
from deepseed.ir.program import ITEMSIZE, Op, Program

BLOCKS = 16  # in which sums across rows are added up
LEAST = 32  # rows of such a block, at least
MOST = 512  # and at most: one float takes no more in one after another
STRETCH = 4096  # elements of a row that are added up at a time
WORTH = 1 << 15  # elements for which a further thread pays
KEPT = 1 << 19  # bytes of rows that a function keeps for later passes, on a thread's stack
EFFORT = ("exp", "log", "tanh", "sigmoid", "silu", "gelu", "erf", "sin", "cos", "pow", "sqrt", "rsqrt", "bernoulli", "softplus")


@dataclass(frozen=True)
class Plan:
    """``row``: the variables along a row; ``targets``: what is stored; ``sums``: what is added up across rows."""

    row: frozenset[Var]
    targets: tuple[str, ...]
    sums: tuple[str, ...]


class Nest(Points):
    """Writes one nest. ``lying``: of what it stores; ``own``: of these, what is kept in the precision of registers; ``room``: bytes of rows that it may keep, less those that it does."""

    def __init__(self, p: Program, space: Space, memory: dict[str, Strides], plan: Plan, lying: dict[str, Strides], own: set[str], room: int) -> None:
        super().__init__(p, space, dict(memory))
        self.plan, self.lying, self.own, self.room = plan, lying, own, room
        self.stored = (*plan.targets, *plan.sums)
        self.x = [v for v in space.vars if v not in plan.row and not v.unrolled]
        self.r = sorted((v for v in space.vars if v in plan.row and not v.unrolled), key=self._stride, reverse=True)
        needed = self._needed()
        if len(self.r) == 1 and not plan.sums and not any(op.target in REDUCTIONS and op.name in needed and op.name not in memory for op in p.ops):
            self.x, self.r = self._by_stride()
        self.kept: dict[str, str] = {}  # made by an earlier pass -> the array along the row
        self.done: set[tuple[str, Indices]] = set()  # targets that an earlier pass stored
        self.writes: dict[str, list[tuple[str, int]]] = {}  # as ``reads``

    def _stride(self, v: Var) -> int:
        """How far apart two neighbours lie in what is stored, or read first."""
        for value in (*self.stored, *self.memory):
            if value in self.space.index:
                lying = self.lying[value] if value in self.lying else self.memory[value]
                place = Index()
                for i, s in zip(self.space.index[value], lying, strict=True):
                    place += i * s
                if (c := dict(place.terms).get(v)) is not None:
                    return abs(c)
        return 0

    def _by_stride(self) -> tuple[list[Var], list[Var]]:
        """Where nothing is reduced: as the result lies."""
        order = sorted([*self.x, *self.r], key=self._stride, reverse=True)
        return order[:-1], order[-1:]

    def over(self, read: str, value: str) -> bool:
        """Whether each element of what is read is read at one point, before ``value`` is written there."""
        writes, reads = self.writes.get(value, []), self.reads.get(read, [])
        points = prod(v.size for v in (*self.x, *self.r))
        return points == self.p.types[value].numel and len(writes) == 1 and all(place == writes[0][0] and n < writes[0][1] for place, n in reads)

    # source -----------------------------------------------------------------------------------------------------------

    def written(self) -> list[str]:
        rows, columns = prod(v.size for v in self.x), prod(v.size for v in self.r)
        if self.plan.sums:
            self._blocks(rows, columns)
        elif self.x:
            self.open(f"#pragma omp parallel for num_threads(threads) reduction(|:wrong) if (threads > 1 && {rows * columns} > {WORTH})\nfor (int64_t row = 0; row < {rows}; ++row)", *self.x)
            self._row()
            self.close()
        else:
            self._row()
        return ["{", *(f"    {line}" for line in self.scopes[0].lines), "}"]

    def _row(self) -> None:
        """All that a row's scope has: passes that reduce it, then what is stored."""
        if self.x:
            self.scopes[-1].lines += [f"const int {v.name} = {place};" for v, place in zip(self.x, _decoded("int(row)", [v.size for v in self.x]), strict=True)]
        base = len(self.scopes)
        inner = [op for op in self.p.ops if op.target in REDUCTIONS and op.name in self._needed() and self.space.reduced(self.p, op) == self.plan.row and self.plan.row]
        depth = depths(self.p, [op.name for op in inner])
        passes = [[op for op in inner if depth[op.name] == n] for n in sorted({depth[op.name] for op in inner})]
        keeping = self._keeping(passes)
        for n, now in enumerate(passes):
            self._reduce(now, keeping[n])
        self._store(self._along(False))
        along, sums = self._along(True), [(s, b) for s in self.plan.sums for b in self.of_index(self.space.index[s])]
        rows_only = [(s, b) for s, b in sums if not self._varies(self.p.producers[s].refs[0].name)]
        self._accumulate(rows_only)
        sums = [each for each in sums if each not in rows_only]
        if along or sums:
            self._open_row()
            self._store(along)
            self._accumulate(sums)
            while len(self.scopes) > base:
                self.close()

    def _open_row(self, before: str = "#pragma omp simd") -> None:
        for v in self.r:
            self.open((f"{before}\n" if v is self.r[-1] and before else "") + f"for (int {v.name} = 0; {v.name} < {v.size}; ++{v.name})", v)

    # passes -----------------------------------------------------------------------------------------------------------

    def _needed(self) -> set[str]:
        return self._reach([*self.plan.targets, *(self.p.producers[s].refs[0].name for s in self.plan.sums)], ())

    def _reach(self, values: Sequence[str], stop: Collection[str]) -> set[str]:
        """What is made for ``values``; what ``stop`` has is read."""
        found, todo = set[str](), list(values)
        while todo:
            value = todo.pop()
            if value not in found:
                found.add(value)
                if value not in self.memory and value not in stop:
                    todo += [r.name for r in self.p.producers[value].refs]
        return found

    def _keeping(self, passes: Sequence[Sequence[Op]]) -> list[list[str]]:
        """For each pass that reduces, what it keeps for later ones: what took effort, or is stored in any case."""
        roots = [[op.refs[0].name for op in now] for now in passes] + [[*self._targets(True), *(self.p.producers[s].refs[0].name for s in self.plan.sums)]]
        reduced = {op.name for now in passes for op in now}
        kept: list[list[str]] = [[] for _ in roots]
        there: dict[str, int] = {}  # value -> the first pass that makes it
        all_kept: set[str] = set()
        for n, values in enumerate(roots):
            todo, seen = list(values), set[str]()
            while todo:
                value = todo.pop()
                if value in seen or value in self.memory or value in reduced:
                    continue
                seen.add(value)
                if value in there and there[value] < n and value not in all_kept and self._worth_keeping(value):
                    kept[there[value]].append(value)
                    all_kept.add(value)
                if value not in all_kept or there.get(value, n) == n:
                    there.setdefault(value, n)
                    todo += [r.name for r in self.p.producers[value].refs]
        return kept

    def _worth_keeping(self, value: str) -> bool:
        op = self.p.producers[value]
        if value not in self.space.index or not self._varies(value) or not self.plan.row <= variables(self.space.index[value]):
            return False
        if self._read_back(value):
            return True
        size = prod(v.size for v in self.plan.row) * ITEMSIZE[computed(self.p.types[value].dtype)]
        if size > self.room or not op.target.removeprefix("aten.").partition(".")[0].startswith(EFFORT):
            return False
        self.room -= size
        return True

    def _read_back(self, value: str) -> bool:
        """Whether what is stored is all of a value."""
        dtype = self.p.types[value].dtype
        return value in self.plan.targets and (value in self.own or dtype == computed(dtype))

    def _varies(self, value: str) -> bool:
        """Whether a value differs along the row."""
        return bool(self.plan.row & variables(self.space.index[value])) if value in self.space.index else True

    def _reduce(self, now: Sequence[Op], keep: Sequence[str]) -> None:
        """One pass along the row."""
        names: list[tuple[Op, dict[Var, Index], str, str, str]] = []
        outer = len(self.scopes) - 1
        *slow, fast = self.r or [Var("one", 1)]
        stretch = fast.size > STRETCH
        local = bool(slow) or stretch or any(_part(op, accumulator(op)[0]) != accumulator(op)[0] for op in now)
        for op in now:
            kind, start = accumulator(op)
            for bound in self.of_index(self.space.index[op.name]):
                self.count += 1
                names.append((op, bound, f"s{self.count}", kind, start))
                self.scopes[-1].lines.append(f"{_total(op, kind) if local else kind} s{self.count}{'_total' * local} = {start};")
        for value in keep:
            if not self._read_back(value):
                size = prod(v.size for v in self.plan.row)
                self.scopes[-1].lines.append(f"alignas(64) {type_of(self.p.types[value].dtype)} {value}_row[{size}];")
        for v in slow:
            self.open(f"for (int {v.name} = 0; {v.name} < {v.size}; ++{v.name})", v)
        if stretch:
            self.open(f"for (int first = 0; first < {fast.size}; first += {STRETCH})")
        if local:
            self.scopes[-1].lines += [f"{_part(op, kind)} {name}_part = {start};" for op, _, name, kind, start in names]
        sums, highest = ([f"{n[2]}{'_part' if local else ''}" for n in names if (n[0].target == "amax") == most] for most in (False, True))
        words = ([f"reduction(+:{', '.join(sums)})"] if sums else []) + ([f"reduction(highest:{', '.join(highest)})"] if highest else [])
        loop = f"for (int {fast.name} = {'first' if stretch else 0}; {fast.name} < " + (f"(first + {STRETCH} < {fast.size} ? first + {STRETCH} : {fast.size})" if stretch else str(fast.size)) + f"; ++{fast.name})"
        self.open(f"#pragma omp simd {' '.join(words)}\n{loop}", fast)
        for op, bound, name, kind, _ in names:
            x = op.refs[0].name
            for values in self.bindings([*(self.space.reduced(self.p, op) or ())]):
                index = tuple(i.put({**bound, **values}) for i in self.space.index[x])
                r = self.at(x, index)
                text = converted(r.name, r.dtype, computed(op.type.dtype))
                total = f"{name}{'_part' if local else ''}"
                square = squared(text, kind) if op.target == "sum_of_squares" else text
                self.scopes[-1].lines.append(f"{total} = most({total}, {kind}({text}));" if op.target == "amax" else f"{total} += {square};")
        for value in keep:
            self._keep(value)
        self.close()
        if local:
            self.scopes[-1].lines += [f"{name}_total = most({name}_total, {name}_part);" if op.target == "amax" else f"{name}_total += {name}_part;" for op, _, name, _, _ in names]
        while len(self.scopes) - 1 > outer:
            self.close()
        if local:
            self.scopes[-1].lines += [f"const {kind} {name} = {kind}({name}_total);" for _, _, name, kind, _ in names]
        for op, bound, name, _, _ in names:
            index = tuple(i.put(bound) for i in self.space.index[op.name])
            self.keep((op.name, index, ()), Register(name, computed(op.type.dtype), outer))
        self.kept.update((value, f"{value}_row") for value in keep)

    def _keep(self, value: str) -> None:
        for bound in self.of_index(self.space.index[value]):
            index = tuple(i.put(bound) for i in self.space.index[value])
            r = self.at(value, index)
            if self._read_back(value):
                self._put(value, index, r)
            else:
                self.scopes[-1].lines.append(f"{value}_row[{self._along_row(bound)}] = {r.name};")

    def _along_row(self, bound: Bound) -> str:
        row = [v for v in self.space.vars if v in self.plan.row]
        return self.place(flat([of(v).put(bound) for v in row], [v.size for v in row]))[0]

    def made(self, value: str, index: Indices) -> Register:
        """Read again what an earlier pass has kept."""
        if value in self.kept:
            for bound in self.of_index(self.space.index[value]):
                if index == tuple(i.put(bound) for i in self.space.index[value]) and all(v in self.levels for v in self.r):
                    dtype, level = computed(self.p.types[value].dtype), len(self.scopes) - 1
                    if self._read_back(value):
                        place, _ = self._address(value, index)
                        return self.emit(f"{value}[{place}]", dtype, level)
                    return self.emit(f"{value}_row[{self._along_row(bound)}]", dtype, level)
        return super().made(value, index)

    # what is stored ---------------------------------------------------------------------------------------------------

    def _targets(self, along: bool) -> list[str]:
        return [t for t in self.plan.targets if bool(self.plan.row & variables(self.space.index[t])) == along]

    def _along(self, along: bool) -> list[tuple[str, Indices]]:
        """What is stored inside the row's loops, or outside of them."""
        found = [(t, tuple(i.put(b) for i in self.space.index[t])) for t in self._targets_of(along) for b in self.of_index(self.space.index[t])]
        return [each for each in found if each not in self.done]

    def _targets_of(self, along: bool) -> list[str]:
        inside = set(self.r)
        return [t for t in self.plan.targets if bool(inside & variables(self.space.index[t])) == along]

    def _store(self, found: Sequence[tuple[str, Indices]]) -> None:
        for target, index in found:
            self._put(target, index, self.at(target, index))

    def _address(self, value: str, index: Indices) -> tuple[str, int]:
        out = Index()
        for i, s in zip(index, self.lying[value], strict=True):
            out += i * s
        return self.place(out)

    def _put(self, value: str, index: Indices, r: Register) -> None:
        self.done.add((value, index))
        place, level = self._address(value, index)
        self.writes.setdefault(value, []).append((place, self.count))
        dtype = self.p.types[value].dtype
        cast = self.p.producers[value].target == "cast"
        text = r.name if value in self.own else self.rounded[r.name] if cast and dtype in ("bf16", "f16") and r.name in self.rounded else f"down<{TYPES[dtype]}>::of({r.name})"
        self.scopes[max(level, r.level, self._row_level(value))].lines.append(f"{value}[{place}] = {text};")

    def _row_level(self, value: str) -> int:
        """Where a target is stored: in the row's scope at least."""
        return len(self.scopes) - 1

    # sums across rows -------------------------------------------------------------------------------------------------

    def _blocks(self, rows: int, columns: int) -> None:
        block = min(max(LEAST, -(-rows // BLOCKS)), MOST)
        blocks = -(-rows // block)
        top = self.scopes[0].lines
        for s in self.plan.sums:
            kind, _ = accumulator(self.p.producers[s])
            n = self.p.types[s].numel
            part = _part(self.p.producers[s], kind)
            top.append(f"const std::unique_ptr<{part}[]> {s}_parts(new {part}[{blocks * n}]);")
        self.open(f"#pragma omp parallel for num_threads(threads) reduction(|:wrong) if (threads > 1 && {rows * columns} > {WORTH})\nfor (int64_t block = 0; block < {blocks}; ++block)")
        for s in self.plan.sums:
            (kind, start), n = accumulator(self.p.producers[s]), self.p.types[s].numel
            self.scopes[-1].lines += [f"{_part(self.p.producers[s], kind)} *__restrict {s}_part = {s}_parts.get() + block * {n};", f"for (int j = 0; j < {n}; ++j) {s}_part[j] = {start};"]
        self.open(f"for (int64_t row = block * {block}; row < (block * {block} + {block} < {rows} ? block * {block} + {block} : {rows}); ++row)", *self.x)
        self._row()
        self.close()
        self.close()
        for s in self.plan.sums:
            op, n = self.p.producers[s], self.p.types[s].numel
            kind, start = accumulator(op)
            place = " + ".join(f"{i} * {stride}" for i, stride in zip(_decoded("j", op.type.shape), self.lying[s], strict=True)) or "0"
            more = f"total = most(total, {s}_parts[b * {n} + j])" if op.target == "amax" else f"total += {s}_parts[b * {n} + j]"
            stored = f"{kind}(total)" if s in self.own else f"down<{TYPES[op.type.dtype]}>::of({kind}(total))"
            self.scopes[0].lines += [f"for (int j = 0; j < {n}; ++j) {{", f"    {_total(op, kind)} total = {start};", f"    for (int b = 0; b < {blocks}; ++b) {more};", f"    {s}[{place}] = {stored};", "}"]

    def _accumulate(self, sums: Sequence[tuple[str, Bound]]) -> None:
        for s, bound in sums:
            op = self.p.producers[s]
            x, kind = op.refs[0].name, accumulator(op)[0]
            for values in self.bindings([*(self.space.reduced(self.p, op) or ())]):
                r = self.at(x, tuple(i.put({**bound, **values}) for i in self.space.index[x]))
                text = converted(r.name, r.dtype, computed(op.type.dtype))
                place, _ = self.place(flat([i.put(bound) for i in self.space.index[s]], op.type.shape))
                target = f"{s}_part[{place}]"
                square = squared(text, kind) if op.target == "sum_of_squares" else text
                self.scopes[-1].lines.append(f"{target} = most({target}, {kind}({text}));" if op.target == "amax" else f"{target} += {square};")


def _total(op: Op, kind: str) -> str:
    """In what parts are added up, of which there may be millions."""
    return "double" if kind == "float" and op.target != "amax" else _part(op, kind)


def _part(op: Op, kind: str) -> str:
    """In what elements are added up."""
    return kind if op.target == "amax" else wrapping(kind)


def _decoded(name: str, sizes: Sequence[int]) -> list[str]:
    """The index in each dimension of the element at a row-major place."""
    out = []
    for d, size in enumerate(sizes):
        minor = prod(sizes[d + 1 :])
        text = f"({name} / {minor})" if minor > 1 else name
        out.append("0" if size == 1 else f"({text} % {size})" if d and prod(sizes[:d]) > 1 else text)
    return out
