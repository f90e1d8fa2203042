"""Microbatches without a pipeline: gradient accumulation that equals one batch, less memory, batch norms, and what cannot be cut."""

from __future__ import annotations

import copy
import gc
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cost_worker import Peak
from pipeline_cases import CLIP
from pipeline_cases import built as transformer
from pipeline_models import Residual, built, classes
from small import small
from torch import Tensor, nn

from deepseed import pipeline
from deepseed.api import TrainStep
from deepseed.codegen.python import generate
from deepseed.idle import idle_share
from deepseed.ir.contract import PassError
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Op, Ref
from deepseed.ir.schedule import kind_of
from deepseed.ir.text import parse
from deepseed.passes import loop_microbatches
from deepseed.runtime.executable import Executable
from deepseed.target import load
from deepseed.verify import verify

pytest.importorskip("transformers")
torch.set_num_threads(1)
wide = pytest.mark.wide

# One layer and a loss over a count of its own, as a masked loss has it; gradient descent with momentum.
STEP = """program step mesh() facts(canonical, captured)
%w : f64[8, 4] param "w"
%m : f64[8, 4] state "m/w"
%x : f64[8, 8] batch "x"
%n : f64[8] batch "n"
%count = sum(%n, dims=[0], keepdim=false) : f64[] {at="loss", phase="forward"}
%y = aten.mm(%x, %w) : f64[8, 4] {at="layer", phase="forward"}
%sq = aten.mul.Tensor(%y, %y) : f64[8, 4] {at="loss", phase="forward"}
%s = sum(%sq, dims=[0, 1], keepdim=false) : f64[] {at="loss", phase="forward"}
%loss = aten.div.Tensor(%s, %count) : f64[] {at="loss", phase="forward"}
%y2 = aten.mul.Tensor(%y, 2.0) : f64[8, 4] {at="loss", phase="backward"}
%g = aten.div.Tensor(%y2, %count) : f64[8, 4] {at="loss", phase="backward"}
%x.t = permute(%x, dims=[1, 0]) : f64[8, 8] {at="layer", phase="backward"}
%dw = aten.mm(%x.t, %g) : f64[8, 4] {at="layer", phase="backward"}
%m.old = aten.mul.Tensor(%m, 0.9) : f64[8, 4] {phase="update"}
%m.new = aten.add.Tensor(%m.old, %dw) : f64[8, 4] {phase="update"}
%w.new = aten.sub.Tensor(%w, %m.new) : f64[8, 4] {phase="update"}
return %loss loss "loss"
return %w.new param "w"
return %m.new state "m/w"
"""


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def compiled(model: nn.Module, batch: Any, plan: str, loss: Any = classes, quiet: bool = True, **options: Any) -> TrainStep:
    return TrainStep(model, plan, optimizer=sgd(model.parameters()), loss_fn=loss, quiet=quiet, **options).compile(batch)


def rows(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 6, generator=generator), torch.arange(n) % 3


def mlp(layers: int = 4) -> nn.Module:
    return nn.Sequential(*(each for _ in range(layers) for each in (nn.Linear(6, 6), nn.ReLU())))


# the loop --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "zero"), [(1, 0), (2, 1), (2, 2), (2, 3)], ids=["one-rank", "zero1", "zero2", "zero3"])
def test_the_loops_of_a_step(ranks: int, zero: int, golden: Callable[[object], None]) -> None:
    """Labels are counted in a loop of their own. From one microbatch to the next a gradient is whole on one rank, each rank's summand
    under zero1 and its shard from zero2 on, where each microbatch sends; under zero3 the weight is gathered in the loop."""
    args = pipeline.arguments(Mesh((("dp", ranks), ("mb", 2)) if ranks > 1 else (("mb", 2),)), zero, {})
    passes = [pipeline.BY_NAME[name] for name in ("solve_placements", "insert_reshards", "lower_reshards", "loop_microbatches")]
    done = pipeline.run(parse(STEP), args, passes)
    golden(done[-1].program)


SENDS = [("zero1+dp2+mb2", set()), ("zero2+dp2+mb2", {"reduce_scatter"}), ("zero3+dp2+mb2", {"all_gather", "reduce_scatter"})]


