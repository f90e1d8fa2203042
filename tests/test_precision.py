"""bf16 and fp16: parameters and state stay float32, the computation is that of the model in 16 bits, and no sum is rounded otherwise.

Where no sum is re-ordered (one rank, stages without microbatches) the compiled step equals an eager loop bit for bit, and ZeRO's stages one another. Where sums are split over ranks, each is rounded at other places; how far that may go is said beside the test.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from mixed import Eager, adamw, differing, tiny, token_loss
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

import deepseed
from deepseed import closed_forms as form
from deepseed.api import TrainStep
from deepseed.build import CompileError
from deepseed.capture import CaptureError
from deepseed.plan import PlanError, parse_plan
from deepseed.target import load
from deepseed.verify import verify

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")
MODELS = ["LlamaForCausalLM", "GPT2LMHeadModel", "T5ForConditionalGeneration"]


def found(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    it = load(f"hf:{name}")
    return it.model.eval(), it.batch  # eval: dropout draws from torch's own generator in the eager loop


def trained(model: nn.Module, batch: Any, plan: str, steps: int = 3, factory: Any = adamw, **options: Any) -> tuple[TrainStep, list[float]]:
    ours = copy.deepcopy(model)
    step = deepseed.compile(ours, plan, optimizer=factory(list(ours.parameters())), **options)
    assert isinstance(step, TrainStep)
    return step, [float(step(batch)) for _ in range(steps)]


def same_bits(step: TrainStep, losses: list[float], eager: Eager, batch: Any) -> None:
    assert losses == [float(eager.step(batch)) for _ in losses]
    assert differing(step.state_dict(), eager.parameters()) == []
    assert differing(step.optimizer_state(), eager.state()) == []


@pytest.mark.parametrize(("model", "plan"), [*((model, "bf16") for model in MODELS), ("LlamaForCausalLM", "pp2+mb1+bf16"), ("GPT2LMHeadModel", "pp2+mb1+bf16")])
def test_where_no_sum_is_reordered_bf16_is_eager_bit_for_bit(model: str, plan: str) -> None:
    module, batch = found(model)
    step, losses = trained(module, batch, plan)
    same_bits(step, losses, Eager(module, torch.bfloat16), batch)
    assert all(t.dtype is torch.float32 for t in (*step.state_dict().values(), *step.optimizer_state().values()) if t.is_floating_point())
    assert {op.type.dtype for op in step.program.ops if op.target == "aten.mm"} == {"bf16"}


@pytest.mark.parametrize("words", ["bf16", "fp16", "bf16+grads(fp32)"])
def test_zero_changes_no_bit(words: str) -> None:
    """Of two ranks the sum of two gradients is the same number whether all of it comes to each rank or a part to each."""
    model, batch = tiny()
    whole, losses = trained(model, batch, f"zero0+dp2+{words}", loss_fn=token_loss)
    for stage in (1, 2, 3):
        step, here = trained(model, batch, f"zero{stage}+dp2+{words}", loss_fn=token_loss)
        assert here == losses
        assert differing(step.state_dict(), whole.state_dict()) == differing(step.optimizer_state(), whole.optimizer_state()) == []


def test_two_ranks_differ_by_the_rounding_of_their_sums_only() -> None:
    """Two summands of a gradient are rounded to 8 bits each, and so is their sum: its error is at most two units of 2^-8 of the larger
    summand. SGD without momentum passes it on as it is, times the learning rate; the bound is of the largest entry of each gradient."""
    module, batch = found("LlamaForCausalLM")

    def plain(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=1.0)

    eager = Eager(module, torch.bfloat16, plain)
    eager.step(batch)
    for plan in ("zero0+dp2+bf16", "zero3+dp2+bf16", "tp2+bf16"):
        step, _ = trained(module, batch, plan, steps=1, factory=plain)
        have, start = step.state_dict(), dict(module.named_parameters())
        for name, want in eager.parameters().items():
            error, moved = (have[name] - want).abs().max(), (want - start[name].detach()).abs().max()
            assert error <= 8 * 2**-8 * moved, f"{plan} {name}: {float(error):.2e} of {float(moved):.2e}"


# how gradients travel ------------------------------------------------------------------------------------------------


def reductions(step: TrainStep) -> set[str]:
    """Dtypes of what is reduced from gradients: not scalars."""
    p = step.program
    return {t.dtype for op in p.ops if op.target in ("reduce_scatter.start", "all_reduce.start", "all_to_all.start") for t in op.types if t.numel > 64}


@pytest.mark.parametrize(("plan", "dtype"), [("bf16", "bf16"), ("bf16+grads(fp32)", "f32"), ("bf16+grads(bf16)", "bf16"), ("fp16", "f16"), ("fp16+grads(fp32)", "f32")])
@pytest.mark.parametrize("stage", ["zero0", "zero2+mb2", "zero3"])
def test_gradients_are_reduced_and_added_up_in_the_dtype_that_the_plan_says(plan: str, dtype: str, stage: str) -> None:
    model, batch = tiny()
    step, _ = trained(model, batch, f"{stage}+dp2+{plan}", steps=1, loss_fn=token_loss)
    assert reductions(step) == {dtype}
    added = {op.type.dtype for op in step.program.ops if op.target == "accumulate" and op.type.numel > 64}
    assert added == ({dtype} if "mb2" in stage else set())


def test_zero3_gathers_two_bytes_an_element() -> None:
    model, batch = tiny()
    sent = {}
    for plan in ("zero3+dp2", "zero3+dp2+bf16"):
        step, _ = trained(model, batch, plan, steps=1, loss_fn=token_loss)
        sent[plan] = {c.op: c.bytes for c in step.explain().collectives}
    for kind in ("all_gather", "reduce_scatter"):
        assert abs(sent["zero3+dp2+bf16"][kind] / sent["zero3+dp2"][kind] - 0.5) < 0.02, sent


def test_wider_sums_are_more_exact() -> None:
    """Over 32 microbatches: eager PyTorch adds up bf16 gradients in float32 parameters' float32 gradients, and so does grads(fp32)."""
    model, batch = tiny()
    ids, labels = (t.repeat(4, 1) for t in batch)

    def plain(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=1.0)

    eager = copy.deepcopy(model)
    total = (labels != -100).sum()
    for row, its in zip(ids, labels, strict=True):
        swapped = {name: p.bfloat16() for name, p in eager.named_parameters()}
        with _reparametrize_module(eager, swapped, tie_weights=True):
            (token_loss(eager, (row[None], its[None])) * ((its != -100).sum() / total)).backward()
    wanted = {name: p.detach() - p.grad for name, p in eager.named_parameters() if p.grad is not None}
    off = {}
    for word in ("grads(bf16)", "grads(fp32)"):
        step, _ = trained(model, (ids, labels), f"mb32+bf16+{word}", steps=1, loss_fn=token_loss, factory=plain)
        off[word] = sum(float((step.state_dict()[name] - want).norm()) for name, want in wanted.items())
    assert off["grads(fp32)"] < 0.25 * off["grads(bf16)"], off


