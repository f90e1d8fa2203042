"""Weights in eight bits: which ones, how far they are from what they were, and that a step computes with just those."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from inference_models import generated, ids, prompts, varied

from deepseed.inference import quantize
from deepseed.inference.capture import capture
from deepseed.inference.engine import Engine
from deepseed.inference.errors import InferenceError
from deepseed.inference.quantize import eight_bits, fp8_linear, int8_linear, quantized, whole


def test_int8_is_off_by_half_a_step_at_most() -> None:
    w = torch.randn(33, 70, dtype=torch.float64) * torch.logspace(-3, 3, 33, dtype=torch.float64)[:, None]
    w[5] = 0
    q, scale = eight_bits(w, "int8")
    assert q.dtype is torch.int8 and int(q.abs().max()) == 127 and scale.shape == (33,)
    assert ((whole(q, scale) - w).abs() <= scale[:, None] * (0.5 + 1e-4)).all()  # the scale itself was rounded to float32
    q, scale = eight_bits(w, "fp8")
    assert ((whole(q, scale) - w).abs() <= w.abs() * 2**-4 + scale[:, None] * 2**-10).all()  # three bits of mantissa; below 2^-6 steps of 2^-9


def test_every_fp8_number_is_read_as_it_is() -> None:
    bits = torch.arange(256, dtype=torch.uint8)
    said = bits.view(torch.float8_e4m3fn)
    good = ~said.float().isnan()
    assert torch.equal((quantize._from_fp8(said, torch.float32) * 256)[good], said.float()[good])


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("width", [96, 52, 1])
def test_products_are_those_of_the_whole_matrix(kind: str, rows: int, width: int) -> None:
    torch.manual_seed(0)
    w, x, bias = torch.randn(130, width), torch.randn(2, rows, width), torch.randn(130)
    q, scale = eight_bits(w, kind)
    want = x.double() @ whole(q, scale).double().t() + bias
    got = (int8_linear if kind == "int8" else fp8_linear)(x, q, scale, bias)
    off = float((got - want).norm() / want.norm())
    assert off < (0.005 if kind == "int8" else 1e-6)  # int8: activations, scales and results in bfloat16, 2^-9 each


def test_what_is_stored_is_what_products_read() -> None:
    """By op, with no name: a tied table too, transposed matrices too, norms and positions never."""
    for name, least in (("LlamaForCausalLM", 2 * 7 + 1), ("GPT2LMHeadModel", 2 * 4 + 1), ("Qwen2ForCausalLM", 2 * 7 + 1)):
        model = varied(name)
        state = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
        captured, made, report = quantized(capture(model), state, "int8")
        stored = [n for n in captured.names if n in made and made[n].dtype is torch.int8]
        assert len(report.errors) >= least and len(stored) >= least
        assert {n for n, p in model.named_parameters() if p.dim() == 2} - set(stored) <= {"transformer.wpe.weight", "model.embed_tokens.weight"}
        assert all(e.relative < 0.02 for e in report.errors) and 0 < report.relative < 0.02
        assert report.bytes_after < 0.6 * report.bytes_before
        assert state.keys() == made.keys() - {n for n in made if n.endswith(".scale")} and all(state[n].dtype is torch.float32 for n in stored), "what was given has changed"


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_fp8_computes_as_the_model_with_those_weights(name: str) -> None:
    """The model itself, its matrices replaced by what eight bits say of them, generates the same."""
    model = varied(name)
    engine = Engine(model, max_length=128, quantize="fp8")
    got = ids(engine.generate(prompts(), max_tokens=24))
    before = generated(model, prompts(), 24)
    assert engine.quantized is not None
    with torch.no_grad():
        for e in engine.quantized.errors:
            p = model.get_parameter(e.name)
            t = p.t() if tuple(p.shape) != e.shape or ("GPT2" in name and "lm_head" not in e.name and "wte" not in e.name) else p
            t.copy_(whole(*eight_bits(t.contiguous(), "fp8")))
    assert got == generated(model, prompts(), 24)
    assert got != before


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
    with pytest.raises(InferenceError, match="not split over ranks"):
        Engine(model, "tp2", quantize="int8")
