"""A function on real ranks of this machine: processes started by torchrun's own launcher."""

from __future__ import annotations

import os
import select
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from deepseed.runtime.errors import RankError


def on_ranks(function: Callable[..., Any], ranks: int, *given: Any) -> list[Any]:
    """What ``function(*given)`` returns in each of ``ranks`` processes, which find the launcher's environment and end with this one; it leaves the process group itself. A mistake of the
    user's (an error of this package's) is said once, not by every rank. Call it from a script's ``if __name__ == "__main__":``. Raises RankError with what the first failing rank said.
    """
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks share this machine
    try:
        with tempfile.TemporaryDirectory(prefix="deepseed-ranks-") as folder:
            config = LaunchConfig(
                min_nodes=1, max_nodes=1, nproc_per_node=ranks, run_id=f"{function.__name__}-{os.getpid()}", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0,
                start_method="spawn", logs_specs=DefaultLogsSpecs(log_dir=folder),
            )  # fmt: skip
            got: dict[int, Any] = elastic_launch(config, _one)(function, given, os.getpid())
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise RankError(rank, f"rank {rank} of {ranks} failed: {failure.message}") from None
    finally:
        if threads is None:
            os.environ.pop("OMP_NUM_THREADS", None)
    for rank in range(ranks):
        if isinstance(got[rank], _Mistake):
            raise RankError(rank, f"rank {rank} of {ranks}: {got[rank]}")
    return [got[rank] for rank in range(ranks)]


class _Mistake(str):
    """What a rank cannot do: returned, so that no launcher's log is in the way."""


def _one(function: Callable[..., Any], given: tuple[Any, ...], parent: int) -> Any:
    from deepseed.runtime.distributed import stop

    end_with(parent)
    try:
        return function(*given)
    except (ValueError, RuntimeError) as error:
        if type(error).__module__.split(".")[0] != "deepseed":
            raise
        return _Mistake(f"{type(error).__name__}: {error}")
    finally:
        stop()


def end_with(parent: int) -> None:
    """Let this process end when its parent does, however that ends. (What Linux offers, PR_SET_PDEATHSIG, looks at the parent's thread: a replica that a thread has started again would end with it.)"""

    def look() -> None:
        try:
            select.select([os.pidfd_open(parent)], [], [])  # Linux's own: readable once the process has ended
        except (OSError, AttributeError):
            while os.getppid() == parent:
                time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=look, name="deepseed-parent", daemon=True).start()
