"""DeepSeed: distributed training and inference of large models, as a compiler.

    step = deepseed.compile(model, plan="zero3+tp2", optimizer=torch.optim.AdamW(model.parameters(), lr=3e-4))
    loss = step(batch)

Names are looked up when first used, so that ``import deepseed.ir`` needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepseed import accelerator as accelerator
    from deepseed import checkpointing as checkpointing
    from deepseed import comm as comm
    from deepseed import inference as inference
    from deepseed import pipeline as pipeline
    from deepseed import utils as utils
    from deepseed import zero as zero
    from deepseed.accelerator import get_accelerator as get_accelerator
    from deepseed.api import compile as compile
    from deepseed.bucket import Bucket as Bucket
    from deepseed.capture.gradients import LossScale as LossScale
    from deepseed.checkpoints import Checkpoints as Checkpoints
    from deepseed.engine import Engine as Engine
    from deepseed.engine import add_config_arguments as add_config_arguments
    from deepseed.engine import init_distributed as init_distributed
    from deepseed.engine import initialize as initialize
    from deepseed.inference.doors import init_inference as init_inference
    from deepseed.lion import Lion as Lion
    from deepseed.muon import Muon as Muon
    from deepseed.on_meta import meta as meta
    from deepseed.plan import parse_plan as parse_plan
    from deepseed.progress import Progress as Progress

__version__ = "0.1.0"
_WHERE = {
    "get_accelerator": "deepseed.accelerator", "Engine": "deepseed.engine", "add_config_arguments": "deepseed.engine", "init_distributed": "deepseed.engine", "initialize": "deepseed.engine",
    "Checkpoints": "deepseed.checkpoints", "compile": "deepseed.api", "Bucket": "deepseed.bucket", "init_inference": "deepseed.inference.doors", "Lion": "deepseed.lion", "LossScale": "deepseed.capture.gradients", "Muon": "deepseed.muon", "meta": "deepseed.on_meta", "parse_plan": "deepseed.plan", "Progress": "deepseed.progress",
}  # fmt: skip
_MODULES = ("accelerator", "checkpointing", "comm", "inference", "pipeline", "utils", "zero")  # as attributes; DeepSpeed has most of them


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    if name in _MODULES:
        return import_module(f"deepseed.{name}")
    raise AttributeError(f"module 'deepseed' has no attribute {name!r}")
