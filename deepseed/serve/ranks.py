"""A server whose engine lies on several ranks of this machine: the first one listens and schedules, the others follow its steps.

Where the environment says nothing of ranks they are started here, one process each; under a launcher each process calls ``serve_rank`` itself. After a signal
the first rank drains and releases the others, which leave signals to it. A rank that dies ends all, and the message names it.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Any

from deepseed.inference.split import SplitExecutable
from deepseed.on_ranks import on_ranks
from deepseed.plan import parse_plan
from deepseed.runtime.errors import RankError
from deepseed.runtime.host import launched


@dataclass(frozen=True)
class Asked:
    """What the command line said, for each rank."""

    model: str
    plan: str
    dtype: str | None
    engine: dict[str, Any]
    name: str
    host: str
    port: int
    limits: dict[str, Any]


def serve(asked: Asked) -> int:
    """The exit code."""
    ranks = parse_plan(asked.plan).mesh(None).ranks
    if ranks > 1 and not launched():
        return _start(ranks, asked)
    if ranks == 1:
        return serve_rank(asked)
    from deepseed.runtime.distributed import start, stop

    start()
    try:
        return serve_rank(asked)
    finally:
        stop()


def serve_rank(asked: Asked) -> int:
    """This process's part: to listen, or to follow."""
    from deepseed.inference.engine import Engine
    from deepseed.serve.run import run

    engine = Engine(asked.model, asked.plan, asked.dtype, **asked.engine)
    split = engine.executable
    if not isinstance(split, SplitExecutable):
        return run(engine, asked.name, asked.host, asked.port, **asked.limits)
    with split.together():
        if not split.leads:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            split.follow()
            return 0
        code = run(engine, asked.name, asked.host, asked.port, **asked.limits)
        if code:
            raise RankError(0, "the engine has failed: see the message above")
        split.release()
        return code


def _start(number: int, asked: Asked) -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException

    try:
        codes: list[int] = on_ranks(serve, number, asked)
        return max(codes)
    except SignalException:
        return 0  # told to end, and the ranks have ended
