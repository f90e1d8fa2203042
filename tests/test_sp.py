"""sp: the sequence split over ranks. Equal to eager PyTorch, Ulysses by itself at Ulysses's volume, and refused where there is no sequence.

Jacobs et al. 2023 (DeepSpeed-Ulysses), section 3: attention sends its queries, keys, values and result once, all_to_all, forward and
backward; all else stays split along the sequence.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from gloo.equality import verified
from gloo.launch import ranks
from matrix import Mlp, squared_error
from torch import Tensor

import deepseed
from deepseed import closed_forms as form
from deepseed import pipeline
from deepseed.counts import sent_bytes
from deepseed.explain import Explanation, explain
from deepseed.ir.contract import PassError
from deepseed.ir.layout import Split
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import ITEMSIZE, Program
from deepseed.ir.text import parse
from deepseed.passes.placement_sequence import ROWS, SEQUENCE, follow
from deepseed.target import load
from deepseed.verify import verify

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

VOCABULARY, HIDDEN, ROWS_, LENGTH, HEADS = 32000, 512, 4, 1024, 8
MODELS = ("LlamaForCausalLM", "LlamaForCausalLM(num_key_value_heads=1)", "GPT2LMHeadModel", "BertForMaskedLM", "T5ForConditionalGeneration",
          "MixtralForCausalLM", "MambaForCausalLM", "GPTNeoXForCausalLM", "BloomForCausalLM", "ModernBertForMaskedLM", "OPTForCausalLM")  # fmt: skip
PLANS = ("sp2", "sp4", "dp2+sp2", "zero3+sp2", "sp2+tp2")
SAMPLE = [("LlamaForCausalLM", "sp4"), ("GPT2LMHeadModel", "zero3+sp2"), ("BertForMaskedLM", "sp2+tp2"), ("MambaForCausalLM", "sp2"), ("T5ForConditionalGeneration", "dp2+sp2")]


def equal(model: str, plan: str) -> None:
    found = load(f"hf:{model}")
    report = verify(found.model, found.batch, plan, steps=2)
    assert report.ok, str(report)


@pytest.mark.parametrize(("model", "plan"), SAMPLE)
@pytest.mark.turn
def test_a_split_sequence_means_what_eager_means(model: str, plan: str) -> None:
    equal(model, plan)


@pytest.mark.wide
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("model", MODELS)
def test_every_model_and_plan_with_a_split_sequence(model: str, plan: str) -> None:
    equal(model, plan)


# what is chosen ---------------------------------------------------------------------------------------------------------


@cache
def lowered(name: str, layers: int, mesh: Mesh, zero: int = 0) -> tuple[Program, Explanation]:
    from deepseed.capture import capture

    heads = f"num_attention_heads={HEADS}" + (f", num_key_value_heads={HEADS}" if name.startswith("Llama") else "")
    target = f"hf:{name}(num_hidden_layers={layers}, vocab_size={VOCABULARY}, hidden_size={HIDDEN}, batch_size={ROWS_}, sequence_length={LENGTH}, {heads})"
    found = load(target, meta=True)
    captured = capture(found.model, found.batch, optimizer=torch.optim.AdamW(found.model.parameters()), clip_grad_norm=1.0)
    done = pipeline.run(captured.program, pipeline.arguments(mesh, zero, {}), pipeline.SHARED[:4], check=False)
    return done[-1].program, explain(done[-1].program, zero=zero)


def activations(p: Program) -> tuple[Counter[str], Counter[str]]:
    """Collectives of the forward and backward by kind: how many, and how many elements a rank sends."""
    count, sent = Counter[str](), Counter[str]()
    for op in p.ops:
        if op.target.endswith(".start") and op.phase != "update":
            count[op.target] += 1
            sent[op.target] += sent_bytes(p, op) // ITEMSIZE[op.type.dtype]
    return count, sent


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_a_layer_sends_what_ulysses_sends(name: str) -> None:
    mesh = Mesh((("sp", 4),))
    (deep, deep_sent), (flat, flat_sent) = (activations(lowered(name, layers, mesh)[0]) for layers in (3, 2))
    layer, sent = deep - flat, deep_sent - flat_sent
    assert set(layer) == {"all_to_all.start"}
    assert 4 <= layer["all_to_all.start"] <= 8  # queries, keys and values together where one product makes them
    assert sent["all_to_all.start"] == form.value(form.sequence_volume(), L=1, T=ROWS_ * LENGTH, h=HIDDEN, k=HIDDEN, s=4)
    assert flat["all_gather.start"] - flat["all_to_all.start"] <= 2 and flat_sent["all_gather.start"] <= 2 * 3 * ROWS_ * LENGTH  # labels and mask: integers, once


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_activations_stay_split_and_no_product_is_repeated(name: str) -> None:
    p, e = lowered(name, 2, Mesh((("sp", 4),)))
    large = [t for op in p.ops if op.phase != "update" for t in op.types if t.numel >= ROWS_ * LENGTH * HIDDEN and ROWS_ * LENGTH in (t.shape[0], t.numel // HIDDEN)]
    assert len(large) > 40 and all(isinstance(t.layout.on("sp"), Split) for t in large)
    assert not [r for r in e.replicated_ops if r.flops] and e.matmul_flops * 4 == e.matmul_flops_one_device


def test_zero_shares_the_state_over_both_axes() -> None:
    _, e = lowered("LlamaForCausalLM", 2, Mesh((("dp", 2), ("sp", 2))), 3)
    said = {c.what: (c.expected, c.counted) for c in e.closed_forms}
    for what in ("parameters", "gradients", "optimizer", "matmuls"):
        expected, counted = said[what]
        assert expected == pytest.approx(counted, rel=1e-6), what
    expected, counted = said["state, dp, sp"]
    assert expected is not None and counted <= expected


def test_rows_are_left_to_dp() -> None:
    """Rows would divide by 4 without a word sent; then sp were a second dp. The sequence is split instead, along its own dimension."""
    p, _ = lowered("LlamaForCausalLM", 2, Mesh((("sp", 4),)))
    ids = next(i for i in p.by_role("batch") if i.key == "input_ids")
    assert ids.type.layout.on("sp") == Split(1)
    hidden = [t.layout.on("sp") for op in p.ops if op.phase == "forward" for t in op.types if t.shape == (ROWS_, LENGTH, HIDDEN)]
    assert set(hidden) == {Split(1)}


FOLLOWED = """program p mesh() facts(canonical)
%ids : i64[4, 6] batch "ids"
%w : f32[10, 8] param "w"
%x = embedding(%w, %ids) : f32[4, 6, 8] {phase="forward"}
%flat = reshape(%x) : f32[24, 8] {phase="forward"}
%t = permute(%x, dims=[1, 0, 2]) : f32[6, 4, 8] {phase="forward"}
%late = slice(%ids, dim=1, start=1) : i64[4, 5] {phase="forward"}
return %flat output "flat"
return %t output "t"
return %late output "late"
"""


def test_rows_and_sequence_are_followed_through_shapes() -> None:
    marks = follow(parse(FOLLOWED), 6)
    assert marks["x"] == {(ROWS, 0, 1, 4), (SEQUENCE, 1, 1, 6)}
    assert marks["flat"] == {(ROWS, 0, 1, 4), (SEQUENCE, 0, 4, 6)}
    assert marks["t"] == {(ROWS, 1, 1, 4), (SEQUENCE, 0, 1, 6)}
    assert marks["late"] == {(ROWS, 0, 1, 4), (SEQUENCE, 1, 1, 5)}  # a window of the sequence
    assert marks["w"] == frozenset()


# refusals ---------------------------------------------------------------------------------------------------------------


def compiled(model: Any, batch: Any, plan: str, loss_fn: Any = None) -> None:
    deepseed.compile(model, plan, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), loss_fn=loss_fn, backend="simulate")(batch)


def test_a_batch_without_a_sequence_is_refused() -> None:
    with pytest.raises(PassError, match=r"sp=2 splits the batch's sequence over 2 ranks, but 0 of its 2 entries have one") as caught:
        compiled(Mlp(), (torch.randn(8, 32), torch.randn(8, 16)), "sp2", squared_error)
    assert "f32[8, 32]" in str(caught.value) and "fix: a plan without sp: dp2 splits the rows, tp2 the weights" in str(caught.value)


def test_a_length_that_does_not_divide_is_split_unevenly() -> None:
    found = load("hf:LlamaForCausalLM(num_hidden_layers=1)")
    batch = {key: t[:, :15].contiguous() for key, t in found.batch.items()}
    report = verify(found.model, batch, "sp2", steps=1)
    assert report.ok, report


def test_a_sequence_shorter_than_the_ranks_is_refused() -> None:
    found = load("hf:LlamaForCausalLM(num_hidden_layers=1)")
    batch = {key: t[:, :3].contiguous() for key, t in found.batch.items()}
    with pytest.raises(PassError, match=r"sequence has 3 tokens, fewer than the 4 ranks of sp=4\n  fix: sp3"):
        compiled(found.model, batch, "sp4")


# real ranks -------------------------------------------------------------------------------------------------------------


def own_rows(batch: dict[str, Tensor], plan: str) -> list[float]:
    """The losses of a global and of a local batch: every rank of a data-parallel part brings the same whole rows."""
    torch.set_num_threads(1)
    losses = []
    for kind in ("global", "local"):
        model = load("hf:LlamaForCausalLM").model.double()
        step = deepseed.compile(model, plan, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), backend="gloo", batch=kind)
        part = step.mesh.coordinate(torch.distributed.get_rank()).get("dp", 0)
        rows = len(batch["input_ids"]) // step.mesh.sizes.get("dp", 1)
        given = {k: t[part * rows : (part + 1) * rows] for k, t in batch.items()} if kind == "local" else batch
        losses += [float(step(given)) for _ in range(3)]  # the third local one goes to the ranks without being joined first
    return losses


def test_real_ranks_with_global_and_local_batches() -> None:
    batch = load("hf:LlamaForCausalLM").batch
    got = ranks(4, own_rows, batch, "dp2+sp2")
    assert all(rank[:3] == pytest.approx(rank[3:], rel=1e-12) and rank == got[0] for rank in got)


def test_real_ranks_are_eager() -> None:
    for reports in ranks(4, verified, [("gpt2", "dp2+sp2", "adamw"), ("llama", "sp4", "adamw")]):
        assert all(r.ok for r in reports), "\n".join(map(str, reports))
