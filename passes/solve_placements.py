"""Choose a layout for every value and every use, one mesh axis at a time, by a minimum-cost assignment over the whole step.

Order: ``dp`` for forward and backward (the data axis: splitting the batch is free, gathering what was split is forbidden),
then the model axes (``tp``), then ``dp`` again for what is stored and updated. A ZeRO stage is nothing but the layouts that
this last step pins on parameters, gradients and optimizer state. No op, module or model is known by name here: what an op
allows comes from its rule, what a reshard costs from deepseed.cost.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

from deepseed import cost
from deepseed.ir.contract import PassError, program_pass
from deepseed.ir.layout import REPLICATED, Element, Layout, Partial, Split, valid
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Input, Op, Output, Program, Ref, Type, params_only
from deepseed.passes import placement_experts as experts
from deepseed.rules import Strategy, candidates, factor_outers, signature, strategies
from deepseed.solver.assignment import Choice, Flow, Infeasible, Solution, Use, solve
from deepseed.solver.classes import Node, by_part, colours

DATA_AXIS, EXPERT_AXIS = "dp", "ep"
Item = Input | Op | Output
Move = Callable[[Element, Element], float | None]
Moves = Callable[[Type, Item, Item], Move]  # type of a value, its producer, its user -> cost of each reshard


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


@dataclass
class AxisReport:
    """What one axis's integer program looked like."""

    axis: str
    part: str
    classes: int
    solution: Solution
    choices: Sequence[Choice] = ()  # so that a decision can be questioned: see deepseed.why
    flows: Sequence[Flow] = ()
    class_of: Sequence[int] = ()  # of each item


