"""The Triton kernels of a report compiled ahead of time, for GPUs that need not be there: what the assembler says of each, and where its assembly lies.

Their blocks are the model's (deepseed.codegen.block_sizes): on a device others may be chosen by trial (deepseed.codegen.autotune).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

from deepseed.codegen import triton_updates
from deepseed.codegen.ahead_of_time import CompileError, check, compiled, known, writable
from deepseed.codegen.expressions import CodegenError
from deepseed.codegen.kernels import Kernel
from deepseed.codegen.triton import source
from deepseed.compiling import Compiling
from deepseed.explain_kernels import KernelReport, Update
from deepseed.friendly import UsageError
from deepseed.runtime.executable import cache_dir


def check_targets(codegen: str | None, targets: Sequence[str]) -> None:
    """Raises UsageError or CompileError, each with the fix, where ``--gpu`` cannot be answered here. ``codegen``: as the user said it, None where not."""
    for target in targets:
        known(target)
    if codegen != "triton":
        given = f"--gpu {' --gpu '.join(targets)}"
        said = f"{given} needs --codegen triton" if codegen is None else f"{given} with --codegen {codegen}"
        raise UsageError(f"{said}: what is compiled ahead of time is Triton source\n  fix: {'add ' if codegen is None else ''}--codegen triton, or leave --gpu out")
    for target in targets:
        check(target)
    writable(cache_dir() / "triton")


def assembled(report: KernelReport, targets: Sequence[str]) -> KernelReport:
    """The report with each kernel's ``compiled``: empty where Triton has no source for it, so that it runs as Python. Equal sources are compiled once. Raises CompileError naming the kernel that
    Triton refuses."""
    targets, sources = tuple(dict.fromkeys(targets)), {name: _source(k) for name, k in report.made.items()} | {name: _source(u) for name, u in report.updates.items()}
    wanted = [(target, text) for text in dict.fromkeys(sources.values()) if text for target in targets]
    names = {text: name for name, text in sources.items()}
    found = {}
    with Compiling(True) as at, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION")  # its default is what a device's kernels have too
        for n, (target, text) in enumerate(wanted):
            at("kernels", n, len(wanted), f"{names[text]} for {target}")
            try:
                found[target, text] = compiled(text, target, cache_dir() / "triton")
            except CompileError as error:
                raise CompileError(f"{names[text]} for {target}: {error}") from None
            except OSError as error:  # of files that are Triton's own: ours say which folder
                raise CompileError(f"{names[text]} for {target}: Triton cannot keep its files: {error}\n  fix: set TRITON_CACHE_DIR to a folder that can be written") from None
            except _refusals() as error:
                raise CompileError(f"{names[text]} for {target}: Triton refuses it: {type(error).__name__}: {str(error).strip()[:300]}\n  fix: --gpu with another target; open a request with its source, in {cache_dir() / 'triton'}") from None
    kernels = [replace(k, compiled=tuple([c for target in targets for c in found.get((target, sources[k.name]), ())])) for k in report.kernels]
    return replace(report, kernels=tuple(kernels), targets=targets)


def _source(k: Kernel | Update) -> str:
    """Of its Triton kernels; "" where there is none, and of what the host does."""
    try:
        return source(k.fragment) if isinstance(k, Kernel) else "" if k.on_host else triton_updates.source(k.formulas)
    except CodegenError:
        return ""


def _refusals() -> tuple[type[Exception], ...]:
    """What Triton, which is installed (``check``), LLVM and the assembler raise."""
    from triton.errors import TritonError

    return (TritonError, RuntimeError, ValueError)