@pytest.mark.parametrize(("plan", "sends"), [SENDS[0], *(pytest.param(*case, marks=wide) for case in SENDS[1:])])
def test_what_a_microbatch_sends_over_dp(plan: str, sends: set[str]) -> None:
    """Below zero2 nothing, not even its part of the loss or of the number of labels."""
    found = load("hf:LlamaForCausalLM(num_hidden_layers=1)", meta=True)
    program = compiled(found.model, found.batch, plan, None, clip_grad_norm=CLIP).program
    started = [op for op in program.ops if op.target.endswith(".start")]
    assert {op.target.removesuffix(".start") for op in started if kind_of(op.part) != "once"} == sends
    assert any(kind_of(op.part) == "once" for op in started)


# equal to one batch ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "plan"),
    [("llama", "mb4"), ("gpt2", "mb2"), *(pytest.param(*case, marks=wide) for case in (
        ("llama", "mb2"), ("llama", "mb8"), ("gpt2", "zero2+dp2+mb2"), ("t5", "mb2"), ("bert", "zero1+dp2+tp2+mb2"), ("llama", "zero3+dp2+sp2+mb2"),
    ))],
)  # fmt: skip
def test_microbatches_are_one_batch(name: str, plan: str) -> None:
    """Each row ignores another number of labels; GPT-2, BERT and T5 drop out a tenth, of the same elements as in one batch."""
    model, batch = transformer(name, 1)
    if name in ("gpt2", "bert", "t5"):
        assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.1}
    assert len(set((batch["labels"] == -100).sum(-1).tolist())) > 2
    report = verify(model, batch, plan, clip_grad_norm=CLIP, steps=2)
    assert report.ok, report


@wide
@pytest.mark.parametrize("plan", ["mb4", "ep2+mb2", "zero3+dp2+ep2+mb2", "ep2+pp2+mb2"])
def test_experts_take_the_rows_of_a_microbatch(plan: str) -> None:
    found = load("hf:MixtralForCausalLM(num_hidden_layers=1)")
    report = verify(found.model, found.batch, plan, steps=2)
    assert report.ok, report


def test_a_loss_that_compares_rows_cannot_be_cut() -> None:
    model, batch, loss = built("contrastive towers")
    with pytest.raises(PassError, match=r"%\S+ = \S+ .*\(pipeline_models.py:\d+\) needs %\S+ \[8, 16\] of all 2 microbatches at once(.|\n)*fix: a plan without mb"):
        compiled(model, batch, "mb2", loss)


# memory ------------------------------------------------------------------------------------------------------------------


