"""Where new parameters and state may be written into the stored tensors: after the last reader of the old value.

A stored tensor is *donated* when the program returns a new value for it. A view of it (reshape, permute, slice …, or a
collective that is under way) counts as a reader until its own last use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

from deepseed.ir.collective import MEMORIES, step
from deepseed.ir.program import Op, Output, Program

STORED = ("param", "buffer", "state")
KEPT = ("send", "collect")  # ops whose operand's memory is read after them
_VIEWS = {"transfer", "reshape", "permute", "expand", "slice", "cast", "shard", "summand", "pad", "cat", "sum", "amax"}
_ATEN_VIEWS = {
    "alias", "as_strided", "contiguous", "detach", "diagonal", "expand", "imag", "lift_fresh", "movedim", "narrow", "permute", "real",
    "reshape", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "to", "transpose", "unbind", "unfold", "unsqueeze", "view",
    "view_as_complex", "view_as_real", "_reshape_alias", "_unsafe_view", "_conj", "unsafe_split", "expand_as", "view_as",
}  # fmt: skip


def may_alias(op: Op, p: Program) -> bool:
    """Whether a result can share memory with an operand (or memory that is still read, for a started collective)."""
    if op.target.endswith(".start"):
        return True
    if op.target == "wait":
        start = p.producers[op.refs[0].name]
        if start.target in ("receive.start", *MEMORIES):
            return False
        return p.mesh.size(str(start.kw("axis"))) == 1
    if op.target.startswith("aten."):
        return op.target.split(".")[1] in _ATEN_VIEWS
    return op.target in _VIEWS


@dataclass(frozen=True)
class Donation:
    program: Program

    @cached_property
    def stored(self) -> Mapping[str, Output]:
        """Donated input -> the output that replaces it."""
        names = {(i.role, i.key): i.name for i in self.program.inputs}
        return {names[o.role, o.key]: o for o in self.program.outputs if o.role in STORED}

    @cached_property
    def returned(self) -> tuple[Output, ...]:
        """The outputs that the step returns: all but new stored values."""
        return tuple(o for o in self.program.outputs if o.role not in STORED)

    @cached_property
    def roots(self) -> Mapping[str, frozenset[str]]:
        """The donated inputs whose memory a value may share."""
        out = {i.name: frozenset({i.name} if i.name in self.stored else ()) for i in self.program.inputs}
        for op in self.program.ops:
            shared = frozenset().union(*(out[r.name] for r in op.refs)) if may_alias(op, self.program) else frozenset()
            out.update((result, shared) for result in op.results)
        return out

    def memory(self, value: str) -> frozenset[str]:
        """The values whose memory ``value`` may share, through views: those that the views were made of."""
        op = self.program.producers.get(value)
        if op is None or not op.refs or not may_alias(op, self.program):
            return frozenset({value})
        return frozenset().union(*(self.memory(r.name) for r in op.refs))

    @cached_property
    def last_use(self) -> Mapping[str, int]:
        """Value -> position of the last op that reads its memory, through any view; behind all ops where it is returned, sent, or kept for the user: a message may leave
        later than the ops behind it run."""
        out: dict[str, int] = {}
        end = len(self.program.ops)
        for n, op in enumerate(self.program.ops):
            for ref in op.refs:
                for root in self.memory(ref.name):
                    out[root] = max(end if op.target in KEPT else n, out.get(root, n))
        for o in self.program.outputs:
            out.update((root, end) for root in self.memory(o.ref.name))
        return out

    @cached_property
    def last_reader(self) -> Mapping[str, int]:
        """Donated input -> position of the last op that reads it or a view of it; -1: none does."""
        out = dict.fromkeys(self.stored, -1)
        for n, op in enumerate(self.program.ops):
            for ref in op.refs:
                out.update((root, n) for root in self.roots[ref.name])
        return out

    @cached_property
    def _defined(self) -> Mapping[str, int]:
        """Value -> position of its op; inputs: -1."""
        out = {i.name: -1 for i in self.program.inputs}
        out.update((result, n) for n, op in enumerate(self.program.ops) for result in op.results)
        return out

    def taken(self, op: Op) -> bool:
        """Whether ``add_into`` adds in its first operand's own memory: it is its last reader, and no other value shares it."""
        value = op.refs[0].name
        return value in self.program.producers and self.memory(value) == frozenset({value}) and self.last_use[value] == self._defined[op.name] and not self.roots[value]

    def in_place(self, position: int, stored: str, result: str) -> bool:
        """Whether the op at ``position`` may turn ``stored`` into ``result`` in its own memory: it is the last reader."""
        o = self.stored.get(stored)
        return o is not None and o.ref.name == result and self.last_reader[stored] == position

    def in_block(self, position: int, block: str, result: str) -> bool:
        """Whether the op at ``position`` may turn ``block`` into ``result`` in the memory of the stored tensor of which it is this rank's block: the op is
        the last reader of that tensor, whose next value is gathered of the ranks' results, each where its block lies, one behind the other."""
        cut = self.program.producers.get(block)
        if cut is None or cut.target != "shard" or self.last_reader.get(cut.refs[0].name) != position:
            return False
        whole, axis = self.program.types[cut.refs[0].name], str(cut.kw("axis"))
        wait = self.program.producers.get(self.stored[cut.refs[0].name].ref.name)
        gather = None if wait is None or wait.target != "wait" else self.program.producers[wait.refs[0].name]
        if wait is None or gather is None or gather.target != "all_gather.start" or gather.kw("axis") != axis:
            return False
        here, there, mesh = self.program.types[result], self.program.types[wait.name], self.program.mesh
        if gather.refs[gather.results.index(wait.refs[0].name)].name != result or here.layout != cut.type.layout or there.layout != whole.layout or here.dtype != whole.dtype:
            return False
        place = step(whole.shape, whole.layout, here.layout, axis, mesh).take
        return place is not None and place.outer * prod(whole.local(mesh)[: place.dim]) == 1

    @cached_property
    def _kept(self) -> frozenset[str]:
        """Stored tensors whose new value is in their own memory already: unchanged, or updated in place by an optimizer."""
        out = set()
        for name, o in self.stored.items():
            producer = self.program.producers.get(o.ref.name)
            if o.ref.name == name or (producer is not None and producer.target.startswith("optim.") and self.in_place(self._defined[o.ref.name], name, o.ref.name)):
                out.add(name)
        return frozenset(out)

    @cached_property
    def copied(self) -> frozenset[str]:
        """Values that outlive an overwrite of memory they share (new values and returned ones): they are copied when made."""
        late = [o.ref.name for name, o in self.stored.items() if name not in self._kept] + [o.ref.name for o in self.returned]
        return frozenset(name for name in late if self.roots[name])

    @cached_property
    def written(self) -> Mapping[str, int]:
        """Stored tensor -> the op after which its new value is copied into it (-1: before the first)."""
        return {
            name: max(self._defined[o.ref.name], self.last_reader[name]) for name, o in self.stored.items() if name not in self._kept
        }

    @cached_property
    def dies(self) -> Mapping[int, tuple[str, ...]]:
        """Position -> values whose last use is there (-1: inputs that nothing reads)."""
        last = dict(self._defined)
        for n, op in enumerate(self.program.ops):
            last.update((ref.name, n) for ref in op.refs)
        for name, at in self.written.items():
            last[name] = max(last[name], at)
            new = self.stored[name].ref.name
            if new not in self.copied:
                last[new] = max(last[new], at)
        for o in self.returned:
            if o.ref.name not in self.copied:
                last.pop(o.ref.name, None)
        out: dict[int, list[str]] = {}
        for name, n in last.items():
            out.setdefault(n, []).append(name)
        return {n: tuple(names) for n, names in out.items()}
