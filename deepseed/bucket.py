"""Batches padded to few shapes, and the check that padding changes nothing.

A ``Bucket`` says which entries have a dimension, what each is filled with, and to which lengths. Whether the padded batch means the
same is the model's matter (a mask, ignored labels), so it is not believed: at the first padded batch the loss and all gradients of
both batches are compared, in float64, under the plan. Random draws are taken at their mean there: a draw is keyed by the place of
its element in the whole tensor, so a padded batch draws other dropout bits than the batch itself, with the same law.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deepseed.build import Built, CompileError
from deepseed.capture.batch import rebuild, tensors
from deepseed.capture.convert import live
from deepseed.ir.mesh import TIME, Mesh
from deepseed.ir.program import Op, Program
from deepseed.runtime.executable import Executable
from deepseed.runtime.host import Host
from deepseed.runtime.state import State, shard

LOSS_TOLERANCE, TOLERANCE = 1e-10, 1e-9  # of the loss, and of the largest gradient, in float64
_MEANS = {
    "bernoulli": lambda op: op.kw("p"), "uniform": lambda op: (op.kw("low") + op.kw("high")) / 2, "normal": lambda op: op.kw("mean"),
}  # fmt: skip


@dataclass(frozen=True)
class Bucket:
    """Pad one dimension of a batch up to the next of few lengths.

    fill: for each entry that has the dimension, what its padding holds; None: leave that entry as it is.
    dim: which dimension; a mapping where entries differ. 0 pads the rows of a last, smaller batch.
    to: a multiple, or the lengths themselves in any order; a batch longer than all of them is an error.

        Bucket(fill={"input_ids": 0, "attention_mask": 0, "labels": -100}, to=64)
        Bucket(fill={"input_ids": 0, "attention_mask": 1, "labels": -100}, dim=0, to=[32])
    """

    fill: Mapping[str, bool | int | float | None]
    dim: int | Mapping[str, int] = 1
    to: int | Sequence[int] = 64

    def __post_init__(self) -> None:
        lengths = [self.to] if isinstance(self.to, int) else list(self.to)
        if not self.fill or not lengths or not all(isinstance(n, int) and n > 0 for n in lengths):
            raise CompileError(f"{self}\n  fix: name the entries with their fill values, and give a multiple or lengths above 0")

    def length(self, now: int) -> int:
        """The length that ``now`` is padded to."""
        if isinstance(self.to, int):
            return -(-now // self.to) * self.to
        fitting = [n for n in self.to if n >= now]
        if not fitting:
            raise CompileError(f"a batch of length {now} in dimension {self.dim}, but the longest bucket is {max(self.to)}\n  fix: give a longer one, or cut the batch")
        return min(fitting)

    def pad(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The entries by key, padded at the end. Raises CompileError where they do not agree on the length."""
        dims = {k: self.dim[k] if isinstance(self.dim, Mapping) else self.dim for k in self.fill if k in given}
        if not dims:
            raise CompileError(f"the batch has none of the entries {', '.join(self.fill)} of a bucket\n  it has {', '.join(given)}\n  fix: name them as the batch does")
        short = [k for k, d in dims.items() if given[k].dim() <= d]
        if short:
            raise CompileError(f"batch entry {short[0]!r} has {given[short[0]].dim()} dimensions, none of number {dims[short[0]]}\n  fix: give dim= by entry")
        lengths = {k: given[k].shape[d] for k, d in dims.items() if self.fill[k] is not None}
        if len(set(lengths.values())) != 1:
            raise CompileError(f"the entries of a bucket differ in length: {', '.join(f'{k} {n}' for k, n in lengths.items())}\n  fix: one bucket for each length")
        now = next(iter(lengths.values()))
        want = self.length(now)
        if want == now:
            return dict(given)
        common = self.dim if isinstance(self.dim, int) else -1
        odd = [k for k, t in given.items() if k not in self.fill and common >= 0 and t.dim() > common and t.shape[common] == now]
        if odd:
            raise CompileError(
                f"batch entry {odd[0]!r} {list(given[odd[0]].shape)} has the length {now} in dimension {common}, as {next(iter(lengths))!r} has, and no fill value\n"
                f"  fix: Bucket(fill={{..., {odd[0]!r}: value}}), or None to leave it as it is"
            )
        return {k: lengthened(t, dims[k], want, self.fill[k]) if k in lengths else t for k, t in given.items()}