def test_more_microbatches_take_less_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what stays between steps, counted while a step runs, and as explain predicts it. One microbatch has no accumulators."""
    found, counted = load("hf:LlamaForCausalLM(num_hidden_layers=1,batch_size=16)"), {}
    given = sum(t.nbytes for t in found.batch.values())
    run = Executable.__call__

    def watched(self: Executable, rt: Any, inputs: list[Tensor]) -> Any:
        with Peak() as seen:
            out = run(self, rt, inputs)
        counted[m] = seen.peak
        return out

    for m in (1, 2, 8):
        step = compiled(copy.deepcopy(found.model), found.batch, f"mb{m}", None, clip_grad_norm=CLIP)
        step(found.batch)
        gc.collect()
        with monkeypatch.context() as patch:
            patch.setattr(Executable, "__call__", watched)
            step(found.batch)
        (rank,) = step.explain().ranks
        said = rank.peak_bytes - rank.param_bytes - rank.optimizer_bytes - rank.other_bytes - given
        assert abs(counted[m] - said) <= 0.01 * said, f"mb{m}: {counted[m]:,} bytes are held at once, {said:,} are predicted"
    assert counted[2] < 0.75 * counted[1] and counted[8] < 0.5 * counted[2]


# batch norms -------------------------------------------------------------------------------------------------------------


class Normed(nn.Sequential):
    """Linear layers with batch norms between them."""

    def __init__(self, norms: int) -> None:
        super().__init__(*(each for _ in range(norms) for each in (nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU())), nn.Linear(6, 3))


@pytest.mark.parametrize(("norms", "times"), [(1, 15 / 7), (2, 3)])
def test_each_batch_norm_takes_three_more_loops_and_explain_says_what_they_cost(norms: int, times: float) -> None:
    """For its mean, for its variance, and for the sums of its backward; beside them all one loop of the step. With one norm, of 7 products of
    8 x 6 x 3 in the step, the layer before the norm (2) is computed four times, the one behind it (1) and its backward (1) twice."""
    e = compiled(Normed(norms), rows(8), "mb2+bn(exact)").explain()
    assert e.schedule is not None and e.schedule.loops == 3 * norms + 1
    assert e.matmul_flops == pytest.approx(times * e.matmul_flops_one_device)
    assert e.matmul_flops_one_device == compiled(Normed(norms), rows(8), "zero0").explain().matmul_flops
    assert e.schedule.repeated == pytest.approx(1 - 1 / times)
    assert f"2 microbatches, {3 * norms + 1} loops over them ({1 - 1 / times:.1%} of the matmul flops are of earlier loops)" in str(e)
    assert re.search(rf"matmuls .* F/\(N\*t\) .* x{times:.3f}\n", str(e))


@pytest.mark.parametrize("plan", ["mb2", pytest.param("pp2+mb2", marks=wide)])
def test_batch_norms_that_cost_more_than_twice_the_step_must_be_confirmed(plan: str) -> None:
    model, batch, loss = built("batch norm")
    with pytest.raises(PassError) as caught:
        compiled(model, batch, plan, loss)
    said = str(caught.value)
    assert re.match(r"13 loops over the microbatches compute \d\.\d times the step: 17 values of all microbatches are needed .* at norms\.0 \(pipeline_models\.py:\d+\)\n", said)
    assert "fix: bn(local), the statistics of each microbatch" in said and "bn(exact) to pay for it" in said
    assert float(said.split(" times")[0].rpartition(" ")[2]) > 2


@pytest.mark.parametrize("plan", ["mb2+bn(exact)", pytest.param("zero3+dp2+mb2+bn(exact)", marks=wide), pytest.param("pp2+mb2+bn(exact)", marks=wide)])
def test_exact_batch_norms_have_the_statistics_of_the_batch(plan: str) -> None:
    report = verify(Residual(), built("batch norm")[1], plan, loss_fn=classes, steps=2)
    assert report.ok, report


@pytest.mark.parametrize(("plan", "ranks", "m"), [("mb4+bn(local)", 1, 4), ("zero1+dp2+mb2+bn(local)", 2, 2), pytest.param("pp2+mb4+bn(local)", 1, 4, marks=wide)])
def test_local_batch_norms_are_those_of_eager_accumulation(plan: str, ranks: int, m: int) -> None:
    """Three steps beside a loop over microbatches in plain PyTorch; microbatch i is the i-th run of the rows of each rank. A buffer that counts
    forwards counts steps."""
    model, (images, labels), _ = built("batch norm")
    ours, theirs = copy.deepcopy(model).double(), model.double()
    images = images.double()
    optimizer, step = sgd(theirs.parameters()), compiled(ours, (images, labels), plan)
    for _ in range(3):
        loss = step((images, labels))
        optimizer.zero_grad()
        total = 0.0
        for part in torch.arange(8).view(ranks, m, -1).transpose(0, 1).flatten(1):
            each = classes(theirs, (images[part], labels[part])) / m
            each.backward()
            total += float(each.detach())
        optimizer.step()
        assert float(loss) == pytest.approx(total, rel=1e-12)
    have, want = step.state_dict(), theirs.state_dict()
    counters = {name for name, t in want.items() if t.dtype is torch.int64}
    assert len(counters) == 4 and {int(have[name]) for name in counters} == {3}
    for name in want.keys() - counters:
        assert (have[name] - want[name]).abs().max() <= 1e-10 * want[name].abs().max(), name


# what cannot be cut ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ("mb3", "mb3: 3 microbatches do not divide the batch: '0' has 8 rows (8 = 3 * 2 + 2)\n  fix: mb2, or a batch of 9 rows"),
        ("dp2+mb8", "mb8: 8 microbatches do not divide the batch: '0' has 8 rows, 4 of each of 2 data-parallel ranks (8 = 16 * 0 + 8)\n  fix: mb4, or a batch of 16 rows"),
        ("dp3+mb2", "mb2: 2 microbatches do not divide the batch: '0' has 8 rows, 3 data-parallel ranks (8 = 6 * 1 + 2)\n  fix: a batch of 6 rows"),
        ("mb3+bn(local)", "bn(local) of 1: 8 rows are not 1 data-parallel ranks x 3 microbatches (8 = 3 * 2 + 2)\n  fix: another mb, or a batch that divides"),
    ],
)
def test_rows_that_do_not_divide(plan: str, says: str) -> None:
    with pytest.raises(PassError) as caught:
        compiled(Normed(1), rows(8), plan)
    assert str(caught.value) == says


@pytest.mark.parametrize(
    ("plan", "n", "m", "says"),
    [
        ("pp2", 8, 4, "pp2 without mb: 4 microbatches of 2 of the 8 rows that each data-parallel rank has; 20% of the ranks' time is idle"),
        ("pp2+dp3", 8, 1, "pp2 without mb: 1 microbatch, since 8 rows do not divide by 3 ranks; 50% of the ranks' time is idle"),
        ("pp4+mb2", 8, 2, "mb2 is fewer microbatches than pp4 has stages: 60% of the ranks' time is idle (mb8: 27%)"),
    ],
)
def test_a_pipeline_says_how_many_microbatches_it_runs_where_that_may_surprise(plan: str, n: int, m: int, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    step = compiled(mlp(), rows(n), plan, quiet=False)
    assert f"deepseed: {says}\n" in capsys.readouterr().err
    assert step.program.schedule is not None and step.program.schedule.microbatches == m
    stages = len(step.program.schedule.lanes)
    assert f"{idle_share('1f1b', stages, m):.0%} of the ranks' time is idle" in says
    compiled(mlp(), rows(n), plan, quiet=True)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ("pp32+mb2", "32 stages need 31 cut points, the forward has 1\\d.*\\n  fix: use 1\\d stages or fewer"),
        ("pp2(cut=[9])+mb2", "cut=9: no forward op belongs to this module"),
        ("pp3(cut=[4,2])+mb2", "cut=2: its first op is forward op \\d, which is not after that of 4, op \\d.*\\n  fix: name modules in the order"),
    ],
)
def test_a_compile_names_cuts_that_cannot_be(plan: str, says: str) -> None:
    with pytest.raises(PassError, match=says):
        compiled(mlp(), rows(8), plan)


# what microbatches share ---------------------------------------------------------------------------------------------------


def trained(plan: str, **options: Any) -> tuple[list[float], dict[str, Tensor], TrainStep]:
    found = load("hf:LlamaForCausalLM(num_hidden_layers=1)")
    step = TrainStep(found.model, plan, optimizer=torch.optim.AdamW(found.model.parameters(), lr=1e-3), loss_fn=None, quiet=True, clip_grad_norm=CLIP, **options)
    return [float(step(found.batch)) for _ in range(2)], step.state_dict(), step


def test_a_shorter_copy_of_a_parameter_is_made_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as from a copy for each part of each microbatch. Of a parameter that lies in parts, or on several stages, each part has its own."""
    losses, values, step = trained("bf16+mb2")
    program = step.programs.current().executables[0].source
    copies = [op for op in step.program.ops if op.target == "cast" and op.phase != "update" and op.refs[0].name in {i.name for i in step.program.by_role("param")}]
    assert copies and {kind_of(op.part) for op in copies} == {"once"} and len({op.refs[0].name for op in copies}) == len(copies)
    monkeypatch.setattr(loop_microbatches, "_short_copies", lambda p: set())
    again, others, step = trained("bf16+mb2")
    assert step.programs.current().executables[0].source != program
    assert losses == again and all(torch.equal(t, others[key]) for key, t in values.items())


