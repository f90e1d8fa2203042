"""One Triton kernel: values evaluated at points of an iteration space, each once.

The kernel is written from what it stores backwards: a value at an index asks for its operands at the indices that the op says, and is kept, so that nothing is
loaded or computed twice. Axis ``x`` runs over programs, axis ``r`` along the row that is reduced. What varies along neither, or along one only, moves out of
the loops over the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from math import prod

from deepseed.codegen.index_maps import Index, Var, flat, of
from deepseed.codegen.spaces import REDUCTIONS, Indices, closure_of, depths
from deepseed.codegen.triton_ops import TYPES, Register, computed
from deepseed.codegen.triton_places import Plan, Scope, every, word
from deepseed.codegen.triton_reductions import Reductions
from deepseed.ir.program import Op

__all__ = ["Kernel", "Plan"]


class Kernel(Reductions):
    """Writes the body of one kernel."""

    # source -----------------------------------------------------------------------------------------------------------

    def write(self) -> list[str]:
        plan, b = self.plan, self.plan.blocks
        one = self.scopes[0].lines
        wide = ".to(tl.int64)" if self._most(self.sizes["x"]) * self._most(self.sizes["r"]) * prod(v.size for v in plan.unrolled) >= 1 << 31 else ""
        if plan.partial:
            one.append(f"pid = tl.program_id(0){wide}")
            accumulators = self._accumulators()
            self._axis_r()
            self.scopes.append(Scope())
            self.level["x"] = 1
            self.scopes[1].lines.append("x = start + tl.arange(0, XB)" + ("[:, None]" if plan.rows else ""))
        else:
            accumulators = {}
            one.append(f"x = tl.program_id(0){wide} * XB + tl.arange(0, XB)" + ("[:, None]" if plan.rows else ""))
            self._axis_r()
        if self.masks["x"]:
            self.scopes[-1].lines.append(f"x_in = x < {self.sizes['x']}")
        if self.looped:
            self._rows_in_blocks(accumulators)
        else:
            early = {key: name for key, name in accumulators.items() if key[0] in plan.early}
            self._accumulate(early)
            self._side_by_side()
            self._stores(self.plan.targets)
            self._accumulate({key: name for key, name in accumulators.items() if key not in early})
        if plan.partial:
            body = self._close()
            rows = b.rows
            one.append(f"for start in range(pid * {rows}, min(pid * {rows} + {rows}, {self.sizes['x']}), XB):")
            one += [f"    {line}" for line in body]
            self.level["x"] = 0
            self._store_partials(accumulators)
        return one

    def write_many(self) -> tuple[list[str], list[str]]:
        """The body for many tensors of one kind: what comes before the loop over a chunk, and the loop's. ``n`` is the number of elements, ``first`` the chunk's."""
        self.first, self.memory = "first", dict.fromkeys(self.memory, True)
        self.sizes["x"] = 1 << 62
        accumulators = self._accumulators()
        self.scopes.append(Scope(["x = start + tl.arange(0, XB)", "x_in = x < n"]))
        self.level["x"], self.masks["x"] = 1, True
        self._stores(self.plan.targets)
        self._accumulate(accumulators)
        body = self._close()
        self.level["x"] = 0
        self._after_many(accumulators)
        return self.scopes[0].lines, body

    def _after_many(self, accumulators: Mapping[tuple[str, Indices], str]) -> None:
        """The chunk's part of each sum, stored at the chunk's number."""
        self.after: list[str] = []
        for (value, _), name in accumulators.items():
            op = self.p.producers[value]
            text = self._reduced(op, name, 0, keep=False)
            self.after.append(f"tl.store(o_{word(value)} + chunk, {text})")

    def _axis_r(self) -> None:
        if not self.plan.rows or self.looped:
            return
        start = "tl.program_id(1) * RB + " if self.columns else ""
        self.scopes[-1].lines.append(f"r = {start}tl.arange(0, RB)[None, :]")
        if self.masks["r"]:
            self.scopes[-1].lines.append(f"r_in = r < {self.sizes['r']}")

    def _close(self) -> list[str]:
        scope = self.scopes.pop()
        for key in scope.kept:
            del self.known[key]
        return scope.lines

    def _rows_in_blocks(self, accumulators: Mapping[tuple[str, Indices], str]) -> None:
        """The row does not fit: one loop for each reduction that waits for another, and one more for what waits for the last. What is stored, or added up over rows, is so in the first
        loop that has it."""
        inner = self._inner()
        online = {op.name: maximum for op in inner if (maximum := self._rescaled(op)) is not None and any(maximum is o for o in inner)}
        depth = depths(self.p, [op.name for op in inner], {name: maximum.name for name, maximum in online.items()})
        stored = [t for t in self.plan.targets if "r" in self._axes(self.plan.space.index[t])]
        along = {key: name for key, name in accumulators.items() if "r" in self._axes(self.plan.space.index[self.p.producers[key[0]].refs[0].name])}
        of_rows = {key: name for key, name in accumulators.items() if key not in along}
        for n in sorted({depth[op.name] for op in inner}):
            now = [op for op in inner if depth[op.name] == n]
            outer = self.scopes[-1]
            names: dict[tuple[str, tuple[tuple[Var, Index], ...]], str] = {}
            for op, binding in product(now, self._bindings(self.plan.space.index[now[0].name])):
                names[op.name, tuple(binding.items())] = name = self._fresh(f"{word(op.name)}_block")
                outer.lines.append(f"{name} = tl.full([XB, RB], {self._start(op)}, {TYPES[computed(op.type.dtype)]})")
            self._open_r()
            level = len(self.scopes) - 1
            for (value, bound), name in names.items():
                self.bound = dict(bound)
                if value in {maximum.name for maximum in online.values()}:
                    sums = [names[s, bound] for s, maximum in online.items() if maximum.name == value]
                    self._take_online(self.p.producers[value], name, sums, self._operands(self.p.producers[value], self.bound), level)
                elif value not in online:
                    self._take(self.p.producers[value], name, self._operands(self.p.producers[value], self.bound), at_level=level)
            ready, added = [t for t in stored if depth.get(t, 0) < n], {key: name for key, name in along.items() if depth.get(self.p.producers[key[0]].refs[0].name, 0) < n}
            self._stores(ready)
            self._accumulate(added)
            stored, along = [t for t in stored if t not in ready], {key: name for key, name in along.items() if key not in added}
            self._close_r()
            for (value, bound), name in names.items():
                op = self.p.producers[value]
                key = (value, tuple(i.put(dict(bound)) for i in self.plan.space.index[value]), ())
                text = name
                if value in online:
                    most = names[online[value].name, bound]
                    text = f"{name} * tl.exp({most} - {self.known[online[value].name, tuple(i.put(dict(bound)) for i in self.plan.space.index[online[value].name]), ()].name})"
                self.known[key] = self._emit(word(value), self._reduced(op, text, 1), computed(op.type.dtype), frozenset("x"))
                self.scopes[-1].kept.append(key)
        self._stores([t for t in self.plan.targets if "r" not in self._axes(self.plan.space.index[t])])
        self._accumulate(of_rows)
        if stored or along:
            self._open_r()
            self._stores(stored)
            self._accumulate(along)
            self._close_r()

    def _side_by_side(self) -> None:
        """What one held row is reduced to, in the order of the ops, where neither waits for the other: asked for by what is stored, the first would be followed by all that waits for it alone, which is
        held beside the row that the next one reads."""
        inner = self._inner() if self.plan.rows else []
        depth = depths(self.p, [op.name for op in inner])
        reads = {op.name: closure_of(self.p, self.memory, [op.refs[0].name]) for op in inner}
        for op in inner:
            if any(other is not op and depth[other.name] == depth[op.name] and reads[other.name] & reads[op.name] for other in inner):
                index = self.plan.space.index[op.name]
                for binding in self._bindings(index):
                    self.bound = binding
                    self.at(op.name, tuple(i.put(binding) for i in index))

    def _inner(self) -> list[Op]:
        """What reduces rows."""
        return [op for op in self.p.ops if op.target in REDUCTIONS and op.name in self.needed and self.plan.space.reduced(self.p, op) == self.plan.row]

    def _open_r(self) -> None:
        self.scopes.append(Scope())
        self.level["r"] = len(self.scopes) - 1
        self.scopes[-1].lines.append("r = first + tl.arange(0, RB)[None, :]")
        if self.masks["r"]:
            self.scopes[-1].lines.append(f"r_in = r < {self.sizes['r']}")

    def _close_r(self) -> None:
        body = self._close()
        self.scopes[-1].lines.append(f"for first in range(0, {self.sizes['r']}, RB):")
        self.scopes[-1].lines += [f"    {line}" for line in body]

    # what is stored ---------------------------------------------------------------------------------------------------

    def _stores(self, targets: Sequence[str]) -> None:
        for target in targets:
            index = self.plan.space.index[target]
            for binding in self._bindings(index):
                self.bound = binding
                self._store(target, tuple(i.put(binding) for i in index))

    def _store(self, target: str, index: Indices) -> None:
        value = self.at(target, index)
        place, axes, level = self.place(flat(index, self.p.types[target].shape))
        self._emit_store(f"o_{word(target)}", place, value, axes, max(level, value.level), self._only_once(index))

    def _emit_store(self, pointer: str, place: str, value: Register, axes: frozenset[str], level: int, conditions: Sequence[str]) -> None:
        masks = [f"{a}_in" for a in "xr" if a in axes and self.masks[a]] + list(conditions)
        if self.plan.rows and not axes:
            place += " + tl.zeros([1, 1], tl.int32)"  # a number that came out of a block is a block
        mask = f", mask={every(masks)}" if masks else ""
        level = max([level, *(self.level[a] for a in axes)])
        self.scopes[level].lines.append(f"tl.store({pointer}{'' if place == '0' else f' + {place}'}, {value.name}{mask})")

    def _only_once(self, index: Indices) -> list[str]:
        """Conditions that leave one of the points that make the same element."""
        used = frozenset[Var]().union(*(i.vars for i in index))
        out = []
        for axis, group in (("x", self.plan.x), ("r", self.plan.r)):
            missing = [v for v in group if v not in used]
            if len(missing) == len(group):
                zero = "tl.zeros([1, 1], tl.int32)" if self.plan.rows else "0"
                if axis == "x" and self._several("x"):
                    out.append(f"({self.first} == {zero})")
                if axis == "r" and self.columns:
                    out.append(f"({self.first_r} == {zero})")
            else:
                out += [f"({self.place(of(v))[0]} == 0)" for v in missing]
        return out

    # partial sums -----------------------------------------------------------------------------------------------------

    def _accumulators(self) -> dict[tuple[str, Indices], str]:
        out = {}
        for value in self.plan.partial:
            op = self.p.producers[value]
            index = self.plan.space.index[value]
            for binding in self._bindings(index):
                name = self._fresh(f"{word(value)}_part")
                out[value, tuple(i.put(binding) for i in index)] = name
                shape = ("[XB, RB]" if "r" in self._axes(index) else "[XB, 1]") if self.plan.rows else "[XB]"
                self.scopes[0].lines.append(f"{name} = tl.full({shape}, {self._start(op)}, {TYPES[computed(op.type.dtype)]})")
        return out

    def _accumulate(self, accumulators: Mapping[tuple[str, Indices], str]) -> None:
        for (value, index), name in accumulators.items():
            op = self.p.producers[value]
            binding = next(b for b in self._bindings(self.plan.space.index[value]) if tuple(i.put(b) for i in self.plan.space.index[value]) == index)
            self.bound = binding
            self._take(op, name, self._operands(op, binding), at_level=len(self.scopes) - 1, whole="r" in self._axes(index) or not self.plan.rows)

    def _store_partials(self, accumulators: Mapping[tuple[str, Indices], str]) -> None:
        for (value, index), name in accumulators.items():
            op = self.p.producers[value]
            text, axes = self._reduced(op, name, 0, keep=self.plan.rows), self._axes(index) if self.plan.rows else frozenset()
            place, _, _ = self.place(flat(index, op.type.shape))
            numel = op.type.numel
            program = "pid"
            if self.columns and "r" not in axes:
                program = f"(pid * {-(-self.sizes['r'] // self.plan.blocks.r)} + tl.program_id(1))"
            place = f"{program} * {numel} + {place}" if numel > 1 else program
            self._emit_store(f"o_{word(value)}", place, Register(text, computed(op.type.dtype)), axes, 0, ())

    def grid(self) -> tuple[str, ...]:
        """Programs along x, and along r where there are any."""
        b = self.plan.blocks
        return (self._blocks(self.sizes["x"], b.rows or b.x), *((self._blocks(self.sizes["r"], b.r),) if self.columns else ()))

    def programs(self, value: str) -> int:
        """How many parts of a partial result there are."""
        b = self.plan.blocks
        columns = -(-self.sizes["r"] // b.r) if self.columns and "r" not in self._axes(self.plan.space.index[value]) else 1
        return -(-self.sizes["x"] // b.rows) * columns

    @property
    def needed(self) -> set[str]:
        """What the kernel evaluates."""
        return closure_of(self.p, self.memory, [*self.plan.targets, *(self.p.producers[v].refs[0].name for v in self.plan.partial)])
