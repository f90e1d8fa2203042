"""The layouts chosen so far, and the integer program that adds one axis to them; the machinery of ``solve_placements``.

Which layouts are pinned on an axis, what a move costs and what work left undivided costs is the caller's: this file knows
neither ZeRO nor any axis by name.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from deepseed.ir.layout import REPLICATED, Element, Layout, Split, valid
from deepseed.ir.mesh import TIME
from deepseed.ir.program import Arg, Input, Op, Output, Program, Ref, Type, params_only
from deepseed.rules import Strategy, candidates, cuts, factor_outers, signature, strategies
from deepseed.solver.assignment import Choice, Flow, Solution, Use, solve
from deepseed.solver.classes import Graph, by_part, colours, parts
from deepseed.solver.rounding import without_split_contractions

Item = Input | Op | Output
Move = Callable[[Element, Element], float | None]
Value = tuple[int, int, list[tuple[int, int, int, str]]]  # producer, result, uses: user, whose choice counts (of a tied output: the input's), operand, kind
Moves = Callable[[Type, Item, Item], Move]  # type of a value, its producer, its user -> cost of each reshard


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


class Assignment:
    """The layouts chosen so far, per node: of its operands (as wanted) and of its results."""

    def __init__(self, p: Program, pinned: Mapping[tuple[str, str], Layout]) -> None:
        self.p = p
        self.pinned = pinned  # where an earlier program stored an input, by role and key
        self.items: list[Item] = [*p.inputs, *p.ops, *p.outputs]
        self.where = {name: (i, r) for i, item in enumerate(self.items) for r, name in enumerate(results_of(item))}
        self.refs = [refs_of(item) for item in self.items]
        self.wants: list[list[Layout]] = [[REPLICATED] * len(refs) for refs in self.refs]
        self.has: list[list[Layout]] = [[REPLICATED] * len(results_of(item)) for item in self.items]
        self.outers = candidates(p, known=_blocks(p, pinned))
        self.reports: list[AxisReport] = []
        self.numbers: dict[Hashable, int] = {}  # of kinds of items
        self.stored = {(i.role, i.key): n for n, i in enumerate(p.inputs)}
        self.weights = params_only(p)
        self.updates = any(op.phase == "update" for op in p.ops)
        self.tied = [self._tied(item) for item in self.items]
        self.upkeep = self._upkeep_of_parameters()
        self.graph = Graph([tuple([self.where[r.name] for r in refs]) for refs in self.refs])
        self.parts = parts(self.graph, self.upkeep, lambda i, r: self.p.types[results_of(self.items[i])[r]].numel > 1)
        self.kinds = [self._kind(item) for item in self.items]
        self.values = self._values()

    # the integer program of one axis ----------------------------------------------------------------------------------

    def _solve(
        self,
        axis: str,
        part: str,
        pins: Callable[[int, Item], Sequence[Strategy] | None],
        moves: Moves,
        work: Callable[[int, Strategy], float],
    ) -> None:
        classes, members = self._classes()
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
        for nodes, choice, pick in zip(members, choices, solution.picks, strict=True):  # nodes of one class have the same layouts so far
            s, i = choice.strategies[pick], nodes[0]
            wants, has = self.wants[i], [lay.with_(axis, e) for lay, e in zip(self.has[i], s.results, strict=False)]  # an output has no results
            if len(s.operands) == len(wants):
                wants = [lay.with_(axis, e) for lay, e in zip(wants, s.operands, strict=True)]
            for i in nodes:
                self.wants[i], self.has[i] = list(wants), list(has)
        for i, item in enumerate(self.items):  # what is stored comes back as it is stored; a gradient that is only shown, as it is
            if isinstance(item, Output):
                source = self.tied[i]
                if source is not None:
                    self.wants[i] = [self.has[source][0]]
                elif item.role == "grad":
                    j, r = self.where[item.ref.name]
                    self.wants[i] = [self.has[j][r].with_(TIME, None)]

    def _classes(self) -> tuple[list[int], list[list[int]]]:
        labels = [(kind, tuple(wants), tuple(has)) for kind, wants, has in zip(self.kinds, self.wants, self.has, strict=True)]
        heads = [i for i, item in enumerate(self.items) if isinstance(item, Input) and item.role == "param"]
        classes = by_part(colours(self.graph, labels), self.parts, self.upkeep, heads)
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

    def _kind(self, item: Item) -> int:
        """A number for what an item is, layouts aside."""
        if isinstance(item, Input):
            label: Hashable = ("input", item.role, item.key if item.role == "batch" else "", item.type, self.pinned.get((item.role, item.key)))
        elif isinstance(item, Output):
            label = ("output", item.role)
        else:
            kwargs = tuple([(k, _without_refs(v)) for k, v in item.kwargs if k != "site"])
            label = (item.target, _without_refs(item.args), kwargs, item.types, item.phase == "update")
        return self.numbers.setdefault(label, len(self.numbers))

    def _values(self) -> list[Value]:
        """Every value that is used, with its uses; in the order of the first of them."""
        users: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for i, reads in enumerate(self.graph.operands):
            for k, value in enumerate(reads):
                users.setdefault(value, []).append((i, k))
        found: list[Value] = []
        for (source, result), who in users.items():
            weight = results_of(self.items[source])[result] in self.weights
            uses = []
            for i, k in who:
                user, tied = self.items[i], self.tied[i]
                kind = "output" if isinstance(user, Output) else user.phase if weight and isinstance(user, Op) else "once"
                uses.append((i, i if tied is None else tied, k, kind))
            found.append((source, result, uses))
        return found

    def _flows(self, classes: list[int], moves: Moves) -> list[Flow]:
        """One flow a class of values: same producer class, same set of uses."""
        flows: dict[Hashable, Flow] = {}
        for source, result, who in self.values:
            key = (classes[source], result, frozenset([(classes[j], k, kind) for _, j, k, kind in who]))
            if key in flows:
                flows[key].count += 1
                continue
            t = self._type(source, result)
            uses: dict[tuple[int, int, str], Use] = {}
            for i, j, k, kind in who:
                target = (classes[j], k, f"output {self.tied[i]}" if kind == "output" else kind)
                if target not in uses:
                    uses[target] = Use(*target, moves(t, self.items[source], self.items[i]))
            flows[key] = Flow(classes[source], result, tuple(uses.values()))
        return list(flows.values())

    # strategies ------------------------------------------------------------------------------------------------------

    def _strategies(self, i: int, axis: str) -> list[Strategy]:
        item = self.items[i]
        if isinstance(item, Input):
            return [same(None), *(same(e) for e in self._stored_elements(item, axis))]
        assert isinstance(item, Op)
        operands = [self.p.types[r.name].laid(w) for r, w in zip(self.refs[i], self.wants[i], strict=True)]
        results = [t.laid(lay) for t, lay in zip(item.types, self.has[i], strict=True)]
        sig = signature(item, operands)
        names = [*(r.name for r in self.refs[i]), *item.results]
        outers = None if sig is None else factor_outers(sig, [self.outers[name] for name in names])
        return without_split_contractions(item, strategies(sig, operands, results, axis, self.p.mesh, outers))

    def _stored_elements(self, item: Input, axis: str) -> list[Split]:
        """Where an input's dimensions may be split: at a candidate position, or behind the axes that split it already."""
        layout = self.has[self.where[item.name][0]][0]
        found = []
        for dim in range(len(item.type.shape)):
            ends = [e.outer * (e.of or self.p.mesh.size(a)) for a, e in layout.splits(dim)]
            found += [
                e for inner, of in cuts(item.type.shape[dim], self.p.mesh.size(axis), {*ends, *self.outers[item.name][dim]})
                if valid(item.type.shape, layout.with_(axis, e := Split(dim, inner, of)), self.p.mesh)
            ]  # fmt: skip
        return found

    def _pinned(self, item: Input, axis: str) -> Sequence[Strategy] | None:
        layout = self.pinned.get((item.role, item.key))
        return None if layout is None else [same(layout.on(axis))]

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
        return [same(None), *(same(e) for e in sorted(e for e in found if isinstance(e, Split)))]

    def _tied(self, item: Item) -> int | None:
        """The input that an output is the new value of; a gradient's parameter when nothing updates it."""
        if isinstance(item, Output):
            role = "param" if item.role == "pending" or (item.role == "grad" and not self.updates) else item.role
            return self.stored.get((role, item.key))
        return None

    def _name(self, item: Item) -> str:
        return item.name if isinstance(item, Input | Op) else ""

    def _type(self, source: int, result: int) -> Type:
        item = self.items[source]
        name = results_of(item)[result]
        return self.p.types[name].laid(self.has[source][result])

    def _program(self) -> Program:
        layouts = {name: self.has[i][r] for name, (i, r) in self.where.items()}
        laid = lru_cache(maxsize=None)(Type.laid)  # equal layers share their types

        def use(i: int, refs: Sequence[Ref]) -> list[Ref]:
            return [Ref(r.name, None if w == layouts[r.name] else w) for r, w in zip(refs, self.wants[i], strict=True)]

        n = len(self.p.inputs)
        inputs = tuple(replace(item, type=laid(item.type, self.has[i][0])) for i, item in enumerate(self.p.inputs))
        ops = []
        for i, op in enumerate(self.p.ops, n):
            refs = use(i, self.refs[i])
            types = tuple([laid(t, lay) for t, lay in zip(op.types, self.has[i], strict=True)])
            if any(r.want is not None for r in (*refs, *self.refs[i])):
                given = iter(refs)
                op = op.map_refs(lambda r: next(given))  # noqa: B023
            ops.append(op.typed(types))
        outputs = tuple(replace(o, ref=use(i, [o.ref])[0]) for i, o in enumerate(self.p.outputs, n + len(ops)))
        return replace(self.p, inputs=inputs, ops=tuple(ops), outputs=outputs)


def _without_refs(arg: Arg) -> Arg:
    return None if isinstance(arg, Ref) else tuple([_without_refs(a) for a in arg]) if isinstance(arg, tuple) else arg


def same(element: Element) -> Strategy:
    return Strategy((element,), (element,))


def results_of(item: Item) -> tuple[str, ...]:
    return item.results if isinstance(item, Op) else (item.name,) if isinstance(item, Input) else ()


def refs_of(item: Item) -> tuple[Ref, ...]:
    return item.refs if isinstance(item, Op) else (item.ref,) if isinstance(item, Output) else ()


def _blocks(p: Program, pinned: Mapping[tuple[str, str], Layout]) -> dict[tuple[str, int], int]:
    """By input and dimension, the blocks in which an earlier program has split it (a fused query, key and value): an update alone has no op that shows them.
    A program that has such ops would only have more ways of equal price."""
    found: dict[tuple[str, int], int] = {}
    for i in p.inputs if p.by_role("pending") else ():
        for e in (e for _, e in (pinned[i.role, i.key].elements if (i.role, i.key) in pinned else ()) if isinstance(e, Split) and e.outer > 1):
            found[i.name, e.dim] = min(e.outer, found.get((i.name, e.dim), e.outer))
    return found
