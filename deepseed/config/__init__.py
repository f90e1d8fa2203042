"""ds_config.json: what DeepSpeed users have, read by key, each with a verdict; and the plan that says the same.

``read(source)`` parses a path, a dict, JSON text or base64; ``Config`` is the file as pydantic models; ``verdicts(config)`` says of every key in it whether it
is supported, mapped or rejected, and why; ``plan(config)`` is the plan that equals the file. No key is ever ignored in silence.
"""

from deepseed.config.fields import ConfigError
from deepseed.config.model import Config
from deepseed.config.read import read
from deepseed.config.settings import Settings, settings
from deepseed.config.verdicts import Verdict, verdicts

__all__ = ["Config", "ConfigError", "Settings", "Verdict", "read", "settings", "verdicts"]
