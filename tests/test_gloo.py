"""Real ranks over gloo: equal to eager PyTorch at the tolerances of the simulation, and the same program, by its hash.

Each run over several cases is one start of processes. One plan of each kind runs every time; the whole product is ``wide``.
"""

from __future__ import annotations

import io
import itertools

import pytest
import torch
from gloo import state
from gloo.equality import Case, equal, float32
from gloo.launch import ranks
from matrix import LR, MODELS, OPTIMIZERS, STEPS

from deepseed.plan import PlanError
from deepseed.runtime.errors import RankError
from deepseed.verify_ranks import verify_ranks

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

TWO: list[Case] = [
    ("llama", "zero0", "adamw"), ("bert", "zero1", "adamw"), ("mlp", "zero2", "sgd"), ("gpt2", "zero3", "adamw"), ("llama", "tp2", "sgd"), ("gpt2", "sp2", "adamw"),
]  # fmt: skip
THREE: list[Case] = [("llama", "zero3", "adamw"), ("gpt2", "tp3", "sgd"), ("bert", "zero2", "adamw")]  # nothing divides by three
FOUR: list[Case] = [("mlp", "zero1+tp2", "adamw"), ("gpt2", "zero3+tp2", "sgd")]
KINDS = {2: ["zero0", "zero1", "zero2", "zero3", "tp2", "sp2"], 3: ["zero1", "zero3", "tp3", "sp3"], 4: ["zero0", "zero3", "tp4", "zero1+tp2", "zero3+tp2"]}


def test_two_ranks_are_eager_in_float64_and_run_the_simulations_program() -> None:
    equal(2, TWO)


@pytest.mark.wide
def test_three_ranks_hold_uneven_parts() -> None:
    equal(3, THREE)


@pytest.mark.turn
def test_four_ranks_are_eager_in_float64_and_run_the_simulations_program() -> None:
    equal(4, FOUR)


def sensible(case: Case) -> bool:
    """Rows of features have no sequence to split."""
    return not (case[0] == "mlp" and case[1].startswith("sp"))


@pytest.mark.wide
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("number", KINDS)
def test_every_model_and_plan_on_real_ranks(number: int, model: str) -> None:
    equal(number, [case for case in itertools.product([model], KINDS[number], OPTIMIZERS) if sensible(case)])


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
    check_float32(number, [case for case in itertools.product(MODELS, KINDS[number], OPTIMIZERS) if sensible(case)])


# what a rank stores -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["zero1", "zero3", pytest.param("zero0", marks=pytest.mark.wide), pytest.param("zero2", marks=pytest.mark.wide), pytest.param("tp2", marks=pytest.mark.wide)])
def test_a_rank_stores_its_share_and_trains_without_the_models_forward(plan: str) -> None:
    want, parameters = state.reference()
    for got in ranks(2, state.stored, plan):
        numel = got["numel"]
        share = 8 * numel * {"zero0": 3, "zero1": 2, "zero2": 2}.get(plan, 1.5)  # parameters, and two moments of AdamW
        for when in ("compiled", "trained"):
            assert abs(got[when] - share) <= 0.01 * share, f"{when}: {got[when]} bytes live, {share} are the rank's share"
        assert got["same objects"] and got["tied"] and got["equal"]
        assert got["lr"] == pytest.approx(1e-2 * 0.5**4)
        assert got["losses"] == pytest.approx(want, rel=1e-12)
        names = ["down.bias", "down.weight", "embed.weight", "head.weight", "up.weight"]
        assert got["dtensors"] == (names if plan in ("zero3", "tp2") else [])
        assert all(len(p) == 1 and p[0].startswith(("S(", "_S")) for p in got["placements"].values())
        whole = torch.load(io.BytesIO(got["whole"]))
        assert list(whole) == list(parameters)  # the user's own names, in the module's own order, tied ones included
        for name, p in parameters.items():
            torch.testing.assert_close(whole[name], p, rtol=1e-10, atol=1e-10)
        assert {key.partition("/")[2] for key in got["optimizer"]} == {"down.bias", "down.weight", "embed.weight", "up.weight"}


def test_the_users_module_is_usable_after_training_on_one_rank() -> None:
    state.one_rank()


# verify_ranks -----------------------------------------------------------------------------------------------------------


@pytest.mark.turn
def test_verify_ranks_starts_the_ranks_itself() -> None:
    report = verify_ranks("hf:BertForMaskedLM", "zero2", world_size=2, optimizer="sgd(lr=0.01, momentum=0.9)", steps=2)
    assert report.ok, str(report)
    assert (report.backend, report.world_size, report.steps) == ("gloo", 2, 2)


@pytest.mark.turn
def test_verify_ranks_says_what_a_rank_said() -> None:
    with pytest.raises(PlanError, match="did you mean zero2"):
        verify_ranks("hf:BertForMaskedLM", "zer2", world_size=2)
    with pytest.raises(RankError, match=r"rank 0 of 2: CaptureError: optimizer LBFGS cannot be traced(.|\n)*fix:"):
        verify_ranks("hf:BertForMaskedLM", "zero1", world_size=2, optimizer="lbfgs")
