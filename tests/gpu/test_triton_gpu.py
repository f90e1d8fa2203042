"""Emitted Triton kernels on a GPU: every kernel's numbers, a step against eager and torch.compile, and a model of 1.5 billion parameters against the roofline.

Figures are printed (``pytest -s``) for docs/performance.md: the card, the versions, seconds a step, tokens a second, the share of what a large product reaches.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepseed
from deepseed.codegen import triton_files

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from test_triton_models import MODELS, ODD, error, fragments_of
from test_triton_templates import WITHIN, apart, attention, drawn, product
from test_updates import DTYPED, KINDS, SIZES, check_groups, close, of_groups, operands, update
from test_updates import reference as reference_of
from triton_fragments import random_inputs, reference, retyped

STEPS = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.mark.parametrize("name", MODELS)
def test_every_kernel_of_a_training_program(cuda: torch.device, folder: Path, name: str) -> None:
    """float32 to 1e-5 of the python back end's on the CPU, with the blocks that were fastest here."""
    for p in fragments_of(name, *ODD):
        inputs = random_inputs(p)
        got = triton_files.of_fragment(p, folder)(*(x.to(cuda) for x in inputs))
        for o, a, b in zip(p.outputs, got, reference(p, inputs), strict=True):
            assert (found := error(p, a.cpu(), b)) <= 1e-5, f"%{o.ref.name}: {found:.1e}\n{p}"


@pytest.mark.parametrize("dtype", sorted(WITHIN))
@pytest.mark.parametrize("epilogue", ["none", "gelu", "swiglu", "residual"])
def test_products(cuda: torch.device, folder: Path, dtype: str, epilogue: str) -> None:
    p = product(300, 513, 257, dtype, epilogue)
    g = torch.Generator().manual_seed(0)
    inputs = [torch.tensor([1, 3]) if i.type.dtype == "i64" else drawn(i.type.shape, dtype, g) for i in p.inputs]
    (got,) = triton_files.of_fragment(p, folder)(*(x.to(cuda) for x in inputs))
    (want,) = reference(retyped(p, "f64") if dtype == "f32" else p if dtype == "f64" else parse_wide(p, dtype), [x if x.dtype == torch.int64 else x.double() for x in inputs])
    assert apart(got.cpu(), want) <= WITHIN[dtype]


@pytest.mark.parametrize("dtypes", DTYPED)
@pytest.mark.parametrize("kind", KINDS)
def test_updates(cuda: torch.device, folder: Path, kind: str, dtypes: tuple[str, str]) -> None:
    """In place, one launch over tensors of any size, and of one that is long; parameter groups too."""
    _, f = update(kind, *dtypes, ("skip", "scale"))
    for skip in (False, True):
        given = operands(f, (*SIZES, (70_001,)), skip)
        want, there = reference_of(f, given), [[x.to(cuda) for x in each] if isinstance(each, list) else each.to(cuda) for each in given]
        triton_files.update([f], folder)(*there)
        close(f, [[x.cpu() for x in each] if isinstance(each, list) else each.cpu() for each in there], want)


def test_updates_of_parameter_groups(cuda: torch.device, folder: Path) -> None:
    formulas, given, want = of_groups("bf16")
    there = [[x.to(cuda) for x in each] if isinstance(each, list) else each.to(cuda) for each in given]
    triton_files.update(formulas, folder)(*there)
    check_groups(formulas, [[x.cpu() for x in each] if isinstance(each, list) else each.cpu() for each in there], want)


def parse_wide(p: Any, dtype: str) -> Any:
    from deepseed.ir.text import parse

    return parse(str(p).replace(dtype, "f64"))


