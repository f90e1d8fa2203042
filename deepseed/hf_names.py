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
    kinds = [type(op).__name__ for op in converter.operations]
    if kinds not in (["MergeModulelist"], ["MergeModulelist", "Concatenate"], ["Concatenate"]):
        raise CheckpointError(
            f"{target} is made of {groups[first][0]} by {', '.join(kinds)}, and only stacking and joining can be read by parts\n"
            "  fix: write the files anew once: from_pretrained(path), then save_pretrained(dir, save_original_format=False)"
        )
    ordered = tuple(tuple(groups[p]) for p in converter.source_patterns if p in groups)
    stack = converter.operations[0].dim if kinds[0] == "MergeModulelist" else None
    join = converter.operations[-1].dim if kinds[-1] == "Concatenate" else None
    return Made(ordered if stack is not None else tuple((name,) for group in ordered for name in group), stack, join)


def in_files(model: Any, tensors: Shapes) -> dict[str, tuple[torch.dtype, Ints]]:
    """Dtypes and shapes as transformers would write these tensors of the model: it keeps to the names that a model's files have always had."""
    if not hasattr(model, "base_model_prefix"):
        return dict(tensors)
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return dict(tensors)
    shapes = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in tensors.items()}
    return {name: (t.dtype, tuple(t.shape)) for name, t in revert_weight_conversion(model, shapes).items()}
