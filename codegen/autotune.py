"""Blocks by trial: each kernel of a fragment with the candidates of the model, the fastest is kept.

What times a source is given: on a device, the median of several launches. Numbers do not depend on the choice but for the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable

from deepseed.codegen.block_sizes import Blocks, candidates
from deepseed.codegen.triton import launched, source
from deepseed.ir.program import Program


def tuned(fragment: Program, seconds: Callable[[str], float]) -> tuple[tuple[str, Blocks], ...]:
    """The blocks for ``source``, one kernel after another; those of the model where nothing is faster by more than the noise of 2 percent."""
    chosen: dict[str, Blocks] = {}
    best = seconds(source(fragment))
    for launch in launched(fragment):
        for candidate in candidates(launch.blocks)[1:] if launch.free else ():
            tried = {**chosen, launch.kernel: candidate}
            took = seconds(source(fragment, tuple(tried.items())))
            if took < 0.98 * best:
                best, chosen = took, tried
    return tuple(chosen.items())
