"""Batches whose lengths differ from rank to rank: padded to what all ranks agree on, and outputs cut back.

All ranks run one program, so their batches have one shape. Rows of a batch are padded by the user's collator already, to the longest
of the rank; the same filling goes on to the longest of all ranks: a mask of 0, labels of -100.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from deepseed.bucket import Bucket, lengthened
from deepseed.build import CompileError
from deepseed.capture.batch import rebuild, tensors
from deepseed.runtime.host import Host

_ZERO = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "decoder_input_ids", "decoder_attention_mask", "completion_mask", "assistant_masks")
CONVENTION = Bucket(fill={"labels": -100} | dict.fromkeys(_ZERO, 0), to=1)  # Hugging Face's names; to the longest of the ranks


def agreed(host: Host, batch: Any, bucket: Bucket) -> tuple[Any, dict[int, int]]:
    """The batch as long as all ranks agree, and what lengths became: new -> old. Raises CompileError where nothing could mask the padding.

    Of each entry with a fill value ``bucket.dim`` is padded to the bucket of the longest rank."""
    given = tensors(batch)
    dims = {key: _dim(key, bucket) for key, t in given.items() if _fill(key, bucket) is not None and t.dim() > _dim(key, bucket)}
    mine = {key: given[key].shape[dim] for key, dim in dims.items()}
    everyone: Sequence[Mapping[str, int]] = host.everyone(mine)
    want = {key: bucket.length(max(there.get(key, 0) for there in everyone)) for key in dims}
    if want == mine:
        return batch, {}
    if not any("mask" in key or key.rpartition(".")[2] == "position_ids" for key in given):  # positions begin anew: each padded token is a sequence of its own
        longer = next(key for key in want if want[key] != mine[key])
        raise CompileError(
            f"batch entry {longer!r} {list(given[longer].shape)} has to be padded to {want[longer]} in dimension {dims[longer]}, as long as another rank's, and the batch has no mask\n"
            "  fix: give the model its attention_mask, or pad all ranks' batches to one length in the collate_fn"
        )
    new = {key: lengthened(given[key], dims[key], want[key], _fill(key, bucket)) for key in dims if want[key] != mine[key]}
    became: dict[int, set[int]] = {}
    for key in dims:
        became.setdefault(want[key], set()).add(mine[key])
    return rebuild(batch, new), {after: before.pop() for after, before in became.items() if len(before) == 1 and after not in before}


def cut_back(outputs: Mapping[str, Tensor], became: Mapping[int, int], dim: int = 1) -> dict[str, Tensor]:
    """Outputs that are as long as a padded entry, without the padding."""
    return {key: t.narrow(dim, 0, became[t.shape[dim]]) if t.dim() > dim and t.shape[dim] in became else t for key, t in outputs.items()}


def _fill(key: str, bucket: Bucket) -> bool | int | float | None:
    return bucket.fill.get(key.rpartition(".")[2])


def _dim(key: str, bucket: Bucket) -> int:
    name = key.rpartition(".")[2]
    return bucket.dim.get(name, 1) if isinstance(bucket.dim, Mapping) else bucket.dim