class Placement:
    """The layouts chosen so far, per node: of its operands (as wanted) and of its results."""

    def __init__(self, p: Program, zero: int, pinned: Mapping[tuple[str, str], Layout] | None = None) -> None:
        self.p, self.zero = p, zero
        self.pinned = pinned or {}  # where an earlier program stored an input, by role and key
        self.items: list[Item] = [*p.inputs, *p.ops, *p.outputs]
        self.where = {name: (i, r) for i, item in enumerate(self.items) for r, name in enumerate(_results(item))}
        self.refs = [_refs(item) for item in self.items]
        self.wants: list[list[Layout]] = [[REPLICATED] * len(refs) for refs in self.refs]
        self.has: list[list[Layout]] = [[REPLICATED] * len(_results(item)) for item in self.items]
        self.outers = candidates(p)
        self.reports: list[AxisReport] = []
        self.stored = {(i.role, i.key): n for n, i in enumerate(p.inputs)}
        self.weights = params_only(p)
        self.updates = any(op.phase == "update" for op in p.ops)
        self.upkeep = self._upkeep_of_parameters()
        self.tables = experts.tables(p) if EXPERT_AXIS in p.mesh.sizes else {}  # parameter of experts -> the dimension that counts them
        self.owned: experts.Marks = {}

    def run(self) -> Program:
        for axis, size in self.p.mesh.axes:
            if size > 1 and axis == DATA_AXIS:
                self._data(axis)
        for axis, size in self.p.mesh.axes:
            if size > 1 and axis == EXPERT_AXIS:
                self._experts(axis)
        for axis, size in self.p.mesh.axes:
            if size > 1 and axis not in (DATA_AXIS, EXPERT_AXIS):
                self._model(axis)
        for axis, size in self.p.mesh.axes:
            if size > 1 and axis in (DATA_AXIS, EXPERT_AXIS):
                self._storage(axis)
        ops = [(i, item) for i, item in enumerate(self.items) if isinstance(item, Op)]
        if EXPERT_AXIS in self.p.mesh.sizes:
            experts.name_keys(ops, self.where, self.wants, self.has, EXPERT_AXIS, self.p)
        return self._program()

    # one axis each --------------------------------------------------------------------------------------------------

    def _data(self, axis: str) -> None:
        """The batch is split; what was split is never gathered; parameters are used whole; gradients may stay partial."""
        n = self.p.mesh.size(axis)
        batch = self._batch_size()

        def pins(i: int, item: Item) -> Sequence[Strategy] | None:
            if isinstance(item, Input):
                split = item.role == "batch" and item.type.shape[:1] == (batch,) and batch > 1
                return [_same(Split(0, 1, batch if batch % n else 0) if split else None)]
            if isinstance(item, Op) and (item.phase == "update" or item.name in self.weights):
                return [self._whole(i)]
            if isinstance(item, Output):
                return self._shown(i, axis) if item.role == "output" else [_same(None)]
            return None

        def moves(t: Type, item: Item, user: Item) -> Move:
            if (isinstance(user, Op) and user.phase == "update") or (isinstance(user, Output) and user.role in ("grad", "param", "state", "norm")):
                return _any  # settled with the storage
            size = t.local_bytes(self.p.mesh)
            return lambda p, w: None if isinstance(p, Split) and p != w else cost.reshard(p, w, size, n)

        try:
            self._solve(axis, "data", pins, moves, self._work)
        except Infeasible:  # an op without a rule reads a batch-split value: gather it, at a price that nothing else would pay
            self._solve(axis, "data", pins, lambda t, i, u: _priced(moves(t, i, u), t.local_bytes(self.p.mesh), n), self._work)

    def _experts(self, axis: str) -> None:
        """Rows of the batch are split, and so are tables of experts, by number; a table never moves: its rows come to it."""
        n, dp = self.p.mesh.size(axis), self.p.mesh.sizes.get(DATA_AXIS, 1)
        self._check_experts(axis, dp)
        batch = self._batch_size()
        ids = experts.routed_ids(self.p)
        reached = {name for name in self.tables}
        for op in self.p.ops:
            if op.name in self.weights and any(r.name in reached for r in op.refs):
                reached.update(op.results)

        def pins(i: int, item: Item) -> Sequence[Strategy] | None:
            if isinstance(item, Input):
                rows = item.role == "batch" and item.type.shape[:1] == (batch,)
                return [_same(Split(self.tables[item.name]) if item.name in self.tables else Split(0, dp) if rows else None)]
            if isinstance(item, Output):
                return self._shown(i, axis) if item.role == "output" else [_same(None)]
            return [self._whole(i)] if item.phase == "update" or (item.name in self.weights and item.name not in reached) else None

        def moves(t: Type, item: Item, user: Item) -> Move:
            if (isinstance(user, Op) and user.phase == "update") or (isinstance(user, Output) and user.role in ("grad", "param", "state", "norm")):
                return _any  # settled with the storage
            size = t.local_bytes(self.p.mesh)
            fixed = self._name(item) in self.weights or (isinstance(item, Input) and item.role == "batch" and self._name(item) not in ids)
            return lambda p, w: None if fixed and isinstance(p, Split) and p != w else cost.reshard(p, w, size, n)

        self.owned = experts.marks(self.p)
        settled = [list(w) for w in self.wants], [list(h) for h in self.has]
        self._solve(axis, "experts", pins, moves, self._work)
        ops = [(i, item) for i, item in enumerate(self.items) if isinstance(item, Op)]
        if experts.name_keys(ops, self.where, [list(w) for w in self.wants], [list(h) for h in self.has], axis, self.p) is not None:
            self.owned = {}  # two routers whose rows look alike: no rows are owned then
            self.wants, self.has = settled
            self._solve(axis, "experts", pins, moves, self._work)

    def _check_experts(self, axis: str, dp: int) -> None:
        """Refused: a model without experts, experts or rows that the ranks do not divide."""
        n, batch = self.p.mesh.size(axis), self._batch_size()
        if batch % (dp * n):
            raise PassError(
                f"{DATA_AXIS}={dp} x {axis}={n} cannot share {batch} rows evenly ({batch} = {dp * n} * {batch // (dp * n)} + {batch % (dp * n)})\n"
                f"  fix: use a batch of {batch // (dp * n) * dp * n or dp * n} or {(batch // (dp * n) + 1) * dp * n} rows, or a plan without {axis}"
            )
        if not self.tables:
            raise PassError(f"{axis}={n} splits experts, and this model has none: no row is multiplied with a matrix that its id names\n  fix: use a plan without {axis}")
        for name, dim in self.tables.items():
            size = self.p.types[name].shape[dim]
            if size % n:
                near = [d for d in range(2, size + 1) if size % d == 0]
                raise PassError(
                    f"{axis}={n} cannot share {size} experts evenly ({size} = {n} * {size // n} + {size % n}): {name}\n"
                    f"  fix: use {' or '.join(f'{axis}={d}' for d in near)}, or a plan without {axis}"
                )

    def _model(self, axis: str) -> None:
        """Weights are split in use: no parameter is gathered over this axis, the batch is not split over it."""
        n = self.p.mesh.size(axis)

        def pins(i: int, item: Item) -> Sequence[Strategy] | None:
            if isinstance(item, Input):
                pinned = self._pinned(item, axis)
                return pinned if pinned is not None or item.role in ("param", "state") else [_same(None)]
            if isinstance(item, Output):
                return self._shown(i, axis) if item.role == "output" else [_same(None)]
            return None

        def moves(t: Type, item: Item, user: Item) -> Move:
            size = t.local_bytes(self.p.mesh)
            scalar = t.numel == 1
            if isinstance(user, Output) and user.role == "grad" and self.updates:
                return _any
            update = (isinstance(user, Op) and user.phase == "update") or isinstance(user, Output)
            weight = self._name(item) in self.weights or (isinstance(item, Input) and item.role == "state")
            data = isinstance(item, Input) and item.role == "batch"

            def move(p: Element, w: Element) -> float | None:
                if isinstance(p, Split) and p != w and (weight or (update and not scalar)):
                    return None
                if data and isinstance(w, Split):
                    return None
                return cost.reshard(p, w, size, n)

            return move

        self._solve(axis, "model", pins, moves, self._use)
        self._check_split(axis)

    def _check_split(self, axis: str) -> None:
        """A model axis that splits no weight is refused: its ranks would all compute the same."""
        n = self.p.mesh.size(axis)
        weights = [item for item in self.p.by_role("param") if len(item.type.shape) > 1]
        used = (want for refs, wants in zip(self.refs, self.wants, strict=True) for ref, want in zip(refs, wants, strict=True) if ref.name in self.weights)
        if not weights or any(isinstance(layout.on(axis), Split) for layout in used):
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
                if axis == EXPERT_AXIS and (home := self._table_of(item)) is not None:
                    return [_same(Split(home) if item.type.shape else None)]
                split = self.zero >= 3 or (self.zero >= 1 and item.role == "state")
                options = [_same(e) for e in self._stored_elements(item, axis)]
                return options if split and options else [_same(None)]
            if isinstance(item, Op):
                if item.phase == "update":
                    return [self._whole(i)] if self.zero == 0 and axis != EXPERT_AXIS else None
                return None if item.name in self.weights else self._settled(i, axis)
            return self._settled(i, axis) if item.role == "output" else [_same(None)]

        def moves(t: Type, item: Item, user: Item) -> Move:
            if isinstance(user, Output) and (user.role == "output" or (user.role == "grad" and self.updates)):
                return _any
            size = t.local_bytes(self.p.mesh)
            reduced = self.zero and t.numel > 1 and isinstance(item, Op) and item.phase != "update" and isinstance(user, Op)

            def move(p: Element, w: Element) -> float | None:
                price = cost.reshard(p, w, size, n)
                if reduced and isinstance(p, Partial) and w is None and price is not None:
                    price *= cost.WHOLE_WEIGHT  # a gradient is reduced to the shard that is updated, however small
                return price

            return move

        self._solve(axis, "storage", pins, moves, self._upkeep)

    # the integer program of one axis ----------------------------------------------------------------------------------

    def _solve(
        self,
        axis: str,
        part: str,
        pins: Callable[[int, Item], Sequence[Strategy] | None],
        moves: Moves,
        work: Callable[[int, Strategy], float],
    ) -> None:
        classes, members = self._classes(part)
        choices: list[Choice] = []
        for nodes in members:
            i = nodes[0]
            pinned = pins(i, self.items[i])
            found = list(pinned) if pinned is not None else self._strategies(i, axis)
            prices = [work(i, s) for s in found]
            choices.append(Choice(found, [price - min(prices) for price in prices], len(nodes)))  # only differences count
        flows = self._flows(classes, moves)
        solution = solve(choices, flows)
        self.reports.append(AxisReport(axis, part, len(choices), solution, choices, flows, classes))
        for i in range(len(self.items)):
            s = choices[classes[i]].strategies[solution.picks[classes[i]]]
            if len(s.operands) == len(self.wants[i]):
                self.wants[i] = [lay.with_(axis, e) for lay, e in zip(self.wants[i], s.operands, strict=True)]
            self.has[i] = [lay.with_(axis, e) for lay, e in zip(self.has[i], s.results, strict=False)]  # an output has no results
        for i, item in enumerate(self.items):  # what is stored comes back as it is stored; a gradient that is only shown, as it is
            if isinstance(item, Output):
                source = self._tied(item)
                if source is not None:
                    self.wants[i] = [self.has[source][0]]
                elif item.role == "grad":
                    j, r = self.where[item.ref.name]
                    self.wants[i] = [self.has[j][r]]

    def _classes(self, part: str) -> tuple[list[int], list[list[int]]]:
        nodes = [Node(self._label(i, part), tuple(self.where[r.name] for r in self.refs[i]), len(self.has[i])) for i in range(len(self.items))]
        heads = [i for i, item in enumerate(self.items) if isinstance(item, Input) and item.role == "param"]
        classes = by_part(colours(nodes), nodes, self.upkeep, heads, lambda i, r: self.p.types[_results(self.items[i])[r]].numel > 1)
        members: list[list[int]] = [[] for _ in range(max(classes) + 1)]
        for i, c in enumerate(classes):
            members[c].append(i)
        return classes, members

    def _upkeep_of_parameters(self) -> list[bool]:
        """Which items belong to one parameter: itself, what is computed from it alone, its gradient's last views, its update and state."""
        users: list[list[int]] = [[] for _ in self.items]
        for i, refs in enumerate(self.refs):
            for ref in refs:
                users[self.where[ref.name][0]].append(i)
        inside = [False] * len(self.items)
        for i, item in reversed(list(enumerate(self.items))):
            if isinstance(item, Op):
                last = item.phase == "backward" and len(self.refs[i]) == 1 and bool(users[i]) and all(inside[u] for u in users[i])
                inside[i] = item.phase == "update" or item.name in self.weights or last
            else:
                inside[i] = item.role in ("param", "state", "grad")
        return inside

    def _label(self, i: int, part: str) -> Hashable:
        item = self.items[i]
        settled = (tuple(self.wants[i]), tuple(self.has[i]))
        if isinstance(item, Input):
            return ("input", item.role, item.key if item.role == "batch" else "", item.type, settled, self.pinned.get((item.role, item.key)))
        if isinstance(item, Output):
            return ("output", item.role, settled, part)
        plain = item.map_refs(lambda r: None)
        kwargs = tuple((k, v) for k, v in plain.kwargs if k != "site")
        return (item.target, plain.args, kwargs, item.types, item.phase == "update", settled)

    def _flows(self, classes: list[int], moves: Moves) -> list[Flow]:
        """One flow a class of values: same producer class, same set of uses."""
        users: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for i, refs in enumerate(self.refs):
            for k, ref in enumerate(refs):
                users.setdefault(self.where[ref.name], []).append((i, k))
        flows: dict[Hashable, Flow] = {}
        for (source, result), who in users.items():
            item = self.items[source]
            weight = _results(item)[result] in self.weights
            t = self._type(source, result)
            uses: dict[tuple[int, int, str], Use] = {}
            for i, k in who:
                user = self.items[i]
                tied = self._tied(user)
                share = f"output {tied}" if isinstance(user, Output) else user.phase if weight and isinstance(user, Op) else "once"
                target = (classes[i if tied is None else tied], k, share)
                if target not in uses:
                    uses[target] = Use(*target, moves(t, item, user))
            key = (classes[source], result, frozenset((u, k, s if not s.startswith("output") else "output") for u, k, s in uses))
            if key in flows:
                flows[key].count += 1
            else:
                flows[key] = Flow(classes[source], result, tuple(uses.values()))
        return list(flows.values())

    # strategies and prices ------------------------------------------------------------------------------------------

    def _strategies(self, i: int, axis: str) -> list[Strategy]:
        item = self.items[i]
        if isinstance(item, Input):
            return [_same(None), *(_same(e) for e in self._stored_elements(item, axis))]
        assert isinstance(item, Op)
        operands = [self.p.types[r.name].laid(w) for r, w in zip(self.refs[i], self.wants[i], strict=True)]
        results = [t.laid(lay) for t, lay in zip(item.types, self.has[i], strict=True)]
        sig = signature(item, operands)
        names = [*(r.name for r in self.refs[i]), *item.results]
        outers = None if sig is None else factor_outers(sig, [self.outers[name] for name in names])
        found = strategies(sig, operands, results, axis, self.p.mesh, outers)
        if axis == EXPERT_AXIS and self.owned:
            found += experts.owned_ways(item, sig, self.owned, experts.routed_ids(self.p), operands, axis, self.p.mesh)
        return found

    def _table_of(self, item: Input) -> int | None:
        """The dimension that counts the experts in their parameter, or in a state of its shape."""
        for name, dim in self.tables.items():
            if item.name == name:
                return dim
            i = self.where[name][0]
            parameter = self.items[i]
            if isinstance(parameter, Input) and item.role == "state" and item.key.endswith(f"/{parameter.key}") and item.type.shape == parameter.type.shape:
                return dim
        return None

    def _stored_elements(self, item: Input, axis: str) -> list[Split]:
        """Where an input's dimensions may be split: at a candidate position, or behind the axes that split it already."""
        layout = self.has[self.where[item.name][0]][0]
        found = []
        for dim in range(len(item.type.shape)):
            ends = [e.outer * (e.of or self.p.mesh.size(a)) for a, e in layout.splits(dim)]
            size, n = item.type.shape[dim], self.p.mesh.size(axis)
            borders = sorted(b for b in {1, *ends, *self.outers[item.name][dim]} if size % max(b, 1) == 0)
            even = [Split(dim, outer) for outer in borders if size % (outer * n) == 0]
            pairs = {*zip(borders, borders[1:], strict=False), (borders[-1], size), (1, size)}
            uneven = [Split(dim, a, b // a) for a, b in sorted(pairs) if b > a and b % a == 0 and b // a % n]
            found += [e for e in even + uneven if valid(item.type.shape, layout.with_(axis, e), self.p.mesh)]
        return found

    def _pinned(self, item: Input, axis: str) -> Sequence[Strategy] | None:
        layout = self.pinned.get((item.role, item.key))
        return None if layout is None else [_same(layout.on(axis))]

    def _settled(self, i: int, axis: str) -> list[Strategy]:
        results = tuple(lay.on(axis) for lay in self.has[i])
        wants = results if isinstance(self.items[i], Input) else tuple(lay.on(axis) for lay in self.wants[i])
        return [Strategy(wants, results)]

    def _whole(self, i: int) -> Strategy:
        return Strategy((None,) * len(self.refs[i]), (None,) * len(self.has[i]))

    def _shown(self, i: int, axis: str) -> list[Strategy]:
        """An output for the user: replicated, or split as its producer has it; never partial."""
        source, result = self.where[self.refs[i][0].name]
        found = {s.results[result] for s in self._strategies(source, axis)}
        return [_same(None), *(_same(e) for e in sorted(e for e in found if isinstance(e, Split)))]

    def _use(self, i: int, s: Strategy) -> float:
        """``_work``, and the price of a weight left whole: that is data parallelism by another name."""
        item, price = self.items[i], self._work(i, s)
        if isinstance(item, Op) and cost.reads_weights(item, [self.p.types[r.name] for r in self.refs[i]]):
            price += sum(
                cost.WHOLE_WEIGHT * self.p.types[r.name].nbytes for r, e in zip(self.refs[i], s.operands, strict=True) if r.name in self.weights and e is None
            )
        return price

    def _work(self, i: int, s: Strategy) -> float:
        """Undivided compute, in bytes that could have been sent instead: matmuls by their flops, others a little."""
        item = self.items[i]
        if not isinstance(item, Op):
            return 0.0
        divided = any(isinstance(e, Split) for e in (*s.operands, *s.results))
        if divided:
            return 0.0
        return 1e-3 * sum(t.nbytes for t in item.types) + cost.FLOP * cost.flops(item, [self.p.types[r.name] for r in self.refs[i]])

    def _upkeep(self, i: int, s: Strategy) -> float:
        """An update that every rank repeats, a little; and the copy that a shard of an inner dimension, or of blocks, takes."""
        item = self.items[i]
        types = item.types if isinstance(item, Op) else (item.type,) if isinstance(item, Input) else ()
        price = sum(cost.LOCAL * t.nbytes * (e.dim + 0.5 * (e.outer > 1)) for e, t in zip(s.results, types, strict=False) if isinstance(e, Split))
        if isinstance(item, Op) and item.phase == "update" and not any(isinstance(e, Split) for e in s.results):
            price += 1e-3 * sum(t.nbytes for t in item.types)
        return price

    def _tied(self, item: Item) -> int | None:
        """The input that an output is the new value of; a gradient's parameter when nothing updates it."""
        if isinstance(item, Output):
            role = "param" if item.role == "grad" and not self.updates else item.role
            return self.stored.get((role, item.key))
        return None

    def _name(self, item: Item) -> str:
        return item.name if isinstance(item, Input | Op) else ""

    def _type(self, source: int, result: int) -> Type:
        item = self.items[source]
        name = _results(item)[result]
        return self.p.types[name].laid(self.has[source][result])

    def _batch_size(self) -> int:
        """The number of rows of the batch."""
        rows = [i.type.shape[0] for i in self.p.by_role("batch") if i.type.shape]
        if not rows:
            return -1
        return max(set(rows), key=rows.count)

    def _program(self) -> Program:
        layouts = {name: self.has[i][r] for name, (i, r) in self.where.items()}

        def use(i: int, refs: Sequence[Ref]) -> list[Ref]:
            return [Ref(r.name, None if w == layouts[r.name] else w) for r, w in zip(refs, self.wants[i], strict=True)]

        n = len(self.p.inputs)
        inputs = tuple(replace(item, type=item.type.laid(self.has[i][0])) for i, item in enumerate(self.p.inputs))
        ops = []
        for i, op in enumerate(self.p.ops, n):
            refs = iter(use(i, self.refs[i]))
            laid = tuple(t.laid(lay) for t, lay in zip(op.types, self.has[i], strict=True))
            ops.append(replace(op.map_refs(lambda r: next(refs)), types=laid))  # noqa: B023
        outputs = tuple(replace(o, ref=use(i, [o.ref])[0]) for i, o in enumerate(self.p.outputs, n + len(ops)))
        return replace(self.p, inputs=inputs, ops=tuple(ops), outputs=outputs)


def _same(element: Element) -> Strategy:
    return Strategy((element,), (element,))


def _any(produced: Element, wanted: Element) -> float:
    return 0.0


def _priced(move: Move, size: int, n: int) -> Move:
    """Where ``move`` forbids, a price that is only paid when there is no other way."""

    def priced(p: Element, w: Element) -> float | None:
        found = move(p, w)
        return found if found is not None else 1000.0 * (cost.reshard(p, w, size, n) or 0.0) + 1e6 if w is None else None

    return priced


def _results(item: Item) -> tuple[str, ...]:
    return item.results if isinstance(item, Op) else (item.name,) if isinstance(item, Input) else ()


def _refs(item: Item) -> tuple[Ref, ...]:
    return item.refs if isinstance(item, Op) else (item.ref,) if isinstance(item, Output) else ()
