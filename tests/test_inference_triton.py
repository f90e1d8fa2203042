"""An engine whose steps are emitted Triton kernels, in the interpreter: what it says, and how many kernels it launches."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deepseed.codegen.any_rows import general
from deepseed.codegen.expressions import CodegenError
from deepseed.codegen.triton import source
from deepseed.ir.text import parse

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None or importlib.util.find_spec("transformers") is None, reason="needs triton and transformers")
FREE = ((503, "T"), (509, "L"))

CODE = """
import sys
import torch
sys.path.insert(0, {tests!r})
import launches_counted
from inference_models import prompts, varied
from deepseed.inference import native
from deepseed.inference.engine import Engine

native.load = lambda: None  # nothing is compiled
model = varied({name!r}, **{fields!r})
said = {{}}
for codegen in ("python", "triton"):
    launches_counted.launched = 0
    engine = Engine(model, {plan!r}, codegen=codegen, block=4, max_length=64, budget=24, sequences=4)
    done = engine.generate(prompts((9, 2, 30)), max_tokens=4)
    said[codegen] = [c.outputs[0].token_ids for c in done]
    assert codegen == "triton" or launches_counted.launched == 0
x = engine.executable
assert said["python"] == said["triton"] and len({{t for ids in said["triton"] for t in ids}}) > 4, said
assert not x.in_python, x.in_python
assert launches_counted.launched == x.emitted * engine.steps * {ranks} > 0, (launches_counted.launched, x.emitted, engine.steps)
print(x.emitted, x.launches, engine.steps)
"""


def spoken(tmp_path: Path, name: str, plan: str = "tp1", ranks: int = 1, **fields: int) -> tuple[int, int, int]:
    """Kernels of a step, all that it launches, and steps."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).resolve().parent.parent), "DEEPSEED_CACHE_DIR": str(tmp_path)}
    code = CODE.format(tests=str(Path(__file__).parent), name=name, plan=plan, ranks=ranks, fields=fields)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    emitted, launches, steps = map(int, done.stdout.split()[-3:])
    return emitted, launches, steps


@pytest.mark.turn
def test_four_tokens_of_a_llama_through_emitted_kernels(tmp_path: Path) -> None:
    """Prompts in chunks beside decodes: the python back end's tokens, as many launches as the engine says; no more than two lookups of rows are left to torch."""
    emitted, launches, steps = spoken(tmp_path, "LlamaForCausalLM", hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2, head_dim=16)
    assert steps >= 5 and launches == emitted + 2


@pytest.mark.wide
@pytest.mark.parametrize(
    ("name", "plan", "ranks"),
    [("LlamaForCausalLM", "tp2", 2), ("GPT2LMHeadModel", "tp1", 1), ("GPTNeoXForCausalLM", "tp1", 1), ("MistralForCausalLM", "tp1", 1), ("Gemma3ForCausalLM", "tp1", 1), ("Qwen3ForCausalLM", "tp1", 1), ("OPTForCausalLM", "tp1", 1)],
)
def test_other_models_say_what_they_say(tmp_path: Path, name: str, plan: str, ranks: int) -> None:
    spoken(tmp_path, name, plan, ranks)


def test_a_source_holds_for_any_number_of_rows() -> None:
    """Sizes, grids and places follow the number of rows; blocks do not."""
    p = parse("""program kernel mesh() facts()
%i0 : f32[503, 40] batch "i0"
%i1 : f32[40, 24] batch "i1"
%i2 : f32[503, 24] batch "i2"
%a = aten.mm(%i0, %i1) : f32[503, 24] {}
%b = aten.add.Tensor(%a, %i2) : f32[503, 24] {}
return %b output "b"
""")
    text = source(p, (), FREE)
    assert "T = i0.shape[0]" in text and "torch.empty((T, 24)" in text and "x_in = x < T" in text and "503" not in text
    assert '@triton.jit(do_not_specialize=["T"])' in text and '"T": "i32"' in text
    assert general("x.reshape((1, 1006, 509, 64, -1, 0.503))", dict(FREE)) == "x.reshape((1, T * 2, L, 64, -1, 0.503))"
    assert general("x // 1006 % 2012 + 503 * 4", dict(FREE)) == "x // (T * 2) % (T * 4) + T * 4"


