"""Paged attention on any device that torch computes on, without a loop over sequences or blocks.

A step's sequences are put into a few groups of like size, each a batch of its own, padded to its longest; which ones is decided once a step for all layers
(``Packing``). Of a group one gather fetches the pages, one batched product makes the logits, one the sum. Padding costs at most a third of a group
and ``SLACK``, so the number of groups grows with the logarithm of the sizes at most. The layout [kv heads, blocks, block, width] makes the gathered pages a batch of matrices
as they come. A window gathers only the pages it sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepseed import ops
from deepseed.inference import gpu, native
from deepseed.inference.paged import wide, write

SLACK = 4096  # pairs of tokens that a group may compute in vain, beside a third of the others
LARGEST = 1 << 24  # logits that are held at a time


@dataclass(frozen=True)
class Group:
    """Sequences that are computed as one batch: ``rows`` [n, longest chunk] of the step's tokens (the last is repeated), ``table`` [n * pages] and what
    each row does not see of them, [n, chunk, pages * size] (None: it sees all)."""

    rows: Tensor | slice
    count: int
    longest: int
    table: Tensor
    hidden: Tensor | None
    real: Tensor | None  # of the padded rows, those that are tokens; None: all


@dataclass(frozen=True)
class Few:
    """Sequences of few new tokens: ``table`` [n, longest] of pages, and of each its length, its new tokens, where these begin among the step's."""

    table: np.ndarray[Any, Any]
    lengths: np.ndarray[Any, Any]
    news: np.ndarray[Any, Any]
    rows: np.ndarray[Any, Any]

    @cached_property
    def pointers(self) -> tuple[int, int, int, int]:
        return self.table.ctypes.data, self.lengths.ctypes.data, self.news.ctypes.data, self.rows.ctypes.data


@dataclass
class Packing:
    """What attention must know of a step: of each sequence its blocks, its length with the new tokens, and how many are new."""

    tables: Sequence[Sequence[int]]
    lengths: Sequence[int]
    news: Sequence[int]
    size: int  # of a block
    slots: Tensor
    device: torch.device
    _groups: dict[int, tuple[Group, ...]] = field(default_factory=dict)
    _tiles: dict[int, Tensor] = field(default_factory=dict)

    @cached_property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Pages [S, longest], lengths [S] and where new tokens begin [S + 1], on the device."""
        table = np.zeros((len(self.tables), max(map(len, self.tables))), dtype=np.int64)
        for row, own in enumerate(self.tables):
            table[row, : len(own)] = own
        starts = np.concatenate([[0], np.cumsum(self.news)]).astype(np.int64)
        each = (table, np.array(self.lengths, dtype=np.int64), starts)
        made = [torch.from_numpy(x).to(self.device) for x in each]
        return made[0], made[1], made[2]

    def tiles(self, tokens: int) -> Tensor:
        if tokens not in self._tiles:
            self._tiles[tokens] = torch.from_numpy(gpu.tiles(list(self.news), tokens)).to(self.device)
        return self._tiles[tokens]

    @cached_property
    def _most(self) -> int:
        """New tokens of a sequence that the native kernel takes: in a step of few rows, any number."""
        return native.FEW if sum(self.news) <= native.FEW else native.NEW

    @cached_property
    def few(self) -> Few | None:
        """What the native kernel takes; the others are ``groups``."""
        members = [n for n, new in enumerate(self.news) if new <= self._most] if self.device.type == "cpu" and native.load() is not None else []
        if not members:
            return None
        lengths, news = np.array(self.lengths, dtype=np.int64)[members], np.array(self.news, dtype=np.int64)
        tables = [self.tables[n] for n in members]
        table = np.zeros((len(members), max(map(len, tables))), dtype=np.int64)
        for row, own in enumerate(tables):
            table[row, : len(own)] = own
        return Few(table, lengths, news[members], (news.cumsum() - news)[members])

    def groups(self, window: int) -> tuple[Group, ...]:
        if window not in self._groups:
            self._groups[window] = tuple(self._group(members, window) for members in self._split(window))
        return self._groups[window]

    def _split(self, window: int) -> list[list[int]]:
        """Like with like: in the order of size, a new group where padding would cost more than it may."""
        sees = [self._sees(n, window) for n in range(len(self.news))]
        out: list[list[int]] = []
        real = longest = 0
        left = range(len(self.news)) if self.few is None else [n for n, new in enumerate(self.news) if new > self._most]
        for n in sorted(left, key=lambda n: (-self.news[n], -sees[n])):
            own = self.news[n] * sees[n]
            if out:
                first = out[-1][0]
                wide = max(longest, sees[n])
                if (len(out[-1]) + 1) * self.news[first] * wide <= 4 * (real + own) // 3 + SLACK:
                    out[-1].append(n)
                    real, longest = real + own, wide
                    continue
            out.append([n])
            real, longest = own, sees[n]
        return out

    def _first(self, n: int, window: int) -> int:
        """The first block that a new token of the sequence sees."""
        return max(0, self.lengths[n] - self.news[n] - window + 1) // self.size if window else 0

    def _sees(self, n: int, window: int) -> int:
        return self.lengths[n] - self._first(n, window) * self.size

    def _group(self, members: list[int], window: int) -> Group:
        size, device = self.size, self.device
        first = np.array([self._first(n, window) for n in members])
        length, new = np.array([self.lengths[n] for n in members]), np.array([self.news[n] for n in members])
        pages, chunk = int((-(-length // size) - first).max()), int(new.max())
        table = np.zeros((len(members), pages), dtype=np.int64)
        for row, n in enumerate(members):
            own = self.tables[n][first[row] : -(-self.lengths[n] // size)]
            table[row, : len(own)] = own
        starts = np.concatenate([[0], np.cumsum(self.news)])[members]
        step = np.minimum(np.arange(chunk), new[:, None] - 1)  # [n, chunk]
        rows = starts[:, None] + step
        position = (length - new)[:, None] + step
        key = first[:, None] * size + np.arange(pages * size)  # [n, keys]
        hidden = key[:, None] > position[:, :, None]
        if window:
            hidden |= key[:, None] <= position[:, :, None] - window
        flat = rows.ravel()
        together = bool((np.diff(flat) == 1).all())
        ragged = None if (new == chunk).all() else torch.from_numpy((np.arange(chunk) < new[:, None]).ravel().nonzero()[0]).to(device)
        return Group(
            slice(int(flat[0]), int(flat[-1]) + 1) if together else torch.from_numpy(flat).to(device), len(members), chunk, torch.from_numpy(table.ravel()).to(device),
            torch.from_numpy(hidden).to(device) if hidden.any() else None, ragged,
        )  # fmt: skip


def attend(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, packing: Packing, scale: float, window: int, softcap: float, sinks: Tensor | None
) -> Tensor:  # fmt: skip
    """``deepseed::paged_attention``, with the step's packing in the place of its tables."""
    if gpu.takes(q):
        return gpu.attend(q, k, v, keys, values, packing, scale, window, softcap, sinks)
    few, groups = packing.few, packing.groups(window)
    if few is not None:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    (write if few is None else native.write)(k, v, keys, values, packing.slots)
    if few is not None:
        out = q.new_empty(q.shape[0], q.shape[1], values.shape[3])
        native.attend(q, keys, values, out, few, scale, window, softcap, sinks)
    elif len(groups) == 1 and isinstance(groups[0].rows, slice) and groups[0].real is None:
        return _batch(q, keys, values, groups[0], scale, softcap, sinks)
    else:
        out = q.new_empty(q.shape[0], q.shape[1], values.shape[3])
    for group in groups:
        part = _batch(q[group.rows], keys, values, group, scale, softcap, sinks)
        if group.real is not None:
            rows = torch.arange(group.rows.start, group.rows.stop) if isinstance(group.rows, slice) else group.rows
            out[rows[group.real]] = part[group.real]
        else:
            out[group.rows] = part
    return out