def test_a_module_returns_gradients_as_wide_as_its_parameters() -> None:
    model, batch = tiny()
    compiled = deepseed.compile(model, "zero2+dp2+bf16", loss_fn=token_loss)
    loss, grads = compiled.loss_and_grads(batch)
    assert {g.dtype for g in grads.values()} == {torch.float32} and bool(loss.isfinite())
    assert reductions(compiled) == {"bf16"}


def test_refusals() -> None:
    with pytest.raises(PlanError, match=r"gradients are made in fp32, and bf16 does not hold(.|\n)*fix: grads\(fp32\)"):
        parse_plan("fp32+grads(bf16)")
    with pytest.raises(PlanError, match="fp16 does not hold what bf16 does"):
        parse_plan("bf16+grads(fp16)")
    model, batch = tiny()
    with pytest.raises(CaptureError, match=r"the gradient of 'words.weight' is made in f32, and is to be reduced in bf16(.|\n)*fix: compute in that dtype"):
        trained(model, batch, "zero1+dp2+grads(bf16)", loss_fn=token_loss)
    assert str(parse_plan("grads(fp32)+bf16+zero2")) == "zero2+bf16+grads(fp32)"


# autocast ------------------------------------------------------------------------------------------------------------


def cast_loss(model: nn.Module, batch: Any) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return token_loss(model, batch)


@pytest.mark.parametrize("plan", ["zero0", "zero3+dp2", "tp2"])
def test_the_users_autocast_is_part_of_the_program(plan: str) -> None:
    model, batch = tiny()
    step, losses = trained(model, batch, plan, loss_fn=cast_loss)
    assert {op.type.dtype for op in step.program.ops if op.target in ("aten.mm", "aten.bmm", "aten.addmm") and op.phase == "forward"} == {"bf16"}
    eager = Eager(model, torch.float32, adamw, cast_loss)
    want = [float(eager.step(batch)) for _ in losses]
    if plan == "zero0":
        assert losses == want and differing(step.state_dict(), eager.parameters()) == []
    assert max(abs(a - b) for a, b in zip(losses, want, strict=True)) <= 2**-7 * want[0]
    if plan == "zero3+dp2":  # cast, then gathered; autocast leaves a lookup in float32
        gathered = {(t.dtype, r.startswith("words")) for op in step.program.ops if op.target == "all_gather.start" for r, t in zip(op.results, op.types, strict=True) if t.numel > 512}
        assert gathered == {("bf16", False), ("f32", True)}


def test_autocast_around_the_step_is_refused() -> None:
    model, batch = tiny()
    step, _ = trained(model, batch, "", steps=1, loss_fn=token_loss)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(CompileError, match=r"inside of torch.autocast(.|\n)*fix: enter it in the model's forward"):
        step(batch)


