"""plan_memory and deepseed.solver.remat: texts, the optimum against exhaustive search, equality under plans, and peaks."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from counting import agrees, counted
from hypothesis import given, settings
from hypothesis import strategies as st
from loop_worker import predicted, watched
from small import small

import deepseed
from deepseed import pipeline
from deepseed.ir.contract import PassError
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Program
from deepseed.ir.text import parse
from deepseed.ir.verify import verify as well_formed
from deepseed.memory import memory
from deepseed.passes.group_kernels import group_kernels
from deepseed.passes.plan_memory import plan_memory
from deepseed.solver.between import Between
from deepseed.solver.remat import GAP, choose, levels
from deepseed.verify import verify

HEAD = "program step mesh(dp=2) facts(canonical, captured, explicit, lowered, placed)\n"
# Two layers with a gathered weight each, a softmax and a dropout between; the backward reads all of it.
LAYERS = (
    HEAD
    + """%w : f32[64@dp, 64] param "w"
%v : f32[64@dp, 64] param "v"
%x : f32[64@dp, 64] batch "x"
%seed : i64[2] rng "rng"
origin "a" %a = aten._softmax(%h, -1, false) : f32[64, 64] {at="one", phase="forward"}
%w.s = all_gather.start(%w, axis="dp") : f32[64, 64] {at="one", phase="forward"}
%w.whole = wait(%w.s) : f32[64, 64] {at="one", phase="forward"}
%h = aten.mm(%x, %w.whole) : f32[64@dp, 64] {at="one", phase="forward"}
%a.amax = amax(%h, dims=[1], keepdim=true) : f32[64@dp, 1] {at="one", phase="forward", origin="a"}
%a.sub = aten.sub.Tensor(%h, %a.amax) : f32[64@dp, 64] {at="one", phase="forward", origin="a"}
%a.exp = aten.exp(%a.sub) : f32[64@dp, 64] {at="one", phase="forward", origin="a"}
%a.sum = sum(%a.exp, dims=[1], keepdim=true) : f32[64@dp, 1] {at="one", phase="forward", origin="a"}
%a = aten.div.Tensor(%a.exp, %a.sum) : f32[64@dp, 64] {at="one", phase="forward", origin="a"}
%m = bernoulli(%seed, p=0.5, site="two.drop") : f32[64@dp, 64] {at="two", phase="forward"}
%b = aten.mul.Tensor(%a, %m) : f32[64@dp, 64] {at="two", phase="forward"}
%b.t = permute(%b, dims=[1, 0]) : f32[64, 64@dp] {at="two", phase="forward"}
%v.s = all_gather.start(%v, axis="dp") : f32[64, 64] {at="two", phase="forward"}
%v.whole = wait(%v.s) : f32[64, 64] {at="two", phase="forward"}
%y = aten.mm(%b, %v.whole) : f32[64@dp, 64] {at="two", phase="forward"}
%loss = sum(%y, dims=[0, 1], keepdim=false) : f32[] sum@dp {at="two", phase="forward"}
%g = aten.exp(%y) : f32[64@dp, 64] {at="two", phase="backward"}
%dv = aten.mm(%b.t, %g) : f32[64, 64] sum@dp {at="two", phase="backward"}
%v.s.1 = all_gather.start(%v, axis="dp") : f32[64, 64] {at="two", phase="backward"}
%v.whole.1 = wait(%v.s.1) : f32[64, 64] {at="two", phase="backward"}
%db = aten.mm(%g, %v.whole.1) : f32[64@dp, 64] {at="two", phase="backward"}
%da = aten.mul.Tensor(%db, %m) : f32[64@dp, 64] {at="two", phase="backward"}
%dh = aten._softmax_backward_data(%da, %a, 1, "f32") : f32[64@dp, 64] {at="one", phase="backward"}
%x.t = permute(%x, dims=[1, 0]) : f32[64, 64@dp] {at="one", phase="backward"}
%dw = aten.mm(%x.t, %dh) : f32[64, 64] sum@dp {at="one", phase="backward"}
return %loss loss "loss"
return %dw grad "w"
return %dv grad "v"
"""
)
wide = pytest.mark.wide


def planned(p: Program, **arguments: Any) -> Program:
    """The program after the pass: well formed, typed, every value what it was, and read back from its text."""
    out = plan_memory(p, **arguments)
    pipeline.check_program(out, "plan_memory", execute=False)
    numbering = pipeline.check_translation(p, out, "plan_memory")
    assert numbering is not None and not numbering.unproved
    assert parse(str(out)) == out
    return out


def test_the_backward_computes_layers_again(golden: Callable[[object], None]) -> None:
    """A gather that only the forward had is gathered again, one that the backward had is pulled forward; the mask's site stays."""
    golden(planned(parse(LAYERS), saved=0.0))


