"""Ops that were moved, so that each comes behind what it reads; helper of ``group_kernels``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from deepseed.ir.contract import PassError
from deepseed.ir.program import Op, Program


def in_order(p: Program, runs: Iterable[Sequence[Op]]) -> Iterator[Op]:
    """``runs`` of ops of ``p``, each of which stays together, as they are given but for those that come before what they read: these follow it. Raises PassError where something waits for itself.

    given:  [%a.start = all_gather.start(%a.new)] [%b.g = ..] [%a.new = ..  %b.new = ..]
    gives:  %b.g = ..  %a.new = ..  %b.new = ..  %a.start = all_gather.start(%a.new)
    """
    there = {i.name for i in p.inputs}
    waiting: list[tuple[Sequence[Op], set[str]]] = []  # with what they still wait for
    for run in runs:
        made = {r for op in run for r in op.results}
        waiting.append((run, {r.name for op in run for r in op.refs if r.name not in made and r.name not in there}))
        while (n := next((n for n, (_, missing) in enumerate(waiting) if not missing), None)) is not None:
            ready, _ = waiting.pop(n)
            for op in ready:
                yield op
                there.update(op.results)
                for _, missing in waiting:
                    missing.difference_update(op.results)
    for ops, missing in waiting[:1]:
        raise PassError(f"%{ops[0].name} = {ops[0].target} waits for %{min(missing)}, which waits for it\n  fix: report it, a pass has put an op before what it reads")