def _batch(q: Tensor, keys: Tensor, values: Tensor, group: Group, scale: float, softcap: float, sinks: Tensor | None) -> Tensor:
    """q [n * chunk, heads, width] of one group -> [n * chunk, heads, value width]."""
    held, n, chunk = keys.shape[0], group.count, group.longest
    shares = q.shape[1] // held
    k = keys.index_select(1, group.table).view(held * n, -1, keys.shape[3])
    v = values.index_select(1, group.table).view(held * n, -1, values.shape[3])
    q = q.view(n, chunk, held, shares, -1).permute(2, 0, 3, 1, 4)  # kv heads, n, share, chunk, width
    at_a_time = max(1, LARGEST // (held * n * shares * k.shape[1]))
    parts = [
        _attend(q[:, :, :, i : i + at_a_time], k, v, None if group.hidden is None else group.hidden[:, None, i : i + at_a_time], scale, softcap, sinks)
        for i in range(0, chunk, at_a_time)
    ]
    out = parts[0] if len(parts) == 1 else torch.cat(parts, 3)
    return out.permute(1, 3, 0, 2, 4).reshape(n * chunk, held * shares, -1)


def _attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, softcap: float, sinks: Tensor | None) -> Tensor:
    held, n, shares, chunk, width = q.shape
    logits = ops.bmm(q.reshape(held * n, shares * chunk, width), k.transpose(1, 2)).view(held, n, shares, chunk, -1)
    logits = wide(logits).mul_(scale)
    if softcap:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    if hidden is not None:
        logits.masked_fill_(hidden, -torch.inf)
    if sinks is None:
        weights = torch.softmax(logits, -1)
    else:
        sink = sinks.to(logits.dtype).view(held, 1, shares, 1, 1)
        weights = logits.sub_(most := torch.maximum(logits.amax(-1, keepdim=True), sink)).exp_()
        weights = weights / (weights.sum(-1, keepdim=True) + (sink - most).exp())
    return ops.bmm(weights.to(v.dtype).view(held * n, shares * chunk, -1), v).view(held, n, shares, chunk, -1)
