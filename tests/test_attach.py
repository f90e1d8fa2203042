"""Exchanges in which the ranks of a host read each other's memory: what they bring, when operands are free again, and who cannot."""

from __future__ import annotations

import ctypes
import os
import socket
from types import SimpleNamespace
from typing import Any, cast

import pytest
from gloo import attached
from gloo.launch import ranks

from deepseed.runtime import attach, neighbours

pytestmark = pytest.mark.skipif(not neighbours.possible(), reason="this host lets no process read another one's memory")


@pytest.mark.parametrize(("number", "few"), [(2, False), (2, True), (3, True)])
def test_buckets_of_every_kind_are_the_simulations(number: int, few: bool) -> None:
    assert ranks(number, attached.buckets, range(16), few) == [[]] * number


@pytest.mark.wide
def test_many_buckets_on_more_ranks() -> None:
    for number, few in ((4, True), (5, False), (8, True)):
        assert ranks(number, attached.buckets, range(100, 180), few) == [[]] * number


def test_a_gather_into_memory_that_holds_a_part_already() -> None:
    assert ranks(3, attached.into, 30) == [True] * 3


def test_an_operand_may_be_overwritten_after_the_own_wait() -> None:
    assert ranks(3, attached.late, 30) == [True] * 3


def test_a_sum_may_be_changed_after_its_own_wait() -> None:
    """Though other ranks read their part of the sums out of it."""
    assert ranks(3, attached.changed, 20) == [True] * 3


def test_what_is_conjugated_lazily_travels_as_it_is_seen() -> None:
    assert ranks(2, attached.lazily_conjugated) == [True] * 2


@pytest.mark.wide
def test_a_bucket_of_very_many_tensors() -> None:
    assert ranks(2, attached.many, 30_000) == [30_000.0] * 2


def test_ranks_that_bring_different_sizes_say_so() -> None:
    one, other = ranks(2, attached.disagree)
    assert "rank 0 does all_reduce of 12 bytes in 1 tensor, rank 1 all_reduce of 16 bytes in 1 tensor" in one
    assert "rank 1 does all_reduce of 16 bytes in 1 tensor, rank 0 all_reduce of 12 bytes in 1 tensor" in other


def test_what_an_error_left_under_way_is_over() -> None:
    assert ranks(2, attached.after_an_error) == [(True, 3.0)] * 2


def test_what_a_rank_said_before_it_left_is_heard() -> None:
    """It left before it had read all that was told to it: the system then tells of a broken connection first."""
    there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stays, leaves = (attach.Link(cast(Any, SimpleNamespace(rank=r)), (0, 1), [os.getpid()] * 2, [None, there[0]] if r == 0 else [there[1], None]) for r in range(2))
    stays.say(1, (1, 1), attach.STARTED)
    leaves.say(0, (1, 1), attach.READ)
    leaves.close()
    assert stays.hear((1, 1), attach.READ, 0.0)
    with pytest.raises(ConnectionError, match="rank 1 has closed its connection"):
        stays.hear((1, 2), attach.STARTED, 5.0)
    stays.close()


@pytest.mark.parametrize("how", ["said", "forbidden"])
def test_where_one_rank_cannot_all_go_through_gloo(how: str) -> None:
    assert ranks(2, attached.unwilling, how) == [([], 3.0)] * 2


def test_env_says_whether_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepseed.env import collect

    def verdict() -> str:
        return next(v["verdict"] for v in collect()["verdicts"] if "each other's memory" in v["what"])

    assert verdict() == "good"
    monkeypatch.setenv("DEEPSEED_CMA", "0")
    assert verdict() == "note"


def test_a_part_that_is_not_there_is_an_error() -> None:
    target = ctypes.create_string_buffer(16)
    with pytest.raises(OSError, match="reading the memory of process"):
        attach.read(os.getpid(), [(8, ctypes.addressof(target), 16)])