def padded(batch: Any, buckets: Sequence[Bucket]) -> Any:
    """The batch in its buckets: itself, where nothing is to be added."""
    given = tensors(batch)
    new = dict(given)
    for each in buckets:
        new = each.pad(new)
    return batch if all(new[k] is t for k, t in given.items()) else rebuild(batch, new)


def checkable(p: Program) -> Program:
    """Loss and gradients alone, every random draw at its mean: writes no buffer, and padding moves no bit of it."""
    outputs = tuple(o for o in p.outputs if o.role in ("loss", "grad"))
    ops = live([_mean(op) for op in p.ops], [o.ref for o in outputs])
    used = {ref.name for op in ops for ref in op.refs} | {o.ref.name for o in outputs}
    return replace(p, ops=ops, outputs=outputs, inputs=tuple(i for i in p.inputs if i.role in ("param", "batch") or i.name in used))


def compare(host: Host, states: Sequence[State], bare: tuple[Built, Mapping[str, Tensor]], full: tuple[Built, Mapping[str, Tensor]]) -> None:
    """Raises CompileError with both numbers where the padded batch (``full``) has another loss or gradient than the batch itself."""
    mesh = states[0].mesh
    whole: list[Mapping[tuple[str, str], Tensor]] = []
    for built, batch in (bare, full):
        inputs = [_inputs(e, built.constants, state, batch, mesh) for e, state in zip(built.executables, states, strict=True)]
        whole.append(built.returned(host, host.run(built.executables, inputs)))
    errors: list[tuple[float, str]] = []
    largest = 0.0
    for key, a in whole[0].items():
        b = whole[1][key]
        if key[0] == "loss":
            if not abs(float(a) - float(b)) <= LOSS_TOLERANCE * abs(float(a)):
                raise _refusal(f"the loss is {float(a):.17g} without padding and {float(b):.17g} with it", bare, full)
        elif a.numel():
            largest = max(largest, float(a.abs().max()))
            errors.append((float((a - b).abs().max()), key[1]))
    for error, name in errors:
        if not error <= TOLERANCE * largest:
            raise _refusal(f"the gradient of {name!r} differs by {error:.3g} with padding, where the largest gradient is {largest:.3g}", bare, full)


def _refusal(what: str, *two: tuple[Built, Mapping[str, Tensor]]) -> CompileError:
    entries = [", ".join(f"{k} {list(t.shape)}" for k, t in batch.items()) for _, batch in two]
    return CompileError(
        f"padding changes what this model computes: {what}\n  batch: {entries[0]}\n  padded: {entries[1]}\n"
        "  fix: fill values that the model masks (attention_mask 0) and the loss ignores (labels -100); without a mask, compile without buckets"
    )


def _inputs(e: Executable, constants: Mapping[str, Tensor], state: State, batch: Mapping[str, Tensor], mesh: Mesh) -> list[Tensor]:
    out = []
    for i in e.inputs:
        if (stored := state.stored(i)) is not None:
            out.append(_wide(stored))
        else:
            whole = batch[i.key] if i.role == "batch" else constants[i.key]
            type_ = i.type.laid(i.type.layout.with_(TIME, None))  # the source cuts its rows into microbatches
            out.append(shard(_wide(whole.to(state.device)), type_, mesh, state.coordinate))
    return out


def lengthened(t: Tensor, dim: int, length: int, fill: bool | int | float | None) -> Tensor:
    """``t`` with ``fill`` at the end of a dimension."""
    assert fill is not None
    more = [*t.shape]
    more[dim] = length - t.shape[dim]
    return torch.cat([t, torch.full(more, fill, dtype=t.dtype, device=t.device)], dim)


def _mean(op: Op) -> Op:
    mean = _MEANS.get(op.target)
    return op if mean is None else replace(op, target="full", args=(), kwargs=(("value", float(mean(op))),))


def _wide(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


