"""What lives from forward to backward: which storages the backward reads, and what it takes to compute each again.

A storage is made by one op and named by the value that the op makes; views share it (deepseed.rules.strides). Ops that were one op (an
origin group), and a collective with its wait, are one unit: computed again together, so that the kernel is the same and so are its bits.
What depends on parameters alone the backward has for itself already (``again``), all but what only the forward reads.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from deepseed.ir.layout import Owned
from deepseed.ir.mesh import TIME
from deepseed.ir.program import Op, Program, params_only
from deepseed.rules.strides import Lying
from deepseed.solver.cuts import cut_points, live_bytes, places, shared_modules
from deepseed.speed import Machine

BLOCK = 512  # bytes: an allocator's smallest block. What fits one is kept; nothing would be freed by computing it again


@dataclass(frozen=True)
class Unit:
    """``operands``: the storages of other units that it reads; ``makes``: its own that others read; ``seconds``: what it takes to run
    once more, 0 where the backward does so anyway."""

    ops: tuple[Op, ...]
    operands: tuple[str, ...]
    makes: tuple[str, ...]
    seconds: float
    weight: bool = False  # it depends on parameters alone


class Between:
    """The forward of a lowered program as units and storages."""

    def __init__(self, p: Program, machine: Machine | None = None) -> None:
        self.p, self.machine = p, machine or Machine()
        self.inputs = {i.name for i in p.inputs}
        self.weights = params_only(p) - self.inputs
        self.forward = [op for op in p.ops if op.phase == "forward"]
        lying = Lying(p)
        self.storage: dict[str, str] = {name: name for name in self.inputs}  # of each value of the forward
        for op in self.forward:
            view = lying.view(op)
            for r, t in zip(op.results, op.types, strict=True):
                self.storage[r] = self.storage[op.refs[0].name] if view is not None else r
                lying.strides[r] = view if view is not None else lying.fresh(op, t.local(p.mesh))

    def nbytes(self, storages: Iterable[str]) -> int:
        """On one rank."""
        return sum(self.p.types[s].local_bytes(self.p.mesh) for s in storages)

    @cached_property
    def again(self) -> Mapping[str, str]:
        """What depends on parameters alone: the forward's value -> the backward's own."""
        numbers: dict[object, int] = {}
        number = {name: (name, -1) for name in self.inputs}
        first: dict[tuple[object, int], str] = {}
        out: dict[str, str] = {}
        for op in self.p.ops:
            if op.name not in self.weights or op.phase == "update":
                continue
            n = numbers.setdefault((op.form, op.types, tuple(number[r.name] for r in op.refs)), len(numbers))
            for i, r in enumerate(op.results):
                number[r] = (str(n), i)
                if op.phase == "forward":
                    first.setdefault((str(n), i), r)
                elif (str(n), i) in first:
                    out.setdefault(first[str(n), i], r)
        return out

    @cached_property
    def needed(self) -> frozenset[str]:
        """The storages of the forward that the backward reads."""
        read = {r.name for op in self.p.ops if op.phase == "backward" for r in op.refs}
        return frozenset(self.storage[name] for name in read if name in self.storage and name not in self.inputs) - self.inputs

    @cached_property
    def lasting(self) -> frozenset[str]:
        """The storages that live to the end of the step, or of its loop, whatever the backward reads: returned, read by the update, the
        same for all microbatches."""
        read = [o.ref.name for o in self.p.outputs] + [r.name for op in self.p.ops if op.phase == "update" for r in op.refs]
        out = {self.storage[name] for name in read if name in self.storage}
        if TIME in self.p.mesh.sizes:
            out |= {s for s in self.storage.values() if self.p.types[s].layout.on(TIME) is None and s not in self.weights}
        return frozenset(out) - self.inputs

    @cached_property
    def keys(self) -> frozenset[str]:
        """The storages of ids by which rows are owned: layouts name them, so that there is one of each."""
        found = {e.key for t in self.p.types.values() for _, e in t.layout.elements if isinstance(e, Owned)}
        return frozenset(self.storage[key] for key in found if key in self.storage) - self.inputs

    @cached_property
    def units(self) -> Sequence[Unit]:
        starts = {r: op.name for op in self.forward if op.target.endswith(".start") for r in op.results}
        members: dict[str, list[Op]] = {}
        for op in self.forward:
            key = f"origin {op.origin}" if op.origin else starts.get(op.refs[0].name, op.name) if op.target == "wait" else op.name
            members.setdefault(key, []).append(op)
        return [self._unit(ops) for ops in members.values()]

    def _unit(self, ops: Sequence[Op]) -> Unit:
        made = {r for op in ops for r in op.results}
        names = {op.name for op in ops}
        outside = dict.fromkeys(self.storage[r.name] for op in ops for r in op.refs if r.name not in made)
        used = [r for r in made if any(not isinstance(u, Op) or u.name not in names for u in self.p.uses[r])]
        makes = {self.storage[r] for r in used} & made
        seconds = self.machine.together(self.p, ops) + sum(self.machine.sending(self.p, op) for op in ops if op.target.endswith(".start"))
        weight = ops[0].name in self.weights
        return Unit(tuple(ops), tuple(s for s in outside if s not in self.inputs and s not in made), tuple(r for op in ops for r in op.results if r in makes), seconds, weight)

    @cached_property
    def layers(self) -> Sequence[frozenset[str]]:
        """What is live at each place between two layers: storages, in the order of the forward.

        The places are cut points that leave modules to some depth: the depth at which what is kept there and what one layer holds are
        together the fewest bytes (Chen et al. 2016)."""
        bound = self._bound()
        glued = {op.name: self.p.producers[op.refs[0].name].name for op in bound if op.target == "wait"}
        at = places(bound, glued)
        points = cut_points(bound, at, live_bytes(self.p, bound, at)) if bound else []
        across = {i: self._across(bound[i]) for i in points}
        depth = {i: shared_modules(bound, i) for i in points}
        tried = [[i for i in points if depth[i] <= d] for d in sorted(set(depth.values()))]
        best = min(tried, key=lambda chosen: self._held([across[i] for i in chosen], [bound[i] for i in chosen]), default=[])
        return [across[i] for i in best]

    def _bound(self) -> list[Op]:
        """The forward's ops that depend on parameters and on something else."""
        of_params = {i.name for i in self.p.inputs if i.role == "param"}
        out = []
        for op in self.forward:
            if any(r.name in of_params for r in op.refs):
                of_params.update(op.results)
                if op.name not in self.weights:
                    out.append(op)
        return out

    @cached_property
    def _position(self) -> Mapping[str, int]:
        return {r: n for n, op in enumerate(self.forward) for r in op.results}

    @cached_property
    def _spans(self) -> tuple[Sequence[str], NDArray[np.int64], NDArray[np.int64]]:
        """Storages that do not depend on parameters alone; where each is made, and where the forward last reads it."""
        last = {self.storage[r.name]: n for n, op in enumerate(self.forward) for r in op.refs}
        names = [s for s in last if s not in self.inputs and s not in self.weights]
        return names, np.array([self._position[s] for s in names], dtype=np.int64), np.array([last[s] for s in names], dtype=np.int64)

    def _across(self, op: Op) -> frozenset[str]:
        """The storages made before ``op`` that the forward reads from it on."""
        names, made, last = self._spans
        n = self._position[op.name]
        return frozenset(names[i] for i in np.flatnonzero((made < n) & (n <= last)).tolist())

    def _held(self, kept: Sequence[frozenset[str]], begins: Sequence[Op]) -> int:
        """Bytes of what is kept, and of what the largest run between holds for the backward."""
        first = [self._position[op.name] for op in begins]
        all_kept = frozenset[str]().union(*kept)
        runs = [0] * (len(first) + 1)
        for s in self.needed - all_kept - self.weights:
            runs[bisect_right(first, self._position[s])] += self.nbytes([s])
        return self.nbytes(all_kept) + max(runs)