def test_autocast_of_another_device_is_refused_not_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny()
    entered: list[str] = []
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind in entered)  # a machine without such a device cannot enter it

    def other(model: nn.Module, batch: Any) -> Tensor:
        entered.append("cuda")
        return token_loss(model, batch)

    with pytest.raises(CaptureError, match=r'enters torch.autocast\("cuda"\)(.|\n)*mixed.py:(.|\n)*fix: leave it out'):
        trained(model, batch, "", loss_fn=other)


# the structure, in float64 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["zero3+dp2+fp16", "zero1+tp2+dp2+bf16+grads(fp32)", "pp2+mb2+fp16"])
def test_the_structure_is_verified_in_float64(plan: str) -> None:
    model, batch = tiny()
    report = verify(model, batch, plan, loss_fn=token_loss)
    assert report.ok, str(report)


# what is stored ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "words"), [(2, "bf16"), (4, "fp16+remat"), (2, "bf16+mb2+offload(optimizer)")])
def test_bytes_of_a_parameter_are_those_of_the_closed_form(ranks: int, words: str) -> None:
    """Of each stage, in the program of each rank: the float32 parameter, the cast that is gathered for the step, the gradient as it is clipped, two moments. ZeRO's own count
    is met or beaten at every stage."""
    model, batch = tiny()
    count, n = sum(p.numel() for p in model.parameters()), ranks
    for stage, terms in ((0, (4, 0, 2, 8)), (1, (4 / n, 2, 2 / n, 8 / n)), (2, (4 / n, 2, 2 / n, 8 / n)), (3, (4 / n, 0, 2 / n, 8 / n))):
        step, _ = trained(model, batch, f"zero{stage}+dp{n}+{words}", steps=1, loss_fn=token_loss)
        for rank in step.explain().ranks:
            found = (rank.param_bytes, rank.gathered_bytes, rank.grad_bytes, rank.optimizer_bytes)
            assert [b / count for b in found] == pytest.approx(terms, rel=0.02), stage
            assert sum(found) / count <= 1.02 * form.value(form.zero_bytes(stage), N=n)
        rows = {row.what: row for row in step.explain().closed_forms}
        assert ("gathered once" in rows) == (stage in (1, 2))
        for row in (rows[what] for what in ("parameters", "gathered once", "gradients", "optimizer", "stored") if what in rows):
            assert row.counted == pytest.approx(row.expected, rel=0.01), row
        assert rows["sent over dp"].counted <= 1.01 * (rows["sent over dp"].expected or 0)


@pytest.mark.parametrize("plan", ["zero1+dp2+bf16", "zero2+dp2+bf16", "zero2+dp2+bf16+mb2", "zero2+dp2+bf16+mb2+offload(optimizer)"])
def test_what_ranks_hold_between_and_in_steps_is_what_is_said(plan: str) -> None:
    """Counted on the tensors themselves: what a rank's state takes, and what a step of it holds at once."""
    model, batch = tiny()
    step, _ = trained(model, batch, plan, steps=1, loss_fn=token_loss, device_memory="unlimited")
    for state, rank, counted in zip(step.states, step.explain().ranks, step.counted_peak_bytes, strict=True):
        held = {role: sum(x.nbytes for (of, _), x in state.tensors.items() if of == role) for role in ("param", "state")}
        assert held == {"param": rank.param_bytes, "state": rank.optimizer_bytes}
        assert rank.peak_bytes == pytest.approx(counted["device"], rel=0.01)


def test_a_cast_is_gathered_once_a_step_and_in_16_bits() -> None:
    """Below stage 3, however many microbatches there are; the new parameter is not gathered. With parameters on the host each use gathers its own."""
    model, batch = tiny()

    def gathers(plan: str) -> int:
        step, _ = trained(model, batch, plan, steps=1, loss_fn=token_loss)
        return sum(c.bytes for c in step.explain().collectives if c.op == "all_gather")

    once = sum(p.numel() for p in model.parameters())  # half of the bf16 bytes
    assert gathers("zero2+dp2+bf16") == gathers("zero1+dp2+bf16+mb4") == gathers("zero2+dp2+bf16+mb4") == once
    assert gathers("zero2+dp2+bf16+mb2+offload(optimizer,params)") > 3 * once


@pytest.mark.parametrize("word", ["bf16", "fp16"])
@pytest.mark.parametrize("training", [True, False])
def test_a_batch_norm_whose_statistics_stay_in_32_bits(word: str, training: bool) -> None:
    """Torch has no kernel for them beside a weight in 16: it runs in pieces. Outputs keep 8 bits, statistics 32."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 1)).train(training)
    theirs, x = copy.deepcopy(model), torch.randn(16, 4)
    compiled = deepseed.compile(model, f"zero0+{word}")
    out = compiled(x)
    out.float().sum().backward()
    want = theirs(x)
    assert (out.float() - want).abs().max() <= 2**-6 * want.abs().max()
    assert model[1].running_mean.dtype == torch.float32 and (model[1].running_mean - theirs[1].running_mean).abs().max() <= 2**-8
