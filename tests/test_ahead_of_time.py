"""Every emitted kernel compiles for GPUs that are not here, and at the sizes of real models none spills."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deepseed.codegen.ahead_of_time import CompileError, compiled

installed = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install 'deepseed[triton]'")
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}
SIZES = {"rows": 8, "tokens": 1024, "inner": 14336, "words": 32000}
STANDARD = ("llama_1", "gpt2_3", "bert_3", "t5_1")  # norms and what is around them


def compile_all(folder: Path, target: str, names: list[str] | None = None, **sizes: int) -> list[dict[str, Any]]:
    """In a process of its own, where kernels are not interpreted."""
    code = f"""
import json, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from triton_fragments import fragments, resized, parse, retyped
from deepseed.codegen.ahead_of_time import compiled
from deepseed.codegen.triton import source
for name in {names!r} or sorted(fragments()):
    p = resized(fragments()[name], **{sizes!r}) if {bool(sizes)} else parse(fragments()[name])
    for dtype in ("f32", "bf16") if {bool(sizes)} else ("f32",):
        for c in compiled(source(retyped(p, dtype)), {target!r}, Path({str(folder)!r})):
            print(json.dumps([name, dtype, c.kernel, c.registers, c.spilled, c.shared, str(c.assembly)]), flush=True)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_DEFAULT_FP_FUSION": "1", "TRITON_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    keys = ("fragment", "dtype", "kernel", "registers", "spilled", "shared", "assembly")
    return [dict(zip(keys, json.loads(line), strict=True)) for line in done.stdout.splitlines()]


@installed
@pytest.mark.wide
@pytest.mark.parametrize("target", sorted(SHARED))
def test_every_kernel_compiles(tmp_path: Path, target: str) -> None:
    made = compile_all(tmp_path, target)
    assert len({c["fragment"] for c in made}) >= 60
    assert all(c["shared"] <= SHARED[target] for c in made)
    assert all(Path(c["assembly"]).stat().st_size for c in made)


@installed
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("width", [4096, 8192])
def test_norms_of_real_sizes_do_not_spill(tmp_path: Path, target: str, width: int) -> None:
    made = compile_all(tmp_path, target, ["llama_1"], head=width // 4, **SIZES)
    assert made and all(c["spilled"] == 0 for c in made), made


def test_a_process_that_interprets_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(CompileError, match=r"TRITON_INTERPRET=1.*\n  fix"):
        compiled("", "sm_90")
    with pytest.raises(CompileError, match=r"sm_1 is no target\n  fix: one of sm_80"):
        compiled("", "sm_1")