GROUPS = {
    "residual": "%a = aten.mm(%i0, %i1) : f32[503, 24] {}\n%b = aten.add.Tensor(%a, %i2) : f32[503, 24] {}\nreturn %b output \"b\"\n",
    "norm": "%s = sum(%i2, dims=[1], keepdim=true) : f32[503, 1] {}\n%b = aten.sub.Tensor(%i2, %s) : f32[503, 24] {}\nreturn %b output \"b\"\nreturn %s output \"s\"\n",
    "rope": "%r = reshape(%i2) : f32[1, 503, 3, 8] {}\n%p = permute(%r, dims=[0, 2, 1, 3]) : f32[1, 3, 503, 8] {}\n%x = slice(%p, dim=3, start=0, step=1) : f32[1, 3, 503, 4] {}\n"
            "%y = slice(%p, dim=3, start=4, step=1) : f32[1, 3, 503, 4] {}\n%n = aten.neg(%y) : f32[1, 3, 503, 4] {}\n%c = cat([%n, %x], dim=3) : f32[1, 3, 503, 8] {}\nreturn %c output \"c\"\n",
    "turned": "%t = permute(%i2, dims=[1, 0]) : f32[24, 503] {}\n%e = aten.exp(%t) : f32[24, 503] {}\n%m = aten.mul.Tensor(%e, %i3) : f32[24, 503] {}\nreturn %m output \"m\"\n",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(GROUPS))
@pytest.mark.turn
def test_one_source_is_right_for_few_rows_and_for_many(name: str) -> None:
    """More than the stand-in's number, so that no block holds all by chance; rows that lie anyhow."""
    import torch
    from triton_fragments import reference
    from triton_worker import Interpreter

    inputs = 'program kernel mesh() facts()\n%i0 : f32[503, 40] batch "i0"\n%i1 : f32[40, 24] batch "i1"\n%i2 : f32[503, 24] batch "i2"\n%i3 : f32[24, 1] batch "i3"\n'
    interpreter, text = Interpreter(), source(parse(inputs + GROUPS[name]), (), FREE)
    try:
        for rows in (1, 2, 40, 1300):
            p = parse((inputs + GROUPS[name]).replace("503", str(rows)))
            given = [torch.randn(*reversed(i.type.shape), generator=torch.Generator().manual_seed(n)).t() if n == 2 else torch.randn(i.type.shape) for n, i in enumerate(p.inputs)]
            got, traffic = interpreter.run(text, given)
            assert traffic.launches == 1
            for a, b in zip(got, reference(p, given), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # float32 sums of 40 in another order
    finally:
        interpreter.close()


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("%a = sum(%i0, dims=[0], keepdim=false) : f32[40] {}", "depends on how many rows"), ('%a = bernoulli(%i1, p=0.5, site="a") : f32[503, 40] {}', "depends on how many rows"),
        ("%a = full(value=1.0) : f32[509, 40] {}", "no input of its group says what L is"), ("%a = aten.mm(%i2, %i0) : f32[40, 40] {}", "contracts any number"),
    ],
)  # fmt: skip
def test_what_depends_on_the_number_of_rows_has_no_such_source(line: str, why: str) -> None:
    p = parse(f'program kernel mesh() facts()\n%i0 : f32[503, 40] batch "i0"\n%i1 : i64[2] batch "i1"\n%i2 : f32[40, 503] batch "i2"\n{line}\nreturn %a output "a"\n')
    with pytest.raises(CodegenError, match=f"{why}(.|\n)*fix"):
        source(p, (), FREE)


def test_what_triton_does_not_serve_is_said() -> None:
    from inference_models import varied

    from deepseed.inference.engine import Engine
    from deepseed.inference.errors import InferenceError

    with pytest.raises(InferenceError, match=r"eight bits have no emitted kernel\n  fix"):
        Engine(varied("LlamaForCausalLM"), codegen="triton", quantize="int8")
    with pytest.raises(InferenceError, match=r"torch.float64.*no emitted kernel of attention\n  fix"):
        Engine(varied("LlamaForCausalLM").double(), codegen="triton")
