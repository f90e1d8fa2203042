"""The resume matrix: a training that was saved under any plan goes on under any other as if nothing had happened.

"Nothing" is the next three losses, parameters, buffers, Adam's state, the loss scale between an overflow and a growth, the scheduler's lr, dropout, PyTorch's
own generator, and the order of the data across the end of an epoch. In float64, so that only another order of sums is between two plans. The whole
product is ``wide``; a seeded sample of it runs every time.
"""

from __future__ import annotations

import io
import itertools
import random
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo import resume, saving
from gloo.launch import ranks
from gloo.resume import FIRST, MORE, Training, Went
from torch import Tensor

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("no_waiting_for_the_disk")]
torch.set_num_threads(1)

PLANS = [  # on 1, 2, 3, 4 and 8 ranks
    "zero0", "zero1+dp2+remat", "zero2+dp4+mb2", "zero3+dp3", "zero3+dp8", "tp4", "zero1+tp2+dp2", "sp2", "zero3+sp2+dp2", "pp4+mb4", "zero3+pp2+dp2+zb",
    "zero2+pp2+dp2+mb4+interleaved2", "zero3+tp2+pp2+dp2+gpipe", "zero2+dp2+offload(optimizer)", "zero3+dp2+remat+offload(optimizer, params)",
]  # fmt: skip
SOME = random.Random(3).sample(PLANS[1:], 4)
TOLERANCE = 1e-12
WORST: dict[str, float] = {"loss": 0.0, "value": 0.0}


@cache
def trained(plan: str, dtype: torch.dtype = torch.float64) -> tuple[Training, Path, Went]:
    """Three steps, a checkpoint, three more: where it is, and what the run that is not interrupted comes to."""
    training, path = Training(plan, dtype=dtype), Path(tempfile.mkdtemp()) / "checkpoint"
    training.run(FIRST)
    training.save(path)
    return training, path, training.run(MORE)


def goes_on(training: Training, path: Path, want: Went, where: str, **options: Any) -> None:
    training.restart(5)
    training.load(path, **options)
    assert training.step.steps == FIRST
    alike(training.run(MORE), want, where)


def alike(have: Went, want: Went, where: str) -> None:
    """Exactly, but for another order of sums."""
    assert have.exactly == want.exactly, where
    assert set(have.values) == set(want.values), where
    apart = {name: off(have.values[name], t) for name, t in want.values.items()}
    worst = max(apart, key=lambda name: apart[name])
    loss = max(abs(a - b) / abs(b) for a, b in zip(have.losses, want.losses, strict=True))
    WORST.update(loss=max(WORST["loss"], loss), value=max(WORST["value"], apart[worst]))
    assert len(have.losses) == MORE and loss <= TOLERANCE, f"{where}: losses {have.losses}, not {want.losses}"
    assert apart[worst] <= TOLERANCE, f"{where}: {worst} is off by {apart[worst]}"


def off(have: Tensor, want: Tensor) -> float:
    """The largest difference, relative to the largest number of the tensor; counts and the like must be equal."""
    if want.is_floating_point() and want.numel():
        return float((have - want).abs().max()) / (float(want.abs().max()) or 1.0)
    assert torch.equal(have, want)
    return 0.0


def bitwise(have: Went, want: Went, where: str) -> None:
    assert (have.exactly, have.losses) == (want.exactly, want.losses), where
    assert not [name for name, t in want.values.items() if not torch.equal(have.values[name], t)], where


def test_the_run_has_what_a_checkpoint_must_bring_back() -> None:
    _, _, want = trained(SOME[0])
    assert want.scales[0][1] == 1 and want.scales[-1][0] > want.scales[0][0], "an overflow before, a growth after"
    assert len({tuple(rates[0]) for rates in want.rates}) == MORE, "lr moves"
    other = Training(SOME[0], seed=5)
    other.step.load(trained(SOME[0])[1])  # without what the user keeps
    assert other.run(MORE).heads != want.heads


@pytest.mark.parametrize(("first", "then"), list(zip(SOME, [*SOME[1:], SOME[0]], strict=True)))
def test_a_training_goes_on_under_another_plan(first: str, then: str) -> None:
    _, path, want = trained(first)
    goes_on(trained(then)[0], path, want, f"{first} -> {then}")


@pytest.mark.wide
@pytest.mark.parametrize("then", PLANS)
def test_every_plan_goes_on_from_every_other(then: str) -> None:
    """15 of 225 pairs. The first source is loaded before the first batch, the others by the step that has trained since; one more by a step that was never loaded
    into."""
    n = PLANS.index(then)
    fresh = Training(then, seed=3)
    for first in [*PLANS[n + 1 :], *PLANS[: n + 1]]:
        _, path, want = trained(first)
        goes_on(fresh, path, want, f"{first} -> {then}")
    _, path, want = trained(PLANS[n - 1])
    goes_on(trained(then)[0], path, want, f"{PLANS[n - 1]} -> {then}, compiled")
    print(f"-> {then}: losses within {WORST['loss']:.1e}, values within {WORST['value']:.1e}")


# mixed precision --------------------------------------------------------------------------------------------------------

