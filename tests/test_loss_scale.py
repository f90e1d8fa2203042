"""fp16: the loss is scaled, an overflow on any rank skips the step on all of them, and all of it is state that checkpoints carry.

The reference is ``torch.amp.GradScaler`` around an eager loop. In float64, where no sum is rounded enough to matter, every plan must
equal it to 1e-10; in fp16 itself, bit for bit where no sum is re-ordered.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from gloo.launch import ranks
from gloo.scaled import BAD, STEPS, Run, adamw, batches, mlp, mse, run, runs
from mixed import Eager, differing

import deepseed
from deepseed.api import TrainStep
from deepseed.build import CompileError

pytestmark = pytest.mark.filterwarnings("ignore")
PLANS = ["zero0+dp2", "zero1+dp2", "zero2+dp2+mb2", "zero3+dp2", "tp2", "pp2+mb2", "zero3+dp2+tp2"]


def eager(clip: float | None, dtype: torch.dtype, compute: torch.dtype, window: int) -> Run:
    loop = Eager(mlp(dtype), compute, adamw, mse, clip, 2.0**16, window)
    losses, scales, skipped = [], [], []
    for batch in batches(dtype):
        losses.append(float(loop.step(batch)))
        scales.append(loop.scaler.get_scale())
        skipped.append(int(loop.skipped))
    return Run(losses, scales, skipped, dict(loop.parameters()), dict(loop.state()))


def check(have: Run, want: Run) -> None:
    assert have.scales == want.scales and have.skipped == want.skipped
    assert have.skipped[BAD] == have.skipped[BAD - 1] + 1 and have.scales[BAD] == have.scales[BAD - 1] / 2, "the injected overflow"
    assert max(have.scales) > have.scales[0], "the scale grew too"
    for n, (a, b) in enumerate(zip(have.losses, want.losses, strict=True)):
        assert n == BAD or abs(a - b) <= 1e-12 * abs(b)
    assert not math.isfinite(have.losses[BAD])
    for name, w in want.parameters.items():
        assert (have.parameters[name] - w).abs().max() <= 1e-10 * w.abs().max(), name
    for name, w in want.state.items():
        assert (have.state[name] - w).abs().max() <= 1e-10 * max(1e-3, float(w.abs().max())), name
    steps = {float(t) for name, t in have.state.items() if name.startswith("step/")}
    assert steps == {STEPS - have.skipped[-1]}, "skipped steps are not counted"


@pytest.mark.parametrize(("plan", "clip"), [pytest.param(plan, clip, marks=[pytest.mark.wide] * ((n + k) % 2)) for n, plan in enumerate(PLANS) for k, clip in enumerate((None, 0.5))])
def test_every_plan_trains_as_a_grad_scaler_does(plan: str, clip: float | None) -> None:
    check(run(plan, clip, "simulate", torch.float64, 2), eager(clip, torch.float64, torch.float64, 2))


def test_two_real_ranks_skip_together() -> None:
    want = eager(1.0, torch.float64, torch.float64, 2)
    for results in ranks(2, runs, ["zero1", "zero3", "tp2", "pp2+mb2"]):
        for have in results:
            check(have, want)


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("plan", ["fp16", "pp2+mb1+fp16"])
def test_fp16_is_a_grad_scaler_bit_for_bit(plan: str, clip: float | None) -> None:
    """With clipping two norms meet, ours a root of a sum of squares, torch's a norm of norms: the last bit of it may differ."""
    have, want = run(plan, clip, "simulate", torch.float32, 2), eager(clip, torch.float32, torch.float16, 2)
    assert (have.scales, have.skipped) == (want.scales, want.skipped) and have.skipped[-1] >= 1
    if clip is None:
        assert differing(have.parameters, want.parameters) == differing(have.state, want.state) == []
        assert [x for x in have.losses if math.isfinite(x)] == [x for x in want.losses if math.isfinite(x)]
    for name, w in want.parameters.items():
        assert (have.parameters[name] - w).abs().max() <= 1e-6


@pytest.mark.parametrize("plan", ["zero1+dp2+fp16", "zero3+dp2+mb2+fp16", "tp2+fp16"])
def test_fp16_on_two_ranks_skips_the_same_steps(plan: str) -> None:
    have, want = run(plan, None, "simulate", torch.float32, 1000), eager(None, torch.float32, torch.float16, 1000)
    assert (have.scales, have.skipped) == (want.scales, want.skipped) and want.skipped[-1] == 1
    for a, b in zip(have.losses, want.losses, strict=True):
        assert abs(a - b) <= 2**-9 * abs(b) or not math.isfinite(b)


def made(plan: str, **options: object) -> TrainStep:
    model = copy.deepcopy(mlp())
    step = deepseed.compile(model, plan, optimizer=adamw(list(model.parameters())), loss_fn=mse, **options)  # type: ignore[arg-type]
    assert isinstance(step, TrainStep)
    return step


