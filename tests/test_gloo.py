"""Real ranks over gloo: equal to eager PyTorch at the tolerances of the simulation, and the same program, by its hash.

Each run over several cases is one start of processes. One plan of each kind runs every time; the whole product is ``wide``.
"""

from __future__ import annotations

import itertools

import pytest
from gloo.equality import LR, MODELS, OPTIMIZERS, STEPS, Case, float32, simulated_hash, verified
from gloo.launch import ranks

from deepseed.verify import LOSS_TOLERANCE, TOLERANCE

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

TWO: list[Case] = [
    ("llama", "zero0", "adamw"), ("bert", "zero1", "adamw"), ("mlp", "zero2", "sgd"), ("gpt2", "zero3", "adamw"), ("llama", "tp2", "sgd"),
]  # fmt: skip
FOUR: list[Case] = [("mlp", "zero1+tp2", "adamw"), ("gpt2", "zero3+tp2", "sgd")]
KINDS = {2: ["zero0", "zero1", "zero2", "zero3", "tp2"], 4: ["zero0", "zero3", "tp4", "zero1+tp2", "zero3+tp2"]}


def check(number: int, cases: list[Case]) -> None:
    got = ranks(number, verified, cases)
    for n, case in enumerate(cases):
        expected = simulated_hash(case, number)
        for rank in range(number):
            report = got[rank][n]
            assert report.ok, f"{case} on rank {rank}: {report}"
            assert report.loss_rel_error <= LOSS_TOLERANCE and max(report.grad_max_rel_error, report.param_max_rel_error) <= TOLERANCE
            assert report.program_hash == expected, f"{case}: rank {rank} ran another program than the simulation"
            assert (report.backend, report.world_size) == ("gloo", number) and report.instances_checked > 10


def test_two_ranks_are_eager_in_float64_and_run_the_simulations_program() -> None:
    check(2, TWO)


def test_four_ranks_are_eager_in_float64_and_run_the_simulations_program() -> None:
    check(4, FOUR)


@pytest.mark.wide
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("number", KINDS)
def test_every_model_and_plan_on_real_ranks(number: int, model: str) -> None:
    check(number, [(model, plan, optimizer) for plan, optimizer in itertools.product(KINDS[number], OPTIMIZERS)])


def check_float32(number: int, cases: list[Case]) -> None:
    for rank, errors in enumerate(ranks(number, float32, cases)):
        for (model, plan, optimizer), (loss, relative, difference) in zip(cases, errors, strict=True):
            where = f"{model} {plan} {optimizer}, rank {rank}"
            assert loss <= 1e-5, where
            if optimizer == "sgd":
                assert relative <= 1e-5, where
            else:
                assert difference <= 0.1 * LR[optimizer] * STEPS, where


def test_float32_stays_beside_eager_float32() -> None:
    check_float32(2, [("llama", "zero3", "adamw"), ("mlp", "tp2", "sgd"), ("gpt2", "zero1", "sgd")])


@pytest.mark.wide
@pytest.mark.parametrize("number", KINDS)
def test_float32_on_every_model_and_plan(number: int) -> None:
    check_float32(number, list(itertools.product(MODELS, KINDS[number], OPTIMIZERS)))