MIXED = ["zero0+bf16", "zero3+dp2+bf16", "tp2+bf16", "zero2+dp2+mb2+fp16", "zero3+pp2+dp2+fp16", "zero3+dp4+fp16", "zero1+dp2"]


def round_trip(first: str, then: str, dtype: torch.dtype) -> None:
    """``first`` saves, ``then`` loads that and saves it, ``first`` goes on from there bit for bit: on the way nothing was rounded, whatever ``then`` computes in."""
    training, path, want = trained(first, torch.float32)
    other, passed = trained(then, dtype)[0], path.with_name(f"by {then}")
    other.restart(5)
    other.load(path, cast=dtype is not torch.float32)
    other.save(passed)
    training.restart(6)
    training.load(passed, cast=dtype is not torch.float32)
    bitwise(training.run(MORE), want, f"{first} -> {then} -> {first}")


@pytest.mark.parametrize(("first", "then", "dtype"), [("zero3+dp2+bf16", "zero3+dp4+fp16", torch.float32), ("zero3+dp4+fp16", "zero1+dp2", torch.float64)])
def test_mixed_precision_goes_through_any_plan_bit_for_bit(first: str, then: str, dtype: torch.dtype) -> None:
    round_trip(first, then, dtype)


@pytest.mark.wide
@pytest.mark.parametrize(("first", "then"), list(itertools.product(MIXED, MIXED)))
def test_every_mixed_precision_goes_through_every_other_bit_for_bit(first: str, then: str) -> None:
    """Parameters and moments are float32 in all of them."""
    round_trip(first, then, torch.float32)


@pytest.mark.wide
@pytest.mark.parametrize("first", MIXED[1:6:2])
def test_a_mixed_checkpoint_goes_on_alike_under_every_plan_of_float64(first: str) -> None:
    """``cast=True`` widens float32 without loss, so that all of them start from the same numbers."""
    _, path, _ = trained(first, torch.float32)
    want = None
    for then in PLANS:
        training = trained(then)[0]
        training.restart(5)
        training.load(path, cast=True)
        have = training.run(MORE)
        want = want or have
        alike(have, want, f"{first} -> {then}")


# real ranks -------------------------------------------------------------------------------------------------------------

RANKS = {  # plan -> ranks
    "zero3+dp2": 2, "sp2": 2, "zero1+dp3": 3, "zero3+dp4": 4, "zero3+tp2+dp2": 4, "zero3+pp2+dp2": 4, "zero2+dp2+offload(optimizer)": 2,
}  # fmt: skip
TARGETS = {  # each loads what these have written: 12 pairs, all on another number of ranks or from one
    "zero1+dp3": ["zero3+dp2", "zero3+pp2+dp2", "zero3+tp2+dp2"], "zero3+dp4": ["zero1+dp3", "sp2", "zero2+dp2+offload(optimizer)"],
    "zero3+tp2+dp2": ["zero3+dp2", "zero1+dp3", "sp2"], "zero3+dp2": ["zero3+dp4", "zero3+tp2+dp2", "zero3+pp2+dp2"],
}  # fmt: skip


@cache
def written(plan: str) -> tuple[str, Went]:
    folder = f"{tempfile.mkdtemp()}/checkpoint"
    found = [unpacked(each) for each in ranks(RANKS[plan], resume.writes, plan, folder)]
    for each in found[1:]:
        bitwise(each, found[0], f"{plan}: ranks")
    return folder, found[0]


def unpacked(told: dict[str, Any]) -> Went:
    return Went(told["losses"], *told["exactly"], torch.load(io.BytesIO(told["values"])))


def real(then: str, firsts: list[str]) -> None:
    for rank in ranks(RANKS[then], resume.goes_on, then, [written(first)[0] for first in firsts]):
        for first, told in zip(firsts, rank, strict=True):
            alike(unpacked(told), written(first)[1], f"{first} -> {then}, real ranks")


@pytest.mark.turn
def test_real_ranks_go_on_from_what_others_have_written() -> None:
    real("zero1+dp3", ["zero3+dp2", "sp2"])


@pytest.mark.wide
@pytest.mark.parametrize("then", TARGETS)
def test_twelve_pairs_of_real_ranks(then: str) -> None:
    real(then, TARGETS[then])
    print(f"losses within {WORST['loss']:.1e}, values within {WORST['value']:.1e}")


def test_a_rank_reads_what_it_stores_to_check_it_and_to_have_it(tmp_path: Path) -> None:
    """zero3 on four ranks, by the system's own count. A step that has a program reads a quarter to check it, and again into its place. Before the first
    batch each rank reads the parameters whole, for they go into the module, and checks a quarter of the optimizer's two thirds, which it
    reads with the first batch, sums included. What is beyond, under one per cent, is the index, the manifest, and
    the 1.4 KB that ``torch.save`` puts around a box (of 256 KiB here, which is not mapped)."""
    for rank in ranks(4, saving.reads, "zero3+dp4", str(tmp_path / "c")):
        state = rank.pop("state")
        share = {what: n / state for what, n in rank.items()}
        want = {"running": 2 / 4, "compiled": 2 / 4, "before the first batch": 2 / 3 + 2 / 3 / 4, "with the first batch": 2 / 3 / 4}
        assert share.keys() == want.keys()
        assert all(n <= share[what] <= n + 0.01 for what, n in want.items()), share
