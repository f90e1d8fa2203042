"""Kernels through Triton: the source of each (deepseed.codegen.triton) is a file in a folder, which is loaded. What Triton cannot compute runs as its Python function.

On a GPU Triton compiles a kernel when it is first launched. Elsewhere kernels run in its interpreter, which is for tests: ``TRITON_INTERPRET=1``, set before the process begins.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from deepseed.codegen.expressions import CodegenError
from deepseed.codegen.inductor import python
from deepseed.codegen.kernels import Kernel
from deepseed.codegen.triton import can_emit, launched, source
from deepseed.ir.program import Program


def missing(device: str) -> str:
    """What Triton lacks here, with the fix; nothing where it runs."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed\n  fix: pip install 'deepseed[triton]', or another back end"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton has no compiler for a CPU\n  fix: codegen=\"inductor\"; or TRITON_INTERPRET=1 before Python starts, which interprets kernels, for tests"
    return ""


def compiled(wanted: Sequence[Kernel], folder: Path, tell: Callable[[str], object]) -> list[Callable[..., Sequence[Tensor]]]:
    """Each kernel as a callable."""
    return [_loaded(k, folder, tell) for k in wanted]


def traffic(fragment: Program) -> list[tuple[int, int]] | None:
    """Bytes that each kernel of a fragment reads and writes; None where it runs as its Python function."""
    return [(each.bytes_read, each.bytes_written) for each in launched(fragment)] if can_emit(fragment) else None


def _loaded(k: Kernel, folder: Path, tell: Callable[[str], object]) -> Callable[..., Sequence[Tensor]]:
    try:
        text = source(k.fragment)
    except CodegenError as error:
        tell(f"{k.name} runs as plain Python: {str(error).splitlines()[0]}")
        return python(k)
    return launch_of(k.name, text, folder)


def launch_of(name: str, text: str, folder: Path) -> Callable[..., Sequence[Tensor]]:
    """``launch`` of a source, which Triton reads from a file."""
    path = folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.triton.py"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}.tmp")
        fresh.write_text(text)
        fresh.replace(path)
    found: Any = importlib.util.spec_from_file_location(f"deepseed.generated.{name}", path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    launch: Callable[..., Sequence[Tensor]] = module.launch
    return launch
