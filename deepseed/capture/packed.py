"""Packed sequences while a model is traced: what is packed is what a mask chooses of all places, and recurrences stand still behind a row's end.

A ``PackedSequence`` holds, time by time, the rows that are not over yet: ``x[mask]`` of ``x [T, B, D]`` (``deepseed.capture.chosen``).
``T`` is the longest length, a guard.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from deepseed.capture.chosen import Chosen, choose
from deepseed.capture.errors import CaptureError
from deepseed.capture.metadata import Where

_CELLS = {"gru": torch.gru_cell, "lstm": torch.lstm_cell, "rnn_tanh": torch.rnn_tanh_cell, "rnn_relu": torch.rnn_relu_cell}


def pack(here: Callable[[], Where], x: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Chosen, Tensor]:
    """``_pack_padded_sequence``: the packed rows, and how many there are at each time."""
    x = x.transpose(0, 1) if batch_first else x
    longest = int(lengths.max())
    if longest > len(x):
        where = here()
        raise CaptureError(f"a sequence of {longest} is packed from {len(x)} steps", path=where.path, line=where.line, fix="give lengths that are at most the tensor's")
    mask = torch.arange(longest)[:, None] < lengths
    return choose(x[:longest], mask, here), mask.sum(1)


def pad(data: Chosen, batch_sizes: Tensor, batch_first: bool, value: float, total: int) -> tuple[Tensor, Tensor]:
    """``_pad_packed_sequence``: ``[total, B, D]`` (or ``[B, total, D]``), and the lengths."""
    mask = _mask(data)
    steps, rows = mask.shape
    x = data.rows.reshape(steps, rows, *data.rows.shape[1:])
    x = torch.where(mask.reshape(steps, rows, *(1 for _ in x.shape[2:])), x, value)
    x = F.pad(x, (*(0, 0) * (x.dim() - 1), 0, total - steps), value=value) if total > steps else x
    return (x.transpose(0, 1) if batch_first else x), mask.sum(0)


def recur(
    kind: str, data: Chosen, batch_sizes: Tensor, hx: Any, weights: Sequence[Tensor], bias: bool, layers: int, dropout: float, train: bool, both: bool
) -> tuple[Any, ...]:
    """``_VF.gru``, ``lstm``, ``rnn_tanh`` or ``rnn_relu`` of packed rows: the output, packed alike, and the state of each row at its end."""
    if dropout and train and layers > 1:
        data.refuse(f"dropout between the layers of a {kind}, drawn for the packed rows")
    mask = _mask(data)
    steps, rows = mask.shape
    x = data.rows.reshape(steps, rows, -1)
    starts = hx if isinstance(hx, list | tuple) else (hx,)
    size = len(weights) // (layers * (1 + both))
    ends: list[tuple[Tensor, ...]] = []
    for layer in range(layers):
        made = []
        for back in range(1 + both):
            n = layer * (1 + both) + back
            out, last = _one(kind, x, mask, [s[n] for s in starts], weights[n * size : (n + 1) * size], bias, bool(back))
            made.append(out)
            ends.append(last)
        x = torch.cat(made, 2) if both else made[0]
    return (data.like(x.reshape(steps * rows, -1)), *(torch.stack([e[k] for e in ends]) for k in range(len(starts))))


def _one(kind: str, x: Tensor, mask: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor], bias: bool, back: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One layer in one direction: ``[T, B, H]`` and the last state."""
    cell: Any = _CELLS[kind]
    own = list(weights[: 4 if bias else 2])
    project = weights[-1] if len(weights) > len(own) else None  # of an LSTM with proj_size
    out: list[Tensor] = []
    for t in reversed(range(len(x))) if back else range(len(x)):
        if project is not None:
            new: Any = _projected(x[t], state, own, project)
        else:
            new = cell(x[t], tuple(state) if kind == "lstm" else state[0], *own)
            new = new if kind == "lstm" else (new,)
        state = [torch.where(mask[t, :, None], n, old) for n, old in zip(new, state, strict=True)]
        out.append(new[0])
    return torch.stack(out[::-1] if back else out), tuple(state)


def _projected(x: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor], project: Tensor) -> tuple[Tensor, Tensor]:
    """An LSTM's step whose output is a projection of what its cell gives."""
    h, c = state
    i, f, g, o = (F.linear(x, weights[0], *weights[2:3]) + F.linear(h, weights[1], *weights[3:4])).chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return (o.sigmoid() * c.tanh()) @ project.T, c


def _mask(data: Any) -> Tensor:
    if not isinstance(data, Chosen) or data.mask.dim() != 2 or data.rows.dim() < 2:
        raise CaptureError("a packed sequence whose data was not packed by pack_padded_sequence", fix="pack with torch.nn.utils.rnn.pack_padded_sequence")
    return data.mask