@pytest.mark.parametrize("plan", ["bf16+zero3+dp2+mb2", pytest.param("bf16+pp2+mb2", marks=wide)])
def test_what_is_gathered_or_on_a_stage_is_copied_where_it_is_read(plan: str) -> None:
    found = load("hf:LlamaForCausalLM(num_hidden_layers=1)")
    p = compiled(found.model, found.batch, plan, None).program
    assert not any(op.target == "cast" and op.phase != "update" and kind_of(op.part) == "once" and op.refs[0].name in {i.name for i in p.by_role("param")} for op in p.ops)


@pytest.mark.parametrize("plan", ["zero1+dp2", "zero1+dp2+mb2", "zero2+dp2+mb2"])
def test_a_gathered_parameter_is_read_into_its_place(plan: str) -> None:
    """With microbatches too: it is never there twice."""
    model, batch, loss = small()
    p = compiled(model, batch, plan, loss).program
    source = generate(pipeline.run(p, {"localize": {"coordinate": {"dp": 0}}}, pipeline.EACH_RANK, check=False)[-1].program)
    gathered = [o.ref.name for o in p.outputs if o.role == "param" and p.producers[o.ref.name].target == "wait"]
    assert len(gathered) > 3 and source.count("rt.wait_into(") == len(gathered)