def test_a_checkpoint_carries_the_scale_and_what_led_to_it(tmp_path: Path) -> None:
    """Saved between an overflow and the growth that follows, and gone on from under another plan."""
    given, scale = batches(), deepseed.LossScale(window=2)
    whole, first, second = (made(plan, loss_scale=scale) for plan in ("pp2+mb2+fp16", "pp2+mb2+fp16", "zero3+dp2+fp16"))
    for batch in given:
        whole(batch)
    for batch in given[: BAD + 2]:
        first(batch)
    assert first.skipped == 1
    first.save(tmp_path / "ckpt")
    second.load(tmp_path / "ckpt")
    for batch in given[BAD + 2 :]:
        second(batch)
    assert (second.loss_scale, second.skipped) == (whole.loss_scale, whole.skipped)
    assert whole.loss_scale != 2.0**16 or whole.skipped > 1
    for name, t in whole.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], t, rtol=0, atol=2e-2)


def test_a_checkpoint_without_a_scale_starts_one(tmp_path: Path) -> None:
    before, after = made("zero1+dp2"), made("zero1+dp2+fp16")
    before(batches()[0])
    before.save(tmp_path / "ckpt")
    after(batches()[BAD])
    assert (after.loss_scale, after.skipped) == (2.0**15, 1)
    after.load(tmp_path / "ckpt")
    assert (after.loss_scale, after.skipped) == (2.0**16, 0)
    after(batches()[1])
    assert after.skipped == 0


def test_the_optimizers_state_dict_is_the_users(tmp_path: Path) -> None:
    step = made("zero1+dp2+fp16")
    step(batches()[0])
    assert isinstance(step.optimizer, torch.optim.Optimizer)
    state = step.optimizer.state_dict()
    assert {slot for slots in state["state"].values() for slot in slots} == {"step", "exp_avg", "exp_avg_sq"}
    step.optimizer.load_state_dict(state)
    assert (step.loss_scale, step.skipped) == (2.0**16, 0)


def test_hysteresis_is_deepspeeds() -> None:
    """The scale falls at the second overflow since it last grew, and at each one after that."""
    good, bad = batches()[0], batches()[BAD]
    step = made("fp32", loss_scale=deepseed.LossScale(initial=64.0, window=3, minimum=16.0, hysteresis=2))
    pattern = "bggbgbbgggbbbbbggggg"
    scale, left, run_of = 64.0, 2, 0
    for c in pattern:
        step(good if c == "g" else bad)
        if c == "b":
            scale, left, run_of = max(scale / 2, 16.0) if left == 1 else scale, max(left - 1, 1), 0
        else:
            run_of += 1
            if run_of == 3:
                scale, left, run_of = scale * 2, 2, 0
        assert step.loss_scale == scale, pattern
    assert step.skipped == pattern.count("b")


def test_a_number_stays_and_still_skips() -> None:
    step = made("zero2+dp2+fp16", loss_scale=1024)
    start = {name: t.clone() for name, t in step.state_dict().items()}
    step(batches()[BAD])
    assert (step.loss_scale, step.skipped) == (1024.0, 1) and differing(step.state_dict(), start) == []
    step(batches()[0])
    assert (step.loss_scale, step.skipped) == (1024.0, 1) and differing(step.state_dict(), start) != []


def test_small_gradients_survive_by_the_scale() -> None:
    """A loss of 1e-7 has gradients that are zeros in fp16."""

    def faint(model: torch.nn.Module, batch: object) -> torch.Tensor:
        return mse(model, batch) * 1e-7

    moved = {}
    for scale in (1.0, 2.0**16):
        model = mlp()
        step = deepseed.compile(model, "fp16", optimizer=torch.optim.SGD(model.parameters(), lr=1e5), loss_fn=faint, loss_scale=scale)
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        step(batches()[0])
        moved[scale] = sum(float((p.detach() - start[name]).abs().sum()) for name, p in model.named_parameters())
    assert moved[2.0**16] > 0.01 and moved[1.0] == 0, moved


def test_without_a_scale() -> None:
    step = made("bf16")
    step(batches()[0])
    assert (step.loss_scale, step.skipped) == (1.0, 0) and not any(i.key == "loss_scale" for i in step.program.inputs)


def test_refusals() -> None:
    with pytest.raises(CompileError, match=r"loss_scale=2\.0 without an optimizer"):
        deepseed.compile(mlp(), "fp16", loss_fn=mse, loss_scale=2.0)
    with pytest.raises(CompileError, match=r"loss_scale='dynamic'(.|\n)*fix: a deepseed.LossScale"):
        made("fp16", loss_scale="dynamic")
    for options, said in (({"initial": 0.0}, "initial=0.0"), ({"factor": 1.0}, "factor=1.0"), ({"minimum": 2.0**17}, "minimum=131072.0"), ({"hysteresis": 0}, "hysteresis=0"), ({"window": -1}, "window=-1")):
        with pytest.raises(ValueError, match=f"LossScale: {said}"):
            deepseed.LossScale(**options)  # type: ignore[arg-type]
