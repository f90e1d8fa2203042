"""Batches whose lengths differ from rank to rank: what they are padded to, with what, and that outputs are cut back."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gloo.launch import ranks
from gloo.ragged import on_ranks
from torch import Tensor

from deepseed.bucket import Bucket
from deepseed.build import CompileError
from deepseed.ragged import CONVENTION, agreed, cut_back


def host(*others: Mapping[str, int]) -> Any:
    """A rank beside others whose batches have these lengths."""
    return SimpleNamespace(everyone=lambda mine: [mine, *others])


def rows(length: int, count: int = 2) -> dict[str, Tensor]:
    ids = torch.arange(1, count * length + 1).reshape(count, length)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def lengths(n: int) -> dict[str, int]:
    return dict.fromkeys(("input_ids", "attention_mask", "labels"), n)


def test_the_longest_rank_decides() -> None:
    batch, became = agreed(host(lengths(5), lengths(4)), rows(3), CONVENTION)
    assert became == {5: 3}
    for name, fill in {"input_ids": 0, "attention_mask": 0, "labels": -100}.items():
        assert torch.equal(batch[name], torch.cat([rows(3)[name], torch.full((2, 2), fill)], 1)), name


def test_what_is_as_long_already_stays_the_same_object() -> None:
    given = rows(5)
    batch, became = agreed(host(lengths(5), lengths(3)), given, CONVENTION)
    assert batch is given and became == {}


def test_a_bucket_rounds_up_and_has_names_of_its_own() -> None:
    bucket = Bucket(fill={"tokens": 9, "mask": 0}, dim={"tokens": 0}, to=4)
    batch, became = agreed(host({"tokens": 5, "mask": 6}), {"tokens": torch.ones(3, 7), "mask": torch.ones(2, 6), "other": torch.ones(2, 6)}, bucket)
    assert batch["tokens"].shape == (8, 7) and batch["tokens"][3:].eq(9).all() and batch["mask"].shape == (2, 8) and batch["other"].shape == (2, 6)
    assert became == {}, "8 rows were 3 and 8 columns were 6: which of them an output's 8 is, is not known"


def test_entries_of_a_call_are_named_by_their_last_part() -> None:
    (args, kwargs), became = agreed(host({"1.labels": 4, "0.0.input_ids": 4}), (({"input_ids": torch.ones(2, 3)},), {"labels": torch.ones(2, 3), "attention_mask": torch.ones(2, 3)}), CONVENTION)
    assert kwargs["labels"].shape == (2, 4) and became == {4: 3}
    assert args[0]["input_ids"].shape == (2, 4)


def test_nothing_is_padded_that_nothing_could_mask() -> None:
    batch = {"input_ids": torch.ones(2, 3), "labels": torch.ones(2, 3)}
    with pytest.raises(CompileError, match=r"'input_ids' \[2, 3\] has to be padded to 5 in dimension 1(.|\n)*no mask\n  fix: give the model its attention_mask"):
        agreed(host({"input_ids": 5, "labels": 5}), batch, CONVENTION)
    assert agreed(host({"input_ids": 3, "labels": 3}), batch, CONVENTION)[0] is batch
    packed = {**batch, "position_ids": torch.tensor([[0, 1, 0]] * 2)}  # several sequences a row: what is padded begins sequences of its own
    assert agreed(host(dict.fromkeys(packed, 5)), packed, CONVENTION)[0]["position_ids"].tolist() == [[0, 1, 0, 0, 0]] * 2


def test_a_vector_of_labels_has_no_length() -> None:
    batch = {**rows(3), "labels": torch.tensor([1, 2])}
    padded, became = agreed(host({"input_ids": 4, "attention_mask": 4}), batch, CONVENTION)
    assert padded["labels"].shape == (2,) and padded["input_ids"].shape == (2, 4) and became == {4: 3}


def test_outputs_are_cut_back_where_they_are_as_long_as_what_was_padded() -> None:
    given = {"logits": torch.ones(2, 5, 7), "loss": torch.ones(()), "pooled": torch.ones(2, 8), "row": torch.ones(5)}
    cut = cut_back(given, {5: 3})
    assert {k: tuple(t.shape) for k, t in cut.items()} == {"logits": (2, 3, 7), "loss": (), "pooled": (2, 8), "row": (5,)}


def test_two_ranks_of_unequal_lengths_are_ddp_without_padding() -> None:
    for worst in ranks(2, on_ranks):
        assert max(worst.values()) <= 1e-12, worst
