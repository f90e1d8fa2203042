"""DeepSpeed's front door: ``engine, optimizer, loader, scheduler = deepseed.initialize(model=.., config="ds_config.json")``.

The engine is called as the model is, ``engine.backward(loss)`` and ``engine.step()`` follow, and what runs are two compiled programs of the
config's plan: forward with backward, and the update (deepseed.trained). A pipeline runs a step as a whole: ``engine.train_batch``.
"""

from deepseed.engine.engine import Engine
from deepseed.engine.start import add_config_arguments, init_distributed, initialize

__all__ = ["Engine", "add_config_arguments", "init_distributed", "initialize"]
