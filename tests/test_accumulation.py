"""ZeRO under gradient accumulation, counted while it runs: bytes sent, gradients held from one microbatch to the next, weights gathered at once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from counting import SCALARS, agrees, alive_before, counted, main_loop

import deepseed
from deepseed import closed_forms as form
from deepseed.runtime.simulate import SimulatedRuntime
from deepseed.target import load

pytest.importorskip("transformers")

N, M = 2, 4
LLAMA = "hf:LlamaForCausalLM(vocab_size=1024,batch_size=16)"
wide = pytest.mark.wide
STAGES = [*(pytest.param(n, marks=wide) for n in (0, 1)), 2, 3]


def plan(stage: int) -> str:
    return f"zero{stage}+dp{N}+mb{M}"


def parameter_bytes() -> int:
    return sum(p.numel() * p.element_size() for p in load(LLAMA, meta=True).model.parameters())


def modules() -> list[int]:
    """Bytes of the parameters that each module has of its own, largest first."""
    each = [sum(p.numel() * p.element_size() for p in m.parameters(recurse=False)) for m in load(LLAMA, meta=True).model.modules()]
    return sorted(each, reverse=True)


def volume(stage: int) -> float:
    """2 Psi (stages 0 and 1), (m + 1) Psi (2), 3 m Psi (3), times (N - 1) / N."""
    times = {0: 2, 1: 2, 2: M + 1, 3: 3 * M}[stage]
    expected = times * parameter_bytes() * (N - 1) / N
    assert form.value(form.data_volume(stage, True), Psi=parameter_bytes(), N=N, t=1, m=M) == expected
    return expected


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.turn
def test_bytes_sent_over_gloo(stage: int) -> None:
    for rank in counted(LLAMA, plan(stage), N):
        sent, e = rank["sent"]["dp"], rank["explain"]
        assert sent <= 1.01 * volume(stage)
        if stage < 3:  # the embedding's rows are looked up: its weight is not read in the backward
            assert sent >= 0.99 * volume(stage)
        assert abs(sent - sum(c["bytes"] for c in e["collectives"])) <= SCALARS
        (row,) = (c for c in e["closed_forms"] if c["what"] == "sent over dp")
        assert row["expected"] == volume(stage)
        assert abs(row["counted"] - sent) <= SCALARS


@pytest.mark.parametrize("stage", STAGES)
def test_bytes_sent_in_simulation(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: Counter[int] = Counter()
    exchange = SimulatedRuntime.exchange
    shares = {"all_gather": N - 1, "all_reduce": 2 * (N - 1) / N, "reduce_scatter": (N - 1) / N}

    def counting(self: SimulatedRuntime, kind: str, x: torch.Tensor, axis: str, reduce: str, **kwargs: Any) -> Any:
        sent[self.rank] += int(x.numel() * x.itemsize * shares[kind])
        return exchange(self, kind, x, axis, reduce, **kwargs)

    found = load(LLAMA)
    step = deepseed.compile(found.model, plan(stage), optimizer=torch.optim.AdamW(found.model.parameters()), clip_grad_norm=1.0)
    step(found.batch)
    monkeypatch.setattr(SimulatedRuntime, "exchange", counting)
    step(found.batch)
    said = sum(c.bytes for c in step.explain().collectives)
    for rank in range(N):
        assert abs(sent[rank] - said) <= SCALARS
        assert 0.99 * volume(stage) * (stage < 3) <= sent[rank] <= 1.01 * volume(stage)


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_held_from_one_microbatch_to_the_next(stage: int) -> None:
    """All bytes that the step has made and still holds when the next forward begins: whole gradients below stage 2, a rank's shards from there on."""
    held = parameter_bytes() / (N if stage >= 2 else 1)
    for rank in counted(LLAMA, plan(stage), N):
        first, *others = alive_before(rank, main_loop(rank, "forward"))
        assert len(others) == M - 1
        assert first <= 0.01 * held
        for alive in others:
            assert abs(alive - held) <= 0.01 * held


def test_stage_3_gathers_no_more_than_two_modules_at_once() -> None:
    """Counted from what all_gathers write, and what is laid out from it; and as the whole peak against stage 2's, which has the same gradients,
    activations and messages, and no gathered weight in its loops. A bucket of 25 MiB would hold the whole model."""
    two = sum(modules()[:2])
    assert two < 0.7 * parameter_bytes()
    for rank, whole in zip(counted(LLAMA, plan(3), N), counted(LLAMA, plan(2), N), strict=True):
        assert 0 < rank["gathered"] <= two
        loops = [peak for (name, _, _), peak in zip(whole["between"], whole["peaks"], strict=True) if not name.startswith("once")]
        assert max(rank["peaks"]) <= max(loops) + two


@pytest.mark.parametrize("stage", STAGES)
def test_the_peak_is_the_predicted_one(stage: int) -> None:
    for n, rank in enumerate(counted(LLAMA, plan(stage), N)):
        agrees(rank, n)


@wide
def test_without_stages_the_peak_falls_as_microbatches_grow_in_number() -> None:
    """The batch is the same: what lives from forward to backward is an m-th of it, and one gradient accumulator is added."""
    peaks = {}
    for m in (2, 4, 8):
        (rank,) = counted(LLAMA, f"dp1+mb{m}", 1)
        agrees(rank, 0)
        peaks[m] = max(alive_before(rank, main_loop(rank, "backward"))[:1])
    assert all(peaks[2 * m] == pytest.approx(peaks[m] / 2, rel=0.02) for m in (2, 4))
