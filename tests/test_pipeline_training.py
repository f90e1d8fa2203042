"""What users bring to a pipeline beside a model: their optimizers, precisions, batches of other sizes, evaluation, experts, sequences, odd sizes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pipeline_models
import pytest
import torch
from pipeline_models import Plain, classes
from torch import Tensor, nn, optim

import deepseed
from deepseed.capture.options import Optimizers
from deepseed.ir.contract import PassError
from deepseed.target import load
from deepseed.verify import verify

pytestmark = pytest.mark.filterwarnings("ignore")
wide = pytest.mark.wide
Factory = Callable[[Sequence[nn.Parameter]], Optimizers]


# optimizers -----------------------------------------------------------------------------------------------------------------


def apart(matrices: Any, others: Any) -> Factory:
    """One optimizer for matrices, another for all else."""
    return lambda ps: [matrices([p for p in ps if p.dim() == 2]), others([p for p in ps if p.dim() != 2])]


def groups(parameters: Sequence[nn.Parameter]) -> optim.Optimizer:
    some, others = list(parameters)[::2], list(parameters)[1::2]
    return optim.AdamW([{"params": some, "lr": 1e-3, "weight_decay": 0.1}, {"params": others, "lr": 3e-3, "betas": (0.8, 0.95)}])


OPTIMIZERS: dict[str, Factory] = {
    "SGD": lambda ps: optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Muon": apart(lambda ps: optim.Muon(ps, lr=1e-2), optim.AdamW),
    "two": apart(lambda ps: optim.SGD(ps, lr=0.1, momentum=0.9), lambda ps: optim.Adam(ps, lr=1e-3, amsgrad=True)),
    "groups": groups,
    "Adafactor": lambda ps: optim.Adafactor(ps, lr=1e-2),
}
TRAINED = [
    ("SGD", "dropout", "zero2+dp2+pp2+mb2+zb"), ("Muon", "frozen layers", "zero3+dp2+pp2"), ("two", "a loss of each layer", "zero1+dp2+pp2+interleaved2"),
    ("groups", "seven layers", "zero3+dp2+pp3"), ("Adafactor", "dropout", "zero2+dp2+pp2+gpipe"),
]  # fmt: skip


@pytest.mark.parametrize(("optimizer", "model", "plan"), [TRAINED[0], TRAINED[1], *(pytest.param(*case, marks=wide) for case in TRAINED[2:])])
def test_optimizers(optimizer: str, model: str, plan: str) -> None:
    """Momentum, matrices as a whole, several optimizers, groups with options of their own; shared by ranks within each stage."""
    module, batch, loss = pipeline_models.built(model)
    report = verify(module, batch, plan, loss_fn=loss, optimizer_factory=OPTIMIZERS[optimizer], clip_grad_norm=0.01, backend="simulate")
    assert report.ok, str(report)


# axes and sizes -------------------------------------------------------------------------------------------------------------

LARGE = "(num_hidden_layers=4{more})"
SIZED = [
    ("LlamaForCausalLM", "", "sp2+pp2"),
    ("LlamaForCausalLM", ",tie_word_embeddings=True", "zero3+dp2+sp2+pp2+zb"),
    ("MixtralForCausalLM", "", "ep2+pp2"),
    ("MixtralForCausalLM", "", "zero3+ep2+pp2+gpipe"),
    ("Qwen3MoeForCausalLM", "", "ep2+tp2+pp2"),
    ("MixtralForCausalLM", "", "dp2+ep2+mb2"),
    ("GPT2LMHeadModel", ",vocab_size=50257", "tp2+pp2"),
    ("LlamaForCausalLM", ",num_attention_heads=5,num_key_value_heads=5,hidden_size=40", "zero1+dp2+tp2+pp2+zb"),
    ("LlamaForCausalLM", ",batch_size=7", "dp3+pp2"),
    ("LlamaForCausalLM", ",batch_size=9", "zero2+dp3+pp2+mb3+interleaved2"),
    ("LlamaForCausalLM", ",vocab_size=259,batch_size=6", "order(tp,dp,pp)+zero3+dp2+tp2+pp2+mb3"),
]


@wide
@pytest.mark.parametrize(("model", "more", "plan"), SIZED)
def test_axes_and_sizes(model: str, more: str, plan: str) -> None:
    """Sequences and experts beside stages; vocabularies, heads and rows that the ranks do not divide; any order of the axes."""
    pytest.importorskip("transformers")
    equal(f"hf:{model}{LARGE.format(more=more)}", plan)


def equal(target: str, plan: str) -> None:
    found = load(target)
    report = verify(found.model, found.batch, plan, clip_grad_norm=0.1, backend="simulate")
    assert report.ok, str(report)


def test_rows_come_to_their_experts_in_each_microbatch() -> None:
    """There they are whole over ep, and still cut in time behind the parts of the ranks."""
    pytest.importorskip("transformers")
    equal("hf:MixtralForCausalLM(num_hidden_layers=1,hidden_size=32,vocab_size=64,sequence_length=8)", "ep2+mb2")


@pytest.mark.parametrize("plan", ["bf16+pp2+mb2", pytest.param("bf16+zero3+dp2+pp2+mb2+zb", marks=wide)])
def test_bf16(plan: str) -> None:
    """Widened, the casts are where eager has them. As it is, a step differs from that of the same microbatches on one rank by a rounding of
    bfloat16 at the most (a product of operands that were sent may be added up in another order); what is stored is float32."""
    module, batch, loss = pipeline_models.built("dropout")
    assert verify(module, batch, plan, loss_fn=loss, clip_grad_norm=0.01, backend="simulate").ok
    losses, states = [], []
    for each in (plan, plan.replace("pp2+mb2", "mb2")):
        ours = copy.deepcopy(module)
        step = deepseed.compile(ours, each, loss_fn=loss, optimizer=optim.SGD(ours.parameters(), lr=0.1, momentum=0.9), backend="simulate")
        losses.append([float(step(batch)) for _ in range(2)])
        states.append(step.state_dict())
    assert losses[0] == pytest.approx(losses[1], rel=2**-8) and losses[0][0] != losses[0][1]
    for name, before in module.state_dict().items():
        one, other = states[0][name], states[1][name]
        moved = float((other - before).abs().max())
        assert one.dtype is torch.float32 and float((one - other).abs().max()) <= 2**-7 * moved, name
        assert (moved > 0) == (name != "unused"), name


# batches of other sizes, evaluation -----------------------------------------------------------------------------------------


def of_rows(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, 12, generator=generator).double(), torch.randint(0, 5, (rows,), generator=generator)


def plain() -> nn.Module:
    torch.manual_seed(0)
    return Plain(4).double()


def sgd(model: nn.Module) -> optim.Optimizer:
    return optim.SGD(model.parameters(), lr=0.5, momentum=0.9)


@pytest.mark.parametrize(("plan", "rows"), [("zero3+dp2+pp2", (16, 16, 4, 16)), ("pp2+mb2+zb", (8, 8, 6)), ("dp2+pp2", (8, 5))])
def test_the_last_batch_of_an_epoch_is_smaller(plan: str, rows: Sequence[int]) -> None:
    """A program of its own, with its own microbatches, on the state where the first one put it."""
    ours, theirs = plain(), plain()
    step, eager = deepseed.compile(ours, plan, loss_fn=classes, optimizer=sgd(ours), clip_grad_norm=0.05, backend="simulate"), sgd(theirs)
    for n in rows:
        want = classes(theirs, of_rows(n))
        eager.zero_grad()
        want.backward()
        assert float(nn.utils.clip_grad_norm_(theirs.parameters(), 0.05)) > 0.05
        eager.step()
        assert float(step(of_rows(n))) == pytest.approx(float(want), rel=1e-12, abs=0)
    now = step.state_dict()
    for name, p in theirs.named_parameters():
        assert (now[name] - p).abs().max() <= 1e-10, name


def test_rows_that_microbatches_do_not_divide() -> None:
    ours = plain()
    step = deepseed.compile(ours, "pp2+mb4", loss_fn=classes, optimizer=sgd(ours), backend="simulate")
    step(of_rows(8))
    with pytest.raises(PassError, match=r"mb4: 4 microbatches do not divide .* 6 rows .*\n  fix: mb"):
        step(of_rows(6))


@pytest.mark.parametrize("plan", ["pp2+zb", "zero3+dp2+pp2", pytest.param("tp2+pp4", marks=wide)])
def test_without_an_optimizer(plan: str) -> None:
    """Outputs, losses and gradients, in training and in evaluation."""
    ours, theirs, (x, y) = plain(), plain(), of_rows(8)
    compiled = deepseed.compile(ours, plan, backend="simulate")
    assert torch.allclose(compiled(x), theirs(x), rtol=0, atol=1e-12)
    compiled = deepseed.compile(ours, plan, loss_fn=classes, backend="simulate")
    for mode in (True, False):
        ours.train(mode)
        theirs.train(mode).zero_grad()
        loss, grads = compiled.loss_and_grads((x, y))
        want = classes(theirs, (x, y))
        want.backward()
        assert float(loss) == pytest.approx(float(want), rel=1e-12, abs=0)
        for name, p in theirs.named_parameters():
            if p.grad is not None:
                assert (grads[name] - p.grad).abs().max() <= 1e-12, name