def test_what_runs_again_is_fused_as_it_was() -> None:
    out = group_kernels(planned(parse(LAYERS), saved=0.0))
    assert [op.phase for op in out.ops if op.target == "aten._softmax"] == ["forward", "backward"]
    assert not [op.name for op in out.ops if op.target == "aten.exp" and op.name != "g"]


def test_a_kept_gather_is_read_by_both_phases() -> None:
    def gathers(**arguments: Any) -> list[str]:
        return [op.phase for op in planned(parse(LAYERS), **arguments).ops if op.target == "all_gather.start"]

    assert gathers(saved=1.0) == gathers(saved=1.0, every=1) == ["forward", "forward", "backward"]
    assert gathers(saved=1.0, gathers="kept") == gathers(saved=1.0, gathers="solve") == ["forward", "forward"]
    assert gathers(saved=0.0, gathers="solve") == ["forward", "forward", "backward", "backward"]


def test_arguments_that_mean_nothing_are_refused() -> None:
    for wrong in ({"saved": 1.5}, {"saved": -0.1}, {"every": -1}, {"gathers": "never"}):
        with pytest.raises(PassError, match=r"fix: saved from 0 to 1"):
            plan_memory(parse(LAYERS), **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("right", "wrong"),
    [('%m.again = bernoulli(%seed, p=0.5, site="two.drop")', '%m.again = bernoulli(%seed, p=0.5, site="two.drop.again")'),
     ("aten.mm(%b.again, %v.whole.1)", "aten.mm(%a.again, %v.whole.1)"), ("all_gather.start(%w, axis=\"dp\") : f32[64, 64] {at=\"one\", phase=\"backward\"}",
      "all_gather.start(%v, axis=\"dp\") : f32[64, 64] {at=\"one\", phase=\"backward\"}")],
)  # fmt: skip
def test_an_error_in_what_runs_again_is_found(right: str, wrong: str) -> None:
    before = parse(LAYERS)
    text = str(plan_memory(before, saved=0.0))
    assert right in text
    with pytest.raises(pipeline.CheckError, match="after pass plan_memory"):
        pipeline.check_translation(before, parse(text.replace(right, wrong)), "plan_memory")


# the optimum --------------------------------------------------------------------------------------------------------


def drawn(seed: int, ops: int) -> Program:
    """A forward of pointwise ops and views on one or two earlier values, each its own class; a backward that reads some."""
    draw = random.Random(seed)
    rows = {"x": 256}
    lines = ['%x : f32[256, 2] batch "x"']
    for i in range(ops):
        name, source = f"v{i}", draw.choice(list(rows)[-3:])
        like = [v for v in rows if rows[v] == rows[source]]
        kind = draw.choice(("one", "two", "two", "wide", "view"))
        n = rows[source] * (2 if kind == "wide" else 1)
        text = {"one": f"aten.add.Tensor(%{source}, {i})", "two": f"aten.addcmul(%{source}, %{draw.choice(like)}, %{draw.choice(like)}, value={i})",
                "wide": f"pad(%{source}, pads=[0, 0, 0, {rows[source]}], value={i})", "view": f"slice(%{source}, dim=0, start=0, step=1)"}[kind]  # fmt: skip
        lines.append(f'%{name} = {text} : f32[{n}, 2] {{at="m{i}", phase="forward"}}')
        rows[name] = n
    read = sorted(draw.sample([v for v in rows if v != "x"], min(ops, 4)))
    lines += [f'%d{i} = aten.neg(%{v}) : f32[{rows[v]}, 2] {{phase="backward"}}' for i, v in enumerate(read)]
    lines += [f'return %d{i} grad "{i}"' for i in range(len(read))]
    return well_formed(parse("program p mesh() facts(canonical, captured, explicit, lowered, placed)\n" + "\n".join(lines)))


def exhaustive(b: Between, bound: float) -> float:
    """The least seconds of what must run again, over all sets of storages of at most ``bound`` bytes."""
    owner = {s: u for u in b.units for s in u.makes}
    best = float("inf")
    for n in range(len(owner) + 1):
        for kept in combinations(owner, n):
            if b.nbytes(kept) <= bound:
                again: set[str] = set()
                pending = [s for s in b.needed if s not in kept]
                while pending:
                    s = pending.pop()
                    if s not in again:
                        again.add(s)
                        pending += [w for w in owner[s].operands if w not in kept]
                best = min(best, sum({owner[s].ops[0].name: owner[s].seconds for s in again}.values()))
    return best


