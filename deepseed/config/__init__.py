"""ds_config.json: what DeepSpeed users have, read by key, each with a verdict; and the plan that says the same.

``read(source)`` parses a path, a dict, JSON text or base64; ``Config`` is the file as pydantic models; ``verdicts(config)`` says of every key in it whether it
is supported, mapped or rejected, and why; ``settings(config)`` has the plan that equals the file. ``optimizer_of`` and ``scheduler_of`` make what the file
names, ``fill`` puts the Trainer's arguments in place of "auto". No key is ever ignored in silence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deepseed.config.auto import fill
from deepseed.config.fields import ConfigError
from deepseed.config.model import Config
from deepseed.config.read import read
from deepseed.config.settings import Settings, settings
from deepseed.config.verdicts import Verdict, verdicts

if TYPE_CHECKING:
    from deepseed.config.objects import optimizer_of as optimizer_of
    from deepseed.config.objects import scheduler_of as scheduler_of

__all__ = ["Config", "ConfigError", "Settings", "Verdict", "fill", "optimizer_of", "read", "scheduler_of", "settings", "verdicts"]


def __getattr__(name: str) -> Any:
    """What needs torch is imported when it is first asked for."""
    if name in ("optimizer_of", "scheduler_of"):
        from deepseed.config import objects

        return getattr(objects, name)
    raise AttributeError(f"module 'deepseed.config' has no attribute {name!r}")
