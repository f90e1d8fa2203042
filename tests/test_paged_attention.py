"""The vectorised paged attention computes what the reference says, on any packing of a step; and masks are read for what they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepseed.inference import attention, native
from deepseed.inference.attention import Packing, attend
from deepseed.inference.errors import InferenceError
from deepseed.inference.paged import reference

sequences = st.lists(st.tuples(st.integers(0, 40), st.one_of(st.just(1), st.integers(1, 20))), min_size=1, max_size=6)  # (tokens before, new ones)


class Case:
    """Caches filled with numbers, sequences in blocks of random order, new tokens for each."""

    def __init__(self, sizes: list[tuple[int, int]], block: int, kv: int, share: int, width: int, value_width: int, dtype: torch.dtype = torch.float64) -> None:
        g = torch.Generator().manual_seed(0)
        made = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
        self.lengths, self.news = [a + b for a, b in sizes], [b for _, b in sizes]
        pages = [-(-n // block) for n in self.lengths]
        order = torch.randperm(sum(pages) + 2, generator=g).tolist()
        self.tables = [[order.pop() for _ in range(n)] for n in pages]
        tokens = sum(self.news)
        self.q, self.k, self.v = made(tokens, kv * share, width), made(tokens, kv, width), made(tokens, kv, value_width)
        self.keys, self.values = made(kv, sum(pages) + 2, block, width), made(kv, sum(pages) + 2, block, value_width)
        self.sinks = made(kv * share)
        at = [(t, p) for t, (n, new) in zip(self.tables, zip(self.lengths, self.news, strict=True), strict=True) for p in range(n - new, n)]
        self.slots = torch.tensor([t[p // block] * block + p % block for t, p in at])
        self.block = block

    def both(self, window: int, softcap: float, sinks: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        sink = self.sinks if sinks else None
        packing = Packing(self.tables, self.lengths, self.news, self.block, self.slots, torch.device("cpu"))
        longest = max(map(len, self.tables))
        blocks = torch.tensor([t + [0] * (longest - len(t)) for t in self.tables])
        starts = torch.tensor([0, *torch.tensor(self.news).cumsum(0).tolist()])
        out = []
        for function, tables in ((attend, (packing,)), (reference, (blocks, self.slots, torch.tensor(self.lengths), starts))):
            keys, values = self.keys.clone(), self.values.clone()
            call: Callable[..., Tensor] = function
            out.append((call(self.q, self.k, self.v, keys, values, *tables, 0.3, window, softcap, sink), keys, values))
        return out[0], out[1]


@settings(max_examples=150, deadline=None)
@given(
    sequences, st.integers(1, 7), st.integers(1, 3), st.integers(1, 3), st.integers(1, 8), st.integers(1, 8), st.sampled_from([0, 0, 1, 5, 16]),
    st.sampled_from([0.0, 0.0, 2.0]), st.booleans(), st.sampled_from([1 << 24, 64]), st.sampled_from([4096, 0]), st.sampled_from([(32, 4), (0, 4), (0, 0)]),
)  # fmt: skip
def test_attention_is_the_references(
    sizes: list[tuple[int, int]], block: int, kv: int, share: int, width: int, value_width: int, window: int, softcap: float, sinks: bool, largest: int, slack: int, few: tuple[int, int]
) -> None:  # fmt: skip
    case = Case(sizes, block, kv, share, width, value_width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "LARGEST", largest)
        patch.setattr(attention, "SLACK", slack)
        patch.setattr(native, "FEW", few[0])
        patch.setattr(native, "NEW", few[1])
        got, want = case.both(window, softcap, sinks)
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= 1e-13


@pytest.mark.parametrize("few", [32, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_small_dtypes_keep_a_wide_softmax(dtype: torch.dtype, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "FEW", few)
    monkeypatch.setattr(native, "NEW", few)
    case, exact = (Case([(30, 1), (3, 9)], 4, 2, 2, 16, 16, d) for d in (dtype, torch.float64))
    (got, *_), (want, *_) = case.both(0, 0.0, False)[0], exact.both(0, 0.0, False)[1]
    assert got.dtype == dtype
    assert (got.double() - want).abs().max() < {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.005}[dtype]  # bfloat16: 8 bits, float16: 11 of operands of about 1, width 16


@pytest.fixture
def grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    """No sequence is few tokens: torch computes all."""
    monkeypatch.setattr(native, "FEW", 0)
    monkeypatch.setattr(native, "NEW", 0)


def test_many_sequences_are_few_groups(grouped: None) -> None:
    """Decodes of 1 to 512 tokens: the groups grow with the logarithm, and no more than a third is padding."""
    lengths = list(range(1, 513))
    packing = Packing([[0] * -(-n // 16) for n in lengths], lengths, [1] * 512, 16, torch.zeros(512, dtype=torch.long), torch.device("cpu"))
    groups = packing.groups(0)
    padded = sum(g.table.numel() * 16 for g in groups)
    assert len(groups) <= 8 and padded <= sum(lengths) * 4 / 3 + len(groups) * attention.SLACK + 512 * 16
    assert packing.groups(0) is groups


def test_a_window_gathers_what_it_sees(grouped: None) -> None:
    packing = Packing([list(range(100))], [1600], [1], 16, torch.zeros(1, dtype=torch.long), torch.device("cpu"))
    assert [g.table.numel() for g in packing.groups(32)] == [3] or [g.table.numel() for g in packing.groups(32)] == [2]
    assert [g.table.numel() for g in packing.groups(0)] == [100]


@pytest.mark.parametrize("window", [0, 1, 5, 4096, 100_000])
def test_windows_are_read_from_masks(window: int) -> None:
    pytest.importorskip("transformers")
    from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

    from deepseed.inference.masks import window_of

    mask: Any = sliding_window_causal_mask_function(window) if window else causal_mask_function
    assert window_of(mask) == window


def test_other_masks_are_refused() -> None:
    pytest.importorskip("transformers")
    from transformers.masking_utils import and_masks, causal_mask_function, chunked_overlay

    from deepseed.inference.masks import Wanted, window_of

    for mask in (
        and_masks(causal_mask_function, chunked_overlay(64, torch.zeros(1, dtype=torch.long))), lambda b, h, q, k: k >= 0, lambda b, h, q, k: (k <= q) | (k < 4),
        lambda b, h, q, k: k < q, lambda b, h, q, k: (k <= q) & (k % 7 != 3), lambda b, h, q, k: (k <= q) & (k > q - 64) | (k < 2),
    ):  # fmt: skip
        with pytest.raises(InferenceError, match="only causal masks and sliding windows are served"):
            window_of(mask)
    with pytest.raises(InferenceError, match="attends by itself: it computes add"):
        torch.zeros(2) + Wanted(0)  # type: ignore[operator]
    with pytest.raises(InferenceError, match=r"attends by itself: it reads \.shape"):
        _ = Wanted(0).shape
