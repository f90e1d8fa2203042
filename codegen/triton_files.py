"""Kernels through Triton: the source of each (deepseed.codegen.triton) is a file in a folder, which is loaded. What Triton cannot compute runs as its Python function.

On a GPU Triton compiles a kernel when it is first launched. Elsewhere kernels run in its interpreter, which is for tests: ``TRITON_INTERPRET=1``, set before the process begins.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseed.codegen import any_rows, triton_updates
from deepseed.codegen.agreement import difference
from deepseed.codegen.any_rows import Free
from deepseed.codegen.autotune import choice, on_device, operands
from deepseed.codegen.block_sizes import Blocks, power, product_sizes
from deepseed.codegen.expressions import CodegenError
from deepseed.codegen.inductor import python
from deepseed.codegen.kernels import COMPILED, Kernel, function
from deepseed.codegen.triton import launched, source
from deepseed.codegen.triton_attention import in_order
from deepseed.codegen.updates import Formula, name_of
from deepseed.ir.kernels import PRODUCT
from deepseed.ir.program import ITEMSIZE, Op, Program

Launch = Callable[..., Sequence[Tensor]]


def missing(device: str) -> str:
    """What Triton lacks here, with the fix; nothing where it runs."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed\n  fix: pip install 'deepseed[triton]', or another back end"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton has no compiler for a CPU\n  fix: codegen=\"auto\"; or TRITON_INTERPRET=1 before Python starts, which interprets kernels, for tests"
    return ""


def compiled(wanted: Sequence[Kernel], folder: Path, tell: Callable[[str], object]) -> list[Launch]:
    """Each kernel as a callable; on a device with the blocks that are fastest there (deepseed.codegen.autotune)."""
    counted, made = COMPILED.get(), list[Launch]()
    for k in wanted:
        made.append(_compiled(k, folder, tell))
        counted(len(made), len(wanted))
    return made


def of_fragment(fragment: Program, folder: Path, tell: Callable[[str], object] = print, strides: Sequence[tuple[int, ...]] | None = None) -> Launch:
    """A fragment as a callable on its inputs, for who has one without a step; ``strides``: of the inputs where rows do not lie in order."""
    lying = tuple(strides) if strides is not None else tuple([in_order(i.type.shape) for i in fragment.inputs])
    name = f"fragment_{hashlib.sha256(f'{fragment}{lying}'.encode()).hexdigest()[:8]}"
    return _compiled(Kernel(name, fragment, lying, function(fragment, name)), folder, tell)


def update(formulas: Sequence[Formula], folder: Path) -> Launch:
    """Optimizers' updates of tensors of a device. Raises CodegenError."""
    return launch_of(name_of(formulas), triton_updates.source(formulas), folder)


def traffic(k: Kernel) -> list[tuple[int, int]]:
    """Bytes that each kernel of a fragment reads and writes. Raises CodegenError where it runs as its Python function."""
    return [(each.bytes_read, each.bytes_written) for each in launched(k.fragment)]


def of_any_rows(wanted: Sequence[Kernel], free: Free, folder: Path) -> tuple[dict[str, Launch], dict[str, str]]:
    """Each kernel, by name, for any of the sizes that ``free`` stands for; those that no kernel computes run as Python, and why."""
    out, why = dict[str, Launch](), dict[str, str]()
    for k in wanted:
        try:
            out[k.name] = _AnyRows(k, free, folder)
        except CodegenError as error:
            out[k.name], why[k.name] = python(replace(k, source=any_rows.function(k, dict(free)))), str(error)
    return out, why


