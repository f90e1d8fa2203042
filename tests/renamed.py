"""The same model with every submodule, parameter, buffer and class under a random name, without touching its code.

``scrambled(model)``: keys of the module tree become random strings; each module's class becomes a subclass of a random name,
whose ``__getattr__`` finds what the model's own code asks for.
"""

from __future__ import annotations

import copy
import random
import string
from typing import Any

from torch import nn


def scrambled(model: nn.Module, seed: int) -> nn.Module:
    """A renamed deep copy."""
    rng = random.Random(seed)
    taken: set[str] = set()

    def fresh() -> str:
        while True:
            name = "".join(rng.choices(string.ascii_letters, k=rng.randint(3, 12)))
            if name not in taken:
                taken.add(name)
                return name

    model = copy.deepcopy(model)
    for module in list(model.modules()):
        renamed: dict[str, str] = {}
        for table in (module._modules, module._parameters, module._buffers):
            entries = [(fresh(), name, value) for name, value in table.items()]
            table.clear()
            for new, old, value in entries:
                table[new] = value
                renamed[old] = new
        module._non_persistent_buffers_set = {renamed.get(n, n) for n in module._non_persistent_buffers_set}
        module.__dict__["_renamed"] = renamed
        module.__class__ = type(fresh(), (type(module),), {"__getattr__": _find, "_get_abs_string_index": _at})
    return model


def _find(self: nn.Module, name: str) -> Any:
    return nn.Module.__getattr__(self, self.__dict__.get("_renamed", {}).get(name, name))


def _at(self: Any, index: int) -> str:
    """ModuleList and Sequential ask for their n-th entry by its number."""
    return list(self._modules)[index]
