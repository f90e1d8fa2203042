"""Ranks as a test starts them: by torchrun's own launcher, each a fresh process forked from a server that has torch loaded."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

PRELOAD = ["deepseed", "deepseed.target", "deepseed.verify", "transformers.models.auto.modeling_auto"]


def ranks(number: int, body: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``body(*args)`` returns on each of ``number`` ranks, which are joined in no process group yet."""
    multiprocessing.set_forkserver_preload([*PRELOAD, "gloo.equality"])
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=number, run_id=f"test-{os.getpid()}", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0,
        start_method="forkserver", monitor_interval=0.1,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(__file__).rsplit(os.sep, 2)[0], os.environ.get("PYTHONPATH", "")]))
        got = elastic_launch(config, body)(*args)
    return [got[rank] for rank in range(number)]
