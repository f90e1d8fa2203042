"""The processes of a server. One engine on several ranks of this machine: the first one listens and schedules, the others follow its steps.

Where the environment says nothing of ranks they are started here, one process each; under a launcher each process calls ``serve_rank`` itself. After a signal
the first rank drains and releases the others, which leave signals to it. A rank that dies ends all, and the message names it. Several replicas (``dp``): this
process listens and computes nothing, and each replica has processes of its own (``replicas``).
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from deepseed.inference.errors import InferenceError
from deepseed.on_ranks import end_with, on_ranks
from deepseed.plan import parse_plan
from deepseed.runtime.errors import RankError
from deepseed.runtime.host import launched
from deepseed.serve.run import bound


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
    sizes = dict(parse_plan(asked.plan).mesh(None).sizes)
    replicas, ranks = sizes.pop("dp", 1), sizes.get("tp", 1)
    if other := [f"{axis}{n}" for axis, n in sizes.items() if axis != "tp"]:
        raise InferenceError(f"plan {asked.plan!r} splits over {', '.join(other)}; a server has replicas (dp), each of them over tp alone\n  fix: a plan such as tp2, dp2 or dp2+tp2")
    if replicas > 1:
        return _replicas(replicas, replace(asked, plan=f"tp{ranks}"))
    if ranks > 1 and not launched():
        bound(asked.host, asked.port).close()  # better now than when the ranks are there
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

    listening = bound(asked.host, asked.port) if os.environ.get("RANK", "0") == "0" else None
    engine = Engine(asked.model, asked.plan, asked.dtype, **asked.engine)
    split = engine.executable
    if parse_plan(asked.plan).mesh(None).ranks == 1:
        assert listening is not None
        return run(engine, asked.name, listening, **asked.limits)
    with split.together():
        if not split.leads:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            with _ending():
                split.follow()
            return 0
        assert listening is not None
        with _ending():
            if code := run(engine, asked.name, listening, **asked.limits):
                _end(code)
        split.release()
        return code


@contextmanager
def _ending() -> Iterator[None]:
    """A rank that hears of another's end ends at once: whoever listens has told the clients, and there is nobody to wait for."""
    try:
        yield
    except RankError:
        _end(1)


def _end(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _replicas(number: int, asked: Asked) -> int:
    """This process listens, and each replica computes in processes of its own."""
    from pathlib import Path

    from deepseed.inference.model import tokenizer_of
    from deepseed.serve.processes import Started
    from deepseed.serve.replicas import Replicas
    from deepseed.serve.run import run

    if launched():
        raise InferenceError(f"{number} replicas start their own processes, and a launcher has started this one already\n  fix: deepseed serve without a launcher, or a plan without dp")
    listening = bound(asked.host, asked.port)
    started = Started(number, _replica, asked)
    try:
        several = Replicas(started.ready(), tokenizer_of(Path(asked.model)), started.again)
        try:
            return run(several, asked.name, listening, **asked.limits)
        finally:
            several.close()
    finally:
        started.end()


def _replica(asked: Asked, address: str, key: bytes, number: int) -> None:
    """One replica's first process. Signals from a terminal are for the server, which lets go of the replica when it is done."""
    os.setsid()
    end_with(os.getppid())
    for ignored in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ignored, signal.SIG_IGN)
    given = (asked, address, key, number)
    if (ranks := parse_plan(asked.plan).mesh(None).ranks) > 1:
        on_ranks(_replica_rank, ranks, *given)
    else:
        _replica_rank(*given)


def _replica_rank(asked: Asked, address: str, key: bytes, number: int) -> None:
    from deepseed.inference.engine import Engine
    from deepseed.serve.replicas import answer

    if parse_plan(asked.plan).mesh(None).ranks > 1:
        from deepseed.runtime.distributed import start

        start()
    engine = Engine(asked.model, asked.plan, asked.dtype, **asked.engine)
    with engine.executable.together():
        if engine.executable.leads:
            with _ending():
                answer(engine, address, key, number)
            engine.executable.release()
        else:
            with _ending():
                engine.executable.follow()


def _start(number: int, asked: Asked) -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException

    try:
        codes: list[int] = on_ranks(serve, number, asked)
        return max(codes)
    except SignalException:
        return 0  # told to end, and the ranks have ended
