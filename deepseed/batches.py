"""Global and local batches: joining each data-parallel rank's rows, and finding a mix-up of the two on the first step."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from deepseed.build import Built, CompileError
from deepseed.capture import BatchSpec
from deepseed.capture.attributes import short
from deepseed.capture.batch import rebuild, tensors
from deepseed.ir.program import Type
from deepseed.logs import warn
from deepseed.runtime.host import Host


def joined(host: Host, batch: Any) -> Any:
    """The rows of all data-parallel ranks, in their order; entries that are no rows are the first rank's."""
    have = [(where.get("dp", 0), given) for where, given in host.everyone((host.coordinates[0], tensors(batch)))]
    parts = [next(given for at, given in have if at == part) for part in range(host.mesh.sizes.get("dp", 1))]
    rows = [_rows(part) for part in parts]
    joined = {
        key: torch.cat([part[key] for part in parts]) if t.dim() and t.shape[0] == rows[0] else t for key, t in parts[0].items()
    }  # fmt: skip
    return rebuild(batch, joined)


def check_mix_up(host: Host, batch: Any, local: bool, own: bool = False) -> None:
    """A global batch where local ones are due, or the reverse: found on the first step, from what the ranks hold. ``own``: where all ranks have the
    same rows that is legal, as under DistributedDataParallel, and only said."""
    if host.mesh.ranks == 1 or host.backend == "simulate":
        return
    parts = host.mesh.sizes.get("dp", 1)
    seen = host.everyone((host.coordinates[0].get("dp", 0), said(BatchSpec.of(batch)), _content(batch)))
    by_part: dict[int, set[str]] = {}
    for part, _, content in seen:
        by_part.setdefault(part, set()).add(content)
    different = [rank for rank, (_, _, content) in enumerate(seen) if content != seen[0][2]]
    if not local and different:
        rank = different[0]
        raise CompileError(
            f'batch="global" means the same whole batch on every rank, but rank 0 and rank {rank} hold different ones:\n  rank 0: {seen[0][1]}\n'
            f'  rank {rank}: {seen[rank][1]}\n  fix: compile(..., batch="local") if each rank loads its own rows, else load the same rows everywhere'
        )
    if local and (odd := [part for part, contents in by_part.items() if len(contents) > 1]):
        raise CompileError(
            f'batch="local": the ranks of data-parallel part {odd[0]} differ only along sp or tp and must hold the same rows, but they do not\n'
            "  fix: choose rows by the dp coordinate, not by the rank"
        )
    if own and parts > 1 and not different and host.first and any(t.numel() for t in tensors(batch).values()):
        warn(f"all {parts} data-parallel ranks begin with the same rows, {seen[0][1]}: each trains on its own (a DistributedSampler gives each another part)")
    if local and parts > 1 and not different and not own:
        raise CompileError(
            f'batch="local" means each data-parallel rank\'s own rows, but all {parts} hold the same ones: {seen[0][1]}\n'
            '  fix: compile(..., batch="global") if every rank loads the whole batch, else use a DistributedSampler'
        )


def said(spec: BatchSpec) -> str:
    """As messages show it: ``input_ids i64[8, 16], flag=True``."""
    return ", ".join([*(f"{key} {type_text(t)}" for key, t in spec.types.items()), *(f"{key}={short(v)}" for key, v in spec.constants.items())])


def unfit(model: str, batch: Any, served: Sequence[Built], error: Exception, without_loss: bool = False) -> str:
    """What to say where the model raised ``error`` on a batch: the batch, the nearest one that was served, and the place."""
    spec = BatchSpec.of(batch)
    text, _, fix = str(error).partition("\n  fix: ")
    lines = [f"{model} cannot run on this batch: {type(error).__name__}: {text}", f"  batch: {said(spec)}"]
    if served:
        before = served[-1].captured.batch
        names = [{*s.types, *s.constants} for s in (before, spec)]
        odd = [f"missing {', '.join(sorted(names[0] - names[1]))}"] if names[0] - names[1] else []
        odd += [f"unexpected {', '.join(sorted(names[1] - names[0]))}"] if names[1] - names[0] else []
        odd += [f"{k} is {type_text(spec.types[k])}, was {type_text(t)}" for k, t in before.types.items() if k in spec.types and spec.types[k] != t]
        lines.append(f"  the one before: {said(before)}" + (f" ({'; '.join(odd)})" if odd else ""))
    lines += [f"  {note}" for note in getattr(error, "__notes__", [])]
    if without_loss and isinstance(error, TypeError):
        return "\n".join([*lines, "  fix: compiled(...) calls the model itself: give it what the forward takes; loss_and_grads(batch) calls loss_fn"])
    return "\n".join([*lines, f"  fix: {fix or 'give the batch the entries, shapes and dtypes that the model and the loss take: both must run on it without DeepSeed'}"])


def type_text(t: Type) -> str:
    """``f32[8, 16]``."""
    return f"{t.dtype}{list(t.shape)}"


def times(spec: BatchSpec, parts: int) -> BatchSpec:
    """The global batch of ``parts`` equal local ones."""
    rows = _most([t.shape[0] for t in spec.types.values() if t.shape])
    types = {k: replace(t, shape=(t.shape[0] * parts, *t.shape[1:])) if t.shape and t.shape[0] == rows else t for k, t in spec.types.items()}
    return BatchSpec(types, spec.constants)


def _rows(batch: Mapping[str, Tensor]) -> int:
    return _most([t.shape[0] for t in batch.values() if t.dim()])


def _most(sizes: Sequence[int]) -> int:
    return max(set(sizes), key=sizes.count) if sizes else -1


def _content(batch: Any) -> str:
    digest = hashlib.sha256()
    for key, t in tensors(batch).items():
        digest.update(key.encode())
        digest.update(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
