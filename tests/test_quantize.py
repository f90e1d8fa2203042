"""Weights in eight bits: which ones, how far they are from what they were, and that a step computes with just those."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from gloo import inference
from gloo.launch import ranks
from inference_models import generated, ids, prompts, varied

from deepseed.inference import native, quantize
from deepseed.inference.engine import Engine
from deepseed.inference.errors import InferenceError
from deepseed.inference.quantize import eight_bits, mm, rows, whole

DTYPES = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2**-7, torch.float16: 2**-10}  # of a result, over the largest


def test_int8_is_off_by_half_a_step_at_most() -> None:
    w = torch.randn(33, 70, dtype=torch.float64) * torch.logspace(-3, 3, 33, dtype=torch.float64)[:, None] * torch.logspace(-2, 2, 70, dtype=torch.float64)
    w[5] = 0
    q, scale = eight_bits(w, "int8")
    assert q.dtype is torch.int8 and int(q.abs().max()) == 127 and scale.shape == (33, 3)
    each = scale.repeat_interleave(32, 1)[:, :70]
    assert ((whole(q, scale, "int8") - w).abs() <= each * (0.5 + 1e-12)).all()
    q, scale = eight_bits(w, "fp8")
    assert ((whole(q, scale, "fp8") - w).abs() <= w.abs() * 2**-4 + scale.repeat_interleave(32, 1)[:, :70] * 2**-18).all()  # three bits of mantissa; below 2^-6 steps of 2^-9, of a scale 256 times as large


def test_every_fp8_number_is_read_as_it_is() -> None:
    bits = torch.arange(256, dtype=torch.uint8)
    said = bits.view(torch.float8_e4m3fn)
    good = ~said.float().isnan()
    assert torch.equal((quantize._from_fp8(said, torch.float32) * 256)[good], said.float()[good])
    fast = native.widened(said.view(torch.int8)[None], torch.full((1, 8), 256.0), "fp8", torch.float32)
    assert fast is None or torch.equal(fast[0, good], said.float()[good])


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("width", [96, 52, 1])
@pytest.mark.parametrize("compiled", [True, False])
def test_products_are_those_of_the_whole_matrix(kind: str, width: int, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows and many, in C++ and without; sums of 16 bits are float32, a result is rounded once."""
    if not compiled:
        monkeypatch.setattr(native, "load", lambda: None)
    torch.manual_seed(0)
    for dtype, most in DTYPES.items():
        w, bias = torch.randn(130, width).to(dtype), torch.randn(130).to(dtype)
        q, scale = eight_bits(w, kind)
        for n in (1, 2, 3, 7, 32, 40):
            x = torch.randn(n, width).to(dtype)
            want = x.double() @ whole(q, scale, kind).double().t()
            got = mm(x, q.view(torch.int8), scale, None, kind)
            assert got.dtype is dtype and float((got - want).abs().max() / want.abs().max()) < most * (1 if n <= 32 and compiled else 3), (n, dtype)
            assert torch.equal(mm(x, q.view(torch.int8), scale, bias, kind), got + bias)
        ids = torch.tensor([[3, 129, 0]])
        assert torch.equal(rows(q.view(torch.int8), scale, ids, kind, dtype), whole(q, scale, kind).to(dtype)[ids])


@pytest.mark.parametrize("plan", ["tp1", "tp2"])
def test_what_is_stored_is_what_products_read(plan: str) -> None:
    """By op, with no name: a tied table too, transposed matrices too, norms and positions never."""
    for name, least in (("LlamaForCausalLM", 2 * 7 + 1), ("GPT2LMHeadModel", 2 * 4 + 1), ("Qwen2ForCausalLM", 2 * 7 + 1)):
        model = varied(name)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        engine: Any = Engine(model, plan, max_length=128, quantize="int8")
        report, (source, *_) = engine.quantized, engine.executable._sources
        stored = {i.key for i in source.inputs if i.type.dtype == "i8"}
        assert len(report.errors) >= least and len(stored) >= least
        assert {n for n, p in model.named_parameters() if p.dim() == 2} - {e.name for e in report.errors} <= {"transformer.wpe.weight", "model.embed_tokens.weight"}
        assert all(e.relative < 0.02 for e in report.errors) and 0 < report.relative < 0.02
        assert report.bytes_after < 0.6 * report.bytes_before
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()), "what was given has changed"
        assert engine.executable.whole is not None or plan != "tp1" or native.load() is None, "a step of few rows is no function of its own"


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
@pytest.mark.turn
def test_it_computes_as_the_model_with_those_weights(name: str, kind: str) -> None:
    """The model itself, its matrices replaced by what eight bits say of them, generates the same; so do two ranks, whose parts are those of the whole matrices."""
    model = varied(name)
    got = [ids(Engine(model, plan, max_length=128, quantize=kind, codegen=codegen).generate(prompts(), max_tokens=24)) for plan, codegen in (("tp1", "auto"), ("tp1", "python"), ("tp2", "auto"))]
    before = generated(model, prompts(), 24)
    report = Engine(model, max_length=128, quantize=kind).quantized
    assert report is not None
    with torch.no_grad():
        for e in report.errors:
            p = model.get_parameter(e.name)
            t = p.t() if "GPT2" in name and "lm_head" not in e.name and "wte" not in e.name else p
            t.copy_(whole(*eight_bits(t.contiguous(), kind), kind))
    want = generated(model, prompts(), 24)
    assert got == [want] * 3
    assert want != before


def test_ranks_make_their_own_part(tmp_path: Any) -> None:
    """Of a folder's files, which no rank reads whole: the tokens of one rank, and no rank holds whole weights any more."""
    model = varied("LlamaForCausalLM")
    model.save_pretrained(tmp_path, max_shard_size="100kB")
    want = ids(Engine(model, max_length=128, quantize="int8").generate(prompts((5, 30)), max_tokens=12))
    got = ranks(2, inference.in_eight_bits, str(tmp_path), prompts((5, 30)), 12)
    assert [g[0] for g in got] == [want, want]
    whole_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    assert all(held + eight < 0.2 * whole_bytes for _, held, eight in got)


def test_int8_says_nearly_the_same() -> None:
    model = varied("LlamaForCausalLM")
    (prompt,) = prompts((40,))
    a, b = (Engine(model, max_length=128, quantize=kind).generate([prompt], max_tokens=1, prompt_logprobs=0)[0] for kind in (None, "int8"))
    off = [abs(x.logprob - y.logprob) for x, y in zip(a.prompt_logprobs[1:], b.prompt_logprobs[1:], strict=True)]  # type: ignore[operator]
    assert 0 < sum(off) / len(off) < 0.2  # of logits around 10


def test_kinds_that_cannot_be() -> None:
    model: Any = varied("LlamaForCausalLM")
    with pytest.raises(InferenceError, match="quantize='int3' is unknown"):
        Engine(model, quantize="int3")