def test_a_chain_of_any_length_runs_again() -> None:
    lines = ['%v0 : f32[256, 2] batch "x"', *(f'%v{i + 1} = aten.add.Tensor(%v{i}, {i}) : f32[256, 2] {{phase="forward"}}' for i in range(3000))]
    text = "\n".join(["program p mesh() facts(canonical, captured, explicit, lowered, placed)", *lines, '%d = aten.neg(%v3000) : f32[256, 2] {phase="backward"}', 'return %d grad "x"'])
    ops = plan_memory(parse(text), saved=0.0).ops
    assert len(ops) == 3001 and {op.phase for op in ops} == {"backward"}


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 9), st.sampled_from((0.0, 0.2, 0.4, 0.6, 0.8, 1.0)))
def test_the_integer_program_finds_what_exhaustive_search_finds(seed: int, ops: int, saved: float) -> None:
    p = drawn(seed, ops)
    b = Between(p)
    choice = choose(b, saved, 0)
    bound = saved * b.nbytes(b.needed)
    assert choice.nbytes <= bound
    assert choice.seconds == pytest.approx(exhaustive(b, bound), rel=GAP, abs=1e-12)
    planned(p, saved=saved)


# models -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["zero3+dp2+tp2+remat", "zero2+dp2+mb2+bn(local)+remat", *(
    pytest.param(plan, marks=wide) for plan in ("remat", "zero1+dp2+remat", "tp2+remat", "pp2+mb2+bn(local)+zb+remat", "mb2+remat"))])  # fmt: skip
def test_a_step_is_eagers(plan: str) -> None:
    """Dropout, layer norm, batch norm, a tied table, a loss that counts labels."""
    model, batch, loss = small()
    report = verify(model, batch, plan, loss_fn=loss, steps=2)
    assert report.ok, report


@pytest.mark.parametrize(("plan", "arguments"), [
    ("zero3+dp2", {"saved": 0.5, "gathers": "solve"}), pytest.param("zero3+dp2", {"saved": 0.2, "every": 2, "gathers": "kept"}, marks=wide),
    pytest.param("zero3+dp2+pp2+mb2+bn(local)", {"saved": 0.5, "gathers": "solve"}, marks=wide), pytest.param("tp2", {"saved": 0.4}, marks=wide),
])  # fmt: skip
def test_a_step_is_eagers_at_every_level(plan: str, arguments: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    level(monkeypatch, arguments)
    model, batch, loss = small()
    report = verify(model, batch, plan, loss_fn=loss, steps=2)
    assert report.ok, report


MODELS = {
    "Llama": "hf:LlamaForCausalLM(num_hidden_layers=2,tie_word_embeddings=True)",
    "GPT-2": "hf:GPT2LMHeadModel(num_hidden_layers=2,resid_pdrop=0.1,attn_pdrop=0.1,embd_pdrop=0.1)",
    "T5": "hf:T5ForConditionalGeneration(num_layers=2,num_decoder_layers=2,dropout_rate=0.1)",
}


@wide
@pytest.mark.parametrize("plan", ["ep2+remat", "zero3+dp2+ep2+remat"])
def test_ids_that_own_rows_are_kept(plan: str) -> None:
    pytest.importorskip("transformers")
    from deepseed.target import load

    found = load("hf:MixtralForCausalLM(num_hidden_layers=2)")
    report = verify(found.model, found.batch, plan, loss_fn=found.loss_fn, steps=2)
    assert report.ok, report


@wide
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("plan", ["remat", "zero1+dp2+tp2+remat", "zero2+dp2+mb2+remat", "zero3+dp2+remat", "zero3+pp2+dp2+mb2+remat", "pp2+mb2+zb+remat"])
def test_steps_of_models_are_eagers(name: str, plan: str) -> None:
    pytest.importorskip("transformers")
    from deepseed.target import load

    found = load(MODELS[name])
    report = verify(found.model, found.batch, plan, loss_fn=found.loss_fn, steps=2)
    assert report.ok, report


def test_a_models_own_checkpoints_stay_and_their_inputs_are_kept() -> None:
    """Under gradient checkpointing the captured backward computes layers again itself: it reads less than half of the bytes, and ``remat``
    chooses among these."""
    pytest.importorskip("transformers")
    from deepseed.target import load

    plain, checkpointed = Between(deep(4)), Between(deep(4, True))
    assert checkpointed.nbytes(checkpointed.needed) < 0.5 * plain.nbytes(plain.needed)
    found = load("hf:LlamaForCausalLM(num_hidden_layers=2)")
    found.model.gradient_checkpointing_enable()  # type: ignore[operator]
    report = verify(found.model, found.batch, "zero3+dp2+remat", steps=2)
    assert report.ok, report


def test_a_step_is_to_the_bit_what_it_is_without() -> None:
    """Kernels that were fused are, on what runs again too: so are the bits of float32."""
    pytest.importorskip("transformers")
    from deepseed.target import load

    losses = []
    for plan in ("", "remat"):
        found = load("hf:GPT2LMHeadModel(num_hidden_layers=2,resid_pdrop=0.1,attn_pdrop=0.1,embd_pdrop=0.1)")
        step = deepseed.compile(found.model, plan, optimizer=torch.optim.AdamW(found.model.parameters()), backend="simulate", clip_grad_norm=1.0)
        losses.append([float(step(found.batch)) for _ in range(4)])
    assert losses[0] == losses[1]
    assert len({*losses[0]}) == 4


def level(monkeypatch: pytest.MonkeyPatch, arguments: Mapping[str, Any]) -> None:
    """Compile with these arguments of plan_memory, whatever the plan says."""
    made = pipeline.arguments
    monkeypatch.setattr(pipeline, "arguments", lambda *a, **k: made(*a, **k) | {"plan_memory": dict(arguments)})


# memory -------------------------------------------------------------------------------------------------------------


@cache
def deep(layers: int = 8, checkpoints: bool = False) -> Program:
    """The lowered step of a Llama on one rank, without an optimizer."""
    pytest.importorskip("transformers")
    from deepseed.capture import capture
    from deepseed.target import load

    found = load(f"hf:LlamaForCausalLM(num_hidden_layers={layers},sequence_length=64)", meta=True)
    if checkpoints:
        found.model.gradient_checkpointing_enable()  # type: ignore[operator]
    args = pipeline.arguments(Mesh(), 0, {})
    return pipeline.run(capture(found.model, found.batch).program, args, pipeline.SHARED[: pipeline.SHARED.index(plan_memory)], check=False)[-1].program


def activations(arguments: Iterable[Mapping[str, Any]]) -> list[int]:
    """The peak beside what stays, of each."""
    out = []
    for each in arguments:
        found = memory(group_kernels(plan_memory(deep(), **each)))
        out.append(found.peak_bytes - found.resident_bytes)
    return out


def test_the_peak_falls_with_what_is_saved() -> None:
    parts = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)
    peaks = activations({"saved": saved, "every": 1} for saved in parts)
    assert all(b <= 1.02 * a for a, b in pairwise(peaks)), peaks
    assert peaks[-1] < 0.5 * peaks[0], peaks