class _AnyRows:
    """A fragment's kernels for any number of rows; a product's blocks are chosen by how many there are, of a few kinds."""

    MOST = 1 << 10  # rows that get blocks of their own

    def __init__(self, k: Kernel, free: Free, folder: Path) -> None:
        self.k, self.free, self.folder = k, free, folder
        self.product: Op | None = next((op for op in k.fragment.ops if op.target == PRODUCT), None)
        self.read = [i.name for i in k.fragment.inputs].index(self.product.refs[0].name) if self.product is not None else None
        self.made: dict[Blocks | None, Launch] = {}
        self._of(self.MOST)

    def __call__(self, *xs: Tensor) -> Sequence[Tensor]:
        return self._of(1 if self.read is None else xs[self.read].shape[0])(*xs)

    def _of(self, rows: int) -> Launch:
        blocks = None
        if self.product is not None:
            (_, k), (_, n) = (self.k.fragment.types[r.name].shape for r in self.product.refs)
            blocks = product_sizes(min(power(rows), self.MOST), n, k, ITEMSIZE[self.product.type.dtype])
        if blocks not in self.made:
            self.made[blocks] = launch_of(self.k.name, source(self.k.fragment, () if blocks is None else (("kernel_0", blocks),), self.free), self.folder)
        return self.made[blocks]


def _compiled(k: Kernel, folder: Path, tell: Callable[[str], object]) -> Launch:
    try:
        text = source(k.fragment)
    except CodegenError as error:
        tell(f"{k.name} runs as plain Python: {str(error).splitlines()[0]}")
        return python(k)
    if not torch.cuda.is_available() or not any(each.free for each in launched(k.fragment)):  # nothing to choose, and many tensors would be made for it
        return launch_of(k.name, text, folder)
    try:
        given = operands(k, torch.device("cuda", torch.cuda.current_device()))
    except torch.OutOfMemoryError:
        tell(f"{k.name} runs with blocks that were not tried: no memory for its operands beside the model")
        return launch_of(k.name, text, folder)
    best = choice(k, folder, _device(), lambda text: _seconds(text, k.name, folder, given), lambda: on_device(python(k), given), lambda text: _wrong(text, k, folder, given, tell))
    if best.wrong:
        tell(f"{k.name} runs as plain Python: {best.wrong}")
    return python(k) if best.library or best.wrong else launch_of(k.name, source(k.fragment, best.blocks), folder)


def _device() -> str:
    """The card and what compiles for it."""
    import triton

    return f"{torch.cuda.get_device_name()} {torch.version.cuda or torch.version.hip} triton {triton.__version__} torch {torch.__version__}"


def _seconds(text: str, name: str, folder: Path, given: list[Tensor]) -> float:
    """Of a source that may ask for more registers or shared memory than the device has, or that Triton does not compile for it."""
    try:
        return on_device(launch_of(name, text, folder), given)
    except Exception as error:
        if _refused(error):
            return float("inf")
        raise


def _refused(error: Exception) -> bool:
    """Whether it is Triton that gave up, or one of its compiler's passes, which says so in no other way."""
    from triton.errors import TritonError

    return isinstance(error, TritonError) or (isinstance(error, RuntimeError) and "PassManager" in str(error))


def _wrong(text: str, k: Kernel, folder: Path, given: list[Tensor], tell: Callable[[str], object]) -> str:
    """What is wrong with the numbers of a source."""
    try:
        return difference(k, launch_of(k.name, text, folder), given)
    except torch.OutOfMemoryError:
        tell(f"{k.name} was not held against PyTorch's own numbers: no memory for that beside the model")
        return ""
    except Exception as error:
        if _refused(error):
            return f"Triton does not compile it for this device: {(str(error).splitlines() or [type(error).__name__])[0]}"
        raise


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
    return launch if torch.cuda.device_count() < 2 else _guarded(launch)


def _guarded(launch: Launch) -> Launch:
    """On the device that has the operands: Triton launches on the current one."""

    def call(*xs: Any) -> Sequence[Tensor]:
        first = next(x for x in (each if isinstance(each, Tensor) else next(iter(each), None) for each in xs) if x is not None)
        with torch.cuda.device(first.device):
            return launch(*xs)

    return call
