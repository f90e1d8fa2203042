"""The layouts chosen so far, and the integer program that adds one axis to them; the machinery of ``solve_placements``.

Which layouts are pinned on an axis, what a move costs and what work left undivided costs is the caller's: this file knows
neither ZeRO nor any axis by name.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

from deepseed.ir.layout import REPLICATED, Element, Layout, Split, valid
from deepseed.ir.program import Input, Op, Output, Program, Ref, Type, params_only
from deepseed.rules import Strategy, candidates, cuts, factor_outers, signature, strategies
from deepseed.solver.assignment import Choice, Flow, Solution, Use, solve
from deepseed.solver.classes import Node, by_part, colours
from deepseed.solver.rounding import without_split_contractions

Item = Input | Op | Output
Move = Callable[[Element, Element], float | None]
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
        self.outers = candidates(p)
        self.reports: list[AxisReport] = []
        self.stored = {(i.role, i.key): n for n, i in enumerate(p.inputs)}
        self.weights = params_only(p)
        self.updates = any(op.phase == "update" for op in p.ops)
        self.upkeep = self._upkeep_of_parameters()

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
        classes = by_part(colours(nodes), nodes, self.upkeep, heads, lambda i, r: self.p.types[results_of(self.items[i])[r]].numel > 1)
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
            weight = results_of(item)[result] in self.weights
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
            role = "param" if item.role == "grad" and not self.updates else item.role
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


def same(element: Element) -> Strategy:
    return Strategy((element,), (element,))


def results_of(item: Item) -> tuple[str, ...]:
    return item.results if isinstance(item, Op) else (item.name,) if isinstance(item, Input) else ()


def refs_of(item: Item) -> tuple[Ref, ...]:
    return item.refs if isinstance(item, Op) else (item.ref,) if isinstance(item, Output) else ()
