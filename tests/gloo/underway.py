"""One rank comes late: do the others' collectives start all the same?"""

from __future__ import annotations

import time

import torch

from deepseed.ir.mesh import Mesh
from deepseed.runtime.distributed import DistributedRuntime, guarded, start, stop

KINDS = ("all_gather", "all_reduce", "reduce_scatter", "all_to_all")


def starts(late: float) -> list[tuple[str, str, float, float]]:
    """Of each collective, through memory of this host and through gloo: the seconds until its start returned, and until its wait did; rank 1 starts ``late`` seconds after rank 0."""
    torch.set_num_threads(1)
    start("gloo")
    rt, out = DistributedRuntime(Mesh((("dp", 2),)), timeout=60.0), []
    with guarded(rt):
        for way in ("memory", "gloo"):
            if way == "gloo":
                rt._links = {}
            for kind in KINDS:
                rt.wait(rt.all_reduce_start(torch.ones(1), "dp"))
                time.sleep(late * rt.rank)
                began = time.monotonic()
                complete = rt.exchange(kind, torch.ones(2, 1 << 16), "dp", "sum")
                started = time.monotonic() - began
                complete()
                out.append((kind, way, started, time.monotonic() - began))
    stop()
    return out
