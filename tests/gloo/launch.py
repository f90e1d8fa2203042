"""Ranks as a test starts them: by torchrun's own launcher, each a fresh process forked from a server that has loaded what ranks import."""

from __future__ import annotations

import gc
import multiprocessing
import os
import tempfile
import warnings
from collections.abc import Callable
from multiprocessing import forkserver as server
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from deepseed.runtime.distributed import stop

PRELOAD = ["deepseed", "deepseed.target", "deepseed.verify", "transformers.models.auto.modeling_auto", "gloo.equality", "gloo_worker"]


def preload(*modules: str) -> None:
    """Said where a test's module is imported: the server, which starts with the first rank, loads these too."""
    PRELOAD.extend(name for name in modules if name not in PRELOAD)


def forkserver() -> ForkServerContext:
    """Its processes are forked from the server. The first call starts it; it is one for all tests of this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]))
        multiprocessing.set_forkserver_preload(PRELOAD)
        server.ensure_running()
    return multiprocessing.get_context("forkserver")


def launched(number: int, body: Callable[..., Any], *args: Any) -> dict[int, Any]:
    """What ``body(*args)`` returns, by rank. Raises what the launcher raises where one fails."""
    forkserver()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("OMP_NUM_THREADS", "1")
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=number, run_id=f"test-{os.getpid()}", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0,
            start_method="forkserver", monitor_interval=0.1, logs_specs=DefaultLogsSpecs(log_dir=folder),
        )  # fmt: skip
        found: dict[int, Any] = elastic_launch(config, _rank)(body, *args)
    return found


def _rank(body: Callable[..., Any], *args: Any) -> Any:
    """A process that was forked runs no exit handlers: it leaves the process group, if it is in one, here. What was there before it is no garbage."""
    gc.freeze()
    try:
        return body(*args)
    finally:
        stop()


def ranks(number: int, body: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``body(*args)`` returns on each of ``number`` ranks, which are joined in no process group yet."""
    got = launched(number, body, *args)
    return [got[rank] for rank in range(number)]
