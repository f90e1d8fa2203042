"""What goes into a checkpoint beside the model: anything with ``state_dict`` and ``load_state_dict``, and the generators of random numbers.

Each process has its own. A state that is the same in all processes is kept once and goes to any number of them; one that differs is kept for each
process, and goes back to as many.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepseed.checkpoint import packed, unpacked
from deepseed.runtime.folder import CheckpointError
from deepseed.runtime.host import Host, everywhere

GENERATORS, COUNT = "generators", "count"  # names of our own: a checkpoint may lack them


def check(objects: Mapping[str, Any]) -> None:
    """Raises CheckpointError naming the first that has no state."""
    for name, each in objects.items():
        lacking = [method for method in ("state_dict", "load_state_dict") if not callable(getattr(each, method, None))]
        if lacking or name in (GENERATORS, COUNT):
            why = f"has no {lacking[0]}()" if lacking else f"has a name that is taken: {GENERATORS} and {COUNT} are kept anyway"
            raise CheckpointError(f"objects[{name!r}], a {type(each).__name__}, {why}\n  fix: objects={{name: whatever has state_dict() and load_state_dict()}}, such as a scheduler or a stateful data loader")


def gathered(host: Host, objects: Mapping[str, Any], count: int, what: str) -> bytes:
    """The states of all processes, as one text of the checkpoint. Every rank must call it."""

    def mine() -> dict[str, bytes]:
        states = {name: each.state_dict() for name, each in objects.items()} | {GENERATORS: generators(), COUNT: count}
        return {name: packed(state, f"objects[{name!r}].state_dict(): ") for name, state in states.items()}

    every = everywhere(host, what, mine)
    out: dict[str, list[Any]] = {name: [unpacked(each[name]) for each in every] for name in every[0]}
    return packed({name: states[:1] if all(_same(states[0], state) for state in states[1:]) else states for name, states in out.items()})


def given(host: Host, text: bytes | None, names: Collection[str], strict: bool = True) -> dict[str, Any]:
    """Of each object the state for this process. Raises CheckpointError where one was saved for another number of processes, or not at all."""
    said: dict[str, list[Any]] = unpacked(text) if text is not None else {}
    processes, process = host.mesh.ranks // len(host.coordinates), host.mesh.rank(host.coordinates[0]) // len(host.coordinates)
    out = {}
    for name in [*names, GENERATORS, COUNT]:
        states = said.get(name)
        if states is not None and len(states) in (1, processes):
            out[name] = states[process % len(states)]
        elif name in (GENERATORS, COUNT) or (states is None and not strict):
            continue
        elif states is None:
            raise CheckpointError(f"the checkpoint has no state of {name!r}, it has {', '.join(sorted(set(said) - {GENERATORS, COUNT})) or 'none'}\n  fix: leave {name!r} out of objects=, or load(objects=False)")
        else:
            raise CheckpointError(
                f"the state of {name!r} differs by process and is of {len(states)} of them, here are {processes}\n"
                f"  fix: load it in {len(states)} processes, or leave {name!r} out of objects= and set it yourself; a loader that every process has alike goes to any number"
            )
    return out


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b) or (a != a and b != b)


def generators() -> dict[str, Any]:
    """PyTorch's, Python's and numpy's own generators, as plain data."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has, cached = np.random.get_state(legacy=True)
    out: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, torch.tensor(internal, dtype=torch.int64), gauss],
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has), float(cached)],
    }
    if torch.cuda.is_available():
        out["cuda"] = torch.cuda.get_rng_state()
    return out


def set_generators(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    kind, keys, position, has, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has, cached))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
