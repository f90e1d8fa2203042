"""Choose a layout for every value and every use, one mesh axis at a time, by a minimum-cost assignment over the whole step.

Order: ``dp`` for forward and backward (the data axis: splitting the batch is free, gathering what was split is forbidden),
``ep`` (experts: rows are split further, and tables of experts by number), ``mb`` (the data axis in time), ``sp`` (the sequence: weights are used whole, activations go
where they are cheapest), then the model axes (``tp``), then ``dp``, ``ep`` and ``sp`` again for what is stored and updated. A ZeRO stage is nothing but the layouts that this last step pins on parameters,
gradients and optimizer state. No op, module or model is known by name here: what an op allows comes from its rule, what a
reshard costs from deepseed.cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod

from deepseed import cost
from deepseed.ir.contract import PassError, program_pass
from deepseed.ir.layout import Element, Layout, Partial, Split
from deepseed.ir.mesh import TIME, Mesh, whole_axis
from deepseed.ir.program import OWN_ROWS, PACKED, SHOWN, Input, Op, Output, Program, Type, shortens
from deepseed.passes import placement_experts as experts
from deepseed.passes.placement import Assignment, AxisReport, Item, Move, same
from deepseed.passes.placement_prices import dear, free, upkeep, use, work
from deepseed.passes.placement_sequence import follow, has_sequence, tokens, whole_rows, without_rows
from deepseed.passes.placement_subaxes import with_sub_axes
from deepseed.rules import Strategy, candidates
from deepseed.solver.assignment import Infeasible

__all__ = ["AxisReport", "Placement", "solve_placements"]
DATA_AXIS, EXPERT_AXIS, SEQUENCE_AXIS = "dp", "ep", "sp"


@program_pass(requires={"canonical"}, provides={"placed"})
def solve_placements(p: Program, mesh: Mesh, zero: int = 0, stored: Mapping[tuple[str, str], Layout] | None = None) -> Program:
    """Give every value a layout, and mark each use that wants another one.

    before: mesh(dp=2)
        %w : f32[32, 64] param "w"
        %x : f32[8, 32] batch "x"
        %y = aten.mm(%x, %w) : f32[8, 64] {phase="forward"}
    after, zero=3:
        %w : f32[32@dp, 64] param "w"
        %x : f32[8@dp, 32] batch "x"
        %y = aten.mm(%x, %w as [32, 64]) : f32[8@dp, 64] {phase="forward"}
    """
    return Placement(replace(p, mesh=mesh), zero, stored or {}).run()


class Placement(Assignment):
    """Which axis is placed when, what is pinned there, and what moves."""

    def __init__(self, p: Program, zero: int, pinned: Mapping[tuple[str, str], Layout] | None = None) -> None:
        if not pinned:  # else the mesh is that of the program that stored them
            p = replace(p, mesh=with_sub_axes(p, p.mesh, [axis for axis in p.mesh.names if axis not in (DATA_AXIS, EXPERT_AXIS, TIME)]))
        super().__init__(p, pinned or {})
        self.zero = zero
        self.tables = experts.tables(p) if EXPERT_AXIS in p.mesh.sizes else {}  # parameters of experts -> the dimension that counts them
        self.data = DATA_AXIS if OWN_ROWS in p.facts and p.mesh.sizes.get(DATA_AXIS, 1) > 1 else ""  # the axis along which rows are each rank's own
        self.owned: experts.Marks = {}  # how values may be owned, while ep is placed
        self.marks: experts.Marks = {}

    def run(self) -> Program:
        axes = [axis for axis, size in self.p.mesh.axes if size > 1]
        batch = {DATA_AXIS: self._data, EXPERT_AXIS: self._experts, TIME: self._time, SEQUENCE_AXIS: self._sequence}
        for i, item in enumerate(self.items):
            if isinstance(item, Input) and item.role == "pending":  # it lies as the backward's program leaves it
                self.has[i] = [self.pinned[item.role, item.key]]
        for axis in (a for a in axes if whole_axis(a) in batch):
            (batch[whole_axis(axis)] if axis != self.data else self._own)(axis)
        for axis in (a for a in axes if whole_axis(a) not in batch):
            self._model(axis)
        for axis in (a for a in axes if whole_axis(a) in batch and a != TIME):
            self._storage(axis)
        if self.data:
            self._pend(self.data)
        self._name_keys(EXPERT_AXIS, self.wants, self.has)
        return self._program()

    def _data(self, axis: str) -> None:
        """The batch is split; what was split is never gathered; parameters are used whole; gradients may stay partial."""
        n = self.p.mesh.size(axis)
        batch = self._batch_size()

        def pins(i: int, item: Item) -> Sequence[Strategy] | None:
            split = isinstance(item, Input) and item.role in ("batch", "tangent") and item.type.shape[:1] == (batch,) and batch > 1
            return self._used_whole(i, item, axis, _cut(0, batch, n) if split else None)

        def moves(t: Type, item: Item, user: Item) -> Move:
            if _settled_later(user):
                return free
            size = t.local_bytes(self.p.mesh)
            return self._no_summand(item, self._each(user, lambda p, w: None if isinstance(p, Split) and p != w else cost.reshard(p, w, size, n)))

        try:
            self._solve(axis, "data", pins, moves, partial(work, self))
        except Infeasible:  # an op without a rule reads a batch-split value: gather it, at a price that nothing else would pay
            self._solve(axis, "data", pins, lambda t, i, u: dear(moves(t, i, u), t.local_bytes(self.p.mesh), n), partial(work, self))

    def _own(self, axis: str) -> None:
        """Each rank's rows are its own, and so is what it makes of them: nothing is split, a share of a gradient is one summand."""
        for i, item in enumerate(self.items):
            if isinstance(item, Op) and item.target == "share" and item.kw("axis") == axis:
                self.has[i] = [self.has[i][0].with_(axis, Partial("sum"))]

    def _time(self, axis: str) -> None:
        """Each rank's rows come one microbatch after another; weights and the update are whole. Slicing is free, adding up is priced by
        the bytes that are held meanwhile; nothing may be gathered over time but what the user is shown."""
        n, rows = self.p.mesh.size(axis), self._batch_size()

        def pins(i: int, item: Item) -> Sequence[Strategy] | None:
            split = isinstance(item, Input) and item.role in ("batch", "tangent") and item.type.shape[:1] == (rows,)
            if isinstance(item, Output):
                return [same(None)]
            return self._used_whole(i, item, axis, Split(0, self._behind(i, 0)) if split else None)

        def moves(t: Type, item: Item, user: Item) -> Move:
            held = t.local_bytes(self.p.mesh) * (4 if t.dtype in ("f16", "bf16") else 1)  # summed as wide as the program makes it
            shown = isinstance(user, Output) and user.role in SHOWN

            def move(p: Element, w: Element) -> float | None:
                if p == w:
                    return 0.0
                if isinstance(p, Split):
                    return 0.0 if shown and w is None else None
                if isinstance(p, Partial):
                    return float(held) if w is None else None
                return cost.LOCAL * t.nbytes

            return move

        mine = [i for i in self.p.by_role("batch") if i.type.shape[:1] == (rows,)]
        for i in mine:
            self._check_rows(i, axis)
        if EXPERT_AXIS in self.p.mesh.sizes:  # what was gathered over ranks has the rows of a microbatch in as many blocks
            self.outers = candidates(self.p, known={(i.name, 0): self._behind(self.where[i.name][0], 0) for i in mine})

        def once(i: int, s: Strategy) -> float:
            """``work``; of equal ways the one that adds up latest, so that a chain of views stays in one part."""
            item = self.items[i]
            return work(self, i, s) + (1e-6 * sum(t.nbytes for t in item.types) if isinstance(item, Op) and not any((*s.operands, *s.results)) else 0.0)

        try:
            self._solve(axis, "time", pins, moves, once)
        except Infeasible:
            self._solve(axis, "time", pins, lambda t, i, u: dear(moves(t, i, u), t.local_bytes(self.p.mesh), n), once)
            self._refuse_gathers(axis)

    def _check_rows(self, i: Input, axis: str) -> None:
        """The rows of each data-parallel rank are as many for all of them, and the microbatches divide them."""
        m, rows, splits = self.p.mesh.size(axis), i.type.shape[0], self.has[self.where[i.name][0]][0].splits(0)
        ranks = prod(self.p.mesh.size(a) for a, _ in splits)
        if rows % (ranks * m) == 0:
            return
        each = f", {rows // ranks} of each of {ranks} data-parallel ranks" if rows % ranks == 0 and ranks > 1 else f", {ranks} data-parallel ranks" if ranks > 1 else ""
        near = [k for k in range(1, rows // ranks + 1) if rows % (ranks * k) == 0]
        raise PassError(
            f"mb{m}: {m} microbatches do not divide the batch: {i.key!r} has {rows} rows{each} ({rows} = {ranks * m} * {rows // (ranks * m)} + {rows % (ranks * m)})\n"
            f"  fix: {f'mb{min(near, key=lambda k: abs(k - m))}, or ' if near else ''}a batch of {max(1, round(rows / (ranks * m))) * ranks * m} rows"
        )

    def _refuse_gathers(self, axis: str) -> None:
        """Name the first value that would have to be gathered over time."""
        for item, refs, wants in zip(self.items, self.refs, self.wants, strict=True):
            for ref, want in zip(refs, wants, strict=True):
                i, r = self.where[ref.name]
                if isinstance(item, Op) and isinstance(self.has[i][r].on(axis), Split) and want.on(axis) != self.has[i][r].on(axis):
                    raise PassError(
                        f"%{item.name} = {item.target}" + (f" at {item.path}" if item.path else "") + (f" ({item.line})" if item.line else "")
                        + f" needs %{ref.name} {list(self.p.types[ref.name].shape)} of all {self.p.mesh.size(axis)} microbatches at once, which run one after another\n"
                        "  fix: a plan without mb (and pp with mb1), or a model that treats the rows of its batch apart"
                    )

    def _experts(self, axis: str) -> None:
        """Rows of the batch are split, and so are tables of experts, by number; a table never moves: its rows come to it."""
        n, dp, batch = self.p.mesh.size(axis), self.p.mesh.sizes.get(DATA_AXIS, 1), self._batch_size()
        experts.check(self.p, self.tables, axis, batch, {a: k for a, k in self.p.mesh.axes if a in (DATA_AXIS, axis)})
        inside = experts.of_tables(self.p, self.tables, self.weights)

        def pins(i: int, item: Item) -> Sequence[Strategy] | None:
            if isinstance(item, Input) and item.name in self.tables:
                return [same(Split(self.tables[item.name]))]
            rows = isinstance(item, Input) and item.role in ("batch", "tangent") and item.type.shape[:1] == (batch,)
            return None if isinstance(item, Op) and item.name in inside else self._used_whole(i, item, axis, Split(0, dp) if rows else None)

        def moves(t: Type, item: Item, user: Item) -> Move:
            if _settled_later(user):
                return free
            size = t.local_bytes(self.p.mesh)
            fixed = self._name(item) in self.weights or (isinstance(item, Input) and item.role == "batch")
            return self._no_summand(item, lambda p, w: None if fixed and isinstance(p, Split) and p != w else cost.reshard(p, w, size, n))

        self.owned = self.marks = experts.marks(self.p)
        before = [list(w) for w in self.wants], [list(h) for h in self.has]
        self._solve(axis, "experts", pins, moves, partial(work, self))
        if self._name_keys(axis, [list(w) for w in self.wants], [list(h) for h in self.has]) is not None:
            self.owned, (self.wants, self.has) = {}, before  # rows of two routers that look alike met: none are owned then
            self._solve(axis, "experts", pins, moves, partial(work, self))
        self.owned = {}
        for i, item in enumerate(self.p.inputs):  # a table's state lies where the table lies: other axes that share it do so behind this one
            if item.role == "state" and (dim := experts.home(item, self.tables, self.p)) is not None:
                self.has[i] = [self.has[i][0].with_(axis, Split(dim))]

    def _strategies(self, i: int, axis: str) -> list[Strategy]:
        """Those of the rules, and where rows may be owned, those too."""
        found, item = super()._strategies(i, axis), self.items[i]
        if isinstance(item, Op) and self.owned:
            operands = [self.p.types[r.name].laid(w) for r, w in zip(self.refs[i], self.wants[i], strict=True)]
            found += experts.owned_ways(item, self.owned, operands, axis, self.p)
        return found

    def _name_keys(self, axis: str, wants: list[list[Layout]], has: list[list[Layout]]) -> str | None:
        """Until the end owned rows have no key, so that equal layers look equal; see ``experts.name_keys``."""
        ops = [(i, item) for i, item in enumerate(self.items) if isinstance(item, Op)]
        return experts.name_keys(ops, self.where, wants, has, axis, self.p, self.marks) if axis in self.p.mesh.sizes else None

    def _sequence(self, axis: str) -> None:
        """The sequence is split; weights are used whole; rows are the data axis's, and split here only where nothing else can be."""
        n = self.p.mesh.size(axis)
        if not self.p.by_role("batch"):  # an update alone: gradients wait whole
            return
        length = tokens(self.p, whole_axis(axis), self.p.mesh)
        marks = follow(self.p, length)

        def pins(i: int, item: Item) -> Sequence[Strategy] | None:
            split = _cut(1, length, n, self._behind(i, 1)) if isinstance(item, Input) and has_sequence(item, length) else None
            pinned = self._used_whole(i, item, axis, split)
            if pinned is not None or not isinstance(item, Op):
                return pinned
            named = [marks[name] for name in (*(r.name for r in item.refs), *item.results)]
            return self._following(i, axis) or without_rows(self._strategies(i, axis), named)

        def moves(t: Type, item: Item, user: Item) -> Move:
            if _settled_later(user):
                return free
            size = t.local_bytes(self.p.mesh)
            weight = self._name(item) in self.weights and isinstance(user, Op) and cost.reads_weights(user, [self.p.types[r.name] for r in user.refs])
            fixed = weight or (isinstance(item, Input) and item.role == "batch")
            return self._no_summand(item, lambda p, w: None if fixed and isinstance(w, Split) and p != w else cost.reshard(p, w, size, n))

        self._solve(axis, "sequence", pins, moves, partial(work, self))

    def _each(self, user: Item, move: Move, settled: bool = False) -> Move:
        """What is sent once a microbatch takes as many messages; of what is asked for after the loop there is one. ``settled``: the price
        that ``move`` knows is one microbatch's, since time is placed."""
        m = self.p.mesh.sizes.get(TIME, 1)
        if m == 1 or not isinstance(user, Op) or user.phase == "update":
            return move

        def repeated(p: Element, w: Element) -> float | None:
            found = move(p, w)
            if found is None:
                return None
            return m * found if settled else found + (m - 1) * cost.LATENCY * (found >= cost.LATENCY)

        return repeated

    def _behind(self, i: int, dim: int) -> int:
        """The outer of a split behind those that dimension ``dim`` of input ``i`` has, all on one axis."""
        return prod(e.of or self.p.mesh.size(axis) for axis, e in self.has[i][0].splits(dim))

    def _no_summand(self, item: Item, move: Move) -> Move:
        """A weight that will be stored in parts comes to its uses whole, never as one rank's summand (of a bias that meets a partial sum)."""
        if self._name(item) not in self.weights or not (self.zero >= 3 or self.pinned or (self.zero and isinstance(item, Op) and shortens(item, self.p))):
            return move
        return lambda p, w: None if isinstance(w, Partial) else move(p, w)

    def _used_whole(self, i: int, item: Item, axis: str, batch: Split | None) -> list[Strategy] | None:
        """What a data axis and a sequence axis pin: an input as given, weights and the update whole, what is shown never partial."""
        if isinstance(item, Input):
            return [same(batch)]
        if isinstance(item, Output):
            return self._shown(i, axis) if item.role in SHOWN else [same(None)]
        return [self._whole(i)] if item.phase == "update" or item.name in self.weights else None

    def _model(self, axis: str) -> None:
        """Weights are split in use: no parameter is gathered over this axis, the batch is not split over it."""
        n = self.p.mesh.size(axis)
        rows = follow(self.p, 0) if PACKED in self.p.facts else {}

        def pins(i: int, item: Item) -> Sequence[Strategy] | None:
            if isinstance(item, Input):
                pinned = self._pinned(item, axis)
                return pinned if pinned is not None or item.role in ("param", "state") else [same(None)]
            if isinstance(item, Output):
                return (whole_rows(self._shown(i, axis), [rows[item.ref.name]] * 2) if rows else self._shown(i, axis)) if item.role in SHOWN else [same(None)]
            found = self._following(i, axis)
            return whole_rows(found or self._strategies(i, axis), [rows[name] for name in (*(r.name for r in item.refs), *item.results)]) if rows else found

        def moves(t: Type, item: Item, user: Item) -> Move:
            size = t.local_bytes(self.p.mesh)
            scalar = t.numel == 1
            if isinstance(user, Output) and user.role == "grad" and self.updates:
                return free
            inside = isinstance(item, Op) and item.phase == "update" and isinstance(user, Op)  # a matrix on its way through the update may be gathered
            update = (isinstance(user, Op) and user.phase == "update" and not inside) or isinstance(user, Output)
            weight = self._name(item) in self.weights or (isinstance(item, Input) and item.role == "state")
            data = isinstance(item, Input) and item.role == "batch"

            def move(p: Element, w: Element) -> float | None:
                if isinstance(p, Split) and p != w and (weight or (update and not scalar)):
                    return None
                if data and isinstance(w, Split):
                    return None
                return cost.reshard(p, w, size, n)

            return self._each(user, move, settled=True)

        self._solve(axis, "model", pins, moves, partial(use, self))
        self._check_split(axis)

    def _following(self, i: int, axis: str) -> list[Strategy] | None:
        """For the next sub-axis of an axis: what continues the split that the one before made of op ``i``, if it can be continued."""
        parts = self.p.mesh.parts(whole_axis(axis))
        if axis == parts[0]:
            return None
        before = parts[parts.index(axis) - 1]
        n = self.p.mesh.size(before)
        wanted = [Split(e.dim, e.outer * n) if isinstance(e, Split) else e for e in (lay.on(before) for lay in (*self.wants[i], *self.has[i]))]
        return [s for s in self._strategies(i, axis) if [*s.operands, *s.results] == wanted] or None

    def _check_split(self, axis: str) -> None:
        """A model axis that splits no weight is refused: its ranks would all compute the same."""
        n = self.p.mesh.size(axis)
        weights = [item for item in self.p.by_role("param") if len(item.type.shape) > 1]
        used = (want for refs, wants in zip(self.refs, self.wants, strict=True) for ref, want in zip(refs, wants, strict=True) if ref.name in self.weights)
        if not weights or any(isinstance(e := layout.on(axis), Split) and not 0 < e.of < n for layout in used):
            return

        def serves(t: int) -> bool:
            return all(any(size % t == 0 for size in w.type.shape) for w in weights)

        largest = max(weights, key=lambda w: w.type.numel)
        sizes = ", ".join(f"{size} = {n} * {size // n} + {size % n}" for size in largest.type.shape)
        top = max(size for w in weights for size in w.type.shape)
        near = [t for t in (next(filter(serves, range(n - 1, 1, -1)), 0), next(filter(serves, range(n + 1, top + 1)), 0)) if t]
        raise PassError(
            f"{axis}={n} splits no weight: of {len(weights)} weights none has a dimension that {n} ranks can share; the largest, {largest.key!r}, has {sizes}\n"
            f"  fix: use {' or '.join(f'{axis}={t}' for t in near)}" + (", which divide every weight, or " if len(near) > 1 else ", which divides every weight, or " if near else "") + f"a plan without {axis}"
        )

    def _storage(self, axis: str) -> None:
        """Where parameters and optimizer state live, and the update's own layouts; forward and backward are settled."""
        n = self.p.mesh.size(axis)

        def pins(i: int, item: Item) -> Sequence[Strategy] | None:
            if isinstance(item, Input):
                if item.role not in ("param", "state"):
                    return self._settled(i, axis)
                if (pinned := self._pinned(item, axis)) is not None:
                    return pinned
                if axis == EXPERT_AXIS and (dim := experts.home(item, self.tables, self.p)) is not None:
                    return [same(Split(dim))]
                split = self.zero >= 3 or (self.zero >= 1 and (item.role == "state" or self._shortened(item)))
                options = [same(e) for e in self._stored_elements(item, axis)]
                return options if split and options else [same(None)]
            if isinstance(item, Op):
                if item.phase == "update":
                    return [self._whole(i)] if self.zero == 0 and axis != EXPERT_AXIS else None
                if item.name in self.weights:  # below stage 3 a cast is gathered once, whatever reads it
                    return None if self.zero not in (1, 2) or axis == EXPERT_AXIS or shortens(item, self.p) else [self._whole(i)]
                return self._settled(i, axis)
            return self._settled(i, axis) if item.role in SHOWN else [same(None)]

        def moves(t: Type, item: Item, user: Item) -> Move:
            if isinstance(user, Output) and (user.role in SHOWN or user.role == "pending" or (user.role == "grad" and self.updates)):
                return free
            size = t.local_bytes(self.p.mesh)
            made = (isinstance(item, Op) and item.phase != "update") or (isinstance(item, Input) and item.role == "pending")
            reduced = self.zero and t.numel > 1 and made and isinstance(user, Op)

            def move(p: Element, w: Element) -> float | None:
                price = cost.reshard(p, w, size, n)
                if reduced and isinstance(p, Partial) and w is None and price is not None:
                    price *= cost.WHOLE_WEIGHT  # a gradient is reduced to the shard that is updated, however small
                return price

            return move

        self._solve(axis, "storage", pins, moves, partial(upkeep, self))

    def _pend(self, axis: str) -> None:
        """A gradient that waits for the update: below zero2 each rank keeps its own summand, from there on its part of the sum."""
        for i, item in enumerate(self.items):
            if not isinstance(item, Output) or item.role != "pending":
                continue
            source = self.tied[i]
            assert source is not None
            parameter = self.items[source]
            assert isinstance(parameter, Input)
            element: Element = Partial("sum")
            if self.zero >= 2:
                own = self.has[source][0].on(axis)
                parts = [own] if own is not None else self._stored_elements(parameter, axis)
                element = min(parts, key=lambda e: upkeep(self, source, same(e)), default=None)
            self.wants[i] = [self.wants[i][0].with_(axis, element)]

    def _shortened(self, item: Input) -> bool:
        """Whether forward and backward read no more of a parameter than a cast to a shorter dtype: then a rank stores its part of the parameter, and the
        cast is gathered once a step, which is half of the bytes that gathering the new parameter would be."""
        users = [u for u in self.p.uses[item.name] if isinstance(u, Op) and u.phase != "update"]
        return self.updates and item.role == "param" and bool(users) and all(shortens(u, self.p) for u in users)

    def _batch_size(self) -> int:
        """The number of rows of the batch, -1 where no entry has any."""
        rows = [i.type.shape[0] for i in self.p.by_role("batch") if i.type.shape]
        return max(set(rows), key=rows.count) if rows else -1


def _cut(dim: int, size: int, n: int, outer: int = 1) -> Split:
    """``dim`` over ``n`` ranks behind ``outer``, evenly where they divide it."""
    rest = size // outer
    return Split(dim, outer, rest if rest % n else 0)


def _settled_later(user: Item) -> bool:
    """Whether a use is placed with the storage: by the update, or what the step returns of it."""
    return user.phase == "update" if isinstance(user, Op) else isinstance(user, Output) and user.role in ("grad", "pending", "param", "state", "norm")
