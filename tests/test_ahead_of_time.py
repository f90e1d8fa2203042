"""Every emitted kernel compiles for GPUs that are not here, and at the sizes of real models none spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import needs
import pytest

from deepseed.codegen.ahead_of_time import CompileError, compiled

SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}
COMMON = ("sm_80", "sm_90")
SIZES = {"rows": 8, "tokens": 1024, "inner": 14336, "words": 32000}
STANDARD = ("llama_1", "llama_4", "gpt2_3", "gpt2_9", "bert_3", "bert_10", "t5_1", "t5_16")  # norms and what is around them


CODE = """
import json, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from triton_fragments import fragments, resized, parse, retyped
from deepseed.codegen.ahead_of_time import compiled
from deepseed.codegen import triton_updates
from deepseed.codegen.triton import source
from deepseed.ir.program import Program
{lines}
for label, p in found:
    for c in compiled(source(p) if isinstance(p, Program) else triton_updates.source(p), {target!r}, Path({folder!r})):
        print(json.dumps([label, c.kernel, c.registers, c.spilled, c.shared, str(c.assembly)]), flush=True)
"""


def compile_all(folder: Path, target: str, lines: str) -> list[dict[str, Any]]:
    """In a process of its own, where kernels are not interpreted. ``lines`` define ``found``: labels and fragments."""
    code = CODE.format(tests=str(Path(__file__).parent), lines=lines, target=target, folder=str(folder))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_DEFAULT_FP_FUSION": "1", "TRITON_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    keys = ("fragment", "kernel", "registers", "spilled", "shared", "assembly")
    made = [dict(zip(keys, json.loads(line), strict=True)) for line in done.stdout.splitlines() if line.startswith("[")]
    assert made and all(c["shared"] <= SHARED[target] for c in made), made
    assert all(Path(c["assembly"]).stat().st_size for c in made)
    return made


def norms(names: tuple[str, ...], width: int) -> str:
    sizes = {"head": width // 4, **SIZES}
    return f"found = [(f'{{n}} {{d}}', retyped(resized(fragments()[n], **{sizes!r}), d)) for n in {names!r} for d in ('f32', 'bf16')]"


TEMPLATES = """from test_triton_templates import attention, product
found = [(f"{{p.ops[0].target}} {{d}}", p) for d in {dtypes!r} for p in (product(4096, 4096, {n}, d, "gelu"), *attention(1, 32, 4, 2048, 2048, 128, 128, "none", True, d), *attention(1, 64, 1, 2048, 2048, 64, 64, "none", True, d), *attention(1, 32, 4, 2048, 2048, 128, 64, "none", True, d), *attention(1, 32, 4, 2048, 2048, 64, 128, "none", True, d))]"""
SAMPLE = f"""from test_triton_models import fragments_of
from test_triton_templates import attention, product
from test_updates import KINDS, of_groups, update
def of(name, dtype="bf16", width=4096):
    return name, retyped(resized(fragments()[name], head=width // 4, **{SIZES!r}), dtype)
found = [(f"{{name}} {{width}}", of(name, width=width)[1]) for name in ("llama_2", "llama_4", "gpt2_3", "gpt2_6") for width in (4096, 8192)]  # norms with the residual before, and their backward
found += [of(name) for name in ("llama_3", "llama_5", "bert_10")]  # cross entropy over all words, what is behind swiglu's and gelu's products backward
found += [of(name, "f32") for name in ("update_one", "update_all")]  # AdamW as another optimizer's ops would be: of one tensor, of many with the gradient norm; states are float32
found += [("aten.mm " + epilogue, product(4096, 4096, 14336, "bf16", epilogue)) for epilogue in ("gelu", "swiglu")]
found += [("aten.mm and gelu's backward", retyped(p, "bf16")) for p in fragments_of("gpt2", 128, 64, 32, 128, 16384, 50304) if {{"aten.mm", "aten.tanh_backward"}} <= {{op.target for op in p.ops}}]
found += [(f"{{p.ops[0].target}} {{d}} {{e}}", p) for d, e in ((128, 128), (64, 64), (128, 64), (192, 128)) for p in attention(1, 32, 4, 2048, 2048, d, e, "none", True, "bf16")]
found += [(f"{{k}} {{g}}", [update(k, "f32", g, ("skip", "scale"))[1]]) for k in KINDS for g in (("f32", "bf16") if k == "adamw" else ("bf16",))]
found += [("parameter groups", of_groups("bf16", True)[0]), ("keys of one block", attention(32, 12, 1, 64, 64, 64, 64, "bool", False, "bf16")[1])]"""
SHORT = """from test_triton_templates import attention
sizes = [("bf16", 64, 64, False), ("bf16", 64, 64, True), ("bf16", 32, 128, True), ("bf16", 128, 32, True), ("f32", 64, 16, True)]
found = [(f"{dtype} {d} {keys} {mask}", attention(4, 8, group, keys, keys, d, d, mask, causal, dtype)[1]) for dtype, d, keys, causal in sizes for mask, group in (("none", 2), ("bool", 1), ("bias", 1))]"""
MODEL = """from test_triton_models import ODD, fragments_of
found = [(str(n), p) for n, p in enumerate(fragments_of({name!r}, *ODD))]"""

REAL = """from test_triton_models import fragments_of
found = list({{str(q): (str(n), q) for n, p in enumerate(fragments_of(*{sizes!r})) for q in [retyped(p, {dtype!r})]}}.values())"""


@needs.triton
@pytest.mark.wide
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "vit"])
@pytest.mark.parametrize("target", sorted(SHARED))
def test_every_kernel_of_a_training_program_compiles(tmp_path: Path, target: str, name: str) -> None:
    made = compile_all(tmp_path, target, MODEL.format(name=name))
    assert len({c["fragment"] for c in made}) > 20 and all(c["spilled"] == 0 for c in made)


@needs.triton
@pytest.mark.wide
@pytest.mark.parametrize("target", sorted(SHARED))
def test_templates_of_real_sizes_do_not_spill(tmp_path: Path, target: str) -> None:
    """bfloat16 on tensor cores; float32 without them, as exact as PyTorch's default. Heads of 128 features, of 64, and values of another number of features than keys."""
    made = compile_all(tmp_path, target, TEMPLATES.format(dtypes=("bf16", "f32"), n=14336))
    assert not [(c["fragment"], c["kernel"], c["spilled"]) for c in made if c["spilled"]]
    cores = {"sm_80": "mma.sync", "sm_90": "wgmma", "gfx942": "v_mfma"}[target]
    assert all(cores in Path(c["assembly"]).read_text() for c in made if c["fragment"].endswith("bf16"))


@needs.triton
@pytest.mark.wide
@pytest.mark.parametrize("target", sorted(SHARED))
def test_a_backward_of_one_block_does_not_spill(tmp_path: Path, target: str) -> None:
    """As many keys as a program holds. With both masks at once the compiler for gfx942 had ended."""
    made = compile_all(tmp_path, target, SHORT)
    assert {c["kernel"] for c in made} == {"for_heads"} and not [(c["fragment"], c["spilled"]) for c in made if c["spilled"]]


@needs.triton
@pytest.mark.wide
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("width", [4096, 8192])
def test_standard_fragments_of_real_sizes_do_not_spill(tmp_path: Path, target: str, width: int) -> None:
    made = compile_all(tmp_path, target, norms(STANDARD, width))
    assert all(c["spilled"] == 0 for c in made), made


@needs.triton
@pytest.mark.turn(of=4)  # of the sizes and dtypes: each model and target each time
@pytest.mark.parametrize(("width", "dtype"), [(4096, "bf16"), (4096, "f32"), (8192, "bf16"), (8192, "f32")])
@pytest.mark.parametrize("target", COMMON)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "vit"])
def test_every_kernel_of_real_sizes_does_not_spill(tmp_path: Path, target: str, width: int, name: str, dtype: str) -> None:
    """Of 8192 tokens and 50304 words."""
    made = compile_all(tmp_path, target, REAL.format(sizes=(name, 128, 64, width // 128, 128, 4 * width, 50304), dtype=dtype))
    assert len({c["fragment"] for c in made}) > 20
    assert not [(c["fragment"], c["kernel"], c["spilled"]) for c in made if c["spilled"]]


@needs.triton
def test_what_training_launches_most_compiles_and_does_not_spill(tmp_path: Path) -> None:
    """bfloat16, for both generations side by side. Each file once: what is compiled for one size of a model is another file for another."""
    with ThreadPoolExecutor() as both:
        found = dict(zip(COMMON, both.map(lambda target: compile_all(tmp_path / target, target, SAMPLE), COMMON), strict=True))
    for target, made in found.items():
        assert not [(c["fragment"], c["kernel"], c["spilled"]) for c in made if c["spilled"]], target
        assert len({c["fragment"] for c in made}) == 34 and {c["kernel"] for c in made} >= {"attend", "for_queries", "for_keys", "for_heads"}
        cores = {"sm_80": "mma.sync", "sm_90": "wgmma"}[target]
        assert all(cores in Path(c["assembly"]).read_text() for c in made if c["fragment"].startswith(("aten.mm", "sdpa")) and "192" not in c["fragment"])  # those have too few rows for wgmma


def test_a_process_that_interprets_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(CompileError, match=r"TRITON_INTERPRET=1.*\n  fix"):
        compiled("", "sm_90")
    with pytest.raises(CompileError, match=r"sm_1 is no target\n  fix: one of sm_80"):
        compiled("", "sm_1")