def test_products_and_rows_are_added_where_they_are_made() -> None:
    """A gradient that nothing but the sum over microbatches reads is never there by itself. A step whose values are shown makes them."""
    model, batch, loss = small()
    values = {}
    for plan in ("zero0", "mb2"):
        trained_here = copy.deepcopy(model).double()
        step = TrainStep(trained_here, plan, optimizer=sgd(trained_here.parameters()), loss_fn=loss, widen=True, quiet=True, clip_grad_norm=CLIP)
        values[plan] = [torch.tensor([float(step(batch)) for _ in range(3)]), *step.state_dict().values()]
    assert all(torch.allclose(a, b, rtol=0.0, atol=1e-12) for a, b in zip(*values.values(), strict=True))
    source = step.programs.current().executables[0].source
    products = sum(op.target == "aten.mm" and op.phase == "backward" and all(isinstance(u, Op) and u.target == "accumulate" for u in step.program.uses[op.name]) for op in step.program.ops)
    assert source.count("rt.accumulate_mm(") == products > 3 and source.count("rt.accumulate_rows(") == 1
    assert all(op.kw("scale") is not None for op in step.program.ops if op.target == "optim.sgd")  # the sum is the update's to scale for the clipping, too: no scaled copy
    rank = pipeline.run(step.program, {"localize": {"coordinate": {}}}, pipeline.EACH_RANK, check=False)[-1].program
    looked = generate(rank, looked=True)
    assert "rt.accumulate_mm" not in looked and looked.count("rt.look(") > 100
    n, product = next((n, op) for n, op in enumerate(rank.ops) if op.target == "aten.mm" and rank.uses[op.name][0].target == "accumulate")
    reader = replace(product, results=("reader",), target="aten.neg", args=(Ref(product.name),))
    kernels = {"k": "kernel_of_it"}
    own = generate(replace(rank, ops=(*rank.ops[:n], replace(product, kernel="k"), *rank.ops[n + 1 :])), kernels=kernels)
    assert own.count("rt.accumulate_mm(") == products and own.count(", kernel_of_it)") == 1  # by its kernel, which adds it
    itself = generate(replace(rank, ops=(*rank.ops[:n], replace(product, kernel="k", args=(product.args[0],) * 2), *rank.ops[n + 1 :])), kernels=kernels)
    assert itself.count("rt.accumulate_mm(") == products - 1 and itself.count(" = kernel_of_it(") == 1  # that kernel has one operand
    shared = generate(replace(rank, ops=(*rank.ops[: n + 1], reader, *rank.ops[n + 1 :])))
    assert shared.count("rt.accumulate_mm(") == products - 1 and shared.count("rt.accumulate(") == source.count("rt.accumulate(") + 1  # what something else reads is made by itself
