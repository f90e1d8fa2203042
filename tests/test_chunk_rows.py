"""chunk_rows: which region, what it gives, under plans and microbatches; what it saves, predicted and counted; what is refused."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from counting import agrees, counted
from torch import Tensor, nn
from torch.nn import functional as F

import deepseed
from deepseed import pipeline
from deepseed.ir.contract import PassError
from deepseed.ir.program import Op, Program
from deepseed.ir.text import parse
from deepseed.memory import memory
from deepseed.passes.chunk_rows import chunk_rows
from deepseed.verify import verify

wide = pytest.mark.wide


class Head(nn.Module):
    """An embedding, a norm and a head of many words; ``tied``: one weight for both."""

    def __init__(self, words: int, width: int, tied: bool = False) -> None:
        super().__init__()
        self.words, self.norm, self.head = nn.Embedding(words, width), nn.LayerNorm(width), nn.Linear(width, words, bias=not tied)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.words(ids)))


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    ids, labels = batch
    logits = model(ids)
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=-100)


def made(words: int = 96, width: int = 8, tied: bool = False, rows: int = 8, tokens: int = 12, meta: bool = False) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    with torch.device("meta" if meta else "cpu"):
        model = Head(words, width, tied)
        ids = torch.randint(0, words, (rows, tokens))
    labels = ids if meta else torch.where(torch.arange(tokens)[None] >= torch.arange(rows)[:, None] % 5, ids.roll(-1, 1), -100)
    return model, (ids, labels)


@cache
def lowered(plan: str = "zero0", **sizes: Any) -> Program:
    model, batch = made(**sizes)
    step = deepseed.compile(model, plan, optimizer=torch.optim.AdamW(model.parameters()), loss_fn=loss_of)
    return next(each.program for each in step.compile(batch).passes if each.name == "plan_memory")


def chunked(p: Program, n: int) -> Program:
    """The program after the pass: typed, every value what it was, and read back from its text."""
    out = chunk_rows(p, chunks=n)
    pipeline.check_program(out, "chunk_rows", execute=False)
    numbering = pipeline.check_translation(p, out, "chunk_rows")
    assert numbering is not None and not numbering.unproved
    assert parse(str(out)) == out
    return out


def of_chunk(p: Program, n: int) -> list[Op]:
    return [op for op in p.ops if op.name.endswith(f".rows{n}")]


def test_no_value_of_all_rows_and_words_is_left() -> None:
    before, after = lowered(), chunked(lowered(), 4)
    assert [t for t in before.types.values() if t.shape == (96, 96)]
    assert not [name for name, t in after.types.items() if t.numel >= 96 * 96 // 2]
    assert len([op for op in after.ops if op.target == "aten.mm" and 96 in op.type.shape and 24 in op.type.shape]) == 4  # logits; their gradient's products give (96, 8) and (24, 8)


def test_a_chunk_is_gone_before_the_next() -> None:
    """Forward and backward of a chunk stand side by side: no value of a chunk is read by another but through a sum."""
    p = chunked(lowered(), 4)
    order = {op.name: n for n, op in enumerate(p.ops)}
    spans = [(min(order[op.name] for op in of_chunk(p, i)), max(order[op.name] for op in of_chunk(p, i))) for i in range(4)]
    assert all(a[1] < b[0] for a, b in pairwise(spans)), spans


@pytest.mark.parametrize("plan", ["zero0", "zero3+dp2", "tp2"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_chunk_keeps_its_groups(plan: str, tied: bool) -> None:
    """The softmax of each chunk is one op again where it was one of all rows."""
    whole = [op for op in pipeline.run(lowered(plan, tied=tied), {}, [pipeline.BY_NAME["group_kernels"]])[-1].program.ops if op.target == "aten._log_softmax"]
    parts = [op for op in pipeline.run(chunked(lowered(plan, tied=tied), 2), {}, [pipeline.BY_NAME["group_kernels"]])[-1].program.ops if op.target == "aten._log_softmax"]
    assert len(parts) == 2 * len(whole)


@pytest.mark.parametrize(("right", "wrong"), [("dim=0, start=24", "dim=0, start=0"), ("add_into(%head.bwd.mm.1.rows0, %head.bwd.mm.1.rows1)", "add_into(%head.bwd.mm.1.rows0, %head.bwd.mm.1.rows0)"),
                                              ("cat([%head.bwd.mm.rows0, %head.bwd.mm.rows1,", "cat([%head.bwd.mm.rows1, %head.bwd.mm.rows0,")])  # fmt: skip
def test_an_error_in_a_chunk_is_found(right: str, wrong: str) -> None:
    text = str(chunked(lowered(), 4))
    assert right in text, text
    with pytest.raises(pipeline.CheckError, match="after pass chunk_rows"):
        pipeline.check_translation(lowered(), parse(text.replace(right, wrong)), "chunk_rows")


PLANS = ["chunked4", "zero1+dp2+chunked2", "zero3+dp2+chunked3", "tp2+chunked4", "sp2+chunked2", "mb2+chunked2", "zero2+dp2+mb2+chunked4", "pp2+mb2+chunked2", "zero3+dp2+tp2+pp2+mb2+chunked2", "remat+chunked4"]


@pytest.mark.parametrize("plan", [pytest.param(p, marks=() if i % 3 == 0 else wide) for i, p in enumerate(PLANS)])
@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=wide)])
def test_equal_to_eager(plan: str, tied: bool) -> None:
    """Loss, gradients and parameters of three steps, float64."""
    model, batch = made(tied=tied)
    found = verify(model, batch, plan, loss_fn=loss_of)
    assert found.ok, found


def llama(words: int, width: int, device: str = "cpu") -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    with torch.device(device):
        config = transformers.LlamaConfig(vocab_size=words, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, use_cache=False)
        model: nn.Module = transformers.LlamaForCausalLM(config)
        return model


def test_the_peak_of_a_large_vocabulary() -> None:
    """A Llama of 128k words, 4096 rows of 256: what a step needs beyond what is stored falls by more than 80 %."""

    def peak(plan: str) -> int:
        model, ids = llama(128256, 256, "meta"), torch.empty(4, 1024, dtype=torch.int64, device="meta")
        step = deepseed.compile(model, plan, optimizer=torch.optim.AdamW(model.parameters()))
        found = memory(step.compile({"input_ids": ids, "labels": ids}).passes[-1].program)
        return found.peak_bytes - found.resident_bytes

    whole, part = peak("zero0"), peak("chunked")
    assert part <= 0.2 * whole, f"{part:,} bytes with chunks, {whole:,} without"


def test_the_same_gradients() -> None:
    """Of each parameter of a Llama, float64, to 1e-12 of its largest: a plain step of rate 1 takes the gradient off."""

    def gradients(plan: str) -> dict[str, Tensor]:
        model = llama(4000, 32).double()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        ids = torch.randint(0, 4000, (4, 16), generator=torch.Generator().manual_seed(1))
        step = deepseed.compile(model, plan, optimizer=torch.optim.SGD(model.parameters(), lr=1.0))
        step({"input_ids": ids, "labels": torch.where(ids % 5 == 0, -100, ids)})
        assert any(".rows3" in op.name for op in step.passes[-1].program.ops) == (plan != "zero0")
        return {name: before[name] - p.detach() for name, p in model.named_parameters()}

    whole, part = gradients("zero0"), gradients("chunked4")
    for name, g in whole.items():
        assert float((part[name] - g).abs().max()) <= 1e-12 * float(g.abs().max()), name


def test_the_peak_is_the_predicted_one() -> None:
    """Counted on a real rank, sums that are added in place included."""
    for number, rank in enumerate(counted("hf:LlamaForCausalLM(vocab_size=4096)", "zero1+dp2+mb2+chunked4", 2)):
        agrees(rank, number)


def test_nothing_wide_nothing_done() -> None:
    p = lowered(words=16, width=8)
    assert chunk_rows(p, chunks=4).ops == p.ops == chunk_rows(p).ops


def test_a_part_of_the_model_is_no_region() -> None:
    """Where a layer's own product is half as wide as the logits, and rows are cut between sequences, what follows it is most of the model, which microbatches would cut."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(hidden_size=6, intermediate_size=33, num_hidden_layers=2, num_attention_heads=1, num_key_value_heads=1, vocab_size=63, max_position_embeddings=16))
    ids = torch.ones(2, 12, dtype=torch.int64)

    def compiled(plan: str) -> Program:
        return deepseed.compile(model, plan, optimizer=torch.optim.SGD(model.parameters()), example_batch={"input_ids": ids, "labels": ids}).program

    with pytest.raises(PassError, match=r"the 24 rows of %lm_head.mm at lm_head cannot be cut into 2 chunks\n  fix: chunkedN with N one of 3, 4"):
        compiled("chunked2")
    assert 0 < len({op.name.rpartition(".rows")[0] for op in compiled("chunked3").ops if ".rows" in op.name}) < 60


def test_rows_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(PassError, match=r"the 96 rows of %head.mm at head cannot be cut into 7 chunks\n  fix: chunkedN with N one of 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 96, or chunked alone"):
        chunk_rows(lowered(tied=True), chunks=7)


def test_logits_that_are_returned_stay_whole() -> None:
    model, batch = made()
    step = deepseed.compile(model, "chunked2")
    assert step(batch[0]).shape == (8, 12, 96)


def test_a_loss_alone_in_chunks() -> None:
    model, batch = made()
    want = float(loss_of(model, batch))
    step = deepseed.compile(model, "chunked4", optimizer=torch.optim.AdamW(model.parameters()), loss_fn=loss_of)
    assert abs(float(step.loss(batch)) - want) < 1e-6  # float32
    assert [op for op in step.passes[-1].program.ops if op.name.endswith(".rows3") and op.phase == "forward"]
