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

import torch
from torch import Tensor

from deepseed.codegen.autotune import choice, on_device, operands
from deepseed.codegen.expressions import CodegenError
from deepseed.codegen.inductor import python
from deepseed.codegen.kernels import Kernel, function
from deepseed.codegen.triton import can_emit, launched, source
from deepseed.codegen.triton_attention import in_order
from deepseed.ir.program import Program

Launch = Callable[..., Sequence[Tensor]]


def missing(device: str) -> str:
    """What Triton lacks here, with the fix; nothing where it runs."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed\n  fix: pip install 'deepseed[triton]', or another back end"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton has no compiler for a CPU\n  fix: codegen=\"inductor\"; or TRITON_INTERPRET=1 before Python starts, which interprets kernels, for tests"
    return ""


def compiled(wanted: Sequence[Kernel], folder: Path, tell: Callable[[str], object]) -> list[Launch]:
    """Each kernel as a callable; on a device with the blocks that are fastest there (deepseed.codegen.autotune)."""
    return [_compiled(k, folder, tell) for k in wanted]


def of_fragment(fragment: Program, folder: Path, tell: Callable[[str], object] = print, strides: Sequence[tuple[int, ...]] | None = None) -> Launch:
    """A fragment as a callable on its inputs, for who has one without a step; ``strides``: of the inputs where rows do not lie in order."""
    lying = tuple(strides) if strides is not None else tuple([in_order(i.type.shape) for i in fragment.inputs])
    name = f"fragment_{hashlib.sha256(f'{fragment}{lying}'.encode()).hexdigest()[:8]}"
    return _compiled(Kernel(name, fragment, lying, function(fragment, name)), folder, tell)


def traffic(fragment: Program) -> list[tuple[int, int]] | None:
    """Bytes that each kernel of a fragment reads and writes; None where it runs as its Python function."""
    return [(each.bytes_read, each.bytes_written) for each in launched(fragment)] if can_emit(fragment) else None


def _compiled(k: Kernel, folder: Path, tell: Callable[[str], object]) -> Launch:
    try:
        text = source(k.fragment)
    except CodegenError as error:
        tell(f"{k.name} runs as plain Python: {str(error).splitlines()[0]}")
        return python(k)
    if not torch.cuda.is_available():
        return launch_of(k.name, text, folder)
    given = operands(k, torch.device("cuda", torch.cuda.current_device()))
    best = choice(k, folder, torch.cuda.get_device_name(), lambda text: _seconds(text, k.name, folder, given), lambda: on_device(python(k), given))
    return python(k) if best.library else launch_of(k.name, source(k.fragment, best.blocks), folder)


def _seconds(text: str, name: str, folder: Path, given: list[Tensor]) -> float:
    """Of a source that may ask for more registers or shared memory than the device has."""
    from triton.runtime.errors import OutOfResources

    try:
        return on_device(launch_of(name, text, folder), given)
    except OutOfResources:
        return float("inf")


def launch_of(name: str, text: str, folder: Path) -> Launch:
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
    launch: Launch = module.launch
    return launch
