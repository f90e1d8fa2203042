"""Offload: the same numbers, in two memories. Each plan trains a small Llama beside eager PyTorch, and what was counted is what was predicted."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import deepseed
from deepseed.api import TrainStep
from deepseed.ir.program import params_only
from deepseed.memory import curve
from deepseed.target import load
from deepseed.unroll import unroll
from deepseed.verify import verify

wide = pytest.mark.wide
QUICK = ("zero0+offload(optimizer)", "zero1+dp2+offload(optimizer, gradients)", "zero3+dp2+mb2+bf16+offload(optimizer, gradients, params, activations)")
MORE = (
    "zero0+offload(gradients)", "zero0+offload(params)", "zero0+offload(activations)", "zero0+mb4+offload(gradients)", "tp2+offload(optimizer, params)",
    "zero1+dp2+mb2+offload(gradients)", "zero2+dp2+mb2+offload(optimizer)", "zero3+dp2+offload(optimizer)", "zero3+dp2+offload(optimizer, params)",
    "zero3+dp2+tp2+offload(optimizer, params, activations)", "pp2+mb2+offload(activations)", "zero1+dp2+pp2+mb2+offload(optimizer)",
    "zero3+dp2+pp2+mb4+offload(optimizer, gradients, params, activations)", "pp2+mb4+zb+offload(activations)", "pp2+mb2+interleaved2+offload(optimizer, activations)",
    "zero0+remat+offload(activations)", "zero3+dp2+mb2+remat+offload(optimizer, params, activations)",
)  # fmt: skip


def llama(layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2
    )
    return LlamaForCausalLM(config)


def batch(rows: int = 8) -> dict[str, Tensor]:
    ids = torch.randint(0, 64, (rows, 16), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.clone()}


@cache
def trained(plan: str, layers: int = 2) -> TrainStep:
    """Two steps under a plan, counted."""
    model = llama(layers)
    step = deepseed.compile(model, plan, optimizer=torch.optim.AdamW(model.parameters()), clip_grad_norm=1.0, device_memory="unlimited")
    assert isinstance(step, TrainStep)
    for _ in range(2):
        step(batch())
    return step


@pytest.mark.parametrize("plan", [*QUICK, *(pytest.param(plan, marks=wide) for plan in MORE)])
def test_offloaded_training_is_eager_training(plan: str) -> None:
    exact = plan.replace("+bf16", "")
    report = verify(llama(4 if "interleaved" in plan else 2), batch(), exact, steps=2)
    assert report.ok, str(report)
    assert len(report.counted_peak_bytes) == report.world_size and min(report.counted_host_bytes) > 0


@pytest.mark.parametrize("plan", ["zero0", "zero2+dp2+mb2", *QUICK, *(pytest.param(plan, marks=wide) for plan in MORE)])
@pytest.mark.turn
def test_the_counted_peak_is_the_predicted_one(plan: str) -> None:
    """To 1 %: the counter sees every tensor, temporaries included, and shares no code with the prediction."""
    step = trained(plan, 4 if "interleaved" in plan else 2)
    counted = step.counted_peak_bytes
    said = step.explain().ranks
    assert [c["rank"] for c in counted] == [r.rank for r in said]
    for c, r in zip(counted, said, strict=True):
        assert 0.99 * c["device"] <= r.peak_bytes <= 1.01 * c["device"], (plan, c, r.peak_bytes)
        assert 0.99 * c["host"] <= r.host_bytes <= 1.01 * c["host"], (plan, c, r.host_bytes)


@wide
@pytest.mark.parametrize(
    ("target", "plan"),
    [
        ("hf:GPT2LMHeadModel", "zero3+dp2+offload(optimizer, params)"), ("hf:GPT2LMHeadModel", "tp2+offload(optimizer, params, activations)"),
        ("hf:GPT2LMHeadModel", "zero1+dp2+mb2+offload(optimizer)"), ("hf:T5ForConditionalGeneration", "zero3+dp2+mb2+offload(optimizer, params)"),
        ("hf:T5ForConditionalGeneration", "zero1+dp2+offload(optimizer, gradients, activations)"),
    ],
)  # fmt: skip
def test_tied_weights_and_dropout(target: str, plan: str) -> None:
    found = load(target)
    report = verify(found.model, found.batch, plan, steps=2)
    assert report.ok, str(report)
    model = load(target).model
    step = deepseed.compile(model, plan, optimizer=torch.optim.AdamW(model.parameters()), clip_grad_norm=1.0, device_memory="unlimited")
    step(found.batch)
    for c, r in zip(step.counted_peak_bytes, step.explain().ranks, strict=True):
        assert 0.99 * c["device"] <= r.peak_bytes <= 1.01 * c["device"] and 0.99 * c["host"] <= r.host_bytes <= 1.01 * c["host"], (c, r)


def test_the_optimizer_on_the_host_leaves_parameters_and_gradients_on_the_device() -> None:
    plain, offloaded = trained("zero0"), trained("zero0+offload(optimizer)")
    (before,), (after,) = plain.explain().ranks, offloaded.explain().ranks
    psi = sum(p.numel() * 4 for p in offloaded.model.parameters())
    assert abs(before.peak_bytes - after.peak_bytes - before.optimizer_bytes) <= 0.01 * before.peak_bytes  # moments alone leave: no cast, no shorter copy
    assert after.moved_bytes["params"] == psi and after.moved_bytes["gradients"] == psi  # up once, down once
    assert after.moved_bytes["optimizer"] <= 64 and after.moved_bytes["activations"] == 0
    assert after.host_bytes >= before.optimizer_bytes + psi
    assert not any(i.type.host for i in plain.program.inputs)


def test_a_parameter_in_a_shorter_dtype_is_cast_on_the_host_and_moved_once() -> None:
    step = trained("zero0+mb4+bf16+offload(optimizer)")
    moves = [op for op in step.program.ops if op.target == "to_device.start" and op.kw("kept")]
    matrices = [i for i in step.program.by_role("param") if len(i.type.shape) == 2]
    assert {op.part for op in moves} == {"once.1"} and all(op.type.dtype == "bf16" for op in moves if len(op.type.shape) == 2)
    assert sum(len(op.type.shape) == 2 for op in moves) == len(matrices)
    (rank,) = step.explain().ranks
    assert rank.moved_bytes["params"] == sum(op.type.nbytes for op in moves)


def test_no_more_than_two_layers_of_parameters_are_on_the_device() -> None:
    """By the memory curve of what is made of parameters: shards under way, gathered weights, their casts."""
    layers = 4
    step = trained("zero3+dp2+offload(optimizer, params)", layers)
    p = step.program
    weights = params_only(p)
    most = max(row.get("weights", 0) for row in curve(p, dict.fromkeys(weights, "weights")))
    sizes: dict[str, int] = {}
    for i in p.by_role("param"):
        if ".layers." in i.key:
            layer = i.key.split(".layers.")[1].split(".")[0]
            sizes[layer] = sizes.get(layer, 0) + i.type.nbytes
    assert len(sizes) == layers
    whole = sum(i.type.nbytes for i in p.by_role("param"))
    assert 0 < most <= 2 * max(sizes.values()) < whole


@pytest.mark.parametrize("plan", ["zero2+dp2+offload(optimizer, params)", "zero2+dp2+offload(optimizer, gradients, params)"])
def test_new_parameters_are_gathered_two_layers_at_a_time(plan: str) -> None:
    """Below zero3 they are whole on each host: the parts that ranks have updated go to the device, are gathered and come back."""
    p = trained(plan, 4).program
    new = {r for op in p.ops if op.target.startswith("optim.") for r in op.results}
    for op in p.ops:
        new |= set(op.results) if any(ref.name in new for ref in op.refs) else set()
    most = max(row.get("new", 0) for row in curve(p, dict.fromkeys(new, "new")))
    layer = sum(i.type.nbytes for i in p.by_role("param") if ".layers.0." in i.key)
    assert 0 < most <= 2 * layer


@pytest.mark.parametrize("stage", [1, 2])
def test_new_parameters_from_the_host_are_gathered_in_buckets(stage: int) -> None:
    """In as many messages as those that the device has updated, and one more: a bucket starts while the one before it is used. A large embedding
    makes the buckets large: they hold what the second largest module has."""

    def gathers(plan: str) -> list[int]:
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=4096, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2))
        step = deepseed.compile(model, plan, optimizer=torch.optim.AdamW(model.parameters()), device_memory="unlimited")
        assert isinstance(step, TrainStep)
        return [len(op.results) for op in step.compile(batch()).program.ops if op.target == "all_gather.start" and op.phase == "update"]

    device, host = gathers(f"zero{stage}+dp2"), gathers(f"zero{stage}+dp2+offload(optimizer)")
    assert sum(host) == sum(device) == 39
    assert len(host) <= len(device) + 1 < 8


def test_moves_to_the_device_look_ahead_and_those_to_the_host_end_soon() -> None:
    """A weight is under way before the one before it is used; no move to the host is waited for at once, and none through the whole step."""
    ops = trained("zero3+dp2+offload(optimizer, params)", 4).program.ops
    at = {r: n for n, op in enumerate(ops) for r in op.results}
    used: dict[str, int] = {}
    for n, op in enumerate(ops):
        for ref in op.refs:
            used.setdefault(ref.name, n)
    forward = [op for op in ops if op.target == "to_device.start" and op.phase == "forward"]
    waits = [used[op.name] for op in forward]
    assert waits == sorted(waits) and len(forward) > 30
    assert all(at[after.name] < used[ops[wait].name] for after, wait in zip(forward[1:], waits, strict=False))
    saved = trained("zero0+offload(activations)", 4).program.ops
    starts = [n for n, op in enumerate(saved) if op.target == "to_host.start" and op.phase == "forward"]
    ends = {op.refs[0].name: n for n, op in enumerate(saved) if op.target == "wait"}
    spans = [ends[saved[n].name] - n for n in starts]
    assert sum(span > 1 for span in spans) >= 0.9 * len(spans) and max(spans) < len(saved) / 4


def test_activations_wait_on_the_host() -> None:
    plain, offloaded = trained("zero0", 4), trained("zero0+offload(activations)", 4)
    (before,), (after,) = plain.explain().ranks, offloaded.explain().ranks
    assert after.peak_bytes < 0.7 * before.peak_bytes
    assert after.moved_bytes["activations"] > 0 and after.moved_bytes["activations"] % 2 == 0  # there and back
    assert after.moved_bytes["params"] == after.moved_bytes["gradients"] == 0


def test_gradients_are_summed_on_the_host() -> None:
    step = trained("zero0+mb4+offload(gradients)")
    sums = [op for op in step.program.ops if op.target == "accumulate" and op.type.shape]
    assert sums and all(op.type.host for op in sums)
    (rank,) = step.explain().ranks
    psi = sum(p.numel() * 4 for p in step.model.parameters())
    assert rank.moved_bytes["gradients"] == 5 * psi  # each microbatch's to the host, their sum to the update
    lane = unroll(step.program, 0).program
    assert max(row.get("sums", 0) for row in curve(lane, {r: "sums" for op in lane.ops if op.target == "accumulate" and op.type.shape for r in op.results})) == 0