def test_without_forced_inputs_a_long_chain_comes_alive() -> None:
    """Why ``every`` is there: keeping nothing holds all of the forward at once, in the backward."""
    nothing, layers, everything = activations(({"saved": 0.0}, {"saved": 0.0, "every": 1}, {}))
    assert layers < 0.6 * nothing and nothing > 0.9 * everything


def test_levels_rise_in_time() -> None:
    b = Between(deep())
    found = levels(deep(), steps=4)
    assert found[0] == (1.0, 0) and (0.0, 1) in found and len(found) == len(set(found)) > 8
    seconds = [choose(b, saved, every).seconds for saved, every in found]
    assert all(x <= y * (1 + 2 * GAP) for x, y in pairwise(seconds)), seconds


def test_layers_share_their_variables() -> None:
    """Half as deep again, the integer program is as large."""
    from deepseed.solver.remat import _Problem

    sizes = [len(_Problem(Between(deep(n)), 1, "again").time) for n in (8, 12)]
    assert sizes[0] == sizes[1], sizes


@pytest.mark.parametrize("arguments", [{"saved": 0.0, "every": 1}, *(pytest.param(a, marks=wide) for a in ({}, {"saved": 0.5}, {"saved": 0.3, "every": 2}))])
def test_the_counted_peak_is_the_predicted_one(arguments: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one rank's step in two microbatches, counted by storages while it runs."""
    pytest.importorskip("transformers")
    from deepseed.target import load

    level(monkeypatch, arguments)
    found = load("hf:LlamaForCausalLM(num_hidden_layers=4,sequence_length=64)")
    optimizer = torch.optim.AdamW(found.model.parameters())
    step = deepseed.compile(found.model, "mb2", optimizer=optimizer, backend="simulate", clip_grad_norm=1.0)
    step(found.batch)
    source = step.programs.current().executables[0]._loaded.names["step"]
    peaks, said = watched(lambda: step(found.batch), source).peaks, predicted(step.program, 0, step.mesh)
    assert abs(max(peaks) - max(said)) <= 0.01 * max(said), (peaks, said)


@wide
def test_real_ranks_hold_what_is_predicted() -> None:
    for n, rank in enumerate(counted("hf:LlamaForCausalLM(num_hidden_layers=4,sequence_length=64)", "zero3+dp2+mb2+remat", 2)):
        agrees(rank, n)
