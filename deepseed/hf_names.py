"""Files whose tensors are named, stacked or joined otherwise than in the model, as transformers knows them for its own classes.

Mixtral's files have a matrix for each expert, its module one stack of them; ``transformers.conversion_mapping`` has the table. Here it says of which
tensors in files a tensor of the model is made, so that a rank can read and write its part of each. Stacking and joining are all that is understood.
Transformers is imported only where a model is one of its own; before 5.0 it had no such table, and modules were as their files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from deepseed.runtime.folder import CheckpointError
from deepseed.runtime.saved import Ints

UNDERSTOOD = (["MergeModulelist"], ["MergeModulelist", "Concatenate"], ["Concatenate"])  # of transformers' operations
Shapes = Mapping[str, tuple[torch.dtype, Ints]]


@dataclass(frozen=True)
class Made:
    """How a tensor is made of those in files: each group is stacked along ``stack`` (None: it is one tensor), the groups are joined along ``join``."""

    groups: tuple[tuple[str, ...], ...]
    stack: int | None
    join: int | None


def conversions(model: Any, names: Iterable[str]) -> dict[str, Made]:
    """Tensors of the model that are made of tensors in files (of these ``names``), by name. Raises CheckpointError where it takes more than stacking
    and joining."""
    if not hasattr(model, "base_model_prefix"):
        return {}
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
    except ImportError:
        return {}
    table = get_model_conversion_mapping(model)
    renamings = [t for t in table if isinstance(t, WeightRenaming)]
    converters = [t for t in table if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    mine: dict[str, Any] = model.state_dict()
    found: dict[str, dict[str | None, list[str]]] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, mine)
        if target in mine:
            found.setdefault(target, {}).setdefault(pattern, []).append(name)
    return {target: _made(target, groups, by_pattern) for target, groups in found.items()}


def _made(target: str, groups: Mapping[str | None, list[str]], by_pattern: Mapping[str, Any]) -> Made:
    first = next(iter(groups))
    if first is None:
        return Made((tuple(groups[None][:1]),), None, None)
    converter = by_pattern[first]
    kinds = _kinds(converter)
    if kinds not in UNDERSTOOD:
        raise CheckpointError(
            f"{target} is made of {groups[first][0]} by {', '.join(kinds)}, and only stacking and joining can be read by parts\n"
            "  fix: write the files anew once: from_pretrained(path), then save_pretrained(dir, save_original_format=False)"
        )
    ordered = tuple(tuple(groups[p]) for p in converter.source_patterns if p in groups)
    stack = converter.operations[0].dim if kinds[0] == "MergeModulelist" else None
    join = converter.operations[-1].dim if kinds[-1] == "Concatenate" else None
    return Made(ordered if stack is not None else tuple((name,) for group in ordered for name in group), stack, join)


def _kinds(converter: Any) -> list[str]:
    return [type(op).__name__ for op in converter.operations]


def in_files(model: Any, own: Shapes) -> tuple[Shapes, Mapping[str, Made]]:
    """Dtypes and shapes of the tensors in files, as transformers would write these of the model: with the names that its files have always had; and
    which of the model's are made of several of those. The model's own where that takes more than stacking and joining: transformers reads both."""
    if not hasattr(model, "base_model_prefix"):
        return own, {}
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, revert_weight_conversion
    except ImportError:
        return own, {}
    if any(_kinds(t) not in UNDERSTOOD for t in get_model_conversion_mapping(model) if isinstance(t, WeightConverter)):
        return own, {}
    shapes = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in own.items()}
    tensors = {name: (t.dtype, tuple(t.shape)) for name, t in revert_weight_conversion(model, shapes).items()}
    made = {target: how for target, how in conversions(model, [name for name in tensors if name not in own]).items() if target in own}
    used = [name for name in own if name in tensors] + [name for how in made.values() for group in how.groups for name in group]
    whole = sorted(used) == sorted(tensors) and {*made, *(name for name in own if name in tensors)} == set(own)
    return (tensors, made) if whole else (own, {})