@pytest.mark.parametrize("tokens", [30, 150])  # keys that a program of the backward holds, and more
@pytest.mark.parametrize("dtype", sorted(WITHIN))
@pytest.mark.parametrize(("mask", "causal"), [("none", True), ("none", False), ("bool", False), ("bias", False)])
def test_attention(cuda: torch.device, folder: Path, dtype: str, mask: str, causal: bool, tokens: int) -> None:
    forward, backward = attention(2, 4, 2, tokens, tokens, 64, 64, mask, causal, dtype)
    _, wide = attention(2, 4, 2, tokens, tokens, 64, 64, mask, causal, "f64")
    g = torch.Generator().manual_seed(0)
    q, k, v = (drawn(forward.types[x].shape, dtype, g) for x in "qkv")
    grad = drawn(forward.types["out"].shape, dtype, g)
    masks = {"none": [], "bool": [torch.rand(2, 1, tokens, tokens, generator=g) > 0.3], "bias": [drawn((2, 1, tokens, tokens), dtype, g)]}[mask]
    out, lse = triton_files.of_fragment(forward, folder)(*(x.to(cuda) for x in (q, k, v, *masks)))
    got = triton_files.of_fragment(backward, folder)(grad.to(cuda), *(x.to(cuda) for x in (q, k, v, *masks)), out, lse)
    want = reference(wide, [x if x.dtype == torch.bool else x.double() for x in (grad, q, k, v, *masks, out.cpu(), lse.cpu())])
    most = max(float(x.abs().max()) for x in want)
    for mine, theirs in zip(got, want, strict=True):
        assert float((mine.cpu().double() - theirs).abs().max()) <= 8 * WITHIN[dtype] * most


def test_a_served_model_says_the_same(cuda: torch.device) -> None:
    """Prompts in chunks beside decodes, through emitted kernels and as the captured graph."""
    from inference_models import ids, prompts, varied

    from deepseed.inference.engine import Engine

    model = varied("LlamaForCausalLM").to(cuda)
    said = [ids(Engine(model, codegen=codegen, block=4, max_length=128, budget=24, sequences=4).generate(prompts((5, 30, 9)), max_tokens=16)) for codegen in ("python", "triton")]
    assert said[0] == said[1]


# speed ----------------------------------------------------------------------------------------------------------------


def llama(width: int, layers: int, words: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=words, hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers, num_attention_heads=width // 128, num_key_value_heads=width // 512 or 1)
    with torch.device("cuda"):
        return LlamaForCausalLM(config)


def seconds(step: Callable[[], object]) -> float:
    times = []
    for n in range(STEPS + 3):
        torch.cuda.synchronize()
        begun = perf_counter()
        step()
        torch.cuda.synchronize()
        times += [perf_counter() - begun] if n >= 3 else []
    return median(times)


def eager(model: nn.Module, batch: dict[str, Tensor], compiled: bool = False) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward = torch.compile(model) if compiled else model

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = forward(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], object]:
    step = deepseed.compile(model, "zero0+bf16", optimizer=torch.optim.AdamW(model.parameters(), lr=1e-4), codegen="triton")
    return lambda: step(batch)


def described() -> str:
    import triton

    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"


def test_a_step_against_eager_and_compiled(cuda: torch.device) -> None:
    """60 million parameters, 8 rows of 512 tokens: not slower than eager."""
    ids = torch.randint(0, 32000, (8, 512), device=cuda)
    batch = {"input_ids": ids, "labels": ids}
    found = {}
    for name, make in (("eager", eager), ("torch.compile", lambda m, b: eager(m, b, True)), ("triton", ours)):
        found[name] = seconds(make(llama(512, 8, 32000), batch))
        torch.cuda.empty_cache()
    print(f"\n{described()}: " + ", ".join(f"{name} {1e3 * s:.2f} ms, {ids.numel() / s:,.0f} tokens/s" for name, s in found.items()))
    assert found["triton"] <= found["eager"]


def test_a_model_of_1500_million_parameters(cuda: torch.device) -> None:
    """The share of the roofline: flops of the step's products over those of one large bfloat16 product in the same time."""
    if torch.cuda.get_device_properties(cuda).total_memory < 40 << 30:
        pytest.skip("40 GiB are needed for 1.5 billion parameters with gradients and moments in float32")
    model = llama(2048, 28, 32000)
    parameters = sum(p.numel() for p in model.parameters())
    ids = torch.randint(0, 32000, (4, 1024), device=cuda)
    took = seconds(ours(model, {"input_ids": ids, "labels": ids}))
    a, b = (torch.randn(8192, 8192, device=cuda, dtype=torch.bfloat16) for _ in range(2))
    peak = 2 * 8192**3 / seconds(lambda: a @ b)
    share = 6 * parameters * ids.numel() / took / peak
    print(f"\n{described()}: {parameters / 1e9:.2f} billion parameters, {1e3 * took:.1f} ms a step, {ids.numel() / took:,.0f} tokens/s, {share:.0%} of {peak / 1e12:.0f} Tflop/s")
    assert share > 0.3
