"""What crosses each boundary between pipeline stages, by name: for ``explain --json`` and for tests."""

from __future__ import annotations

from collections.abc import Mapping

from deepseed.ir.program import Program
from deepseed.ir.schedule import kind_of

KINDS = {"forward": "forward", "backward": "backward", "weights": "backward", "once": "once"}


def boundaries(p: Program) -> list[Mapping[str, list[str]]]:
    """For boundary k, between the stages k and k + 1 of a staged program: the values that cross it in ``forward`` and ``backward``, for each
    microbatch, and ``once`` a step (tied weights and their gradients, summands of the gradient norm). A value that goes on to several stages is
    listed once. Empty without stages.

    >>> from deepseed.ir.text import parse
    >>> p = parse('''program p mesh() facts(staged)
    ... %x : f32[8] batch "x"
    ... %h = aten.relu(%x) : f32[8] {part="forward.1", phase="forward"}
    ... %h.s1 = transfer(%h, source=0) : f32[8] {part="forward.1", phase="forward", stage=1}
    ... return %h.s1 output "0"
    ... schedule gpipe stages=2 microbatches=1 loops=1
    ... lane 0: F0
    ... lane 1: F0''')
    >>> boundaries(p)
    [{'forward': ['h'], 'backward': [], 'once': []}]
    """
    stages = p.schedule.stages if p.schedule is not None else 1
    out: list[dict[str, dict[str, None]]] = [{"forward": {}, "backward": {}, "once": {}} for _ in range(stages - 1)]
    for op in p.ops:
        if op.target == "transfer":
            low, high = sorted((op.stage, int(str(op.kw("source")))))
            for k in range(low, high):
                out[k][KINDS[kind_of(op.part)]][op.refs[0].name] = None
    return [{kind: list(names) for kind, names in boundary.items()} for boundary in out]
